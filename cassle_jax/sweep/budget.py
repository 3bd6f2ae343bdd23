"""How long the runs of a table are where their time is given: measured, planned, and kept."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cassle_jax.config import ConfigError
from cassle_jax.storage import write_whole
from cassle_jax.sweep.jobs import outcome_of
from cassle_jax.sweep.space import Run
from cassle_jax.training.metrics import read_metrics

PLAN, MEASURED = "plan.json", "measured"
# Of a run that is measured. It logs twice, and the second half counts.
MEASURED_RUN = {"steps": 40, "log.every_steps": 20, "optimizer.warmup_epochs": 0}

_FEWEST_STEPS = 10
# Of a budget, what is not planned: machines that start anew, compile again and repeat a few steps.
_RESERVE = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long the runs are, so that all of them end within the budget.

    Attributes:
      minutes: the budget.
      steps: of every run.
      seconds: by group of rows, of a step as measured.
      overhead: seconds a run takes for compiling and for its evaluation, as measured.
    """

    minutes: float
    steps: int
    seconds: dict[str, float]
    overhead: float


def read_plan(folder: Path, minutes: float) -> Plan | None:
    """The plan that a table's folder has; `None` where it has none.

    Args:
      folder: of the table.
      minutes: the budget asked for; 0 for whatever the plan has.

    Raises:
      ConfigError: it was made for another budget.
    """
    path = folder / PLAN
    if not path.exists():
        return None
    plan = Plan(**json.loads(path.read_text()))
    if minutes not in (0, plan.minutes):
        raise ConfigError(
            f"minutes={minutes:g} was {plan.minutes:g} when {folder} was begun, and its runs are "
            "as long as that gives them; use the same, or another folder (--to)"
        )
    return plan


def group_of(subject: str) -> str:
    """What rows have in common that take about the same time: what comes before the last comma."""
    return subject.rpartition(",")[0] or subject


def to_measure(runs: Sequence[Run], parallel: int) -> list[Run]:
    """The runs that stand for all: the last of each group, and as many as run at a time."""
    last = list({group_of(run.subject): run for run in runs}.values())
    return [
        dataclasses.replace(last[i % len(last)], name=f"{last[i % len(last)].name}.{i}")
        for i in range(max(len(last), parallel))
    ]


def make_plan(
    folder: Path, minutes: float, runs: Sequence[Run], measured: Mapping[Path, Run], parallel: int
) -> Plan:
    """Keeps what follows from runs that were measured.

    Args:
      folder: of the table.
      minutes: the budget.
      runs: all of the table.
      measured: by their workdirs, those of `to_measure`.
      parallel: how many run at a time.

    Raises:
      ConfigError: the budget is too short.
    """
    seconds, overhead, spent = {}, 0.0, 0.0
    for workdir, run in measured.items():
        a_step = run.config.batch_size / read_metrics(workdir)["images_per_second"][-1][1]
        took = float(outcome_of(workdir)["seconds"])
        group = group_of(run.subject)
        seconds[group] = max(a_step, seconds.get(group, 0.0))
        overhead = max(overhead, took - MEASURED_RUN["steps"] * a_step)
        spent += took / parallel
    a_step_of_all = sum(seconds[group_of(run.subject)] for run in runs)
    steps = steps_within(minutes, spent, len(runs), overhead, a_step_of_all, parallel)
    plan = Plan(minutes, steps, seconds, overhead)
    write_whole(folder / PLAN, json.dumps(dataclasses.asdict(plan), indent=1).encode())
    return plan


def steps_within(
    minutes: float,
    spent: float,
    runs: int,
    overhead: float,
    a_step_of_all: float,
    parallel: int,
) -> int:
    """How many steps each run has.

    Args:
      minutes: the budget.
      spent: seconds of it that are gone.
      runs: how many there are.
      overhead: seconds of each that are no steps.
      a_step_of_all: seconds that one step of every run takes.
      parallel: how many run at a time.

    Raises:
      ConfigError: too few; says what would do.
    """
    fixed = spent + runs * overhead / parallel
    a_step = a_step_of_all / parallel
    steps = int((60 * minutes * (1 - _RESERVE) - fixed) / a_step)
    if steps < _FEWEST_STEPS:
        needed = (fixed + _FEWEST_STEPS * a_step) / 60 / (1 - _RESERVE)
        raise ConfigError(
            f"minutes={minutes:g} is too short for {runs} runs, {parallel} at a time, of which "
            f"each takes {overhead:.0f} s to compile and evaluate; use {needed + 0.5:.0f} or more"
        )
    return steps
