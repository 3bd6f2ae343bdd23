"""Compares flags of XLA by a training step's rate, and by whether it computes the same.

python -m benchmarks.xla_flags --choice=--xla_cpu_use_xnnpack=false --choice=…

Every timing is a process of its own; the choices alternate in rounds. The first row has the flags
that cassle_jax sets by itself. The step is that of `python -m benchmarks` on this device.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from unittest import mock

import jax
import numpy as np
from absl import flags

from benchmarks.contest import one_line
from benchmarks.isolated import run_isolated
from benchmarks.training import steps
from benchmarks.workload import Workload, workload_for
from cassle_jax import command
from cassle_jax.checks import check_at_least, check_one_of, check_positive
from cassle_jax.methods import METHODS

CALLS = 5


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a process measured.

    Attributes:
      rate: images/s, the median of some calls.
      metrics: the last step's metrics, which depend on the flags by rounding alone.
    """

    rate: float
    metrics: Mapping[str, float]


def trained(work: Workload, method: str) -> Trained:
    """Times steps of a method with CASSLE in this process."""
    further = steps(work.config(f"method={method},conditioning=cassle"), work)
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        metrics = further()
        seconds.append(time.perf_counter() - start)
    rate = work.steps * work.batch / statistics.median(seconds)
    return Trained(rate, {name: float(value) for name, value in metrics.items()})


def compared(
    choices: Sequence[str], work: Workload, method: str, seconds: float
) -> dict[str, list[Trained] | str]:
    """Measures every choice of flags in every round.

    Args:
      choices: values of XLA_FLAGS.
      work: the size of the step, and the number of rounds.
      method: the method to train.
      seconds: time limit per process.

    Returns:
      By choice, what its processes measured, or why one of them failed.
    """
    found: dict[str, list[Trained] | str] = {choice: [] for choice in choices}
    for number in range(work.rounds):
        first = number % len(choices)
        for choice in [*choices[first:], *choices[:first]]:
            if isinstance(found[choice], str):
                continue
            with mock.patch.dict(os.environ, XLA_FLAGS=choice):  # the process inherits it
                try:
                    found[choice].append(run_isolated(trained, work, method, seconds=seconds))
                except RuntimeError as error:
                    found[choice] = one_line(error)
    return found


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The largest relative difference of two results' metrics; NaN where one of them is NaN."""
    one, other = (np.array([metrics[name] for name in ours]) for metrics in (ours, theirs))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(one == other, 0.0, np.abs(other - one) / np.abs(one))))


def main() -> None:
    """Prints a Markdown table: medians and ranges of the rates, and of the ratios to the first."""
    check_at_least("rounds", ROUNDS.value, 1)
    check_positive("seconds", SECONDS.value)
    check_one_of("method", METHOD.value, METHODS)
    work = dataclasses.replace(workload_for(run_isolated(jax.default_backend)), rounds=ROUNDS.value)
    found = compared(["", *CHOICES.value], work, METHOD.value, SECONDS.value)
    ours = found[""]
    if isinstance(ours, str):
        raise command.Stop(f"the step fails with the flags that cassle_jax sets: {ours}", 1)
    print(f"| XLA_FLAGS, jax {jax.__version__} | images/s | range | × | metrics differ by |")
    print("|---|--:|---|--:|--:|")
    for choice, theirs in found.items():
        shown = f"`{choice}`" if choice else "as cassle_jax sets them"
        if isinstance(theirs, str):
            print(f"| {shown} | {theirs} | | | |")
            continue
        rates = [each.rate for each in theirs]
        ratios = [each.rate / own.rate for each, own in zip(theirs, ours, strict=True)]
        print(
            f"| {shown} | {statistics.median(rates):.3g} | {min(rates):.3g}–{max(rates):.3g} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) "
            f"| {difference(ours[-1].metrics, theirs[-1].metrics):.1g} |"
        )


if __name__ == "__main__":
    CHOICES = flags.DEFINE_multi_string("choice", [], "A value of XLA_FLAGS to compare.")
    METHOD = flags.DEFINE_string("method", "moco_v2", "Method of the step.")
    ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds.")
    SECONDS = flags.DEFINE_float("seconds", 600.0, "Time limit per process.")
    command.run(main)
