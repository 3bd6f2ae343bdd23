"""A path is a path: whatever its characters, what is written there is found there again."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_NOT_SAVED, Stop
from cassle_jax.data import DamagedLog, open_source
from cassle_jax.evaluate import datasets_in, named_path
from cassle_jax.models import ENCODERS
from cassle_jax.pretrain import pretrain_command
from cassle_jax.storage import path_of
from cassle_jax.training import checkpoints as checkpoints_module
from cassle_jax.training.checkpoints import checksums_of
from cassle_jax.training.loop import pretrain
from cassle_jax.training.metrics import read_metrics
from cassle_jax.training.read_back import ReadBack, host_checksum
from cassle_jax.training.run_weights import read_run
from tests.tiny import TinyEncoder, tiny_config
from tests.training.processes import steps_saved
from tests.training.test_faults import small_state

# Whatever a shell, a glob, a URL or a flag might take for something else.
AWKWARD = "a[1] {b}=*?\n#%20;$HOME'\"&|~ ü"


@pytest.fixture(scope="module")
def config():
    ENCODERS["tiny"] = TinyEncoder
    config = tiny_config("method=simclr")
    config.steps = 6
    return config


def test_a_run_lives_in_a_folder_of_any_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = f"runs/{AWKWARD}"
    state = pretrain(config, workdir)
    assert steps_saved(Path(workdir)) == [5, 6]
    again = pretrain(config, workdir)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert read_run(workdir).card["step"] == 6
    assert [step for step, _ in read_metrics(workdir)["loss"]] == [5, 6]
    assert os.listdir("runs") == [AWKWARD]  # noqa: PTH208


def test_a_leading_tilde_is_the_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pretrain(config, "~/run")
    assert steps_saved(tmp_path / "run") == [5, 6]
    assert read_run("~/run").card["step"] == 6
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]
    assert str(path_of("~no such user/x")) == "~no such user/x"
    assert str(path_of("gs://bucket/~/x")) == "gs://bucket/~/x"


@pytest.mark.parametrize("name", ["a\\b", "a\udcffb"])
def test_what_arrays_cannot_be_written_to_is_refused_before_the_first_step(config, tmp_path, name):
    with pytest.raises(ConfigError, match=r"workdir='.*' has a backslash or bytes .* not UTF-8"):
        pretrain(config, tmp_path / name / "run")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", [AWKWARD, "a\\b", "a\udcffb", "comma,comma"])
def test_images_and_class_lists_lie_in_a_folder_of_any_name(config, tmp_path, name, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / name
    (root / "train" / "cats").mkdir(parents=True)
    (root / "train" / "cats" / "1.png").write_bytes(b"image")
    (root / "classes.txt").write_text("cats\n")
    data = config.copy_and_resolve_references().data
    for path in (root, f"~/{name}"):
        data.update({"source": "folder", "path": str(path), "classes": f"{path}/classes.txt"})
        assert open_source(data, "train")[0].image == b"image"
    assert datasets_in(f"cifar10,folder:{root}") == ("cifar10", f"folder:{root}")
    damaged = DamagedLog(10, 0.5, root / "damaged")
    damaged.add("1.png", "torn")
    assert DamagedLog(10, 0.5, root / "damaged").remembered == ("1.png",)


def test_a_list_of_datasets_holds_paths_with_commas():
    listed = "motifs, cifar10=/a,b=c/[1],folder:/x y,z,food101"
    wanted = ("motifs", "cifar10=/a,b=c/[1]", "folder:/x y,z", "food101")
    assert datasets_in(listed) == wanted
    assert datasets_in("cifar10,cifra10") == ("cifar10", "cifra10")
    assert datasets_in("") == ()


def test_a_path_with_an_equals_sign_is_no_name(tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    assert named_path(f"{tmp_path}/lr=0.1") == ("", f"{tmp_path}/lr=0.1")
    assert named_path(f"cassle={tmp_path}/lr=0.1") == ("cassle", f"{tmp_path}/lr=0.1")
    assert named_path("runs/plain") == ("", "runs/plain")


# --- the first checkpoint is read back


def test_a_checkpoint_that_lacks_its_arrays_ends_no_run_with_success(
    config, tmp_path, monkeypatch, caplog
):
    # What a library did that looked for the parts of a checkpoint in another folder.
    monkeypatch.setattr(type(epath.Path(".")), "glob", lambda folder, pattern: iter(()))
    with (
        caplog.at_level("WARNING", logger="cassle_jax"),
        pytest.raises(Stop, match=r"checkpoint 6 cannot be read back: .*nor could any") as stop,
    ):
        pretrain_command(config, tmp_path / "run")
    assert stop.value.code == EXIT_NOT_SAVED and "\n" not in str(stop.value)
    assert sum("checkpoint 5 cannot be read back" in each for each in caplog.messages) == 1


def test_reading_back_notices_another_number(tmp_path, monkeypatch):
    saved = {"step": 1, "checksums": checkpoints_module.checksums(small_state(1), {"step": 1})}
    checkpoints = checkpoints_module.Checkpoints(tmp_path, keep=2)
    checkpoints.save_surely(1, small_state(1), {"step": 1}, seconds=0.0, after_stop=0.0)
    checkpoints.close()
    for state, problem in ((small_state(1), None), (small_state(2), "step, params, memory of it")):
        sums = checkpoints_module.checksums(state, {"step": 1})
        sums["data"] = saved["checksums"]["data"]
        read_back = ReadBack(
            epath.Path(tmp_path, "checkpoints", "1"), state, {"step": 1, "checksums": sums}
        )
        read_back.start()
        assert read_back.ended(wait=True)
        assert (read_back.problem or "").startswith(problem or "")
        assert (read_back.problem is None) == (problem is None)


def test_the_host_computes_the_devices_checksums():
    parts = vars(small_state(3))
    on_host = {name: host_checksum(jax.device_get(part)) for name, part in parts.items()}
    assert on_host == checksums_of(parts)
