"""Draws docs/evidence.png from docs/evidence.csv: how far each conditioning is ahead of plain.

python -m docs.evidence
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from cassle_jax.evaluation.findings import half_interval

HERE = Path(__file__).parent
METHODS = {"SimCLR": "o", "MoCo-v2": "s", "Barlow Twins": "D"}
SEEDS = ("0", "1")  # every row was run with
CONDITIONINGS = ("AugSelf", "CASSLE", "leak-free", "branched")
PANELS = {
    "Flowers-17, linear": ("flowers17", "linear"),
    "CIFAR-10, 1-NN": ("cifar10", "1-NN"),
    "Held-out classes, 1-NN": ("held-out classes", "1-NN"),
}


def differences(dataset: str, metric: str) -> dict[str, dict[str, list[float]]]:
    """Points ahead of plain with the same seed, by conditioning and method."""
    found = defaultdict(list)
    with (HERE / "evidence.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            measured = row["table"], row["dataset"], row["metric"].split(",")[0]
            if measured == ("short_transfer", dataset, metric) and row["seed"] in SEEDS:
                found[row["conditioning"], row["method"], row["seed"]].append(
                    float(row["accuracy"])
                )
    ahead = defaultdict(lambda: defaultdict(list))
    for (conditioning, method, seed), accuracies in found.items():
        plain = found.get(("plain", method, seed))
        if plain and conditioning != "plain":
            ahead[conditioning][method].append(100 * (np.mean(accuracies) - np.mean(plain)))
    return ahead


def main() -> None:
    """Draws a panel per measure: every pair of runs, their mean and its 95 % interval."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3), sharey=True, layout="constrained")
    for axis, (title, source) in zip(axes, PANELS.items(), strict=True):
        ahead = differences(*source)
        for place, conditioning in enumerate(reversed(CONDITIONINGS)):
            pairs = np.concatenate(list(ahead[conditioning].values()))
            axis.errorbar(
                pairs.mean(), place, xerr=half_interval(pairs), fmt="k|", ms=14, capsize=3
            )
            for number, (method, marker) in enumerate(METHODS.items()):
                points = ahead[conditioning][method]
                axis.plot(points, [place] * len(points), marker, color=f"C{number}", ls="", ms=4,
                          alpha=0.7, label=method if place == 0 else None)  # fmt: skip
        axis.axvline(0, color="0.6", lw=0.8, zorder=0)
        axis.set(title=title, xlabel="points ahead of plain")
        axis.set_yticks(range(len(CONDITIONINGS)), reversed(CONDITIONINGS))
        axis.set_ylim(-0.6, len(CONDITIONINGS) - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(HERE / "evidence.png", dpi=130)


if __name__ == "__main__":
    main()
