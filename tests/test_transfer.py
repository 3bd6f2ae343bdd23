"""The paper's comparison in a budget of time: it stops, goes on, and ends in one page."""

import csv
import json

import pytest

from cassle_jax.command import EXIT_PREEMPTED, Stop
from cassle_jax.config import ConfigError
from cassle_jax.models import ENCODERS
from cassle_jax.training.metrics import MetricsWriter
from cassle_jax.transfer import transfer
from tests.tiny import TinyEncoder

TINY = {
    "data.source": "scenes",
    "data.scenes": 64,
    "data.canvas": 24,
    "data.threads": 2,
    "augment.size": 16,
    "batch_size": 16,
    "epochs": 3,
    "encoder.name": "tiny",
    "encoder.width": 24,
    "encoder.small_images": False,
    "augself.hidden": 16,
    "conditioning.width": 8,
    "method.projector_hidden": 32,
    "method.projector_out": 32,
}


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)


def call(to, minutes=600.0, **settings):
    return transfer(
        to,
        minutes=minutes,
        datasets=["scenes"],
        methods=["simclr"],
        seeds=1,
        tasks=["knn"],
        overrides=[f"--config.{name}={value}" for name, value in TINY.items()],
        limit=32,
        keep_weights=False,
        **settings,
    )


def test_calls_that_end_early_add_up_to_the_whole(tmp_path, monkeypatch):
    write = MetricsWriter.write

    def until_the_second_run_has_begun(writer, step, metrics):
        write(writer, step, metrics)
        if len(list(tmp_path.glob("runs/*"))) == 2:
            raise Stop("the call's time is over", EXIT_PREEMPTED)

    monkeypatch.setattr(MetricsWriter, "write", until_the_second_run_has_begun)
    with pytest.raises(Stop):
        call(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    done = tmp_path / "runs/simclr-plain-0/evaluation/report.json"
    evaluated_at = done.stat().st_mtime_ns

    monkeypatch.setattr(MetricsWriter, "write", write)
    page = call(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    assert done.stat().st_mtime_ns == evaluated_at
    with (tmp_path / "report.csv").open() as file:
        subjects = {row["subject"] for row in csv.DictReader(file)}
    assert subjects == {"simclr, plain", "simclr, AugSelf", "simclr, CASSLE"}
    assert plan["steps"] == 12  # its epochs: the budget would do for more
    assert "12 steps (3 epochs)" in page.read_text()
    assert not list(tmp_path.glob("runs/*/checkpoints"))

    with pytest.raises(ConfigError, match="minutes=700 was 600"):
        call(tmp_path, minutes=700.0)


def test_a_budget_that_cannot_be_met_says_what_would(tmp_path):
    with pytest.raises(ConfigError, match=r"minutes=0.01 is too short for 3 runs.* or more"):
        call(tmp_path, minutes=0.01)
