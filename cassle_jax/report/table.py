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
