"""Checks of settings that raise one clear line: the setting, its value, and what would work."""

import contextlib
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

# Larger values are typing errors. Without these bounds, Python and the libraries would raise errors
# that name no setting, or compute forever.
_MOST = 2**31 - 1
SMALLEST = 1e-30
"""Smallest number above 0 that float32 computes well with."""
WIDEST = 2**20
"""Most channels of a layer, rows of a table of features, or epochs of an evaluation."""
LONGEST = 2**10
"""Most layers, views, threads, processes, seeds, or draws of a sweep."""
LARGEST_SIDE = 2**15
"""Most pixels of an image's side."""


class UserError(ValueError):
    """A mistake of the user: its message is the one line that a command ends with."""


class ConfigError(UserError):
    """An invalid setting; the message has its name, its value and valid values."""


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names whose values are not equal in two mappings, sorted; a missing value is `None`."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def check_positive(name: str, value: Real) -> None:
    """Raises ConfigError unless the setting is finite, above 0, and large enough for float32."""
    if not (math.isfinite(value) and value > 0):
        also = "" if math.isfinite(value) else " and finite"
        raise ConfigError(f"{name}={value} must be above 0{also}")
    if value < SMALLEST:
        raise ConfigError(f"{name}={value} is too small to compute with; use at least {SMALLEST}")


def check_at_least(name: str, value: Real, least: int, most: int = _MOST) -> None:
    """Raises ConfigError unless the setting is at least `least` and at most `most`."""
    if not value >= least:  # refuses NaN, too
        raise ConfigError(f"{name}={value} must be at least {least}")
    if value > most:
        raise ConfigError(f"{name}={value} is out of range; use at most {most}")


def whole_number(name: str, text: str, *, least: int) -> int:
    """The value of an environment variable; raises ConfigError unless it is at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text!r} must be an integer of at least {least}")
    return int(text)


def check_seed(name: str, value: Integral) -> None:
    """Raises ConfigError unless the setting is a whole number in [0, 2³²), as all seeds are."""
    if isinstance(value, bool) or not 0 <= value < 2**32 or int(value) != value:
        raise ConfigError(
            f"{name}={value} is not a seed; use a whole number of at least 0 and below 2**32"
        )


def check_fraction(name: str, value: Real, usual: float) -> None:
    """Raises ConfigError unless the setting is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value} is not in [0, 1]; {usual} is usual")


def check_share(name: str, value: Real, usual: float) -> None:
    """Raises ConfigError unless the setting is in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value} is not in [0, 1); {usual} is usual")


def check_area(name: str, value: Sequence[Real]) -> tuple[Real, Real]:
    """The range as a tuple; raises ConfigError unless 0 < low <= high <= 1."""
    with contextlib.suppress(TypeError, ValueError):  # no pair, or not of numbers
        low, high = value
        if 0 < low <= high <= 1:
            return low, high
    raise ConfigError(
        f"{name}={value!r} is not a range of areas; use (low, high) with 0 < low <= high <= 1"
    )


def check_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ConfigError, with the closest choice, unless the setting is one of the choices."""
    known = sorted(choices)
    if value not in known:
        raise ConfigError(
            f"{name}={value!r} is unknown; use one of {', '.join(known)}"
            + did_you_mean(str(value), known)
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean …?' with the known name closest to `name`; '' where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_finite(values: np.ndarray) -> bool:
    """Whether all numbers of an array are finite; needs no memory of the array's size."""
    return values.size == 0 or bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def check_finite(name: str, values: np.ndarray, what: str = "values") -> None:
    """Raises ValueError unless all numbers of an array are finite; see `is_finite`."""
    if not is_finite(values):
        raise ValueError(f"{name} holds {what} that are not finite")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def naming(setting: str, value: object, error: Exception) -> str:
    """An error's message about the file or folder `value` of a setting; names both."""
    words = str(error)
    if re.match(r"\w+=", words) and str(value) in words:  # as `step=3 is not in VALUE`
        return words
    named = words.startswith((f"{value}: ", f"{value} "))
    return f"{setting}={words}" if named else f"{setting}={value}: {words}"
