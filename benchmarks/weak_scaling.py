"""Measures weak scaling with real processes, joined over this machine's loopback.

python -m benchmarks.weak_scaling --config=configs/quickstart.py:method=moco_v2 --local_batch=128

Every process has one device, the same number of images, and one CPU; more processes than CPUs share
them. A step on a resident batch is compared with one that is fed as in training, and with that of
as many processes which exchange nothing: what they lose is the machine's.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
from functools import partial

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from benchmarks.linear_evaluation import timed
from benchmarks.scaling import collectives_in
from benchmarks.training import SYNTHETIC, from_source, inputs_of, repeated, synthetic
from benchmarks.workload import numbers_in
from cassle_jax import command
from cassle_jax.checks import check_at_least
from cassle_jax.config import FLAG_OPTIONS
from cassle_jax.data import open_source
from cassle_jax.data.pipeline import usable_cpus
from cassle_jax.distributed import all_processes
from cassle_jax.launchers import ADDRESS, COUNT, INDEX
from cassle_jax.parallel import device_mesh, on_every_device
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step


def measured(config: ConfigDict, local_batch: int, steps_per_round: int, rounds: int) -> dict:
    """Measures in this process, one of several that all call this: seconds, and what is exchanged.

    Returns:
      `step` and `fed`, the seconds per step by round, and `exchanges` and `bytes` of a step.
    """
    mesh = device_mesh()
    config.batch_size, config.optimizer.warmup_epochs = local_batch * mesh.size, 0.0
    run = build_run(config, mesh, SYNTHETIC)
    state = on_every_device(run.initial_state, mesh)
    batches = {"step": synthetic(config, mesh), "fed": from_source(config, mesh)}
    train_step = make_train_step(run, mesh).lower(state, inputs_of(next(batches["step"]))).compile()
    further = repeated(train_step, state, steps_per_round)
    for each in batches.values():
        further(each)
    seconds = {name: [] for name in batches}
    for _ in range(rounds):
        for name, each in batches.items():
            seconds[name].append(timed(partial(further, each))[0] / steps_per_round)
    collectives = collectives_in(train_step.as_text())
    return {
        **seconds,
        "exchanges": sum(each.times for each in collectives),
        "bytes": sum(each.times * each.bytes for each in collectives),
    }


def run_processes(count: int, arguments: list[str], *, joined: bool = True) -> dict:
    """Runs this module in `count` processes, and returns what the first one measured.

    Args:
      count: number of processes.
      arguments: the command's arguments.
      joined: whether they train together; else each trains alone.

    Raises:
      RuntimeError: a process failed.
    """
    cpus = sorted(os.sched_getaffinity(0))
    environment = {**os.environ, "XLA_FLAGS": "", COUNT: str(count if joined else 1)}
    if count > 1 and joined:
        environment[ADDRESS] = f"127.0.0.1:{_free_port()}"
    started = []
    with contextlib.ExitStack() as processes:
        for index in range(count):
            os.sched_setaffinity(0, {cpus[index % len(cpus)]})  # the child inherits it
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.weak_scaling", *arguments, "--joined"],
                    env={**environment, INDEX: str(index if joined else 0)},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            finally:
                os.sched_setaffinity(0, cpus)
            processes.callback(process.kill)
            started.append(process)
        said = [process.communicate()[0] for process in started]
    if failed := [process.returncode for process in started if process.returncode]:
        raise RuntimeError(f"a process ended with {failed[0]}")
    return json.loads(said[0].splitlines()[-1])


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def main() -> None:
    """Prints a Markdown table, a row per number of processes."""
    if JOINED.value:
        with all_processes():
            found = measured(CONFIG.value, LOCAL_BATCH.value, STEPS.value, ROUNDS.value)
            if jax.process_index() == 0:
                print(json.dumps(found))
        return
    counts = numbers_in("processes", PROCESSES.value)
    for name, flag in (("local_batch", LOCAL_BATCH), ("steps", STEPS), ("rounds", ROUNDS)):
        check_at_least(name, flag.value, 1)
    open_source(CONFIG.value.data, CONFIG.value.data.train_split)  # fails before processes start
    print(f"{LOCAL_BATCH.value} images per process, {usable_cpus()} CPUs\n")
    print(
        "| processes | s per step | range | efficiency | without exchanges | outside the step "
        "| exchanges | MB |"
    )
    print("|--:|--:|---|--:|--:|--:|--:|--:|")
    alone = None
    for count in counts:
        found = run_processes(count, sys.argv[1:])
        seconds = statistics.median(found["step"])
        alone = alone or seconds
        apart = seconds
        if count > 1:
            apart = statistics.median(run_processes(count, sys.argv[1:], joined=False)["step"])
        sharing = max(1, count / usable_cpus())  # of CPUs, which is no loss of scaling
        outside = statistics.median(1 - np.divide(found["step"], found["fed"]))
        print(
            f"| {count} | {seconds:.3f} | {min(found['step']):.3f}–{max(found['step']):.3f} "
            f"| {100 * alone * sharing / seconds:.0f} % | {100 * alone * sharing / apart:.0f} % "
            f"| {100 * outside:.1f} % "
            f"| {found['exchanges']} | {found['bytes'] / 1e6:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", **FLAG_OPTIONS)
    PROCESSES = flags.DEFINE_list("processes", ["1", "2", "4"], "Numbers of processes; 1 first.")
    LOCAL_BATCH = flags.DEFINE_integer("local_batch", 128, "Images per process.")
    STEPS = flags.DEFINE_integer("steps", 10, "Steps per round.")
    ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds.")
    JOINED = flags.DEFINE_boolean("joined", False, "Measure, as one of the processes.")
    command.run(main)
