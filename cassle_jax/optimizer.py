"""Learning-rate schedules and optimisers, with a learning rate of its own for each group."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from cassle_jax.checks import (
    check_at_least,
    check_fraction,
    check_one_of,
    check_positive,
    check_share,
)
from cassle_jax.methods import Method, Moment
from cassle_jax.methods.base import FROZEN, PLAIN, PyTree, Schedule

# LARS's η; all recipes use it (You et al., 2017).
TRUST_COEFFICIENT = 0.001


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

    def at(self, step: Int[Array, ""]) -> Moment:
        """Where `step` stands in the run; an epoch begins exactly at its first step."""
        step = jnp.asarray(step)
        # XLA divides by multiplying with a rounded 1/n, which can fall short of a whole number.
        whole, part = step // self.steps_per_epoch, step % self.steps_per_epoch
        before_next = jnp.nextafter(jnp.float32(whole + 1), 0)
        epoch = jnp.minimum(whole + jnp.float32(part) / self.steps_per_epoch, before_next)
        return Moment(step, epoch, self.epochs)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """The optimiser of a recipe.

    Attributes:
      name: `sgd` (with momentum; weight decay is added to every gradient), `adamw`, or `lars`
        (which leaves biases and BatchNorm's parameters without decay and adaptation).
      base_learning_rate: for a global batch of 256; the run's is base · batch / 256.
      momentum: of SGD and LARS.
      weight_decay: on every parameter that is trained; under LARS on weights alone.
      warmup_epochs: of linear growth from 0, step by step, before the half-cosine.
      final_fraction: what is left of the learning rate at the end of the run.
      schedule_by: `step` moves the learning rate every step, `epoch` once an epoch as the published
        CASSLE code does.
    """

    name: str = "sgd"
    base_learning_rate: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    final_fraction: float = 0.0
    schedule_by: str = "step"

    def __post_init__(self):
        check_one_of("optimizer.name", self.name, ("sgd", "adamw", "lars"))
        check_one_of("optimizer.schedule_by", self.schedule_by, ("step", "epoch"))
        check_fraction("optimizer.final_fraction", self.final_fraction, 0.0)
        check_positive("optimizer.base_learning_rate", self.base_learning_rate)
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        check_at_least("optimizer.warmup_epochs", self.warmup_epochs, 0)
        check_share("optimizer.momentum", self.momentum, 0.9)


def peak_learning_rate(spec: OptimizerSpec, batch_size: int) -> float:
    """The linear scaling rule: base · global batch / 256."""
    return spec.base_learning_rate * batch_size / 256


def learning_rate(spec: OptimizerSpec, clock: Clock, batch_size: int) -> Schedule:
    """Linear warm-up from 0, then half a cosine down to `final_fraction` at the end of the run."""
    peak = peak_learning_rate(spec, batch_size)
    warmup = spec.warmup_epochs
    rest = max(clock.epochs - warmup, 1e-9)

    def schedule(step):
        moment = clock.at(step)
        epoch = moment.whole_epoch if spec.schedule_by == "epoch" else moment.epoch
        progress = jnp.clip((epoch - warmup) / rest, 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        falling = spec.final_fraction + (1.0 - spec.final_fraction) * cosine
        rising = moment.epoch / max(warmup, 1e-9)
        return peak * jnp.where(moment.epoch < warmup, rising, falling)

    return schedule


def make_optimizer(
    spec: OptimizerSpec,
    method: Method,
    schedule: Schedule,
    batch_size: int,
    frozen: Collection[str] = (),
) -> optax.GradientTransformation:
    """The optimiser of a run; the method says which parameters follow a schedule of their own.

    Args:
      spec: the recipe.
      method: its groups.
      schedule: the learning rate of all that have no schedule of their own.
      batch_size: of all devices together.
      frozen: names at the top of the encoder's parameters that stay as they are.
    """
    schedules = method.group_schedules(schedule, peak_learning_rate(spec, batch_size))
    rates = {group: optax.scale_by_learning_rate(rate) for group, rate in schedules.items()}
    by_group = optax.partition(
        {**rates, FROZEN: optax.set_to_zero()},
        lambda params: parameter_groups(method, params, frozen),
    )
    decay = optax.add_decayed_weights(spec.weight_decay)
    momentum = optax.trace(spec.momentum)
    match spec.name:
        case "sgd":
            return optax.chain(decay, momentum, by_group)
        case "adamw":
            return optax.chain(optax.scale_by_adam(), decay, by_group)
        case "lars":
            adapt = optax.scale_by_trust_ratio(trust_coefficient=TRUST_COEFFICIENT)
            adapted = optax.masked(optax.chain(decay, adapt), _weights)
            return optax.chain(adapted, momentum, by_group)


def _weights(params: PyTree) -> PyTree:
    return jax.tree.map(lambda array: array.ndim > 1, params)


def parameter_groups(method: Method, params: PyTree, frozen: Collection[str] = ()) -> PyTree:
    """For each parameter the name of its learning-rate group."""

    def group(path, array):
        names = tuple(entry.key for entry in path)
        if names[0] == "encoder" and names[1] in frozen:
            return FROZEN
        return method.parameter_group((names[0].removeprefix(PLAIN), *names[1:]), array)

    return jax.tree_util.tree_map_with_path(group, params)
