"""The command evaluates a run, keeps its features, and refuses what cannot work in one line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from cassle_jax.config import ConfigError
from cassle_jax.data import DataError
from cassle_jax.evaluate import evaluate_command
from cassle_jax.evaluation.findings import Score
from cassle_jax.evaluation.tasks import TASKS, Settings
from cassle_jax.parallel import device_mesh, on_every_device
from cassle_jax.report.evaluation_page import read_report
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.run import build_run
from cassle_jax.training.saved_config import write_config
from tests.tiny import tiny_config

SMALL = Settings(analysed=32)


def workdir_of(folder, spoil=lambda params: params):
    """The workdir of a run that has a first checkpoint."""
    config = tiny_config("method=byol")
    config.encoder.name, config.encoder.width, config.encoder.small_images = "resnet18", 2, True
    mesh = device_mesh(jax.devices()[:1])
    state = on_every_device(build_run(config, mesh, 64).initial_state, mesh)
    folder.mkdir(exist_ok=True)
    write_config(config, folder)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, state.replace(params=spoil(state.params)), {})
    checkpoints.close()
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return workdir_of(tmp_path_factory.mktemp("byol"))


def evaluate(run, folder, *tasks, **settings):
    defaults = {"runs": [run], "datasets": ["scenes"], "limit": 96, "batch": 32, "settings": SMALL}
    return evaluate_command(
        **{**defaults, "to": str(folder / "report"), "tasks": tasks, **settings}
    )


def test_protocols_read_features_that_are_extracted_once(run, tmp_path, caplog):
    cache = str(tmp_path / "features")
    with caplog.at_level("INFO", logger="cassle_jax"):
        evaluate(f"mine={run}", tmp_path, "knn", "linear", "factors", cache=cache)
        assert caplog.text.count("features of mine on scenes") == 3
        first = read_report(tmp_path / "report" / "report.json")
        caplog.clear()
        page = evaluate(f"mine={run}", tmp_path, "knn", "linear", "factors", cache=cache)
        assert "features of mine" not in caplog.text
    subjects, facts = read_report(tmp_path / "report" / "report.json")
    assert subjects == first[0]
    (findings,) = subjects["mine"]
    assert {finding.task for finding in findings} == {"k-NN (k = 1)", "linear", "factor probes"}
    assert all(finding.dataset == "scenes" for finding in findings)
    assert facts["mine"]["step"] == 1
    assert "mine" in page.read_text()
    assert (tmp_path / "report" / "report.csv").read_text().startswith("subject,")


def test_protocols_that_train_are_run_when_asked_for(run, tmp_path):
    settings = Settings(analysed=32, probe_epochs=1, fine_tune_epochs=1, fractions=(1.0,))
    for split in ("train", "test"):
        for shade, name in enumerate("ab"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(16):
                Image.new("RGB", (16, 16), (100 * shade, number, 0)).save(folder / f"{number}.png")
    evaluate(
        run,
        tmp_path,
        "sgd_probe",
        "fine_tune",
        datasets=[f"folder:{tmp_path / 'images'}"],
        batch=8,
        settings=settings,
    )
    ((findings,),) = (runs for runs in read_report(tmp_path / "report" / "report.json")[0].values())
    assert all(0 <= finding.value <= 1 for finding in findings)
    assert len({finding.task for finding in findings}) == 2


def test_runs_of_one_name_are_seeds_of_it(run, tmp_path):
    evaluate(run, tmp_path, "knn", runs=[f"a={run}", f"a={run}", f"b={run}"])
    held = json.loads((tmp_path / "report" / "report.json").read_text())["subjects"]
    assert {name: len(one["runs"]) for name, one in held.items()} == {"a": 2, "b": 1}


def test_an_evaluation_that_ends_early_is_not_taken_for_a_whole_one(run, tmp_path, monkeypatch):
    folder = tmp_path / "report"

    def fails(bench):
        raise ValueError("in the second task")

    monkeypatch.setitem(TASKS, "spectrum", dataclasses.replace(TASKS["spectrum"], run=fails))
    with pytest.raises(DataError, match=r"spectrum of a on scenes: in the second task"):
        evaluate(run, tmp_path, "knn", "spectrum", runs=[f"a={run}"])
    assert not list(folder.glob("report.*"))
    assert "INCOMPLETE" in (folder / "incomplete" / "report.html").read_text()
    ((findings,),) = read_report(folder / "incomplete" / "report.json")[0].values()
    assert {finding.task for finding in findings} == {"k-NN (k = 1)"}
    evaluate(run, tmp_path, "knn")
    assert sorted(path.suffix for path in folder.iterdir()) == [".csv", ".html", ".json"]


def test_what_cannot_be_reported_takes_nothing_else_with_it(run, tmp_path, monkeypatch):
    kept = tmp_path / "report" / "incomplete" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()

    def says_it_twice(bench):
        return 2 * [Score("spectrum", "scenes", "RankMe", 1.0)]

    spectrum = dataclasses.replace(TASKS["spectrum"], run=says_it_twice)
    with monkeypatch.context() as patch:
        patch.setitem(TASKS, "spectrum", spectrum)
        with pytest.raises(ValueError, match="two findings for spectrum, scenes, RankMe"):
            evaluate(run, tmp_path, "knn", "spectrum", runs=[f"a={run}"])
    ((findings,),) = read_report(kept.parent / "report.json")[0].values()
    assert {finding.task for finding in findings} == {"k-NN (k = 1)"}
    evaluate(run, tmp_path, "knn")
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["linar"]}, r"tasks='linar' is unknown.*did you mean 'linear'"),
        ({"tasks": ["regression"]}, r"tasks=regression suit none of scenes"),
        ({"runs": []}, r"evaluate needs --run=WORKDIR"),
        ({"batch": 30}, r"batch=30 cannot be split over 8 devices"),
        ({"network": "teacher"}, r"network='teacher' is unknown"),
        ({"datasets": ["cifar"]}, r"dataset 'cifar' is unknown \(did you mean 'cifar10'\?\)"),
    ],
)
def test_what_cannot_work_is_one_line(run, tmp_path, settings, message):
    with pytest.raises((ConfigError, DataError), match=message) as refused:
        evaluate(run, tmp_path, **{"tasks": ["knn"], **settings})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.nan, ConfigError, r"weights .*conv1.* are not finite"),
        (1e38, DataError, r"run has features that are not finite on scenes"),
    ],
)
def test_weights_and_features_that_are_not_finite_are_refused(tmp_path, value, error, message):
    def spoil(params):
        kernel = params["encoder"]["conv1"]["kernel"]
        encoder = {**params["encoder"], "conv1": {"kernel": kernel.at[:].set(value)}}
        return {**params, "encoder": encoder}

    run = workdir_of(tmp_path / "run", spoil)
    with pytest.raises(error, match=message):
        evaluate(run, tmp_path, "knn")


def test_images_that_were_replaced_are_not_read_from_the_cache(run, tmp_path):
    def fill(seed):
        random = np.random.default_rng(seed)
        for split in ("train", "test"):
            for label in ("a", "b"):
                folder = tmp_path / "images" / split / label
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(4):
                    pixels = random.integers(256, size=(16, 16, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")

    def features(to, cache):
        fill_dataset = f"folder:{tmp_path / 'images'}"
        settings = {"runs": [f"run={run}"], "datasets": [fill_dataset], "tasks": ["spectrum"]}
        evaluate_command(**settings, to=str(tmp_path / to), cache=cache, batch=8)
        return (tmp_path / to / "report.csv").read_text()

    cache = str(tmp_path / "cache")
    fill(0)
    before = features("first", cache)
    assert features("again", cache) == before
    fill(1)
    after = features("replaced", cache)
    assert after != before
    assert after == features("uncached", "")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a": 2, "b": 0}, r"dataset 'folder:.*test/b' has no files"),
        ({"a": 2}, r"has 1 class; a classifier needs 2 or more"),
    ],
)
def test_a_folder_that_no_classifier_can_use_is_refused_first(run, tmp_path, classes, message):
    for split in ("train", "test"):
        for name, count in classes.items():
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    with pytest.raises(DataError, match=message):
        evaluate(run, tmp_path, "knn", datasets=[f"folder:{tmp_path / 'images'}"])
