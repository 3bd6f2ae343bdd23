"""Records the facts of every start of a run: versions, devices, images, heads."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from cassle_jax.storage import has_type
from cassle_jax.training.metrics import append_line, read_lines
from cassle_jax.versions import versions

LOG = logging.getLogger(__name__)

STARTS = "starts.jsonl"

Start = dict[str, Any]

_TYPES = {"images": int, "names": str, "devices": str, "versions": {str: str}}


def record_start(
    workdir: epath.PathLike,
    *,
    step: int,
    images: int,
    mesh: Mesh,
    names: str | None = None,
    changes: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
) -> None:
    """Appends a line to `<workdir>/starts.jsonl`.

    Args:
      workdir: workdir of the run.
      step: the step that the run starts from; 0 for a new one.
      images: number of training images.
      mesh: the devices.
      names: digest of the images' names, from `data.names_of`.
      changes: settings changed since the previous start, from `saved_config.check_unchanged`.
      record: facts of the method for evaluation, from `recorded.record_of`.

    Raises:
      OSError: the file cannot be written.
    """
    start = {
        "step": step,
        "images": images,
        "names": names,
        "processes": jax.process_count(),
        "devices": f"{mesh.size} × {mesh.devices.flat[0].device_kind}",
        "versions": versions(),
        **(record or {}),
    }
    if changes:
        start["changes"] = list(changes)
    append_line(epath.Path(workdir, STARTS), start)


def last_start_record(workdir: epath.PathLike, step: int) -> Start:
    """The last start of a run at or before `step`, without damaged facts; empty without any."""
    starts = read_lines(epath.Path(workdir, STARTS))
    start = next((each for each in reversed(starts) if each["step"] <= step), {})
    unknown = [name for name, kind in _TYPES.items() if not has_type(start.get(name), kind)]
    if damaged := [name for name in unknown if start.get(name) is not None]:
        LOG.warning(
            "%s: damaged facts of the start at step %s count as not recorded: %s",
            workdir,
            start["step"],
            ", ".join(damaged),
        )
    return {name: fact for name, fact in start.items() if name not in unknown}
