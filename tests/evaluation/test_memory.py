"""Features that the memory cannot hold are refused before an image is read."""

import re
from types import SimpleNamespace

import pytest

from cassle_jax.data import DataError
from cassle_jax.evaluation import memory
from cassle_jax.solvers.absolute_error import absolute_bytes
from cassle_jax.solvers.logistic import logistic_bytes
from tests.test_evaluate import evaluate, workdir_of


@pytest.mark.exhaustive
def test_features_beyond_the_memory_are_refused_before_extraction(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "host_bytes", lambda: 60_000)
    run = workdir_of(tmp_path / "run")
    message = r"linear of run on scenes: \d+ × 16 features of scenes need 0\.0 GB of "
    caplog.set_level("INFO", logger="cassle_jax")
    with pytest.raises(DataError, match=message) as refused:
        evaluate(run, tmp_path, "linear")
    assert "features of run on" not in caplog.text
    assert 0 < int(re.search(r"limit=(\d+) would fit", str(refused.value))[1]) < 96


def test_the_bytes_are_those_of_the_arrays():
    rows, width = 1_281_167, 2048
    assert logistic_bytes(rows, width, 1000) == (8 * rows * 2049, 8 * rows * (2 * 2049 + 6000))
    assert logistic_bytes(10, width, 2)[0] == 8 * 10 * 10  # no more axes than rows
    assert absolute_bytes(rows, width)[0] == 8 * rows * 2049


def test_the_memory_of_this_machine_is_found():
    assert 2**28 < memory.host_bytes() < 10**15


@pytest.mark.parametrize(("stats", "found"), [({"bytes_limit": 7}, 7), ({}, None), (None, None)])
def test_the_memory_of_a_device_is_what_it_says(monkeypatch, stats, found):
    device = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device])
    assert memory._device_bytes() == found
