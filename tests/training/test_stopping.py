"""What a run does around its steps: it stops on request, and says what it cannot write."""

import contextlib
import errno
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from etils import epath
from ml_collections import ConfigDict

from cassle_jax.checks import ConfigError
from cassle_jax.faults import Outage
from cassle_jax.training import loop, workdir
from cassle_jax.training.checkpoints import NotSaved
from cassle_jax.training.loop import Preempted
from cassle_jax.training.saved_config import check_unchanged
from cassle_jax.training.stopping import StopRequest
from tests.tiny import tiny_config


@pytest.fixture
def ctrl_c():
    """As in a command; the processes that tests share do not hear it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_first_ctrl_c_requests_a_stop_and_a_second_one_ends(ctrl_c):
    with StopRequest() as stop:
        assert not stop.agreed(3)
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed(3)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_with_several_processes_ctrl_c_is_the_signal_that_jax_passes_on(monkeypatch):
    sent = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_closed_terminal_is_a_request_except_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with StopRequest() as stop:
                if signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:  # else it ends these tests
                    signal.raise_signal(signal.SIGHUP)
                assert stop.agreed(3) is stops
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_before_the_first_step_has_nothing_to_save():
    begun = SimpleNamespace(
        window=SimpleNamespace(start=lambda: None), _catch_up=lambda: None, step=4, total=9
    )
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted, match=r"^stopped before step 5; nothing new to save$"):
            loop._Loop._steps(begun, stop)


def test_an_outage_and_a_step_that_cannot_be_saved_are_said_together():
    def full(_):
        raise NotSaved("step 7 could not be saved") from OSError(errno.ENOSPC, "No space left")

    stopped = SimpleNamespace(
        checkpoints=SimpleNamespace(take_over=lambda: None), _save_surely=full
    )
    with pytest.raises(NotSaved, match=r"^the images are gone; step 7 could not be saved$") as both:
        loop._Loop._save_alone(stopped, Outage("the images are gone"))
    assert both.value.__cause__.errno == errno.ENOSPC


def test_a_workdir_that_cannot_be_looked_at_is_a_line_and_ends_nothing(
    tmp_path, monkeypatch, caplog
):
    def refused(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(loop, "is_there", refused)
    with contextlib.ExitStack() as opened:
        loop._mend_workdir(ConfigDict(), epath.Path(tmp_path), {}, opened)
    assert f"workdir={tmp_path} cannot be written: Permission denied" in caplog.text


def test_processes_that_see_other_folders_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "SHARED_FOLDER_SECONDS", 0)
    with pytest.raises(ConfigError, match=r"is not the folder that process 0 writes: .*config"):
        workdir.check_seen(epath.Path(tmp_path))
    monkeypatch.setattr(workdir, "SHARED_FOLDER_SECONDS", 60)
    threading.Timer(0.1, (tmp_path / "config.json").touch).start()
    workdir.check_seen(epath.Path(tmp_path))
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_a_run_whose_settings_are_damaged_is_not_continued(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^workdir=.* has a config\.json that is damaged"):
        check_unchanged(tiny_config("method=simclr"), epath.Path(tmp_path))
