"""Learning-rate schedules and optimisers, with a learning rate of its own for each group."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cassle_jax.checks import check_at_least, check_positive
from cassle_jax.methods import Method
from cassle_jax.methods.base import PyTree, Schedule


@dataclasses.dataclass(frozen=True)
class Clock:
    """How the steps of a run count as epochs.

    Attributes:
      steps_per_epoch: whole batches in the dataset.
      total_steps: of the run.
    """

    steps_per_epoch: int
    total_steps: int

    @property
    def epochs(self) -> float:
        """Length of the run in epochs."""
        return self.total_steps / self.steps_per_epoch

    def epoch(self, step: Int[Array, ""], *, whole: bool) -> Float[Array, ""]:
        """Epochs passed before `step`; if `whole`, only those completed."""
        step = jnp.asarray(step)
        if whole:
            return (step // self.steps_per_epoch).astype(jnp.float32)
        return step.astype(jnp.float32) / self.steps_per_epoch


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """The optimiser of a recipe.

    Attributes:
      name: `sgd` (with momentum; weight decay is added to every gradient) or `adamw`.
      base_learning_rate: for a global batch of 256; the run's is base · batch / 256.
      momentum: of SGD.
      weight_decay: on every parameter.
      warmup_epochs: of linear growth from 0, step by step, before the half-cosine.
      schedule_by: `step` moves the learning rate every step, `epoch` once an epoch as the published
        CASSLE code does.
    """

    name: str = "sgd"
    base_learning_rate: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    schedule_by: str = "step"

    def __post_init__(self):
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f"optimizer.name={self.name!r} is unknown; use 'sgd' or 'adamw'")
        if self.schedule_by not in ("step", "epoch"):
            raise ValueError(
                f"optimizer.schedule_by={self.schedule_by!r} is unknown; use 'step' or 'epoch'"
            )
        check_positive(optimizer__base_learning_rate=self.base_learning_rate)
        check_at_least(
            0,
            optimizer__weight_decay=self.weight_decay,
            optimizer__warmup_epochs=self.warmup_epochs,
        )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum} is not in [0, 1); 0.9 is usual")


def peak_learning_rate(spec: OptimizerSpec, batch_size: int) -> float:
    """The linear scaling rule: base · global batch / 256."""
    return spec.base_learning_rate * batch_size / 256


def learning_rate(spec: OptimizerSpec, clock: Clock, batch_size: int) -> Schedule:
    """Linear warm-up from 0, then half a cosine down to 0 at the end of the run."""
    peak = peak_learning_rate(spec, batch_size)
    warmup = spec.warmup_epochs
    rest = max(clock.epochs - warmup, 1e-9)

    def schedule(step):
        passed = clock.epoch(step, whole=False)
        epoch = clock.epoch(step, whole=spec.schedule_by == "epoch")
        progress = jnp.clip((epoch - warmup) / rest, 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(passed < warmup, passed / max(warmup, 1e-9), cosine)

    return schedule


def make_optimizer(
    spec: OptimizerSpec, method: Method, schedule: Schedule, batch_size: int
) -> optax.GradientTransformation:
    """The optimiser of a run; the method says which parameters follow a schedule of their own."""
    schedules = method.group_schedules(schedule, peak_learning_rate(spec, batch_size))
    by_group = optax.partition(
        {
            group: optax.set_to_zero() if rate is None else optax.scale_by_learning_rate(rate)
            for group, rate in schedules.items()
        },
        lambda params: parameter_groups(method, params),
    )
    decay = optax.add_decayed_weights(spec.weight_decay)
    if spec.name == "adamw":
        return optax.chain(optax.scale_by_adam(), decay, by_group)
    return optax.chain(decay, optax.trace(spec.momentum), by_group)


def parameter_groups(method: Method, params: PyTree) -> PyTree:
    """For each parameter the name of its learning-rate group."""

    def group(path, array):
        return method.parameter_group(tuple(entry.key for entry in path), array)

    return jax.tree_util.tree_map_with_path(group, params)
