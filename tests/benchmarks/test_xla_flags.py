import dataclasses
import os

import numpy as np

from benchmarks import xla_flags
from benchmarks.workload import workload_for
from benchmarks.xla_flags import Trained, compared, difference


def test_choices_alternate_and_one_that_fails_is_left_out(monkeypatch):
    seen = []

    def run(function, work, method, *, seconds):
        seen.append(os.environ["XLA_FLAGS"])
        if seen[-1] == "--unknown":
            raise RuntimeError("the process ended with -6")
        return Trained(len(seen), {"loss": 2.0})

    monkeypatch.setattr(xla_flags, "run_isolated", run)
    monkeypatch.setenv("XLA_FLAGS", "--given")
    work = dataclasses.replace(workload_for("cpu"), rounds=2)
    found = compared(["", "--unknown", "--other"], work, "simclr", 1.0)
    assert seen == ["", "--unknown", "--other", "--other", ""]
    assert [each.rate for each in found[""]] == [1, 5]
    assert found["--unknown"] == "RuntimeError: the process ended with -6"
    assert os.environ["XLA_FLAGS"] == "--given"


def test_a_difference_is_relative_and_the_largest():
    ours = {"loss": 2.0, "rate": 0.0}
    assert difference(ours, {"loss": 2.5, "rate": 0.0}) == 0.25
    assert difference(ours, {"loss": 2.0, "rate": 0.1}) == np.inf
    assert np.isnan(difference(ours, {"loss": np.nan, "rate": 0.0}))
