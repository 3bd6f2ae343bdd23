"""Draws the pictures of docs/evidence.md and docs/field.md from docs/evidence/runs.csv.

python -m docs.evidence
"""

import csv
import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from cassle_jax.evaluation.findings import half_interval

FOLDER = Path(__file__).parent / "evidence"
# Shapes by name, in the order of the legend.
MARKERS = {
    "SimCLR": "o",
    "MoCo-v2": "s",
    "Barlow Twins": "D",
    "VICReg": "^",
    "BYOL": "v",
    "CASSLE": "o",
    "CASSLE + plain branch": "s",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of one table's runs.

    Attributes:
      table: name of the table in runs.csv, and of the picture.
      panels: dataset and beginning of the metric, by title.
      rows: values of `row` with a line of their own, from top to bottom; empty for all.
      row: column of runs.csv whose values are lines.
      mark: column of runs.csv whose values have markers of their own.
      seeds: the seeds that count; empty for all.
      mean: whether to draw the mean of a line's pairs with its 95 % interval.
    """

    table: str
    panels: Mapping[str, tuple[str, str]]
    rows: Sequence[str] = ()
    row: str = "conditioning"
    mark: str = "method"
    seeds: Sequence[str] = ()
    mean: bool = True

    def ahead(self, dataset: str, metric: str) -> dict[str, dict[str, list[float]]]:
        """Points ahead of plain per pair of runs with the same seed, by line and marker."""
        figures = defaultdict(list)
        with (FOLDER / "runs.csv").open(newline="") as file:
            for run in csv.DictReader(file):
                counts = not self.seeds or run["seed"] in self.seeds
                fits = run["dataset"] == dataset and run["metric"].startswith(metric)
                if run["table"] == self.table and fits and counts:
                    # A measure repeated over random splits is one figure: their mean.
                    run["metric"] = run["metric"].partition(", random")[0]
                    key = run["conditioning"], run["method"], run["seed"], run["metric"]
                    figures[key].append(100 * float(run["accuracy"]))
        found = defaultdict(lambda: defaultdict(list))
        for key, values in figures.items():
            plain = figures.get(("plain", *key[1:]))
            if plain and key[0] != "plain":
                names = dict(zip(("conditioning", "method", "seed", "metric"), key, strict=True))
                found[names[self.row]][names[self.mark]].append(np.mean(values) - np.mean(plain))
        return found


PICTURES = (
    Picture(
        "quickstart",
        {"The quickstart: CASSLE and plain, ten seeds": ("motifs", "")},
        row="metric",
        mark="conditioning",
    ),
    Picture(
        "short_transfer",
        {
            "Flowers-17, linear": ("flowers17", "linear"),
            "CIFAR-10, 1-NN": ("cifar10", "1-NN"),
            "Held-out classes, 1-NN": ("held-out classes", "1-NN"),
        },
        rows=("AugSelf", "CASSLE", "leak-free", "branched"),
        seeds=("0", "1"),  # every row was run with
    ),
    Picture(
        "choice",
        {
            "Flowers-17, linear": ("flowers17", "linear"),
            "CIFAR-10, linear": ("cifar10", "linear"),
            "CIFAR-10, 1-NN": ("cifar10", "1-NN"),
        },
        mean=False,
    ),
    Picture(
        "map",
        {
            "Flowers-17, linear": ("flowers17", "linear"),
            "CIFAR-10, linear": ("cifar10", "linear"),
        },
        rows=(
            "SimCLR, batch 128",
            "SimCLR",
            "SimCLR, rate × 1/2",
            "SimCLR, rate × 2",
            "SimCLR, batch 1024",
            "SimCLR, 48 epochs",
            "SimCLR, 64 pixels",
            "SimCLR, width 16",
            "SimCLR, width 32",
            "SimCLR, colour 0.5",
            "SimCLR, colour 2",
            "MoCo-v2, queue 1024",
            "MoCo-v2, queue 65536",
            "Barlow Twins",
        ),
        row="method",
        mark="conditioning",
        mean=False,
    ),
    Picture(
        "awareness",
        {
            "Flowers-17, 1-shot": ("flowers17", "5-way 1-shot"),
            "Flowers-17, 5-shot": ("flowers17", "5-way 5-shot"),
            "CIFAR-10, 1-shot": ("cifar10", "5-way 1-shot"),
            "CIFAR-10, linear": ("cifar10", "linear"),
        },
    ),
    Picture(
        "field",
        {
            "Colour": ("motifs", "colour"),
            "Contrast, place, …": ("motifs", "contrast"),
            "Flowers-17, linear": ("flowers17", "linear"),
            "CIFAR-10, linear": ("cifar10", "linear"),
        },
    ),
)


def draw(picture: Picture) -> None:
    """Draws a panel per measure and a line per row: every pair of runs, and their mean."""
    found = [picture.ahead(*measure) for measure in picture.panels.values()]
    rows = picture.rows or list(dict.fromkeys(row for each in found for row in each))
    marks = [mark for mark in MARKERS if any(mark in each[row] for each in found for row in rows)]
    figure, axes = plt.subplots(
        1, len(found), figsize=(9, 1.4 + 0.35 * len(rows)), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis, title, ahead in zip(axes[0], picture.panels, found, strict=True):
        for place, row in enumerate(reversed(rows)):
            if picture.mean:
                pairs = np.concatenate(list(ahead[row].values()))
                axis.errorbar(
                    pairs.mean(), place, xerr=half_interval(pairs), fmt="k|", ms=14, capsize=3
                )
            for number, mark in enumerate(marks):
                points = ahead[row][mark]
                axis.plot(points, [place] * len(points), MARKERS[mark], color=f"C{number}", ms=4,
                          ls="", alpha=0.7, label=None if place else mark)  # fmt: skip
        axis.axvline(0, color="0.6", lw=0.8, zorder=0)
        axis.set(title=title, xlabel="points ahead of plain")
        axis.set_yticks(range(len(rows)), reversed(rows))
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
    if len(marks) > 1:
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(marks))
    figure.savefig(FOLDER / f"{picture.table}.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    for each in PICTURES:
        draw(each)
