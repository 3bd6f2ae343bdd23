"""What a method is: the heads it has, its loss on encoded views, what it carries between steps."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from cassle_jax.checks import check_at_least

PyTree = Any
Schedule = Callable[[Array], Array]


@struct.dataclass
class ViewBatch:
    """One view of every image in a batch, with what the projector is told of it.

    Attributes:
      images: normalised views.
      descriptor: how each view was augmented, ω; its width is 0 for an unconditioned method.
    """

    images: Float[Array, "B S S C"]
    descriptor: Float[Array, "B D"]


@struct.dataclass
class TrainingViews:
    """All that one step trains on.

    Attributes:
      views: the views of the batch; the first two are the pair AugSelf compares.
      differences: for the pairs (1, 2) and (2, 1), each predicted difference by name.
    """

    views: tuple[ViewBatch, ...]
    differences: tuple[dict[str, Float[Array, "B K"]], ...] = ({}, {})


@struct.dataclass
class Encoded:
    """One view as the networks see it; all float32.

    Attributes:
      features: the encoder's output y.
      projection: the projector's output z.
      prediction: the predictor's output p, where the method has one.
    """

    features: Float[Array, "B F"]
    projection: Float[Array, "B D"]
    prediction: Float[Array, "B D"] | None = None


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """An MLP head: `depth` linear layers, BatchNorm and ReLU between them (CASSLE, appendix)."""

    hidden: int
    out: int
    depth: int
    last_bn: bool = False
    last_bn_affine: bool = True


class Networks(nn.Module):
    """The encoder and the heads of one method, under the names they have in the parameters.

    Attributes:
      factories: for each name, what builds the module. `encoder` and `projector` must be there;
        `predictor`, `image_conditioner` and `augself_…` may.
    """

    factories: Mapping[str, Callable[[], nn.Module]]

    def setup(self):
        """Builds the modules."""
        for name, factory in self.factories.items():
            setattr(self, name, factory())

    def encode(self, view: ViewBatch, *, train: bool) -> Float[Array, "B F"]:
        """The encoder's features y of a view."""
        images = view.images
        if "image_conditioner" in self.factories:
            images = self.image_conditioner(images, view.descriptor, train)
        return self.encoder(images, train)

    def embed(self, view: ViewBatch, *, train: bool, predict: bool = True) -> Encoded:
        """Encoder, conditioned projector and, if `predict`, the predictor where there is one."""
        features = self.encode(view, train=train)
        projection = self.projector(features, view.descriptor, train)
        has_predictor = predict and "predictor" in self.factories
        prediction = self.predictor(projection, view.descriptor, train) if has_predictor else None
        return Encoded(features, projection, prediction)


@dataclasses.dataclass(frozen=True)
class Method:
    """A joint-embedding method; its fields are its hyper-parameters.

    A new method is a subclass in a file of its own and a line in `METHODS`. It says which views go
    through which network, which heads there are, and what the loss is; optimisers, conditioning,
    AugSelf, devices and checkpoints are nobody's business here.

    Class attributes:
      online_views: indices of the views the trained networks encode.
      target_views: indices of the views the momentum networks encode; empty for none.
      target_first: whether momentum networks follow before the targets are computed (MoCo-v3)
        instead of after the optimiser's step.
    """

    online_views: ClassVar[tuple[int, ...]] = (0, 1)
    target_views: ClassVar[tuple[int, ...]] = ()
    target_first: ClassVar[bool] = False

    def projector(self, feature_width: int) -> HeadShape:
        """The projector's shape, on an encoder with `feature_width` features."""
        raise NotImplementedError

    def predictor(self, feature_width: int) -> HeadShape | None:
        """The predictor's shape; `None` for a method without one."""
        del feature_width
        return None

    def initial_memory(self, key: Array) -> PyTree:
        """What the method carries between steps besides its networks, such as a queue."""
        del key
        return {}

    def loss(
        self,
        online: Mapping[int, Encoded],
        target: Mapping[int, Encoded],
        memory: PyTree,
        axis_name: str | None,
    ) -> Float[Array, ""]:
        """The objective on this device's samples.

        Args:
          online: by view index, what the trained networks made of it.
          target: by view index, what the momentum networks made of it; no gradient.
          memory: what `update_memory` returned last.
          axis_name: the devices that share the global batch; `None` for a single one.
        """
        raise NotImplementedError

    def update_memory(
        self,
        memory: PyTree,
        online: Mapping[int, Encoded],
        target: Mapping[int, Encoded],
        axis_name: str | None,
    ) -> PyTree:
        """The memory after a step; must come out the same on every device."""
        del online, target, axis_name
        return memory

    def target_momentum(self, epoch: Float[Array, ""], epochs: float) -> Float[Array, ""] | float:
        """How much of the momentum networks stays in the update after `epoch` whole epochs."""
        raise NotImplementedError

    def after_update(self, params: PyTree) -> PyTree:
        """Constraints on the parameters, applied after each optimiser step."""
        return params

    def parameter_group(self, path: tuple[str, ...], array: Array) -> str:
        """The name of the learning-rate group of the parameter at `path`."""
        del path, array
        return "default"

    def group_schedules(self, schedule: Schedule, peak: float) -> dict[str, Schedule | None]:
        """The learning rate of each group over the steps; `None` freezes a group.

        Args:
          schedule: the run's own schedule.
          peak: its highest value.
        """
        del peak
        return {"default": schedule}

    def check_projector(self, hidden: int, out: int, depth: int) -> None:
        """Raises ValueError for sizes no projector can have; hidden 0 is the features' width."""
        check_at_least(0, method__projector_hidden=hidden)
        check_at_least(1, method__projector_out=out, method__projector_depth=depth)

    def check(self, global_batch: int, local_batch: int) -> None:
        """Raises ValueError, naming the setting, where the method cannot work with these sizes."""
        del global_batch, local_batch


def constant(value: float) -> Schedule:
    """A schedule that never changes."""
    return lambda step: jnp.full_like(step, value, dtype=jnp.float32)
