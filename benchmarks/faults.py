"""Repeats the faults of docs/storage.md on a tiny run, and kills it at random moments.

python -m benchmarks.faults --repetitions=20 --kills=10

Each fault happens once, then each a second time, and so on, until `--minutes` have passed.
After each fault the same command continues. Nothing is lost where the last weights are those of an
undisturbed run to the bit, the metrics have each step once, and no half-written checkpoint stays.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "")

import contextlib
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from pytest import MonkeyPatch

from benchmarks.injected import FAULTS, ONE_FILE, Case, Fault
from cassle_jax import command
from cassle_jax.models import ENCODERS
from cassle_jax.pretrain import pretrain_command
from cassle_jax.training import checkpoints, loop
from cassle_jax.training.metrics import read_lines
from tests.shared_programs import share_programs
from tests.tiny import TinyEncoder, blank_sheet, tiny_config
from tests.training.processes import ends, saved_arrays, start

STEPS, IMAGES = 16, 32
_BEGINS = range(1, 7)  # steps at which a fault begins: some batches more have been read by then
_STOPS = range(5, STEPS)  # steps at which a run may stop: it has two checkpoints by then
_KILLED = ("steps=60", "checkpoint.every_steps=1", "log.every_steps=1")


class Repetitions:
    """Repeats faults on runs that share one folder of images, and their compiled programs.

    Args:
      folder: an empty folder.
    """

    def __init__(self, folder: Path):
        self._folder, self._images = folder, folder / "images"
        for index in range(IMAGES):
            file = self._images / "train" / "ab"[index % 2] / f"{index:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(file)
        self._expected = {False: self._undisturbed("whole")}
        damaged = sorted((self._images / "train" / "a").iterdir())[ONE_FILE]
        content = damaged.read_bytes()
        damaged.write_bytes(b"")
        self._expected[True] = self._undisturbed("damaged")
        damaged.write_bytes(content)

    def lost(self, fault: Fault) -> str:
        """Lets a fault happen once; what was lost, or how it ended wrongly, or ''."""
        workdir = self._folder / "run"
        shutil.rmtree(workdir, ignore_errors=True)
        if fault.begun and (code := self._stopped(workdir)) != command.EXIT_PREEMPTED:
            return f"exit code {code} of SIGTERM"
        with MonkeyPatch.context() as patch:
            case = Case(self._config(), self._images, workdir, patch, random.choice(_BEGINS))
            context = fault.inject(case)
            with context if hasattr(context, "__enter__") else contextlib.nullcontext():
                code = ended(case.config, workdir)
        if code not in fault.codes:
            return f"exit code {code}"
        if not fault.continues:
            return ""
        if code and (code := ended(self._config(), workdir)):
            return f"exit code {code} of the same command"
        return differs(workdir, self._expected[fault.damages], metrics=not fault.forgets)

    def _stopped(self, workdir: Path) -> int:
        with MonkeyPatch.context() as patch:
            case = Case(self._config(), self._images, workdir, patch, random.choice(_STOPS))
            case.at_step(lambda: signal.raise_signal(signal.SIGTERM))
            return ended(case.config, workdir)

    def _undisturbed(self, name: str) -> Path:
        code = ended(self._config(), self._folder / name)
        if code:
            raise RuntimeError(f"the undisturbed run ended with {code}")
        return self._folder / name

    def _config(self) -> ConfigDict:
        config = tiny_config("method=simclr")
        config.steps = STEPS
        config.update_from_flattened_dict({"log.every_steps": 1, "checkpoint.every_steps": 4})
        config.data.update({"source": "folder", "path": str(self._images), "on_device": "never"})
        config.data.update({"cache_gib": 0.0, "max_bad_fraction": 0.5})
        return config


def ended(config: ConfigDict, workdir: Path) -> int:
    """The exit code of a run."""
    try:
        pretrain_command(config, workdir)
    except command.Stop as stop:
        return stop.code
    except Exception as error:
        print(repr(error), file=sys.stderr)
        return command.code_of(error) or 1
    return 0


def differs(workdir: Path, expected: Path, *, metrics: bool = True) -> str:
    """What a run lacks of an undisturbed one; '' where it lacks nothing."""
    found, whole = saved_arrays(workdir), saved_arrays(expected)
    if found.keys() != whole.keys() or not all(map(np.array_equal, found.values(), whole.values())):
        return "other weights"
    steps, known = (
        [line["step"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
        for folder in (workdir, expected)
    )
    if metrics and steps != known:
        return f"metrics of the steps {steps}"
    return "half a checkpoint" if list((workdir / "checkpoints").glob("*tmp*")) else ""


def killed(folder: Path, kills: int) -> list[str]:
    """Kills a run, and the ones that continue it, at random moments; what each life lost."""
    began = time.monotonic()
    codes, errors = ends(start(folder / "undisturbed", 1, *_KILLED))
    seconds = time.monotonic() - began
    if codes != [0]:
        raise RuntimeError(f"the undisturbed run ended with {codes}: {errors}")
    found = []
    while len(found) < kills:
        (process,) = start(folder / "killed", 1, *_KILLED)
        time.sleep(random.uniform(0.3, 1.0) * seconds)
        if process.poll() is not None:  # it was done before: kill another one
            found += ends([process])[1] if process.returncode else []
            shutil.move(folder / "killed", folder / f"killed-{time.monotonic_ns()}")
            continue
        process.kill()
        ends([process])
        found.append("")
    codes, errors = ends(start(folder / "killed", 1, *_KILLED))
    lost = f"exit code {codes[0]}: {errors}" if codes[0] else ""
    return [*found[:-1], lost or differs(folder / "killed", folder / "undisturbed")]


def _row(name: str, lost: list[str]) -> str:
    good = sum(not each for each in lost)
    what = "; ".join(sorted({each for each in lost if each})) or "–"
    return f"| {name} | {good} of {len(lost)} | {what} |"


def main(repetitions: int, kills: int, minutes: float) -> None:
    """Repeats, and prints the table."""
    logging.getLogger("cassle_jax").setLevel(logging.CRITICAL)
    until = time.monotonic() + (60 * minutes or float("inf"))
    lost: dict[str, list[str]] = {fault.name: [] for fault in FAULTS}
    with tempfile.TemporaryDirectory() as name, MonkeyPatch.context() as patch:
        share_programs(patch)
        patch.setitem(ENCODERS, "tiny", TinyEncoder)
        patch.setenv("CASSLE_STORAGE_SECONDS", "0.2")
        patch.setattr(loop, "write_contact_sheet", blank_sheet)
        patch.setattr(loop, "LAST_SAVE_SECONDS", 0.2)
        patch.setattr(checkpoints, "RETRY_SECONDS", 0.1)
        runs = Repetitions(Path(name))
        for repetition in range(repetitions):
            for fault in FAULTS if time.monotonic() < until else ():
                lost[fault.name].append(runs.lost(fault))
                print(repetition, fault.name, lost[fault.name][-1], file=sys.stderr, flush=True)
        if kills:
            lost["kill -9 at a random moment"] = killed(Path(name), kills)
    print("| fault | nothing lost | what was |\n|---|---:|---|")
    print("\n".join(_row(name, each) for name, each in lost.items() if each))


if __name__ == "__main__":
    repetitions_flag = flags.DEFINE_integer("repetitions", 20, "Repetitions per fault.", 0)
    kills_flag = flags.DEFINE_integer("kills", 10, "Kills at random moments.", 0)
    minutes_flag = flags.DEFINE_float(
        "minutes", 0.0, "Minutes after which no repetition begins; 0: no limit.", 0.0
    )
    command.run(lambda: main(repetitions_flag.value, kills_flag.value, minutes_flag.value))
