"""Executes a sweep: runs what is missing, evaluates, and writes one page."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from etils import epath

from cassle_jax.checks import ConfigError, check_one_of
from cassle_jax.command import EXIT_PREEMPTED, Stop
from cassle_jax.config import flat_settings
from cassle_jax.evaluate import check_requested
from cassle_jax.faults import retried
from cassle_jax.lock import folder_held
from cassle_jax.report.files import JSON, is_complete
from cassle_jax.storage import check_writable, kept_json, local_folder, make_shared, write_surely
from cassle_jax.sweep.jobs import OUTCOME, Command, Local, Slurm, outcome_of
from cassle_jax.sweep.page import write_page
from cassle_jax.sweep.records import FINISHED, RunRecord, check_finished, workdir_of
from cassle_jax.sweep.restarts import first_pause
from cassle_jax.sweep.space import RunSpec, SweepRequest, runs_of
from cassle_jax.training.idle import idle_in_all
from cassle_jax.training.metrics import read_lines, read_metrics
from cassle_jax.training.warm_start import check_weights_file
from cassle_jax.training.workdir import known_path

LOG = logging.getLogger("cassle_jax.sweep")

# Parts of a path for which submitit puts the numbers of jobs, and SLURM any number.
NUMBERED = {"local": "%[jtaA]", "slurm": "%"}


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """Options of the evaluation of the finished runs; no evaluation without datasets.

    Attributes:
      datasets, tasks: as in the evaluation command.
      options: further options of that command.
    """

    datasets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def sweep(
    request: SweepRequest,
    folder: epath.PathLike,
    *,
    where: str = "local",
    parallel: int = 1,
    slurm: str = "",
    evaluation: EvaluationOptions | None = None,
) -> Path:
    """Executes the missing and failed runs, and writes the page of the finished ones.

    The folder holds `sweep.json`, the request; `runs.jsonl`, one line per run with its name,
    values, state, result and configuration; `runs/<name>/`, the workdirs; `report.html`,
    `report.json` and `report.csv`; and `jobs/`, submitit's files. Another sweep in the same folder
    adds to it.

    Args:
      request: configuration and values of the runs.
      folder: folder of the sweep; created where missing.
      where: `local`, or `slurm`.
      parallel: number of runs at a time.
      slurm: sbatch options, see `Slurm`.
      evaluation: evaluation of the finished runs; `None` for none.

    Returns:
      The path of the page.

    Raises:
      ConfigError, DataError: an invalid setting, a missing dataset, or another sweep uses the
        folder; nothing was submitted.
      Stop: some runs failed, or Ctrl-C; the same sweep resumes.
    """
    evaluation = evaluation or EvaluationOptions()
    first_pause()  # refuses what is no number, which an outage would read hours later
    runs = runs_of(request)
    folder = _known_folder(folder, where)
    records = [RunRecord(workdir_of(folder, run.name)) for run in runs]
    # Under SLURM, this machine may lack the images; a finished sweep needs none for its page.
    opens = where == "local" and any(record.state != FINISHED for record in records)
    check_requested(evaluation.datasets, evaluation.tasks, evaluation.options, opens=opens)
    if slurm and where != "slurm":
        LOG.warning("slurm=%s has no effect with where=%s", slurm, where)
    check_writable("to", folder)
    given = [each.removeprefix("--config.").partition("=")[0] for each in request.overrides]
    for line in idle_in_all([run.config for run in runs], [*given, *runs[0].values]):
        LOG.warning("%s", line)
    with folder_held(folder, setting="to", holder="sweep"):
        lines = _RunLines(folder, runs, where)
        jobs = folder / "jobs"
        retried(f"to={folder}", lambda: make_shared(jobs))
        executor = Slurm(jobs, parallel, slurm) if where == "slurm" else Local(jobs, parallel)
        missing = [run for run in runs if lines.state(run) != FINISHED]
        LOG.info("%s", _count(runs, [lines.state(run) for run in runs]))
        write_surely(folder / "sweep.json", json.dumps(dataclasses.asdict(request), indent=2))
        try:
            lines.run(missing, executor)
            workdirs = {
                run: lines.record(run).folder for run in runs if lines.state(run) == FINISHED
            }
            if not workdirs:
                raise Stop(f"no run finished; {lines.record(runs[0]).failure}", 1)
            report = _evaluate(evaluation, workdirs, folder / "evaluation", executor)
        except KeyboardInterrupt:
            raise Stop("stopped; rerun the same sweep to resume", EXIT_PREEMPTED) from None
        page = retried(f"to={folder}", lambda: write_page(folder, workdirs, report))
        LOG.info("wrote %s", page)
        check_finished([lines.record(run) for run in runs])
    return page


def dry_run(request: SweepRequest, folder: epath.PathLike, where: str = "local") -> str:
    """Lists a sweep's runs with their states, one line per run; starts and writes nothing.

    Args:
      request: configuration and values of the runs.
      folder: folder of the sweep; need not exist.
      where: `local`, or `slurm`.

    Raises:
      ConfigError: an invalid setting or folder, or a run of the folder has other settings.
    """
    runs = runs_of(request)
    lines = _RunLines(_known_folder(folder, where), runs, where)
    states = [lines.state(run) for run in runs]
    listed = [f"{run.name}: {state}" for run, state in zip(runs, states, strict=True)]
    return "\n".join([*listed, _count(runs, states)])


def _known_folder(to: epath.PathLike, where: str) -> Path:
    """The absolute path of a sweep's folder; raises ConfigError where none can be there."""
    check_one_of("where", where, NUMBERED)
    folder = Path(known_path(local_folder("to", to), setting="to").resolve())
    if numbered := re.search(NUMBERED[where], str(folder)):
        raise ConfigError(
            f"to={folder} has {numbered[0]}, which submitit and SLURM replace by numbers; use "
            "another folder"
        )
    return folder


def _count(runs: Sequence[RunSpec], states: Sequence[str]) -> str:
    return f"{len(runs)} runs, {states.count(FINISHED)} of them finished"


class _RunLines:
    """States and results of the runs, written to `runs.jsonl`.

    Raises:
      ConfigError: the folder holds a run of the same name with other settings, or a run lacks its
        initial weights.
    """

    def __init__(self, folder: Path, runs: Sequence[RunSpec], where: str = "local"):
        self._folder, self._runs = folder, runs
        self._path = folder / "runs.jsonl"
        self._running: set[str] = set()
        for run in runs:
            record = self.record(run)
            if record.state == FINISHED:
                record.check_same(run.config, opens=where == "local")
            else:
                check_weights_file(run.config.weights, record.folder)

    def record(self, run: RunSpec) -> RunRecord:
        return RunRecord(workdir_of(self._folder, run.name))

    def state(self, run: RunSpec) -> str:
        """The state of its record, or `submitted`."""
        return "submitted" if run.name in self._running else self.record(run).state

    def run(self, runs: Sequence[RunSpec], executor: Local | Slurm) -> None:
        """Executes runs and updates their records."""
        by_folder = {self.record(run).folder: run for run in runs}
        commands = []
        for workdir, run in by_folder.items():
            (workdir / OUTCOME).unlink(missing_ok=True)
            arguments = (*run.arguments, f"--workdir={workdir}")
            commands.append(Command("cassle_jax.pretrain", arguments, workdir))

        def on_end(command: Command) -> None:
            run = by_folder[command.folder]
            self._running.discard(run.name)
            state = self.state(run)
            ended = f"{run.name}: {state}" if state == FINISHED else self.record(run).failure
            LOG.info("%s", ended)
            self._write()

        self._running = {run.name for run in runs}
        self._write()
        try:
            if commands:
                executor.run(commands, on_end)
        finally:
            self._running = set()
            self._write()

    def _write(self) -> None:
        """Replaces the lines of this sweep's runs, and keeps those of earlier sweeps."""
        names = {run.name for run in self._runs}
        lines = [line for line in read_lines(self._path, "run", str) if line["run"] not in names]
        lines += [self._line(run) for run in self._runs]
        write_surely(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def _line(self, run: RunSpec) -> Mapping[str, object]:
        state, workdir = self.state(run), self.record(run).folder
        result = outcome_of(workdir) or {}
        if state == FINISHED:
            curves = read_metrics(workdir)
            result = {"steps": max((curve[-1][0] for curve in curves.values()), default=0)}
            result |= {name: curve[-1][1] for name, curve in curves.items()}
        facts = {"run": run.name, "subject": run.subject, "values": run.values}
        return {**facts, "state": state, "result": result, "config": flat_settings(run.config)}


def _evaluate(
    evaluation: EvaluationOptions,
    workdirs: Mapping[RunSpec, Path],
    folder: Path,
    executor: Local | Slurm,
) -> Path | None:
    """Evaluates runs in a separate job unless the report is up to date; returns its folder."""
    if not evaluation.datasets:
        return None
    arguments = [f"--run={run.subject}={workdir}" for run, workdir in workdirs.items()]
    arguments.append(f"--datasets={','.join(evaluation.datasets)}")
    if evaluation.tasks:
        arguments.append(f"--tasks={','.join(evaluation.tasks)}")
    arguments += [*evaluation.options, f"--to={folder}"]
    record, saved = RunRecord(folder), folder / "requested.json"
    # Earlier versions wrote asked.json.
    before = kept_json(saved, kind=list) or kept_json(folder / "asked.json", kind=list)
    ends = [(workdir / OUTCOME).stat().st_mtime_ns for workdir in workdirs.values()]
    wanted = [*arguments, *map(str, ends)]  # not later ones alone: a clock may be set back
    fresh = record.state == FINISHED and (
        before == wanted
        # Earlier versions did not note when the runs ended.
        or (before == arguments and (folder / OUTCOME).stat().st_mtime_ns > max(ends))
    )
    if not (fresh and is_complete(folder / JSON)):
        make_shared(folder)
        (folder / OUTCOME).unlink(missing_ok=True)  # first: else the old one would pass as the new
        write_surely(saved, json.dumps(wanted))
        LOG.info("evaluating %d runs", len(workdirs))
        executor.run([Command("cassle_jax.evaluate", arguments, folder)], lambda _: None)
    if record.state != FINISHED:
        raise Stop(f"the evaluation failed: {record.reason}", record.exit_code or 1)
    return folder
