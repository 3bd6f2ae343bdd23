"""Defines a method: its views and heads, its loss, and its memory between steps."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import LONGEST, WIDEST, ConfigError, check_at_least
from cassle_jax.methods.losses import widened
from cassle_jax.models import features_by_stage

PyTree = Any
Schedule = Callable[[Array], Array]
Passes = tuple[tuple[int, ...], ...]

Scalars = Mapping[str, Float[Array, ""]]
Loss = Float[Array, ""] | Scalars

# The learning-rate group of parameters that do not change.
FROZEN = "frozen"

# Prefix of the names of the plain branch's heads, where a run has one.
PLAIN = "plain_"

# The networks that `Networks.encode` uses; all others are heads.
ENCODING = ("encoder", "image_conditioner")


@struct.dataclass
class ViewBatch:
    """One view of every image in a batch, with the ω that conditions the projector.

    Attributes:
      images: normalised views.
      descriptor: ω, the augmentation per view; its width is 0 for an unconditioned method.
    """

    images: Float[Array, "B S S C"]
    descriptor: Float[Array, "B D"]


@struct.dataclass
class TrainingViews:
    """All that one step trains on.

    Attributes:
      views: the method's views of the batch, then those of the auxiliary objectives.
      targets: arrays that the auxiliary objectives need, by the objective's name.
    """

    views: tuple[ViewBatch, ...]
    targets: dict[str, PyTree] = struct.field(default_factory=dict)


@struct.dataclass
class Encoded:
    """The networks' outputs for one view; all float32, whatever the networks' own dtype.

    Attributes:
      features: the encoder's output y, or that of the stage that the heads see.
      projection: the projector's output z.
      prediction: the predictor's output p, where the method has one.
    """

    features: Float[Array, "B F"]
    projection: Float[Array, "B D"]
    prediction: Float[Array, "B P"] | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """Position of a step in its run.

    Attributes:
      step: number of steps done before it.
      epoch: epochs passed before it.
      epochs: length of the run, epochs.
    """

    step: Int[Array, ""] | int
    epoch: Float[Array, ""] | float
    epochs: float

    @property
    def whole_epoch(self) -> Float[Array, ""]:
        """Epochs completed before the step."""
        return jnp.floor(self.epoch)


Moment = Progress  # its former name


@dataclasses.dataclass(frozen=True)
class Step:
    """Inputs of the loss of one step, for this device's samples.

    Attributes:
      online: outputs of the trained networks, by view index.
      target: outputs of the momentum networks, by view index; no gradient.
      memory: the last result of `update_memory`.
      progress: position of the step in the run.
      axis_name: the devices that share the global batch; `None` for a single one.
    """

    online: Mapping[int, Encoded]
    target: Mapping[int, Encoded]
    memory: PyTree
    progress: Progress
    axis_name: str | None = None

    @property
    def moment(self) -> Progress:
        """The former name of `progress`."""
        return self.progress

    @property
    def pair(self) -> tuple[Encoded, Encoded]:
        """The first two views; the second one's momentum outputs if only those exist."""
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
    """The encoder and the heads of one method, under their names in the parameters.

    Attributes:
      factories: builds each module, by name. `encoder` and `projector` are required; `predictor`,
        `image_conditioner`, the plain branch's `plain_projector` and `plain_predictor`, and the
        heads of auxiliary objectives are optional.
      reserved: number of the last features that the method's heads do not see.
      stage: the earlier stage of the encoder whose features the conditioned heads see; 0 for the
        encoder's own. The plain branch's heads see the encoder's own.
      stages: every earlier stage whose features are needed.
    """

    factories: Mapping[str, Callable[[], nn.Module]]
    reserved: int = 0
    stage: int = 0
    stages: tuple[int, ...] = ()

    def setup(self):
        """Builds the modules."""
        for name, factory in self.factories.items():
            setattr(self, name, factory())

    @property
    def branches(self) -> dict[str, "Networks"]:
        """The networks per branch, with the branch's heads as `projector` and `predictor`.

        The branch "" has the conditioned heads, and `PLAIN`, where it exists, those without ω.
        """
        plain = branch_of(self.factories, PLAIN)
        conditioned = branch_of(self.factories, "")
        both = {
            "": Networks(conditioned, self.reserved, self.stage, self.stages),
            PLAIN: Networks(plain, self.reserved, stages=self.stages),
        }
        return both if f"{PLAIN}projector" in self.factories else {"": self}

    def encode(self, view: ViewBatch, *, train: bool) -> Float[Array, "B F"]:
        """The encoder's features y of a view."""
        return self._encode(view, (), train)[0]

    def encode_stages(self, view: ViewBatch, *, train: bool) -> dict[int, Float[Array, "B _"]]:
        """The features of a view by stage: those of `stages`, and under 0 the encoder's own."""
        return self._encode(view, self.stages, train)

    def _encode(self, view, stages, train):
        images = view.images
        if "image_conditioner" in self.factories:
            images = self.image_conditioner(images, view.descriptor, train)
        return jax.tree.map(widened, features_by_stage(self.encoder, images, train, stages))

    def seen(self, features: Float[Array, "B F"]) -> Float[Array, "B _"]:
        """The features that the method's heads see: all but the reserved ones."""
        return features[:, : features.shape[1] - self.reserved]

    def project(
        self,
        features: Float[Array, "B F"],
        descriptor: Float[Array, "B D"],
        *,
        train: bool,
        predict: bool = True,
    ) -> Encoded:
        """The conditioned projector and, if `predict`, the predictor where there is one."""
        projection = self.projector(self.seen(features), descriptor, train)
        has_predictor = predict and "predictor" in self.factories
        prediction = self.predictor(projection, descriptor, train) if has_predictor else None
        return jax.tree.map(widened, Encoded(features, projection, prediction))

    def embed(self, view: ViewBatch, *, train: bool, predict: bool = True) -> Encoded:
        """Encoder and heads on one view."""
        features = self.encode_stages(view, train=train)[self.stage]
        return self.project(features, view.descriptor, train=train, predict=predict)

    def encode_passes(
        self, views: Sequence[ViewBatch], passes: Passes
    ) -> dict[int, dict[int, Float[Array, "B _"]]]:
        """Training features of the views that `passes` names, by stage and view index.

        Args:
          views: the views of the batch.
          passes: view indices; the views of one pass go through the encoder as one batch, and share
            BatchNorm's statistics.
        """
        features = {stage: {} for stage in (0, *self.stages)}
        for indices in passes:
            batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *_each(views, indices))
            for stage, rows in self.encode_stages(batch, train=True).items():
                features[stage] |= _split(rows, indices)
        return features

    def project_passes(
        self,
        features: Mapping[int, Float[Array, "B F"]],
        descriptors: Sequence[Float[Array, "B D"]],
        passes: Passes,
        *,
        predict: bool = True,
    ) -> dict[int, Encoded]:
        """Training outputs of the heads for the views that `passes` names, by view index.

        Args:
          features: the encoder's features, by view index.
          descriptors: ω of every view.
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
    """Values by network for one branch, its heads named `projector` and `predictor`."""
    heads = {name.removeprefix(PLAIN): tree[name] for name in tree if name.startswith(PLAIN)}
    shared = {name: value for name, value in tree.items() if not name.startswith(PLAIN)}
    return shared | heads if branch else shared


def with_branch(
    tree: Mapping[str, PyTree], branch: str, values: Mapping[str, PyTree]
) -> dict[str, PyTree]:
    """`tree` with new `branch_of(tree, branch)`; for the plain branch, with new heads alone."""
    if not branch:
        return {**tree, **values}
    heads = [name for name in tree if name.startswith(PLAIN)]
    return {**tree, **{name: values[name.removeprefix(PLAIN)] for name in heads}}


def _each(items: Sequence | Mapping, indices: tuple[int, ...]) -> list:
    return [items[index] for index in indices]


def _split(batch: PyTree, indices: tuple[int, ...]) -> dict[int, PyTree]:
    """The rows of each view in a pass, by view index."""
    size = len(jax.tree.leaves(batch)[0]) // len(indices)
    return {
        index: jax.tree.map(itemgetter(slice(place * size, (place + 1) * size)), batch)
        for place, index in enumerate(indices)
    }


@dataclasses.dataclass(frozen=True)
class Method:
    """A joint-embedding method; its fields are its hyper-parameters.

    A new method is a subclass in its own file and a line in `METHODS`. It defines the views that go
    through each network, the heads, and the loss. Optimisers, conditioning, auxiliary objectives,
    devices and checkpoints are not part of a method.

    Class attributes (or properties, where they depend on hyper-parameters):
      recipe: settings that a configuration of the method starts from, by full name, such as
        `{"optimizer.name": "adamw"}`.
      published: settings by which the published CASSLE code differs from the method's paper.
      online_passes: the views that the trained networks encode. The views of one pass share a
        batch, and so BatchNorm's statistics; by default each view has its own pass.
      head_passes: the same for the trained heads, where their passes differ from the encoder's.
      target_passes: the same for the momentum networks; empty without such networks.
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
        """The augmentation per view of a step.

        Args:
          first: the run's augmentation of first views.
          second: the run's augmentation of second views; equal unless `augment.asymmetric`.
        """
        return first, second

    def projector(self, feature_width: int) -> HeadShape:
        """The projector's shape, on an encoder with `feature_width` features."""
        raise NotImplementedError

    def predictor(self, feature_width: int) -> HeadShape | Callable[[], nn.Module] | None:
        """The head on the projection: an MLP's shape, or a factory of the method's own module.

        Such a module is called with (projection, descriptor, train). `None` for no such head.
        """
        del feature_width
        return None

    def initial_memory(self, key: Array) -> PyTree:
        """The method's initial memory in addition to its networks, such as a queue."""
        del key
        return {}

    def loss(self, step: Step, networks: Networks) -> Loss | tuple[Loss, Scalars]:
        """The objective on this device's samples.

        Args:
          step: the embedded views.
          networks: the trained networks, bound, for objectives that apply a head once more.

        Returns:
          The loss; or its terms by name, which are summed, and logged as `loss_<name>`. A method
          with metrics of its own returns a pair: the loss or its terms, and the metrics by name.
          These are means over this device's samples, logged as `method_<name>`.
        """
        raise NotImplementedError

    def update_memory(self, step: Step) -> PyTree:
        """The memory after a step; must be equal on every device."""
        return step.memory

    def target_momentum(self, progress: Progress) -> Float[Array, ""] | float:
        """The share of the momentum networks that a step keeps, in [0, 1]."""
        raise NotImplementedError

    def after_update(self, params: PyTree) -> PyTree:
        """Constraints on a branch's parameters, applied after each optimiser step."""
        return params

    def parameter_group(self, path: tuple[str, ...], array: Array) -> str:
        """The learning-rate group of the parameter at `path`; `FROZEN` never changes."""
        del path, array
        return "default"

    def group_schedules(self, schedule: Schedule, peak: float) -> dict[str, Schedule]:
        """The learning rate per group over the steps.

        Args:
          schedule: the run's own schedule.
          peak: its highest value.
        """
        del peak
        return {"default": schedule}

    def in_steps(self, steps_per_epoch: int) -> "Method":
        """The method with everything that `group_schedules` needs converted to steps."""
        del steps_per_epoch
        return self

    def late_settings(self, epochs: float, steps: int) -> Iterator[str]:
        """Yields a line per setting whose effect would begin after a run's end; see `in_steps`."""
        del epochs, steps
        yield from ()

    def check_projector(self, hidden: int, out: int, depth: int) -> None:
        """Raises ConfigError for sizes no projector can have; hidden 0 is the features' width."""
        check_at_least("method.projector_hidden", hidden, 0, WIDEST)
        check_at_least("method.projector_out", out, 1, WIDEST)
        check_at_least("method.projector_depth", depth, 1, LONGEST)

    def check(self, global_batch: int, local_batch: int) -> None:
        """Raises ConfigError, naming the setting, where the method cannot work with these sizes."""
        del global_batch, local_batch


def small_size(setting: str, size: int, spec: AugmentSpec) -> int:
    """Side of a small view in pixels; for 0 the multiple of 8 nearest to 3/7 of a large view's.

    Raises:
      ConfigError: it is larger than a large view; the message names the setting.
    """
    side = size or max(8, round(spec.size * 3 / 7 / 8) * 8)
    if side > spec.size:
        raise ConfigError(
            f"{setting}={size} makes small views of {side} pixels, larger than "
            f"augment.size={spec.size}; use at most {spec.size}"
        )
    return side


def check_queue(size: int, batch: int, otherwise: str = "") -> None:
    """Raises ConfigError unless whole batches fill a queue; the message ends in `otherwise`."""
    if size % batch:
        whole = max(size // batch, 1)
        raise ConfigError(
            f"method.queue_size={size} is not a multiple of batch_size={batch}; {whole * batch} "
            f"would work{otherwise}"
        )


def constant(value: float) -> Schedule:
    """A schedule that never changes."""
    return lambda step: jnp.full_like(step, value, dtype=jnp.float32)


def rising_momentum(start: float, progress: Progress, *, per_step: bool = True) -> Float[Array, ""]:
    """Momentum from `start` to 1 along half a cosine (BYOL, section 3.3), by step or by epoch."""
    epoch = progress.epoch if per_step else progress.whole_epoch
    return 1 - (1 - start) * (jnp.cos(jnp.pi * epoch / progress.epochs) + 1) / 2
