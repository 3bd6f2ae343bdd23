"""A folder that several users write to: each of them may write to all that is made in it."""

import os
import stat

import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure
from safetensors.numpy import save_file

from cassle_jax.data.kept_numbers import _keep
from cassle_jax.evaluation.feature_cache import FeatureCache
from cassle_jax.evaluation.findings import Score
from cassle_jax.export import export_command
from cassle_jax.lock import folder_held
from cassle_jax.report.figure import save_png
from cassle_jax.report.files import write_report
from cassle_jax.storage import check_writable, open_shared, write_whole
from cassle_jax.training.workdir import workdir_held
from tests.interop.states import encoder_state


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of these modes; the umask takes all rights from others meanwhile."""
    previous = os.umask(0o077)

    def make(modes):
        made = tmp_path / oct(modes)
        made.mkdir()
        made.chmod(modes)
        return made

    yield make
    os.umask(previous)


def _export(folder):
    weights = folder.parents[2] / "weights.safetensors"
    save_file(encoder_state("wide"), weights)
    export_command(weights=str(weights), to=str(folder), formats=["timm", "detectron2"])


def _hold(folder):
    with workdir_held(epath.Path(folder) / "c", "run"), folder_held(folder):
        pass


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "make",
    [
        _export,
        _hold,
        lambda folder: _keep(np.zeros((1, 1), np.int32), folder / "labels" / "name-1.npz"),
        lambda folder: FeatureCache(folder).write("0" * 16, "1" * 16, {"a": np.zeros(1)}),
        lambda folder: write_report(folder, {"a": [[Score("knn", "x", "accuracy", 0.5)]]}),
        lambda folder: save_png(Figure(), folder / "pictures" / "one.png"),
        lambda folder: check_writable("to", folder),
        lambda folder: os.close(open_shared(f"{folder}.txt", os.O_WRONLY)),
    ],
)
def test_all_that_is_made_below_a_shared_folder_is_shared(folder, make):
    shared = folder(0o2770)
    (shared / "a").mkdir()
    (shared / "a").chmod(0o2770)
    make(shared / "a" / "b")
    made = [each for each in shared.rglob("*") if each != shared / "a"]
    assert made
    for each in made:
        modes = stat.S_IMODE(each.stat().st_mode)
        assert oct(modes) == oct(0o2770 if each.is_dir() else 0o660), each


@pytest.mark.parametrize(
    ("modes", "given"),
    [
        (0o700, 0),
        (0o755, 0),
        (0o750, 0),
        (0o775, 0o070),
        (0o777, 0o077),
        (0o722, 0o022),
        (0o1777, 0),
    ],
)
def test_a_folder_gives_only_what_it_has_to_those_who_may_write_to_it(folder, modes, given):
    outer = folder(modes)
    _hold(outer / "a")
    write_whole(outer / "file", "x")
    for each in (outer / "a", outer / "a" / "c"):
        assert oct(stat.S_IMODE(each.stat().st_mode)) == oct(0o700 | given)
    for each in (outer / "file", outer / "a" / "lock", outer / "a" / "c" / "lock"):
        assert oct(stat.S_IMODE(each.stat().st_mode)) == oct(0o600 | given & 0o666)
