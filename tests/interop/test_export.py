"""A run, or a file, is written in every format, and comes back exactly with its model card."""

import errno
import gc
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from cassle_jax import models
from cassle_jax.checks import ConfigError
from cassle_jax.export import export, export_command
from cassle_jax.faults import Outage
from cassle_jax.interop import formats
from cassle_jax.interop.architecture import (
    ConvNeXtArchitecture,
    ResNetArchitecture,
    ViTArchitecture,
    architecture_of,
)
from cassle_jax.interop.card import markdown, run_card, with_encoder
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.formats import FORMATS
from cassle_jax.interop.pytorch import encoder_from_pytorch, encoder_to_pytorch
from cassle_jax.interop.weights import Weights, load_weights, weights_of
from cassle_jax.lock import folder_held
from cassle_jax.methods import AUXILIARIES, ViewBatch
from cassle_jax.models import VisionTransformer, make_encoder
from cassle_jax.parallel import REPLICATED, device_mesh
from cassle_jax.subjects import open_subject
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.quiet_orbax import abandoned_reads_silenced
from cassle_jax.training.run import build_run
from cassle_jax.training.run_weights import read_run
from cassle_jax.training.saved_config import write_config
from cassle_jax.training.start_records import last_start_record, record_start
from tests.everyday import everyday
from tests.interop.states import (
    ENCODERS,
    assert_same,
    encoder_state,
    encoder_variables,
    filled,
)
from tests.tiny import TinyEncoder, on_one_device, tiny_config

ROOT = Path(__file__).parents[2]
FILES = {
    "cassle": "cassle.safetensors",
    "torchvision": "torchvision.safetensors",
    "timm": "timm/model.safetensors",
    "detectron2": "detectron2.pkl",
    "dinov2": "dinov2.safetensors",
    "torch": "torch.pth",
}


CARD = {
    "input": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
    "versions": {},
    "converted_from": {"file": "", "sha256": ""},
}


def run_config():
    config = tiny_config("method=moco_v2,augself=main")
    config.encoder.name, config.encoder.width = "resnet18", 4
    config.data.name = "cifar10"  # which the source, scenes, does not read
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run on two devices, saved at steps 5 and 10, and its states there."""
    workdir = tmp_path_factory.mktemp("run")
    config, mesh = run_config(), device_mesh(jax.devices()[:2])
    shapes = jax.eval_shape(build_run(config, mesh, dataset_size=64).initial_state)
    states = {step: state_of(shapes, step) for step in (5, 10)}
    write_config(config, workdir)
    record_start(workdir, step=0, images=64, mesh=mesh)
    record_start(workdir, step=7, images=64, mesh=device_mesh(jax.devices()[:1]))
    checkpoints = Checkpoints(workdir, keep=3)
    for step, state in states.items():
        checkpoints.save(step, jax.device_put(state, NamedSharding(mesh, REPLICATED)), {})
    checkpoints.close()
    lines = [
        {"step": 5, "loss": 4.5, "learning_rate": 0.1},
        {"step": 6, "knn_accuracy": 0.5, "rank_me": 7.25},
        {"step": 10, "loss": 4.25, "learning_rate": 0.05},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir, states


def state_of(shapes, step):
    def fill(part, seed):
        return filled(part, seed=100 * step + seed)

    return shapes.replace(
        step=np.int32(step),
        key=jax.random.key(0),
        params=fill(shapes.params, 0),
        batch_stats=fill(shapes.batch_stats, 1),
        target_params=fill(shapes.target_params, 2),
        target_batch_stats=fill(shapes.target_batch_stats, 3),
        memory=fill(shapes.memory, 4),
        opt_state={},
        diverged_at=np.int32(-1),
    )


def online(state):
    return weights_of({"params": state.params, "batch_stats": state.batch_stats})


def momentum(state):
    return weights_of({"params": state.target_params, "batch_stats": state.target_batch_stats})


def assert_same_networks(weights, expected):
    assert weights.networks.keys() == expected.networks.keys()
    for name, state in expected.networks.items():
        assert_same(weights.networks[name], state)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("choice", "step", "expected"),
    [
        ({}, 10, online),
        ({"step": 5}, 5, online),
        ({"network": "momentum"}, 10, momentum),
    ],
)
def test_a_runs_networks_are_written_and_read_exactly(run, tmp_path, choice, step, expected):
    workdir, states = run
    export_command(run=str(workdir), to=str(tmp_path / "out"), **choice)
    loaded = load_weights(tmp_path / "out" / "cassle.safetensors")
    assert_same_networks(loaded, expected(states[step]))
    assert loaded.card["step"] == step
    assert loaded.card["network"] == choice.get("network", "online")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, tmp_path, caplog):
    workdir, states = run
    shutil.copytree(workdir, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "10" / "state" / "d").iterdir():
        file.write_bytes(b"")
    with caplog.at_level("WARNING", logger="cassle_jax"):
        export_command(run=str(tmp_path / "run"), to=str(tmp_path / "out"))
    assert "checkpoint 10 cannot be read" in caplog.text
    assert_same_networks(load_weights(tmp_path / "out" / "cassle.safetensors"), online(states[5]))
    with pytest.raises(ConfigError, match=r"has step 10, and it cannot be read"):
        export_command(run=str(tmp_path / "run"), to=str(tmp_path / "out"), step=10)


def test_an_export_names_what_produced_it(run, tmp_path):
    workdir, _ = run
    export_command(run=str(workdir), to=str(tmp_path))
    card = json.loads((tmp_path / "model_card.json").read_text())
    assert card == load_weights(tmp_path / "torchvision.safetensors").card
    assert card["config"] == json.loads((workdir / "config.json").read_text())
    assert (card["step"], card["images_seen"]) == (10, 160)
    assert card["metrics"] == {
        "loss": {"step": 10, "value": 4.25},
        "knn_accuracy": {"step": 6, "value": 0.5},
        "rank_me": {"step": 6, "value": 7.25},
    }
    assert card["dataset"] == {"source": "scenes", "train_split": "train", "images": 64}
    assert card["versions"]["jax"] == jax.__version__
    assert card["devices"] == "1 × cpu"
    assert (card["encoder"], card["feature_width"]) == ("resnet18", 32)
    assert card["networks"] == ["encoder", "projector"]

    text = (tmp_path / "model_card.md").read_text()
    for statement in (
        "moco_v2",
        "blur, color, color_diff",
        "crop 0.5",
        "| k-NN accuracy | 0.5 at step 6",
    ):
        assert statement in text


def test_what_a_killed_export_left_half_written_makes_room(tmp_path, monkeypatch):
    save, found = formats.save_safetensors, []

    def saved(*arguments):
        found.extend(path.name for path in tmp_path.rglob("*.partial"))
        save(*arguments)

    monkeypatch.setattr(formats, "save_safetensors", saved)
    left = "cassle.safetensors.0a1b2c3d.partial", "timm/config.json.0a1b2c3d.partial"
    (tmp_path / "timm").mkdir()
    for name in (*left, "mine.partial"):
        (tmp_path / name).write_bytes(b"half")
    export(Weights({"encoder": encoder_state("resnet18")}, card=CARD), tmp_path, ["torchvision"])
    assert found == [path.name for path in tmp_path.rglob("*.partial")] == ["mine.partial"]


def test_a_program_that_exports_gives_a_folder_as_the_command_takes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    weights = Weights({"encoder": encoder_state("resnet18")})
    export(weights, "~/out", ["torchvision"])
    for folder, formats_, said in (
        ("gs://bucket/out", [], r"^to=gs://bucket/out is not a local folder"),
        ("", [], "^to= is not a local folder"),
        ("out", ["torchvison"], "^formats='torchvison' is unknown; .* mean 'torchvision'"),
    ):
        with pytest.raises(ConfigError, match=said):
            export(weights, folder, formats_)
    assert [each.name for each in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "out" / "torchvision.safetensors").exists()


def test_an_earlier_step_is_reported_with_the_metrics_it_had(run, tmp_path):
    workdir, _ = run
    export_command(run=str(workdir), to=str(tmp_path), step=5)
    card = json.loads((tmp_path / "model_card.json").read_text())
    assert card["metrics"] == {"loss": {"step": 5, "value": 4.5}}
    assert card["devices"] == "2 × cpu"


FORMATS_OF = {
    "resnet18": "cassle torchvision",
    "resnet34": "cassle torchvision",
    "resnet50": "cassle torchvision detectron2",
    "wide": "cassle torchvision timm detectron2",
    "small_images": "cassle torchvision",
    "vit": "cassle torchvision timm",
    "bottlenecks": "cassle torchvision detectron2",
    "convnext": "cassle torchvision timm",
}


def test_the_lines_that_build_a_wide_resnet_have_its_widening():
    first, *_ = ResNetArchitecture(50, 64, False, 3, widening=2).torchvision_lines()
    assert "resnet.Bottleneck, [3, 4, 6, 3], width_per_group=128)" in first


@pytest.mark.parametrize("name", everyday(FORMATS_OF, "resnet18", "wide", "vit", "convnext"))
def test_every_encoder_comes_back_exactly_from_every_format(tmp_path, name):
    assert_comes_back(tmp_path, name, FORMATS_OF[name].split())


@pytest.mark.parametrize(
    ("name", "formats"), [("wide", "cassle torchvision timm detectron2"), ("vit", "dinov2 timm")]
)
def test_arrays_come_back_whatever_their_order_in_memory(tmp_path, name, formats):
    """PyTorch saves a channels-last model's arrays as they lie in memory, with their strides."""
    state = encoder_state(name)
    turned = {key: np.asfortranarray(array) for key, array in state.items()}
    weights = Weights({"encoder": turned}, card=CARD, heads=12 if name == "vit" else None)
    export(weights, tmp_path, formats.split())
    for each in formats.split():
        assert_same(load_weights(tmp_path / FILES[each]).encoder, state)


def test_the_card_of_an_encoder_that_saw_omega_says_which_channels_it_takes(tmp_path):
    state = encoder_to_pytorch(filled(encoder_variables(ENCODERS["resnet18"], channels=5)))
    networks = {"encoder": state, "image_conditioner": {"a.weight": np.ones(1, np.float32)}}
    export(Weights(networks, card=CARD), tmp_path, ["torchvision"])
    text = (tmp_path / "model_card.md").read_text()
    assert "After the image's 3 channels the model takes 2 of ω" in text
    plain = tmp_path / "plain"
    export(Weights({"encoder": encoder_state("resnet18")}, card=CARD), plain, ["torchvision"])
    assert "the model takes" not in (plain / "model_card.md").read_text().lower()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["resnet50", "wide", "bottlenecks"])
def test_detectron2s_settings_make_a_resnet_of_the_files_widths(tmp_path, name):
    """detectron2 leaves an array of another shape at its random values, with a warning."""
    export(Weights({"encoder": encoder_state(name)}, card=CARD), tmp_path, ["detectron2"])
    (lines,) = re.findall(r"```yaml\n(.*?)```", (tmp_path / "model_card.md").read_text(), re.S)
    given = {setting: int(value) for setting, value in re.findall(r"(\w+): (\d+)\n", lines)}
    stem, out = given["STEM_OUT_CHANNELS"], given["RES2_OUT_CHANNELS"]
    arrays = pickle.loads((tmp_path / "detectron2.pkl").read_bytes())["model"]
    shapes = {"stem.conv1": (stem, 3, 7, 7)}
    if given["DEPTH"] in (18, 34):
        assert out == 64  # detectron2 asserts it
        shapes |= {"res2.0.conv1": (out, stem, 3, 3), "res5.1.conv2": (8 * out, 8 * out, 3, 3)}
    else:
        inner = given["WIDTH_PER_GROUP"]
        shapes |= {"res2.0.conv1": (inner, stem, 1, 1), "res2.0.conv2": (inner, inner, 3, 3)}
        shapes |= {"res2.0.conv3": (out, inner, 1, 1), "res5.2.conv2": (8 * inner, 8 * inner, 3, 3)}
    assert {layer: arrays[f"{layer}.weight"].shape for layer in shapes} == shapes


@pytest.mark.pytorch
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_comes_back_exactly_from_pytorchs_own_file(tmp_path, name):
    assert_comes_back(tmp_path, name, ["torch"])


@pytest.mark.exhaustive
def test_the_lines_that_load_this_projects_file_give_an_images_features(run, tmp_path, monkeypatch):
    workdir, states = run
    export_command(run=str(workdir), to=str(tmp_path), formats=["cassle"])
    monkeypatch.chdir(tmp_path)
    size = run_config().augment.size
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    (lines,) = re.findall(r"```python\n(.*?)```", Path("model_card.md").read_text(), re.S)
    made = {"image": image}
    exec(lines, made)
    spec, state = run_config().augment, states[10]
    small_images = run_config().encoder.small_images
    encoder = make_encoder("resnet18", width=4, small_images=small_images)
    variables = {"params": state.params["encoder"], "batch_stats": state.batch_stats["encoder"]}
    view = jnp.asarray((image / 255 - np.array(spec.mean)) / np.array(spec.std), jnp.float32)
    expected = encoder.apply(variables, view[None], train=False)
    np.testing.assert_allclose(made["features"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["convnext", "vit", "resnet18", "small_images"])
def test_the_lines_that_load_pytorchs_file_make_its_first_layer(tmp_path, monkeypatch, name):
    """With stand-ins for PyTorch; an encoder of five channels saw ω beside the image."""
    encoder = ENCODERS[name]
    state = encoder_to_pytorch(filled(encoder_variables(encoder, channels=5)))
    torch, torchvision, loaded = MagicMock(), MagicMock(), {}
    torch.__spec__ = ModuleSpec("torch", None)
    torch.from_numpy = lambda array: array
    torch.save = lambda tensors, file: loaded.update(tensors)
    torch.nn.Conv2d = lambda *sizes, **bias: sizes
    torchvision.models.ConvNeXt.return_value.features = [[None]]
    for each, module in (("torch", torch), ("torchvision", torchvision)):
        monkeypatch.setitem(sys.modules, each, module)
    heads = 12 if name == "vit" else None
    export(Weights({"encoder": state}, card=CARD, heads=heads), tmp_path, ["torch"])
    assert "The model takes 5 channels." in (tmp_path / "model_card.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model_card.md").read_text(), re.S)
    made = {}
    exec(lines, made)
    model = made["model"]
    model.load_state_dict.assert_called_once_with(torch.load("torch.pth", weights_only=True))
    first, array = {
        "convnext": (model.features[0][0], "features.0.0.weight"),
        "vit": (model.conv_proj, "conv_proj.weight"),
    }.get(name, (model.conv1, "conv1.weight"))
    out, channels, side, _ = loaded[array].shape
    assert first[:3] == (channels, out, side)


def assert_comes_back(tmp_path, name, formats):
    state = encoder_state(name)
    heads = 12 if name == "vit" else None
    export(Weights({"encoder": state}, card=CARD, heads=heads), tmp_path, formats)
    for each in formats:
        weights = load_weights(tmp_path / FILES[each])
        assert weights.networks.keys() == {"encoder"}
        assert_same(weights.encoder, state)


def converted(tmp_path, name, *formats):
    file, out = tmp_path / "file.safetensors", tmp_path / "out"
    save_file(encoder_state(name), file)
    heads = 12 if name == "vit" else None
    export_command(weights=str(file), to=str(out), formats=formats, heads=heads)
    return out


def test_a_file_is_converted_and_its_card_says_from_what(tmp_path):
    folder = converted(tmp_path, "vit")
    card = json.loads((folder / "model_card.json").read_text())
    assert card["converted_from"]["file"] == "file.safetensors"
    assert len(card["converted_from"]["sha256"]) == 64
    assert (folder / "timm" / "config.json").exists()


@pytest.mark.parametrize("card", [None, {"input": CARD["input"]}], ids=["none", "input"])
def test_the_networks_of_a_users_own_loop_are_exported(tmp_path, card):
    """They have no card of a run or a file; the export ended in a KeyError."""
    variables = filled(encoder_variables(ENCODERS["resnet18"]))
    networks = {collection: {"encoder": tree} for collection, tree in variables.items()}
    export(weights_of(networks, card), str(tmp_path / "out"))
    subject = open_subject(tmp_path / "out" / "cassle.safetensors")
    jax.tree.map(np.testing.assert_array_equal, subject.variables, networks)
    assert subject.spec.size == (card["input"]["size"] if card else 224)
    text = (tmp_path / "out" / "model_card.md").read_text()
    assert "# resnet18, of unknown origin" in text
    assert ("are assumed to be RGB" in text) == (card is None)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"method": "mine"}, "`method` needs all entries of a run"),
        ({"input": {"size": 32}}, "`input` a size, mean and std"),
        ({"input": 32}, "`input` a size, mean and std"),
        ({"lab": np.arange(2)}, "is not JSON: Object of type ndarray"),
    ],
    ids=str,
)
def test_a_users_own_card_that_cannot_be_written_is_refused_before_any_file(tmp_path, card, said):
    variables = filled(encoder_variables(ENCODERS["resnet18"]))
    networks = {collection: {"encoder": tree} for collection, tree in variables.items()}
    with pytest.raises(WeightsError, match=said):
        export(weights_of(networks, card), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "size"), [("vit", 32), ("small_images", 32), ("resnet18", 224), ("convnext", 224)]
)
def test_images_of_a_file_without_a_card_have_the_encoders_usual_size(tmp_path, name, size):
    folder = converted(tmp_path, name, "cassle")
    text = (folder / "model_card.md").read_text()
    assert f"Images are assumed to be RGB in [0, 1], {size}×{size} pixels" in text
    assert open_subject(folder / "cassle.safetensors").spec.size == size
    if name != "vit":  # whose heads the file alone does not give
        assert open_subject(tmp_path / "file.safetensors").spec.size == size


@pytest.mark.exhaustive
def test_a_vit_computes_the_same_with_the_heads_that_are_given(tmp_path):
    """The arrays are the same for every number of heads, the features are not."""
    save_file(encoder_state("vit"), tmp_path / "file.safetensors")
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    outputs = {}
    for heads in (6, 12):
        out = tmp_path / str(heads)
        export_command(weights=str(tmp_path / "file.safetensors"), to=str(out), heads=heads)
        encoder = VisionTransformer(width=24, depth=2, heads=heads, patch_size=8)
        variables = encoder_from_pytorch(encoder_state("vit"), encoder_variables(encoder))
        outputs[heads] = encoder.apply(variables, images, False)
        for file in ("cassle.safetensors", "torchvision.safetensors", "timm/model.safetensors"):
            read = open_subject(out / file)
            view = ViewBatch(images, jnp.zeros((2, 0)))
            variables = jax.tree.map(jnp.asarray, read.variables)
            features = read.networks.apply(variables, view, train=False, method="encode")
            np.testing.assert_allclose(features, outputs[heads], rtol=1e-5, atol=1e-5)
        config = json.loads((out / "timm" / "config.json").read_text())
        assert config["model_args"]["num_heads"] == heads
        assert f"num_heads={heads}" in (out / "model_card.md").read_text()
    assert np.linalg.norm(outputs[6] - outputs[12]) > 0.01 * np.linalg.norm(outputs[6])


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (None, r"do not show its number of heads.* --heads=N"),
        (5, "heads=5 does not divide"),
    ],
)
def test_a_vit_of_unknown_heads_is_refused(tmp_path, heads, message):
    save_file(encoder_state("vit"), tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=message):
        export_command(
            weights=str(tmp_path / "file.safetensors"), to=str(tmp_path / "out"), heads=heads
        )


@pytest.mark.exhaustive
def test_a_vits_run_records_its_heads(tmp_path):
    config = tiny_config("method=simclr")
    config.encoder.update(name="vit_small", width=24, patch_size=8)
    shapes = jax.eval_shape(build_run(config, device_mesh(), dataset_size=64).initial_state)
    (tmp_path / "run").mkdir()
    write_config(config, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(1, jax.device_put(state_of(shapes, 1)), {})
    checkpoints.close()
    export_command(run=str(tmp_path / "run"), to=str(tmp_path / "out"))
    for file in ("cassle.safetensors", "torchvision.safetensors", "timm/model.safetensors"):
        assert load_weights(tmp_path / "out" / file).heads == 12
    with pytest.raises(ConfigError, match=r"^network='momentum' is not in the run of simclr in"):
        export_command(run=str(tmp_path / "run"), to=str(tmp_path / "out"), network="momentum")


def test_a_network_that_the_method_lacks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(models.ENCODERS, "tiny", TinyEncoder)
    config = tiny_config("method=simclr")
    shapes = jax.eval_shape(build_run(config, device_mesh(), dataset_size=64).initial_state)
    write_config(config, tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, jax.device_put(state_of(shapes, 1)), {})
    checkpoints.close()
    with pytest.raises(
        WeightsError, match=r"^network='momentum' is not in .*; use network=online$"
    ):
        read_run(tmp_path, network="momentum")


def test_a_run_that_has_saved_nothing_yet_is_reported(tmp_path):
    write_config(run_config(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"^run=.* has no checkpoint yet$"):
        export_command(run=str(tmp_path), to=str(tmp_path / "out"))


def test_a_checkpoint_out_of_reach_gives_way_to_no_older_one(run, tmp_path, monkeypatch):
    def unreachable(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setenv("CASSLE_STORAGE_SECONDS", "0")
    monkeypatch.setattr("cassle_jax.training.run_weights._restore", unreachable)
    with pytest.raises(Outage, match=r"^checkpoint 10: Stale file handle"):
        export_command(run=str(run[0]), to=str(tmp_path / "out"))


@pytest.mark.parametrize(("width", "heads", "name"), [(768, 12, "base"), (1024, 16, "large")])
def test_a_vit_as_wide_as_a_known_one_has_its_heads(width, heads, name):
    state = {
        "cls_token": np.zeros((1, 1, width)),
        "pos_embed": np.zeros((1, 5, width)),
        "patch_embed.proj.weight": np.zeros((width, 3, 16, 16)),
    }
    architecture = architecture_of(state)
    assert (architecture.heads, architecture.name) == (heads, f"vit_{name}")


@pytest.mark.parametrize(
    ("depths", "width", "name"),
    [
        ((3, 3, 9, 3), 96, "tiny"),
        ((3, 3, 27, 3), 96, "small"),
        ((3, 3, 27, 3), 256, "xlarge"),
        ((3, 4, 30, 3), 384, "xlarge"),  # timm's convnext_xxlarge
    ],
)
def test_a_convnext_is_called_by_the_nearest_name(depths, width, name):
    architecture = ConvNeXtArchitecture(depths, width, 3)
    config = architecture.timm_config()
    assert architecture.name == config["architecture"] == f"convnext_{name}"
    assert config["model_args"]["dims"] == [width, 2 * width, 4 * width, 8 * width]


def test_heads_that_a_format_would_lose_are_refused():
    with pytest.raises(WeightsError, match=r"does not hold the 6 heads .* taken for 12"):
        FORMATS["torch"].check(ViTArchitecture(768, 12, 6, 16, 224, 3))


def resnext(state):
    """ResNeXt-50's shapes: grouped 3×3 convolutions, twice as wide."""
    for name in [name for name in state if name.startswith("layer") and "conv2" in name]:
        outputs = state[name].shape[0]
        state[name] = np.zeros((2 * outputs, outputs // 4, 3, 3), np.float32)


def wide_resnet(state):
    for name in [name for name in state if name.startswith("layer") and "conv2" in name]:
        outputs = state[name].shape[0]
        state[name] = np.zeros((2 * outputs, 2 * outputs, 3, 3), np.float32)


def without_an_array(state):
    del state["layer4.2.bn3.running_var"]


def of_integers(state):
    state["bn1.weight"] = np.ones(4, np.int32)


def of_a_wide_first_block(state):
    state["layer1.0.conv1.weight"] = np.zeros((6, 4, 1, 1), np.float32)


def without_a_first_layer(state):
    del state["layer1.0.conv1.weight"]


def without_a_stem(state):
    state["conv1.weight"] = state["conv1.weight"].reshape(4, -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_a_wide_first_block, "its first block is 6 wide, no multiple of 4"),
        (without_a_first_layer, r"ConvNeXt: it has no layer1\.0\.conv1\.weight"),
        (without_a_stem, "the encoder is not a known ResNet, ViT or ConvNeXt: not enough values"),
        (resnext, r"not a known resnet50.* layer1\.0\.conv2\.weight has shape \(8, 1, 3, 3\)"),
        (wide_resnet, r"layer1\.0\.conv2\.weight has shape \(8, 8, 3, 3\), not \(4, 4, 3, 3\)"),
        (without_an_array, r"layer4\.2\.bn3\.running_var is missing"),
        (of_integers, r"bn1\.weight holds int32"),
    ],
)
def test_arrays_of_another_encoder_are_refused(tmp_path, change, message):
    state = encoder_state("resnet50")
    change(state)
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=f"^weights=.*{message}"):
        export_command(weights=str(tmp_path / "file.safetensors"), to=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"treatment": "none"}, {"injection": "none"}])
def test_a_card_says_that_the_plain_method_is_plain(setting):
    config = run_config()
    config.conditioning.update(setting)
    card = run_card(config, step=1, network="online", metrics={}, start={})
    card = with_encoder(card, architecture_of(encoder_state("resnet18")), ["encoder"])
    text = markdown(card, {})
    assert "pretrained by moco_v2, plain" in text
    assert "| Conditioned on | nothing |" in text


def test_a_card_lists_the_auxiliary_objectives():
    config = tiny_config("method=moco_v2,augself=main,essl=main")
    card = run_card(config, step=1, network="online", metrics={}, start={})
    card = with_encoder(card, architecture_of(encoder_state("resnet18")), ["encoder"])
    text = markdown(card, {})
    (augself,) = (line for line in text.splitlines() if line.startswith("| AugSelf |"))
    assert "color 0.5" in augself and "crop 0.5" in augself and "flip" not in augself
    assert "| EquiMod | none |" in text
    assert "| E-SSL | " in text and "weight 0.4" in text
    assert all(f"| {each.title} | " in text for each in AUXILIARIES.values())
    before = {name: value for name, value in card.items() if name not in ("equimod", "essl")}
    assert "EquiMod" not in markdown(before, {})  # of an earlier version


def test_files_of_another_export_do_not_stay_beside_a_new_card(run, tmp_path):
    workdir, states = run
    export_command(run=str(workdir), to=str(tmp_path), formats=["cassle", "torchvision"])
    with pytest.raises(ConfigError, match=r"has cassle\.safetensors of an earlier export"):
        export_command(run=str(workdir), to=str(tmp_path), formats=["torchvision"], step=5)
    assert load_weights(tmp_path / "torchvision.safetensors").card["step"] == 10
    export_command(run=str(workdir), to=str(tmp_path), formats=["cassle", "torchvision"], step=5)
    assert_same_networks(load_weights(tmp_path / "cassle.safetensors"), online(states[5]))


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("file", r"to=.*file is not a folder: .*/file is a file; use another path"),
        ("file/out", r"to=.*out is not a folder: .*/file is a file; use another path"),
        ("", "to= is not a local folder"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(tmp_path, to, message):
    save_file(encoder_state("resnet18"), tmp_path / "file")
    shutil.copy(tmp_path / "file", tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=message):
        export_command(
            weights=str(tmp_path / "file.safetensors"), to=str(tmp_path / to) if to else ""
        )


@pytest.mark.exhaustive
def test_a_second_export_into_a_folder_is_refused_and_leaves_no_file_of_its_own(tmp_path):
    """Two at once would leave the weights of one beside the card of the other."""
    folder = converted(tmp_path, "resnet18", "cassle")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in before} == {
        "cassle.safetensors",
        "model_card.json",
        "model_card.md",
    }
    with (
        folder_held(folder, leaves_file=False),
        pytest.raises(ConfigError, match="in use by another export"),
    ):
        converted(tmp_path, "resnet18", "cassle")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        converted(tmp_path, "resnet18")


@pytest.mark.parametrize("content", ["[]", "{}", "nope", '{"encoder": {"name": "resnet18"}}'])
def test_a_damaged_configuration_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json .* damaged or lacks") as raised:
        export_command(run=str(tmp_path), to=str(tmp_path / "out"))
    assert "\n" not in str(raised.value)


def test_a_note_of_a_start_without_a_step_is_passed_over(tmp_path):
    (tmp_path / "starts.jsonl").write_text('{"step": 3, "images": 8}\n{"images": 9}\n')
    assert last_start_record(tmp_path, 5) == {"step": 3, "images": 8}


def test_late_reads_are_silent_after_a_failed_restore_alone(monkeypatch, caplog):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda late: heard.append(str(late.exc_value)))
    with pytest.raises(OSError), abandoned_reads_silenced():
        raise OSError("a checkpoint that cannot be read")
    log, silenced = logging.getLogger("asyncio"), logging.getLogger("asyncio").filters[-1]
    unread = "Encountered error while reading array index: (). See full TensorStore details: …"
    for words in ("Event loop is closed", unread, "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(words)))
    for words in ("Task exception was never retrieved", "slow"):
        log.error(words)
    log.removeFilter(silenced)
    assert heard == ["another"]
    assert [record.getMessage() for record in caplog.records] == ["slow"]


@pytest.mark.exhaustive
def test_nothing_is_heard_of_a_failed_restore_afterwards(run, tmp_path, monkeypatch, caplog):
    """The arrays that Orbax was still reading end when nobody waits for them any more."""
    shutil.copytree(run[0], tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/state/d/*"):
        file.write_bytes(b"")
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda late: heard.append(str(late.exc_value)))
    for _ in range(10):
        with pytest.raises(ConfigError, match="none of them can be read"):
            export_command(run=str(tmp_path / "run"), to=str(tmp_path / "out"))
    time.sleep(0.2)
    gc.collect()
    assert heard == []
    assert {record.name.partition(".")[0] for record in caplog.records} <= {"cassle_jax", "absl"}


def test_a_card_survives_another_conversion(run, tmp_path):
    workdir, _ = run
    export_command(run=str(workdir), to=str(tmp_path / "one"))
    file = tmp_path / "one" / "cassle.safetensors"
    export_command(weights=str(file), to=str(tmp_path / "two"))
    card = json.loads((tmp_path / "two" / "model_card.json").read_text())
    assert (card["step"], card["method"]) == (10, "moco_v2")
    assert card["converted_from"]["file"] == "cassle.safetensors"


def test_the_usual_formats_are_those_that_fit(tmp_path):
    folder = converted(tmp_path, "small_images")
    assert not (folder / "timm").exists()
    assert (folder / "torchvision.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("small_images", "timm", "timm cannot make a resnet18 with a 3×3 stem"),
        ("small_images", "detectron2", "7×7 stem on 3 channels, this resnet18 a 3×3 one"),
        ("resnet34", "detectron2", "detectron2's resnet34 has width 64, and this one 4"),
        ("vit", "detectron2", "names for ResNets only"),
        ("resnet18", "onnx", "formats='onnx' is unknown"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(tmp_path, name, format, message):
    with pytest.raises(ConfigError, match=message):
        converted(tmp_path, name, format)
    assert not (tmp_path / "out").exists()


def test_pytorchs_own_file_needs_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install torch"):
        converted(tmp_path, "resnet18", "torch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --run=WORKDIR and --weights=FILE"),
        (["--run=a", "--weights=b"], "one of --run=WORKDIR and --weights=FILE"),
        (["--weights=b", "--network=momentum"], "within a run"),
        (["--run={run}", "--heads=6"], "heads is for a file; use it with --weights=FILE"),
        (["--run={run}", "--network=target"], "network='target' is unknown"),
        (["--run={run}", "--step=7"], r"step=7 is not among .*: 5, 10"),
        (["--run=nowhere"], r"nowhere has no config\.json"),
        (["--weights=nowhere.pth"], r"nowhere\.pth cannot be read"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(run, tmp_path, arguments, message):
    chosen = dict(each.format(run=run[0]).removeprefix("--").split("=") for each in arguments)
    chosen |= {name: int(chosen[name]) for name in ("step", "heads") if name in chosen}
    with pytest.raises(ConfigError, match=message) as raised:
        export_command(to=str(tmp_path / "out"), **chosen)
    assert "\n" not in str(raised.value)


def command(*arguments):
    """The command on one device, whatever the run had."""
    return subprocess.run(
        [sys.executable, "-m", "cassle_jax.export", *arguments],
        cwd=ROOT,
        env=on_one_device(os.environ),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.exhaustive
def test_the_command_exports_a_run_written_on_other_devices(run, tmp_path):
    workdir, states = run
    ended = command(f"--run={workdir}", f"--to={tmp_path}", "--formats=cassle,torchvision")
    assert ended.returncode == 0, ended.stderr
    assert "resnet18 written to" in ended.stderr
    assert_same_networks(load_weights(tmp_path / "cassle.safetensors"), online(states[10]))


def test_the_command_ends_with_one_line_for_a_mistake(tmp_path):
    ended = command("--run=nowhere", f"--to={tmp_path}")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: run=") and len(ended.stderr.splitlines()) == 1
