"""Writes a run's metrics as JSON lines and TensorBoard files, and reads them back."""

import json
import re
import socket
import struct
import time
from collections.abc import Mapping
from numbers import Real
from typing import Protocol, runtime_checkable

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from cassle_jax.faults import retried
from cassle_jax.storage import (
    GrowingFile,
    is_there,
    make_shared,
    number_of,
    read_whole,
    write_whole,
)


@runtime_checkable
class Sink(Protocol):
    """A receiver of a run's metrics."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes metrics of a step."""

    def close(self) -> None:
        """Writes the rest, if that is possible now."""


class MetricsWriter:
    """Writes a run's metrics to `<workdir>/metrics.jsonl`, TensorBoard, and the sinks added.

    A continued run repeats the steps after its checkpoint, so their earlier lines are dropped.
    Lines that cannot be written during the run, as on a full disk, are written as soon as possible.

    Args:
      workdir: workdir of the run.
      step: the step that the run continues from; 0 for a new one.

    Attributes:
      measured: names of the metrics of that step that the file already has.

    Raises:
      OSError: the files cannot be written.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        workdir = epath.Path(workdir)
        lines = JsonLines(workdir / "metrics.jsonl", step)
        self.measured = lines.measured
        self._sinks: list[Sink] = [lines, TensorBoard(workdir / "tensorboard", step)]

    def add(self, sink: Sink) -> None:
        """Writes to one more sink from now on."""
        self._sinks.append(sink)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        """Closes all sinks."""
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """One line per report, with its step; earlier lines after `step` are dropped.

    Attributes:
      measured: names of the metrics of that step that the file already has.
    """

    def __init__(self, path: epath.Path, step: int):
        lines = [each for each in read_lines(path) if each["step"] <= step]
        self.measured = {name for each in lines if each["step"] == step for name in each}
        kept = b"".join(map(_as_line, lines))
        if not is_there(path) or read_whole(path) != kept:
            write_whole(path, kept)
        self._file = GrowingFile(path, kept)
        self.close = self._file.close

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line."""
        self._file.append(_as_line({"step": step, **metrics}))


class TensorBoard:
    """TensorBoard's event file: events with their lengths, and checksums of both."""

    def __init__(self, folder: epath.Path, step: int):
        make_shared(folder)
        # TensorBoard reads a folder's files in the order of these seconds, so those of a continued
        # run come after the earlier ones, even where the clock was set back.
        before = [re.search(r"tfevents\.(\d+)", each.name) for each in folder.iterdir()]
        seconds = max([int(time.time()), *(int(each[1]) + 1 for each in before if each)])
        name = f"events.out.tfevents.{seconds:010}.{socket.gethostname()}"
        self._file = GrowingFile(folder / name)
        self.close = self._file.close
        self._append(Event(file_version="brain.Event:2"))
        if step:  # TensorBoard then drops later events of the earlier files
            self._append(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends an event."""
        event = Event(step=step)
        for name, value in metrics.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._append(event)

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(each)) for each in (length, data)]
        self._file.append(length + checksums[0] + data + checksums[1])


def read_metrics(workdir: epath.PathLike) -> dict[str, list[tuple[int, float]]]:
    """The values per metric of a run, as (step, value) in order."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in read_lines(epath.Path(workdir, "metrics.jsonl")):
        step = line.pop("step")
        for name, value in line.items():
            if not isinstance(value, Real):  # a power cut leaves anything
                continue
            curves.setdefault(name, []).append((step, value))
    return curves


def read_lines(path: epath.PathLike, key: str = "step", kind: type = int) -> list[dict]:
    """The complete lines of a JSON-lines file in which `key` has a value of type `kind`.

    A killed run may leave half a line at the end; a power cut may leave anything.

    Raises:
      OSError, Outage: the file cannot be read, for good or for now.
    """
    lines, path = [], epath.Path(path)
    content = retried(str(path), lambda: read_whole(path) if is_there(path) else b"")
    for line in content.split(b"\n"):
        try:
            lines.append(json.loads(line, parse_int=number_of))
        except (ValueError, RecursionError):
            continue
    return [each for each in lines if isinstance(each, dict) and type(each.get(key)) is kind]


def append_line(path: epath.Path, line: Mapping) -> None:
    """Adds a line to a short JSON-lines file; rewrites the file without damaged lines.

    Raises:
      OSError: the file cannot be written; it is then unchanged.
    """
    write_whole(path, b"".join(_as_line(each) for each in [*read_lines(path), line]))


def _as_line(values: Mapping) -> bytes:
    return json.dumps(values).encode() + b"\n"
