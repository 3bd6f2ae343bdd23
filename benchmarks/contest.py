"""Times contenders in alternating rounds, so that a slow machine slows all of them."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence

TimedCall = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation of the measured work.

    Attributes:
      name: name in the table.
      prepare: sets up and warms up; returns the call to time, which returns when its work is done.
      items: number of items per call; `None` for the contest's number.
    """

    name: str
    prepare: Callable[[], TimedCall]
    items: float | None = None


class NotComparableError(Exception):
    """A contender cannot do this work on this machine's device."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of a contender, or a single quantity.

    Attributes:
      measurement: name of the measurement.
      name: name of the contender or the quantity.
      unit: unit of the values.
      values: one value per round; empty if the contender could not run.
      ratios: rate of the first contender divided by this one's, per round.
      note: the reason why the contender could not run, or a remark.
      failed: whether the contender failed, rather than being unavailable.
    """

    measurement: str
    name: str
    unit: str
    values: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    note: str = ""
    failed: bool = False

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """The median of the ratios; `None` for the first contender and for single quantities."""
        return statistics.median(self.ratios) if self.ratios else None


def contest(
    measurement: str,
    unit: str,
    items: float,
    contenders: Sequence[Contender],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    lead_in: bool = False,
) -> list[Row]:
    """Measures the rates of contenders in items/s, and their ratios to the first contender.

    Every round times every contender once, and starts with a different one than the round before.
    A contender whose packages are missing, that is not comparable, or that raises an error gets a
    row with the reason. Only an error is a failure; for the first contender, any reason is.

    Args:
      measurement: name of the measurement.
      unit: unit of the rates, such as `views/s`.
      items: number of items per call.
      contenders: the contenders; the first is ours.
      rounds: number of rounds, at least 1.
      clock: returns the time in seconds.
      lead_in: whether an untimed call precedes every timed one. It uses up what a contender has
        prefetched during the calls of others. It also lets the threads of others go to sleep:
        PyTorch's keep a core busy for a while after their work.
    """
    calls: dict[str, TimedCall] = {}
    rows: dict[str, Row] = {}
    amount = {contender.name: contender.items or items for contender in contenders}

    def drop(name: str, error: Exception) -> None:
        calls.pop(name, None)
        reason, failed = _reason(error)
        failed = failed or name == contenders[0].name
        rows[name] = Row(measurement, name, unit, note=reason, failed=failed)

    for contender in contenders:
        try:
            calls[contender.name] = _prepared(contender, measurement)
        except Exception as error:  # a rival's libraries raise arbitrary exceptions
            drop(contender.name, error)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            try:
                if lead_in:
                    calls[name]()
                start = clock()
                calls[name]()
            except Exception as error:
                drop(name, error)
            else:
                rates[name].append(amount[name] / (clock() - start))
    ours = rates[contenders[0].name] if contenders[0].name in calls else []
    for name in calls:
        others = zip(ours, rates[name], strict=False)
        ratios = () if name == contenders[0].name else tuple(own / other for own, other in others)
        rows[name] = Row(measurement, name, unit, tuple(rates[name]), ratios)
    return [rows[contender.name] for contender in contenders]


def _prepared(contender: Contender, measurement: str) -> TimedCall:
    start = time.perf_counter()
    call = contender.prepare()
    seconds = time.perf_counter() - start
    message = f"{measurement}: {contender.name} is ready after {seconds:.0f} s"
    print(message, file=sys.stderr, flush=True)
    return call


def _reason(error: Exception) -> tuple[str, bool]:
    """Why a contender has no rate, in one line, and whether that is a failure."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}", False
    if isinstance(error, NotComparableError):
        return str(error), False
    return one_line(error), True


def one_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
