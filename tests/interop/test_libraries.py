"""What the model card says loads in torchvision and timm, and computes the same features there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.export import export
from cassle_jax.interop.architecture import architecture_of
from cassle_jax.interop.pytorch import encoder_to_pytorch
from cassle_jax.interop.weights import Weights, load_weights
from tests.interop.states import ENCODERS, SIZE, assert_same, encoder_variables, filled

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

pytestmark = pytest.mark.pytorch

CARD = {
    "input": {"size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3},
    "versions": {},
    "converted_from": {"file": "", "sha256": ""},
}
LIBRARY = {
    "torchvision": "torchvision",
    "torchvision, PyTorch's own file": "torchvision",
    "timm": "timm",
}
FITTING_TIMM = ("wide", "convnext", "vit")


def images():
    """Smooth images as a photograph's: noise summed over both axes, to mean 0 and deviation 1."""
    noise = np.random.default_rng(0).standard_normal((4, SIZE, SIZE, 3))
    summed = noise.cumsum(1).cumsum(2)
    axes = (1, 2)
    return ((summed - summed.mean(axes, keepdims=True)) / summed.std(axes, keepdims=True)).astype(
        np.float32
    )


def model_by_the_card(folder, title, monkeypatch):
    """Runs the lines under `title` in the card, beside it."""
    card = (folder / "model_card.md").read_text()
    lines = re.search(rf"^{re.escape(title)}:\n\n```python\n(.*?)```", card, re.M | re.S)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(lines, names)
    return names["model"].eval()


@pytest.mark.parametrize("title", LIBRARY)
@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_the_same_in_pytorch(tmp_path, monkeypatch, name, title):
    pytest.importorskip(LIBRARY[title])
    if title == "timm" and name not in FITTING_TIMM:
        pytest.skip("timm makes no such encoder")
    encoder = ENCODERS[name]
    variables = filled(encoder_variables(encoder))
    format = {"torchvision, PyTorch's own file": "torch"}.get(title, title)
    heads = getattr(encoder, "heads", None)
    weights = Weights({"encoder": encoder_to_pytorch(variables)}, card=CARD, heads=heads)
    export(weights, tmp_path, [format])
    model = model_by_the_card(tmp_path, title, monkeypatch)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images().transpose(0, 3, 1, 2).copy())).numpy()
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda x: encoder.apply(variables, x, False))(jnp.asarray(images()))
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "convnext_tiny"])
def test_torchvisions_own_models_are_read(tmp_path, name):
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    weights = load_weights(tmp_path / "model.pth")
    head = {"resnet18": "fc", "vit_b_16": "heads.head", "convnext_tiny": "classifier.2"}[name]
    assert set(weights.ignored) == {f"{head}.weight", f"{head}.bias"}
    export(Weights(weights.networks, card=CARD), tmp_path, ["torchvision"])
    assert_same(load_weights(tmp_path / "torchvision.safetensors").encoder, weights.encoder)


@pytest.mark.parametrize("name", ["resnet18", "vit_small_patch16_224", "convnext_tiny"])
def test_timms_own_models_are_read(tmp_path, name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    encoder = load_weights(tmp_path / "model.pth").encoder
    expected = {k: v.numpy() for k, v in model.state_dict().items() if not k.endswith("tracked")}
    assert_same(encoder, expected)


# Class of transformers' model and of its configuration, with what differs from a ViT's.
OF_HUGGING_FACE = {
    "ViT": {},
    "ViTMAE": {"mask_ratio": 0.0},
    "Dinov2": {},
    "Dinov2, SwiGLU": {"use_swiglu_ffn": True},
    "Dinov2WithRegisters": {"num_register_tokens": 4},
    "DINOv3ViT": {"num_register_tokens": 4},
}


@pytest.mark.parametrize("saved", ["save_pretrained", "state_dict"])
@pytest.mark.parametrize("name", OF_HUGGING_FACE)
def test_hugging_faces_models_are_read_with_their_features(tmp_path, name, saved):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2}
    settings = {"intermediate_size": 256, "image_size": SIZE, "patch_size": 8}
    kind = name.split(",")[0]
    config = getattr(transformers, f"{kind}Config")(**(sizes | settings | OF_HUGGING_FACE[name]))
    model = getattr(transformers, f"{kind}Model")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.1 * torch.randn_like(each))
        pixels = torch.from_numpy(images().transpose(0, 3, 1, 2).copy())
        theirs = model(pixels).last_hidden_state[:, 0].numpy()
    path = tmp_path / "model.safetensors"
    if saved == "save_pretrained":
        model.save_pretrained(tmp_path)
    else:
        save_file(model.state_dict(), path)
    weights = load_weights(path, heads=1)
    encoder = architecture_of(weights.encoder, 1, weights.position_offset).encoder()
    shapes = {kind: {"encoder": tree} for kind, tree in encoder_variables(encoder, SIZE).items()}
    variables = {"params": weights.into(shapes)["params"]["encoder"]}
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda x: encoder.apply(variables, x, False))(jnp.asarray(images()))
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
