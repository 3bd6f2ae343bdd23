import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.models import ENCODERS, ResNet, make_encoder
from cassle_jax.models.resnet import ARCHITECTURES, BasicBlock, Bottleneck
from tests.everyday import everyday


def variables_of(encoder, size=64, channels=3):
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    return jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, False), images)


@pytest.fixture(scope="module")
def tiny():
    """A ResNet-18 eight channels wide, for images of any channel count, and its variables."""
    encoder = make_encoder("resnet18", width=8, small_images=True)
    return encoder, jax.jit(lambda x: encoder.init(jax.random.key(0), x, True))(
        jnp.ones((2, 16, 16, 5))
    )


def test_convolutions_start_uniform_within_one_over_root_fan_in(tiny):
    kernel = tiny[1]["params"]["layer4_1"]["conv2"]["kernel"]
    bound = (3 * 3 * 64) ** -0.5
    assert kernel.shape == (3, 3, 64, 64)
    assert 0.99 * bound < jnp.max(jnp.abs(kernel)) <= bound
    np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.02)


def test_residual_blocks_start_as_their_shortcut(tiny):
    params = tiny[1]["params"]
    for name, block in params.items():
        if name.startswith("layer"):
            np.testing.assert_array_equal(block["bn2"]["scale"], 0)
            np.testing.assert_array_equal(block["bn1"]["scale"], 1)


def test_bottlenecks_start_as_their_shortcut():
    block = Bottleneck(2, stride=1, dtype=jnp.float32, axis_name=None)
    params = block.init(jax.random.key(0), jnp.ones((1, 8, 8, 8)), False)["params"]
    np.testing.assert_array_equal(params["bn3"]["scale"], 0)
    np.testing.assert_array_equal(params["bn2"]["scale"], 1)


def test_small_images_keep_their_resolution_through_the_first_stage(tiny):
    encoder, variables = tiny
    assert variables["params"]["conv1"]["kernel"].shape == (3, 3, 5, 8)
    features, seen = jax.eval_shape(
        lambda v, x: encoder.apply(v, x, False, mutable=["intermediates"]),
        variables,
        jnp.ones((2, 16, 16, 5)),
    )
    shapes = {name: value[0].shape for name, value in seen["intermediates"].items()}
    assert features.shape == (2, encoder.feature_width) == (2, 64)
    assert shapes == {
        "stem": (2, 16, 16, 8),
        "layer1": (2, 16, 16, 8),
        "layer2": (2, 8, 8, 16),
        "layer3": (2, 4, 4, 32),
        "layer4": (2, 2, 2, 64),
        "features": (2, 64),
    }


SIZES = {
    "resnet18": (512, 11_176_512),
    "resnet34": (512, 21_284_672),
    "resnet50": (2048, 23_508_032),
    "resnet101": (2048, 42_500_160),
    "resnet152": (2048, 58_143_808),
    "wide_resnet50_2": (2048, 66_834_240),
    "wide_resnet101_2": (2048, 124_837_696),
}


@pytest.mark.parametrize("name", everyday(SIZES, "resnet18", "wide_resnet50_2"))
def test_sizes_are_torchvisions_without_the_classifier(name):
    width, parameters = SIZES[name]
    encoder = make_encoder(name)
    params = variables_of(encoder)["params"]
    assert encoder.feature_width == width
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_recomputed_blocks_in_bfloat16_give_float32_features_and_the_same_gradient(
    tiny, monkeypatch
):
    monkeypatch.setitem(ARCHITECTURES, 18, (BasicBlock, (1, 1)))  # others are as they are
    _, variables = tiny
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 5))

    def gradient(remat, dtype):
        encoder = make_encoder("resnet18", width=8, small_images=True, remat=remat, dtype=dtype)

        def loss(params):
            features, updates = encoder.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                images,
                True,
                mutable=["batch_stats"],
            )
            assert features.dtype == jnp.float32
            return jnp.mean(features**2), updates

        return jax.grad(loss, has_aux=True)

    jax.eval_shape(gradient(True, jnp.bfloat16), variables["params"])
    plain = jax.jit(gradient(False, jnp.float32))(variables["params"])
    remat = jax.jit(gradient(True, jnp.float32))(variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)


def test_unknown_encoders_are_refused_with_the_known_ones():
    assert {"resnet18", "resnet34", "resnet50"} <= ENCODERS.keys()
    with pytest.raises(ValueError, match=r"encoder\.name='resnet20' is unknown; .*resnet34"):
        make_encoder("resnet20")
    with pytest.raises(ValueError, match=r"depth=20 .*\[18, 34, 50, 101, 152\]"):
        ResNet(20)


def test_only_bottlenecks_can_be_wider_than_their_features():
    with pytest.raises(ValueError, match="widening=2 needs a depth of at least 50"):
        ResNet(18, widening=2)
