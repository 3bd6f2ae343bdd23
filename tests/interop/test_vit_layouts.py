"""DINOv2's, DINOv3's and MAE's ViTs compute here what their papers say, and leave as they came."""

import dataclasses
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cassle_jax.export import export
from cassle_jax.interop.architecture import ViTArchitecture, architecture_of
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.weights import Weights, load_weights
from cassle_jax.subjects import open_subject
from tests.everyday import everyday_pairs
from tests.interop.states import assert_same, encoder_state, encoder_variables

WIDTH, HEADS, DEPTH, PATCH, SIDE = 24, 2, 2, 14, 3
SIZE = SIDE * PATCH
KINDS = {
    "dinov2": {},
    "dinov2_reg4": {"registers": 4},
    "dinov2_giant": {"swiglu": True},
    "dinov2_giant_reg4": {"registers": 4, "swiglu": True},
}
CARD = {
    "input": {"size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3},
    "versions": {},
    "converted_from": {"file": "", "sha256": ""},
}


def published(registers=0, swiglu=False, scale=True):
    """A small DINOv2 ViT's arrays in the published names."""
    random = np.random.default_rng(registers + swiglu)
    hidden = (int(4 * WIDTH * 2 / 3) + 7) // 8 * 8
    feed_forward = {"w12": (WIDTH, 2 * hidden), "w3": (hidden, WIDTH)}
    if not swiglu:
        feed_forward = {"fc1": (WIDTH, 4 * WIDTH), "fc2": (4 * WIDTH, WIDTH)}
    linear = {"attn.qkv": (WIDTH, 3 * WIDTH), "attn.proj": (WIDTH, WIDTH)}
    linear |= {f"mlp.{name}": shape for name, shape in feed_forward.items()}
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + SIDE**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
    }
    if scale:
        shapes["mask_token"] = (1, WIDTH)
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    norms = ["norm"]
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        for name, (inputs, outputs) in linear.items():
            shapes[f"{block}.{name}.weight"] = (outputs, inputs)
            shapes[f"{block}.{name}.bias"] = (outputs,)
        if scale:
            shapes |= {f"{block}.ls{n}.gamma": (WIDTH,) for n in (1, 2)}
    shapes |= {f"{norm}.{leaf}": (WIDTH,) for norm in norms for leaf in ("weight", "bias")}
    return {
        name: (random.standard_normal(shape) / math.sqrt(np.prod(shape[1:]) or 1)).astype("f4")
        for name, shape in shapes.items()
    }


# As its code computes them, for heads of 64 channels.
METAS_PERIODS = np.float32([100 ** (2 * pair / 32) for pair in range(16)])


def published_v3():
    """A small DINOv3 ViT's arrays; the periods are rounded, as bfloat16 would."""
    state = published(registers=4)
    del state["pos_embed"]
    state["storage_tokens"] = state.pop("register_tokens")
    state["rope_embed.periods"] = np.float32([1, 4.625, 21.5])
    mask = np.repeat([1, 0, 1], WIDTH).astype(np.float32)
    return state | {f"blocks.{block}.attn.qkv.bias_mask": mask for block in range(DEPTH)}


def turned(x, side, periods):
    """Queries or keys [batch, tokens, of_head], those of patches as complex numbers turned."""
    half = x.shape[-1] // 2
    x, first = x.copy(), x.shape[1] - side**2
    for row in range(side):
        for column in range(side):
            places = [(2 * at + 1) / side - 1 for at in (row, column)]
            angle = np.concatenate([2 * np.pi * place / periods for place in places])
            patch = x[:, first + row * side + column]
            pairs = (patch[:, :half] + 1j * patch[:, half:]) * np.exp(1j * angle)
            patch[:] = np.concatenate([pairs.real, pairs.imag], axis=1)
    return x


def images(size):
    return np.random.default_rng(size).standard_normal((2, size, size, 3))


def features(state, pixels, positions):
    """The class token after the blocks, by the papers' equations in float64 (N×H×W×3 images).

    `positions` are those of the class token and of each patch.
    """
    w = {name: array.astype(np.float64) for name, array in state.items()}
    w |= {"register_tokens": w["storage_tokens"]} if "storage_tokens" in w else {}
    periods, side = w.get("rope_embed.periods"), pixels.shape[1] // PATCH

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + (1e-6 if periods is None else 1e-5))
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(x, block):
        bias = w[f"{block}.attn.qkv.bias"] * w.get(f"{block}.attn.qkv.bias_mask", 1.0)
        q, k, v = np.split(x @ w[f"{block}.attn.qkv.weight"].T + bias, 3, axis=-1)
        out = np.empty_like(q)
        of_head = WIDTH // HEADS
        for head in range(HEADS):
            own = slice(head * of_head, (head + 1) * of_head)
            queries, keys = q[..., own], k[..., own]
            if periods is not None:
                queries, keys = (turned(each, side, periods) for each in (queries, keys))
            scores = np.exp(queries @ keys.transpose(0, 2, 1) / math.sqrt(of_head))
            out[..., own] = scores / scores.sum(-1, keepdims=True) @ v[..., own]
        return linear(out, f"{block}.attn.proj")

    def feed_forward(x, block):
        if f"{block}.mlp.w12.weight" in w:
            gate, value = np.split(linear(x, f"{block}.mlp.w12"), 2, axis=-1)
            return linear(gate / (1 + np.exp(-gate)) * value, f"{block}.mlp.w3")
        x = linear(x, f"{block}.mlp.fc1")
        return linear(x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2, f"{block}.mlp.fc2")

    patches = np.empty((len(pixels), side, side, WIDTH))
    for row in range(side):
        for column in range(side):
            part = pixels[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            patches[:, row, column] = np.einsum("nyxc,dcyx->nd", part, w["patch_embed.proj.weight"])
    patches = patches.reshape(len(pixels), -1, WIDTH) + w["patch_embed.proj.bias"]
    every = np.ones((len(pixels), 1, 1))
    x = np.concatenate([every * w["cls_token"], patches], axis=1) + positions
    if "register_tokens" in w:
        x = np.concatenate([x[:, :1], every * w["register_tokens"], x[:, 1:]], axis=1)
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        x = x + attention(norm(x, f"{block}.norm1"), block) * w.get(f"{block}.ls1.gamma", 1.0)
        x = x + feed_forward(norm(x, f"{block}.norm2"), block) * w.get(f"{block}.ls2.gamma", 1.0)
    return norm(x, "norm")[:, 0]


def cubic(distance, a):
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def resized(positions, side, offset):
    """The positions of side×side patches; antialiased (Pillow's filter) where `offset` is None."""
    grid = positions.astype(np.float64)[0, 1:].reshape(SIDE, SIDE, WIDTH)
    weights = np.zeros((side, SIDE))
    for place in range(side):
        if offset is None:
            scale = max(SIDE / side, 1)
            centre = (place + 0.5) * SIDE / side - 0.5
            for old in range(SIDE):
                weights[place, old] = cubic((old - centre) / scale, -0.5)
            weights[place] /= weights[place].sum()
        else:
            centre = (place + 0.5) / ((side + offset) / SIDE) - 0.5
            first = math.floor(centre) - 1
            for old in range(first, first + 4):
                weights[place, min(max(old, 0), SIDE - 1)] += cubic(old - centre, -0.75)
    grid = np.einsum("yr,xc,rcd->yxd", weights, weights, grid).reshape(1, -1, WIDTH)
    return np.concatenate([positions[:, :1].astype(np.float64), grid], axis=1)


def opened(state, tmp_path, made_for=SIZE):
    """The weights in a file, their encoder, and its variables for images of a size."""
    save_file(state, tmp_path / "vit.safetensors")
    weights = load_weights(tmp_path / "vit.safetensors", heads=HEADS)
    architecture = architecture_of(weights.encoder, weights.heads, weights.position_offset)
    encoder = architecture.encoder()
    shapes = {
        name: {"encoder": tree} for name, tree in encoder_variables(encoder, made_for).items()
    }
    return weights, encoder, {"params": weights.into(shapes)["params"]["encoder"]}


def computed(encoder, variables, pixels):
    with jax.default_matmul_precision("highest"):
        return jax.jit(encoder.apply, static_argnums=2)(
            variables, jnp.asarray(pixels, jnp.float32), False
        )


def assert_equal(ours, theirs):
    assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize(
    ("kind", "size"),
    everyday_pairs(
        KINDS,
        [SIZE, 2 * PATCH, 5 * PATCH],
        ("dinov2", 2 * PATCH),
        ("dinov2_reg4", 5 * PATCH),
        ("dinov2_giant", SIZE),
        ("dinov2_giant_reg4", 2 * PATCH),
    ),
)
def test_dinov2s_features_are_the_published_equations(tmp_path, kind, size):
    """At the size of its positions, and where the model or the loading interpolates them."""
    state = published(**KINDS[kind])
    offset = None if "register_tokens" in state else 0.1
    positions = state["pos_embed"]
    if size != SIZE:
        positions = resized(positions, size // PATCH, offset)
    expected = features(state, images(size), positions)
    for made_for in {SIZE, size}:
        _, encoder, variables = opened(state, tmp_path, made_for)
        assert_equal(computed(encoder, variables, images(size)), expected)


@pytest.mark.parametrize("size", [SIZE, 2 * PATCH])
def test_dinov3s_features_are_the_published_equations(tmp_path, size):
    state = published_v3()
    weights, encoder, variables = opened(state, tmp_path)
    assert_equal(computed(encoder, variables, images(size)), features(state, images(size), 0.0))
    assert weights.ignored == ("mask_token",)


def test_dinov3s_are_written_for_this_project_alone(tmp_path):
    weights, *_ = opened(published_v3(), tmp_path)
    export(with_card(weights), tmp_path / "cassle", ["cassle"])
    assert_same(load_weights(tmp_path / "cassle" / "cassle.safetensors").encoder, weights.encoder)
    subject = open_subject(tmp_path / "cassle" / "cassle.safetensors")
    assert subject.spec.size == SIZE
    for other in ("timm", "torchvision", "dinov2"):
        with pytest.raises(WeightsError, match=r"rotary positions .* use the format cassle"):
            export(with_card(weights), tmp_path, [other])


def test_maes_encoder_is_read_and_its_decoder_left_out_with_a_line(tmp_path, caplog):
    state = published(scale=False)
    decoder = {name: np.ones(4, np.float32) for name in ("decoder_pos_embed", "mask_token")}
    decoder |= {f"decoder_blocks.{n}.norm1.weight": np.ones(4, np.float32) for n in range(3)}
    with caplog.at_level(logging.INFO):
        weights, encoder, variables = opened({**state, **decoder}, tmp_path)
    assert weights.ignored == ("decoder_blocks", "decoder_pos_embed", "mask_token")
    assert "not read: decoder_blocks, decoder_pos_embed, mask_token" in caplog.text
    expected = features(state, images(SIZE), state["pos_embed"])
    assert_equal(computed(encoder, variables, images(SIZE)), expected)


def in_timm(state):
    """timm's DINOv2: registers and class token have no positions of their own."""
    state = {name.replace("w12", "fc1").replace("w3", "fc2"): state[name] for name in state}
    del state["mask_token"]
    state["reg_token"] = state.pop("register_tokens")
    state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


# What timm's models have where no argument says otherwise.
PLAIN = {"mlp_ratio": 4.0, "init_values": None}
TIMMS_OWN = {
    "vit_tiny_patch16_224": PLAIN,
    "vit_small_patch16_224": PLAIN,
    "vit_base_patch16_224": PLAIN,
    "vit_large_patch16_224": PLAIN,
    "vit_huge_patch14_224": PLAIN,
    "vit_giant_patch14_224": PLAIN | {"mlp_ratio": 48 / 11},
    "vit_giant_patch14_dinov2": {"mlp_ratio": 5.33334, "init_values": 1e-5, "swiglu": True},
}


@pytest.mark.parametrize("kind", ["dinov2_reg4", "dinov2_giant_reg4"])
def test_timms_vits_with_registers_are_read_and_written_as_they_are(tmp_path, kind):
    of_dinov2 = published(**KINDS[kind])
    state = in_timm(of_dinov2)
    weights, encoder, variables = opened(state, tmp_path)
    without = np.pad(state["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    expected = features(of_dinov2, images(SIZE), without)
    assert_equal(computed(encoder, variables, images(SIZE)), expected)
    export(with_card(weights), tmp_path, ["timm"])
    assert_same(load_file(tmp_path / "timm" / "model.safetensors"), state)
    arguments = json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]
    assert arguments["reg_tokens"] == 4
    assert arguments["no_embed_class"]
    assert arguments["init_values"] > 0
    if "giant" in kind:
        assert int(WIDTH * arguments["mlp_ratio"]) == state["blocks.0.mlp.fc1.bias"].size


@pytest.mark.parametrize("width", [192, 384, 768, 1024, 1280, 1536])
@pytest.mark.parametrize("kind", [{}, {"layer_scale": True}, {"swiglu": True}])
def test_timms_models_are_named_as_timm_names_them_and_built_as_they_are(width, kind):
    architecture = ViTArchitecture(width, 2, 2, PATCH, SIZE, 3, **kind)
    config = architecture.timm_config()
    arguments = TIMMS_OWN[config["architecture"]] | config["model_args"]
    swiglu = kind.get("swiglu", False)
    assert arguments.pop("swiglu", False) == swiglu
    hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
    assert int(width * arguments["mlp_ratio"]) == (2 * hidden if swiglu else 4 * width)
    assert bool(arguments["init_values"]) == kind.get("layer_scale", False)


def test_positions_that_registers_share_are_added_to_them(tmp_path):
    of_dinov2 = published(registers=4)
    state, shared = in_timm(of_dinov2), np.ones((1, 4, WIDTH), np.float32)
    own = of_dinov2["pos_embed"][:, :1]
    state["pos_embed"] = np.concatenate([own, shared, state["pos_embed"]], axis=1)
    of_dinov2["register_tokens"] = of_dinov2["register_tokens"] + shared
    _, encoder, variables = opened(state, tmp_path)
    expected = features(of_dinov2, images(SIZE), of_dinov2["pos_embed"])
    assert_equal(computed(encoder, variables, images(SIZE)), expected)


def in_hugging_face(state):
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
    }
    parts = [
        ("blocks.", "encoder.layer."),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
        ("attn.proj", "attention.output.dense"),
        ("mlp.w12", "mlp.weights_in"),
        ("mlp.w3", "mlp.weights_out"),
    ]
    renamed = {}
    for name, array in state.items():
        if ".attn.qkv." in name:
            block, leaf = name.removeprefix("blocks.").split(".attn.qkv.")
            for part, each in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                renamed[f"encoder.layer.{block}.attention.attention.{part}.{leaf}"] = each
            continue
        theirs = "layernorm" + name.removeprefix("norm") if name.startswith("norm.") else name
        for old, new in parts:
            theirs = theirs.replace(old, new)
        renamed[names.get(name, theirs)] = array
    return renamed


@pytest.mark.parametrize("prefix", ["", "dinov2."])
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_giant_reg4"])
def test_hugging_faces_dinov2_is_the_same(tmp_path, kind, prefix):
    state = published(**KINDS[kind])
    theirs = {prefix + name: array for name, array in in_hugging_face(state).items()}
    weights, *_ = opened(theirs, tmp_path)
    assert weights.position_offset == (0.0 if kind == "dinov2" else None)
    expected, *_ = opened(state, tmp_path)
    assert_same(weights.encoder, expected.encoder)


def test_of_two_of_hugging_faces_the_one_to_evaluate_is_read(tmp_path):
    state = published(**KINDS["dinov2"])
    theirs = in_hugging_face(state)
    both = {f"student.{name}": array + 1 for name, array in theirs.items()}
    weights, *_ = opened(both | {f"teacher.{name}": theirs[name] for name in theirs}, tmp_path)
    expected, *_ = opened(state, tmp_path)
    assert_same(weights.encoder, expected.encoder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attention.q_norm.weight", "its ViT has normalised queries and keys"),
        ("attention.attention.relative_position_bias.table", "its ViT has relative positions"),
    ],
)
def test_what_hugging_faces_vits_have_beyond_those_here_is_named(tmp_path, name, message):
    theirs = in_hugging_face(published()) | {f"encoder.layer.0.{name}": np.ones(4, np.float32)}
    with pytest.raises(WeightsError, match=message):
        opened(theirs, tmp_path)


IN_MEMORY = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
PLAIN = {
    ".norm1": ".layernorm_before",
    ".norm2": ".layernorm_after",
    ".mlp.fc1": ".intermediate.dense",
    ".mlp.fc2": ".output.dense",
}


def renamed(state, parts):
    for old, new in parts.items():
        state = {name.replace(old, new): array for name, array in state.items()}
    return state


def test_hugging_faces_state_dict_is_read_as_its_file(tmp_path):
    state = published(**KINDS["dinov2"])
    weights, *_ = opened(renamed(in_hugging_face(state), IN_MEMORY), tmp_path)
    expected, *_ = opened(state, tmp_path)
    assert_same(weights.encoder, expected.encoder)


@pytest.mark.parametrize("kind", ["hugging_face", "dinov3", "timm"])
def test_arrays_that_are_joined_must_fit_each_other(tmp_path, kind):
    state, name = published(**KINDS["dinov2"]), "encoder.layer.0.attention.attention.key.weight"
    if kind == "hugging_face":
        state = in_hugging_face(state) | {name: np.ones((4, 4), np.float32)}
    elif kind == "dinov3":
        state["blocks.0.attn.qkv.bias_mask"] = np.ones(4, np.float32)
    else:
        state["reg_token"] = np.ones((1, 4, 4), np.float32)
        state["pos_embed"] = np.ones((1, 21, 24), np.float32)
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=r"file\.safetensors: its arrays do not fit each other"):
        load_weights(tmp_path / "file.safetensors")


def test_gates_that_hugging_face_keeps_apart_are_joined(tmp_path):
    state = published(**KINDS["dinov2_giant_reg4"])
    theirs = renamed(in_hugging_face(state), {"weights_out": "down_proj"})
    for name in [name for name in theirs if "weights_in" in name]:
        for part, array in zip(("gate", "up"), np.split(theirs.pop(name), 2), strict=True):
            theirs[name.replace("weights_in", f"{part}_proj")] = array
    weights, *_ = opened(theirs, tmp_path)
    expected, *_ = opened(state, tmp_path)
    assert_same(weights.encoder, expected.encoder)


@pytest.mark.parametrize(
    "parts",
    [PLAIN, IN_MEMORY | {k: PLAIN[k] for k in (".norm1", ".norm2")} | {"encoder.layer": "layers"}],
)
def test_hugging_faces_vit_and_mae_are_the_same(tmp_path, parts):
    state = published(scale=False)
    theirs = renamed(in_hugging_face(state), parts) | {"pooler.dense.bias": np.ones(4, "f4")}
    weights, *_ = opened(theirs, tmp_path)
    assert weights.ignored == ("pooler.dense.bias",)
    expected, *_ = opened(state, tmp_path)
    assert_same(weights.encoder, expected.encoder)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_hugging_faces_dinov3_is_metas(tmp_path, prefix):
    state = published(registers=4)
    del state["pos_embed"]
    for block in range(DEPTH):
        state[f"blocks.{block}.attn.qkv.bias"][WIDTH : 2 * WIDTH] = 0.0
    parts = IN_MEMORY | {
        "encoder.layer": f"{prefix}layer",
        "patch_embeddings.projection": "patch_embeddings",
        "layernorm": "norm",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    }
    theirs = renamed(in_hugging_face(state), parts)
    theirs = {name: array for name, array in theirs.items() if not name.endswith("k_proj.bias")}
    save_file(theirs, tmp_path / "theirs.safetensors")
    metas = {"storage_tokens": state.pop("register_tokens"), "rope_embed.periods": METAS_PERIODS}
    save_file(state | metas, tmp_path / "metas.safetensors")
    read = (load_weights(tmp_path / f"{name}.safetensors").encoder for name in ("theirs", "metas"))
    assert_same(*read)


def with_card(weights):
    return Weights(weights.networks, (), CARD, HEADS, weights.position_offset)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_dinov2s_format_has_every_array_as_published(tmp_path, kind):
    state = published(**KINDS[kind])
    weights, *_ = opened(state, tmp_path)
    export(with_card(weights), tmp_path, ["dinov2", "cassle"])
    del state["mask_token"]
    assert_same(load_file(tmp_path / "dinov2.safetensors"), state)
    for name in ("dinov2.safetensors", "cassle.safetensors"):
        again = load_weights(tmp_path / name)
        assert_same(again.encoder, weights.encoder)
        assert (again.heads, again.position_offset) == (HEADS, weights.position_offset)


def test_dinov2s_format_is_for_vits(tmp_path):
    weights = Weights({"encoder": encoder_state("resnet18")}, card=CARD)
    with pytest.raises(WeightsError, match="DINOv2's format has names for ViTs only, not for resn"):
        export(weights, tmp_path, ["dinov2"])


def test_blocks_in_the_chunks_of_dinov2s_training_are_read(tmp_path):
    state = published()
    weights, *_ = opened(state, tmp_path)
    chunked = {name.replace("blocks.", "blocks.0."): array for name, array in state.items()}
    assert_same(opened(chunked, tmp_path)[0].encoder, weights.encoder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope.freqs", "its ViT has rotary position embeddings of another kind than DINOv3's"),
        ("blocks.0.mlp.w1.weight", "its ViT has a SwiGLU of two matrices, as DINOv3's larger"),
        ("fc_norm.weight", r"its ViT has a mean of patches as features \(fc_norm\)"),
        ("norm_pre.weight", "its ViT has a LayerNorm before the blocks, as CLIP has"),
        ("dist_token", "its ViT has a distillation token, as DeiT has"),
        ("blocks.1.gamma_1", "its ViT has a layer scale that is not called ls1.gamma"),
        ("blocks.1.attn.q_norm.weight", "its ViT has normalised queries and keys"),
    ],
)
def test_what_is_missing_here_is_named(tmp_path, name, message):
    state = published() | {name: np.ones(4, np.float32)}
    with pytest.raises(WeightsError, match=message):
        opened(state, tmp_path)


@pytest.mark.parametrize("gate", ["gate_proj", None])
def test_gates_of_another_width_are_named(tmp_path, gate):
    """DINOv3's plus models by Hugging Face, and one whose gates are already joined."""
    state, hidden = published(swiglu=True), 4 * WIDTH
    for block in (f"blocks.{index}.mlp" for index in range(DEPTH)):
        for leaf, shape in (("weight", (hidden, WIDTH)), ("bias", (hidden,))):
            part = np.ones(shape, np.float32)
            del state[f"{block}.w12.{leaf}"]
            if gate:
                state |= {f"{block}.{name}.{leaf}": part for name in ("gate_proj", "up_proj")}
            else:
                state[f"{block}.w12.{leaf}"] = np.concatenate([part, part])
        state[f"{block}.w3.weight"] = np.ones((WIDTH, hidden), np.float32)
        if gate:
            for leaf in ("weight", "bias"):
                state[f"{block}.down_proj.{leaf}"] = state.pop(f"{block}.w3.{leaf}")
    if gate:
        state["embeddings.cls_token"] = state.pop("cls_token")
    message = f"its ViT has a SwiGLU {hidden} wide, as DINOv3's larger models have; those here are"
    with pytest.raises(WeightsError, match=message):
        opened(state, tmp_path)


def test_a_vit_without_positions_is_refused(tmp_path):
    state = published()
    del state["pos_embed"]
    with pytest.raises(WeightsError, match=r"its ViT has no pos_embed, and ViTs here need"):
        opened(state, tmp_path)


@pytest.mark.parametrize(
    ("name", "axes"),
    [("pos_embed", 0), ("pos_embed", 2), ("register_tokens", 1), ("patch_embed.proj.weight", 2)],
)
def test_an_array_of_other_axes_is_named(tmp_path, name, axes):
    state = published(registers=4) | {name: np.ones((2,) * axes, np.float32)}
    called = {"register_tokens": "reg_token"}.get(name, name)
    with pytest.raises(WeightsError, match=rf"its {called} is of shape .*, not of [34] axes"):
        opened(state, tmp_path)


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_so_is_one_of_a_feed_forward_network(tmp_path, layer):
    name = f"blocks.0.mlp.{layer}.weight"
    with pytest.raises(WeightsError, match=name):
        opened(published() | {name: np.ones((), np.float32)}, tmp_path)


def test_torchvision_has_no_such_vit(tmp_path):
    weights, *_ = opened(published(registers=4, swiglu=True), tmp_path)
    lacks = r"ViTs have no registers, layer scale, SwiGLU; use the format timm or dinov2"
    with pytest.raises(WeightsError, match=lacks):
        export(with_card(weights), tmp_path, ["torchvision"])
    export(with_card(weights), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"cassle.safetensors", "timm"}
    assert not (tmp_path / "torchvision.safetensors").exists()


def test_features_are_cached_by_how_positions_are_interpolated(tmp_path):
    weights, *_ = opened(published(), tmp_path)
    prints = []
    for offset in (weights.position_offset, None):
        folder = tmp_path / str(offset)
        export(with_card(dataclasses.replace(weights, position_offset=offset)), folder, ["cassle"])
        subject = open_subject(folder / "cassle.safetensors")
        prints.append(subject.with_images(size=2 * PATCH).fingerprint())
    assert prints[0] != prints[1]
