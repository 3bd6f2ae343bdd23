"""Replays a folder of figures of the published implementation; see `--golden`."""

from pathlib import Path

import pytest

from tests.everyday import everyday
from tests.parity.comparison import Comparison
from tests.parity.files import compare_file, files_of

QUICK = {"backbone_shapes.json", "descriptors.npz", "linear_evaluation.npz", "projector.npz"}
EVERYDAY = {*QUICK, "trajectory_moco.npz"}


def pytest_generate_tests(metafunc):
    files = files_of(Path(metafunc.config.getoption("golden")))
    metafunc.parametrize("file", everyday(files, *EVERYDAY & set(files)))


def test_file(file, pytestconfig, record_property):
    comparison = Comparison()
    folder = Path(pytestconfig.getoption("golden"))
    try:
        compare_file(folder, file, pytestconfig.getoption("golden_seed"), comparison)
    finally:
        record_property("parity", (file, str(comparison)))
    if comparison.failures:
        pytest.fail("\n".join(comparison.failures), pytrace=False)
