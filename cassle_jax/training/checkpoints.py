"""Asynchronous Orbax checkpoints: everything a run needs to continue as if never interrupted."""

import contextlib
import logging
import re
import time
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from cassle_jax.checks import ConfigError, first_line
from cassle_jax.distributed import first_says
from cassle_jax.faults import Outage, hurry, retried
from cassle_jax.parallel import in_all_processes
from cassle_jax.storage import (
    absolute,
    check_writable,
    free_bytes,
    free_files,
    make_shared,
    on_object_store,
    share,
)
from cassle_jax.training.checkpoint_reading import check_shapes, verified_checkpoint
from cassle_jax.training.checksums import checksums
from cassle_jax.training.quiet_orbax import abandoned_reads_silenced, orbax_logs_errors_once
from cassle_jax.training.read_back import ReadBack
from cassle_jax.training.state import TrainState
from cassle_jax.training.whole_arrays import led_from_here, on_one_device, whole_arrays

RETRY_SECONDS = 5.0
WRITING_SECONDS = 30.0
_FEW_FILES = 1000  # more than a checkpoint has

LOG = logging.getLogger(__name__)


class NotSaved(RuntimeError):
    """The final checkpoint of a run could not be written."""


class Checkpoints:
    """The checkpoints of one run, in `<workdir>/checkpoints/<step>`.

    A checkpoint holds the training state, its keys, the data iterator's state, and checksums. It
    gets its final name only when it is complete, and older ones are deleted only after that. So the
    last complete one survives a kill at any moment, or a full disk. The first one is read back in
    the background, so that a run that cannot be continued reports it early.

    The first of several processes saves. Every device has the whole state, so it need not wait for
    a process whose disk fails. All processes restore.

    Args:
      workdir: workdir of the run.
      keep: number of newest checkpoints to keep.
      keep_every_steps: also keeps every checkpoint at a multiple of this step; 0 for none.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int, keep_every_steps: int = 0):
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        self._preserve = checkpoint_managers.AnyPreservationPolicy(policies)
        self._folder = absolute(workdir) / "checkpoints"
        self._trouble, self._warned = "", False  # about the newest save, if it failed
        self._failures = 0
        self._saving: int | None = None
        self._is_open = False
        self._cause: Exception | None = None  # the error behind `_trouble`
        self._read_back: ReadBack | None = None
        self._unread: ReadBack | None = None  # the newest one from which no run can continue
        self._readable = False
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(abandoned_reads_silenced())
        self._quiet.enter_context(orbax_logs_errors_once())
        self._leads = self._is_first = jax.process_index() == 0
        if self._leads:
            self._open()
            if not on_object_store(self._folder):
                # The folder may be another user's, which the first save would report late.
                check_writable("workdir", self._folder)

    def take_over(self) -> None:
        """Saves from this process from now on; the others wait for its next step."""
        if not self._leads:
            self._await_writers()
            self._leads = True
            self._open()

    def _await_writers(self) -> None:
        """Waits, for a time, while the first process writes: opening deletes incomplete saves."""
        until = time.monotonic() + WRITING_SECONDS
        while any(self._folder.glob("*.orbax-checkpoint-tmp*")) and time.monotonic() < until:
            time.sleep(0.1)

    def _open(self) -> None:
        """Makes the manager, which reads the folder's contents and deletes incomplete saves."""
        make_shared(self._folder)
        this = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._preserve,
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=alone,
                # Where a folder cannot be made, as without inodes, its writers would wait for it
                # for ten minutes each, and the process for them.
                async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            ),
            item_handlers={
                "state": whole_arrays(alone),
                "data": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            },
        )
        # Orbax would query a checkpoint's step from its own thread, which JAX takes for the step of
        # this process; see `StopRequest.agreed`.
        self._manager.reached_preemption = lambda _: False
        self._is_open = True

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Saves in the background; the state may be donated as soon as this returns.

        A failed write, as on a full disk, does not end the run: it logs one line, and the next
        checkpoint tries again.
        """
        if self._leads:
            self._settle()
            self._warn_once()
            self._try(step, state, data_state)
            self._warn_once()

    def save_surely(
        self,
        step: int,
        state: TrainState,
        data_state: dict[str, Any],
        *,
        seconds: float,
        after_stop: float,
    ) -> None:
        """Saves and waits until it is complete; retries for up to `seconds` where that fails.

        After a request to stop, `after_stop` seconds are left at most. All processes must call
        this, and wait for the first one; one that took over calls it alone.

        Raises:
          NotSaved: the checkpoint could not be written.
        """
        left, warned = seconds, False
        while self._leads and not self._is_saved(step, state, data_state):
            left = min(left, after_stop) if hurry.is_set() else left
            if left <= 0:
                again = "so the same command starts from step 0"
                goes_on = again if self._newest() is None else "where the same command continues"
                raise NotSaved(
                    f"step {step} could not be saved: {self._trouble}; {self._newest_named()}, "
                    f"{goes_on}"
                ) from self._cause
            if not warned:
                LOG.warning(
                    "step %d would be lost: %s; saving is tried again for %.0f s",
                    step,
                    self._trouble,
                    left,
                )
            warned = True
            time.sleep(RETRY_SECONDS)
            left -= RETRY_SECONDS
        if self._is_first or not self._leads:
            first_says(step)  # the others wait until it is saved

    def _is_saved(self, step: int, state: TrainState, data_state: dict[str, Any]) -> bool:
        """Saves, and returns whether the checkpoint is complete.

        Raises:
          NotSaved: it is complete, and neither it nor any before it can be read back.
        """
        self._try(step, state, data_state)
        self._settle()
        if step not in self._manager.all_steps():
            return False
        self._check_read_back(wait=not hurry.is_set())
        # Where the process must end, reading may go on, or have lost its checkpoint to this one.
        if self._unread and not self._readable and self._read_back is None:
            raise NotSaved(f"{_said_of(self._unread)}, nor could any before it") from (
                self._unread.cause
            )
        return True

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The state and data state of the newest readable checkpoint; `None` without checkpoints.

        Args:
          like: a state of the same run, for shapes and placement.

        Raises:
          ConfigError: there are checkpoints and none is readable, or they belong to other networks
            or another optimizer.
          Outage: none could be read for now.
        """
        # Another host may not see the newest one yet; all must try the same ones in turn.
        steps = first_says(sorted(self._manager.all_steps(), reverse=True) if self._leads else [])
        outage: Outage | None = None

        def read(step: int) -> tuple[TrainState, dict[str, Any]]:
            folder = self._folder / str(step)
            check_shapes(folder, like)
            return verified_checkpoint(folder, like)

        for step in steps:
            restored = None
            try:
                # Wait for the newest; an older one distinguishes a damaged file from a lost disk.
                seconds = 0.0 if outage else None
                restored = retried(f"checkpoint {step}", partial(read, step), seconds=seconds)
            except ConfigError:
                raise
            except Exception as error:  # Orbax and TensorStore raise any type, by the damage.
                LOG.warning(
                    "checkpoint %d cannot be read, trying the one before: %s",
                    step,
                    first_line(error),
                )
                if isinstance(error, Outage):
                    outage = outage or error
            if in_all_processes(restored is not None):
                self._readable = True
                if self._leads:
                    self._set_aside_after(step)
                return restored
        if outage:
            raise outage
        if steps:
            raise ConfigError(
                f"workdir={self._folder.parent} has checkpoints, and none of them can be read; "
                "move them away to start again"
            )
        return None

    def poll(self) -> None:
        """Logs the failure of a background save that has ended by now; does not wait."""
        if not self._leads:
            return
        if not self._manager.is_saving_in_progress():
            self._settle()
            self._warn_once()
        self._check_read_back()

    def close(self) -> None:
        """Waits for the current save."""
        if self._leads:
            self._settle()
            self._warn_once()
            self._check_read_back(wait=True)
            self._manager.close()
        if not self._failures:
            self._quiet.close()  # writes of a failed save may end later

    def newest(self) -> int | None:
        """The newest complete checkpoint's step, or `None`.

        All processes must call this; one that took over calls it alone.
        """
        newest = self._newest() if self._leads else None
        return newest if self._leads and not self._is_first else first_says(newest)

    def _newest(self) -> int | None:
        complete = (each for each in self._manager.all_steps() if each != self._saving)
        return max(complete, default=None)

    def _try(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        self._settle()
        self._check_read_back(wait=not hurry.is_set())
        saved = step in self._manager.all_steps()
        unread = not self._readable and self._read_back is None
        if saved and not unread:
            return
        data = {**data_state, "checksums": checksums(on_one_device(state), data_state)}
        if unread:
            self._read_back = ReadBack(self._folder / str(step), state, data)
        if saved:
            self._begin_read_back()
            return
        self._saving = step
        try:
            make_shared(self._folder)  # Orbax would, also where its file system is gone
            if not self._is_open:
                self._open()
            self._check_room(state)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(led_from_here(state)), data=ocp.args.JsonSave(data)
                ),
                force=True,
            )
        except Exception as error:  # Orbax and TensorStore raise any type, by the disk's fault.
            self._failed(error)

    def _settle(self) -> None:
        """Waits for the current save, and records how it ended."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return
        if self._trouble:
            LOG.warning("checkpoint %d is saved", self._saving)
        share(self._folder / str(self._saving))  # another user's run deletes it
        self._saving, self._trouble, self._warned = None, "", False
        self._begin_read_back()

    def _begin_read_back(self) -> None:
        if self._read_back and not self._read_back.started:
            self._read_back.start()

    def _check_read_back(self, *, wait: bool = False) -> None:
        """Records how reading the first checkpoint back ended; logs a failure."""
        read_back = self._read_back
        if read_back is None or not read_back.ended(wait=wait):
            return
        self._read_back, self._readable = None, read_back.problem is None
        replaced = read_back.step not in self._manager.all_steps()
        hurried = hurry.is_set() and isinstance(read_back.cause, Outage)
        if read_back.problem and not replaced and not hurried:
            self._unread = read_back
            LOG.warning("%s; the run could not continue from it", _said_of(read_back))

    def _check_room(self, state: TrainState) -> None:
        """Raises _NoRoom where a checkpoint of `state` cannot fit."""
        free, needed = free_bytes(self._folder), _bytes(state)
        if free is not None and free < needed:
            raise _NoRoom(f"{self._folder} has {_mb(free)} free, and it takes up to {_mb(needed)}")

    def _failed(self, error: Exception) -> None:
        step, self._saving, self._read_back = self._saving, None, None
        self._failures, self._cause = self._failures + 1, error
        if isinstance(error, _NoRoom):
            self._trouble = f"checkpoint {step} is not saved: {error}"
            return
        where = f"{self._folder}{_room(self._folder)}"
        self._trouble = f"checkpoint {step} is not saved: {where}: {_reason(error)}"
        # A failed save leaves files, and a manager that has forgotten the checkpoints to replace.
        self._is_open = False
        for mend in (self._manager.close, self._drop_incomplete, self._open):
            with contextlib.suppress(Exception):  # the next save reports what is still wrong
                mend()

    def _drop_incomplete(self) -> None:
        """Deletes the files of a failed save; its pending writes recreate them for a while."""
        gone = 0
        for _ in range(40):
            incomplete = list(self._folder.glob("*.orbax-checkpoint-tmp*"))
            gone = 0 if incomplete else gone + 1
            if gone == 5:
                return
            for folder in incomplete:
                with contextlib.suppress(OSError):
                    folder.rmtree()
            time.sleep(0.05)

    def _warn_once(self) -> None:
        if self._trouble and not self._warned:
            LOG.warning(
                "%s; training continues and tries again at the next checkpoint; %s",
                self._trouble,
                self._newest_named(),
            )
            self._warned = True

    def _newest_named(self) -> str:
        newest = self._newest()
        return "none is saved yet" if newest is None else f"the newest saved is {newest}"

    def _set_aside_after(self, step: int) -> None:
        """Moves the unreadable checkpoints away, so that their steps are saved again.

        They are not deleted: the network or memory may be at fault.
        """
        unread = [each for each in self._manager.all_steps() if each > step]
        if not unread:
            return
        aside = self._folder.parent / "unreadable"
        make_shared(aside)
        for each in unread:
            (self._folder / str(each)).rename(aside / f"{each}-{time.time_ns()}")
        LOG.warning("what could not be read is kept in %s", aside)
        self._manager.reload()


class _NoRoom(OSError):
    """A checkpoint was not even started."""


def _said_of(read_back: ReadBack) -> str:
    return f"checkpoint {read_back.step} cannot be read back: {read_back.problem}"


def _bytes(state: TrainState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _room(folder: epath.Path) -> str:
    """The free space, in words; the number of free files only where that may be short."""
    free, files = free_bytes(folder), free_files(folder)
    if free is None:
        return ""
    few = f" and {files} inodes" if files is not None and files < _FEW_FILES else ""
    return f" ({_mb(free)}{few} free)"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 100_000 else f"{size / 1e3:,.1f} kB"


def _reason(error: Exception) -> str:
    """The operating system's message, from the middle of TensorStore's."""
    found = re.search(r"([^:]+) \[os_error_code", str(error))
    return getattr(error, "strerror", None) or (found[1].strip() if found else first_line(error))
