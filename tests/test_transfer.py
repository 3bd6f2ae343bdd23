"""The paper's comparison: which runs it has, and what its options ask of the table."""

import re
from pathlib import Path

import pytest

from cassle_jax.augment import CASSLE_DESCRIPTORS, LEAK_FREE_DESCRIPTORS
from cassle_jax.sweep.table import find_table, runs_of_table
from tests.commands import run_command


def test_it_compares_what_the_projector_may_know_at_64_pixels():
    table = find_table("transfer", methods=("byol",))
    runs = runs_of_table(table, seeds=(0,))
    conditionings = {
        run.name: (
            tuple(run.config.conditioning.descriptors),
            run.config.conditioning.plain_branch,
            run.config.augself.crop,
        )
        for run in runs
    }
    assert conditionings == {
        "byol-plain-0": ((), 0.0, 0.0),
        "byol-cassle-0": (CASSLE_DESCRIPTORS, 0.0, 0.0),
        "byol-leak-free-0": (LEAK_FREE_DESCRIPTORS, 0.0, 0.0),
        "byol-leak-free-+-plain-branch-0": (LEAK_FREE_DESCRIPTORS, 0.5, 0.0),
        "byol-augself-0": ((), 0.0, 0.5),
    }
    for run in runs:
        config = run.config
        assert (config.encoder.name, config.augment.size) == ("resnet18", 64)
        assert table.against(table.rows[4]) == "byol, plain"


def test_its_flags_are_its_options(monkeypatch, tmp_path):
    requested = {}

    def run_table(table, to, **settings):
        requested.update(settings, table=table, to=to)
        return tmp_path

    monkeypatch.setattr("cassle_jax.sweep.experiment.run_table", run_table)
    given = ["--minutes=5", "--data=/images", f"--to={tmp_path}", "--methods=byol", "--seeds=2"]
    given += ["--set=batch_size=64", "--datasets=cifar10=/c", "--tasks=knn", "--nokeep_weights"]
    assert run_command("transfer", *given, "--limit=9", "--parallel=3", "--call_minutes=1") == 0
    table = requested.pop("table")
    assert {row.subject.split(",")[0] for row in table.rows} == {"byol"}
    assert (table.tasks, Path(requested.pop("to")), list(requested.pop("seeds"))) == (
        ("knn",),
        tmp_path,
        [0, 1],
    )
    assert requested == {
        "overrides": ("data.path=/images", "batch_size=64"),
        "datasets": ("cifar10=/c",),
        "evaluation": ("limit=9",),
        "parallel": 3,
        "minutes": 5.0,
        "call_minutes": 1.0,
        "keep_weights": False,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--minutes=5 --methods=simclrr", r"methods='simclrr' is unknown.*'simclr'"),
        ("--minutes=0", r"minutes=0\.0 must be above 0"),
        ("--minutes=inf", r"minutes=inf must be above 0 and finite"),
        ("--minutes=5 --seeds=0", r"seeds=0 must be at least 1"),
    ],
)
def test_an_unknown_method_no_time_and_no_seed_are_refused(tmp_path, capsys, given, message):
    words = ("--data=/images", f"--to={tmp_path}", *given.split())
    assert run_command("transfer", *words) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
