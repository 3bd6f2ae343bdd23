"""Tables of results, and the format of their numbers."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of cells under named columns; the first column names the row.

    Attributes:
      columns: Names of the columns, such as ``("factor", "plain", "CASSLE")``.
      rows: Sequences of cells, as long as ``columns``.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Real]]

    def check(self) -> None:
        """Raises ValueError if a row's length differs from the columns."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {list(row)} has {len(row)} cells for {list(self.columns)}")


def cell_text(cell: str | Real, decimals: int = 3) -> str:
    """Formats a cell: text and integers unchanged, other numbers to `decimals` digits."""
    if isinstance(cell, str | Integral):
        return str(cell)
    if math.isnan(cell):
        return "NaN"
    return f"{cell:.{decimals}f}" if abs(cell) < 10_000 else f"{cell:.4g}"


def decimals_of(values: Sequence[float]) -> int:
    """Number of decimals: three, or enough for three digits of the largest value."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 3 if largest == 0 or largest >= 0.01 else 2 - math.floor(math.log10(largest))
