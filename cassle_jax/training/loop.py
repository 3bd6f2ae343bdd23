"""The pretraining loop: feeds the step, and sees to checkpoints, metrics, probes and signals."""

import json
import logging
import signal
import threading
import time
from collections import deque

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cassle_jax.config import ConfigError
from cassle_jax.data import DamagedLog, Source, open_source, training_batches
from cassle_jax.parallel import device_mesh, replicate
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.feed import DeviceFeed
from cassle_jax.training.metrics import MetricsWriter
from cassle_jax.training.probe import OnlineProbe
from cassle_jax.training.progress import ProgressReport
from cassle_jax.training.run import Run, build_run
from cassle_jax.training.sheet import write_contact_sheet
from cassle_jax.training.state import TrainState
from cassle_jax.training.step import make_train_step

# Steps the host may be ahead of the devices: enough to hide its work, few enough to stop quickly.
STEPS_AHEAD = 2

LOG = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss was not finite."""


class Preempted(RuntimeError):
    """The run was asked to stop; its state is saved."""


def pretrain(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Pretrains, or continues where the workdir's newest checkpoint stands.

    Args:
      config: as from `base_config`.
      workdir: a folder for checkpoints, metrics, the configuration and the contact sheet.

    Returns:
      The state after the last step.

    Raises:
      ConfigError, DataError: a setting that cannot work, before anything costly starts.
      Diverged: the loss was not finite; names the step.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    mesh = device_mesh()
    source = open_source(config.data, config.data.train_split)
    run = build_run(config, mesh, len(source))
    probe = OnlineProbe(config, run, mesh) if config.probe.every_epochs else None
    loop = _Loop(config, epath.Path(workdir), mesh, source, run, probe)
    with _StopSignals() as stop:
        try:
            return loop.train(stop)
        finally:
            loop.close()


class _Loop:
    """One run in progress; `train` is its story, the other methods are its chapters."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        mesh: Mesh,
        source: Source,
        run: Run,
        probe: OnlineProbe | None,
    ):
        self.config, self.run, self.probe = config, run, probe
        self.total = run.clock.total_steps
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"workdir={workdir} cannot be made: {error.strerror}") from error
        self.checkpoints = Checkpoints(
            workdir,
            keep=config.checkpoint.keep,
            keep_every_steps=config.checkpoint.keep_every_steps,
        )
        batches = training_batches(
            source,
            batch=run.batch_size,
            canvas=config.data.canvas,
            seed=run.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.data.threads,
            cache_bytes=int(config.data.cache_gib * 2**30),
            damaged=DamagedLog(
                len(source),
                config.data.max_bad_fraction,
                workdir / "damaged",
                process_index=jax.process_index(),
            ),
        )
        self.state = replicate(jax.jit(run.initial_state)(), mesh)
        self.step = 0
        restored = self.checkpoints.restore(self.state)
        if restored is not None:
            self.state, self.data_state = restored
            self.step = int(self.state.step)
            batches.set_state(self.data_state)
            LOG.info("continuing at step %d of %d", self.step, self.total)
        self.feed = DeviceFeed(batches, mesh)
        self.train_step = make_train_step(run, mesh)
        self.window = _Window(self.feed, run.batch_size)
        self.writer = self.progress = None
        if jax.process_index() == 0:
            write_config(config, workdir)
            if self.step == 0:
                write_contact_sheet(run, source, config.data, workdir / "views.png")
            self.writer = MetricsWriter(workdir, self.step)
            self.progress = ProgressReport(self.total, self.step)

    def train(self, stop: threading.Event) -> TrainState:
        """Runs to the last step, or saves and raises `Preempted` once `stop` is set."""
        in_flight: deque = deque()
        self.window.start()
        while self.step < self.total:
            batch, self.data_state = next(self.feed)
            self.state, metrics = self.train_step(self.state, batch)
            self.step += 1
            self.window.add(metrics)
            in_flight.append(metrics["loss"])
            if len(in_flight) > STEPS_AHEAD:
                in_flight.popleft().block_until_ready()
            self._after_step()
            if stop.is_set() and self.step < self.total:
                self._save()
                raise Preempted(f"stopped after step {self.step}, which is saved")
        return self.state

    def _after_step(self) -> None:
        config, last = self.config, self.step == self.total
        measured = {}
        if self._is_due(config.log.every_steps) or last:
            self._check_finite()
            measured |= self.window.summary()
        if self.probe and (last or self._is_due(self._probe_every)):
            self._check_finite()
            measured |= self.probe(self.state)
            self.window.start()
        if measured and self.writer:
            self.writer.write(self.step, measured)
            self.progress.report(
                self.step, measured, self.window.seconds * (self.total - self.step)
            )
        if self.progress:
            self.progress.advance(self.step)
        if last or self._is_due(config.checkpoint.every_steps):
            self._save()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def _probe_every(self) -> int:
        return self.config.probe.every_epochs * self.run.clock.steps_per_epoch

    def _check_finite(self) -> None:
        diverged_at = int(self.state.diverged_at)
        if diverged_at >= 0:
            raise Diverged(
                f"the loss of step {diverged_at + 1} is not finite; the last good checkpoint is "
                "kept. A smaller optimizer.base_learning_rate (now "
                f"{self.config.optimizer.base_learning_rate}) or dtype=float32 usually helps"
            )

    def _save(self) -> None:
        self._check_finite()
        self.checkpoints.save(self.step, self.state, self.data_state)

    def close(self) -> None:
        """Waits for what is being saved and lets go of threads and files."""
        self.feed.close()
        self.checkpoints.close()
        if self.writer:
            self.writer.close()
            self.progress.close()


class _Window:
    """Metrics of the steps since the last report; they stay on the device until `summary`."""

    def __init__(self, feed: DeviceFeed, batch_size: int):
        self._feed, self._batch_size = feed, batch_size
        self.seconds = 0.0  # a step, when last measured

    def start(self) -> None:
        self._metrics: list[dict] = []
        self._since, self._waited = time.perf_counter(), self._feed.waited

    def add(self, metrics: dict) -> None:
        self._metrics.append(metrics)

    def summary(self) -> dict[str, float]:
        """Means over the window, images a second, share of time waiting for data; starts anew."""
        values = jax.device_get(self._metrics)
        elapsed = time.perf_counter() - self._since
        self.seconds = elapsed / len(values)
        summary = {name: float(np.mean([each[name] for each in values])) for name in values[0]}
        summary["learning_rate"] = float(values[-1]["learning_rate"])
        summary["images_per_second"] = self._batch_size / self.seconds
        summary["data_wait_share"] = (self._feed.waited - self._waited) / elapsed
        self.start()
        return summary


class _StopSignals:
    """SIGTERM and Ctrl-C set an event, so that a step ends and is saved; a second one kills."""

    def __enter__(self) -> threading.Event:
        self._event, self._previous = threading.Event(), {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self._event

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, _) -> None:
        self._event.set()
        signal.signal(number, self._previous[number])


def write_config(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the configuration of a run to `<workdir>/config.json`."""
    epath.Path(workdir, "config.json").write_text(json.dumps(config.to_dict(), indent=2))


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """The configuration a run was started with."""
    return ConfigDict(json.loads(epath.Path(workdir, "config.json").read_text()))
