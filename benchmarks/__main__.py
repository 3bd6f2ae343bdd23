"""Measures cassle_jax and, where they are installed, what users would pick instead.

python -m benchmarks                              # everything, at sizes that suit the device
python -m benchmarks --only=augmentation,input --data=/data/imagenet/val --to=performance.json

The first contender of a measurement is ours, and a ratio says how many times its rate another's
is below. Rivals need `pip install -r requirements-benchmarks.txt`. The exit code is 1 where one
that is installed failed. Other work on the machine slows contenders unequally, PyTorch's threads
most of all: they wait for each other.
"""

import dataclasses
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from absl import flags

from benchmarks import (
    augmentation,
    first_step,
    input_pipeline,
    limits,
    linear_evaluation,
    memory,
    training,
)
from benchmarks.apart import apart
from benchmarks.contest import Row
from benchmarks.workload import Workload, cpus, devices, draw_jpegs, jpegs_in, workload_for
from cassle_jax import command
from cassle_jax.checks import check_at_least
from cassle_jax.config import ConfigError, knows
from cassle_jax.storage import write_whole

LOG = logging.getLogger("cassle_jax.benchmarks")

MEASUREMENTS: dict[str, Callable[[Workload], list[Row]]] = {
    "augmentation": augmentation.measure,
    "input": input_pipeline.measure,
    "step": training.moco_v2,
    "simclr": training.simclr,
    "conditioning": training.conditioning,
    "run": training.whole_run,
    "resident": training.resident,
    "linear": linear_evaluation.measure,
    "first_step": first_step.measure,
    "memory": memory.measure,
    "limits": limits.measure,
}
BESIDE_PYTORCH = ("augmentation", "step", "linear")  # in one process, on one device
PACKAGES = (
    "jax",
    "flax",
    "torch",
    "torchvision",
    "kornia",
    "dm-pix",
    "augmax",
    "stable-pretraining",
)
DRAWN_JPEGS = 512
SECONDS = 1800.0
BUSY = 0.5  # processes that ran on average in the last minute, above which the machine is not quiet


def measured(names: Sequence[str], work: Workload, seconds: float = SECONDS) -> Iterator[list[Row]]:
    """The rows of each measurement, printed as it ends; one that fails is a row that says why.

    So does one that takes more than so many seconds.

    Each has the device and its memory for itself. This process never touches them: on TPUs no
    other could, and what one measurement leaves would be missing in the next.
    """
    for name in names:
        LOG.info("measuring %s", name)
        # JAX takes most of an accelerator's memory when it starts there, or what it needs.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = str(name not in BESIDE_PYTORCH).lower()
        try:
            rows = apart(MEASUREMENTS[name], work, seconds=seconds)
        except RuntimeError as error:
            rows = [Row(name, "all of it", "", note=str(error), failed=True)]
        print_rows(rows)
        yield rows


def print_header(measured_on: dict) -> None:
    """Prints what everything below was measured on."""
    machine, settings = measured_on["about"], measured_on["workload"]
    print(f"{machine['device']} × {machine['devices']}, {machine['cpus']} CPUs")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(", ".join(f"{name}={value}" for name, value in settings.items()))
    print(f"{'':75} {'median':>10} {'':17} {'least–most':>16}  × ours/theirs", flush=True)


def print_rows(rows: Sequence[Row]) -> None:
    """Prints a measurement's rows: median, least and most, and ours over theirs, with its range."""
    for row in rows:
        text = f"{row.measurement:20} {row.name:54}"
        if row.values:
            spread = f"{min(row.values):.4g}–{max(row.values):.4g}"
            text += f" {row.median:10.4g} {row.unit:17} {spread:>16}"
            text += f"  × {row.ratio:.3g}" if row.ratio else ""
            text += f" ({min(row.ratios):.3g}–{max(row.ratios):.3g})" if len(row.ratios) > 1 else ""
        print(f"{text} {row.note}".rstrip(), flush=True)


def about() -> dict[str, object]:
    """The machine, and the versions of what is installed.

    Raises:
      ConfigError: JAX finds no device.
    """
    try:
        found = apart(devices)
    except RuntimeError as error:
        raise ConfigError(f"JAX finds no device: {error}") from error
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        **found,
        "cpus": cpus(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write(path: Path, measured_on: dict, rows: Sequence[Row]) -> None:
    """Writes all that was measured as JSON."""
    told = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**measured_on, "rows": told}, indent=1, ensure_ascii=False)
    write_whole(path, f"{content}\n".encode())


def chosen_workload(flag_values: flags.FlagValues, platform: str) -> Workload:
    """The workload that suits a platform, changed as the flags say.

    Raises:
      ConfigError: a value that cannot be.
    """
    usual = workload_for(platform)
    given = {
        name: getattr(flag_values, name)
        for name in ("encoder", "size", "batch", "dtype", "views_size", "views_batch", "canvas",
                     "steps", "rounds")
        if getattr(flag_values, name) is not None
    }  # fmt: skip
    work = dataclasses.replace(usual, **given)
    try:
        check_at_least(2, batch=work.batch, views_batch=work.views_batch)
        check_at_least(1, steps=work.steps, rounds=work.rounds, size=work.size)
        check_at_least(work.views_size, canvas=work.canvas)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    knows("encoder", work.encoder, ("resnet18", "resnet34", "resnet50"))
    knows("dtype", work.dtype, ("float32", "bfloat16"))
    return work


if __name__ == "__main__":
    only_flag = flags.DEFINE_list("only", list(MEASUREMENTS), "Which measurements.")
    data_flag = flags.DEFINE_string("data", "", "A folder of JPEGs; drawn ones where it is empty.")
    to_flag = flags.DEFINE_string("to", "", "A JSON file of all that is measured.")
    seconds_flag = flags.DEFINE_float("seconds", SECONDS, "The most a measurement may take.", 1.0)
    for number in ("size", "batch", "views_size", "views_batch", "canvas", "steps", "rounds"):
        flags.DEFINE_integer(number, None, f"The workload's; see benchmarks/workload.py: {number}.")
    for text in ("encoder", "dtype"):
        flags.DEFINE_string(text, None, f"The workload's {text}.")

    def main() -> None:
        """Measures what the flags ask for."""
        for name in only_flag.value:
            knows("only", name, MEASUREMENTS)
        machine = about()
        work = chosen_workload(flags.FLAGS, machine["platform"])
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            # What one measurement compiled, the next ones need not.
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder, "compiled")))
            if not {"input", "run"} & set(only_flag.value):
                files, jpegs = (), "none are read"
            elif data_flag.value:
                files = jpegs_in(Path(data_flag.value).expanduser())
                jpegs = f"{len(files)} in {data_flag.value}"
            else:
                files = draw_jpegs(Path(folder), max(DRAWN_JPEGS, 2 * work.views_batch, work.batch))
                jpegs = f"{len(files)} of drawn scenes, 500 × 375; --data takes others"
            settings = {**vars(work), "jpegs": jpegs}
            measured_on = {"about": machine, "load": load, "workload": settings}
            print_header(measured_on)
            if load > BUSY:
                LOG.warning("%.1f processes ran in the last minute: figures will be unfair", load)
            rows = []
            work = dataclasses.replace(work, jpegs=files)
            for found in measured(only_flag.value, work, seconds_flag.value):
                rows += found
                if to_flag.value:
                    write(Path(to_flag.value).expanduser(), measured_on, rows)
        if any(row.failed for row in rows):
            sys.exit(1)

    command.run(main)
