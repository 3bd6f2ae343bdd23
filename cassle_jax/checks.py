"""Checks of settings that raise one clear line: the setting, its value, and what would work."""

import math
from collections.abc import Sequence
from numbers import Real


class ConfigError(ValueError):
    """An invalid setting; the message is one line with its name, value and valid values."""


def check_positive(**settings: Real) -> None:
    """Raises ConfigError unless each setting is finite and above 0; `__` in a name is a dot."""
    for name, value in settings.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name.replace('__', '.')}={value} must be above 0")


def check_at_least(least: int, **settings: Real) -> None:
    """Raises ConfigError unless each setting is at least `least`; `__` in a name is a dot."""
    for name, value in settings.items():
        if not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{name.replace('__', '.')}={value} must be at least {least}")


def check_seed(**settings: int) -> None:
    """Raises ConfigError unless each setting is a whole number in [0, 2³²), as all seeds are."""
    for name, value in settings.items():
        if isinstance(value, bool) or not 0 <= value < 2**32 or int(value) != value:
            raise ConfigError(
                f"{name.replace('__', '.')}={value} is no seed; use a whole number of at least 0 "
                "and below 2**32"
            )


def check_fraction(usual: float, **settings: Real) -> None:
    """Raises ConfigError unless each setting is in [0, 1]; `__` in a name is a dot."""
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ConfigError(
                f"{name.replace('__', '.')}={value} is not in [0, 1]; {usual} is usual"
            )


def check_share(**settings: Real) -> None:
    """Raises ConfigError unless each setting is in [0, 1); `__` in a name is a dot."""
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise ConfigError(
                f"{name.replace('__', '.')}={value} is not a share; use 0 or more, and less than 1"
            )


def check_one_of(choices: Sequence[str], **settings: str) -> None:
    """Raises ConfigError unless each setting is one of the choices; `__` in a name is a dot."""
    for name, value in settings.items():
        if value not in choices:
            raise ConfigError(
                f"{name.replace('__', '.')}={value!r} is unknown; use "
                + " or ".join(map(repr, choices))
            )
