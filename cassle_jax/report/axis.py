"""Axes of charts: maps values to positions, and chooses ticks."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

_NICE = [1, 2, 2.5, 5, 10]
_DECADES_DIVIDED = 2
_MOST_DECADES = 6
_SAME = 1e-6  # values that differ by less than this share of them are drawn as equal


class Axis(NamedTuple):
    """An axis of a chart.

    Attributes:
      low: value at the beginning.
      high: value at the end.
      ticks: labelled values, ascending.
      is_log: whether the scale is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def share(self, value: Real) -> float:
        """The position of a value on the axis: 0 at its beginning, 1 at its end."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    def shows(self, value: Real) -> bool:
        """Whether the axis can show a value: finite, and positive on a logarithmic axis."""
        return math.isfinite(value) and (value > 0 or not self.is_log)


def axis(
    values: Iterable[Real], *, is_log: bool = False, to_ticks: bool = False, intervals: int = 5
) -> Axis | None:
    """Fits an axis to values.

    Args:
      values: The values to draw; non-finite values are ignored, and on a logarithmic axis values of
        zero or less.
      is_log: Whether the scale is logarithmic.
      to_ticks: Whether the axis begins and ends at a tick, rather than at the outermost values.
        Around equal values it leaves room.
      intervals: Largest number of intervals between ticks; linear scale only.

    Returns:
      The axis; `None` without a value to show.
    """
    shown = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    if not shown:
        return None
    low, high = float(min(shown)), float(max(shown))
    largest = max(abs(low), abs(high))
    if is_log:
        ticks = _log_ticks(low, high)
    else:
        if to_ticks and high - low <= _SAME * largest:
            low, high = low - (largest / 20 or 1), high + (largest / 20 or 1)
        ticks = MaxNLocator(intervals, steps=_NICE).tick_values(low, high).tolist()
    if to_ticks:
        # Rounding may place the outermost tick slightly inside the values.
        return Axis(min(ticks[0], low), max(ticks[-1], high), tuple(ticks), is_log)
    if high == low:
        high = 10 * low if is_log else low + 1
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high), is_log)


def tick_text(tick: float) -> str:
    """Formats a tick: integers in full, other numbers to four digits."""
    return f"{tick:,.0f}" if tick == round(tick) else f"{tick:.4g}"


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Formats the ticks of an axis: to four digits, or to as many as keep them apart."""
    texts: list[str] = []
    for digits in range(4, 18):
        texts = [f"{tick:.{digits}g}" for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return texts


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose the values; over few decades also 2 and 5 times these powers."""
    # One more power at both ends, as rounding may move a logarithm across an integer.
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    if math.log10(high / low) <= _DECADES_DIVIDED:
        digits, stride = (1, 2, 5), 1
    else:
        digits, stride = (1,), math.ceil((last - first) / _MOST_DECADES)
    powers = range(first, last + stride, stride)
    candidates = [digit * 10.0**power for power in powers for digit in digits]
    begin = sum(tick <= low for tick in candidates) - 1
    end = sum(tick < high for tick in candidates)
    return candidates[begin : max(end, begin + 1) + 1]
