"""The tool itself: folders in which something is wrong fail, by name, and others pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.parity import backbones
from tests.parity.comparison import Comparison
from tests.parity.files import COMPARE, compare_file, files_of

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden folder, to be made wrong."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def failures(folder, file, seed=None):
    comparison = Comparison()
    compare_file(folder, file, seed, comparison)
    return comparison.failures


def change(path, **changed):
    """Rewrites an npz; an entry that is `None` goes."""
    with np.load(path) as archive:
        arrays = {name.replace("/", "__"): archive[name] for name in archive.files}
    arrays |= changed
    np.savez(
        path,
        **{name.replace("__", "/"): array for name, array in arrays.items() if array is not None},
    )


def test_an_error_beyond_the_bound_is_reported_with_its_entry(folder):
    path = folder / "projector.npz"
    with np.load(path) as archive:
        output = archive["mlp_add/train_output"]
    change(path, mlp_add__train_output=output * (1 + 1e-4))
    (failure,) = failures(folder, "projector.npz")
    assert failure == "training: 0.0001, more than 1e-05, at mlp_add/train_output"


@pytest.mark.exhaustive
def test_losses_and_parameters_of_a_trajectory_have_bounds(folder):
    path = folder / "trajectory_byol.npz"
    with np.load(path) as archive:
        loss, weight = archive["step5/loss"], archive["final/predictor/3.weight"]
    weight[2, 3] += 1e-3
    change(path, step5__loss=loss * (1 + 1e-3), **{"final__predictor__3.weight": weight})
    assert failures(folder, path.name) == [
        "losses: 0.001, more than 0.0001, at step5/loss",
        "parameters: 0.001, more than 0.0001, at final/predictor/3.weight",
    ]


def test_a_figure_that_is_no_number_is_beyond_every_bound(folder):
    path = folder / "projector.npz"
    with np.load(path) as archive:
        output = archive["mlp_add/train_output"]
    output[0, 0] = np.nan
    change(path, mlp_add__train_output=output)
    (failure,) = failures(folder, "projector.npz")
    assert failure.startswith("training: inf, more than 1e-05, at mlp_add/train_output")


@pytest.mark.exhaustive
def test_arrays_that_are_missing_renamed_or_of_another_shape_are_named(folder):
    path = folder / "projector.npz"
    with np.load(path) as archive:
        output = archive["none/train_output"]
    change(path, other=output)
    assert failures(folder, "projector.npz") == ["projector.npz has other, which is unknown"]
    change(path, none__train_output=None)
    assert failures(folder, "projector.npz") == ["projector.npz has no none/train_output"]
    change(path, other=None, none__train_output=output[:1])
    (failure,) = failures(folder, "projector.npz")
    assert "none/train_output of shape (1, 12), computed is (10, 12)" in failure


def with_another_shape(path):
    shapes = json.loads(path.read_text())
    shapes["resnet50"]["bn1.bias"] = [65]
    path.write_text(json.dumps(shapes))


def test_other_shapes_of_a_backbone_are_named(folder):
    with_another_shape(folder / "backbone_shapes.json")
    (failure,) = failures(folder, "backbone_shapes.json")
    assert failure == "arrays that differ: 1, more than 0, at resnet50/['bn1.bias']"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("state__backbone__net.1.bias", "net.1.bias is missing"),
        ("state__projector__aug_processor.4.running_var", "aug_processor.4.running_var is missing"),
        ("step3__view_2", "trajectory_byol.npz has no step3/view_2"),
        # Neither is used; the format has them.
        ("step5__descriptor_1_flip", "trajectory_byol.npz has no step5/descriptor_1_flip"),
        ("step5__difference_2_crop", "trajectory_byol.npz has no step5/difference_2_crop"),
    ],
)
def test_what_a_trajectory_lacks_is_named(folder, name, message):
    change(folder / "trajectory_byol.npz", **{name: None})
    (failure,) = failures(folder, "trajectory_byol.npz")
    assert message in failure


def test_every_file_that_is_there_or_should_be_is_looked_at(folder):
    (folder / "README.md").write_text("What the files hold.")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").touch()
    (folder / "projector.npz").unlink()
    assert set(files_of(folder)) == {*COMPARE, "more/notes.txt"}
    (failure,) = failures(folder, "more/notes.txt")
    assert failure.startswith("more/notes.txt is unknown; a folder holds augment_ops.npz, ")
    assert failures(folder, "projector.npz") == [f"projector.npz is missing in {folder}"]


def test_a_file_that_cannot_be_read_is_named(folder):
    path = folder / "projector.npz"
    path.write_bytes(path.read_bytes()[:1000])
    (failure,) = failures(folder, "projector.npz")
    assert failure.startswith("projector.npz cannot be read: ")


class TestSeeds:
    @pytest.fixture(autouse=True)
    def only_the_network_seeds_are_searched_with(self, monkeypatch):
        monkeypatch.setattr(backbones, "NETWORKS", {"resnet18": 64})

    @pytest.fixture
    def with_seed(self, folder):
        def write(drawn_with, **more):
            shapes = json.loads((folder / "backbone_shapes.json").read_text())["resnet18"]
            (folder / "backbone_shapes.json").write_text(json.dumps({"resnet18": shapes}))
            features = backbones.backbone_features("resnet18", shapes, drawn_with, count=4)
            arrays = {f"resnet18/{mode}_features": values for mode, values in features.items()}
            np.savez(folder / "backbone_features.npz", **arrays, **more)
            return folder

        return write

    @pytest.mark.exhaustive
    def test_a_seed_is_found(self, with_seed):
        assert not failures(with_seed(1), "backbone_features.npz")

    @pytest.mark.exhaustive
    def test_a_seed_may_be_stated(self, with_seed, monkeypatch):
        monkeypatch.setattr(backbones, "SEEDS_TRIED", 1)
        folder = with_seed(7)
        (failure,) = failures(folder, "backbone_features.npz")
        assert failure == (
            "backbone_features.npz fits no seed from 0 to 0: resnet18/eval_features "
            "are others, or drawn with another seed; state it with --golden-seed"
        )
        assert not failures(folder, "backbone_features.npz", seed=7)
        (folder / "README.md").write_text("Input: `default_rng(s+3)`. Here s = 7.")
        assert not failures(folder, "backbone_features.npz")
        (folder / "README.md").unlink()
        assert not failures(with_seed(7, seed=7), "backbone_features.npz")

    @pytest.mark.exhaustive
    def test_features_a_little_off_are_beyond_the_bound(self, with_seed):
        folder = with_seed(0)
        path = folder / "backbone_features.npz"
        with np.load(path) as archive:
            features = archive["resnet18/train_features"]
        change(path, resnet18__train_features=features * 1.001)
        (failure,) = failures(folder, path.name)
        assert failure == "resnet18: 0.001, more than 0.0001, at resnet18/train_features"


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "tests/parity/test_golden.py", "-p", "no:cacheprovider"]
        + [str(argument) for argument in arguments],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [(), ("-n", "1")])
def test_a_run_ends_with_a_line_for_every_file(folder, processes):
    with_another_shape(folder / "backbone_shapes.json")
    (folder / "notes.txt").touch()
    (folder / "descriptors.npz").unlink()
    ended = run("--golden", folder, *processes, "-k", "shapes or notes or descriptors")
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED
    lines = ended.stdout.splitlines()
    (first,) = (at for at, line in enumerate(lines) if f"parity with {folder}" in line)
    assert lines[first + 1 : first + 4] == [
        "backbone_shapes.json  arrays that differ 1 of 0  FAILED",
        "descriptors.npz       nothing compared  FAILED",
        "notes.txt             nothing compared  FAILED",
    ]


@pytest.mark.exhaustive
def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    ended = run("--golden", tmp_path / "nowhere")
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --golden={tmp_path / 'nowhere'} is not a folder" in ended.stderr
