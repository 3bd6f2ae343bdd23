import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cassle_jax.checks import ConfigError
from cassle_jax.models import make_encoder
from cassle_jax.models.vit import (
    Block,
    PatchEmbedding,
    VisionTransformer,
    resize_positions,
    sin_cos_positions,
)

TINY = partial(VisionTransformer, width=16, depth=3, heads=4, patch_size=4)


def params_from_timm(state):
    """timm's names and layouts to Flax's."""
    params = {}
    for name, array in state.items():
        name = name.replace("blocks.", "blocks_").replace("patch_embed.proj", "patch_embed")
        if name.endswith("weight"):
            leaf = "scale" if array.ndim == 1 else "kernel"
            name = name.removesuffix("weight") + leaf
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        params[tuple(name.split("."))] = array
    return traverse_util.unflatten_dict(params)


def shapes_of(encoder, size=224):
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, False), images)
    return jax.tree.map(lambda leaf: leaf.shape, variables["params"])


def relative_error(value, expected):
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def tiny():
    """Variables of a tiny ViT that has seen 16-pixel images of five channels."""
    init = jax.jit(lambda x: TINY().init(jax.random.key(0), x, True))
    return init(jnp.ones((2, 16, 16, 5)))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (3, 16, 16, 5))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("vit_tiny", 192, 5_524_416),
        ("vit_small", 384, 21_665_664),
        ("vit_base", 768, 85_798_656),
        ("vit_large", 1024, 303_301_632),
    ],
)
def test_sizes_are_timms_without_the_classifier(name, width, parameters):
    encoder = make_encoder(name)
    leaves = jax.tree.leaves(shapes_of(encoder), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert encoder.feature_width == width
    assert sum(math.prod(shape) for shape in leaves) == parameters


@pytest.mark.pytorch
def test_a_block_is_pytorchs_pre_norm_layer():
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, norm_first=True,
        batch_first=True,
    )  # fmt: skip
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj": "attn.proj",
        "linear": "mlp.fc",
    }
    state = {}
    for name, tensor in layer.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        state[name] = tensor.numpy()
    # Small enough that the epsilon of the norms matters.
    tokens = 0.01 * np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)
    with torch.no_grad():
        expected = layer(torch.from_numpy(tokens)).numpy()

    block = Block(heads=4, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        result = block.apply({"params": params_from_timm(state)}, jnp.asarray(tokens))
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_positions_are_sines_and_cosines_of_the_row_then_the_column(tiny):
    table = sin_cos_positions(3, 8)
    for row in range(3):
        for column in range(3):
            angles = [where * 10_000.0**-power for where in (row, column) for power in (0, 0.5)]
            sines, cosines = np.sin(angles), np.cos(angles)
            expected = [*sines[:2], *cosines[:2], *sines[2:], *cosines[2:]]
            np.testing.assert_allclose(table[3 * row + column], expected, atol=1e-6)

    stored = tiny["params"]["pos_embed"]
    assert stored.shape == (1, 17, 16)
    np.testing.assert_array_equal(stored[0, 0], 0)
    np.testing.assert_allclose(stored[0, 1:], sin_cos_positions(4, 16), atol=1e-6)


@pytest.mark.parametrize("rotary", [False, True])
def test_a_process_with_64_bits_computes_in_float32_too(rotary):
    """Its positions, a parameter, were float64, and so were all sums along the blocks."""
    encoder, images = TINY(rotary=rotary), jnp.ones((2, 16, 16, 3), jnp.float32)
    with jax.enable_x64(True):
        variables = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images, False))
        sown = ["intermediates"]
        outputs = jax.eval_shape(lambda v: encoder.apply(v, images, False, mutable=sown), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, outputs))} == {jnp.dtype("float32")}


@pytest.mark.pytorch
@pytest.mark.parametrize("grid", [(5, 5), (6, 9), (2, 3)])
def test_positions_are_resized_as_pytorch_does(grid):
    import torch

    positions = np.random.default_rng(0).standard_normal((1, 17, 8)).astype(np.float32)
    resized = resize_positions(jnp.asarray(positions), *grid)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(positions[:, 1:].reshape(1, 4, 4, 8)).permute(0, 3, 1, 2),
        grid,
        mode="bicubic",
        antialias=True,
    )
    np.testing.assert_array_equal(resized[:, 0], positions[:, 0])
    np.testing.assert_allclose(
        resized[0, 1:], expected[0].flatten(1).T.numpy(), rtol=1e-5, atol=1e-5
    )


def test_positions_of_no_square_grid_are_refused():
    with pytest.raises(ValueError, match=r"pos_embed has 6 positions .* only square grids"):
        resize_positions(jnp.zeros((1, 7, 8)), 2, 3)
    with pytest.raises(ValueError, match=r"pos_embed has 0 positions .* such as 1×1"):
        resize_positions(jnp.zeros((1, 1, 8)), 2, 3)


def test_images_of_other_sizes_give_features_that_depend_on_where_things_are(tiny, images):
    encoder = TINY()
    wide = jnp.concatenate([images, images[:, :, :8]], axis=2)
    features = encoder.apply(tiny, wide, False)
    assert features.shape == (3, 16)
    # The same patches elsewhere: only their positions distinguish the two.
    swapped = jnp.roll(wide, 4, axis=2)
    assert relative_error(encoder.apply(tiny, swapped, False), features) > 1e-4


def test_weights_start_as_moco_v3s():
    encoder = VisionTransformer(width=64, depth=1, heads=2, patch_size=8)
    init = jax.jit(lambda x: encoder.init(jax.random.key(0), x, True))
    params = init(jnp.ones((1, 16, 16, 5)))["params"]
    block = params["blocks_0"]
    for kernel, fans in [
        (params["patch_embed"]["kernel"], 5 * 8 * 8 + 64),
        (block["attn"]["qkv"]["kernel"], 64 + 64),
        (block["attn"]["proj"]["kernel"], 64 + 64),
        (block["mlp"]["fc1"]["kernel"], 64 + 256),
        (block["mlp"]["fc2"]["kernel"], 256 + 64),
    ]:
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < jnp.max(jnp.abs(kernel)) <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.03)
    np.testing.assert_allclose(np.std(params["cls_token"]), 1e-6, rtol=0.3)
    for path, leaf in traverse_util.flatten_dict(params).items():
        if path[-1] in ("bias", "scale"):
            np.testing.assert_array_equal(leaf, float(path[-1] == "scale"))


@pytest.mark.exhaustive
def test_no_gradient_reaches_what_is_frozen_and_all_else_has_one(tiny, images):
    frozen = TINY.func.frozen_parameters
    assert set(frozen) < tiny["params"].keys()

    def loss(params, images):
        return jnp.sum(TINY().apply({"params": params}, images, True) ** 3)

    gradients, of_images = jax.jit(jax.grad(loss, argnums=(0, 1)))(tiny["params"], images)
    for name, tree in gradients.items():
        for gradient in jax.tree.leaves(tree):
            assert bool(jnp.any(gradient != 0)) == (name not in frozen), name
    # A descriptor injected into the image is trained through the frozen embedding.
    assert bool(jnp.all(jnp.any(of_images != 0, axis=(1, 2))))


def test_a_patch_embedding_is_a_strided_convolution(images):
    embedding = PatchEmbedding(width=8, patch_size=4, dtype=jnp.float32)
    wide = images[:, :8]
    result, variables = embedding.init_with_output(jax.random.key(0), wide)
    expected = jax.lax.conv_general_dilated(
        wide,
        variables["params"]["kernel"],
        (4, 4),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_what_evaluation_looks_at_are_maps_of_the_patches(tiny, images):
    encoder = TINY(depth=3)
    features, seen = encoder.apply(tiny, images, False, mutable=["intermediates"])
    seen = {name: value[0] for name, value in seen["intermediates"].items()}
    shapes = {name: value.shape for name, value in seen.items()}
    maps = ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert shapes == dict.fromkeys(maps, (3, 4, 4, 16)) | {"features": (3, 16)}
    np.testing.assert_array_equal(seen["features"], features)

    embedding = tiny["params"]["patch_embed"]
    patch = jnp.einsum("yxi,yxio->o", images[1, 8:12, 4:8], embedding["kernel"])
    position = tiny["params"]["pos_embed"][0, 1 + 2 * 4 + 1]
    np.testing.assert_allclose(seen["stem"][1, 2, 1], patch + position, rtol=1e-4, atol=1e-5)

    # Three blocks, so after 1, 2, 3 and 3 of them.
    one_block_less = {"params": dict(tiny["params"])}
    del one_block_less["params"]["blocks_2"]
    _, before = TINY(depth=2).apply(one_block_less, images, False, mutable=["intermediates"])
    np.testing.assert_allclose(
        seen["layer2"], before["intermediates"]["layer4"][0], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(seen["layer3"], seen["layer4"])


def test_bfloat16_layers_give_nearly_the_same_float32_features(tiny, images):
    half = TINY(dtype=jnp.bfloat16)
    features = jax.jit(half.apply, static_argnums=2)(tiny, images, True)
    assert features.dtype == jnp.float32
    assert 0 < relative_error(features, TINY().apply(tiny, images, True)) < 2e-2

    variables = jax.eval_shape(lambda x: half.init(jax.random.key(0), x, True), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_recomputed_blocks_give_the_same_gradient(tiny, images, dtype):
    def gradient(remat):
        encoder = TINY(remat=remat, dtype=dtype)

        def loss(params):
            return jnp.sum(encoder.apply({"params": params}, images, True) ** 3)

        return jax.jit(jax.grad(loss))(tiny["params"])

    tolerance = 1e-4 if dtype == jnp.float32 else 2e-2
    for plain, remat in zip(*map(jax.tree.leaves, (gradient(False), gradient(True))), strict=True):
        assert np.linalg.norm(plain - remat) <= tolerance * np.linalg.norm(plain)


@pytest.mark.parametrize(
    ("size", "use"), [(50, "48 or 64"), (10, "16"), (0, "16"), (223, "208 or 224")]
)
def test_images_that_are_not_whole_patches_are_refused_with_sizes_that_are(size, use):
    with pytest.raises(ValueError) as error:
        make_encoder("vit_small").check_image_size(size)
    assert str(error.value) == (
        f"augment.size={size} is not a multiple of encoder.patch_size=16; use {use}"
    )


def test_an_encoder_refuses_such_images(tiny):
    with pytest.raises(ValueError, match=r"augment\.size=18 .* use 16 or 20"):
        TINY().apply(tiny, jnp.ones((1, 16, 18, 5)), False)


def test_positions_start_from_square_images():
    with pytest.raises(ValueError, match="4×5 patches; initialise with square images"):
        TINY().init(jax.random.key(0), jnp.ones((1, 16, 20, 3)), False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, r"encoder\.heads=3 does not divide encoder\.width=16; .*\[1, 2, 4, 8, 16\]"),
        ({"width": 18, "heads": 2}, r"encoder\.width=18 is not a multiple of 4, .* use 20"),
        ({"depth": 0}, r"encoder\.depth=0 must be at least 1"),
        ({"heads": 0}, r"encoder\.heads=0 must be at least 1"),
        ({"patch_size": 0}, r"encoder\.patch_size=0 must be at least 1"),
        ({"registers": -1}, r"encoder\.registers=-1 must be at least 0"),
        ({"layer_scale": -1e-5}, r"encoder\.layer_scale=-1e-05 must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TINY(**settings)


def test_a_vit_may_have_other_heads_than_the_default():
    assert make_encoder("vit_small").heads == 12
    assert make_encoder("vit_small", heads=6).heads == 6
    with pytest.raises(ConfigError, match=r"encoder\.heads=7 does not divide encoder\.width=384"):
        make_encoder("vit_small", heads=7)


def test_dinov2s_options_add_parameters_and_change_no_others(tiny, images):
    encoder = TINY(registers=2, layer_scale=0.5, swiglu=True)
    init = jax.jit(lambda x: encoder.init(jax.random.key(0), x, True))
    params = traverse_util.flatten_dict(init(images)["params"], sep="/")
    plain = traverse_util.flatten_dict(tiny["params"], sep="/")
    scales = {f"blocks_{block}/ls{n}/gamma" for block in range(3) for n in (1, 2)}
    assert params.keys() - plain.keys() == scales | {"reg_token"}
    assert plain.keys() < params.keys()
    for name in scales:
        np.testing.assert_array_equal(params[name], np.full(16, 0.5))
    assert params["reg_token"].shape == (1, 2, 16)
    # Two halves of 48, 8/3 of 16 rounded up to a multiple of 8.
    assert params["blocks_0/mlp/fc1/kernel"].shape == (16, 96)
    assert params["blocks_0/mlp/fc2/kernel"].shape == (48, 16)
    for name in plain.keys() - {name for name in plain if "/mlp/" in name}:
        np.testing.assert_array_equal(params[name], plain[name])


def test_rotary_positions_have_the_published_periods_and_no_others(images):
    encoder = TINY(width=32, rotary=True)
    params = jax.jit(lambda x: encoder.init(jax.random.key(0), x, True))(images)["params"]
    # From 1 to 100, excluded, in steps of one factor: a quarter of a head's eight entries.
    np.testing.assert_allclose(params["pos_embed"], [1, 10], rtol=1e-6)
    message = r"rotary=True needs heads .* encoder\.heads=8 .* of 2; use one of \[1, 2, 4\]$"
    with pytest.raises(ConfigError, match=message):
        TINY(heads=8, rotary=True)


def test_maps_of_the_patches_hold_no_register(tiny, images):
    """Registers that nothing attends to leave the first maps as they are."""
    params = tiny["params"] | {"reg_token": jnp.full((1, 2, 16), 7.0)}
    _, seen = TINY(registers=2).apply({"params": params}, images, False, mutable=["intermediates"])
    _, plain = TINY().apply(tiny, images, False, mutable=["intermediates"])
    stem, expected = (each["intermediates"]["stem"][0] for each in (seen, plain))
    np.testing.assert_array_equal(stem, expected)
    assert seen["intermediates"]["layer4"][0].shape == (3, 4, 4, 16)


@pytest.mark.parametrize(
    ("setting", "value", "use"),
    [
        ("heads", 3, "0"),
        ("registers", 4, "0"),
        ("layer_scale", 1e-5, "0.0"),
        ("swiglu", True, "False"),
        ("rotary", True, "False"),
    ],
)
def test_dinov2s_options_are_for_vits(setting, value, use):
    with pytest.raises(ConfigError) as error:
        make_encoder("resnet18", **{setting: value})
    assert str(error.value) == (
        f"encoder.{setting}={value} does not go with encoder.name='resnet18'; use a ViT, or {use}"
    )
