"""The encoder is found in the checkpoints of other projects, under the names they give it."""

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.layouts import WRAPPERS, networks_in
from cassle_jax.interop.pytorch import encoder_from_pytorch
from cassle_jax.interop.weights import Weights, load_weights, weights_of
from tests.interop.states import ENCODERS, assert_same, encoder_state, encoder_variables, filled

HEAD = {"0.weight": np.ones((8, 8), np.float32), "2.bias": np.ones(8, np.float32)}


def under(prefix, state):
    return {f"{prefix}{name}": array for name, array in state.items()}


def negative(state):
    """The momentum copy of a network, which must not be taken for it."""
    return {name: -array for name, array in state.items()}


def in_sequence(state, first):
    """The names of `Sequential(*resnet.children())`, whose stages begin at `first`."""
    parts = {"conv1": 0, "bn1": 1} | {f"layer{i}": first + i - 1 for i in range(1, 5)}
    split = ((*name.partition("."), array) for name, array in state.items())
    return {f"{parts[part]}.{rest}": array for part, _, rest, array in split}


def moco_v2(state):
    return {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": under("module.encoder_q.", {**state, **under("fc.", HEAD)})
        | under("module.encoder_k.", {**negative(state), **under("fc.", HEAD)})
        | {"module.queue": np.ones((8, 4), np.float32), "module.queue_ptr": np.zeros(1, int)},
        "optimizer": {"state": {0: {"momentum_buffer": np.ones(3)}}, "param_groups": [{"lr": 1}]},
    }


def simsiam(state):
    model = under("module.encoder.", {**state, **under("fc.", HEAD)})
    return {"epoch": 1, "state_dict": model | under("module.predictor.", HEAD)}


def swav(state):
    heads = under("projection_head.", HEAD) | {"prototypes.weight": np.ones((4, 8), np.float32)}
    return under("module.", state | heads)


def dino(state):
    networks = under("backbone.", state) | under("head.mlp.", HEAD)
    return {
        "student": under("module.", negative(networks)),
        "teacher": networks,
        "dino_loss": {"center": np.ones((1, 8), np.float32)},
        "epoch": 1,
    }


def vissl(state):
    model = {"trunk": under("_feature_blocks.", state), "heads": under("0.clf.", HEAD)}
    return {"classy_state_dict": {"base_model": {"model": model, "meta": {}}}, "iteration": 1}


def lightly(state):
    parts = in_sequence(state, 4)
    return {
        "state_dict": under("backbone.", parts)
        | under("backbone_momentum.", negative(parts))
        | under("projection_head.layers.", HEAD),
        "pytorch-lightning_version": "2.0",
    }


def lightly_with_a_model(state):
    """`self.backbone` once more in `self.model`: the same tensors by two names."""
    parts = in_sequence(state, 4)
    return {"state_dict": under("backbone.", parts) | under("model.backbone.", parts)}


def solo_learn(state):
    return {
        "state_dict": under("backbone.", state)
        | under("momentum_backbone.", negative(state))
        | under("projector.", HEAD)
        | under("classifier.", HEAD),
        "hyper_parameters": {"method": "byol"},
    }


def solo_learn_before(state):
    return {"state_dict": under("encoder.", state) | under("classifier.", HEAD)}


def compiled(state):
    return under("_orig_mod.", state)


def compiled_in_parallel(state):
    return {"model": {"state_dict": under("module._orig_mod.backbone._orig_mod.", state)}}


def cifar(state):
    """Lightly's `ResNetGenerator` and many others for CIFAR-10 say shortcut."""
    renamed = {name.replace("downsample", "shortcut"): array for name, array in state.items()}
    return {"net": renamed | under("linear.", {"weight": np.ones((10, 8), np.float32)})}


LAYOUTS = (
    moco_v2,
    simsiam,
    swav,
    dino,
    vissl,
    lightly,
    lightly_with_a_model,
    solo_learn,
    solo_learn_before,
    compiled,
    compiled_in_parallel,
    cifar,
)


@pytest.fixture(scope="module")
def resnet():
    return encoder_state("resnet18")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_trained_encoder_of_each_project_is_found(resnet, layout):
    networks, _, _ = networks_in(layout(resnet))
    assert_same(networks["encoder"], resnet)


@pytest.mark.parametrize("layout", [dino, vissl, compiled_in_parallel])
def test_so_are_vision_transformers(layout):
    state = encoder_state("vit")
    assert_same(networks_in(layout(state))[0]["encoder"], state)


@pytest.mark.pytorch
def test_a_pytorch_file_of_a_nested_layout_is_read(resnet, tmp_path):
    torch = pytest.importorskip("torch")
    content = jax.tree.map(
        lambda leaf: torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, moco_v2(resnet)
    )
    torch.save(content, tmp_path / "moco.pth.tar")
    weights = load_weights(tmp_path / "moco.pth.tar")
    assert_same(weights.encoder, resnet)
    assert {"encoder_k", "queue", "fc.0.weight"} <= {*weights.ignored}


def test_two_encoders_that_nothing_distinguishes_are_named(resnet):
    with pytest.raises(WeightsError, match=r"several encoders: left, right; save one's"):
        networks_in(under("left.", resnet) | under("right.", negative(resnet)))


def test_a_sequence_without_its_relu_computes_something_else(resnet):
    """Lightly's `ResNetGenerator` calls it as a function, which `children()` leaves out."""
    with pytest.raises(WeightsError, match="Sequential without ReLU"):
        networks_in(under("backbone.", in_sequence(resnet, 2)))
    with pytest.raises(WeightsError, match="Sequential without max-pooling"):
        networks_in(in_sequence(resnet, 3))
    small = encoder_state("small_images")
    assert_same(networks_in(in_sequence(small, 3))[0]["encoder"], small)


def test_a_dict_under_two_names_has_both(resnet):
    heads = {"0.weight": np.ones((4, 4), np.float32)}
    content = {"ss_predictor": {"crop": heads}, "backbone": resnet, "projector": heads, "epoch": 7}
    networks, ignored, _ = networks_in(content)
    assert networks["projector"].keys() == {"projector.0.weight"}
    assert ignored == ("ss_predictor", "epoch")


def test_two_arrays_of_one_name_are_refused(resnet):
    again = {"backbone": resnet, "backbone.conv1.weight": resnet["conv1.weight"] + 1}
    with pytest.raises(WeightsError, match=r"two arrays called (backbone\.)?conv1\.weight"):
        networks_in(again)


@pytest.mark.parametrize("parts", [[f"part_{i}" for i in range(10)], [*WRAPPERS]])
@pytest.mark.parametrize("empty", [False, True])
def test_dicts_that_share_dicts_cannot_hold_the_reader_up(resnet, parts, empty):
    """Empty dicts have no names, and a wrapper's adds nothing to a name; both take time."""
    content = {} if empty else resnet
    for _ in range(8):
        content = dict.fromkeys(parts, content)
    with pytest.raises(WeightsError, match="more than 100000 names"):
        networks_in(content)


@pytest.mark.parametrize(
    "parts",
    [
        ["cls_token"],
        ["embeddings.cls_token"],
        ["0.weight", *(f"{stage}.0.conv1.weight" for stage in (4, 5, 6, 7))],
    ],
)
def test_encoders_without_number_cannot_hold_the_reader_up(parts):
    """Each takes a pass over all names, so a file of 100 000 took hours."""
    array = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(WeightsError, match="it has 3000 encoders; save one's"):
        networks_in({f"{i}_.{part}": array for i in range(3000) for part in parts})


def test_a_file_may_hold_a_dict_within_itself(resnet):
    content = {"model": resnet}
    content["again"] = content
    assert_same(networks_in(content)[0]["encoder"], resnet)
    deep = {}
    for _ in range(10_000):
        deep = {"in": deep}
    with pytest.raises(WeightsError, match="neither a ResNet's"):
        networks_in(deep)


@pytest.mark.parametrize("stem", ["stem.0.weight", "features.0.0.weight"])
def test_a_network_with_a_stem_like_a_convnexts_is_no_second_encoder(resnet, stem):
    content = {f"encoder.{name}": array for name, array in resnet.items()}
    content[f"decoder.{stem}"] = np.ones((4, 3, 4, 4), np.float32)
    assert_same(networks_in(content)[0]["encoder"], resnet)
    with pytest.raises(WeightsError, match="neither a ResNet's"):
        networks_in({stem: content[f"decoder.{stem}"]})


def test_a_classifiers_norm_is_a_head_of_any_encoder_but_a_convnext(resnet):
    norm = {"head.norm.weight": np.ones(8, np.float32)}
    networks, ignored, _ = networks_in(resnet | norm)
    assert_same(networks["encoder"], resnet)
    assert ignored == ("head.norm.weight",)
    convnext = encoder_state("convnext")
    assert_same(networks_in(convnext)[0]["encoder"], convnext)


@pytest.mark.parametrize(
    ("spoil", "dtype"), [(np.nan, np.float32), (-np.inf, np.float16), (1e300, np.float64)]
)
def test_weights_that_are_not_finite_are_refused_by_name(resnet, tmp_path, spoil, dtype):
    state = dict(resnet)
    state["layer2.0.bn1.running_var"] = state["layer2.0.bn1.running_var"].astype(dtype)
    state["layer2.0.bn1.running_var"][1] = spoil
    message = r"encoder: the weights layer2\.0\.bn1\.running_var are not finite"
    with pytest.raises(WeightsError, match=message):
        Weights({"encoder": state})
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=rf"file\.safetensors: its {message}"):
        load_weights(tmp_path / "file.safetensors")
    variables = encoder_variables(ENCODERS["resnet18"])
    with pytest.raises(WeightsError, match=r"layer2\.0\.bn1\.running_var are not finite"):
        encoder_from_pytorch(state, variables)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bn1.running_var", -1.0, r"the variances bn1\.running_var are below 0; the file is"),
        ("conv1.weight", None, r"conv1\.weight has shape \(0, 3, 7, 7\), which holds no numbers"),
    ],
)
def test_numbers_that_no_network_has_are_refused_by_name(resnet, tmp_path, name, value, message):
    state = dict(resnet)
    state[name] = state[name][:0] if value is None else np.full_like(state[name], value)
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=rf"file\.safetensors: its encoder: {message}"):
        load_weights(tmp_path / "file.safetensors")


def test_a_runs_weights_that_are_not_finite_are_not_exported():
    variables = filled(encoder_variables(ENCODERS["resnet18"]))
    variables["params"]["bn1"]["bias"][0] = np.nan
    of_run = {collection: {"encoder": arrays} for collection, arrays in variables.items()}
    with pytest.raises(WeightsError, match=r"encoder: the weights bn1\.bias are not finite"):
        weights_of(of_run)


def test_a_vits_positions_are_interpolated_to_another_image_size():
    """As Pillow resizes a picture; weights of 32-pixel images start an encoder for 48 pixels."""
    encoder, state = ENCODERS["vit"], encoder_state("vit")
    fitted = encoder_from_pytorch(state, encoder_variables(encoder, size=48))
    positions = fitted["params"]["pos_embed"]
    for channel in range(24):
        grid = Image.fromarray(state["pos_embed"][0, 1:, channel].reshape(4, 4))
        resized = np.asarray(grid.resize((6, 6), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(positions[0, 1:, channel].reshape(6, 6), resized, atol=1e-4)
    np.testing.assert_array_equal(positions[:, 0], state["pos_embed"][:, 0])
    state["pos_embed"] = state["pos_embed"][:, :-1]
    with pytest.raises(WeightsError, match="only square grids can be resized"):
        encoder_from_pytorch(state, encoder_variables(encoder, size=48))
