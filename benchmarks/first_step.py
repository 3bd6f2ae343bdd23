"""Measures the time to the first training step, with an empty and a filled compilation cache."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from benchmarks.contest import Row
from benchmarks.workload import Workload

ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 600


def measure(work: Workload) -> list[Row]:
    """Measures the seconds from the start of the process to the first line of metrics.

    Runs `python -m cassle_jax.pretrain` with the workload's encoder, size and batch on rendered
    scenes, logs metrics after every step, and ends the process after the first line.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "compiled")
        cold = seconds_to_first_step(work, cache, Path(folder, "cold"))
        warm = tuple(
            seconds_to_first_step(work, cache, Path(folder, f"warm{number}"))
            for number in range(min(3, work.rounds))
        )
    return [
        Row("first step", "empty compilation cache", "s", (cold,)),
        Row("first step", "filled compilation cache", "s", warm),
    ]


def seconds_to_first_step(work: Workload, cache: Path, workdir: Path) -> float:
    """Starts a run and returns the seconds to its first line of metrics.

    Raises:
      RuntimeError: the process ended before its first step, or took too long.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        environment.pop(name, None)
    command = _pretraining(work, cache, workdir)
    with tempfile.TemporaryFile("w+") as output:  # a full pipe would block the process
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            _wait_for(workdir / "metrics.jsonl", process, output)
            return time.perf_counter() - start
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _pretraining(work: Workload, cache: Path, workdir: Path) -> list[str]:
    """The command that pretrains for one step."""
    settings = {
        "encoder.name": work.encoder,
        "encoder.small_images": False,  # as in the other measurements
        "augment.size": work.size,
        "batch_size": work.batch,
        "dtype": work.dtype,
        "data.source": "scenes",
        "data.name": "",
        "data.canvas": work.size,
        "data.scenes": 4 * work.batch,
        "data.on_device": "never",  # otherwise the run would first render all scenes
        "probe.every_epochs": 0,
        "log.every_steps": 1,
        "compilation_cache": cache,
        "steps": 1,
    }
    config = ROOT / "configs" / "tiny_imagenet.py"
    return [
        sys.executable, "-P", "-m", "cassle_jax.pretrain",
        f"--config={config}:method=moco_v2", f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]  # fmt: skip


def _wait_for(metrics: Path, process: subprocess.Popen, output: IO[str]) -> None:
    """Returns as soon as a file has a line; raises RuntimeError where it will have none."""
    end = time.perf_counter() + _SECONDS
    while not _has_bytes(metrics):
        if process.poll() is not None and not _has_bytes(metrics):
            output.seek(0)
            last = (output.read().splitlines() or [""])[-1]
            raise RuntimeError(f"the process ended: {last}")
        if time.perf_counter() > end:
            raise RuntimeError(f"no step after {_SECONDS} s")
        time.sleep(0.02)


def _has_bytes(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
