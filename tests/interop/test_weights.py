"""Files of every origin become the same networks, and fit or say why not."""

import errno
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cassle_jax.interop import weights as weights_module
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.formats import save_safetensors
from cassle_jax.interop.naming import from_detectron2, from_torchvision, to_detectron2
from cassle_jax.interop.pytorch import mlp_to_pytorch, projector_to_pytorch
from cassle_jax.interop.weights import Weights, load_weights, weights_of
from cassle_jax.models import MLP, ConditionedProjector
from tests.evaluation.traced import peak_bytes
from tests.interop.states import ENCODERS, assert_same, encoder_state, encoder_variables, filled

COUNTING = np.arange(7, dtype=np.float32)


def head_variables(head, inputs):
    shapes = jax.eval_shape(
        lambda x: head.init(jax.random.key(0), x, jnp.ones((2, 5)), False),
        jax.ShapeDtypeStruct((2, inputs), jnp.float32),
    )
    return filled(shapes, seed=1)


def test_equal_weights_are_equal_files(tmp_path):
    for name in "abcdefgh":  # safetensors alone would write two kinds of them, by chance
        save_safetensors({"ä": COUNTING, "b": COUNTING[:3]}, tmp_path / name, {"name": "größer"})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "a", "np") as file:
        assert json.loads(file.metadata()["card"]) == {"name": "größer"}
        np.testing.assert_array_equal(file.get_tensor("ä"), COUNTING)
        np.testing.assert_array_equal(file.get_tensor("b"), COUNTING[:3])


def test_weights_are_in_memory_once_more_while_they_are_written(tmp_path):
    large = {"large": np.ones(2**21, np.float32)}
    peak = peak_bytes(lambda: save_safetensors(large, tmp_path / "file", {}))
    assert peak < 1.5 * large["large"].nbytes


@pytest.fixture
def variables():
    """A run's encoder, conditioned projector and plain predictor, and an AugSelf head."""
    encoder = ENCODERS["small_images"]
    projector = ConditionedProjector(hidden=8, out=6, depth=2, condition_depth=2, condition_width=4)
    predictor = ConditionedProjector(hidden=8, out=6, depth=2, treatment="none")
    networks = {
        "encoder": filled(encoder_variables(encoder)),
        "projector": head_variables(projector, encoder.feature_width),
        "predictor": head_variables(predictor, 6),
        "augself_crop": {"params": {"linear_0": {"kernel": np.ones((4, 2), np.float32)}}},
    }
    return {
        collection: {n: v[collection] for n, v in networks.items() if collection in v}
        for collection in ("params", "batch_stats")
    }


@pytest.fixture
def published(variables):
    """The same as a published checkpoint holds it, under `DataParallel`'s names, flat."""
    weights = weights_of(variables)
    names = {"backbone": weights.encoder, "projector": weights.projector}
    names["predictor"] = weights.predictor
    counts = {"bn1.num_batches_tracked": np.asarray(7)}
    return {
        network: {f"module.{name}": array for name, array in {**state, **counts}.items()}
        for network, state in names.items()
    }


def saved(path, state):
    flat = {name: np.ascontiguousarray(array) for name, array in state.items()}
    save_file(flat, path)
    return path


def test_the_counter_of_averaged_weights_is_no_weight(variables, tmp_path):
    encoder = weights_of(variables).encoder
    averaged = {f"module.{name}": array for name, array in encoder.items()}  # torch's AveragedModel
    averaged["n_averaged"] = np.asarray([7])
    loaded = load_weights(saved(tmp_path / "averaged", averaged))
    assert loaded.encoder.keys() == encoder.keys()


def test_a_file_whose_last_part_was_never_written_is_warned_of(variables, tmp_path, caplog):
    """safetensors finds nothing wrong with it."""
    path = saved(tmp_path / "file.safetensors", weights_of(variables).encoder)
    load_weights(path)
    assert not caplog.messages
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))
    load_weights(path)
    (said,) = caplog.messages
    assert said.startswith(f"{path}: only zeros in ")
    assert "arrays, such as encoder.layer" in said and said.endswith("interrupted, fetch it again")


def zeros_like(variables):
    return jax.tree.map(np.zeros_like, variables)


def test_a_runs_networks_come_back_as_they_were(variables, tmp_path):
    weights = weights_of(variables)
    assert weights.ignored == ("augself_crop",)
    loaded = load_weights(saved(tmp_path / "file.safetensors", weights.flat()))
    restored = loaded.into(zeros_like(variables))
    del variables["params"]["augself_crop"]
    assert not restored["params"].pop("augself_crop")["linear_0"]["kernel"].any()
    jax.tree.map(np.testing.assert_array_equal, restored, variables)


@pytest.mark.parametrize("torch_file", [pytest.param(True, marks=pytest.mark.pytorch), False])
def test_a_published_checkpoint_is_read_with_its_heads(published, variables, tmp_path, torch_file):
    if torch_file:
        import torch

        path = tmp_path / "ckpt-200.pth"
        nested = {n: {k: torch.tensor(v) for k, v in s.items()} for n, s in published.items()}
        torch.save({**nested, "ss_predictor": {"crop": nested["projector"]}, "epoch": 200}, path)
    else:
        path = tmp_path / "file.safetensors"
        flat = {f"{n}.{k}": v for n, state in published.items() for k, v in state.items()}
        saved(path, {k: v for k, v in flat.items() if not k.endswith("tracked")})
    weights = load_weights(path)
    assert weights.ignored == (("ss_predictor", "epoch") if torch_file else ())
    expected = weights_of(variables)
    for name, state in expected.networks.items():
        assert_same(weights.networks[name], state)


def test_augselfs_projector_is_a_bare_sequential(tmp_path):
    mlp = MLP(hidden=8, out=6, depth=2)
    shapes = jax.eval_shape(lambda: mlp.init(jax.random.key(0), jnp.ones((2, 32)), False))
    bare = mlp_to_pytorch(filled(shapes))
    flat = {f"backbone.{k}": v for k, v in encoder_state("resnet18").items()}
    flat |= {f"projector.{k}": v for k, v in bare.items()}
    weights = load_weights(saved(tmp_path / "file.safetensors", flat))
    plain = ConditionedProjector(hidden=8, out=6, depth=2, treatment="none")
    variables = head_variables(plain, 32)
    assert weights.projector.keys() == projector_to_pytorch(variables).keys()


def test_moco_v3s_base_encoder_is_taken_with_projector_and_predictor(tmp_path):
    encoder, momentum = encoder_state("vit"), encoder_state("vit")
    heads = {}
    for name, depth, inputs in (("projector", 3, 24), ("predictor", 2, 6)):
        mlp = MLP(hidden=8, out=6, depth=depth, last_bn=True, last_bn_affine=False)
        shapes = jax.eval_shape(
            lambda x, mlp=mlp: mlp.init(jax.random.key(0), x, False), jnp.ones((2, inputs))
        )
        heads[name] = mlp_to_pytorch(filled(shapes))
    flat = {f"base_encoder.{k}": v for k, v in encoder.items()}
    flat |= {f"base_encoder.head.{k}": v for k, v in heads["projector"].items()}
    flat |= {f"momentum_encoder.{k}": -v for k, v in momentum.items()}
    flat |= {f"predictor.{k}": v for k, v in heads["predictor"].items()}
    flat = {f"module.{k}": v for k, v in flat.items()}
    weights = load_weights(saved(tmp_path / "file.safetensors", flat))
    assert_same(weights.encoder, encoder)
    assert_same(weights.projector, {f"projector.{k}": v for k, v in heads["projector"].items()})
    assert_same(weights.predictor, heads["predictor"])
    assert weights.ignored == ("momentum_encoder",)

    variables = {"encoder": filled(encoder_variables(ENCODERS["vit"]))}
    for name, depth, inputs in (("projector", 3, 24), ("predictor", 2, 6)):
        head = ConditionedProjector(8, 6, depth, True, False, treatment="none")
        variables[name] = head_variables(head, inputs)
    variables = {
        collection: {n: v[collection] for n, v in variables.items() if collection in v}
        for collection in ("params", "batch_stats")
    }
    assert weights_of(weights.into(variables)).flat().keys() == weights.flat().keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ENCODERS)
def test_a_bare_encoder_is_read_without_its_classifier(tmp_path, name):
    state = encoder_state(name)
    head = "head" if name == "vit" else "fc"
    classifier = {f"{head}.weight": np.ones((5, 24), np.float32), f"{head}.bias": np.ones(5)}
    weights = load_weights(saved(tmp_path / "file.safetensors", state | classifier))
    assert_same(weights.encoder, state)
    assert set(weights.ignored) == classifier.keys()
    assert weights.projector is weights.predictor is None


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_read_as_single(tmp_path, dtype):
    state = {k: v.astype(dtype) for k, v in encoder_state("resnet18").items()}
    weights = load_weights(saved(tmp_path / "file.safetensors", state))
    assert_same(weights.encoder, {k: v.astype(np.float32) for k, v in state.items()})
    assert all(array.dtype == np.float32 for array in weights.encoder.values())


def test_detectron2s_names_are_those_of_mocos_converter():
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv2.weight": "res2.0.conv2.weight",
        "layer4.2.bn3.bias": "res5.2.conv3.norm.bias",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer2.0.downsample.1.weight": "res3.0.shortcut.norm.weight",
    }
    state = {name: np.ones(1) for name in names}
    assert list(to_detectron2(state)) == list(names.values())
    assert from_detectron2(to_detectron2(state)).keys() == state.keys()


def test_torchvisions_older_vit_names_are_known():
    theirs = {
        "class_token": np.ones(1),
        "encoder.layers.encoder_layer_0.mlp.linear_1.weight": np.ones(1),
        "encoder.layers.encoder_layer_0.mlp.linear_2.bias": np.ones(1),
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": np.ones(1),
    }
    assert from_torchvision(theirs).keys() == {
        "cls_token",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.bias",
        "blocks.0.attn.qkv.weight",
    }


def test_weights_that_do_not_fit_name_network_and_arrays(variables, tmp_path):
    flat = weights_of(variables).flat()
    flat["projector.projector.0.weight"] = flat["projector.projector.0.weight"].T
    del flat["projector.aug_processor.0.weight"]
    flat["projector.fc.bias"] = np.ones(2, np.float32)
    weights = load_weights(saved(tmp_path / "file.safetensors", flat))
    with pytest.raises(WeightsError, match=r"^weights of the projector") as raised:
        weights.into(variables)
    message = str(raised.value)
    assert "aug_processor.0.weight is missing" in message
    assert "fc.bias is unexpected" in message
    assert "projector.0.weight has shape (36, 8), not (8, 36)" in message


def test_a_head_that_a_run_has_not_is_refused_until_left_out(variables):
    weights = weights_of(variables)
    for collection in variables.values():
        del collection["predictor"]
    with pytest.raises(WeightsError, match="have a predictor, which this run lacks"):
        weights.into(variables)
    restored = weights.without("predictor").into(zeros_like(variables))
    assert weights_of(restored).networks.keys() == {"encoder", "projector"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"features.0.weight": np.ones(1)}, r"neither a ResNet's conv1.weight nor .* features\.0"),
        ({}, "neither"),
    ],
)
def test_what_holds_no_encoder_is_refused(tmp_path, state, message):
    with pytest.raises(WeightsError, match=message) as raised:
        load_weights(saved(tmp_path / "file.safetensors", state))
    assert "file.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list, not a state dict"),
        ({"__author__": "them", "model": [1]}, "it holds a list where a state dict should be"),
    ],
)
def test_a_pickle_of_something_else_is_reported_in_one_line(tmp_path, content, message):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(WeightsError, match=message) as raised:
        load_weights(tmp_path / "file.pkl")
    assert "\n" not in str(raised.value)


def test_weights_without_an_encoder_are_none():
    with pytest.raises(WeightsError, match=r"^there is no encoder$"):
        Weights({"projector": {"0.weight": np.ones((2, 2), np.float32)}})


def test_a_damaged_safetensors_file_is_reported_in_one_line(tmp_path):
    path = saved(tmp_path / "file.safetensors", encoder_state("resnet18"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="is damaged or no safetensors file"):
        load_weights(path)
    path.write_text("version https://git-lfs.github.com/spec/v1")  # or a web page
    with pytest.raises(WeightsError, match=r"no safetensors file .* begins with b'version https"):
        load_weights(path)
    with pytest.raises(WeightsError, match=r"none\.safetensors cannot be read"):
        load_weights(tmp_path / "none.safetensors")


def test_a_file_that_may_not_be_read_is_reported_in_one_line(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = saved(tmp_path / "file.safetensors", encoder_state("resnet18"))
    monkeypatch.setattr(weights_module, "safe_open", fails)
    with pytest.raises(WeightsError, match=r"^.*safetensors cannot be read: Permission denied$"):
        load_weights(path)


@pytest.mark.parametrize("name", ["weights.SAFETENSORS", "pytorch_model.bin", "file.pth", "0a1b"])
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path, name):
    state = encoder_state("resnet18")
    loaded = load_weights(saved(tmp_path / name, state))
    assert loaded.encoder.keys() == state.keys()


@pytest.mark.parametrize("path", ["gs://bucket/a.pth", "https://host/a.pth"])
def test_weights_elsewhere_are_to_be_downloaded(path):
    with pytest.raises(WeightsError, match=f"{path} is not a local file; download it first"):
        load_weights(path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_a_description_of_weights_is_not_taken_for_them(tmp_path, name):
    (tmp_path / name).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(WeightsError, match="holds no weights but describes them; give the file"):
        load_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["folder.safetensors", "folder.pth"])
def test_a_folder_is_no_file_of_weights(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(WeightsError, match="cannot be read: Is a directory"):
        load_weights(tmp_path / name)


def test_what_may_never_end_is_no_file_of_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path / "pipe.pth", "/dev/zero"):
        with pytest.raises(WeightsError, match="cannot be read: it is a pipe or a device"):
            load_weights(path)


def test_the_card_in_a_file_is_read(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(encoder_state("resnet18"), path, {"card": json.dumps({"step": 7})})
    assert load_weights(path).card == {"step": 7}


@pytest.mark.parametrize(
    "card",
    ["[]", '"x"', "{", "[" * 100_000, '{"input": {}}', '{"versions": []}', '{"method": "a"}'],
)
def test_an_ill_formed_card_is_none(tmp_path, caplog, card):
    path = tmp_path / "file.safetensors"
    save_file(encoder_state("resnet18"), path, {"card": card})
    assert load_weights(path).card == {}
    assert "damaged model card" in caplog.text


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_type_that_numpy_has_not_is_named(tmp_path, dtype):
    header = {"conv1.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(WeightsError, match=rf"conv1\.weight is stored as {dtype}; convert it"):
        load_weights(path)


def test_heads_hold_floating_point_numbers(tmp_path, published):
    published["projector"]["module.projector.0.weight"] = np.ones((8, 36), np.int32)
    flat = {f"{n}.{k}": v for n, state in published.items() for k, v in state.items()}
    with pytest.raises(WeightsError, match=r"its projector: projector\.0\.weight holds int32"):
        load_weights(saved(tmp_path / "file.safetensors", flat))


def test_a_vits_heads_are_recorded_or_given(tmp_path):
    """No array shows them: MoCo-v3 has 12 at every width, others 6 at the same one."""
    state = encoder_state("vit")
    bare = saved(tmp_path / "bare.safetensors", state)
    assert load_weights(bare).heads is None
    assert load_weights(bare, heads=6).heads == 6
    moco = {f"module.base_encoder.{name}": array for name, array in state.items()}
    moco = saved(tmp_path / "moco.safetensors", moco)
    assert load_weights(moco).heads == 12
    with pytest.raises(WeightsError, match=r"heads=6 differs from the 12 that it was made with"):
        load_weights(moco, heads=6)
    save_file(state, bare, {"card": json.dumps({"architecture": {"heads": 3}})})
    assert load_weights(bare).heads == 3
    resnet = saved(tmp_path / "resnet.safetensors", encoder_state("resnet18"))
    with pytest.raises(WeightsError, match="heads=6 is for ViTs"):
        load_weights(resnet, heads=6)
