r"""Runs a named experiment, a table of rows and seeds, and writes what its runs add up to.

python -m cassle_jax.tables --table=small_images --to=runs/small_images --parallel=2 \
    --set=data.path=/data/cifar10 --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10

A table is a file in configs/tables/, or any other of its kind. Its runs go on where an earlier call
of the same folder ended, also on another machine; `--call_minutes` ends a call in time.
"""

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from absl import flags
from ml_collections import ConfigDict

from cassle_jax import command
from cassle_jax.checks import check_at_least, check_positive
from cassle_jax.config import ConfigError, knows
from cassle_jax.data import open_source
from cassle_jax.evaluate import check_names, open_evaluated
from cassle_jax.evaluation.tasks import Settings
from cassle_jax.interop.formats import FORMATS
from cassle_jax.report.evaluation_page import JSON, read_report
from cassle_jax.storage import write_whole
from cassle_jax.sweep.budget import (
    MEASURED,
    MEASURED_RUN,
    Plan,
    make_plan,
    read_plan,
    to_measure,
)
from cassle_jax.sweep.cost import RATE, cost_table, images_of
from cassle_jax.sweep.crew import Crew
from cassle_jax.sweep.jobs import LOG_FILE, outcome_of
from cassle_jax.sweep.page import pretraining_findings
from cassle_jax.sweep.results import write_results
from cassle_jax.sweep.space import Run
from cassle_jax.sweep.table import (
    TOY_EVALUATION,
    Table,
    changed,
    find_table,
    folder_of,
    pairs,
    planned,
    runs_of_table,
)
from cassle_jax.sweep.worker import RESULT, Evaluation, Job
from cassle_jax.training.saved_config import changes, holds_run, read_config

LOG = logging.getLogger("cassle_jax.tables")  # its name as a command is __main__

HELD = "table.json"
_PAGE_SECONDS = 10.0
_GOES_ON = "the call ends here; the same one goes on"


def run_table(
    table: Table,
    to: Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    datasets: Sequence[str] = (),
    data_dir: str = "",
    evaluation: Sequence[str] = (),
    weights_of: Sequence[str] = (),
    parallel: int = 1,
    minutes: float = 0.0,
    call_minutes: float = 0.0,
    keep_weights: bool = False,
    toy: bool = False,
) -> Path:
    """Runs what is missing of a table, and writes the page of all that finished.

    The folder holds `runs/<row>-<seed>/`, the runs' workdirs, each with `log.txt`, `outcome.json`
    and `evaluation/`; `results.json`, `results.csv` and `report.html`; and `compiled/`.

    Args:
      table: the experiment.
      to: folder of everything; with what an earlier call left in it.
      rows: parts of subjects: those rows alone; empty for all.
      seeds: instead of the table's.
      overrides: of all runs, `name=value` each.
      datasets: to evaluate on instead of the table's.
      data_dir: of tensorflow-datasets, for evaluation.
      evaluation: further options of the evaluation, `name=value` each.
      weights_of: folders of other tables; of a finished run there that has a run's settings and
        kept its weights, these are taken instead of pretraining anew.
      parallel: how many runs at a time.
      minutes: for all runs together, from which their number of steps follows when the folder is
        new, at most their own; 0 for their own.
      call_minutes: after which this call saves and ends; 0 for never.
      keep_weights: whether checkpoints stay when a run is evaluated.
      toy: at a size that takes seconds, on scenes.

    Returns:
      The path of the page.

    Raises:
      ConfigError, DataError: what cannot work, before anything starts.
      Stop: the call's time is over (75, the same call goes on), or some runs failed (1).
    """
    check_at_least(1, parallel=parallel)
    check_at_least(0, call_minutes=call_minutes, minutes=minutes)
    to = to.expanduser().resolve()

    def expanded(*more: str) -> list[Run]:
        own = (f"compilation_cache={to / 'compiled'}", *overrides, *more)
        runs = runs_of_table(table, rows=rows, seeds=seeds, overrides=own, toy=toy)
        return [run for run, _ in _planned(runs, _opened)]

    runs = expanded()
    wanted = evaluation_of(table, datasets=datasets, data_dir=data_dir, options=evaluation, toy=toy)
    book = _Book(to, table, wanted)
    call = _Call(parallel, time.monotonic() + 60 * call_minutes if call_minutes else math.inf)
    plan = read_plan(to, minutes)
    if minutes and not plan:
        plan = _measured(to, minutes, runs, wanted, call, toy)
    if plan:
        runs = expanded(f"steps={min([plan.steps, *(run.config.steps for run in runs)])}")
    missing = [run for run in runs if book.is_missing(run)]
    LOG.info("%d runs, of which %d are done", len(runs), len(runs) - len(missing))
    others = [Path(each).expanduser().resolve() for each in weights_of]
    jobs = [
        Job(
            run.subject,
            run.arguments,
            book.workdir(run.name),
            wanted,
            keep_weights,
            table.export,
            _same_run(run, others),
            toy,
        )
        for run in missing
    ]
    all_done = call.work(jobs, book.ended)
    page = book.write_page()
    if not all_done:
        raise command.Stop(_GOES_ON, command.EXIT_PREEMPTED)
    if failed := [run.name for run in runs if book.outcome(run.name) != 0]:
        raise command.Stop(f"{len(failed)} of {len(runs)} runs failed; {book.why(failed[0])}", 1)
    LOG.info("the page is %s", page)
    return page


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of the command.

    Attributes:
      parallel: how many runs at a time.
      until: when it ends, on `time.monotonic`'s clock.
    """

    parallel: int
    until: float

    def work(self, jobs: Sequence[Job], ended: Callable[[Job, int], None]) -> bool:
        """Whether all of these ended within this call."""
        left = 0.0 if self.until == math.inf else max(1.0, self.until - time.monotonic())
        return not jobs or Crew(self.parallel, left).run(jobs, ended)


def _measured(
    to: Path, minutes: float, runs: Sequence[Run], evaluation: Evaluation, call: _Call, toy: bool
) -> Plan:
    """Measures a step of every group of rows, and one evaluation; keeps the plan they give."""
    chosen = {to / MEASURED / run.name: run for run in to_measure(runs, call.parallel)}
    jobs = []
    for workdir, run in chosen.items():
        short = changed(run, MEASURED_RUN)
        its = Evaluation() if jobs else evaluation
        jobs.append(Job(run.subject, short.arguments, workdir, its, False, toy=toy))
    missing = [job for job in jobs if (outcome_of(job.workdir) or {}).get("exit_code") != 0]

    def ended(job: Job, code: int) -> None:
        LOG.info("%s: measured", job.workdir.name)
        if code:
            reason = outcome_of(job.workdir)["last_line"]
            raise command.Stop(f"{job.subject} failed when measured: {reason}", code)

    if not call.work(missing, ended):
        raise command.Stop(_GOES_ON, command.EXIT_PREEMPTED)
    plan = make_plan(to, minutes, runs, chosen, call.parallel)
    shutil.rmtree(to / MEASURED)
    return plan


class _Book:
    """How the runs in a table's folder stand.

    Raises:
      ConfigError: the folder is another table's, or its runs were evaluated otherwise.
    """

    def __init__(self, folder: Path, table: Table, evaluation: Evaluation):
        self._folder, self._table = folder, table
        self._written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        facts = json.loads(json.dumps({"table": table.title, **_facts(evaluation)}))
        path = folder / HELD
        held = json.loads(path.read_text()) if path.exists() else facts
        for name, value in facts.items():
            if held.get(name) != value:
                raise ConfigError(
                    f"{name}={value!r} was {held.get(name)!r} when {folder} was begun; use the "
                    "same, or another folder (--to)"
                )
        write_whole(path, json.dumps(facts, indent=1).encode())

    def workdir(self, name: str) -> Path:
        return self._folder / "runs" / name

    def outcome(self, name: str) -> int | None:
        """The exit code of a run; `None` where it has not ended."""
        outcome = outcome_of(self.workdir(name))
        return None if outcome is None else int(outcome["exit_code"])

    def is_missing(self, run: Run) -> bool:
        """Whether a run is to be run; one that diverged would do so again.

        Raises:
          ConfigError: it was run with other settings.
        """
        workdir = self.workdir(run.name)
        if self.outcome(run.name) not in (0, command.EXIT_DIVERGED):
            return True
        if differing := changes(read_config(workdir), run.config):
            raise ConfigError(
                f"{workdir} holds a run with other settings ({'; '.join(differing.values())}); use "
                "another folder (--to), or the settings it had"
            )
        return False

    def why(self, name: str) -> str:
        """A line on how a run failed."""
        outcome = outcome_of(self.workdir(name)) or {"last_line": "it did not end"}
        return f"{name}: {outcome['last_line']} (see {self.workdir(name) / LOG_FILE})"

    def ended(self, job: Job, code: int) -> None:
        """Tells of a run that ended, and writes the page now and then."""
        name = job.workdir.name
        outcome = outcome_of(job.workdir) or {}
        LOG.info("%s", self.why(name) if code else f"{name}: done in {outcome['seconds']:.0f} s")
        if time.monotonic() - self._written > _PAGE_SECONDS:
            self.write_page()

    def write_page(self) -> Path | None:
        """Of all that finished, also of earlier calls; `None` where nothing did."""
        found, facts, states, steps = {}, {}, [], set()
        for row in self._table.rows:
            for seed in self._seeds(row.subject):
                name = folder_of(row.subject, seed)
                outcome = outcome_of(self.workdir(name)) or {"exit_code": None, "last_line": ""}
                states.append({"run": name, "row": row.subject, "seed": seed, **outcome})
                if outcome["exit_code"] == 0:
                    config = read_config(self.workdir(name))
                    findings, known = self._findings(row.subject, config, self.workdir(name))
                    found.setdefault(row.subject, {})[seed] = findings
                    facts.setdefault(row.subject, known)
                    steps.add(config.steps)
        self._written = time.monotonic()
        if not found:
            return None
        lengths = " to ".join(map(str, sorted({min(steps), max(steps)})))
        note = f"Each run is pretrained for {lengths} steps."
        return write_results(self._folder, self._table, found, facts, states, note)

    def _seeds(self, subject: str) -> list[int]:
        """Those that a row has runs of."""
        prefix = folder_of(subject, 0)[:-1]
        names = (each.name for each in (self._folder / "runs").glob("*"))
        ends = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return sorted(int(end) for end in ends if end.isdecimal())

    def _findings(self, subject: str, config: ConfigDict, workdir: Path):
        findings, facts = pretraining_findings(config, workdir), {}
        report = workdir / RESULT / JSON
        if report.exists():
            its, known = read_report(report)
            findings, facts = [*findings, *its[subject][0]], known.get(subject, {})
        return findings, facts


def _planned(runs: Sequence[Run], count: Callable[[ConfigDict], int]) -> list[tuple[Run, int]]:
    """The runs as they are run, each with the number of its training images."""
    images: dict[str, int] = {}
    plans = []
    for run in runs:
        key = json.dumps(run.config.data.to_dict(), sort_keys=True, default=str)
        if key not in images:
            images[key] = count(run.config)
        plans.append((planned(run, images[key]), images[key]))
    return plans


def _opened(config: ConfigDict) -> int:
    return len(open_source(config.data, config.data.train_split))


def dry_run(
    table: Table,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    toy: bool = False,
    rate: float = RATE,
) -> str:
    """What a table would run, and what that would cost; see `run_table` and `cost_table`."""
    check_positive(rate=rate)
    runs = runs_of_table(table, rows=rows, seeds=seeds, overrides=overrides, toy=toy)
    plans = _planned(runs, images_of)
    return cost_table([run for run, _ in plans], [images for _, images in plans], rate)


def _same_run(run: Run, folders: Sequence[Path]) -> Path | None:
    """Where a finished run with the same settings kept its weights; `None` where none did.

    Raises:
      ConfigError: a folder that holds no runs.
    """
    for folder in folders:
        if not (folder / "runs").is_dir():
            raise ConfigError(f"weights_of={folder} holds no runs; give the folder of a table")
        for workdir in sorted((folder / "runs").iterdir()):
            finished = (outcome_of(workdir) or {}).get("exit_code") == 0
            if finished and holds_run(workdir) and not changes(read_config(workdir), run.config):
                return workdir
    return None


def evaluation_of(
    table: Table,
    *,
    datasets: Sequence[str] = (),
    tasks: Sequence[str] = (),
    data_dir: str = "",
    options: Sequence[str] = (),
    toy: bool = False,
) -> Evaluation:
    """How a table's runs are evaluated; its datasets are looked for.

    Args:
      table: the experiment.
      datasets: instead of the table's.
      tasks: instead of the table's.
      data_dir: of tensorflow-datasets.
      options: further ones, `name=value` each.
      toy: whether on scenes, a few of them.

    Raises:
      ConfigError, DataError: a name that is unknown, a value that cannot be, or a dataset that is
        not there.
    """
    chosen, tasks = tuple(datasets) or table.datasets, tuple(tasks) or table.tasks
    if toy:
        chosen = ("scenes",) if chosen else ()
    check_names(chosen, tasks)
    for each in chosen:
        open_evaluated(each, data_dir)
    for each in table.export:
        knows("export", each, FORMATS)
    values = pairs((*table.evaluation, *(TOY_EVALUATION if toy else ()), *options))
    own = {"limit": int, "network": str, "batch": int}
    kinds = own | get_type_hints(Settings)
    for name in values:
        knows("evaluation", name, kinds)
    read = {name: _value(name, value, kinds[name]) for name, value in values.items()}
    settings = Settings(**{name: value for name, value in read.items() if name not in own})
    others = {name: value for name, value in read.items() if name in own}
    return Evaluation(chosen, tasks, data_dir, settings=settings, **others)


def _value(name: str, text: str, kind: Any) -> Any:
    try:
        if members := get_args(kind):
            return tuple(members[0](each) for each in text.split(","))
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"evaluation {name}={text!r} cannot be: {error}") from error


def _facts(evaluation: Evaluation) -> dict[str, object]:
    """What decides the figures of an evaluation; not where its images lie."""
    facts = dataclasses.asdict(evaluation)
    settings = facts.pop("settings")
    del facts["data_dir"]
    names = [
        each if each.startswith("folder:") else each.partition("=")[0]
        for each in evaluation.datasets
    ]
    return {**facts, **settings, "datasets": names}


def _numbers(name: str, texts: Sequence[str]) -> list[int]:
    try:
        return [int(each) for each in texts]
    except ValueError as error:
        raise ConfigError(f"{name}={','.join(texts)} is no list of whole numbers") from error


if __name__ == "__main__":
    table_flag = flags.DEFINE_string("table", None, "Name in configs/tables/, or path of a file.")
    to_flag = flags.DEFINE_string("to", "", "Folder of everything; runs/<table>.")
    seeds_flag = flags.DEFINE_list("seeds", [], "Instead of the table's.")
    rows_flag = flags.DEFINE_list("rows", [], "Parts of subjects: those rows alone.")
    parallel_flag = flags.DEFINE_integer("parallel", 1, "How many runs at a time.")
    minutes_flag = flags.DEFINE_float(
        "minutes", 0, "For all runs together; sets their length. 0: as long as the table says."
    )
    call_flag = flags.DEFINE_float(
        "call_minutes", 0, "After which this call saves and ends; 0: when all is done."
    )
    set_flag = flags.DEFINE_multi_string("set", [], "Of all runs: name=value; repeatable.")
    datasets_flag = flags.DEFINE_list(
        "datasets", [], "To evaluate on instead of the table's: name, or name=folder."
    )
    data_dir_flag = flags.DEFINE_string("data_dir", "", "Of tensorflow-datasets, to evaluate on.")
    others_flag = flags.DEFINE_list(
        "weights_of", [], "Folders of tables: runs there that are the same lend their weights."
    )
    evaluation_flag = flags.DEFINE_multi_string(
        "evaluation", [], "Of the evaluation: name=value, such as limit=1000; repeatable."
    )
    weights_flag = flags.DEFINE_boolean("keep_weights", False, "Keep the checkpoints.")
    toy_flag = flags.DEFINE_boolean("toy", False, "At a size that takes seconds, on scenes.")
    dry_flag = flags.DEFINE_boolean("dry_run", False, "Print runs, steps and GPU hours alone.")
    rate_flag = flags.DEFINE_float(
        "rate", RATE, "For --dry_run: images/s of a ResNet-50 at 224 px with MoCo-v2."
    )
    flags.mark_flags_as_required(["table"])

    def main() -> None:
        """Runs the table that the flags name, or says what that would cost."""
        table = find_table(table_flag.value)
        which = {
            "rows": rows_flag.value,
            "seeds": _numbers("seeds", seeds_flag.value),
            "overrides": set_flag.value,
            "toy": toy_flag.value,
        }
        if dry_flag.value:
            print(dry_run(table, **which, rate=rate_flag.value))
            return
        run_table(
            table,
            Path(to_flag.value or f"runs/{Path(table_flag.value).stem}"),
            **which,
            datasets=datasets_flag.value,
            data_dir=data_dir_flag.value,
            evaluation=evaluation_flag.value,
            weights_of=others_flag.value,
            parallel=parallel_flag.value,
            minutes=minutes_flag.value,
            call_minutes=call_flag.value,
            keep_weights=weights_flag.value,
        )

    command.run(main)
