"""Checks of settings that raise one clear line: the setting, its value, and what would work."""

import math
from numbers import Real


def check_positive(**settings: Real) -> None:
    """Raises ValueError unless each setting is finite and above 0; `__` in a name is a dot."""
    for name, value in settings.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name.replace('__', '.')}={value} must be above 0")


def check_at_least(least: int, **settings: Real) -> None:
    """Raises ValueError unless each setting is at least `least`; `__` in a name is a dot."""
    for name, value in settings.items():
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name.replace('__', '.')}={value} must be at least {least}")
