"""Draws a comparison of runs as one figure: loss curves, bar charts, and example views."""

import io
import math
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from cassle_jax.report.palette import FAINT, INK, VIEW_1, VIEW_2, run_colours
from cassle_jax.report.table import Table, cell_text
from cassle_jax.storage import make_shared, write_whole

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""(step, value) in order, by run."""

_EXAMPLES = 6


def write_figure(
    path: str | PathLike[str],
    *,
    title: str,
    loss: Curves,
    tables: Mapping[str, Table],
    images: Sequence[UInt8[Array | np.ndarray, "_ _ 3"]],
    view_1: Float[Array | np.ndarray, "images height width 3"],
    view_2: Float[Array | np.ndarray, "images height width 3"],
) -> None:
    """Writes one PNG: loss per run, tables as bar charts, and the views of the first six images.

    Args:
      path: Path of the PNG; folders are created, an existing file is replaced.
      title: A line above the figure.
      loss: (step, loss) pairs by run.
      tables: Tables with the same columns, by title. A row is a group of bars, with one bar per
        column after the first, in the colour of the run of that name. A cell without a number has
        no bar.
      images: RGB images in 0..255, of any sizes.
      view_1: First views in [0, 1].
      view_2: Second views in [0, 1].

    Raises:
      ValueError: If a row's length differs from the columns, if tables have different columns, or
        if the numbers of images and views differ.
    """
    columns = _shared_columns(tables)
    if not len(images) == len(view_1) == len(view_2):
        raise ValueError(f"{len(images)} images, {len(view_1)} and {len(view_2)} views")
    colours = run_colours([*loss, *columns])
    shown = min(len(images), _EXAMPLES)
    figure = Figure(figsize=(11, 5.4 if shown else 4.2), facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=13, weight="bold", color=INK)
    charts, strip = figure.subfigures(2, 1, height_ratios=(4.4, 1)) if shown else (figure, None)
    left, right = charts.subfigures(1, 2, width_ratios=(1, 2))
    _draw_loss(left.subplots(), loss, colours)
    _draw_tables(right, tables, columns, colours)
    if strip is not None:
        _draw_examples(strip, images[:shown], view_1[:shown], view_2[:shown])
    save_png(figure, path)


def save_png(figure: Figure, path: PathLike[str] | str) -> None:
    """Writes a figure as a PNG, whole or not at all, also where another user wrote an earlier one.

    Raises:
      OSError: it cannot be written; the earlier one is untouched.
      ValueError: the path does not end in `.png`.
    """
    if epath.Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} would be a PNG; give it a name that ends in .png")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    make_shared(epath.Path(path).parent)
    write_whole(path, drawn.getvalue())


def _draw_loss(axes: Axes, loss: Curves, colours: dict[str, str]) -> None:
    for run, points in loss.items():
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        axes.plot(steps, values, color=colours[run], label=run, marker="o" * (len(points) == 1))
    axes.set_xlabel("step")
    axes.set_title("loss", loc="left", size=11)
    if loss:
        axes.legend(frameon=False)
    _plain(axes)


def _shared_columns(tables: Mapping[str, Table]) -> list[str]:
    """The columns after the first, which all tables share."""
    for table in tables.values():
        table.check()
    columns = [list(table.columns[1:]) for table in tables.values()]
    if columns.count(columns[0]) < len(columns):
        raise ValueError(f"tables have different columns: {columns}")
    return columns[0]


def _draw_tables(
    figure: SubFigure, tables: Mapping[str, Table], columns: Sequence[str], colours: dict[str, str]
) -> None:
    """Draws the tables side by side, with a shared scale and the same width of bars."""
    rows = [max(len(table.rows), 1) for table in tables.values()]
    panels = figure.subplots(1, len(tables), sharey=True, width_ratios=rows, squeeze=False)[0]
    for axes, (title, table) in zip(panels, tables.items(), strict=True):
        _draw_bars(axes, table, colours, upright=sum(rows) * len(columns) > 16)
        axes.set_title(title, loc="left", size=11)
        _plain(axes)
    if columns:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, ncols=len(columns), loc="outside upper right")


def _draw_bars(axes: Axes, table: Table, colours: dict[str, str], *, upright: bool) -> None:
    columns = table.columns[1:]
    width = 0.8 / max(len(columns), 1)
    for index, column in enumerate(columns):
        for group, row in enumerate(table.rows):
            cell = row[1 + index]
            if isinstance(cell, str) or not math.isfinite(cell):
                continue
            x = group + (index - (len(columns) - 1) / 2) * width
            axes.bar(x, cell, 0.92 * width, color=colours[column])
            offset = (0, 2 if cell >= 0 else -2)
            axes.annotate(
                cell_text(float(cell), 2 if upright else 3),
                (x, cell),
                offset,
                textcoords="offset points",
                ha="center",
                va="bottom" if cell >= 0 else "top",
                size=6 if upright else 7,
                rotation=90 if upright else 0,
            )
        axes.bar(0, 0, color=colours[column], label=column)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(table.rows)), [str(row[0]) for row in table.rows], size=7)
    axes.margins(x=0.02, y=0.12)


def _draw_examples(strip, images: Sequence, view_1: np.ndarray, view_2: np.ndarray) -> None:
    """Shows images and their two views in one row, with gaps between images."""
    axes = strip.subplots(1, 4 * len(images), width_ratios=(1, 1, 1, 0.12) * len(images))
    for gap in axes[3::4]:
        gap.set_axis_off()
    for index, image in enumerate(images):
        triple = (
            ("image", np.asarray(image) / 255.0, FAINT),
            ("view 1", np.asarray(view_1[index], np.float32), VIEW_1),
            ("view 2", np.asarray(view_2[index], np.float32), VIEW_2),
        )
        for cell, (name, pixels, colour) in zip(axes[4 * index :], triple, strict=False):
            cell.imshow(np.clip(pixels, 0, 1), interpolation="antialiased")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.set_title(name, size=7, color=INK if name == "image" else colour, pad=2)
            for spine in cell.spines.values():
                spine.set(color=colour, linewidth=1.4)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eceef2")
    axes.set_axisbelow(True)
