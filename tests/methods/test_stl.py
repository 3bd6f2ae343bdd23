"""STL's losses against NumPy, on one device and on eight, and in a training step."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.methods import STL, Features, SimCLR
from cassle_jax.methods.build import build_networks
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from tests.methods.one_device import BATCH, PLAIN, compiled, random_views, training
from tests.methods.reference import cosines, naive_nt_xent
from tests.tiny import TinyEncoder

STL_TINY = STL(weight=0.5, transformation_weight=0.3, hidden=8, out=6, code=5)
WIDTH = 24


def mlp(params, x):
    """Two layers without biases, BatchNorm and ReLU between them."""
    assert not any("bias" in params[f"linear_{layer}"] for layer in (0, 1))
    x = x @ np.float64(params["linear_0"]["kernel"])
    norm = params["bn_0"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    x = np.maximum(x * np.float64(norm["scale"]) + np.float64(norm["bias"]), 0)
    return x @ np.float64(params["linear_1"]["kernel"])


def moved(params, y, codes):
    """Each row of y times the matrix that a Linear without bias makes of its code."""
    linear = np.float64(params["hypernetwork"]["linear_0"]["kernel"])
    linear = linear.reshape(y.shape[1], -1, y.shape[1])
    matrices = [np.einsum("ikj,k->ij", linear, code) for code in codes]
    return np.array([row @ matrix for row, matrix in zip(y, matrices, strict=True)])


def expected(params, first, second):
    """Equivariance, transformation, cosine and gain, image by image and partner by partner."""
    codes_12 = mlp(params["stl_code"], np.hstack([first, second]))
    codes_21 = mlp(params["stl_code"], np.hstack([second, first]))
    partners = [i + 1 if i % 2 == 0 else i - 1 for i in range(len(first))]
    predicted_1 = moved(params["stl_predictor"], second, [codes_21[i] for i in partners])
    predicted_2 = moved(params["stl_predictor"], first, [codes_12[i] for i in partners])
    z_1, z_2, found_1, found_2 = (
        mlp(params["stl_projector"], rows) for rows in (first, second, predicted_1, predicted_2)
    )
    z, found = np.concatenate([z_1, z_2]), np.concatenate([found_1, found_2])
    even, odd = (
        mlp(params["stl_code_projector"], np.array([*codes_12[k::2], *codes_21[k::2]]))
        for k in (0, 1)
    )
    cosine, without = np.diag(cosines(z, found)).mean(), np.diag(cosines(z_1, z_2)).mean()
    contrast = partial(naive_nt_xent, temperature=0.2)
    return contrast(z, found), contrast(even, odd), cosine, cosine - without


def random_features(seed, rows=2 * BATCH):
    return dict(enumerate(np.random.default_rng(seed).normal(size=(2, rows, WIDTH))))


@pytest.fixture(scope="module")
def simclr():
    return training(SimCLR(), auxiliaries=(STL_TINY,))


@pytest.mark.parametrize("momentum", [False, True])
def test_the_losses_and_metrics_against_numpy(simclr, momentum):
    """MoCo-v2's second view has the momentum encoder's features alone."""
    features = random_features(3)
    with jax.enable_x64(True):
        dtype = jnp.dtype("float64")
        networks = build_networks(SimCLR(), TinyEncoder, WIDTH, PLAIN, (STL_TINY,), dtype=dtype)
        variables = jax.tree.map(
            lambda x: jnp.asarray(x, dtype),
            {"params": simclr.state.params, "batch_stats": simclr.state.batch_stats},
        )
        online = jax.tree.map(jnp.asarray, features)
        target = {1: online.pop(1)} if momentum else {}
        apply = nn.apply(
            lambda networks: STL_TINY.losses(networks, Features(online, target, (), {}), (), None),
            networks,
            mutable=["batch_stats"],
        )
        (losses, metrics), _ = compiled(apply)(variables)
    found = *(losses[name] for name in STL_TINY.weights), metrics["cosine"], metrics["gain"]
    wanted = expected(simclr.state.params, features[0], features[1])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.exhaustive
def test_eight_devices_contrast_what_one_does(simclr):
    def losses(axis_name, variables, features):
        networks = build_networks(
            SimCLR(), TinyEncoder, WIDTH, PLAIN, (STL_TINY,), axis_name=axis_name
        )
        apply = nn.apply(
            lambda networks: STL_TINY.losses(
                networks, Features(features, {}, (), {}), (), axis_name
            ),
            networks,
            mutable=["batch_stats"],
        )
        return jax.lax.pmean(apply(variables)[0], axis_name)

    variables = {"params": simclr.state.params, "batch_stats": simclr.state.batch_stats}
    inputs = jax.tree.map(jnp.float32, random_features(4, rows=16))
    one, eight = (
        parallel(
            partial(losses, AXIS),
            device_mesh(jax.devices()[:count]),
            inputs=(REPLICATED, SHARDED),
            outputs=REPLICATED,
        )(variables, inputs)
        for count in (1, 8)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), eight, one)


@pytest.mark.exhaustive
def test_a_step_adds_the_weighted_losses(simclr):
    _, metrics = simclr.update(simclr.state, random_views(5))
    parts = {name: metrics[f"loss_stl_{name}"] for name in STL_TINY.weights}
    total = metrics["loss_method"] + 0.5 * parts["equivariance"] + 0.15 * parts["transformation"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    assert {"stl_cosine", "stl_gain"} <= metrics.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"^stl\.weight=-1\.0 must be at least 0$"),
        ({"transformation_weight": -1.0}, r"^stl\.transformation_weight=-1\.0 must be at least 0$"),
        ({"temperature": 0.0}, r"^stl\.temperature=0\.0 must be above 0$"),
        ({"hidden": -1}, r"^stl\.hidden=-1 must be at least 0$"),
        ({"code": 0}, r"^stl\.code=0 must be at least 1$"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        STL(**settings)
