r"""Runs a named experiment, a table of rows and seeds, and writes its results.

python -m cassle_jax.tables --table=small_images --to=runs/small_images --parallel=2 \
    --set=data.path=/data/cifar10 --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10

A table is a Python file in configs/tables/ or elsewhere. A call resumes the runs of an earlier call
with the same folder, also on another machine; `--call_minutes` limits the length of a call.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from cassle_jax import command
from cassle_jax.checks import ConfigError, check_at_least, check_one_of, check_positive
from cassle_jax.data import DataError, open_source
from cassle_jax.evaluate import check_names, datasets_in, open_evaluated
from cassle_jax.evaluation.plan import plan
from cassle_jax.evaluation.protocols import all_settings, checked_settings, parsed_settings
from cassle_jax.interop.formats import FORMATS
from cassle_jax.report.evaluation_page import JSON, read_report
from cassle_jax.storage import kept_json, path_of, write_whole
from cassle_jax.sweep.budget import (
    MEASURED,
    MEASURED_RUN,
    Plan,
    make_plan,
    read_plan,
    runs_to_measure,
)
from cassle_jax.sweep.cost import RATE, cost_table, images_of
from cassle_jax.sweep.jobs import LOG_FILE, outcome_of
from cassle_jax.sweep.page import pretraining_findings
from cassle_jax.sweep.pool import WorkerPool
from cassle_jax.sweep.results import write_results
from cassle_jax.sweep.space import RunSpec
from cassle_jax.sweep.table import (
    TOY_EVALUATION,
    Table,
    find_table,
    folder_of,
    parse_settings,
    planned,
    runs_of_table,
    with_settings,
)
from cassle_jax.sweep.worker import RESULT, Evaluation, Job
from cassle_jax.training.saved_config import changes, holds_run, read_config

LOG = logging.getLogger("cassle_jax.tables")  # __name__ is __main__ in the command

TABLE_FILE = "table.json"
_PAGE_SECONDS = 10.0
_RESUMABLE = "the time of this call is over; rerun the same command to resume"


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
    """Executes the missing runs of a table, and writes the page of the finished ones.

    The folder holds `runs/<row>-<seed>/`, the workdirs with `log.txt`, `outcome.json` and
    `evaluation/`; `results.json`, `results.csv` and `report.html`; and `compiled/`.

    Args:
      table: the experiment.
      to: folder of all results; may hold those of an earlier call.
      rows: parts of the subjects that select rows; empty for all rows.
      seeds: seeds that replace the table's; empty for the table's.
      overrides: settings of all runs, as `name=value`.
      datasets: evaluation datasets that replace the table's; empty for the table's.
      data_dir: folder of tensorflow-datasets, for evaluation.
      evaluation: further evaluation options, as `name=value`.
      weights_of: folders of other tables; a finished run there with the same settings and kept
        weights replaces pretraining.
      parallel: number of runs at a time.
      minutes: time budget of all runs together. In a new folder it sets the number of steps, at
        most the table's; 0 for the table's.
      call_minutes: time after which this call saves and ends; 0 for no limit.
      keep_weights: whether checkpoints stay after the evaluation.
      toy: whether the runs are toy-sized, on rendered scenes; a run takes seconds.

    Returns:
      The path of the page.

    Raises:
      ConfigError, DataError: invalid settings or missing data, before any run starts.
      Stop: the call's time is over (75; the same call resumes), or some runs failed (1).
    """
    check_at_least("parallel", parallel, 1)
    check_at_least("call_minutes", call_minutes, 0)
    check_at_least("minutes", minutes, 0)
    to = Path(path_of(to)).resolve()

    def expanded(*more: str) -> list[RunSpec]:
        own = (f"compilation_cache={to / 'compiled'}", *overrides, *more)
        runs = runs_of_table(table, rows=rows, seeds=seeds, overrides=own, toy=toy)
        return [run for run, _ in _planned(runs, _opened)]

    runs = expanded()
    protocol = evaluation_of(
        table, datasets=datasets, data_dir=data_dir, options=evaluation, toy=toy
    )
    records = _RunRecords(to, table, protocol)
    pool = WorkerPool(parallel, 60 * call_minutes)
    plan = read_plan(to, minutes)
    if minutes and not plan:
        plan = _measured(to, minutes, runs, protocol, pool, toy)
    if plan:
        runs = expanded(f"steps={min([plan.steps, *(run.config.steps for run in runs)])}")
    missing = [run for run in runs if records.is_missing(run)]
    LOG.info("%d runs, %d of them done", len(runs), len(runs) - len(missing))
    others = [Path(path_of(folder)).resolve() for folder in weights_of]
    jobs = [
        Job(
            run.subject,
            run.arguments,
            records.workdir(run.name),
            protocol,
            keep_weights,
            table.export,
            _same_run(run, others),
            toy,
        )
        for run in missing
    ]
    all_done = pool.run(jobs, records.on_end)
    page = records.write_page()
    if not all_done:
        raise command.Stop(_RESUMABLE, command.EXIT_PREEMPTED)
    if failed := [run.name for run in runs if records.exit_code(run.name) != 0]:
        reason = records.failure(failed[0])
        raise command.Stop(f"{len(failed)} of {len(runs)} runs failed; {reason}", 1)
    LOG.info("wrote %s", page)
    return page


def _measured(
    to: Path,
    minutes: float,
    runs: Sequence[RunSpec],
    evaluation: Evaluation,
    pool: WorkerPool,
    toy: bool,
) -> Plan:
    """Measures a step per group of rows, and one evaluation; returns and saves the plan."""
    chosen = {to / MEASURED / run.name: run for run in runs_to_measure(runs, pool.parallel)}
    jobs = []
    for workdir, run in chosen.items():
        short = with_settings(run, MEASURED_RUN)
        protocol = Evaluation() if jobs else evaluation
        jobs.append(Job(run.subject, short.arguments, workdir, protocol, False, toy=toy))
    missing = [job for job in jobs if (outcome_of(job.workdir) or {}).get("exit_code") != 0]

    def on_end(job: Job, code: int) -> None:
        LOG.info("%s: measured", job.workdir.name)
        if code:
            reason = outcome_of(job.workdir)["last_line"]
            raise command.Stop(f"{job.subject} failed during its measurement: {reason}", code)

    if not pool.run(missing, on_end):
        raise command.Stop(_RESUMABLE, command.EXIT_PREEMPTED)
    plan = make_plan(to, minutes, runs, chosen, pool.parallel)
    shutil.rmtree(to / MEASURED)
    return plan


class _RunRecords:
    """States and results of the runs in a table's folder.

    Raises:
      ConfigError: the folder holds another table, or its runs have another evaluation.
    """

    def __init__(self, folder: Path, table: Table, evaluation: Evaluation):
        self._folder, self._table = folder, table
        self._written = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        facts = json.loads(json.dumps({"table": table.title, **_facts(evaluation)}))
        path = folder / TABLE_FILE
        saved = kept_json(path) or facts
        # What an older version did not know counts as today's default.
        saved = json.loads(json.dumps(_facts(Evaluation()))) | saved
        for name, value in facts.items():
            if saved.get(name) != value:
                raise ConfigError(
                    f"{name}={value!r} was {saved.get(name)!r} when {folder} was created; use the "
                    "same value, or another folder (--to)"
                )
        write_whole(path, json.dumps(facts, indent=1))

    def workdir(self, name: str) -> Path:
        return self._folder / "runs" / name

    def exit_code(self, name: str) -> int | None:
        """The exit code of a run; `None` where it has not ended."""
        outcome = outcome_of(self.workdir(name))
        return None if outcome is None else int(outcome["exit_code"])

    def is_missing(self, run: RunSpec) -> bool:
        """Whether a run must be executed; a diverged run would diverge again.

        Raises:
          ConfigError: the folder holds the run with other settings.
        """
        workdir = self.workdir(run.name)
        if self.exit_code(run.name) not in (0, command.EXIT_DIVERGED):
            return True
        if differing := changes(read_config(workdir), run.config):
            raise ConfigError(
                f"{workdir} holds a run with other settings ({'; '.join(differing.values())}); use "
                "another folder (--to), or the run's settings"
            )
        return False

    def failure(self, name: str) -> str:
        """One line with the reason of a run's failure."""
        outcome = outcome_of(self.workdir(name)) or {"last_line": "the run did not end"}
        return f"{name}: {outcome['last_line']} (see {self.workdir(name) / LOG_FILE})"

    def on_end(self, job: Job, code: int) -> None:
        """Logs the end of a run; rewrites the page if the last one is older than 10 s."""
        name = job.workdir.name
        seconds = (outcome_of(job.workdir) or {}).get("seconds", 0.0)
        LOG.info("%s", self.failure(name) if code else f"{name}: done in {seconds:.0f} s")
        if time.monotonic() - self._written > _PAGE_SECONDS:
            self.write_page()

    def write_page(self) -> Path | None:
        """Writes the page of all finished runs, earlier calls included; `None` without any."""
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
        """The seeds with a folder in `runs/`, for one row."""
        prefix = folder_of(subject, 0)[:-1]
        names = (path.name for path in (self._folder / "runs").glob("*"))
        ends = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return sorted(int(end) for end in ends if end.isdecimal())

    def _findings(self, subject: str, config: ConfigDict, workdir: Path):
        findings, facts = pretraining_findings(config, workdir), {}
        report = workdir / RESULT / JSON
        if report.exists():
            evaluated, known = read_report(report)
            findings, facts = [*findings, *evaluated[subject][0]], known.get(subject, {})
        return findings, facts


def _planned(
    runs: Sequence[RunSpec], count: Callable[[ConfigDict], int]
) -> list[tuple[RunSpec, int]]:
    """The runs with adapted schedules (see `planned`) and their numbers of training images."""
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
    """Lists a table's runs and their cost; see `run_table` and `cost_table`."""
    check_positive("rate", rate)
    runs = runs_of_table(table, rows=rows, seeds=seeds, overrides=overrides, toy=toy)
    plans = _planned(runs, images_of)
    return cost_table([run for run, _ in plans], [images for _, images in plans], rate)


def _same_run(run: RunSpec, folders: Sequence[Path]) -> Path | None:
    """The workdir of a finished run with the same settings and kept weights; `None` without one.

    Raises:
      ConfigError: a folder holds no runs.
    """
    for folder in folders:
        if not (folder / "runs").is_dir():
            raise ConfigError(f"weights_of={folder} holds no runs; use the folder of a table")
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
    """Builds the evaluation of a table's runs and opens its datasets.

    Args:
      table: the experiment.
      datasets: datasets that replace the table's; empty for the table's.
      tasks: tasks that replace the table's; empty for the table's.
      data_dir: folder of tensorflow-datasets.
      options: further options, as `name=value`.
      toy: whether to evaluate on a few rendered scenes.

    Raises:
      ConfigError, DataError: an unknown name, an invalid value, or a missing dataset.
    """
    chosen, tasks = tuple(datasets) or table.datasets, tuple(tasks) or table.tasks
    if toy:
        chosen = ("scenes",) if chosen else ()
    check_names(chosen, tasks)
    opened = [open_evaluated(dataset, data_dir) for dataset in chosen]
    for format_name in table.export:
        check_one_of("export", format_name, FORMATS)
    texts = parse_settings((*table.evaluation, *(TOY_EVALUATION if toy else ()), *options))
    for name in texts:
        check_one_of("evaluation", name, all_settings())
    try:
        values = parsed_settings(texts)
        extraction, of_protocols = checked_settings(values)
    except ConfigError as error:
        raise ConfigError(f"evaluation {error}") from error
    for each in plan(opened, tasks, of_protocols, limit=extraction.limit):
        if each.unmet:
            raise DataError(f"{each}: {each.unmet}")
    return Evaluation(chosen, tasks, data_dir, settings=values)


def _facts(evaluation: Evaluation) -> dict[str, object]:
    """The settings that affect the results of an evaluation, without the paths of its images."""
    names = [
        dataset if dataset.startswith("folder:") else dataset.partition("=")[0]
        for dataset in evaluation.datasets
    ]
    settings = {name: each.default for name, each in all_settings().items()} | evaluation.settings
    return {"datasets": names, "tasks": evaluation.tasks, **settings}


def _numbers(name: str, texts: Sequence[str]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise ConfigError(f"{name}={','.join(texts)} is not a list of integers") from error


if __name__ == "__main__":
    table_flag = flags.DEFINE_string(
        "table", None, "Name of a table in configs/tables/, or path of a Python file."
    )
    to_flag = flags.DEFINE_string("to", "", "Folder of all results; runs/<table> if empty.")
    seeds_flag = flags.DEFINE_list("seeds", [], "Seeds that replace the table's.")
    rows_flag = flags.DEFINE_list("rows", [], "Parts of the subjects that select rows.")
    parallel_flag = flags.DEFINE_integer("parallel", 1, "Number of runs at a time.")
    minutes_flag = flags.DEFINE_float(
        "minutes", 0, "Time budget of all runs; sets their number of steps. 0: the table's steps."
    )
    call_flag = flags.DEFINE_float(
        "call_minutes", 0, "Time after which this call saves and ends; 0: no limit."
    )
    set_flag = flags.DEFINE_multi_string(
        "set", [], "Setting of all runs, as name=value; repeatable."
    )
    datasets_flag = flags.DEFINE_string(
        "datasets", "", "Evaluation datasets that replace the table's: name, or name=folder."
    )
    data_dir_flag = flags.DEFINE_string(
        "data_dir", "", "Folder of tensorflow-datasets, for the evaluation."
    )
    others_flag = flags.DEFINE_multi_string(
        "weights_of", [], "Folder of a table whose equal runs lend their weights; repeatable."
    )
    evaluation_flag = flags.DEFINE_multi_string(
        "evaluation", [], "Evaluation option, as name=value, such as limit=1000; repeatable."
    )
    weights_flag = flags.DEFINE_boolean(
        "keep_weights", False, "Keep the checkpoints after the evaluation."
    )
    toy_flag = flags.DEFINE_boolean(
        "toy", False, "Run at toy size on rendered scenes; a run takes seconds."
    )
    dry_flag = flags.DEFINE_boolean("dry_run", False, "Only print runs, steps and GPU hours.")
    rate_flag = flags.DEFINE_float(
        "rate", RATE, "Images/s of a ResNet-50 at 224 px with MoCo-v2, for --dry_run."
    )
    flags.mark_flags_as_required(["table"])

    def main() -> None:
        """Runs the table of the flags, or prints its cost."""
        table = find_table(table_flag.value)
        selection = {
            "rows": rows_flag.value,
            "seeds": _numbers("seeds", seeds_flag.value),
            "overrides": set_flag.value,
            "toy": toy_flag.value,
        }
        if dry_flag.value:
            print(dry_run(table, **selection, rate=rate_flag.value))
            return
        run_table(
            table,
            Path(to_flag.value or f"runs/{Path(table_flag.value).stem}"),
            **selection,
            datasets=datasets_in(datasets_flag.value),
            data_dir=data_dir_flag.value,
            evaluation=evaluation_flag.value,
            weights_of=others_flag.value,
            parallel=parallel_flag.value,
            minutes=minutes_flag.value,
            call_minutes=call_flag.value,
            keep_weights=weights_flag.value,
        )

    command.run(main)
