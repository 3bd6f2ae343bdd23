"""Times contenders in alternating rounds, so that whatever slows the machine slows all of them."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do a piece of work.

    Attributes:
      name: in the table.
      prepare: sets up, warms up, and returns what is timed: it returns once the work is done.
      items: how much work that is; `None` for what all others do.
    """

    name: str
    prepare: Callable[[], Run]
    items: float | None = None


class NotComparableError(Exception):
    """A contender cannot do this work on this machine's device."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a contender, or a fact about one, came to.

    Attributes:
      measurement: what was measured.
      name: the contender or the fact.
      unit: of the values.
      values: one a round; none where it could not run.
      ratios: round by round, the first contender's rate over this one's.
      note: why it could not run, or what the reader must know.
      failed: whether it should have run.
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
        """Of the values."""
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios; `None` for the first contender, and for facts."""
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
    """The rates of contenders in items a second; the first is what the others are compared with.

    Every round runs each contender once, and begins with another one than the round before. One
    whose packages are not installed, that cannot be compared, or that fails, is a row that says
    so; of these, only the last is a failure, and none of ours may be missing.

    Args:
      measurement: what is measured.
      unit: of the rates, such as `views/s`.
      items: what one run works through.
      contenders: the first one is ours.
      rounds: at least 1.
      clock: in seconds.
      lead_in: runs a contender once more right before each timed run, for those that work ahead:
        what they had ready from others' turns is used up.
    """
    runs: dict[str, Run] = {}
    rows: dict[str, Row] = {}
    amount = {each.name: each.items or items for each in contenders}

    def drop(name: str, error: Exception) -> None:
        runs.pop(name, None)
        failed = name == contenders[0].name
        if isinstance(error, ModuleNotFoundError):
            reason = f"not installed: {error.name}"
        elif isinstance(error, NotComparableError):
            reason = str(error)
        else:
            reason, failed = one_line(error), True
        rows[name] = Row(measurement, name, unit, note=reason, failed=failed)

    for each in contenders:
        start = time.perf_counter()
        try:
            runs[each.name] = each.prepare()
        except Exception as error:  # a rival's libraries raise whatever they like
            drop(each.name, error)
        else:
            ready = f"{measurement}: {each.name} is ready after {time.perf_counter() - start:.0f} s"
            print(ready, file=sys.stderr, flush=True)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs)
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            try:
                if lead_in:
                    runs[name]()
                start = clock()
                runs[name]()
            except Exception as error:
                drop(name, error)
            else:
                rates[name].append(amount[name] / (clock() - start))
    ours = rates[contenders[0].name] if contenders[0].name in runs else []
    for name in runs:
        others = zip(ours, rates[name], strict=False)
        ratios = () if name == contenders[0].name else tuple(own / other for own, other in others)
        rows[name] = Row(measurement, name, unit, tuple(rates[name]), ratios)
    return [rows[each.name] for each in contenders]


def one_line(error: Exception) -> str:
    """What an error is and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
