"""What a run measured can be read again, however it ended and from wherever it continued."""

import json
import resource
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cassle_jax.training.metrics import MetricsWriter, read_metrics


def write(workdir, start, stop, scale=1.0):
    """Steps after `start` up to `stop` of a run that continues at `start`."""
    writer = MetricsWriter(workdir, start)
    for step in range(start + 1, stop + 1):
        writer.write(step, {"loss": scale * step, "learning_rate": 0.5})
    writer.close()


def events(workdir):
    """All records of the TensorBoard files: length, checksum, event, checksum."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_curves_come_back_in_order(tmp_path):
    write(tmp_path, 0, 3)
    assert read_metrics(tmp_path) == {
        "loss": [(1, 1.0), (2, 2.0), (3, 3.0)],
        "learning_rate": [(1, 0.5), (2, 0.5), (3, 0.5)],
    }


def test_a_metric_may_be_there_at_some_steps_only(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0, "knn_accuracy": 0.25})
    writer.close()
    assert read_metrics(tmp_path)["knn_accuracy"] == [(2, 0.25)]


def test_every_line_is_readable_while_the_run_goes_on(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    writer.close()


@pytest.mark.parametrize("start", [0, 2, 5])
def test_a_continued_run_drops_the_steps_it_repeats(tmp_path, start):
    write(tmp_path, 0, 5)
    write(tmp_path, start, 6, scale=10.0)
    loss = read_metrics(tmp_path)["loss"]
    assert loss == [(step, (1.0 if step <= start else 10.0) * step) for step in range(1, 7)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))


def test_half_a_last_line_is_as_if_it_had_not_been_written(tmp_path):
    write(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert read_metrics(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    write(tmp_path, 3, 5)
    assert [step for step, _ in read_metrics(tmp_path)["loss"]] == [1, 2, 3, 4, 5]


def test_a_folder_without_metrics_has_no_curves(tmp_path):
    assert read_metrics(tmp_path) == {}


def test_tensorboard_has_the_same_curves(tmp_path):
    write(tmp_path, 0, 3)
    found = [
        (value.tag, event.step, value.simple_value)
        for event in events(tmp_path)
        for value in event.summary.value
    ]
    assert sorted(found) == [
        *[("learning_rate", step, 0.5) for step in (1, 2, 3)],
        *[("loss", step, float(step)) for step in (1, 2, 3)],
    ]


def test_tensorboard_learns_which_steps_a_continued_run_repeats(tmp_path):
    write(tmp_path, 2, 3)
    (start,) = (event for event in events(tmp_path) if event.HasField("session_log"))
    assert (start.step, start.session_log.status) == (3, SessionLog.START)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 300,
        b'{"loss": 1.0}\n',
        b'{"step": null}\n',
        b"[1, 2]\n7\n",
        b"\xff\xfe{\n",
        b'{"st\n{"ep',
    ],
)
def test_what_a_power_cut_leaves_is_passed_over(tmp_path, garbage):
    write(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(garbage)
    assert read_metrics(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    write(tmp_path, 3, 5)
    assert [step for step, _ in read_metrics(tmp_path)["loss"]] == [1, 2, 3, 4, 5]
    assert garbage not in (tmp_path / "metrics.jsonl").read_bytes()


def test_what_a_full_disk_kept_back_follows_in_order(tmp_path, monkeypatch, caplog):
    """The disk takes half of a line, and no more until there is room."""
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    content = (tmp_path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 9, limits[1]))
    try:
        writer.write(2, {"loss": 2.0})
        writer.write(3, {"loss": 3.0})
        assert (tmp_path / "metrics.jsonl").stat().st_size > len(content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_metrics(tmp_path)["loss"] == [(1, 1.0)]
    writer.write(4, {"loss": 4.0})
    writer.close()
    assert [step for step, _ in read_metrics(tmp_path)["loss"]] == [1, 2, 3, 4]
    steps = {event.step for event in events(tmp_path) if event.summary.value}
    assert steps == {1, 2, 3, 4}
    assert sum("metrics.jsonl cannot be written for now" in each for each in caplog.messages) == 1
