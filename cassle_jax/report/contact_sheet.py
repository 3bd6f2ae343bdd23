"""Draws images beside their two augmented views and the views' descriptors."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cassle_jax.report.figure import save_png
from cassle_jax.report.palette import FAINT, INK, VIEW_1, VIEW_2

Descriptors = Mapping[str, Float[Array | np.ndarray, "images _"]]

_ROW_INCHES = 1.9
_COLUMNS = (1.0, 1.0, 1.15, 1.0, 1.15)
_SIGMA_SHOWN = 2.0


def contact_sheet(
    images: Sequence[UInt8[Array | np.ndarray, "_ _ 3"]],
    view_1: Float[Array | np.ndarray, "images height width 3"],
    view_2: Float[Array | np.ndarray, "images height width 3"],
    descriptors_1: Descriptors,
    descriptors_2: Descriptors,
    path: str | PathLike[str],
    title: str = "",
) -> None:
    """Writes a PNG with one row per image: the image, its views, and their descriptors.

    Crop boxes are drawn on the image in the colours of the two views. The crop descriptor of a
    flipped view is mirrored, so correct boxes need ``flip`` along with ``crop``. Descriptors
    without a drawing are printed as numbers.

    Args:
      images: RGB images in 0..255 before augmentation, of any sizes.
      view_1: First views in [0, 1], before normalisation; values outside are clipped.
      view_2: Second views.
      descriptors_1: Descriptors of the first views by name (``crop``, ``flip``, ``blur``,
        ``color``, ``color_diff``, ``grayscale``, ``solarize``, ``rotation``).
      descriptors_2: Descriptors of the second views.
      path: Path of the PNG; folders are created, an existing file is replaced.
      title: A line above the images.

    Raises:
      ValueError: If there are no images, or if the number of views or descriptors differs.
    """
    views = (np.asarray(view_1, np.float32), np.asarray(view_2, np.float32))
    described = tuple(
        {name: np.asarray(values, np.float32) for name, values in descriptors.items()}
        for descriptors in (descriptors_1, descriptors_2)
    )
    _check(len(images), views, described)
    figure, axes = _grid(len(images), title)
    for row, image in enumerate(images):
        boxes = [_box({name: d[name][row] for name in d}) for d in described]
        _draw_image(axes[row, 0], np.asarray(image) / 255.0, INK, boxes)
        for view, colour in enumerate((VIEW_1, VIEW_2)):
            _draw_image(axes[row, 1 + 2 * view], views[view][row], colour)
            own = {name: values[row] for name, values in described[view].items()}
            _draw_descriptors(axes[row, 2 + 2 * view], own, colour)
    save_png(figure, path)


def _grid(rows: int, title: str) -> tuple[Figure, np.ndarray]:
    """An empty sheet with its headings, and its axes as an array [rows, 5]."""
    head = 0.55 if title else 0.32
    height = rows * _ROW_INCHES + head
    figure = Figure(figsize=(sum(_COLUMNS) * _ROW_INCHES, height), facecolor="white")
    axes = figure.subplots(
        rows,
        len(_COLUMNS),
        squeeze=False,
        gridspec_kw={
            "width_ratios": _COLUMNS,
            "left": 0.012,
            "right": 0.988,
            "bottom": 0.05 / height,
            "top": 1 - head / height,
            "wspace": 0.06,
            "hspace": 0.08,
        },
    )
    if title:
        figure.text(0.012, 1 - 0.12 / height, title, size=11, weight="bold", color=INK, va="top")
    headings = ("image", "view 1", "", "view 2", "")
    for heading, column, colour in zip(
        headings, axes[0], (INK, VIEW_1, VIEW_1, VIEW_2, VIEW_2), strict=True
    ):
        column.set_title(heading, loc="left", size=9, color=colour, pad=3)
    return figure, axes


def _check(rows: int, views: tuple[np.ndarray, ...], described: tuple[dict, ...]) -> None:
    if rows == 0:
        raise ValueError("a contact sheet needs at least one image")
    for view, (pixels, descriptors) in enumerate(zip(views, described, strict=True), start=1):
        lengths = {f"view_{view}": len(pixels)}
        lengths |= {f"descriptors_{view}[{n!r}]": len(v) for n, v in descriptors.items()}
        for name, length in lengths.items():
            if length != rows:
                raise ValueError(f"{name} has {length} rows for {rows} images")


def _box(descriptors: Mapping[str, np.ndarray]) -> tuple[float, float, float, float] | None:
    """Left, top, width and height of the crop box before a flip, as fractions of the image."""
    if "crop" not in descriptors:
        return None
    row, column, height, width = (float(value) for value in descriptors["crop"])
    if "flip" in descriptors and descriptors["flip"][0] > 0.5:
        column = 1 - column
    return column - width / 2, row - height / 2, width, height


def _draw_image(
    axes: Axes,
    pixels: np.ndarray,
    colour: str,
    boxes: Sequence[tuple[float, float, float, float] | None] = (),
) -> None:
    """Shows a whole image in [0, 1] with a frame and crop boxes."""
    height, width = pixels.shape[:2]
    # Small images keep their pixels; large ones shrink smoothly.
    smooth = "nearest" if max(height, width) <= 128 else "antialiased"
    extent = (0, width, height, 0)
    axes.imshow(np.clip(pixels, 0, 1), interpolation=smooth, extent=extent)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.6 if colour != INK else 0.6)
    for box, box_colour in zip(boxes, (VIEW_1, VIEW_2), strict=False):
        if box is None:
            continue
        left, top, box_width, box_height = box
        corner, size = (left * width, top * height), (box_width * width, box_height * height)
        for line_colour, line in (("white", 3.2), (box_colour, 1.6)):
            axes.add_patch(
                Rectangle(corner, *size, fill=False, edgecolor=line_colour, linewidth=line)
            )


class _Line(NamedTuple):
    """One component of a descriptor, ready to draw."""

    label: str
    text: str
    kind: Literal["text", "mark", "bar", "signed bar"] = "text"
    # Share of the bar's full length, or 1 and 0 for a mark.
    value: float = 0.0
    colour: str | None = None


def _draw_descriptors(axes: Axes, descriptors: Mapping[str, np.ndarray], colour: str) -> None:
    """Draws one view's descriptors as lines of bars, marks and numbers, top to bottom."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    lines = _lines(descriptors)
    step = min(0.105, 0.98 / max(len(lines), 1))
    for index, line in enumerate(lines):
        y = 0.96 - step * index
        axes.text(0.02, y, line.label, size=6.6, color=INK, va="center")
        axes.text(0.99, y, line.text, size=6.6, color=INK, va="center", ha="right")
        if line.kind == "mark":
            _draw_mark(axes, y, step, on=line.value == 1, colour=colour)
        elif line.kind != "text":
            _draw_bar(axes, y, step, line, colour)


def _draw_bar(axes: Axes, y: float, step: float, line: _Line, colour: str) -> None:
    left, right = 0.40, 0.80
    signed = line.kind == "signed bar"
    zero = (left + right) / 2 if signed else left
    length = float(np.clip(line.value, -1, 1)) * (right - zero)
    bottom, thickness = y - 0.18 * step, 0.36 * step
    axes.add_patch(Rectangle((left, bottom), right - left, thickness, color="#eceef2", linewidth=0))
    axes.add_patch(
        Rectangle((zero, bottom), length, thickness, color=line.colour or colour, linewidth=0)
    )
    axes.plot([zero, zero], [y - 0.36 * step, y + 0.36 * step], color=INK, linewidth=0.6)


def _draw_mark(axes: Axes, y: float, step: float, *, on: bool, colour: str) -> None:
    side = 0.5 * step
    face, edge = (colour, colour) if on else ("none", FAINT)
    corner = (0.40, y - side / 2)
    axes.add_patch(Rectangle(corner, side, side, facecolor=face, edgecolor=edge, linewidth=0.9))


def _lines(descriptors: Mapping[str, np.ndarray]) -> list[_Line]:
    """The lines of all descriptors: known ones in the order of augmentation, then the others."""
    names = [name for name in _LINES if name in descriptors]
    names += [name for name in descriptors if name not in _LINES]
    return [
        line
        for name in names
        for line in _LINES.get(name, partial(_number_lines, name))(descriptors[name].tolist())
    ]


def _mark_lines(name: str, values: Sequence[float]) -> list[_Line]:
    on = values[0] > 0.5
    return [_Line(name, "yes" if on else "no", "mark", float(on))]


def _color_lines(values: Sequence[float]) -> list[_Line]:
    labels = ("brightness", "contrast", "saturation", "hue")
    return [
        _Line(label, f"{value:+.2f}", "signed bar", 2 * value)
        for label, value in zip(labels, values, strict=True)
    ]


def _color_diff_lines(values: Sequence[float]) -> list[_Line]:
    paints = ("#d62728", "#2ca02c", "#1f4fd6")
    return [
        _Line(f"mean {channel} lost", f"{value:+.2f}", "signed bar", 2 * value, paint)
        for channel, value, paint in zip("RGB", values, paints, strict=True)
    ]


def _number_lines(name: str, values: Sequence[float]) -> list[_Line]:
    text = " ".join(f"{value:.3g}" for value in values[:4])
    return [_Line(name, text + " …" * (len(values) > 4))]


_LINES: dict[str, Callable[[Sequence[float]], list[_Line]]] = {
    "crop": lambda values: [_Line("crop", f"{values[2]:.0%} high, {values[3]:.0%} wide")],
    "flip": partial(_mark_lines, "flip"),
    "color": _color_lines,
    "color_diff": _color_diff_lines,
    "solarize": lambda values: [
        _Line("solarize", "no" if values[0] >= 1 else f"from {values[0]:.2f}")
    ],
    "grayscale": partial(_mark_lines, "grayscale"),
    "blur": lambda values: [
        _Line("blur σ", f"{values[0]:.2f} px", "bar", values[0] / _SIGMA_SHOWN)
    ],
    "rotation": lambda values: [_Line("rotation", f"{90 * int(np.argmax(values))}°")],
}
