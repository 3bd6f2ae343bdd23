"""A run, its export and a bare encoder open as what they are; else one line says why not."""

import copy
import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from cassle_jax.checks import ConfigError
from cassle_jax.evaluation.projection import has_projector
from cassle_jax.export import export_command
from cassle_jax.interop.weights import weights_of
from cassle_jax.methods import METHODS, ViewBatch
from cassle_jax.methods.base import HeadShape
from cassle_jax.parallel import device_mesh
from cassle_jax.subjects import open_subject, other_settings
from cassle_jax.training import run_weights
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.recorded import method_of
from cassle_jax.training.run import build_run
from cassle_jax.training.run_weights import read_run
from cassle_jax.training.saved_config import write_config
from cassle_jax.training.start_records import record_start
from tests.states import filled_state
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that has a first checkpoint, and its state."""
    config = tiny_config("method=byol,augself=main")
    config.encoder.name, config.encoder.width, config.encoder.small_images = "resnet18", 2, True
    mesh = device_mesh(jax.devices()[:1])
    state = filled_state(build_run(config, mesh, 64), mesh)
    workdir = tmp_path_factory.mktemp("byol")
    write_config(config, workdir)
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    return workdir, jax.device_get(state)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.exhaustive
def test_a_run_and_its_export_are_one_subject(run, tmp_path):
    workdir, state = run
    subject = open_subject(workdir)
    heads = ("encoder", "projector", "predictor")
    assert_equal(subject.variables["params"], {name: state.params[name] for name in heads})
    assert_equal(
        subject.variables["batch_stats"], {name: state.batch_stats[name] for name in heads}
    )
    assert has_projector(subject.variables)
    assert subject.name == workdir.stem
    assert subject.spec.size == 16
    assert "crop" in subject.conditioning.descriptors

    export_command(run=str(workdir), to=str(tmp_path))
    exported = open_subject(tmp_path / "cassle.safetensors", name="mine")
    assert exported.name == "mine"
    assert exported.fingerprint() == subject.fingerprint()
    assert exported.conditioning == subject.conditioning
    momentum = open_subject(workdir, network="momentum")
    assert momentum.variables["params"].keys() == {"encoder", "projector"}


@pytest.mark.exhaustive
def test_another_weight_is_another_fingerprint(run):
    subject = open_subject(run[0])
    other = copy.deepcopy(subject.variables)
    other["params"]["encoder"]["conv1"]["kernel"][0, 0, 0, 0] += 1
    assert dataclasses.replace(subject, variables=other).fingerprint() != subject.fingerprint()


@pytest.mark.exhaustive
def test_a_bare_encoder_has_no_heads_and_the_same_features(run, tmp_path):
    workdir, _ = run
    subject = open_subject(workdir)
    state = weights_of(subject.variables).encoder
    save_file({**state, "fc.weight": np.ones((3, 16), np.float32)}, tmp_path / "bare.safetensors")
    bare = open_subject(tmp_path / "bare.safetensors")
    assert not has_projector(bare.variables)
    assert bare.conditioning.descriptors == ()
    assert bare.spec.size == 32  # its stem is 3×3
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)

    def features(subject):
        view = ViewBatch(images, jnp.zeros((2, subject.conditioning.size)))
        return subject.networks.apply(subject.variables, view, train=False, method="encode")

    np.testing.assert_array_equal(features(bare), features(subject))


def test_a_checkpoint_that_training_replaces_meanwhile_is_not_missed(run, tmp_path, monkeypatch):
    """With checkpoint.keep=1, the one that evaluation has begun to read may go."""
    workdir = shutil.copytree(run[0], tmp_path / "in_progress")
    read = run_weights._restore

    def replaced(checkpoint, names):
        if checkpoint.name == "1":
            checkpoint.rename(checkpoint.with_name("2"))
        return read(checkpoint, names)

    monkeypatch.setattr(run_weights, "_restore", replaced)
    assert read_run(workdir).card["step"] == 2


def test_an_export_of_the_trained_networks_is_not_evaluated_as_the_momentum_ones(run, tmp_path):
    """A run beside it would show its momentum networks."""
    encoder = weights_of(open_subject(run[0]).variables).encoder
    paths = {held: tmp_path / f"{held}.safetensors" for held in ("online", "momentum", "")}
    for held, path in paths.items():
        save_file(encoder, path, {"card": json.dumps({"network": held} if held else {})})
    line = (
        r"^run=.*online\.safetensors: it holds the online network, not network=momentum; give the "
        r"run's workdir, or export the run with --network=momentum$"
    )
    with pytest.raises(ConfigError, match=line):
        open_subject(paths["online"], network="momentum")
    for held, network in (("momentum", "momentum"), ("momentum", "online"), ("", "momentum")):
        assert open_subject(paths[held], network=network).name == paths[held].stem


def test_seeds_of_other_lengths_and_networks_are_other_settings(run):
    """The mean of a run and of one that is still training is of neither."""
    subject = open_subject(run[0])

    def with_facts(**facts):
        return dataclasses.replace(subject, facts={**subject.facts, **facts})

    config = {**subject.facts["config"], "seed": 7}
    assert other_settings(subject, with_facts(config=config)) == []
    longer = with_facts(step=8, network="momentum", config=config)
    assert other_settings(subject, longer) == [
        "network='momentum' beside 'online'",
        "step=8 beside 1",
    ]
    assert other_settings(subject, dataclasses.replace(subject, facts={})) == []


def test_what_cannot_be_opened_is_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^run=.*/nowhere does not exist; use the workdir of a run"
    ):
        open_subject(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"^run=.* has no config\.json"):
        open_subject(tmp_path)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ConfigError, match=r"^run=.*/a\.safetensors: .*neither a ResNet's conv1\.weight nor"
    ):
        open_subject(tmp_path / "a.safetensors")
    save_file({"conv1.weight": np.ones((4, 3, 7, 7), np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(
        ConfigError, match=r"^run=.*/b\.safetensors: a ResNet of .* is not known here"
    ):
        open_subject(tmp_path / "b.safetensors")


def test_settings_that_came_or_went_since_a_run_began_do_not_matter(run, tmp_path, caplog):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    for section, name in (
        ("method", "projector_depth"),
        ("conditioning", "plain_branch"),
        ("augment", "asymmetric"),
        ("augself", "flip"),
        ("encoder", "remat"),
        ("data", "classes"),
    ):
        del config[section][name]
        config[section]["gone"] = 1
    del config["weights"]
    (workdir / "config.json").write_text(json.dumps(config))
    expected, subject = open_subject(run[0]), open_subject(workdir)
    assert_equal(subject.variables, expected.variables)
    assert subject.conditioning == expected.conditioning
    assert "settings that this version lacks are left out" in caplog.text
    for section in ("method", "conditioning", "augment", "augself", "encoder", "data"):
        assert f"{section}.gone" in caplog.text
    export_command(run=str(workdir), to=str(tmp_path / "exported"), formats=["cassle"])
    exported = open_subject(tmp_path / "exported" / "cassle.safetensors")
    assert exported.fingerprint() == expected.fingerprint()


def test_damaged_settings_of_a_run_or_file_are_reported_in_one_line(run, tmp_path):
    workdir, file = shutil.copytree(run[0], tmp_path / "run"), tmp_path / "a.safetensors"
    weights = read_run(workdir).in_pytorch()
    for setting, value in (
        ("augment", None),
        ("conditioning", []),
        ("encoder", "resnet18"),
        ("method", {}),
        ("encoder.width", "x"),
        ("encoder.width", -1),
        ("encoder.name", ["resnet18"]),
        ("encoder.small_images", 1),
        ("augment.size", 1e30),
        ("augment.jitter_order", None),
        ("conditioning.depth", "2"),
    ):
        config = json.loads((run[0] / "config.json").read_text())
        section, _, name = setting.partition(".")
        if name:
            config[section][name] = value
        else:
            config[section] = value
        (workdir / "config.json").write_text(json.dumps(config))
        save_file(weights.flat(), file, {"card": json.dumps({**weights.card, "config": config})})
        for path in (workdir, file):
            with pytest.raises(ConfigError, match=re.escape(setting)) as refused:
                open_subject(path)
            assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden", "x"), ("hidden", True), ("out", 2.5), ("depth", []), ("depth", -1), ("last_bn", 1)],
)
def test_a_recorded_head_that_cannot_be_is_one_line(run, field, value):
    head = {"hidden": 8, "out": 8, "depth": 2} | {field: value}
    start = {"step": 0, "heads": {"projector": head}, "views": []}
    starts = run[0] / "starts.jsonl"
    starts.write_text(json.dumps(start))
    said = f"record of heads and views is damaged: {field}={value!r} is in no head"
    try:
        with pytest.raises(ConfigError, match=re.escape(said)):
            open_subject(run[0])
    finally:
        starts.unlink()


def test_a_recorded_head_of_one_layer_needs_no_hidden_one():
    head = {"hidden": 0, "out": 8, "depth": 1}
    method = method_of(tiny_config(), {"heads": {"projector": head}, "views": []})
    assert method.heads == {"projector": HeadShape(**head)}


def test_a_run_of_a_method_that_nobody_knows_has_its_encoder(run, monkeypatch, caplog):
    """One that an older version began; those of this version record their heads."""
    expected = open_subject(run[0])
    monkeypatch.delitem(METHODS, "byol")
    subject = open_subject(run[0])
    assert not has_projector(subject.variables)
    assert subject.fingerprint() == expected.fingerprint()
    assert other_settings(subject, expected) == []
    assert "method.name='byol' is not among the methods here" in caplog.text
    record_start(run[0], step=0, images=64, mesh=device_mesh(), record={"heads": {"projector": 1}})
    with pytest.raises(ConfigError, match="record of heads and views is damaged"):
        open_subject(run[0])
    (run[0] / "starts.jsonl").unlink()
