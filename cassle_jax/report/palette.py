"""Colours of all charts, chosen for colour-blind readers and for light and dark pages."""

from collections.abc import Sequence

# Okabe and Ito's palette, as pairs for light and dark backgrounds.
RUN_COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f0903c"),
    ("#008f68", "#2fc79a"),
    ("#a8487f", "#e08fbd"),
    ("#7a6a00", "#e6d04a"),
    ("#5a5a5a", "#b5b5b5"),
)
# Views skip the first two colours, which usually stand for runs.
VIEW_1, VIEW_2 = RUN_COLOURS[2][0], RUN_COLOURS[3][0]
INK, FAINT = "#1d1f24", "#c9ccd3"


def run_colours(runs: Sequence[str]) -> dict[str, str]:
    """Colours by run for a white background, in the given order; they repeat after six."""
    return {run: RUN_COLOURS[i % len(RUN_COLOURS)][0] for i, run in enumerate(dict.fromkeys(runs))}
