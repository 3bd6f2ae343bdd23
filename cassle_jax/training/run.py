"""Turns a configuration into the objects of a run, refusing what cannot work before it starts."""

import dataclasses

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import check_at_least
from cassle_jax.config import ConfigError, knows
from cassle_jax.methods import METHODS, AugSelf, Method, Networks, ViewBatch
from cassle_jax.methods.base import Schedule
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.models import ENCODERS, make_encoder
from cassle_jax.parallel import AXIS
from cassle_jax.training.optimizer import Clock, OptimizerSpec, learning_rate, make_optimizer
from cassle_jax.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from a run's first step to its last.

    Attributes:
      batch_size: of all devices together.
      seed: of parameters, augmentations and the order of the images.
      augment: what is drawn.
      method: with its hyper-parameters.
      conditioning: of the projector.
      augself: auxiliary losses; empty weights for none.
      networks: encoder and heads; BatchNorm synchronised over the devices.
      optimizer: with a learning rate for each group.
      schedule: the learning rate.
      clock: how steps count as epochs.
    """

    batch_size: int
    seed: int
    augment: AugmentSpec
    method: Method
    conditioning: Conditioning
    augself: AugSelf
    networks: Networks
    optimizer: optax.GradientTransformation
    schedule: Schedule
    clock: Clock

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        size = self.augment.size
        view = ViewBatch(
            jnp.zeros((2, size, size, 3)), jnp.zeros((2, self.conditioning.size), jnp.float32)
        )
        return create_state(self.networks, self.method, self.optimizer, view, self.seed)


def build_run(config: ConfigDict, mesh: Mesh, dataset_size: int) -> Run:
    """The objects of a run.

    Args:
      config: as from `base_config`.
      mesh: the devices.
      dataset_size: number of training images.

    Raises:
      ConfigError: a setting that cannot work, by name.
    """
    try:
        return _build(config, mesh, dataset_size)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def augment_spec(config: ConfigDict) -> AugmentSpec:
    """The augmentations of a configuration.

    Raises:
      ValueError: a setting out of its range, by name.
    """
    settings = config.augment.to_dict()
    strength = settings.pop("color_strength")
    spec = AugmentSpec(**settings)
    return spec if strength == 1.0 else spec.with_color_strength(strength)


def compute_dtype(config: ConfigDict, platform: str) -> jnp.dtype:
    """The dtype of convolutions and products on a platform such as `cpu`, `gpu` or `tpu`."""
    knows("dtype", config.dtype, ("auto", "bfloat16", "float32"))
    automatic = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(automatic if config.dtype == "auto" else config.dtype)


def build_method(config: ConfigDict) -> Method:
    """The method of a configuration with its hyper-parameters."""
    settings = config.method.to_dict()
    name = settings.pop("name")
    knows("method.name", name, METHODS)
    known = {field.name for field in dataclasses.fields(METHODS[name])}
    if set(settings) != known:
        raise ConfigError(
            f"method.name={name!r} does not take {sorted(set(settings) ^ known)}; choose the method"
            f" with the config argument instead: --config=…:method={name}"
        )
    return METHODS[name](**settings)


def _build(config: ConfigDict, mesh: Mesh, dataset_size: int) -> Run:
    _check_sizes(config, mesh.size, dataset_size)
    method = build_method(config)
    method.check(config.batch_size, config.batch_size // mesh.size)

    weights = config.augself.to_dict()
    hidden = weights.pop("hidden")
    augself = AugSelf({name: w for name, w in weights.items() if w != 0}, hidden)
    conditioning = Conditioning(**config.conditioning.to_dict())

    knows("encoder.name", config.encoder.name, ENCODERS)
    dtype = compute_dtype(config, mesh.devices.flat[0].platform)

    def encoder():
        return make_encoder(**config.encoder.to_dict(), dtype=dtype, axis_name=AXIS)

    networks = build_networks(
        method,
        encoder,
        encoder().feature_width,
        conditioning,
        augself,
        dtype=dtype,
        axis_name=AXIS,
    )

    spec = augment_spec(config)
    for name in ("solarize", "rotation"):
        told = name in (*conditioning.descriptors, *augself.names)
        if told and not getattr(spec, name):
            raise ConfigError(
                f"augment.{name}=0 never draws what conditioning.descriptors or augself name; "
                f"use augment.{name}=0.5, or leave {name} out"
            )
    steps_per_epoch = dataset_size // config.batch_size
    clock = Clock(steps_per_epoch, config.steps or config.epochs * steps_per_epoch)
    recipe = OptimizerSpec(**config.optimizer.to_dict())
    if recipe.warmup_epochs >= clock.epochs:
        raise ConfigError(
            f"optimizer.warmup_epochs={recipe.warmup_epochs} does not end within the run's "
            f"{clock.epochs:.3g} epochs; use a smaller value"
        )
    schedule = learning_rate(recipe, clock, config.batch_size)
    return Run(
        batch_size=config.batch_size,
        seed=config.seed,
        augment=spec,
        method=method,
        conditioning=conditioning,
        augself=augself,
        networks=networks,
        optimizer=make_optimizer(recipe, method, schedule, config.batch_size),
        schedule=schedule,
        clock=clock,
    )


def _check_sizes(config: ConfigDict, devices: int, dataset_size: int) -> None:
    check_at_least(2, batch_size=config.batch_size)  # BatchNorm has no variance of one image
    check_at_least(1, epochs=config.epochs)
    check_at_least(1, encoder__width=config.encoder.width, checkpoint__keep=config.checkpoint.keep)
    check_at_least(
        0,
        seed=config.seed,
        steps=config.steps,
        probe__every_epochs=config.probe.every_epochs,
        checkpoint__every_steps=config.checkpoint.every_steps,
        checkpoint__keep_every_steps=config.checkpoint.keep_every_steps,
        log__every_steps=config.log.every_steps,
        data__cache_gib=config.data.cache_gib,
        data__threads=config.data.threads,
        data__max_bad_fraction=config.data.max_bad_fraction,
        probe__train_images=config.probe.train_images,
        probe__test_images=config.probe.test_images,
    )
    if config.data.max_bad_fraction > 1:
        raise ConfigError(
            f"data.max_bad_fraction={config.data.max_bad_fraction} is not a fraction; use at most 1"
        )
    if config.seed >= 2**63:
        raise ConfigError(f"seed={config.seed} is too large; use one below 2**63")
    if config.batch_size % devices:
        raise ConfigError(
            f"batch_size={config.batch_size} is the global batch and cannot be split over {devices}"
            f" devices; {max(config.batch_size // devices, 1) * devices} would work"
        )
    if dataset_size < devices:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be met: the {dataset_size} training images are "
            f"fewer than the {devices} devices; use more images or fewer devices"
        )
    if config.batch_size > dataset_size:
        raise ConfigError(
            f"batch_size={config.batch_size} is larger than the {dataset_size} training images;"
            f" use at most {dataset_size // devices * devices}"
        )
    if config.data.canvas < config.augment.size:
        raise ConfigError(
            f"data.canvas={config.data.canvas} is smaller than augment.size={config.augment.size};"
            f" use data.canvas={config.augment.size} or more"
        )
