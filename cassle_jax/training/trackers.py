"""Sends a run's metrics to Weights & Biases and MLflow, where they are installed."""

import importlib.util
import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from etils import epath

from cassle_jax.checks import ConfigError, check_one_of, first_line
from cassle_jax.faults import hurry
from cassle_jax.storage import is_there, kept_json, on_object_store, write_whole
from cassle_jax.training.metrics import read_lines

_PORTION_SECONDS = 1.0

LOG = logging.getLogger(__name__)


class Tracker(ABC):
    """A run in a service that keeps metrics. A subclass in `TRACKERS` adds a service.

    Args:
      workdir: workdir of the run, whose name is shown.
      settings: settings of the run, by full name.
      run: the service's name of the run to continue; `None` begins a new one.

    Attributes:
      package: the package that has to be installed.
      run: the service's name of the run.
    """

    package: ClassVar[str]
    run: str

    @abstractmethod
    def __init__(self, workdir: epath.Path, settings: Mapping[str, Any], run: str | None):
        """Begins a run with these settings, or continues the one of this identifier."""

    @abstractmethod
    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics of a step; the same step may come again with other metrics."""

    @abstractmethod
    def close(self) -> None:
        """Ends this process's part of the run."""


class WeightsAndBiases(Tracker):
    """Weights & Biases; its environment variables choose the project and the mode."""

    package = "wandb"

    def __init__(self, workdir, settings, run):
        import wandb

        self.run = run or secrets.token_hex(8)
        self._run = wandb.init(
            id=self.run,
            resume="allow",
            name=workdir.name,
            dir=None if on_object_store(workdir) else str(workdir),
            config=dict(settings),
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )

    def write(self, step, metrics):
        """Adds to the history of the run."""
        self._run.log(dict(metrics), step=step)

    def close(self):
        """Uploads what is left, and ends the run."""
        self._run.finish()


class MLflow(Tracker):
    """MLflow; its environment variables choose the server and the experiment."""

    package = "mlflow"

    def __init__(self, workdir, settings, run):
        import mlflow

        self._mlflow = mlflow
        name = None if run else workdir.name
        self.run = mlflow.start_run(run_id=run, run_name=name).info.run_id
        if not run:
            mlflow.log_params(dict(settings))

    def write(self, step, metrics):
        """Adds to the metrics of the run."""
        self._mlflow.log_metrics(dict(metrics), step=step, run_id=self.run)

    def close(self):
        """Ends the run."""
        self._mlflow.end_run()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def check_trackers(names: Iterable[str]) -> None:
    """Raises ConfigError for a tracker that is unknown or not installed."""
    for name in names:
        check_one_of("log.to", name, TRACKERS)
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"log.to={name} needs the package {package}, which is not installed; use "
                f"pip install {package}"
            )


class Tracking:
    """Sends every step to a tracker once, however often the run continues.

    A tracker that joins late gets what `<workdir>/metrics.jsonl` has. `<workdir>/<name>.json` keeps
    the tracker's run, the last step sent and the names of its metrics. What cannot be sent, as in
    an outage, is kept and sent with the next report; one line in the log says so. A report takes at
    most a second to send. At the end everything is sent, unless the run must stop.

    Args:
      name: a key of `TRACKERS`.
      workdir: workdir of the run.
      settings: settings of the run, by full name.

    Raises:
      ConfigError: the tracker cannot begin or continue its run.
    """

    def __init__(self, name: str, workdir: epath.Path, settings: Mapping[str, Any]):
        self._name, self._file = name, workdir / f"{name}.json"
        before = kept_json(self._file, {"run": str, "step": int, "names": [str]})
        if before is None and is_there(self._file):
            LOG.warning("%s is damaged; a new run of %s gets every step", self._file, name)
        before = before or {"run": None, "step": 0, "names": []}
        try:
            self._tracker = TRACKERS[name](workdir, settings, before["run"])
            self._note(before["step"], before["names"])
        except Exception as error:
            known = f"; {self._file} names the run to continue" if before["run"] else ""
            raise ConfigError(f"log.to={name} cannot start: {first_line(error)}{known}") from error
        self._before, self._names = before["step"], frozenset(before["names"])
        self._waiting: deque[tuple[int, dict[str, float]]] = deque()
        self._failing = False
        for line in read_lines(workdir / "metrics.jsonl"):
            self._keep(line.pop("step"), line)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step, unless an earlier part of the run has sent it."""
        self._keep(step, metrics)
        self._send()

    def _keep(self, step: int, metrics: Mapping[str, float]) -> None:
        sent = self._names if step == self._before else frozenset()
        unsent = {name: value for name, value in metrics.items() if name not in sent}
        if step >= self._before and unsent:
            self._waiting.append((step, unsent))

    def close(self) -> None:
        """Sends the rest, if that is possible now, and closes the tracker."""
        self._send()
        while self._waiting and not self._failing and not hurry.is_set():
            self._send()
        if self._waiting:
            LOG.warning("%s lacks its last %d reports", self._name, len(self._waiting))
        try:
            self._tracker.close()
        except Exception as error:
            LOG.warning("%s cannot be closed: %s", self._name, error)

    def _send(self) -> None:
        """Sends the oldest waiting reports, for a second at most."""
        until = time.monotonic() + _PORTION_SECONDS
        try:
            while self._waiting and time.monotonic() < until:
                step, metrics = self._waiting[0]
                names = {*metrics, *(self._names if step == self._before else ())}
                self._note(step, names)  # first: after a kill, a report is lost, not sent twice
                try:
                    self._tracker.write(step, metrics)
                except Exception:
                    self._note(self._before, self._names)
                    raise
                self._before, self._names = step, frozenset(names)
                self._waiting.popleft()
        except Exception as error:  # whatever the service's library raises
            if not self._failing:
                LOG.warning("%s cannot be written for now: %s", self._name, error)
            self._failing = True
        else:
            self._failing = False

    def _note(self, step: int, names: Iterable[str]) -> None:
        noted = {"run": self._tracker.run, "step": step, "names": sorted(names)}
        write_whole(self._file, json.dumps(noted))
