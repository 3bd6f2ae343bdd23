"""The command evaluates a run, keeps its features, and refuses what cannot work in one line."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cassle_jax.augment import IMAGENET_STD
from cassle_jax.checks import ConfigError
from cassle_jax.data import DataError
from cassle_jax.evaluate import evaluate_command
from cassle_jax.evaluation.findings import Failure, Score
from cassle_jax.evaluation.protocols import PROTOCOLS
from cassle_jax.faults import Outage
from cassle_jax.models import ENCODERS
from cassle_jax.parallel import device_mesh
from cassle_jax.report.files import is_complete, read_report
from cassle_jax.subjects import open_subject
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.run import build_run
from cassle_jax.training.saved_config import write_config
from tests.commands import run_command
from tests.interop.states import encoder_state
from tests.states import filled_state
from tests.tiny import TinyEncoder, tiny_config

SMALL = {"analysed": 32}


def workdir_of(folder, spoil=lambda params: params, **encoder):
    """The workdir of a run that has a first checkpoint; its encoder is tiny unless given."""
    ENCODERS["tiny"] = TinyEncoder
    config = tiny_config("method=byol")
    config.encoder.update({"width": 16, **encoder})
    mesh = device_mesh(jax.devices()[:1])
    state = filled_state(build_run(config, mesh, 64), mesh)
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
    defaults = {"runs": [run], "datasets": ["scenes"], "limit": 96, "batch": 32, **SMALL}
    return evaluate_command(
        **{**defaults, "to": str(folder / "report"), "tasks": tasks, **settings}
    )


@pytest.mark.exhaustive
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
    assert {finding.task for finding in findings} == {"knn", "linear", "factors"}
    assert all(finding.dataset == "scenes" for finding in findings)
    assert facts["mine"]["step"] == 1
    assert "mine" in page.read_text()
    assert (tmp_path / "report" / "report.csv").read_text().startswith("subject,")


@pytest.mark.exhaustive
def test_images_may_be_prepared_otherwise_than_in_training(run, tmp_path):
    cache = tmp_path / "features"
    chosen = {"size": 40, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0)}
    evaluate(run, tmp_path, "knn", cache=str(cache))
    own = set(cache.rglob("*.npz"))
    page = evaluate(run, tmp_path, "knn", **chosen, cache=str(cache))
    assert "size 40, mean (0.1, 0.2, 0.3), std (0.5, 0.25, 1.0)" in page.read_text()
    assert len(set(cache.rglob("*.npz")) - own) == len(own)
    subject = open_subject(run).with_images(size=40, mean=chosen["mean"])
    for spec in (subject.spec, *subject.views):
        assert (spec.size, spec.mean, spec.std) == (40, chosen["mean"], IMAGENET_STD)


def test_protocols_that_train_are_run_when_requested(run, tmp_path):
    settings = {"probe_epochs": 1, "fine_tune_epochs": 1, "fractions": (1.0,)}
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
        **settings,
    )
    ((findings,),) = (runs for runs in read_report(tmp_path / "report" / "report.json")[0].values())
    assert all(0 <= finding.value <= 1 for finding in findings)
    assert len({finding.task for finding in findings}) == 2


@pytest.mark.exhaustive
def test_runs_of_one_name_are_seeds_of_it(run, tmp_path):
    evaluate(run, tmp_path, "knn", runs=[f"a={run}", f"a={of_other_weights(tmp_path)}", f"b={run}"])
    held = json.loads((tmp_path / "report" / "report.json").read_text())["subjects"]
    assert {name: len(one["runs"]) for name, one in held.items()} == {"a": 2, "b": 1}


def of_other_weights(tmp_path, **settings):
    """A further run, whose configuration has other settings."""

    def halved(params):
        return jax.tree.map(lambda each: each / 2, params)

    folder = workdir_of(tmp_path / "other", halved)
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_a_run_does_not_count_twice_in_a_mean(run, tmp_path):
    again = tmp_path / "linked"
    again.symlink_to(run)
    said = rf"^run={again} has the same weights as another run called 'a', and would count twice"
    with pytest.raises(ConfigError, match=said):
        evaluate(run, tmp_path, "knn", runs=[f"a={run}", f"b={run}", f"a={again}"])


def test_a_mean_over_runs_of_different_settings_says_so(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(PROTOCOLS, "knn", dataclasses.replace(PROTOCOLS["knn"], run=lambda *_: []))
    other = of_other_weights(tmp_path, seed=7, batch_size=32, log={"every_steps": 1, "to": []})
    evaluate(run, tmp_path, "knn", runs=[f"a={run}", f"a={other}", f"b={run}"])
    (said,) = (each for each in caplog.messages if "mean" in each)
    assert said == "a: its mean is over runs of different settings: batch_size=32 beside 16"


@pytest.mark.exhaustive
def test_subjects_of_the_same_seed_are_compared_with_the_plain_one(run, tmp_path):
    page = evaluate(run, tmp_path, "knn", runs=[f"plain={run}", f"b={run}"]).read_text()
    assert "difference to plain with the same seeds" in page and "+0.0" in page


def fails(bench, settings):
    raise ValueError("in the second task")


def says_it_twice(bench, settings):
    return 2 * [Score("knn", bench.data.name, "accuracy", 1.0)]


def runs_out_of_memory(bench, settings):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocated so far: much")


@pytest.mark.parametrize(
    ("runs_badly", "reason"),
    [
        pytest.param(fails, "in the second task", marks=pytest.mark.exhaustive),
        pytest.param(
            says_it_twice,
            "two findings for knn, scenes, accuracy",
            marks=pytest.mark.exhaustive,
        ),
        (runs_out_of_memory, "RESOURCE_EXHAUSTED: out of memory; use smaller settings"),
    ],
)
def test_a_task_that_fails_is_a_red_line_and_the_rest_is_done(
    run, tmp_path, monkeypatch, caplog, runs_badly, reason
):
    broken = dataclasses.replace(PROTOCOLS["knn"], run=runs_badly)
    folder = tmp_path / "report"
    with monkeypatch.context() as patch:
        patch.setitem(PROTOCOLS, "knn", broken)
        with pytest.raises(DataError, match=f"1 task failed.*knn of a on scenes: .*{reason}$"):
            evaluate(run, tmp_path, "knn", "factors", runs=[f"a={run}"])
    assert not any(record.exc_info for record in caplog.records)
    page = (folder / "report.html").read_text()
    assert 'class="failed"' in page and reason in page and "INCOMPLETE" not in page
    ((findings,),) = read_report(folder / "report.json")[0].values()
    (failure,) = (each for each in findings if isinstance(each, Failure))
    assert (failure.task, failure.dataset) == ("knn", "scenes") and reason in failure.reason
    assert {each.task for each in findings} == {"knn", "factors"}
    evaluate(run, tmp_path, "knn", "factors", runs=[f"a={run}"])  # what failed is tried again
    assert 'class="failed"' not in (folder / "report.html").read_text()
    names = ["lock", "report.csv", "report.html", "report.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_the_log_has_the_traceback_of_our_mistake_and_who_each_warning_is_about(
    run, tmp_path, caplog
):
    """Python alone shows a warning once, though the features of several runs may deserve it."""

    def runs_wrongly(bench, settings):
        warnings.warn("the features are equal", stacklevel=1)
        raise KeyError("accuracy")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "knn", dataclasses.replace(PROTOCOLS["knn"], run=runs_wrongly))
        with pytest.raises(DataError, match=r"2 tasks failed.*knn of a on scenes: 'accuracy'"):
            evaluate(run, tmp_path, "knn", runs=[f"a={run}", f"b={run}"])
    assert [each.exc_info[0] for each in caplog.records if each.exc_info] == [KeyError] * 2
    for subject in "ab":
        assert caplog.messages.count(f"knn of {subject} on scenes: the features are equal") == 1


def test_the_page_grows_and_the_same_command_goes_on(run, tmp_path, monkeypatch, caplog):
    done = []

    def watched(name, stop=False):
        def runs(bench, settings):
            if stop:
                page = (tmp_path / "report" / "report.html").read_text()
                assert "INCOMPLETE" in page and "k-NN" in page
                raise KeyboardInterrupt
            done.append((name, bench.subject.name))
            return [Score(name, bench.data.name, "k-NN", len(done))]

        monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(PROTOCOLS[name], run=runs))

    runs = [f"a={run}", f"b={run}", f"c={run}"]
    watched("knn")
    watched("spectrum", stop=True)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, tmp_path, "knn", "spectrum", runs=runs)
    report = tmp_path / "report" / "report.json"
    assert not is_complete(report)
    watched("spectrum")
    evaluate(run, tmp_path, "knn", "spectrum", runs=runs)
    assert is_complete(report)
    assert "INCOMPLETE" not in report.with_suffix(".html").read_text()
    # Equal weights are evaluated once, and nothing is done again that was done before.
    assert done == [("knn", "a"), ("spectrum", "a")]
    found = read_report(report)[0]
    assert [[score.value for score in each] for (each,) in found.values()] == 3 * [[1, 2]]
    evaluate(run, tmp_path, "knn", "spectrum", runs=runs)
    assert len(done) == 2
    evaluate(run, tmp_path, "knn", "spectrum", runs=runs, limit=64)
    assert len(done) == 4
    report.write_text("torn by a kill")
    evaluate(run, tmp_path, "knn", runs=runs, limit=64)
    assert len(done) == 5 and "cannot be read and is written again" in caplog.text


def test_a_call_that_ends_early_loses_no_result_of_an_earlier_one(run, tmp_path, monkeypatch):
    done = []

    def watched(name, stop=False):
        def runs(bench, settings):
            if stop:
                raise KeyboardInterrupt
            done.append((name, bench.data.name))
            return [Score(name, bench.data.name, "accuracy", 0.5)]

        monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(PROTOCOLS[name], run=runs))

    two = {"datasets": ["scenes", "motifs"]}
    watched("knn")
    evaluate(run, tmp_path, "knn", **two)
    watched("spectrum", stop=True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, tmp_path, "knn", "spectrum", **two)
    watched("spectrum")
    evaluate(run, tmp_path, "knn", "spectrum", **two)
    every = [(name, dataset) for name in ("knn", "spectrum") for dataset in two["datasets"]]
    assert done == every
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["kept"] == {}


def test_results_that_the_page_will_no_longer_show_are_named_at_the_start(
    run, tmp_path, monkeypatch, caplog
):
    for name in ("knn", "spectrum"):
        score = [Score(name, "scenes", "accuracy", 0.5)]
        measured = dataclasses.replace(PROTOCOLS[name], run=lambda *_, score=score: score)
        monkeypatch.setitem(PROTOCOLS, name, measured)
    for _ in range(2):
        evaluate(run, tmp_path, "knn", "spectrum", runs=[f"first={run}"])
    assert "will not show" not in caplog.text
    evaluate(run, tmp_path, "spectrum", runs=[f"other={run}"])
    (line,) = (text for text in caplog.messages if "will not show" in text)
    assert f"{tmp_path / 'report'}: " in line and "other" not in line.split("; give")[0]
    assert " knn of first on scenes, spectrum of first on scenes," in line


@pytest.mark.exhaustive
def test_only_protocols_whose_settings_changed_run_again(run, tmp_path, monkeypatch):
    done = []

    def watched(name):
        def runs(bench, settings):
            done.append((name, vars(settings)))
            return [Score(name, bench.data.name, "accuracy", 0.5)]

        monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(PROTOCOLS[name], run=runs))

    watched("knn")
    watched("spectrum")
    evaluate(run, tmp_path, "knn", "spectrum")
    evaluate(run, tmp_path, "knn", "spectrum", neighbours="3")
    evaluate(run, tmp_path, "knn", "spectrum", neighbours=3, ways=2)
    assert done == [
        ("knn", {"neighbours": 1}),
        ("spectrum", {"seed": 0}),
        ("knn", {"neighbours": 3}),
    ]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**7)  # as --max_pixels does
    evaluate(run, tmp_path, "knn", "spectrum", neighbours=3)
    assert len(done) == 5


def write_images(root, counts, names=("a", "b", "c", "d")):
    for split, count in counts.items():
        for shade, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((8, 8, 3), 40 * shade + 2 * number + (split == "test"), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return f"folder:{root}"


def test_what_a_dataset_lacks_is_reported_first_and_the_rest_is_done(run, tmp_path, caplog):
    small = write_images(tmp_path / "small", {"train": 2, "test": 1})
    with pytest.raises(DataError, match="2 tasks failed"):
        evaluate(run, tmp_path, "knn", "augmentation_probes", "few_shot", datasets=[small], batch=8)
    warnings = [each for each in caplog.records if each.levelname == "WARNING"]
    assert [each.getMessage() for each in warnings[:2]] == [
        f"few_shot on {small}: ways=5 is more than its 4 classes; the other tasks run",
        f"augmentation_probes on {small}: too few test images to analyse: 4; use at least 13 "
        "(limit=96, analysed=32); the other tasks run",
    ]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "ways=5 is more than its 4 classes" in page and "k-NN" in page
    with pytest.raises(DataError, match=r"too few images of class 'a'.*: 3; use at least 21"):
        evaluate(run, tmp_path / "none", "few_shot", datasets=[small], batch=8, ways=4)
    assert not (tmp_path / "none").exists()


def test_a_setting_that_no_task_has_is_named(run, tmp_path, caplog):
    small = write_images(tmp_path / "small", {"train": 2, "test": 1})
    with pytest.raises(DataError, match="ways=9 is more than its 4 classes"):
        evaluate(run, tmp_path, "few_shot", datasets=[small], batch=8, ways=9, neighbours=3)
    assert [each for each in caplog.messages if "no effect" in each] == [
        "analysed=32 has no effect with tasks=few_shot",
        "neighbours=3 has no effect with tasks=few_shot",
    ]


@pytest.mark.exhaustive
def test_names_of_any_bytes_reach_the_page(run, tmp_path):
    names = ("caf\udce9", "tea")
    images = write_images(tmp_path / "drinks\udcff", {"train": 2, "test": 4}, names)
    page = evaluate(run, tmp_path, "knn", "neighbours", datasets=[images], batch=8)
    text = page.read_text(encoding="utf-8")
    assert r"drinks\udcff" in text and r"caf\udce9" in text
    found, _ = read_report(page.with_name("report.json"))
    assert {each.dataset for runs in found.values() for each in runs[0]} == {images}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["linar"]}, r"tasks='linar' is unknown.*did you mean 'linear'"),
        ({"tasks": ["regression"]}, r"tasks=regression suit none of the datasets scenes"),
        ({"runs": []}, r"evaluate needs --run=WORKDIR"),
        ({"to": ""}, r"^to= is not a local folder; give the one to write to$"),
        ({"datasets": ["scenes", "scenes"]}, r"^dataset 'scenes' is named twice"),
        ({"batch": 30}, r"batch=30 cannot be split over 8 devices"),
        ({"size": -8}, r"^size=-8 is not valid; use an integer >= 1"),
        ({"mean": (0.5,)}, r"^mean=\(0\.5,\) does not have 3 values"),
        ({"std": (0.2, 0.2, 0.0)}, r"^std=.* not positive; use > 0"),
        ({"network": "teacher"}, r"network='teacher' is unknown"),
        ({"datasets": ["cifar"]}, r"dataset 'cifar' is unknown \(did you mean 'cifar10'\?\)"),
    ],
)
def test_what_cannot_work_is_one_line(run, tmp_path, settings, message):
    with pytest.raises((ConfigError, DataError), match=message) as refused:
        evaluate(run, tmp_path, **{"tasks": ["knn"], **settings})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "report").exists()


def test_the_command_without_a_run_is_one_line(tmp_path, capsys):
    assert run_command("evaluate", f"--to={tmp_path}/report", "--tasks=knn") == 2
    assert capsys.readouterr().err.startswith("error: evaluate needs --run=WORKDIR")
    assert not (tmp_path / "report").exists()


@pytest.mark.exhaustive
def test_features_are_kept_where_the_user_keeps_caches(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    arguments = (f"--run={run}", "--datasets=scenes", "--tasks=spectrum", "--limit=8", "--batch=8")
    assert run_command("evaluate", *arguments, f"--to={tmp_path / 'report'}") == 0
    assert list((tmp_path / "caches" / "cassle_jax" / "features").rglob("*.npz"))


def test_two_runs_of_one_name_need_names(run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^run=.* would be a seed of another run called '.*'; give"
    ):
        evaluate(run, tmp_path, "knn", runs=[run, run])


def test_a_size_that_an_encoder_does_not_take_is_refused_with_the_runs_name(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(encoder_state("vit"), path, {"card": json.dumps({"architecture": {"heads": 3}})})
    with pytest.raises(ConfigError, match=r"^vit: size=30 "):
        evaluate(str(path), tmp_path, "knn", size=30)


@pytest.mark.parametrize(("taps", "least"), [(0, 2), (9, 5)])
def test_a_size_that_trainings_blur_does_not_fit_is_refused_in_words(run, taps, least):
    subject = open_subject(run)
    blurred = dataclasses.replace(subject.spec, blur=0.5, kernel_size=taps)
    subject = dataclasses.replace(subject, views=(subject.spec, blurred))
    said = rf"^size={least - 1} is too small for the blur of training; use {least} or more"
    with pytest.raises(ConfigError, match=said):
        subject.with_images(size=least - 1)
    assert subject.with_images(size=least).spec.size == least


def test_an_outage_ends_the_command_and_no_task_waits_for_it_again(run, tmp_path, monkeypatch):
    def unmounts(bench, settings):
        raise Outage("scenes: Stale file handle, for 300 s; the same command continues")

    broken = dataclasses.replace(PROTOCOLS["knn"], run=unmounts)
    monkeypatch.setitem(PROTOCOLS, "knn", broken)
    waits = dataclasses.replace(PROTOCOLS["spectrum"], run=lambda *_: pytest.fail("it waits again"))
    monkeypatch.setitem(PROTOCOLS, "spectrum", waits)
    with pytest.raises(Outage, match="Stale file handle"):
        evaluate(run, tmp_path, "knn", "spectrum")
    assert not is_complete(tmp_path / "report" / "report.json")


def test_a_report_that_cannot_be_read_is_refused_before_anything_is_measured(
    run, tmp_path, capsys, monkeypatch
):
    never = dataclasses.replace(PROTOCOLS["knn"], run=lambda *_: pytest.fail("it is measured"))
    monkeypatch.setitem(PROTOCOLS, "knn", never)
    (tmp_path / "report.json").mkdir()
    options = "--datasets=scenes", "--tasks=knn", "--limit=96", "--batch=32", f"--to={tmp_path}"
    assert run_command("evaluate", f"--run={run}", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {tmp_path / 'report.json'}: Is a directory"


def test_a_page_that_cannot_be_written_is_reported_while_it_grows_and_at_its_end(
    run, tmp_path, monkeypatch, caplog
):
    (tmp_path / "report" / "report.html" / "a file").mkdir(parents=True)
    quick = dataclasses.replace(PROTOCOLS["knn"], run=lambda *_: [Score("knn", "scenes", "k", 0.5)])
    monkeypatch.setitem(PROTOCOLS, "knn", quick)
    with pytest.raises(ConfigError, match=r"^to=.*/report cannot be written: .*irectory"):
        evaluate(run, tmp_path, "knn")
    assert "report cannot be written for now: " in caplog.text


@pytest.mark.parametrize(
    ("value", "error", "message", "extractions"),
    [
        (np.nan, ConfigError, r"weights .*net_0.* are not finite", 0),
        (1e38, DataError, r"^2 tasks failed.* run has features that are not finite on scenes", 1),
    ],
)
def test_weights_and_features_that_are_not_finite_are_refused(
    tmp_path, caplog, value, error, message, extractions
):
    def spoil(params):
        kernel = params["encoder"]["net_0"]["kernel"]
        encoder = {**params["encoder"], "net_0": {"kernel": kernel.at[:].set(value)}}
        return {**params, "encoder": encoder}

    run = workdir_of(tmp_path / "run", spoil)
    caplog.set_level("INFO", logger="cassle_jax")
    with pytest.raises(error, match=message):
        evaluate(run, tmp_path, "knn", "linear")
    assert caplog.text.count("features of run on") == extractions


@pytest.mark.exhaustive
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
        ({"a": 2, "b": 0}, r"dataset 'folder:.*test/b' has no images"),
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
