"""Trackers get every step of a run once, wherever it continues; against the real packages, too."""

import json
import struct
import sys
import time
from types import SimpleNamespace

import pytest
from etils import epath

from cassle_jax.checks import ConfigError
from cassle_jax.training.loop import pretrain
from cassle_jax.training.metrics import MetricsWriter, read_lines
from cassle_jax.training.trackers import TRACKERS, Tracker, Tracking
from tests.tiny import cropped_only, tiny_config

SETTINGS = {"seed": 3, "optimizer.name": "lamb", "conditioning.descriptors": ["blur", "crop"]}


class Service(Tracker):
    """A tracker whose runs are lists; `down` is an outage."""

    package = "json"
    runs, settings, down = {}, {}, False

    def __init__(self, workdir, settings, run):
        self.run = run or f"run {len(self.runs)} of {workdir.name}"
        self.runs.setdefault(self.run, [])
        self.settings[self.run] = dict(settings)

    def write(self, step, metrics):
        if Service.down:
            raise ConnectionError("the service does not answer")
        self.runs[self.run].append((step, dict(metrics)))

    def close(self):
        self.runs[self.run].append("closed")


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setitem(TRACKERS, "service", Service)
    monkeypatch.setattr(Service, "runs", {})
    monkeypatch.setattr(Service, "down", False)
    return Service


def write(workdir, begin, end, *names):
    """The steps after `begin` up to `end` of a run that continues at `begin`."""
    workdir = epath.Path(workdir)
    writer = MetricsWriter(workdir, begin)
    for name in names:
        writer.add(Tracking(name, workdir, SETTINGS))
    for step in range(begin + 1, end + 1):
        writer.write(step, {"loss": 10.0 * step})
        if step % 2 == 0:
            writer.write(step, {"knn_accuracy": 0.5})
    writer.close()


def steps_of(records):
    return [each[0] for each in records if each != "closed"]


def test_every_step_comes_once_however_often_the_run_continues(service, tmp_path):
    for begin, end in ((0, 5), (2, 4), (1, 7)):
        write(tmp_path, begin, end, "service")
    ((records),) = service.runs.values()
    assert steps_of(records) == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    assert records.count("closed") == 3
    assert service.settings[f"run 0 of {tmp_path.name}"] == SETTINGS


def test_catching_up_takes_a_bounded_time_of_each_report(service, tmp_path, monkeypatch):
    write(tmp_path, 0, 50)
    monkeypatch.setattr("cassle_jax.training.trackers._PORTION_SECONDS", 0.1)
    send = Service.write

    def slowly(self, step, metrics):
        time.sleep(0.02)
        send(self, step, metrics)

    monkeypatch.setattr(Service, "write", slowly)
    tracking = Tracking("service", epath.Path(tmp_path), SETTINGS)
    ((records),) = service.runs.values()
    assert not records  # nothing is sent before the first step
    tracking.write(51, {"loss": 510.0})
    assert 1 <= len(records) <= 6
    tracking.close()
    assert steps_of(records) == sorted([*range(1, 52), *range(2, 51, 2)])


@pytest.mark.parametrize(
    "damaged",
    [
        "", "[]", "{", "{}", '{"run": 3, "step": 2, "names": []}',
        '{"run": "a", "step": "2", "names": []}', '{"run": "a", "step": null, "names": []}',
        '{"run": "a", "step": 2, "names": 3}', '{"run": "a", "step": 2, "names": [[]]}',
        '{"run": ["a"], "step": 2, "names": []}', '{"run": "a", "step": true, "names": []}',
    ],
)  # fmt: skip
def test_a_note_of_other_types_begins_a_run_that_gets_every_step(
    service, tmp_path, caplog, damaged
):
    write(tmp_path, 0, 2, "service")
    (tmp_path / "service.json").write_text(damaged)
    Service.runs.clear()
    write(tmp_path, 2, 3, "service")
    ((name, records),) = service.runs.items()
    assert name == f"run 0 of {tmp_path.name}"
    assert steps_of(records) == [1, 2, 2, 3]
    assert caplog.text.count("service.json is damaged; a new run of service") == 1


def test_a_tracker_that_joins_late_gets_what_was_before(service, tmp_path):
    write(tmp_path, 0, 2, "service")
    write(tmp_path, 2, 4)
    write(tmp_path, 4, 5, "service")
    ((records),) = service.runs.values()
    assert steps_of(records) == [1, 2, 2, 3, 4, 4, 5]
    assert (3, {"loss": 30.0}) in records and (4, {"knn_accuracy": 0.5}) in records


def test_an_outage_of_a_tracker_is_one_line_and_loses_nothing(service, tmp_path, caplog):
    writer = MetricsWriter(tmp_path, 0)
    writer.add(Tracking("service", epath.Path(tmp_path), {}))
    for step, down in ((1, False), (2, True), (3, True), (4, False)):
        Service.down = down
        writer.write(step, {"loss": float(step)})
    writer.close()
    assert [steps_of(records) for records in service.runs.values()] == [[1, 2, 3, 4]]
    (line,) = caplog.messages
    assert line == "service cannot be written for now: the service does not answer"


def test_what_an_outage_leaves_at_the_end_is_counted_and_sent_by_the_next_part(
    service, tmp_path, monkeypatch, caplog
):
    def refuses(self):
        raise ConnectionError("the service does not answer")

    with monkeypatch.context() as patched:
        patched.setattr(Service, "down", True)
        patched.setattr(Service, "close", refuses)
        write(tmp_path, 0, 3, "service")
    assert "service lacks its last 4 reports" in caplog.text
    assert "service cannot be closed: the service does not answer" in caplog.text
    write(tmp_path, 3, 4, "service")
    ((records),) = service.runs.values()
    assert steps_of(records) == [1, 2, 2, 3, 4, 4]


def test_a_run_writes_to_the_trackers_of_its_configuration(service, tmp_path):
    config = tiny_config("method=simclr,conditioning=none")
    cropped_only(config)
    config.steps, config.log.every_steps, config.log.to = 2, 1, ("service",)
    pretrain(config, tmp_path)
    (records,) = service.runs.values()
    written = read_lines(tmp_path / "metrics.jsonl")
    assert records == [*((line.pop("step"), line) for line in written), "closed"]
    assert service.settings.popitem()[1]["optimizer.name"] == "sgd"


class Missing(Service):
    package = "no_such_package"


class Refusing(Service):
    def __init__(self, workdir, settings, run):
        raise RuntimeError("api_key not configured\nsecond line")


def test_what_cannot_track_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(TRACKERS, "missing", Missing)
    monkeypatch.setitem(TRACKERS, "refusing", Refusing)
    config = tiny_config("method=simclr,conditioning=none")
    for name, message in [
        ("wanbd", r"^log\.to='wanbd' is unknown; use one of .*; did you mean 'wandb'\?$"),
        ("missing", r"^log\.to=missing needs the package no_such_package, .*pip install no_such_"),
    ]:
        config.log.to = (name,)
        with pytest.raises(ConfigError, match=message):
            pretrain(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"^log\.to=refusing cannot start: api_key not config"):
        Tracking("refusing", epath.Path(tmp_path), {})


def records_of(path):
    """The records of a .wandb file, which is a LevelDB log behind 7 bytes."""
    data, record, at = path.read_bytes(), b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def whole_records(path, seconds=60):
    """All records of a part that has ended: its own process writes them after `finish` returns."""
    from wandb.proto.wandb_internal_pb2 import Record

    until, found = time.monotonic() + seconds, []
    while not any(each.WhichOneof("record_type") == "exit" for each in found):
        assert time.monotonic() < until, path
        time.sleep(0.02)
        found = list(map(Record.FromString, records_of(path)))
    return found


@pytest.mark.trackers
def test_weights_and_biases_has_one_run_with_every_step_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for begin, end in ((0, 3), (2, 4)):
        write(tmp_path, begin, end, "wandb")
    loss, runs, settings = [], set(), {}
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for each in whole_records(path):
            if each.WhichOneof("record_type") == "run":
                runs.add((each.run.run_id, each.run.display_name))
                settings |= {item.key: item.value_json for item in each.run.config.update}
            items = {item.nested_key[0]: item.value_json for item in each.history.item}
            if "loss" in items:
                loss.append((each.history.step.num, float(items["loss"])))
    assert loss == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert runs == {(json.loads((tmp_path / "wandb.json").read_text())["run"], tmp_path.name)}
    assert json.loads(settings["optimizer.name"]) == "lamb"


@pytest.mark.trackers
def test_mlflow_has_one_run_with_every_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    workdir = tmp_path / "first"
    workdir.mkdir()
    for begin, end in ((0, 3), (2, 4)):
        write(workdir, begin, end, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 10), (2, 20), (3, 30), (4, 40)]
    assert [each.step for each in client.get_metric_history(run.info.run_id, "knn_accuracy")] == [
        2,
        4,
    ]
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["optimizer.name"] == "lamb"


def test_a_continued_run_is_one_of_weights_and_biases(tmp_path, monkeypatch):
    """With a stand-in, as elsewhere with the package."""
    begun, logged, ended = [], [], []

    def init(**arguments):
        begun.append(arguments)
        return SimpleNamespace(
            log=lambda metrics, step: logged.append((step, metrics)),
            finish=lambda: ended.append(True),
        )

    package = SimpleNamespace(init=init, Settings=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "wandb", package)
    write(tmp_path, 0, 2, "wandb")
    write(tmp_path, 2, 3, "wandb")
    assert [each["id"] for each in begun] == [begun[0]["id"]] * 2 and len(ended) == 2
    assert all(each["resume"] == "allow" and each["config"] == SETTINGS for each in begun)
    assert begun[0]["name"] == tmp_path.name and begun[0]["dir"] == str(tmp_path)
    assert logged == [
        (1, {"loss": 10.0}),
        (2, {"loss": 20.0}),
        (2, {"knn_accuracy": 0.5}),
        (3, {"loss": 30.0}),
    ]


def test_a_continued_run_is_one_of_mlflow(tmp_path, monkeypatch):
    """With a stand-in, as elsewhere with the package."""
    begun, logged, noted, ended = [], [], [], []

    def start_run(run_id, run_name):
        begun.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="7"))

    package = SimpleNamespace(
        start_run=start_run,
        log_params=noted.append,
        log_metrics=lambda metrics, step, run_id: logged.append((run_id, step, metrics)),
        end_run=lambda: ended.append(True),
    )
    monkeypatch.setitem(sys.modules, "mlflow", package)
    write(tmp_path, 0, 1, "mlflow")
    write(tmp_path, 1, 2, "mlflow")
    assert begun == [(None, tmp_path.name), ("7", None)] and len(ended) == 2
    assert noted == [SETTINGS]  # MLflow refuses a parameter that changes
    assert logged == [
        ("7", 1, {"loss": 10.0}),
        ("7", 2, {"loss": 20.0}),
        ("7", 2, {"knn_accuracy": 0.5}),
    ]
