"""The story of a sweep: what is missing runs, and all ends in one page."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from cassle_jax.command import EXIT_DIVERGED, EXIT_PREEMPTED, Stop
from cassle_jax.config import ConfigError, flat_settings, knows
from cassle_jax.evaluate import check_names
from cassle_jax.storage import write_whole
from cassle_jax.sweep.jobs import OUTCOME, Command, Local, Slurm, outcome_of
from cassle_jax.sweep.page import write_page
from cassle_jax.sweep.space import Asked, Run, runs_of
from cassle_jax.training.metrics import read_metrics
from cassle_jax.training.saved_config import changes, read_config

LOG = logging.getLogger("cassle_jax.sweep")

FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What of the finished runs is evaluated; without datasets, nothing.

    Attributes:
      datasets, tasks: as the evaluation command's.
      options: further ones of that command.
    """

    datasets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def sweep(
    asked: Asked,
    folder: Path,
    *,
    where: str = "local",
    parallel: int = 1,
    slurm: str = "",
    evaluation: Evaluation | None = None,
) -> Path:
    """Runs what is missing or failed, and writes the page of all that finished.

    The folder holds `sweep.json`, what was asked; `runs.jsonl`, a line a run with its name, values,
    state, result and configuration; `runs/<name>/`, their workdirs; `report.html`, `report.json`
    and `report.csv`; and `jobs/`, what submitit keeps. A sweep of the same folder adds to it.

    Args:
      asked: which runs.
      folder: of the sweep; is made.
      where: `local`, or `slurm`.
      parallel: how many runs at a time.
      slurm: options of sbatch, see `Slurm`.
      evaluation: of the finished runs; none where it is not given.

    Returns:
      The path of the page.

    Raises:
      ConfigError: a setting that cannot work; nothing was submitted.
      Stop: some runs failed, or Ctrl-C; the same sweep goes on.
    """
    evaluation = evaluation or Evaluation()
    knows("where", where, ("local", "slurm"))
    runs = runs_of(asked)
    check_names(evaluation.datasets, evaluation.tasks)
    folder = folder.expanduser().resolve()
    book = _Book(folder, runs)
    places = {"local": lambda: Local(folder / "jobs", parallel)}
    places["slurm"] = lambda: Slurm(folder / "jobs", parallel, slurm)
    place = places[where]()
    missing = [run for run in runs if book.state(run) != FINISHED]
    LOG.info("%d runs, of which %d are finished", len(runs), len(runs) - len(missing))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "sweep.json", json.dumps(dataclasses.asdict(asked), indent=2).encode())
    try:
        book.run(missing, place)
        done = [run for run in runs if book.state(run) == FINISHED]
        failed = [run for run in runs if run not in done]
        if not done:
            raise Stop(f"no run finished; {book.why(failed[0])}", 1)
        found = _evaluate(evaluation, done, book, place) if evaluation.datasets else None
    except KeyboardInterrupt:
        raise Stop("stopped; the same sweep goes on", EXIT_PREEMPTED) from None
    page = write_page(folder, {run: book.workdir(run) for run in done}, found)
    LOG.info("the page is %s", page)
    if failed:
        raise Stop(f"{len(failed)} of {len(runs)} runs failed; {book.why(failed[0])}", 1)
    return page


class _Book:
    """The states and results of the runs, kept in `runs.jsonl`.

    Raises:
      ConfigError: the folder holds a run of the same name with other settings.
    """

    def __init__(self, folder: Path, runs: Sequence[Run]):
        self._folder, self._runs = folder, runs
        self._path = folder / "runs.jsonl"
        self._running: set[str] = set()
        for run in runs:
            if self.state(run) == FINISHED:
                _check_same(run, self.workdir(run))

    def workdir(self, run: Run) -> Path:
        return self._folder / "runs" / run.name

    def state(self, run: Run) -> str:
        """`missing`, `submitted`, `finished`, `diverged` or `failed`."""
        if run.name in self._running:
            return "submitted"
        outcome = outcome_of(self.workdir(run))
        if outcome is None:
            return "failed" if self.workdir(run).exists() else "missing"
        return {0: FINISHED, EXIT_DIVERGED: "diverged"}.get(outcome["exit_code"], "failed")

    def why(self, run: Run) -> str:
        """A line on how a run failed."""
        outcome = outcome_of(self.workdir(run)) or {"last_line": "it was killed"}
        reason = str(outcome["last_line"]).removeprefix("error: ")
        return f"{run.name}: {reason} (see {self.workdir(run) / 'log.txt'})"

    def run(self, runs: Sequence[Run], place: Local | Slurm) -> None:
        """Runs these, keeping the book."""
        by_folder = {self.workdir(run): run for run in runs}
        commands = []
        for workdir, run in by_folder.items():
            (workdir / OUTCOME).unlink(missing_ok=True)
            arguments = (*run.arguments, f"--workdir={workdir}")
            commands.append(Command("cassle_jax.pretrain", arguments, workdir))

        def ended(command: Command) -> None:
            run = by_folder[command.folder]
            self._running.discard(run.name)
            state = self.state(run)
            LOG.info("%s", f"{run.name}: {state}" if state == FINISHED else self.why(run))
            self._write()

        self._running = {run.name for run in runs}
        self._write()
        try:
            if commands:
                place.run(commands, ended)
        finally:
            self._running = set()
            self._write()

    def _write(self) -> None:
        """Replaces the lines of this sweep's runs, and keeps those of earlier ones."""
        ours = {run.name for run in self._runs}
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if json.loads(line)["run"] not in ours]
        kept += [json.dumps(self._line(run)) for run in self._runs]
        write_whole(self._path, "".join(line + "\n" for line in kept).encode())

    def _line(self, run: Run) -> Mapping[str, object]:
        state, workdir = self.state(run), self.workdir(run)
        result = outcome_of(workdir) or {}
        if state == FINISHED:
            curves = read_metrics(workdir)
            result = {"steps": max(curve[-1][0] for curve in curves.values())}
            result |= {name: curve[-1][1] for name, curve in curves.items()}
        facts = {"run": run.name, "subject": run.subject, "values": run.values}
        return {**facts, "state": state, "result": result, "config": flat_settings(run.config)}


def _check_same(run: Run, workdir: Path) -> None:
    """Raises ConfigError where a finished run had other settings than are asked for now."""
    changed = changes(read_config(workdir), run.config)
    if changed:
        raise ConfigError(
            f"{workdir} holds a finished run with other settings ({'; '.join(changed.values())}); "
            "use another folder (--to), or the settings it had"
        )


def _evaluate(
    evaluation: Evaluation, runs: Sequence[Run], book: _Book, place: Local | Slurm
) -> Path:
    """Evaluates runs as a job of its own, unless that was done; returns where its report is."""
    folder = book.workdir(runs[0]).parents[1] / "evaluation"
    arguments = [f"--run={run.subject}={book.workdir(run)}" for run in runs]
    arguments.append(f"--datasets={','.join(evaluation.datasets)}")
    if evaluation.tasks:
        arguments.append(f"--tasks={','.join(evaluation.tasks)}")
    arguments += [*evaluation.options, f"--to={folder}"]
    asked, outcome = folder / "asked.json", outcome_of(folder)
    newest = max((book.workdir(run) / OUTCOME).stat().st_mtime for run in runs)
    fresh = outcome and outcome["exit_code"] == 0 and (folder / OUTCOME).stat().st_mtime > newest
    if not fresh or not asked.exists() or json.loads(asked.read_text()) != arguments:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(asked, json.dumps(arguments).encode())
        (folder / OUTCOME).unlink(missing_ok=True)
        LOG.info("evaluating %d runs", len(runs))
        place.run([Command("cassle_jax.evaluate", arguments, folder)], lambda _: None)
        outcome = outcome_of(folder) or {"exit_code": 1, "last_line": "it was killed"}
    if outcome["exit_code"]:
        raise Stop(
            f"the evaluation failed: {outcome['last_line']} (see {folder / 'log.txt'})",
            int(outcome["exit_code"]),
        )
    return folder
