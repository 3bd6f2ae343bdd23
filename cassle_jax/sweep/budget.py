"""Plans the number of steps per run of a table from a time budget and measured step times."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

from cassle_jax.checks import ConfigError
from cassle_jax.faults import Outage
from cassle_jax.report.overview import group_of
from cassle_jax.storage import kept_json, write_surely
from cassle_jax.sweep.jobs import OUTCOME
from cassle_jax.sweep.space import RunSpec
from cassle_jax.training.metrics import read_metrics

PLAN, MEASURED = "plan.json", "measured"
# Settings of a measured run. It logs twice; the second half is the measurement.
MEASURED_RUN = {"steps": 40, "log.every_steps": 20, "optimizer.warmup_epochs": 0}

_FEWEST_STEPS = 10
# Share of a budget that stays unplanned, for restarts that compile again and repeat a few steps.
_RESERVE = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length of the runs with which all of them end within the budget.

    Attributes:
      minutes: the budget.
      steps: number of steps per run.
      seconds: measured seconds per step, by group of rows.
      overhead: measured seconds per run for compilation and evaluation.
    """

    minutes: float
    steps: int
    seconds: dict[str, float]
    overhead: float


def read_plan(folder: Path, minutes: float) -> Plan | None:
    """Reads the plan in a table's folder; returns `None` without one, or where it is damaged.

    Args:
      folder: the table's folder.
      minutes: the requested budget; 0 accepts the plan's own.

    Raises:
      ConfigError: the plan was made for another budget.
    """
    path = folder / PLAN
    known = {"minutes": Real, "steps": int, "seconds": {str: Real}, "overhead": Real}
    content = kept_json(path, known)
    if content is None or content["steps"] < _FEWEST_STEPS:
        return None
    plan = Plan(*(content[name] for name in known))
    if minutes not in (0, plan.minutes):
        raise ConfigError(
            f"minutes={minutes:g} was {plan.minutes:g} when {folder} was created, and the length "
            "of its runs follows from that; use the same value, or another folder (--to)"
        )
    return plan


def _pace_of(subject: str) -> str:
    """The base method's name: the steps of its rows take about the same time."""
    return group_of(subject) or subject


def runs_to_measure(runs: Sequence[RunSpec], parallel: int) -> list[RunSpec]:
    """The runs to measure: the last per group, repeated to fill `parallel` processes."""
    last = list({_pace_of(run.subject): run for run in runs}.values())
    return [
        dataclasses.replace(last[i % len(last)], name=f"{last[i % len(last)].name}.{i}")
        for i in range(max(len(last), parallel))
    ]


def measured_in(workdir: Path) -> tuple[float, float] | None:
    """Images per second, and seconds in all, of a measured run; `None` where its files are damaged.

    Args:
      workdir: workdir of the run.
    """
    speeds = read_metrics(workdir).get("images_per_second", [])
    outcome = kept_json(workdir / OUTCOME, {"exit_code": int, "seconds": Real})
    if not speeds or outcome is None or outcome["exit_code"]:
        return None
    found = float(speeds[-1][1]), float(outcome["seconds"])
    return found if all(math.isfinite(each) and each > 0 for each in found) else None


def make_plan(
    folder: Path,
    minutes: float,
    runs: Sequence[RunSpec],
    measured: Mapping[Path, RunSpec],
    parallel: int,
) -> Plan:
    """Plans the runs from the measured ones and saves the plan.

    Args:
      folder: the table's folder.
      minutes: the budget.
      runs: all runs of the table.
      measured: the runs of `runs_to_measure`, by workdir.
      parallel: number of runs at a time.

    Raises:
      ConfigError: the budget is too short.
      Outage: a run's measurement could not be written.
    """
    seconds, overhead, spent = {}, 0.0, 0.0
    for workdir, run in measured.items():
        if (found := measured_in(workdir)) is None:
            raise Outage(f"{workdir} lacks its measurement; the same command measures again")
        step_seconds, took = run.config.batch_size / found[0], found[1]
        group = _pace_of(run.subject)
        seconds[group] = max(step_seconds, seconds.get(group, 0.0))
        overhead = max(overhead, took - MEASURED_RUN["steps"] * step_seconds)
        spent += took / parallel
    step_seconds_of_all = sum(seconds[_pace_of(run.subject)] for run in runs)
    steps = steps_within(minutes, spent, len(runs), overhead, step_seconds_of_all, parallel)
    plan = Plan(minutes, steps, seconds, overhead)
    write_surely(folder / PLAN, json.dumps(dataclasses.asdict(plan), indent=1))
    return plan


def steps_within(
    minutes: float,
    spent: float,
    runs: int,
    overhead: float,
    step_seconds_of_all: float,
    parallel: int,
) -> int:
    """The number of steps per run that fits a budget.

    Args:
      minutes: the budget.
      spent: seconds of the budget already used.
      runs: number of runs.
      overhead: seconds per run outside its steps.
      step_seconds_of_all: seconds per step, summed over the runs.
      parallel: number of runs at a time.

    Raises:
      ConfigError: the budget is too short; the message gives the minutes that suffice.
    """
    fixed = spent + runs * overhead / parallel
    step_seconds = step_seconds_of_all / parallel
    steps = int((60 * minutes * (1 - _RESERVE) - fixed) / step_seconds)
    if steps < _FEWEST_STEPS:
        needed = (fixed + _FEWEST_STEPS * step_seconds) / 60 / (1 - _RESERVE)
        raise ConfigError(
            f"minutes={minutes:g} is too short for {runs} runs, {parallel} at a time; one run "
            f"takes {overhead:.0f} s to compile and evaluate; use {needed + 0.5:.0f} or more"
        )
    return steps
