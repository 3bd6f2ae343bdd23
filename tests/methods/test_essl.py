"""E-SSL's loss against NumPy, the views that it adds, and its share of a step."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import ConfigError
from cassle_jax.methods import ESSL, Canvases, Features, SimCLR
from cassle_jax.methods.build import build_networks
from cassle_jax.methods.views import augmented_views
from tests.methods.one_device import BATCH, PIXELS, PLAIN, compiled, random_views, training
from tests.tiny import TinyEncoder

ESSL_TINY = ESSL(weight=0.4, hidden=8)
OWN = (2, 3, 4, 5)
SPEC = AugmentSpec(16, blur=0.0, kernel_size=3, rotation=0.5)


def logits(params, x):
    """Three linear layers, LayerNorm and ReLU between them."""
    for layer in range(2):
        x = x @ np.float64(params[f"linear_{layer}"]["kernel"])
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        norm = params[f"ln_{layer}"]
        x = np.maximum(x * np.float64(norm["scale"]) + np.float64(norm["bias"]), 0)
    return x @ np.float64(params["linear_2"]["kernel"]) + np.float64(params["linear_2"]["bias"])


def expected(params, features):
    """Cross-entropy and accuracy over the four rotations of every image."""
    terms, right = [], []
    for turns, rows in enumerate(features):
        found = logits(params["essl_head"], rows)
        chances = np.exp(found) / np.exp(found).sum(1, keepdims=True)
        terms.append(-np.log(chances[:, turns]))
        right.append(found.argmax(1) == turns)
    return np.mean(terms), np.mean(right)


@pytest.fixture(scope="module")
def simclr():
    return training(SimCLR(), auxiliaries=(ESSL_TINY,))


def test_the_loss_and_accuracy_against_numpy(simclr):
    draw = np.random.default_rng(0)
    features = {view: draw.normal(size=(BATCH, 24)) for view in (0, 1, *OWN)}
    with jax.enable_x64(True):
        dtype = jnp.dtype("float64")
        networks = build_networks(SimCLR(), TinyEncoder, 24, PLAIN, (ESSL_TINY,), dtype=dtype)
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), simclr.state.params)
        online = jax.tree.map(jnp.asarray, features)
        apply = nn.apply(
            lambda networks: ESSL_TINY.losses(networks, Features(online, {}, (), {}), OWN, None),
            networks,
        )
        losses, metrics = compiled(apply)({"params": params})
    wanted = expected(simclr.state.params, [features[view] for view in OWN])
    np.testing.assert_allclose((losses["rotation"], metrics["accuracy"]), wanted, rtol=1e-6)


@pytest.mark.exhaustive
def test_a_step_encodes_the_four_rotations_as_one_batch(simclr):
    networks, state, update, _ = simclr
    inputs = random_views(5, sizes=(PIXELS,) * 6)
    _, metrics = update(state, inputs)
    encode = nn.apply(
        lambda networks: networks.encode_passes(inputs.views, (OWN,))[0],
        networks,
        mutable=["batch_stats"],
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    features, _ = jax.tree.map(np.float64, compiled(encode)(variables))
    loss, accuracy = expected(state.params, [features[view] for view in OWN])
    np.testing.assert_allclose(metrics["loss_essl_rotation"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["essl_accuracy"], accuracy, rtol=1e-6)
    total = metrics["loss_method"] + 0.4 * metrics["loss_essl_rotation"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)


@pytest.fixture(scope="module")
def canvases():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    return Canvases(jnp.asarray(pictures), jnp.full((4, 2), 16), jnp.arange(4))


@jax.jit
def four_views(key, canvases):
    return ESSL_TINY.images(key, canvases, SPEC)


def test_every_image_has_a_small_view_in_all_four_rotations(canvases):
    upright, *turned = four_views(jax.random.key(0), canvases)
    assert upright.shape == (4, 8, 8, 3)
    for turns, images in enumerate(turned, start=1):
        for image, of_upright in zip(images, upright, strict=True):
            np.testing.assert_array_equal(image, np.rot90(of_upright, turns))


@pytest.mark.exhaustive
def test_the_small_view_is_drawn_by_key_and_position_and_never_rotated_already(canvases):
    views = four_views(jax.random.key(0), canvases)[0]
    part = Canvases(*(x[2:] for x in canvases))
    np.testing.assert_allclose(four_views(jax.random.key(0), part)[0], views[2:], atol=1e-5)
    assert np.abs(four_views(jax.random.key(1), canvases)[0] - views).max() > 0.1
    small = dataclasses.replace(SPEC, size=8, crop_area=(0.05, 0.14), rotation=0.0)
    make = jax.jit(partial(augmented_views, specs=(small,)))
    (upright,) = make(jax.random.key(0), canvases.images, canvases.sizes)
    np.testing.assert_allclose(views, upright.image, atol=1e-5)


@pytest.mark.parametrize(("size", "small"), [(224, 96), (32, 16), (8, 8)])
def test_the_small_views_size_is_the_papers(size, small):
    assert ESSL().sizes(AugmentSpec(size, kernel_size=3)) == (small,) * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"^essl\.weight=-1\.0 must be at least 0$"),
        ({"size": -8}, r"^essl\.size=-8 must be at least 0$"),
        ({"hidden": 0}, r"^essl\.hidden=0 must be at least 1$"),
        ({"crop_area": (0.5, 0.1)}, r"^essl\.crop_area=\(0\.5, 0\.1\) .* 0 < low <= high <= 1$"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ESSL(**settings)


def test_a_small_view_is_not_larger_than_a_view():
    with pytest.raises(ConfigError, match=r"^essl\.size=40 .* augment\.size=16; use at most 16$"):
        ESSL(size=40).sizes(AugmentSpec(16))
