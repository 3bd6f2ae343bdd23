"""Executes a table: runs what is missing, evaluates every run, and writes the results."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from cassle_jax.checks import LONGEST, ConfigError, check_at_least, check_positive, differing
from cassle_jax.command import EXIT_PREEMPTED, Stop
from cassle_jax.data import open_source
from cassle_jax.faults import retried
from cassle_jax.interop.errors import WeightsError
from cassle_jax.lock import folder_held
from cassle_jax.report.comparison import FindingsBySubject
from cassle_jax.report.files import JSON, Facts, read_complete
from cassle_jax.storage import (
    check_writable,
    is_there,
    kept_json,
    local_folder,
    make_shared,
    path_of,
    real_path,
    write_surely,
)
from cassle_jax.sweep.budget import (
    MEASURED,
    MEASURED_RUN,
    Plan,
    make_plan,
    measured_in,
    read_plan,
    runs_to_measure,
)
from cassle_jax.sweep.cost import RATE, cost_table, images_of
from cassle_jax.sweep.evaluation import Evaluation, check_formats, evaluation_of, facts_of
from cassle_jax.sweep.jobs import OUTCOME, outcome_of
from cassle_jax.sweep.pool import WorkerPool
from cassle_jax.sweep.records import DIVERGED, FINISHED, RunRecord, check_finished, workdir_of
from cassle_jax.sweep.results import write_results
from cassle_jax.sweep.space import RunSpec
from cassle_jax.sweep.table import Table, folder_of, planned, runs_of_table, with_settings
from cassle_jax.sweep.worker import RESULT, Job
from cassle_jax.training.findings import pretraining_findings
from cassle_jax.training.idle import idle_in_all
from cassle_jax.training.saved_config import holds_run, read_config
from cassle_jax.training.warm_start import check_weights_file
from cassle_jax.training.workdir import known_path

LOG = logging.getLogger("cassle_jax.tables")

TABLE_FILE = "table.json"
_PAGE_SECONDS = 10.0
_RESUMABLE = "the time of this call is over; rerun the same command to resume"


def run_table(
    table: Table,
    to: epath.PathLike,
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
      rows: subjects, or parts of subjects, that select rows; empty for all rows.
      seeds: seeds that replace the table's; empty for the table's.
      overrides: settings of all runs, as `name=value`.
      datasets: evaluation datasets that replace the table's; empty for the table's.
      data_dir: folder of tensorflow-datasets, for evaluation.
      evaluation: further evaluation options, as `name=value`.
      weights_of: folders of other tables; a finished run there with the same settings and images,
        and with kept weights, replaces pretraining.
      parallel: number of runs at a time.
      minutes: time budget of all runs together. In a new folder it sets the number of steps, at
        most the table's; 0 for the table's.
      call_minutes: time after which this call saves and ends; 0 for no limit.
      keep_weights: whether checkpoints stay after the evaluation.
      toy: whether the runs are toy-sized, on rendered scenes; a run takes seconds.

    Returns:
      The path of the page.

    Raises:
      ConfigError, DataError: invalid settings or missing data, or another call executes a table in
        this folder, before any run starts.
      Stop: the call's time is over (75; the same call resumes), or some runs failed (1).
    """
    check_at_least("parallel", parallel, 1, LONGEST)
    check_at_least("call_minutes", call_minutes, 0)
    check_at_least("minutes", minutes, 0)
    to = Path(known_path(local_folder("to", to), setting="to").resolve())
    lenders = [real_path(path_of(lender)) for lender in weights_of]
    overrides = (f"compilation_cache={to / 'compiled'}", *overrides)
    count = _once_per_data(_opened)
    expanded = partial(_expanded, table, count, rows=rows, seeds=seeds, toy=toy)
    runs = expanded(overrides)
    given = [each.partition("=")[0] for each in overrides]
    for line in idle_in_all([run.config for run in runs], given):
        LOG.warning("%s", line)
    protocol = evaluation_of(
        table, datasets=datasets, data_dir=data_dir, options=evaluation, toy=toy
    )
    check_writable("to", to)
    with folder_held(to, setting="to", holder="table"):
        retried(f"to={to}", lambda: make_shared(to / "compiled"))
        results = _Results(to, table, protocol)
        missing = [run for run in runs if results.lacks(run)]
        _check_missing(missing, table, results, lenders)
        pool = WorkerPool(parallel, 60 * call_minutes)
        if plan := _plan(to, minutes, runs, protocol, pool, toy):
            steps = min([plan.steps, *(run.config.steps for run in runs)])
            overrides = (*overrides, f"steps={steps}")
            runs = expanded(overrides)
        results.check_ended(runs, partial(expanded, overrides))
        job = partial(
            Job, evaluation=protocol, keep_weights=keep_weights, export=table.export, toy=toy
        )
        LOG.info("%d runs, %d of them done", len(runs), len(runs) - len(missing))
        names = {run.name for run in missing}
        jobs = _jobs([run for run in runs if run.name in names], results, lenders, job)
        all_done = pool.run(jobs, results.on_end)
        page = results.write_page()
        if not all_done:
            raise Stop(_RESUMABLE, EXIT_PREEMPTED)
        check_finished([RunRecord(results.workdir(run.name)) for run in runs])
        LOG.info("wrote %s", page)
    return page


def _plan(
    to: Path,
    minutes: float,
    runs: Sequence[RunSpec],
    evaluation: Evaluation,
    pool: WorkerPool,
    toy: bool,
) -> Plan | None:
    """Reads the plan of a table's folder; makes one where a budget needs it.

    A new plan measures a step per group of rows, and one evaluation.
    """
    plan = read_plan(to, minutes)
    if plan or not minutes:
        return plan
    chosen = {to / MEASURED / run.name: run for run in runs_to_measure(runs, pool.parallel)}
    jobs = []
    for workdir, run in chosen.items():
        short = with_settings(run, MEASURED_RUN)
        protocol = Evaluation() if jobs else evaluation
        jobs.append(Job(run.subject, short.arguments, workdir, protocol, False, toy=toy))
    missing = [job for job in jobs if measured_in(job.workdir) is None]
    for job in missing:  # a run that continues in the middle would measure too little
        shutil.rmtree(job.workdir, ignore_errors=True)

    def on_end(job: Job, code: int) -> None:
        LOG.info("%s: measured", job.workdir.name)
        if code:
            reason = RunRecord(job.workdir).reason
            raise Stop(f"{job.subject} failed during its measurement: {reason}", code)

    if not pool.run(missing, on_end):
        raise Stop(_RESUMABLE, EXIT_PREEMPTED)
    plan = make_plan(to, minutes, runs, chosen, pool.parallel)
    shutil.rmtree(to / MEASURED)
    return plan


def _jobs(
    runs: Sequence[RunSpec],
    results: "_Results",
    weights_of: Sequence[Path],
    job: Callable[..., Job],
) -> list[Job]:
    """The jobs of runs; `job` makes one of subject, arguments and workdir."""
    return [
        job(
            run.subject,
            run.arguments,
            results.workdir(run.name),
            weights=_same_run(run, weights_of),
        )
        for run in runs
    ]


def _check_missing(
    runs: Sequence[RunSpec], table: Table, results: "_Results", weights_of: Sequence[Path]
) -> None:
    """Raises ConfigError where a run would fail only after the runs before it are computed."""
    for run in runs:
        check_weights_file(run.config.weights, results.workdir(run.name))
    for run in {run.subject: run for run in runs}.values():
        try:
            check_formats(run.config, table.export)
        except WeightsError as error:
            raise ConfigError(f"row {run.subject!r}: export={table.export}: {error}") from error
    for folder in weights_of if runs else ():
        if not (folder / "runs").is_dir():
            raise ConfigError(f"weights_of={folder} holds no runs; use the folder of a table")


def _same_run(run: RunSpec, folders: Sequence[Path]) -> Path | None:
    """The workdir of a finished run of the same settings and images, with weights, or `None`."""
    for folder in folders:
        for workdir in sorted((folder / "runs").iterdir()):
            record = RunRecord(workdir)
            lends = record.state == FINISHED and holds_run(epath.Path(workdir))
            if lends and not record.changes(run.config):
                return workdir
    return None


class _Results:
    """Results of the runs in a table's folder.

    Raises:
      ConfigError: the folder holds another table, or its finished runs have another evaluation.
    """

    def __init__(self, folder: Path, table: Table, evaluation: Evaluation):
        self._folder, self._table, self._evaluated = folder, table, bool(evaluation.datasets)
        self._written = time.monotonic()
        facts = json.loads(json.dumps({"table": table.title, **facts_of(evaluation)}))
        path = folder / TABLE_FILE
        saved = kept_json(path)
        if saved is None and is_there(path):
            LOG.warning(
                "%s is damaged; this call's evaluation replaces it, and earlier runs may differ",
                path,
            )
        saved = saved or facts
        # Settings that an older version lacked count as today's defaults.
        saved = json.loads(json.dumps(facts_of(Evaluation()))) | saved
        saved["images"] = saved["images"] or facts["images"]  # which it did not record
        runs = (folder / "runs").glob("*")
        for name, value in facts.items() if any(map(_is_finished, runs)) else ():
            if (before := saved.get(name)) != value:
                now, before = _entries_that_differ(value, before)
                raise ConfigError(
                    f"{name}={now!r} was {before!r} for the runs in {folder}; use the same value, "
                    "or another folder (--to)"
                )
        write_surely(path, json.dumps(facts, indent=1))

    def workdir(self, name: str) -> Path:
        return workdir_of(self._folder, name)

    def lacks(self, run: RunSpec) -> bool:
        """Whether a run has no results yet; a diverged run would diverge again."""
        record = RunRecord(self.workdir(run.name))
        return record.state != DIVERGED and self._evaluation(record) is None

    def check_ended(self, runs: Sequence[RunSpec], expanded: Callable[..., list[RunSpec]]) -> None:
        """Raises ConfigError where a run, of any row, has ended with other settings than these.

        Args:
          runs: the runs of the call.
          expanded: expands other `rows` with the call's settings; a row that lacks one of these
            is not compared.
        """
        selected = {run.subject: run for run in runs}
        for subject in (row.subject for row in self._table.rows):
            ended = self._ended(subject)
            if ended and subject not in selected:
                with suppress(ConfigError):
                    selected[subject] = expanded(rows=(subject,))[0]
            for seed, record in ended.items() if subject in selected else ():
                same = ConfigDict({**selected[subject].config.to_dict(), "seed": seed})
                if changed := record.changes(same):
                    raise ConfigError(
                        f"{record.folder} holds a run of row {subject!r} with other settings "
                        f"({'; '.join(changed)}), and the page would compare both; use another "
                        f"folder (--to), the settings of that run, or move {record.folder} away"
                    )

    def _ended(self, subject: str) -> dict[int, RunRecord]:
        """The runs of a row that need not run again, by seed."""
        names = {seed: folder_of(subject, seed) for seed in self._seeds(subject)}
        records = {seed: RunRecord(self.workdir(name)) for seed, name in names.items()}
        return {seed: each for seed, each in records.items() if each.state in (FINISHED, DIVERGED)}

    def _evaluation(self, record: RunRecord) -> tuple[FindingsBySubject, Facts] | None:
        """The evaluation of a run, empty where the table has none; `None` if not yet finished."""
        if record.state != FINISHED:
            return None
        return read_complete(record.folder / RESULT / JSON) if self._evaluated else ({}, {})

    def on_end(self, job: Job, code: int) -> None:
        """Logs the end of a run; rewrites the page if the last one is older than 10 s."""
        record = RunRecord(job.workdir)
        if code:
            LOG.info("%s", record.failure)
        else:
            outcome = kept_json(job.workdir / OUTCOME, {"seconds": Real})
            took = f" in {outcome['seconds']:.0f} s" if outcome else ""
            LOG.info("%s: done%s", job.workdir.name, took)
        if time.monotonic() - self._written > _PAGE_SECONDS:
            self.write_page()

    def write_page(self) -> Path | None:
        """Writes the page of all finished runs, earlier calls included; `None` without any."""
        found, facts, states, steps = {}, {}, [], set()
        for row in self._table.rows:
            for seed in self._seeds(row.subject):
                name = folder_of(row.subject, seed)
                record = RunRecord(self.workdir(name))
                outcome = outcome_of(record.folder) or {"exit_code": None, "last_line": ""}
                states.append({"run": name, "row": row.subject, "seed": seed, **outcome})
                if (evaluation := self._evaluation(record)) is None:
                    continue
                config, (evaluated, known) = read_config(record.folder), evaluation
                findings = pretraining_findings(config, record.folder)
                findings += evaluated.get(row.subject, [[]])[0]
                found.setdefault(row.subject, {})[seed] = findings
                facts.setdefault(row.subject, known.get(row.subject, {}))
                steps.add(config.steps)
        self._written = time.monotonic()
        if not found:
            return None
        lengths = " to ".join(map(str, sorted({min(steps), max(steps)})))
        note = f"Each run is pretrained for {lengths} steps."
        return retried(
            f"to={self._folder}",
            lambda: write_results(self._folder, self._table, found, facts, states, note),
        )

    def _seeds(self, subject: str) -> list[int]:
        """The seeds with a folder in `runs/`, for one row."""
        prefix = folder_of(subject, 0)[:-1]
        names = (path.name for path in (self._folder / "runs").glob("*"))
        ends = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return sorted(int(end) for end in ends if end.isdecimal())


def _is_finished(workdir: Path) -> bool:
    return RunRecord(workdir).state == FINISHED


def _entries_that_differ(now: Any, before: Any) -> tuple[Any, Any]:
    """The two values; of dictionaries, only the entries that differ."""
    if not (isinstance(now, dict) and isinstance(before, dict)):
        return now, before
    names = differing(now, before)
    return tuple({name: each[name] for name in names if name in each} for each in (now, before))


def _expanded(
    table: Table, count: Callable[[ConfigDict], int], overrides: Sequence[str], **selection
) -> list[RunSpec]:
    """The runs of a table with adapted schedules; `count` returns a run's number of images."""
    runs = runs_of_table(table, overrides=overrides, **selection)
    return [planned(run, count(run.config)) for run in runs]


def _once_per_data(count: Callable[[ConfigDict], int]) -> Callable[[ConfigDict], int]:
    """The same function, which keeps its result for every run with the same `data` settings."""
    counts: dict[str, int] = {}

    def counted(config: ConfigDict) -> int:
        key = json.dumps(config.data.to_dict(), sort_keys=True, default=str)
        if key not in counts:
            counts[key] = count(config)
        return counts[key]

    return counted


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
    selection = {"rows": rows, "seeds": seeds, "toy": toy}
    runs = _expanded(table, count := _once_per_data(images_of), overrides, **selection)
    return cost_table(runs, [count(run.config) for run in runs], rate)
