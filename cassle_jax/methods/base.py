"""What a method is: the views and heads it has, its loss, what it carries between steps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import check_at_least

PyTree = Any
Schedule = Callable[[Array], Array]
Passes = tuple[tuple[int, ...], ...]

# The learning-rate group of parameters that stay as they are.
FROZEN = "frozen"

# What the names of the plain branch's heads begin with, where a run has one.
PLAIN = "plain_"

# The networks that `Networks.encode` uses; all others are heads.
ENCODING = ("encoder", "image_conditioner")


@struct.dataclass
class ViewBatch:
    """One view of every image in a batch, with the ω that conditions the projector.

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
    prediction: Float[Array, "B P"] | None = None


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where in a run a step stands.

    Attributes:
      step: steps done before it.
      epoch: epochs passed before it.
      epochs: length of the run.
    """

    step: Int[Array, ""] | int
    epoch: Float[Array, ""] | float
    epochs: float

    @property
    def whole_epoch(self) -> Float[Array, ""]:
        """Epochs completed before the step."""
        return jnp.floor(self.epoch)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step has made of this device's samples before its loss.

    Attributes:
      online: by view index, what the trained networks made of it.
      target: by view index, what the momentum networks made of it; no gradient.
      memory: what `update_memory` returned last.
      moment: where in the run it stands.
      axis_name: the devices that share the global batch; `None` for a single one.
    """

    online: Mapping[int, Encoded]
    target: Mapping[int, Encoded]
    memory: PyTree
    moment: Moment
    axis_name: str | None = None

    @property
    def pair(self) -> tuple[Encoded, Encoded]:
        """The first two views; of the second the momentum networks' if only they see it."""
        return self.online[0], self.online[1] if 1 in self.online else self.target[1]


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
        `predictor`, `image_conditioner` and `augself_…` may, and so may the plain branch's
        `plain_projector` and `plain_predictor`.
    """

    factories: Mapping[str, Callable[[], nn.Module]]

    def setup(self):
        """Builds the modules."""
        for name, factory in self.factories.items():
            setattr(self, name, factory())

    @property
    def branches(self) -> dict[str, "Networks"]:
        """The networks as each branch has them, its own heads as `projector` and `predictor`.

        The branch "" has the conditioned heads, and `PLAIN`, where there is one, those without ω.
        """
        plain = branch_of(self.factories, PLAIN)
        both = {"": Networks(branch_of(self.factories, "")), PLAIN: Networks(plain)}
        return both if f"{PLAIN}projector" in self.factories else {"": self}

    def encode(self, view: ViewBatch, *, train: bool) -> Float[Array, "B F"]:
        """The encoder's features y of a view."""
        images = view.images
        if "image_conditioner" in self.factories:
            images = self.image_conditioner(images, view.descriptor, train)
        return self.encoder(images, train)

    def project(
        self,
        features: Float[Array, "B F"],
        descriptor: Float[Array, "B D"],
        *,
        train: bool,
        predict: bool = True,
    ) -> Encoded:
        """The conditioned projector and, if `predict`, the predictor where there is one."""
        projection = self.projector(features, descriptor, train)
        has_predictor = predict and "predictor" in self.factories
        prediction = self.predictor(projection, descriptor, train) if has_predictor else None
        return Encoded(features, projection, prediction)

    def embed(self, view: ViewBatch, *, train: bool, predict: bool = True) -> Encoded:
        """Encoder and heads on one view."""
        features = self.encode(view, train=train)
        return self.project(features, view.descriptor, train=train, predict=predict)

    def encode_passes(
        self, views: Sequence[ViewBatch], passes: Passes
    ) -> dict[int, Float[Array, "B F"]]:
        """Training features of the views that `passes` names, by view index.

        Args:
          views: of the batch.
          passes: view indices; the views of one pass go through the encoder as one batch, and share
            BatchNorm's statistics.
        """
        features = {}
        for indices in passes:
            batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *_each(views, indices))
            features |= _split(self.encode(batch, train=True), indices)
        return features

    def project_passes(
        self,
        features: Mapping[int, Float[Array, "B F"]],
        descriptors: Sequence[Float[Array, "B D"]],
        passes: Passes,
        *,
        predict: bool = True,
    ) -> dict[int, Encoded]:
        """What the heads, training, make of the features of the views that `passes` names.

        Args:
          features: by view index.
          descriptors: of every view.
          passes: view indices; the views of one pass go through the heads as one batch.
          predict: whether the predictor, where there is one, is used.
        """
        embedded = {}
        for indices in passes:
            encoded = self.project(
                jnp.concatenate(_each(features, indices)),
                jnp.concatenate(_each(descriptors, indices)),
                train=True,
                predict=predict,
            )
            embedded |= _split(encoded, indices)
        return embedded


def branch_of(tree: Mapping[str, PyTree], branch: str) -> dict[str, PyTree]:
    """Values by network as a branch of heads has them, see `Networks.branches`."""
    heads = {name.removeprefix(PLAIN): tree[name] for name in tree if name.startswith(PLAIN)}
    shared = {name: value for name, value in tree.items() if not name.startswith(PLAIN)}
    return shared | heads if branch else shared


def with_branch(
    tree: Mapping[str, PyTree], branch: str, values: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """`tree` with what `branch_of(tree, branch)` has become; the plain branch changes its heads."""
    if not branch:
        return {**tree, **values}
    heads = [name for name in tree if name.startswith(PLAIN)]
    return {**tree, **{name: values[name.removeprefix(PLAIN)] for name in heads}}


def _each(items: Sequence | Mapping, indices: tuple[int, ...]) -> list:
    return [items[index] for index in indices]


def _split(batch: PyTree, indices: tuple[int, ...]) -> dict[int, PyTree]:
    """The rows of each view of a pass, by its index."""
    size = len(jax.tree.leaves(batch)[0]) // len(indices)
    return {
        index: jax.tree.map(itemgetter(slice(place * size, (place + 1) * size)), batch)
        for place, index in enumerate(indices)
    }


@dataclasses.dataclass(frozen=True)
class Method:
    """A joint-embedding method; its fields are its hyper-parameters.

    A new method is a subclass in a file of its own and a line in `METHODS`. It says which views go
    through which network, which heads there are, and what the loss is; optimisers, conditioning,
    AugSelf, devices and checkpoints are no part of a method.

    Class attributes (or properties, where they depend on hyper-parameters):
      recipe: settings a configuration of the method starts from, by full name, such as
        `{"optimizer.name": "adamw"}`.
      published: settings by which the published CASSLE code differs from the method's paper.
      online_passes: the views the trained networks encode. Those of one pass share a batch, and
        with it BatchNorm's statistics; by default each view has a pass of its own.
      head_passes: the same for the trained heads, where they have other passes than the encoder.
      target_passes: the views the momentum networks encode, likewise; empty for no such networks.
      target_first: whether momentum networks follow before the targets are computed (MoCo-v3)
        instead of after the optimiser's step.
    """

    recipe: ClassVar[Mapping[str, Any]] = {}
    published: ClassVar[Mapping[str, Any]] = {}
    online_passes: ClassVar[Passes] = ((0,), (1,))
    head_passes: ClassVar[Passes | None] = None
    target_passes: ClassVar[Passes] = ()
    target_first: ClassVar[bool] = False

    def views(self, first: AugmentSpec, second: AugmentSpec) -> tuple[AugmentSpec, ...]:
        """How each view of a step is augmented.

        Args:
          first: the run's augmentation of first views.
          second: that of second views; the same unless `augment.asymmetric`.
        """
        return first, second

    def projector(self, feature_width: int) -> HeadShape:
        """The projector's shape, on an encoder with `feature_width` features."""
        raise NotImplementedError

    def predictor(self, feature_width: int) -> HeadShape | Callable[[], nn.Module] | None:
        """The head on the projection: an MLP's shape, or what builds a module of the method's own.

        Such a module is called with (projection, descriptor, train). `None` for no such head.
        """
        del feature_width
        return None

    def initial_memory(self, key: Array) -> PyTree:
        """What the method carries between steps besides its networks, such as a queue."""
        del key
        return {}

    def loss(
        self, step: Step, networks: Networks
    ) -> Float[Array, ""] | Mapping[str, Float[Array, ""]]:
        """The objective on this device's samples.

        Args:
          step: the embedded views.
          networks: the trained networks, bound, for an objective that uses a head on more.

        Returns:
          The loss; or its terms by name, which are added up and each logged.
        """
        raise NotImplementedError

    def update_memory(self, step: Step) -> PyTree:
        """The memory after a step; must come out the same on every device."""
        return step.memory

    def target_momentum(self, moment: Moment) -> Float[Array, ""] | float:
        """How much of the momentum networks stays in the update of a step."""
        raise NotImplementedError

    def after_update(self, params: PyTree) -> PyTree:
        """Constraints on the parameters, applied after each optimiser step to each branch's."""
        return params

    def parameter_group(self, path: tuple[str, ...], array: Array) -> str:
        """The learning-rate group of the parameter at `path`; `FROZEN` never moves."""
        del path, array
        return "default"

    def group_schedules(self, schedule: Schedule, peak: float) -> dict[str, Schedule]:
        """The learning rate of each group over the steps.

        Args:
          schedule: the run's own schedule.
          peak: its highest value.
        """
        del peak
        return {"default": schedule}

    def in_steps(self, steps_per_epoch: int) -> "Method":
        """The method of a run, with all that `group_schedules` needs in steps counted in them."""
        del steps_per_epoch
        return self

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


def rising_momentum(start: float, moment: Moment, *, per_step: bool = True) -> Float[Array, ""]:
    """From `start` up to 1 along half a cosine (BYOL, section 3.3), each step or each epoch."""
    epoch = moment.epoch if per_step else moment.whole_epoch
    return 1 - (1 - start) * (jnp.cos(jnp.pi * epoch / moment.epochs) + 1) / 2
