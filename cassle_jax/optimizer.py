"""Learning-rate schedules and optimisers, with a learning rate of its own for each group."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int

from cassle_jax.checks import (
    ConfigError,
    check_at_least,
    check_fraction,
    check_one_of,
    check_positive,
    check_share,
    did_you_mean,
    first_line,
)
from cassle_jax.methods import Method, Progress
from cassle_jax.methods.base import FROZEN, PLAIN, PyTree, Schedule, constant

# LARS's η; all recipes use it (You et al., 2017).
TRUST_COEFFICIENT = 0.001

Chain = tuple[optax.GradientTransformation, ...]


@dataclasses.dataclass(frozen=True)
class Clock:
    """The relation of a run's steps to its epochs.

    Attributes:
      steps_per_epoch: whole batches in the dataset.
      total_steps: number of steps of the run.

    Raises:
      ConfigError: one of them is below 1, as with fewer images than a batch has.
    """

    steps_per_epoch: int
    total_steps: int

    def __post_init__(self):
        check_at_least("steps_per_epoch", self.steps_per_epoch, 1)
        check_at_least("total_steps", self.total_steps, 1)

    @property
    def epochs(self) -> float:
        """Length of the run in epochs."""
        return self.total_steps / self.steps_per_epoch

    def at(self, step: Int[Array, ""]) -> Progress:
        """The position of `step` in the run; an epoch begins exactly at its first step."""
        step = jnp.asarray(step)
        # XLA divides by multiplying with a rounded 1/n, which can fall short of a whole number.
        whole, part = step // self.steps_per_epoch, step % self.steps_per_epoch
        before_next = jnp.nextafter(jnp.float32(whole + 1), 0)
        epoch = jnp.minimum(whole + jnp.float32(part) / self.steps_per_epoch, before_next)
        return Progress(step, epoch, self.epochs)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """The optimiser of a recipe.

    Attributes:
      name: `sgd` (with momentum; weight decay is added to every gradient), `adamw`, `lars` (which
        leaves biases and BatchNorm's parameters without decay and adaptation), or any other
        optimiser of optax or optax.contrib by its name there, such as `lamb`, `adopt` or `muon`.
      base_learning_rate: learning rate for a global batch of 256; the run's is base · batch / 256.
      momentum: argument of the optimisers that take `momentum`, such as SGD and LARS.
      weight_decay: applies to every trained parameter; under LARS, and under an optimiser of optax
        that takes a mask, to weights alone.
      warmup_epochs: epochs of linear growth from 0, step by step, before the half-cosine.
      final_fraction: share of the learning rate that is left at the end of the run.
      schedule_by: `step` moves the learning rate every step, `epoch` once an epoch as the published
        CASSLE code does.
      clip_norm: largest norm of the whole gradient; a longer one is scaled down. 0: no limit.
      settings: further arguments of the optimiser, by name, such as `b2` and `nesterov`.
    """

    name: str = "sgd"
    base_learning_rate: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    final_fraction: float = 0.0
    schedule_by: str = "step"
    clip_norm: float = 0.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_one_of("optimizer.name", self.name, optimizers())
        check_one_of("optimizer.schedule_by", self.schedule_by, ("step", "epoch"))
        check_fraction("optimizer.final_fraction", self.final_fraction, 0.0)
        check_positive("optimizer.base_learning_rate", self.base_learning_rate)
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        check_at_least("optimizer.warmup_epochs", self.warmup_epochs, 0)
        check_at_least("optimizer.clip_norm", self.clip_norm, 0)
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
        progress = clock.at(step)
        epoch = progress.whole_epoch if spec.schedule_by == "epoch" else progress.epoch
        passed = jnp.clip((epoch - warmup) / rest, 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * passed))
        falling = spec.final_fraction + (1.0 - spec.final_fraction) * cosine
        rising = progress.epoch / max(warmup, 1e-9)
        return peak * jnp.where(progress.epoch < warmup, rising, falling)

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
      method: defines the groups of parameters.
      schedule: the learning rate of all that have no schedule of their own.
      batch_size: images per step, all devices together.
      frozen: names at the top of the encoder's parameters that stay as they are.

    Raises:
      ConfigError: the optimiser does not take its settings, or cannot train with them.
    """
    rates = method.group_schedules(schedule, peak_learning_rate(spec, batch_size))
    shared, own = _rule(spec)
    begins = [rate(jnp.int32(0)) for rate in rates.values()] if spec.name not in PUBLISHED else []
    if 0 in begins:
        _check_rises(spec, optax.chain(*shared, own(learning_rate=lambda step: step > 0)))
    by_group = {group: own(learning_rate=rate) for group, rate in rates.items()}
    stays = {FROZEN: optax.set_to_zero()}

    def groups(params):
        return parameter_groups(method, params, frozen)

    clipping = ()
    if spec.clip_norm:
        trained = optax.partition(dict.fromkeys(rates, optax.identity()) | stays, groups)
        clipping = trained, optax.clip_by_global_norm(spec.clip_norm)
    return optax.chain(*clipping, *shared, optax.partition(by_group | stays, groups))


def check_optimizer(spec: OptimizerSpec) -> None:
    """Raises ConfigError where the optimiser does not take its settings, or cannot train."""
    _rule(spec)


def _sgd(momentum: float, weight_decay: float, nesterov: bool = False) -> Chain:
    return optax.add_decayed_weights(weight_decay), optax.trace(momentum, nesterov)


def _adamw(
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    nesterov: bool = False,
) -> Chain:
    adam = optax.scale_by_adam(b1, b2, eps, nesterov=nesterov)
    return adam, optax.add_decayed_weights(weight_decay)


def _lars(
    momentum: float,
    weight_decay: float,
    trust_coefficient: float = TRUST_COEFFICIENT,
    nesterov: bool = False,
) -> Chain:
    decay = optax.add_decayed_weights(weight_decay)
    adapt = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
    return optax.masked(optax.chain(decay, adapt), _weights), optax.trace(momentum, nesterov)


# The optimisers of the published recipes, up to the learning rate.
PUBLISHED = {"sgd": _sgd, "adamw": _adamw, "lars": _lars}


@cache
def optimizers() -> dict[str, Callable]:
    """The published recipes' optimisers, and optax's: its functions of a learning rate."""
    named = {**vars(optax.contrib), **vars(optax)}
    # A part of an optimiser is not an optimiser; schedule-free ones evaluate other weights than
    # they train; the noise would be the same with every seed.
    others = ("_", "scale_by_", "schedule_free", "noisy_sgd")
    functions = {
        name: value
        for name, value in named.items()
        if inspect.isfunction(value) or isinstance(value, partial)
        if not name.startswith(others) and "learning_rate" in inspect.signature(value).parameters
    }
    return functions | PUBLISHED


def _rule(spec: OptimizerSpec) -> tuple[Chain, Callable[..., optax.GradientTransformation]]:
    """The transformations that all groups share, and a function of a learning rate for the rest.

    Raises:
      ConfigError: the optimiser does not take the settings, or needs more than gradients.
    """
    rule = optimizers()[spec.name]
    arguments = _arguments(spec, inspect.signature(rule).parameters)
    try:
        if spec.name in PUBLISHED:
            shared, own = rule(**arguments), optax.scale_by_learning_rate
        else:
            shared, own = (), partial(rule, **arguments)
        once = optax.chain(*shared, own(learning_rate=constant(1.0)))
        jax.eval_shape(partial(_trained, once, steps=1))
    except Exception as error:  # optax checks little: a wrong setting can fail anywhere
        raise ConfigError(
            f"optimizer.name={spec.name!r} with optimizer.settings={dict(spec.settings)} cannot "
            f"train: {first_line(error)}"
        ) from error
    return shared, own


def _arguments(spec: OptimizerSpec, taken: Collection[str]) -> dict[str, Any]:
    """The arguments of an optimiser, except its learning rate, by the names that it takes.

    Raises:
      ConfigError: a setting is not among them.
    """
    if spec.weight_decay and "weight_decay" not in taken:
        raise ConfigError(
            f"optimizer.weight_decay={spec.weight_decay} has no effect on optimizer.name="
            f"{spec.name!r}, which takes none; use optimizer.weight_decay=0"
        )
    given = {"momentum": spec.momentum, "weight_decay": spec.weight_decay}
    given |= {"mask": _weights, "weight_decay_mask": _weights}
    free = [name for name in taken if name not in ("learning_rate", *given)]
    for name, value in spec.settings.items():
        if name not in free:
            raise ConfigError(
                f"optimizer.settings.{name}={value} is not an argument of {spec.name}; use "
                f"{', '.join(free) or 'none'}{did_you_mean(name, free)}"
            )
    return {name: given[name] for name in given if name in taken} | dict(spec.settings)


def _check_rises(spec: OptimizerSpec, rising: optax.GradientTransformation) -> None:
    """Raises ConfigError where an optimiser, whose rate is 0 at first, divides by it."""
    trained = jax.tree.leaves(jax.jit(partial(_trained, rising, steps=2))())
    if not all(jnp.isfinite(each).all() for each in trained):
        raise ConfigError(
            f"optimizer.name={spec.name!r} divides by the learning rate, which is 0 at first; use "
            f"optimizer.warmup_epochs=0 (it is {spec.warmup_epochs}), with SwAV also "
            "method.freeze_prototypes_epochs=0, or another optimiser"
        )


def _trained(optimizer: optax.GradientTransformation, steps: int) -> PyTree:
    """Parameters of two shapes after some steps, from gradients alone."""
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params


def _weights(params: PyTree) -> PyTree:
    return jax.tree.map(lambda array: array.ndim > 1, params)


def parameter_groups(method: Method, params: PyTree, frozen: Collection[str] = ()) -> PyTree:
    """The name of the learning-rate group per parameter."""

    def group(path, array):
        names = tuple(entry.key for entry in path)
        if names[0] == "encoder" and names[1] in frozen:
            return FROZEN
        return method.parameter_group((names[0].removeprefix(PLAIN), *names[1:]), array)

    return jax.tree_util.tree_map_with_path(group, params)
