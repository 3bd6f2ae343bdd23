"""The pretraining loop: feeds the step, and handles checkpoints, metrics, probes and signals."""

import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cassle_jax.checks import ConfigError, first_line
from cassle_jax.config import flat_settings
from cassle_jax.data import (
    DamagedLog,
    DataError,
    Feed,
    Source,
    check_outside,
    names_of,
    open_feed,
    open_source,
)
from cassle_jax.distributed import agree, all_arrive, is_first_to
from cassle_jax.faults import Outage, hurry, reason_of
from cassle_jax.lock import folder_held
from cassle_jax.parallel import device_mesh, in_all_processes, on_every_device
from cassle_jax.storage import is_there, make_shared
from cassle_jax.training.checkpoints import Checkpoints, NotSaved
from cassle_jax.training.metrics import MetricsWriter
from cassle_jax.training.probe import MEASURED, OnlineProbe
from cassle_jax.training.progress import ProgressReport
from cassle_jax.training.recorded import record_of
from cassle_jax.training.run import Run, build_run, check_settings
from cassle_jax.training.saved_config import (
    check_unchanged,
    holds_run,
    shared_settings,
    write_config,
)
from cassle_jax.training.sheet import write_contact_sheet
from cassle_jax.training.start_records import last_start_record, record_start
from cassle_jax.training.start_warnings import late_warnings, omega_warnings
from cassle_jax.training.state import TrainState
from cassle_jax.training.step import make_train_step
from cassle_jax.training.stopping import StopRequest
from cassle_jax.training.trackers import Tracking
from cassle_jax.training.warm_start import warm_started
from cassle_jax.training.window import Window
from cassle_jax.training.workdir import check_seen, known_path, workdir_held, written

# Steps the host may be ahead of the devices: enough to hide its work, few enough to stop quickly.
STEPS_AHEAD = 2
# How long to wait for a full disk where giving up loses steps: at the end of a run, and after a
# request to stop, which a kill soon follows.
LAST_SAVE_SECONDS = 600.0
STOPPING_SAVE_SECONDS = 30.0

LOG = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss or the update of a step was not finite."""


class Preempted(RuntimeError):
    """The run received a request to stop; its state is saved."""


def pretrain(
    config: ConfigDict, workdir: epath.PathLike, *, accept_changes: bool = False
) -> TrainState:
    """Pretrains, or continues from the workdir's newest checkpoint.

    Args:
      config: a configuration, as from `base_config`.
      workdir: a folder for checkpoints, metrics, the configuration and the contact sheet; local or
        on an object store (gs://, s3://).
      accept_changes: continues a run with changed settings or images, where that is possible.

    Returns:
      The state after the last step.

    Raises:
      ConfigError, DataError: a setting that cannot work, before anything costly starts.
      Diverged: the loss or the update was not finite; the message names the step.
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
      NotSaved: the final checkpoint could not be written.
      Outage: storage did not come back in time; one process has saved what it could.
    """
    workdir = known_path(workdir)
    mesh = device_mesh()
    check_settings(config, mesh.size)
    source = open_source(config.data, config.data.train_split)
    agree({**shared_settings(config), "the number of training images": len(source)})
    run = build_run(config, mesh, len(source))
    probe = OnlineProbe(config, run, mesh) if config.probe.every_epochs else None
    for each in (source, *(probe.sources if probe else ())):
        check_outside("workdir", workdir, each)
    with StopRequest() as stop, contextlib.ExitStack() as opened:
        changes = _take_workdir(config, workdir, accept_changes, opened)
        checkpoints = _open_checkpoints(config, workdir, opened)
        state, data_state = _newest_state(checkpoints, config, run, mesh)
        step = int(state.step)
        if data_state is not None:
            data_state, changed = _continued_images(
                data_state, source, workdir, step, accept_changes
            )
            changes += changed
        agree({"the step it continues from": step})
        _log_start(run, mesh, len(source), step, continues=data_state is not None)
        feed = _open_feed(config, workdir, run, mesh, source, data_state, opened)
        reports = None
        if jax.process_index() == 0:
            start = {"step": step, "images": len(source), "mesh": mesh, "changes": changes}
            start |= {"names": names_of(source), "record": record_of(run)}
            _record_start(config, workdir, run, source, start)
            reports = _open_reports(config, workdir, run, start, opened)
        agree({})  # the first process has drawn the picture
        loop = _Loop(
            config, run, probe, checkpoints, feed, make_train_step(run, mesh), reports,
            state, step, data_state,
        )  # fmt: skip
        return loop.train(stop)


class _Reports(NamedTuple):
    """The reports of a run's metrics, in its first process.

    Attributes:
      writer: writes and sends them.
      progress: shows them on the terminal.
      mend_workdir: creates the workdir again if it was deleted meanwhile.
    """

    writer: MetricsWriter
    progress: ProgressReport
    mend_workdir: Callable[[], None]


@dataclasses.dataclass
class _Loop:
    """One run in progress; `train` runs all its steps."""

    config: ConfigDict
    run: Run
    probe: OnlineProbe | None
    checkpoints: Checkpoints
    feed: Feed
    train_step: Callable
    reports: _Reports | None
    state: TrainState
    step: int
    data_state: dict | None

    def __post_init__(self):
        self.total = self.run.clock.total_steps
        self.window = Window(self.feed, self.run.batch_size, self.config.log.every_steps)

    def train(self, stop: StopRequest) -> TrainState:
        """Runs to the last step, or saves and raises `Preempted` after a request to stop."""
        begun_at = self.step
        try:
            return self._steps(stop)
        except (DataError, Outage) as error:
            if self.step > begun_at:
                self._save_alone(error)
            raise

    def _save_alone(self, error: DataError | Outage) -> None:
        """Saves in this process, while the others wait at their next step.

        If several processes fail, the first one saves, and then ends the others. A process ahead of
        the others has no state to save: its last step waits for theirs.
        """
        if jax.process_count() > 1:
            seconds = STOPPING_SAVE_SECONDS if hurry.is_set() else LAST_SAVE_SECONDS
            until = time.monotonic() + seconds
            while not self.state.step.is_ready() and time.monotonic() < until:
                time.sleep(0.1)
            if not self.state.step.is_ready():
                return
        if not is_first_to("save"):
            time.sleep(LAST_SAVE_SECONDS)  # the first one ends this process
            return
        try:
            self.checkpoints.take_over()
            self._save_surely(STOPPING_SAVE_SECONDS)
        except NotSaved as unsaved:
            raise NotSaved(f"{error}; {unsaved}") from unsaved.__cause__

    def _steps(self, stop: StopRequest) -> TrainState:
        in_flight: deque = deque()
        self.window.start()
        self._catch_up()
        while self.step < self.total:
            if stop.agreed(self.step):
                raise Preempted(f"stopped before step {self.step + 1}; nothing new to save")
            batch, self.data_state = next(self.feed)
            self.state, metrics = self.train_step(self.state, batch)
            self.step += 1
            self.window.add(metrics)
            in_flight.append(metrics["loss"])
            if len(in_flight) > STEPS_AHEAD:
                in_flight.popleft().block_until_ready()
            self._after_step(stop)
            if stop.agreed(self.step) and self.step < self.total:
                self._save_surely(STOPPING_SAVE_SECONDS)
                raise Preempted(f"stopped after step {self.step}, which is saved")
        return self.state

    def _catch_up(self) -> None:
        """Runs the probe of the step that the run continues from, if a kill cut it short."""
        if not self.probe or not self.step or not self._is_probed:
            return
        lacking = self.reports is None or MEASURED not in self.reports.writer.measured
        if in_all_processes(lacking):  # the first process decides
            with self.window.paused():
                self._report(self._probed())

    def _after_step(self, stop: StopRequest) -> None:
        config, last = self.config, self.step == self.total
        saves = config.checkpoint
        if self._is_due(config.log.every_steps) or last:
            self._check_finite()
            self._report(self.window.summary())
        if self.reports:
            self.reports.progress.advance(self.step)
        # Saving comes first: a failure of the probe then costs none of these steps.
        if last:
            self._save_surely(LAST_SAVE_SECONDS)
        elif any(map(self._is_due, (saves.every_steps, saves.keep_every_steps))):
            self._check_finite()
            self._mend_workdir()
            self.checkpoints.save(self.step, self.state, self.data_state)
        elif self._is_due(config.log.every_steps):
            self.checkpoints.poll()
        # A request to stop leaves only seconds: then there is no probe.
        if self.probe and self._is_probed and (last or not stop.agreed(self.step)):
            self._check_finite()
            with self.window.paused():
                self._report(self._probed())

    def _probed(self) -> dict[str, float]:
        """The probe's measurements; empty, with one line in the log, where it fails."""
        measured = {}
        try:
            measured = self.probe(self.state)
        except Exception as error:
            LOG.warning(
                "the probe of step %d failed; the run continues: %s: %s",
                self.step,
                type(error).__name__,
                first_line(error),
            )
        # If it failed in this process alone, the others are still inside the probe: wait for them.
        all_arrive(f"after the probe of step {self.step}")
        return measured

    def _report(self, measured: dict[str, float]) -> None:
        if measured and self.reports:
            self.reports.writer.write(self.step, measured)
            left = self.window.seconds * (self.total - self.step)
            self.reports.progress.report(self.step, measured, left)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    @property
    def _is_probed(self) -> bool:
        every = self.config.probe.every_epochs * self.run.clock.steps_per_epoch
        return self.step == self.total or self._is_due(every)

    def _check_finite(self) -> None:
        diverged_at = int(self.state.diverged_at)
        if diverged_at >= 0:
            raise Diverged(
                f"the loss or the update of step {diverged_at + 1} is not finite; the newest good "
                f"checkpoint is {self.checkpoints.newest() or 'none'}. A smaller "
                "optimizer.base_learning_rate (now "
                f"{self.config.optimizer.base_learning_rate}) or dtype=float32 usually helps"
            )

    def _mend_workdir(self) -> None:
        if self.reports:
            self.reports.mend_workdir()

    def _save_surely(self, seconds: float) -> None:
        self._check_finite()
        self._mend_workdir()
        self.checkpoints.save_surely(
            self.step,
            self.state,
            self.data_state,
            seconds=seconds,
            after_stop=STOPPING_SAVE_SECONDS,
        )


def _take_workdir(
    config: ConfigDict, workdir: epath.Path, accept_changes: bool, opened: contextlib.ExitStack
) -> list[str]:
    """Makes the workdir, holds it for this run, and returns the changed settings.

    The first process does so; the others wait for it, and return no changes.
    """
    changes: list[str] = []
    if jax.process_index() == 0:
        opened.enter_context(workdir_held(workdir, "run"))
        changes = written(
            workdir, lambda: check_unchanged(config, workdir, accept_changes=accept_changes)
        )
        # A run with checkpoints keeps its settings until the checkpoints have proved to fit.
        written(workdir, lambda: holds_run(workdir) or write_config(config, workdir))
    agree({})  # the others continue when the first process has made it
    check_seen(workdir)
    return changes


def _open_checkpoints(
    config: ConfigDict, workdir: epath.Path, opened: contextlib.ExitStack
) -> Checkpoints:
    kept = {"keep": config.checkpoint.keep, "keep_every_steps": config.checkpoint.keep_every_steps}
    checkpoints = written(workdir, lambda: Checkpoints(workdir, **kept))
    opened.callback(checkpoints.close)
    return checkpoints


def _newest_state(
    checkpoints: Checkpoints, config: ConfigDict, run: Run, mesh: Mesh
) -> tuple[TrainState, dict | None]:
    """The newest checkpoint's state and place in the images; a new run's state, and `None`."""
    state = on_every_device(run.initial_state, mesh, run.seed_words)
    restored = checkpoints.restore(state)
    if restored:
        return restored
    encoder = run.networks.factories["encoder"]()
    stage = run.networks.stage
    started = warm_started(state, config.weights, encoder, stage, run.conditioning, run.optimizer)
    return started, None


def _continued_images(
    data_state: dict, source: Source, workdir: epath.Path, step: int, accept_changes: bool
) -> tuple[dict, list[str]]:
    """The place in a dataset that may have lost or gained images, and the change.

    Raises:
      DataError: as many files were lost as gained, and that is not accepted; the feed refuses
        another number.
    """
    images, before = len(source), data_state["length"]
    if accept_changes:
        data_state = {**data_state, "length": images}
    if images != before:
        return data_state, [f"{images} training images were {before}"]
    known = last_start_record(workdir, step).get("names") if jax.process_index() == 0 else None
    if known in (None, names_of(source)):  # older versions did not record it
        return data_state, []
    if not accept_changes:
        raise DataError(
            f"{source.name}: its {images} images have other names than those that the run was "
            "started with; restore them, or use --accept_changes to continue with these"
        )
    return data_state, [f"{images} training images have other names"]


def _log_start(run: Run, mesh: Mesh, images: int, step: int, *, continues: bool) -> None:
    total = run.clock.total_steps
    if continues:
        LOG.info("%s at step %d of %d", "continuing" if step < total else "finished", step, total)
    LOG.info(
        "%d images, %d steps to an epoch, batches of %d on %d %s device(s) of %d process(es)",
        images,
        run.clock.steps_per_epoch,
        run.batch_size,
        mesh.size,
        mesh.devices.flat[0].device_kind,
        jax.process_count(),
    )


def _open_feed(
    config: ConfigDict,
    workdir: epath.Path,
    run: Run,
    mesh: Mesh,
    source: Source,
    data_state: dict | None,
    opened: contextlib.ExitStack,
) -> Feed:
    """Opens the training batches at their place in the images."""

    def damaged_log() -> DamagedLog:
        folder, index = workdir / "damaged", jax.process_index()
        return DamagedLog(len(source), config.data.max_bad_fraction, folder, process_index=index)

    feed = open_feed(
        config.data,
        source,
        mesh,
        batch=run.batch_size,
        seed=run.seed,
        damaged=written(workdir, damaged_log),
        state=data_state,
    )
    opened.callback(hurry.clear)
    opened.callback(feed.close)
    opened.callback(hurry.set)  # closing need not wait for the images being read
    return feed


def _record_start(
    config: ConfigDict, workdir: epath.Path, run: Run, source: Source, start: Mapping[str, Any]
) -> None:
    """Writes the settings, the facts of this start, and what the network of a new run sees."""
    if start["changes"]:
        LOG.warning("continuing with changed settings: %s", "; ".join(start["changes"]))
    written(workdir, lambda: write_config(config, workdir))
    written(workdir, lambda: record_start(workdir, **start))
    if start["step"] == 0:
        for line in (*omega_warnings(run), *late_warnings(run)):
            LOG.warning("%s", line)
        views = workdir / "views.png"
        written(workdir, lambda: write_contact_sheet(run, source, config.data, views))
        LOG.info("what the network sees is in %s; compiling", views)


def _open_reports(
    config: ConfigDict,
    workdir: epath.Path,
    run: Run,
    start: Mapping[str, Any],
    opened: contextlib.ExitStack,
) -> _Reports:
    writer = written(workdir, lambda: MetricsWriter(workdir, start["step"]))
    opened.callback(writer.close)
    for name in config.log.to:
        writer.add(Tracking(name, workdir, flat_settings(config)))
    progress = ProgressReport(run.clock.total_steps, start["step"])
    opened.callback(progress.close)
    return _Reports(writer, progress, partial(_mend_workdir, config, workdir, start, opened))


def _mend_workdir(
    config: ConfigDict, workdir: epath.Path, start: Mapping[str, Any], opened: contextlib.ExitStack
) -> None:
    """Creates a deleted workdir again, with the run's records; its checkpoints are lost."""
    try:
        if is_there(workdir / "config.json"):
            return
        make_shared(workdir)
        LOG.warning("workdir=%s was deleted; the run continues and creates it again", workdir)
        with contextlib.suppress(ConfigError):  # this run still holds it
            opened.enter_context(folder_held(workdir, waits=False))
        write_config(config, workdir)
        record_start(workdir, **start)
    except OSError as error:
        LOG.warning("workdir=%s cannot be written: %s", workdir, reason_of(error))
