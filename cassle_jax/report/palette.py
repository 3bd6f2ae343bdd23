"""The colours of every picture: told apart by colour-blind readers, on light and dark paper."""

from collections.abc import Sequence

# Okabe and Ito's palette; the second of each pair is for dark backgrounds.
RUNS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f0903c"),
    ("#008f68", "#2fc79a"),
    ("#a8487f", "#e08fbd"),
    ("#7a6a00", "#e6d04a"),
    ("#5a5a5a", "#b5b5b5"),
)
# Not the first two, so that a view is not taken for a run.
VIEW_1, VIEW_2 = RUNS[2][0], RUNS[3][0]
INK, FAINT = "#1d1f24", "#c9ccd3"


def run_colours(runs: Sequence[str]) -> dict[str, str]:
    """A colour for each run on white paper, in the order given and repeating after six."""
    return {run: RUNS[i % len(RUNS)][0] for i, run in enumerate(dict.fromkeys(runs))}
