"""Names the settings of a run that change nothing, as the feature they belong to is off."""

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from cassle_jax.config import flat_settings
from cassle_jax.data.families import FAMILIES
from cassle_jax.methods import AUXILIARIES
from cassle_jax.models.conditioning import is_conditioned
from cassle_jax.optimizer import optimizers


class _Feature(NamedTuple):
    """A feature of a run, which some settings belong to.

    Attributes:
      settings: patterns of the settings' names.
      switch: the setting that switches the feature on, or words for several such settings.
      is_on: whether a configuration has the feature on.
      names_off: whether to name settings that are themselves off, such as a probability of 0 which
        another setting replaces.
    """

    settings: tuple[str, ...]
    switch: str
    is_on: Callable[[ConfigDict], bool]
    names_off: bool = False


def _auxiliary(name: str) -> _Feature:
    """An auxiliary objective, which is on where it has a weight."""

    def is_on(config):
        return bool(AUXILIARIES[name].of(config[name].to_dict()).weights)

    return _Feature((f"{name}.*",), f"{name}=none", is_on)


def _conditions(config: ConfigDict) -> bool:
    settings = config.conditioning
    return bool(settings.descriptors) and is_conditioned(settings.treatment, settings.injection)


def _takes_momentum(config: ConfigDict) -> bool:
    optimizer = optimizers().get(config.optimizer.name)
    return optimizer is None or "momentum" in inspect.signature(optimizer).parameters


_FEATURES = (
    *map(_auxiliary, AUXILIARIES),
    # The other settings of the group switch conditioning off, or are refused where it is off.
    _Feature(
        tuple(
            f"conditioning.{name}"
            for name in ("depth", "width", "relative", "into", "hypernetwork_bn")
        ),
        "conditioning=none",
        _conditions,
    ),
    _Feature(
        ("conditioning.hypernetwork_bn",),
        "conditioning.treatment",
        lambda config: config.conditioning.treatment == "hypernetwork",
    ),
    _Feature(
        ("conditioning.depth", "conditioning.width"),
        "conditioning.treatment",
        lambda config: config.conditioning.treatment != "raw",
    ),
    _Feature(
        tuple(
            f"augment.{name}"
            for name in ("brightness", "contrast", "saturation", "hue", "jitter_order")
        ),
        "augment.jitter",
        lambda config: config.augment.jitter > 0,
    ),
    _Feature(
        ("augment.blur", "augment.solarize", "augment.solarize_threshold"),
        "augment.asymmetric",
        lambda config: not config.augment.asymmetric,
        names_off=True,
    ),
    _Feature(
        ("augment.sigma", "augment.kernel_size"),
        "augment.blur",
        lambda config: config.augment.blur > 0 or config.augment.asymmetric,
    ),
    _Feature(
        ("augment.solarize_threshold", "augment.solarize_after"),
        "augment.solarize",
        lambda config: config.augment.solarize > 0 or config.augment.asymmetric,
    ),
    _Feature(
        ("augment.crop_area", "augment.crop_aspect", "essl.crop_area", "method.small_crop_area"),
        "augment.crop",
        lambda config: config.augment.crop,
    ),
    _Feature(("data.name",), "data.source", lambda config: config.data.source == "tfds"),
    _Feature(
        ("data.path", "data.classes"),
        "data.source",
        lambda config: config.data.source not in FAMILIES,
    ),
    _Feature(("data.scenes",), "data.source", lambda config: config.data.source in FAMILIES),
    _Feature(
        ("encoder.patch_size",),
        "encoder.name",
        lambda config: config.encoder.name.startswith("vit"),
    ),
    # Another method may have one of the two settings alone.
    _Feature(
        ("method.queue_start",),
        "method.queue_size",
        lambda config: config.method.get("queue_size", 1) > 0,
    ),
    _Feature(
        ("method.small_crop_size", "method.small_crop_area"),
        "method.small_crops",
        lambda config: config.method.get("small_crops", 1) > 0,
    ),
    _Feature(
        ("method.freeze_prototypes_epochs",),
        "method.freeze_prototypes_steps",
        lambda config: not config.method.get("freeze_prototypes_steps", 0),
    ),
    _Feature(("optimizer.momentum",), "optimizer.name", _takes_momentum),
    _Feature(("probe.*",), "probe.every_epochs", lambda config: config.probe.every_epochs > 0),
    _Feature(("weights.networks",), "weights.path", lambda config: config.weights.path),
    _Feature(("epochs",), "steps", lambda config: not config.steps),
)


def idle_settings(config: ConfigDict, given: Iterable[str]) -> list[str]:
    """Names each given setting that changes nothing, with the reason, one line each.

    Args:
      config: a configuration, as from `base_config`.
      given: names of the settings that the user gave, such as `augself.stage`. A setting that is
        itself off (0, false, empty) is named only where another setting replaces it.

    Returns:
      Lines such as "augself.stage=3 has no effect with augself=none"; empty where all have one.
    """
    values = flat_settings(config)
    lines = []
    for name in (each for each in given if each in values):
        for feature in (each for each in _FEATURES if values[name] or each.names_off):
            belongs = any(fnmatch.fnmatchcase(name, pattern) for pattern in feature.settings)
            if belongs and name != feature.switch and not feature.is_on(config):
                off = feature.switch
                off += f"={values[off]!r}" if off in values else ""
                lines.append(f"{name}={values[name]!r} has no effect with {off}")
                break
    return lines


def idle_in_all(configs: Sequence[ConfigDict], given: Iterable[str]) -> list[str]:
    """The lines of `idle_settings` on settings that change nothing in any configuration."""
    first, *others = configs
    return [
        line
        for name in given
        for line in idle_settings(first, [name])
        if all(idle_settings(each, [name]) for each in others)
    ]
