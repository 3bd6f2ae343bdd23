"""ConvNeXt: torchvision's sizes, maps by stage, and images it can take.

That it computes what torchvision's and timm's do is tested in tests/interop/test_libraries.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.models import ConvNeXt, make_encoder
from tests.interop.states import filled

TINY = ConvNeXt(depths=(1, 1, 2, 1), width=4)


@pytest.fixture(scope="module")
def variables():
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return filled(jax.eval_shape(lambda x: TINY.init(jax.random.key(0), x, True), images))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 64, 64, 3))


# Parameters of torchvision 0.28's models without their classifiers.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [("convnext_tiny", 768, 27_820_128), ("convnext_base", 1024, 87_566_464)],
)
def test_sizes_are_torchvisions_without_the_classifier(name, width, parameters):
    encoder = make_encoder(name)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, True), images)["params"]
    assert encoder.feature_width == width
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.exhaustive
def test_kernels_begin_with_a_standard_deviation_of_a_fiftieth_and_biases_at_zero():
    """As the authors draw them: PyTorch's `trunc_normal_` cuts at ±2, not at 2 deviations."""
    params = TINY.clone(width=16).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), True)["params"]
    kernels, biases = (
        jnp.concatenate([a.ravel() for p, a in jax.tree.leaves_with_path(params) if p[-1].key == n])
        for n in ("kernel", "bias")
    )
    assert abs(kernels.std() / 0.02 - 1) < 0.01
    assert abs(kernels.mean()) < 1e-4
    assert not biases.any()


@pytest.mark.exhaustive
def test_every_stage_halves_the_map_and_doubles_the_channels(variables, images):
    features, seen = TINY.apply(variables, images, False, mutable=["intermediates"])
    shapes = {name: value[0].shape for name, value in seen["intermediates"].items()}
    assert features.shape == (2, TINY.feature_width) == (2, 32)
    assert shapes == {
        "stem": (2, 16, 16, 4),
        "layer1": (2, 16, 16, 4),
        "layer2": (2, 8, 8, 8),
        "layer3": (2, 4, 4, 16),
        "layer4": (2, 2, 2, 32),
        "features": (2, 32),
    }


@pytest.mark.exhaustive
def test_recomputed_blocks_give_the_same_gradient_and_bfloat16_float32_features(variables, images):
    def gradient(**settings):
        encoder = TINY.clone(**settings)

        def loss(params):
            features = encoder.apply({"params": params}, images, True)
            assert features.dtype == jnp.float32
            return jnp.mean(features**3)

        return jax.grad(loss)

    jax.eval_shape(gradient(dtype=jnp.bfloat16), variables["params"])
    plain, remat = (jax.jit(gradient(remat=r))(variables["params"]) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)


def test_what_it_cannot_take_is_refused_with_what_would_work(variables):
    with pytest.raises(ConfigError, match=r"augment\.size=31 is too small .*at least 32"):
        TINY.apply(variables, jnp.zeros((1, 40, 31, 3)), False)
    with pytest.raises(ConfigError, match="use a ResNet for small images"):
        make_encoder("convnext_tiny", small_images=True)
    with pytest.raises(ConfigError, match=r"encoder\.heads=6 does not go with .*convnext_tiny"):
        make_encoder("convnext_tiny", heads=6)
