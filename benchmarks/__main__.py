"""Measures the speed and memory of cassle_jax and of installed rivals.

python -m benchmarks                              # everything, at sizes that suit the device
python -m benchmarks --only=augmentation,input --data=/data/imagenet/val --to=performance.json
python -m benchmarks --to=performance.json --call_minutes=9   # repeated until it ends with 0

The first contender of a measurement is ours; a ratio is its rate divided by a rival's. Rivals need
`pip install -r requirements-benchmarks.txt`. The exit code is 1 if an installed contender failed.
Other processes on the machine distort the ratios, as PyTorch's threads wait for each other.
"""

import dataclasses
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    prepared,
    training,
)
from benchmarks.contest import Row
from benchmarks.isolated import run_isolated
from benchmarks.workload import Workload, devices, draw_jpegs, jpegs_in, workload_for
from cassle_jax import command
from cassle_jax.checks import ConfigError, check_at_least, check_one_of
from cassle_jax.data.pipeline import usable_cpus
from cassle_jax.storage import kept_json, write_whole

LOG = logging.getLogger("cassle_jax.benchmarks")

MEASUREMENTS: dict[str, Callable[[Workload], list[Row]]] = {
    "augmentation": augmentation.measure,
    "input": input_pipeline.measure,
    "prepared": prepared.measure,
    "step": training.moco_v2,
    "simclr": training.simclr,
    "conditioning": training.conditioning,
    "run": training.whole_run,
    "resident": training.resident,
    "vit": training.attention,
    "linear": linear_evaluation.measure,
    "first_step": first_step.measure,
    "memory": memory.measure,
    "limits": limits.measure,
}
BESIDE_PYTORCH = ("augmentation", "step", "linear")  # measurements that share a GPU with PyTorch
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
BUSY = 0.5  # load average of the last minute above which the machine counts as busy


def measured(
    names: Sequence[str],
    work: Workload,
    seconds: float = SECONDS,
    until: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[str, list[Row]]]:
    """Yields the name and the rows of every measurement, and prints the rows.

    A measurement that fails or exceeds `seconds` becomes one row with the reason. Every measurement
    runs in a separate process with the whole device. This process never uses the device, which on
    TPUs would block the others.

    Args:
      names: the measurements.
      work: their workload.
      seconds: time limit per measurement.
      until: time of the clock at which this call ends. A measurement that it cuts off yields
        nothing, unless it was the first: in a call as long as this one it would never end.
      clock: returns the time in seconds.
    """
    for number, name in enumerate(names):
        left = until - clock()
        if number and left <= 0:
            return
        LOG.info("measuring %s", name)
        # Beside PyTorch, JAX must not preallocate most of the accelerator's memory.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = str(name not in BESIDE_PYTORCH).lower()
        try:
            rows = run_isolated(MEASUREMENTS[name], work, seconds=min(seconds, left))
        except RuntimeError as error:
            if number and clock() >= until:
                return
            rows = [Row(name, "all of it", "", note=str(error), failed=True)]
        print_rows(rows)
        yield name, rows


def print_header(measured_on: dict) -> None:
    """Prints the machine, the versions and the workload."""
    machine, settings = measured_on["about"], measured_on["workload"]
    print(f"{machine['device']} × {machine['devices']}, {machine['cpus']} CPUs")
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(", ".join(f"{name}={value}" for name, value in settings.items()))
    print(f"{'':75} {'median':>10} {'':17} {'least–most':>16}  × ours/theirs", flush=True)


def print_rows(rows: Sequence[Row]) -> None:
    """Prints a measurement's rows: median, range, and the ratio ours/theirs with its range."""
    for row in rows:
        text = f"{row.measurement:20} {row.name:54}"
        if row.values:
            spread = f"{min(row.values):.4g}–{max(row.values):.4g}"
            text += f" {row.median:10.4g} {row.unit:17} {spread:>16}"
            text += f"  × {row.ratio:.3g}" if row.ratio else ""
            text += f" ({min(row.ratios):.3g}–{max(row.ratios):.3g})" if len(row.ratios) > 1 else ""
        print(f"{text} {row.note}".rstrip(), flush=True)


def about() -> dict[str, object]:
    """The machine, and the versions of the installed packages.

    Raises:
      ConfigError: JAX finds no device.
    """
    try:
        found = run_isolated(devices)
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
        "cpus": usable_cpus(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write(path: Path, measured_on: dict, found: Mapping[str, Sequence[Row]]) -> None:
    """Writes all results as JSON."""
    entries = [
        {"of": name, **dataclasses.asdict(row), "ratio": row.ratio}
        for name, rows in found.items()
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**measured_on, "rows": entries}, indent=1, ensure_ascii=False)
    write_whole(path, f"{content}\n".encode())


def earlier(path: Path, measured_on: dict) -> dict[str, list[Row]]:
    """The rows that earlier calls wrote, by measurement; empty without a file.

    Raises:
      ConfigError: the file holds another machine's results, or another workload's, or was written
        when rows did not name their measurement.
    """
    written = kept_json(path, {"about": dict, "workload": dict, "rows": list})
    if not written:
        return {}
    for name in ("about", "workload"):
        now = json.loads(json.dumps(measured_on[name]))
        if different := [key for key in now if written[name].get(key) != now[key]]:
            key = different[0]
            raise ConfigError(
                f"to={path} was measured with {key}={written[name].get(key)}; this call has "
                f"{key}={now[key]}; use another file"
            )
    found: dict[str, list[Row]] = {}
    fields = [field.name for field in dataclasses.fields(Row)]
    for entry in written["rows"]:
        if lacking := [name for name in ("of", *fields) if name not in entry]:
            raise ConfigError(
                f"to={path} has rows without {lacking[0]!r}, of an earlier version of this "
                "command; use another file"
            )
        values = {name: entry[name] for name in fields}
        values |= {name: tuple(values[name]) for name in ("values", "ratios")}
        found.setdefault(entry["of"], []).append(Row(**values))
    return found


def to_measure(names: Sequence[str], found: Mapping[str, Sequence[Row]]) -> list[str]:
    """The measurements that a call begins: those without rows, then those of which a row failed.

    What fails for good then takes no time from the others.
    """
    failed = [name for name in names if any(row.failed for row in found.get(name, ()))]
    return [name for name in names if name not in found] + failed


def chosen_workload(flag_values: flags.FlagValues, platform: str) -> Workload:
    """The workload that suits a platform, with the values of the flags.

    Raises:
      ConfigError: an invalid value.
    """
    default = workload_for(platform)
    given = {
        name: getattr(flag_values, name)
        for name in ("encoder", "size", "batch", "dtype", "views_size", "views_batch", "canvas",
                     "steps", "rounds")
        if getattr(flag_values, name) is not None
    }  # fmt: skip
    work = dataclasses.replace(default, **given)
    try:
        check_at_least("batch", work.batch, 2)
        check_at_least("views_batch", work.views_batch, 2)
        check_at_least("steps", work.steps, 1)
        check_at_least("rounds", work.rounds, 1)
        check_at_least("size", work.size, 1)
        check_at_least("canvas", work.canvas, work.views_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_one_of("encoder", work.encoder, ("resnet18", "resnet34", "resnet50"))
    check_one_of("dtype", work.dtype, ("float32", "bfloat16"))
    return work


def _files(
    names: Sequence[str], data: str, work: Workload, folder: Path
) -> tuple[tuple[Path, ...], str]:
    """The JPEGs to read, drawn into a folder if `data` is empty, and their description."""
    if not {"input", "prepared", "run"} & set(names):
        return (), "none"
    if data:
        files = jpegs_in(Path(data).expanduser())
        return files, f"{len(files)} in {data}"
    files = draw_jpegs(folder, max(DRAWN_JPEGS, 2 * work.views_batch, work.batch))
    return files, f"{len(files)} rendered scenes, 500 × 375; --data selects other files"


if __name__ == "__main__":
    only_flag = flags.DEFINE_list("only", list(MEASUREMENTS), "Measurements to run.")
    data_flag = flags.DEFINE_string("data", "", "Folder of JPEGs; rendered images if empty.")
    to_flag = flags.DEFINE_string("to", "", "JSON file for the results.")
    seconds_flag = flags.DEFINE_float("seconds", SECONDS, "Time limit per measurement.", 1.0)
    call_flag = flags.DEFINE_float(
        "call_minutes", 0, "Time after which this call ends with 75; the same command continues.", 0
    )
    for number in ("size", "batch", "views_size", "views_batch", "canvas", "steps", "rounds"):
        flags.DEFINE_integer(number, None, f"{number} of the workload; see benchmarks/workload.py.")
    for text in ("encoder", "dtype"):
        flags.DEFINE_string(text, None, f"{text} of the workload; see benchmarks/workload.py.")

    def main() -> None:
        """Runs the measurements of the flags."""
        until = time.monotonic() + (60 * call_flag.value or math.inf)
        for name in only_flag.value:
            check_one_of("only", name, MEASUREMENTS)
        if call_flag.value and not to_flag.value:
            raise ConfigError("call_minutes continues the file of --to, which is missing")
        to = Path(to_flag.value).expanduser()
        machine = about()
        work = chosen_workload(flags.FLAGS, machine["platform"])
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            # Measurements share their compiled programs.
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder, "compiled")))
            files, jpegs = _files(only_flag.value, data_flag.value, work, Path(folder))
            settings = {**vars(work), "jpegs": jpegs}
            measured_on = {"about": machine, "load": load, "workload": settings}
            found = earlier(to, measured_on) if call_flag.value else {}
            left = to_measure(only_flag.value, found)
            print_header(measured_on)
            if load > BUSY:
                LOG.warning("load average %.1f: the machine is busy, ratios are unreliable", load)
            work = dataclasses.replace(work, jpegs=files)
            for name, rows in measured(tuple(left), work, seconds_flag.value, until):
                found[name] = rows
                left.remove(name)
                if to_flag.value:
                    write(to, measured_on, found)
        if left:
            raise command.Stop(
                f"{', '.join(left)} not measured yet; the same command continues",
                command.EXIT_PREEMPTED,
            )
        if any(row.failed for rows in found.values() for row in rows):
            sys.exit(1)

    command.run(main)
