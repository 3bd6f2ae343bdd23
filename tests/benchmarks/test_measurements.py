"""Every measurement runs, at sizes too small to compare, and the command says what is wrong."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import __main__ as command_line
from benchmarks import (
    augmentation,
    first_step,
    input_pipeline,
    limits,
    memory,
    prepared,
    training,
)
from benchmarks.contest import Row
from benchmarks.isolated import run_isolated
from benchmarks.rivals import published, stable_pretraining
from benchmarks.workload import Workload, draw_jpegs
from cassle_jax.checks import ConfigError
from cassle_jax.models import ENCODERS
from cassle_jax.parallel import device_mesh
from tests.commands import run_command
from tests.shared_programs import share_programs
from tests.tiny import TinyEncoder, cropped_only

ROOT = Path(__file__).parents[2]


class TinyWorkload(Workload):
    """A workload of views that compile in seconds."""

    def config(self, arguments, **overrides):
        config = super().config(arguments, **overrides)
        cropped_only(config)
        config.conditioning.depth = 2
        return config


TINY = TinyWorkload(
    encoder="tiny", size=16, batch=8, dtype="float32", views_size=16, views_batch=8, canvas=24,
    steps=1, rounds=1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _programs_of_measurements():
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch, training)
        yield


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A tiny workload on one device of this process, with a few small files."""
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)
    monkeypatch.setattr(training, "SMALL_IMAGES", 64)
    monkeypatch.setattr(limits, "_CALLS", 1)
    for module in (augmentation, training, memory, limits):
        monkeypatch.setattr(module, "device_mesh", lambda *_: device_mesh(jax.devices()[:1]))
    for module in (command_line, limits, memory):
        monkeypatch.setattr(module, "run_isolated", here)
    return dataclasses.replace(TINY, jpegs=draw_jpegs(tmp_path, 16))


def here(function, *arguments, seconds=0):
    """As `run_isolated`, without the seconds a process takes to start."""
    try:
        return function(*arguments)
    except Exception as error:
        raise RuntimeError(str(error)) from error


def ours(rows):
    """Rows but those of rivals, which may not be installed; none has failed."""
    assert not [row.note for row in rows if row.failed]
    return [row for row in rows if row.values]


@pytest.mark.exhaustive
def test_augmentation_and_input(work):
    (row, *_) = ours(augmentation.measure(work))
    assert row.unit == "views/s" and row.values[0] > 0
    (row, *_) = ours(input_pipeline.measure(work))
    assert row.unit == "images/s and CPU" and row.values[0] > 0


def test_prepared_images_decode_faster_and_show_almost_the_same(work):
    rows = ours(prepared.measure(dataclasses.replace(work, views_size=28)))
    small, _, _, originals = (row for row in rows if row.measurement == "decoding")
    assert small.values[0] > originals.values[0] and originals.ratio > 1
    differences = [row.values for row in rows if row.name == "mean difference"]
    assert [len(values) for values in differences] == [16, 16, 16]
    assert 0 < max(map(max, differences)) < 20
    assert [row.name for row in rows if "kept" in row.name][::3] == ["100% kept", "0% kept"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("measure", [training.whole_run, training.resident])
def test_a_run_beside_synthetic_data(work, measure):
    fed, *others, synthetic = ours(measure(work))
    assert fed.values[0] > 0 and synthetic.ratio == fed.values[0] / synthetic.values[0]
    assert len(others) == (2 if measure is training.whole_run else 0)


def test_each_way_to_feed_a_whole_run_is_its_own(work, monkeypatch):
    monkeypatch.setattr(training, "_beside_synthetic", lambda name, work, ways: ways)
    decoded, half, prepared = (config.data for config in training.whole_run(work).values())
    assert [each.source for each in (decoded, half, prepared)] == ["folder", "folder", "tfds"]
    assert decoded.cache_gib == prepared.cache_gib == 0
    assert half.cache_gib * 2**30 == len(work.jpegs) / 2 * 3 * half.canvas**2


@pytest.mark.exhaustive
def test_conditioning_is_measured_against_the_plain_method(work):
    plain, cassle, again = ours(training.conditioning(work))
    assert len(plain.values) == 3 and cassle.ratio and again.ratio


@pytest.mark.exhaustive
def test_memory_and_limits(work):
    batch, large, recomputed, chunked = ours(memory.measure(work))
    assert batch.values < large.values
    assert chunked.values < large.values and recomputed.values
    rows = {row.name: row for row in ours(limits.measure(work))}
    assert rows["augmentation alone as a share of it"].values[0] > 0
    share = rows["roofline time as a share of a step"].values[0]
    assert share == pytest.approx(rows["roofline time"].values[0] / rows["a step"].values[0])


@pytest.mark.pytorch
def test_the_published_step_runs(work):
    import torch

    pytest.importorskip("torchvision")
    pytest.importorskip("kornia")
    torch.manual_seed(0)
    published.step(dataclasses.replace(work, encoder="resnet18", size=32), tuned=False)()


@pytest.mark.pytorch
def test_a_blur_by_rows_and_columns_is_the_published_one():
    import torch

    pytest.importorskip("kornia")
    images = torch.rand(4, 3, 40, 40)
    blurred = []
    for separable in (False, True):
        torch.manual_seed(0)
        blurred.append(published.random_blur(40, separable=separable)(images))
    assert not torch.equal(blurred[0], images)
    torch.testing.assert_close(*blurred)


def test_the_other_jax_step_runs(work):
    pytest.importorskip("stable_pretraining")
    stable_pretraining.step(dataclasses.replace(work, encoder="resnet18", size=32))()


@pytest.mark.exhaustive
def test_a_measurement_that_fails_is_a_row_and_the_next_one_runs(work, monkeypatch, capsys):
    def too_large(work):
        raise MemoryError("no room for it")

    monkeypatch.setitem(command_line.MEASUREMENTS, "step", too_large)
    (_, failed), (_, (row, *_)) = command_line.measured(["step", "input"], work)
    assert failed[0].failed and failed[0].note == "no room for it"
    assert row.values and "no room for it" in capsys.readouterr().out


def test_a_call_that_ends_keeps_what_is_measured_and_starts_the_rest_anew(work, monkeypatch):
    now = [0.0]

    def takes(seconds):
        def measure(work):
            now[0] += seconds
            if now[0] > 100:
                raise TimeoutError("cut off")
            return [Row("it", "ours", "images/s", (1.0,))]

        return measure

    def names(*of):
        now[0] = 0.0
        found = command_line.measured(of, work, until=100, clock=lambda: now[0])
        return [name for name, _ in found]

    for name, seconds in {"step": 60, "input": 60, "run": 120, "linear": 1}.items():
        monkeypatch.setitem(command_line.MEASUREMENTS, name, takes(seconds))
    assert names("step", "input", "linear") == ["step"]
    assert names("input", "linear") == ["input", "linear"]
    assert names("run", "linear") == ["run"], "it fails: no call is long enough"


def test_a_file_is_continued_on_the_same_machine_alone(tmp_path):
    path, row = tmp_path / "all.json", Row("step, MoCo-v2", "ours", "images/s", (1.0, 2.0))
    about = {"about": {"device": "cpu", "versions": {"jax": "1"}}, "workload": {"batch": 8}}
    assert command_line.earlier(path, about) == {}
    command_line.write(path, about, {"step": [row], "input": []})
    assert command_line.earlier(path, about) == {"step": [row]}
    other = about | {"workload": {"batch": 16}}
    with pytest.raises(ConfigError, match="batch=8; this call has batch=16; use another file"):
        command_line.earlier(path, other)


def test_what_failed_is_measured_again_after_what_is_missing():
    good, bad = Row("it", "ours", "images/s", (1.0,)), Row("it", "theirs", "", failed=True)
    absent = Row("it", "theirs", "", note="not installed")
    found = {"step": [good, bad], "input": [good, absent], "run": [], "linear": [bad]}
    assert command_line.to_measure(["step", "input", "run", "vit"], found) == ["vit", "step"]


def test_a_file_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    path, about = tmp_path / "all.json", {"about": {}, "workload": {}}
    command_line.write(path, about, {"step": [Row("step", "ours", "images/s", (1.0,))]})
    for name in ("of", "failed"):
        written = json.loads(path.read_text())
        del written["rows"][0][name]
        (older := tmp_path / f"{name}.json").write_text(json.dumps(written))
        with pytest.raises(ConfigError, match=f"rows without '{name}', .*; use another file$"):
            command_line.earlier(older, about)


def test_a_batch_that_does_not_fit_hides_no_other(work, monkeypatch):
    def fits(config):
        if config.encoder.remat:
            raise MemoryError("no room")
        return 2**30

    monkeypatch.setattr(memory, "compiled_bytes", fits)
    rows = memory.measure(work)
    assert [row.values for row in rows] == [(1.0,), (1.0,), (), (1.0,)]
    assert [row.failed for row in rows] == [False, False, True, False]


def test_an_isolated_function_ends_with_its_result_or_with_one_error():
    assert run_isolated(os.getpid) != os.getpid()
    with pytest.raises(RuntimeError, match=r"^ValueError: invalid literal .*'seven'$"):
        run_isolated(int, "seven")
    with pytest.raises(RuntimeError, match="the process ended with -9"):
        run_isolated(os.system, "kill -KILL $PPID")
    with pytest.raises(RuntimeError, match=r"the call took more than 0\.5 s"):
        run_isolated(time.sleep, 600, seconds=0.5)


def test_an_isolated_function_leaves_no_process(tmp_path):
    started = tmp_path / "started"
    assert run_isolated(os.system, f"sleep 600 & echo $! > {started}") == 0
    status, until = Path("/proc", started.read_text().strip(), "stat"), time.monotonic() + 60
    while status.exists() and ") Z " not in status.read_text():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.exhaustive
def test_the_time_to_the_first_step_is_that_of_the_command(tmp_path):
    work = dataclasses.replace(TINY, encoder="resnet18")
    with pytest.raises(RuntimeError, match=r"the process ended: error: .*batch_size"):
        bad = dataclasses.replace(work, batch=1)
        first_step.seconds_to_first_step(bad, tmp_path / "compiled", tmp_path / "run")


MISTAKES = {
    "--only=augmentations": "only='augmentations' is unknown",
    "--batch=1": "batch=1 must be at least 2",
    "--canvas=10": "canvas=10 must be at least 224",
    "--only=input --data=/nowhere": "data=/nowhere has no .jpg or .jpeg files",
    "--call_minutes=9": "call_minutes continues the file of --to, which is missing",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("arguments", MISTAKES)
def test_what_cannot_be_measured_is_one_line(arguments, capsys):
    assert run_command("__main__", *arguments.split(), package="benchmarks") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert MISTAKES[arguments] in line


@pytest.mark.exhaustive
def test_all_that_was_measured_is_written(tmp_path):
    to = tmp_path / "all.json"
    draw_jpegs(tmp_path, 4)
    sizes = [f"--{name}={getattr(TINY, name)}" for name in ("views_size", "views_batch", "canvas")]
    command = [sys.executable, "-m", "benchmarks", "--only=input", *sizes, "--rounds=1"]
    subprocess.run([*command, f"--data={tmp_path}", f"--to={to}"], cwd=ROOT, check=True)
    written = json.loads(to.read_text())
    assert written["about"]["versions"]["jax"] == jax.__version__
    assert written["workload"]["views_size"] == 16
    assert written["rows"][0]["measurement"] == "input pipeline"
