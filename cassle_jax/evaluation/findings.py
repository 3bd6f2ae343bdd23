"""Findings of a protocol for the report: scores, charts, galleries and failures; their JSON."""

import base64
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

Pixels = UInt8[np.ndarray, "_ _ 3"]


@dataclasses.dataclass(frozen=True)
class Score:
    """A number that a protocol measured on a dataset.

    Attributes:
      task: the protocol, such as `linear`.
      dataset: name of the dataset.
      metric: its name, such as `accuracy`, `mean per class` or `R²`.
      value: the number; accuracies are in [0, 1].
      interval: half the width of its 95 % interval, where the protocol knows one.
      higher_is_better: whether higher or lower values are better; `None` for neither.
    """

    task: str
    dataset: str
    metric: str
    value: Real
    interval: Real | None = None
    higher_is_better: bool | None = True


def half_interval(values: Sequence[float] | np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean of two or more values (Student's t)."""
    from scipy.special import stdtrit  # pretraining starts faster without SciPy

    count = len(values)
    return float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(count))


def missed_optima(
    task: str, dataset: str, converged: Bool[np.ndarray, " fits"], fits: str = "fits"
) -> Score:
    """The number of a protocol's fits that missed their optimum.

    Zero is reported, too: without it, a mean over seeds or datasets would leave out those without
    misses.
    """
    name = f"{fits} that did not converge"
    return Score(task, dataset, name, float(np.sum(~converged)), higher_is_better=False)


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over a numeric axis, or bars over names.

    Attributes:
      task: the protocol.
      dataset: name of the dataset.
      title: title of the chart.
      x_label: label of the axis of strengths, dimensions, stages, ….
      y_label: label of the axis of values.
      series: points (x, y) by name; x is a number for lines and a name for bars.
      log_x: whether x has a logarithmic axis.
      log_y: whether y has one; never for bars, which start at zero.
    """

    task: str
    dataset: str
    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[Real | str, Real]]]
    log_x: bool = False
    log_y: bool = False

    @property
    def is_bars(self) -> bool:
        """Whether x are names."""
        return any(isinstance(x, str) for points in self.series.values() for x, _ in points)


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Rows of pictures, such as a query and its nearest images.

    Attributes:
      task: the protocol.
      dataset: name of the dataset.
      title: title of the gallery.
      rows: pictures, uint8 RGB of any size, each with a caption; the first of a row is the query
        of the others.
    """

    task: str
    dataset: str
    title: str
    rows: Sequence[Sequence[tuple[Pixels, str]]]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A protocol that could not be run on a dataset.

    Attributes:
      task: the protocol.
      dataset: name of the dataset.
      reason: one line.
    """

    task: str
    dataset: str
    reason: str


Finding = Score | Chart | Gallery | Failure
KINDS = {kind.__name__.lower(): kind for kind in (Score, Chart, Gallery, Failure)}


def to_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Converts findings to strict JSON: no NaN, and pictures as PNG in base64.

    Numbers that are not finite, which JSON lacks, become "nan", "inf" and "-inf".
    """
    return [{"kind": type(finding).__name__.lower(), **_fields(finding)} for finding in findings]


def from_json(items: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """The findings that `to_json` wrote.

    Raises:
      AttributeError, KeyError, TypeError, ValueError: they are damaged.
    """
    return [_finding(dict(item)) for item in items]


def _fields(finding: Finding) -> dict[str, Any]:
    fields = {name: plain(value) for name, value in vars(finding).items()}
    if isinstance(finding, Gallery):
        fields["rows"] = [
            [(_encoded(pixels), caption) for pixels, caption in row] for row in finding.rows
        ]
    if isinstance(finding, Chart):
        fields["series"] = {
            name: [(plain(x), plain(y)) for x, y in points]
            for name, points in finding.series.items()
        }
    return fields


def plain(value: Any) -> Any:
    """A NumPy number as a Python number, and one that is not finite, which JSON lacks, as text."""
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _finding(fields: dict[str, Any]) -> Finding:
    kind = KINDS[fields.pop("kind")]
    if kind is Score:
        fields["value"] = float(fields["value"])
        fields["interval"] = None if fields["interval"] is None else float(fields["interval"])
    if kind is Gallery:
        fields["rows"] = tuple(
            tuple((_decoded(png), caption) for png, caption in row) for row in fields["rows"]
        )
    if kind is Chart:
        fields["series"] = {
            name: tuple((x, float(y)) for x, y in points)
            for name, points in fields["series"].items()
        }
    finding = kind(**fields)
    _check_kinds(finding)
    return finding


def _check_kinds(finding: Finding) -> None:
    """Raises ValueError where a value that was read is of another type than its field."""
    texts, flags = [], []
    for field in dataclasses.fields(finding):
        value = getattr(finding, field.name)
        if field.type is str:
            texts.append(value)
        elif field.type is bool or (field.type == bool | None and value is not None):
            flags.append(value)
    if isinstance(finding, Gallery):
        texts += [caption for row in finding.rows for _, caption in row]
    if isinstance(finding, Chart):
        points = [x for of_name in finding.series.values() for x, _ in of_name]
        texts += [x for x in points if isinstance(x, bool) or not isinstance(x, Real)]
    for values, kind in ((texts, str), (flags, bool)):
        for value in values:
            if not isinstance(value, kind):
                raise ValueError(f"{value!r} is in no {type(finding).__name__.lower()}")


def _encoded(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _decoded(png: str) -> Pixels:
    try:
        image = Image.open(io.BytesIO(base64.b64decode(png)), formats=("PNG",))
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises either for damage
        raise ValueError(f"a picture is damaged: {error}") from error
