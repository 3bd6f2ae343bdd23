"""Prints the table of docs/evidence.md from the quickstart.json of several seeds.

python -m docs.quickstart_seeds runs/seeds/*/quickstart.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cassle_jax.data import Motifs
from cassle_jax.evaluation.factor_probes import group_means
from cassle_jax.evaluation.findings import half_interval

GROUPS = {name: factor.group for name, factor in Motifs.FACTORS.items()}
SHOWN = tuple(dict.fromkeys(GROUPS.values()))
RUNS = ("plain", "CASSLE")


def main(paths: Sequence[str]) -> None:
    """Prints a row per seed, the mean difference with its 95 % interval, and the signs."""
    reports = sorted((json.loads(Path(p).read_text()) for p in paths), key=lambda r: r["seed"])
    means = {
        report["seed"]: [group_means(report["scores"][run], GROUPS) for run in RUNS]
        for report in reports
    }
    print(
        "| seed |",
        " | ".join(f"{group}: plain | CASSLE" for group in SHOWN),
        "|",
    )
    print("|--:|" + "--:|" * 6)
    for seed, (plain, cassle) in means.items():
        cells = [f"{plain[g]:.2f} | {cassle[g]:.2f}" for g in SHOWN]
        print(f"| {seed} |", " | ".join(cells), "|")
    for group in SHOWN:
        _print_difference(group, [cassle[group] - plain[group] for plain, cassle in means.values()])
    for name in GROUPS:
        scores = [report["scores"] for report in reports]
        _print_difference(name, [each["CASSLE"][name] - each["plain"][name] for each in scores])


def _print_difference(name: str, differences: Sequence[float]) -> None:
    more = sum(difference > 0 for difference in differences)
    print(
        f"{name}: {np.mean(differences):+.2f} ± {half_interval(differences):.2f}, "
        f"more with {more} of {len(differences)} seeds"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
