"""EquiMod's loss and metrics against NumPy, what it encodes, and its negatives on many devices."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import ConfigError
from cassle_jax.methods import Canvases, EquiMod, Features, MoCoV2, SimCLR, TrainingViews
from cassle_jax.methods.build import build_networks
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from cassle_jax.training.run import build_run
from tests.methods.one_device import BATCH, PIXELS, PLAIN, compiled, random_views, training
from tests.methods.reference import cosines, naive_nt_xent
from tests.tiny import TinyEncoder, tiny_config

EQUIMOD = EquiMod(weight=0.5, descriptors=("crop", "flip"), temperature=0.2, hidden=8, out=6)
OMEGA = 5


def linear(params, x, layer):
    return x @ np.float64(params[f"linear_{layer}"]["kernel"])


def batch_norm(x, params=None):
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    return x if params is None else x * np.float64(params["scale"]) + np.float64(params["bias"])


def projector(params, x):
    for layer in range(2):
        x = np.maximum(batch_norm(linear(params, x, layer), params[f"bn_{layer}"]), 0)
    return batch_norm(linear(params, x, 2))


def predictor(params, plain, omega):
    condition = params["condition"]
    embedded = batch_norm(linear(condition, omega, 0), condition["bn_0"])
    return batch_norm(linear(params["projector"], np.hstack([plain, embedded]), 0))


def expected(params, plain, views, omegas):
    """Loss, cosine and gain on features of the unaugmented images and of the views seen."""
    n = len(plain)
    rows = projector(params["equimod_projector"], np.concatenate([plain, *views]))
    plain, views = np.tile(rows[:n], (len(views), 1)), rows[n:]
    predicted = predictor(params["equimod_predictor"], plain, np.concatenate(omegas))
    cosine, without = (np.diag(cosines(views, each)).mean() for each in (predicted, plain))
    return naive_nt_xent(views, predicted, EQUIMOD.temperature), cosine, cosine - without


def random_features(seed, views=(0, 1)):
    draw = np.random.default_rng(seed)
    features = {view: draw.normal(size=(2 * BATCH, 24)) for view in (*views, 2)}
    omegas = tuple(draw.normal(size=(2 * BATCH, OMEGA)) for _ in range(2))
    return features, omegas


@pytest.fixture(scope="module")
def simclr():
    return training(SimCLR(), auxiliaries=(EQUIMOD,))


@pytest.mark.parametrize("views", [(0, 1), (0,)])
def test_the_loss_and_its_metrics_against_numpy(simclr, views):
    features, omegas = random_features(3, views)
    with jax.enable_x64(True):
        dtype = jnp.dtype("float64")
        networks = build_networks(SimCLR(), TinyEncoder, 24, PLAIN, (EQUIMOD,), dtype=dtype)
        variables = jax.tree.map(
            lambda x: jnp.asarray(x, dtype),
            {"params": simclr.state.params, "batch_stats": simclr.state.batch_stats},
        )
        online, omega = jax.tree.map(jnp.asarray, (features, omegas))
        apply = nn.apply(
            lambda networks: EQUIMOD.losses(
                networks, Features(online, {}, (), {"equimod": omega}), (2,), None
            ),
            networks,
            mutable=["batch_stats"],
        )
        ((losses, metrics), _) = compiled(apply)(variables)
    found = losses["prediction"], metrics["cosine"], metrics["gain"]
    seen = [features[view] for view in views]
    wanted = expected(simclr.state.params, features[2], seen, omegas[: len(views)])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.exhaustive
def test_eight_devices_contrast_what_one_does(simclr):
    def losses(axis_name, variables, features, omegas):
        networks = build_networks(SimCLR(), TinyEncoder, 24, PLAIN, (EQUIMOD,), axis_name=axis_name)
        seen = Features(features, {}, (), {"equimod": omegas})
        apply = nn.apply(
            lambda networks: EQUIMOD.losses(networks, seen, (2,), axis_name),
            networks,
            mutable=["batch_stats"],
        )
        return jax.lax.pmean(apply(variables)[0], axis_name)

    variables = {"params": simclr.state.params, "batch_stats": simclr.state.batch_stats}
    inputs = jax.tree.map(jnp.float32, random_features(4))
    one, eight = (
        parallel(
            partial(losses, AXIS),
            device_mesh(jax.devices()[:count]),
            inputs=(REPLICATED, SHARDED, SHARDED),
            outputs=REPLICATED,
        )(variables, *inputs)
        for count in (1, 8)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), eight, one)


def with_unaugmented(seed):
    """Views of a step, of which the last has the unaugmented images."""
    views = random_views(seed, sizes=(PIXELS,) * 3).views
    omegas = random_views(seed + 1, OMEGA, sizes=(PIXELS,) * 2).views
    return TrainingViews(views, {"equimod": tuple(each.descriptor for each in omegas)})


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", [SimCLR(), MoCoV2(queue_size=2 * BATCH, projector_out=6)])
def test_a_step_encodes_the_unaugmented_images_in_one_batch_with_the_views(method):
    networks, state, update, _ = training(method, auxiliaries=(EQUIMOD,))
    inputs = with_unaugmented(5)
    _, metrics = update(state, inputs)
    seen = (0,) if isinstance(method, MoCoV2) else (0, 1)
    encode = nn.apply(
        lambda networks: networks.encode_passes(inputs.views, ((*seen, 2),))[0],
        networks,
        mutable=["batch_stats"],
    )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    features, _ = jax.tree.map(np.float64, compiled(encode)(variables))
    omegas = [np.float64(inputs.targets["equimod"][view]) for view in seen]
    wanted = expected(state.params, features[2], [features[view] for view in seen], omegas)
    names = "loss_equimod_prediction", "equimod_cosine", "equimod_gain"
    np.testing.assert_allclose([metrics[name] for name in names], wanted, rtol=1e-3, atol=1e-4)
    total = metrics["loss_method"] + 0.5 * metrics["loss_equimod_prediction"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)


def test_the_unaugmented_image_may_be_conditioned_on_with_the_views():
    config = tiny_config("method=simclr,equimod=main")
    config.encoder.update(name="resnet18", width=4)
    config.conditioning.injection = "image"
    assert "image_conditioner" in build_run(config, device_mesh(), 64).networks.factories


def test_the_unaugmented_image_is_the_picture_that_evaluation_sees():
    """A square picture of the view's size is neither resized nor cropped."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3), np.uint8)
    canvases = Canvases(jnp.asarray(pictures), jnp.full((2, 2), 12), jnp.arange(2))
    (found,) = EQUIMOD.images(jax.random.key(0), canvases, AugmentSpec(size=12, kernel_size=3))
    mean, std = np.array(AugmentSpec(12).mean), np.array(AugmentSpec(12).std)
    np.testing.assert_allclose(found, (pictures[:, :, :12] / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"^equimod\.weight=-1\.0 must be at least 0$"),
        ({"weight": float("nan")}, r"^equimod\.weight=nan must be at least 0$"),
        ({"temperature": 0.0}, r"^equimod\.temperature=0\.0 must be above 0$"),
        ({"hidden": 0}, r"^equimod\.hidden=0 must be at least 1$"),
        ({"out": 0}, r"^equimod\.out=0 must be at least 1$"),
        ({"descriptors": ()}, r"^equimod\.descriptors=\(\) .* use \('crop',\)"),
        ({"descriptors": ("colour",)}, r"^equimod\.descriptors=\['colour'\] has the unknown name"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        EquiMod(**settings)
