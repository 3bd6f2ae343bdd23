"""Names the settings of a run that change nothing, since what they belong to is off."""

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


class _Owner(NamedTuple):
    """What settings belong to.

    Attributes:
      settings: patterns of the settings' names.
      switch: the setting that decides whether the owner is on, or words for several such settings.
      is_on: whether it is.
    """

    settings: tuple[str, ...]
    switch: str
    is_on: Callable[[ConfigDict], bool]


def _auxiliary(name: str) -> _Owner:
    """An auxiliary objective, which is on where it has a weight."""

    def is_on(config):
        return bool(AUXILIARIES[name].of(config[name].to_dict()).weights)

    return _Owner((f"{name}.*",), f"{name}=none", is_on)


def _conditions(config: ConfigDict) -> bool:
    settings = config.conditioning
    return bool(settings.descriptors) and is_conditioned(settings.treatment, settings.injection)


def _takes_momentum(config: ConfigDict) -> bool:
    optimizer = optimizers().get(config.optimizer.name)
    return optimizer is None or "momentum" in inspect.signature(optimizer).parameters


_OWNERS = (
    *map(_auxiliary, AUXILIARIES),
    # The others of the group switch it off, or are refused where it is.
    _Owner(
        tuple(
            f"conditioning.{name}"
            for name in ("depth", "width", "relative", "into", "hypernetwork_bn")
        ),
        "conditioning=none",
        _conditions,
    ),
    _Owner(
        ("conditioning.hypernetwork_bn",),
        "conditioning.treatment",
        lambda config: config.conditioning.treatment == "hypernetwork",
    ),
    _Owner(
        ("conditioning.depth", "conditioning.width"),
        "conditioning.treatment",
        lambda config: config.conditioning.treatment != "raw",
    ),
    _Owner(
        tuple(
            f"augment.{name}"
            for name in ("brightness", "contrast", "saturation", "hue", "jitter_order")
        ),
        "augment.jitter",
        lambda config: config.augment.jitter > 0,
    ),
    _Owner(
        ("augment.sigma", "augment.kernel_size"),
        "augment.blur",
        lambda config: config.augment.blur > 0 or config.augment.asymmetric,
    ),
    _Owner(
        ("augment.solarize_threshold", "augment.solarize_after"),
        "augment.solarize",
        lambda config: config.augment.solarize > 0 or config.augment.asymmetric,
    ),
    _Owner(
        ("augment.crop_area", "augment.crop_aspect"),
        "augment.crop",
        lambda config: config.augment.crop,
    ),
    _Owner(("data.name",), "data.source", lambda config: config.data.source == "tfds"),
    _Owner(
        ("data.path", "data.classes"),
        "data.source",
        lambda config: config.data.source not in FAMILIES,
    ),
    _Owner(("data.scenes",), "data.source", lambda config: config.data.source in FAMILIES),
    _Owner(
        ("encoder.patch_size",),
        "encoder.name",
        lambda config: config.encoder.name.startswith("vit"),
    ),
    _Owner(("optimizer.momentum",), "optimizer.name", _takes_momentum),
    _Owner(("probe.*",), "probe.every_epochs", lambda config: config.probe.every_epochs > 0),
    _Owner(("weights.networks",), "weights.path", lambda config: config.weights.path),
    _Owner(("epochs",), "steps", lambda config: not config.steps),
)


def idle_settings(config: ConfigDict, given: Iterable[str]) -> list[str]:
    """Names each given setting that changes nothing, with the reason, one line each.

    Args:
      config: a configuration, as from `base_config`.
      given: names of the settings that the user gave, such as `augself.stage`. A setting that is
        itself off (0, false, empty) is never named.

    Returns:
      Lines such as "augself.stage=3 has no effect with augself=none"; empty where all do something.
    """
    values = flat_settings(config)
    lines = []
    for name in (each for each in given if values.get(each)):
        for owner in _OWNERS:
            belongs = any(fnmatch.fnmatchcase(name, pattern) for pattern in owner.settings)
            if belongs and name != owner.switch and not owner.is_on(config):
                off = owner.switch
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
