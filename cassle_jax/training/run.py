"""Turns a configuration into the objects of a run, refusing what cannot work before it starts."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, UInt32
from ml_collections import ConfigDict

from cassle_jax.augment import DESCRIPTORS, RARE, AugmentSpec
from cassle_jax.checks import (
    LARGEST_SIDE,
    LONGEST,
    ConfigError,
    check_at_least,
    check_fraction,
    check_one_of,
    check_seed,
)
from cassle_jax.methods import AUXILIARIES, METHODS, Auxiliary, Method, Networks, ViewBatch
from cassle_jax.methods.base import Schedule
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.models import check_image_size, make_encoder
from cassle_jax.optimizer import (
    Clock,
    OptimizerSpec,
    check_optimizer,
    learning_rate,
    make_optimizer,
)
from cassle_jax.parallel import AXIS
from cassle_jax.training.state import TrainState, create_state
from cassle_jax.training.trackers import check_trackers


@dataclasses.dataclass(frozen=True)
class Run:
    """The constants of a run, from its first step to its last.

    Attributes:
      batch_size: images per step, all devices together.
      chunks: number of parts in which the batch passes the encoder.
      seed: seed of parameters, augmentations and the order of the images.
      augment: augmentation of the images, the mean of asymmetric views; auxiliary objectives draw
        further views from it, and evaluation uses its size and normalisation.
      views: augmentation per view of a step.
      method: the method with its hyper-parameters.
      conditioning: conditioning of the projector.
      auxiliaries: the auxiliary objectives.
      networks: encoder and heads; BatchNorm synchronised over the devices.
      optimizer: the optimizer, with a learning rate per group.
      schedule: the learning rate.
      clock: converts steps to epochs.
    """

    batch_size: int
    chunks: int
    seed: int
    augment: AugmentSpec
    views: tuple[AugmentSpec, ...]
    method: Method
    conditioning: Conditioning
    auxiliaries: tuple[Auxiliary, ...]
    networks: Networks
    optimizer: optax.GradientTransformation
    schedule: Schedule
    clock: Clock

    def draws(self, augmentation: str) -> bool:
        """Whether any view can get the augmentation, such as `solarize`."""
        return _draw(self.views, augmentation)

    @property
    def paired(self) -> bool:
        """Whether an auxiliary objective needs pairs of images with the same augmentation."""
        return any(each.paired for each in self.auxiliaries)

    @property
    def seed_words(self) -> UInt32[np.ndarray, "2"]:
        """The seed as an array, an argument of programs compiled once for all seeds."""
        return np.asarray(jax.random.key_data(jax.random.key(self.seed)))

    def initial_state(self, seed_words: UInt32[Array, "2"] | None = None) -> TrainState:
        """The state before the first step; by default with the run's own seed."""
        size = self.augment.size
        shapes = (2, size, size, 3), (2, self.conditioning.size)
        view = ViewBatch(*(jnp.zeros(shape, jnp.float32) for shape in shapes))
        seed = self.seed if seed_words is None else jax.random.wrap_key_data(seed_words)
        return create_state(self.networks, self.method, self.optimizer, view, seed)


def build_run(config: ConfigDict, mesh: Mesh, dataset_size: int) -> Run:
    """Builds the objects of a run.

    Args:
      config: a configuration, as from `base_config`.
      mesh: the devices.
      dataset_size: number of training images.

    Raises:
      ConfigError: a setting cannot work; the message names it.
    """
    check_settings(config, mesh.size)
    _check_images(config.batch_size, mesh.size, dataset_size)
    method = build_method(config)
    dtype = compute_dtype(config, mesh.devices.flat[0].platform)
    networks = networks_of(config, dtype=dtype, axis_name=AXIS)
    encoder = networks.factories["encoder"]()

    steps_per_epoch = dataset_size // config.batch_size
    clock = Clock(steps_per_epoch, config.steps or config.epochs * steps_per_epoch)
    method = method.in_steps(steps_per_epoch)
    recipe = _recipe(config, clock)
    schedule = learning_rate(recipe, clock, config.batch_size)
    optimizer = make_optimizer(
        recipe, method, schedule, config.batch_size, getattr(encoder, "frozen_parameters", ())
    )
    return Run(
        batch_size=config.batch_size,
        chunks=config.batch_size // (config.chunk_size or config.batch_size),
        seed=config.seed,
        augment=augment_spec(config),
        views=view_specs(config, method),
        method=method,
        conditioning=Conditioning(**config.conditioning.to_dict()),
        auxiliaries=build_auxiliaries(config),
        networks=networks,
        optimizer=optimizer,
        schedule=schedule,
        clock=clock,
    )


def check_settings(config: ConfigDict, devices: int = 1) -> None:
    """Refuses settings that cannot work with any images; looks at none.

    Args:
      config: a configuration, as from `base_config`.
      devices: number of devices that share a batch; 1 where it is not known.

    Raises:
      ConfigError: a setting cannot work; the message names it.
    """
    check_trackers(config.log.to)
    _check_ranges(config)
    _check_shares(config.batch_size, config.chunk_size, devices)
    method, auxiliaries = build_method(config), build_auxiliaries(config)
    views = view_specs(config, method)
    for each in (method, *auxiliaries):
        each.check(config.batch_size, config.batch_size // devices)
    encoder = networks_of(config, dtype=compute_dtype(config, "cpu")).factories["encoder"]()
    _check_image_sizes(config, encoder, views, auxiliaries)
    _check_drawn(Conditioning(**config.conditioning.to_dict()), views, auxiliaries)
    check_optimizer(OptimizerSpec(**config.optimizer.to_dict()))


def _check_image_sizes(
    config: ConfigDict,
    encoder: nn.Module,
    views: Sequence[AugmentSpec],
    auxiliaries: Sequence[Auxiliary],
) -> None:
    """Refuses views whose sides the encoder does not take."""
    spec = augment_spec(config)
    sizes = [("method.small_crop_size", view.size) for view in views]
    for setting, size in sizes + further_sizes(auxiliaries, spec):
        check_image_size(encoder, size, "augment.size" if size == spec.size else setting)


def check_warmup(config: ConfigDict) -> None:
    """Refuses a warm-up that does not end within the run, where its epochs are known."""
    if not config.steps:
        _recipe(config, Clock(1, config.epochs))


def _recipe(config: ConfigDict, clock: Clock) -> OptimizerSpec:
    """The optimiser's settings, whose warm-up must end within the run."""
    recipe = OptimizerSpec(**config.optimizer.to_dict())
    if recipe.warmup_epochs >= clock.epochs:
        raise ConfigError(
            f"optimizer.warmup_epochs={recipe.warmup_epochs} does not end within the run's "
            f"{clock.epochs:.3g} epochs; use a smaller value"
        )
    return recipe


def _check_drawn(
    conditioning: Conditioning, views: Sequence[AugmentSpec], auxiliaries: Sequence[Auxiliary]
) -> None:
    """Refuses descriptors, of ω or of auxiliaries, whose augmentation is never drawn."""
    named = [("conditioning.descriptors", name) for name in conditioning.descriptors]
    named += [(each.name, name) for each in auxiliaries for name in each.descriptors]
    for whose, name in named:
        setting = DESCRIPTORS[name.partition(".")[0]].setting
        if setting in RARE and not _draw(views, setting):
            raise ConfigError(
                f"augment.{setting}=0 never draws what {whose} names; use "
                f"augment.{setting}=0.5, or leave {name} out"
            )


def _draw(views: Sequence[AugmentSpec], augmentation: str) -> bool:
    """Whether any view can get an augmentation."""
    return any(getattr(spec, augmentation) > 0 for spec in views)


def augment_spec(config: ConfigDict) -> AugmentSpec:
    """The augmentations of a configuration; for asymmetric views, their mean.

    Raises:
      ConfigError: a setting is out of its range; the message names it.
    """
    settings = config.augment.to_dict()
    asymmetric = settings.pop("asymmetric")
    strength = settings.pop("color_strength")
    spec = AugmentSpec(**settings)
    spec = spec if strength == 1.0 else spec.with_color_strength(strength)
    return spec.asymmetric_mean() if asymmetric else spec


def view_specs(config: ConfigDict, method: Method) -> tuple[AugmentSpec, ...]:
    """The augmentation per view of a step.

    Raises:
      ConfigError: a setting is out of its range; the message names it.
    """
    spec = augment_spec(config)
    return method.views(*(spec.asymmetric_pair() if config.augment.asymmetric else (spec, spec)))


def compute_dtype(config: ConfigDict, platform: str) -> jnp.dtype:
    """The dtype of convolutions and products on a platform such as `cpu`, `gpu` or `tpu`."""
    check_one_of("dtype", config.dtype, ("auto", "bfloat16", "float32"))
    automatic = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(automatic if config.dtype == "auto" else config.dtype)


def build_method(config: ConfigDict) -> Method:
    """The method of a configuration with its hyper-parameters.

    Raises:
      ConfigError: the method is unknown, or a setting of it is unknown or invalid.
    """
    settings = config.method.to_dict()
    name = settings.pop("name")
    check_one_of("method.name", name, METHODS)
    known = {field.name for field in dataclasses.fields(METHODS[name])}
    # A configuration saved by an older version lacks newer settings; they get the default.
    if unknown := sorted(set(settings) - known):
        raise ConfigError(
            f"method.name={name!r} does not take {unknown}; choose the method with the config "
            f"argument instead: --config=…:method={name}"
        )
    return METHODS[name](**settings)


def build_auxiliaries(config: ConfigDict) -> tuple[Auxiliary, ...]:
    """The auxiliary objectives of a configuration that have weights."""
    built = [each.of(config[name].to_dict()) for name, each in AUXILIARIES.items()]
    return tuple(each for each in built if each.weights)


def further_sizes(auxiliaries: Sequence[Auxiliary], spec: AugmentSpec) -> list[tuple[str, int]]:
    """The sides of the views that auxiliary objectives add, in pixels, by setting.

    Raises:
      ConfigError: a setting cannot work; the message names it.
    """
    return [(f"{each.name}.size", size) for each in auxiliaries for size in each.sizes(spec)]


def networks_of(
    config: ConfigDict,
    *,
    method: Method | None = None,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
) -> Networks:
    """Builds the networks of a configuration, which need no dataset.

    Args:
      config: a configuration, as from `base_config`.
      method: provides the heads; `None` for the configuration's own.
      dtype: dtype of convolutions and matrix products.
      axis_name: the mapped axis BatchNorm is synchronised over; `None` for one device.

    Raises:
      ConfigError: a setting cannot work; the message names it.
    """

    def encoder():
        return make_encoder(**config.encoder.to_dict(), dtype=dtype, axis_name=axis_name)

    return build_networks(
        method or build_method(config),
        encoder,
        encoder().feature_width,
        Conditioning(**config.conditioning.to_dict()),
        build_auxiliaries(config),
        dtype=dtype,
        axis_name=axis_name,
    )


def _check_ranges(config: ConfigDict) -> None:
    """Refuses values that are out of their range on any device with any images."""
    check_at_least("batch_size", config.batch_size, 2)  # one image has no variance for BatchNorm
    check_at_least("epochs", config.epochs, 1)
    check_at_least("data.canvas", config.data.canvas, 1, LARGEST_SIDE)
    check_seed("seed", config.seed)
    check_at_least("checkpoint.keep", config.checkpoint.keep, 1)
    check_at_least("chunk_size", config.chunk_size, 0)
    check_at_least("steps", config.steps, 0)
    check_at_least("probe.every_epochs", config.probe.every_epochs, 0)
    check_at_least("checkpoint.every_steps", config.checkpoint.every_steps, 0)
    check_at_least("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, 0)
    check_at_least("log.every_steps", config.log.every_steps, 0)
    check_at_least("data.cache_gib", config.data.cache_gib, 0)
    check_at_least("data.threads", config.data.threads, 0, LONGEST)
    check_fraction("data.max_bad_fraction", config.data.max_bad_fraction, 0.01)
    check_at_least("probe.train_images", config.probe.train_images, 0)
    check_at_least("probe.test_images", config.probe.test_images, 0)
    check_one_of("weights.networks", config.weights.networks, ("all", "encoder"))
    check_one_of("data.on_device", config.data.on_device, ("auto", "always", "never"))
    if config.data.canvas < augment_spec(config).size:
        raise ConfigError(
            f"data.canvas={config.data.canvas} is smaller than augment.size={config.augment.size};"
            f" use data.canvas={config.augment.size} or more"
        )


def _check_images(batch_size: int, devices: int, images: int) -> None:
    """Refuses a batch that the training images do not fill."""
    if images < devices:
        raise ConfigError(
            f"batch_size={batch_size} cannot be met: the {images} training images are fewer than "
            f"the {devices} devices; use more images or fewer devices"
        )
    if batch_size > images:
        raise ConfigError(
            f"batch_size={batch_size} is larger than the {images} training images; use at most "
            f"{images // devices * devices}"
        )


def _check_shares(batch_size: int, chunk_size: int, devices: int) -> None:
    """Refuses a batch, or chunks of it, that these devices cannot share equally."""
    if batch_size % devices:
        raise ConfigError(
            f"batch_size={batch_size} is the global batch and cannot be split over {devices} "
            f"devices; {max(batch_size // devices, 1) * devices} would work"
        )
    if chunk_size == 0:
        return
    # One image has no variance for BatchNorm.
    whole = [n for n in range(devices, batch_size + 1, devices) if n > 1 and batch_size % n == 0]
    if chunk_size not in whole:
        below = [n for n in whole if n < chunk_size]
        raise ConfigError(
            f"chunk_size={chunk_size} must divide batch_size={batch_size}, be a multiple of the "
            f"{devices} devices and more than 1; {below[-1] if below else whole[0]} would work, or "
            "0 for the whole batch"
        )
