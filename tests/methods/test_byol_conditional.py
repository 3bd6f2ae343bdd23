"""BYOL with a predictor that receives how the views differ, against its equations in NumPy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cassle_jax.augment import AugmentSpec, View
from cassle_jax.config import base_config
from cassle_jax.methods import METHODS, Encoded, Progress, Step
from cassle_jax.methods.build import Conditioning, build_networks
from tests.augment.view_params import view_params
from tests.methods.one_device import BATCH, compiled, training, unit
from tests.tiny import TinyEncoder

BYOL = METHODS["byol"](projector_out=6, predictor_hidden=8)
RECIPE = base_config("method=byol,conditioning=byol_conditional").conditioning
CONDITIONING = dataclasses.replace(Conditioning(), **RECIPE.to_dict() | {"depth": 2, "width": 7})
WIDTH = 24


def linear(params, x, layer):
    params = params[f"linear_{layer}"]
    return x @ np.float64(params["kernel"]) + np.float64(params.get("bias", 0))


def norm(params, x, layer):
    params = params[f"bn_{layer}"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    return x * np.float64(params["scale"]) + np.float64(params["bias"])


def hidden(params, x, layer=0):
    return np.maximum(norm(params, linear(params, x, layer), layer), 0)


def expected(params, features, omegas, targets):
    """BYOL's loss of each view's prediction and of the other view's target."""
    directions = []
    for view in (0, 1):
        head = params["projector"]["projector"]
        z = linear(head, hidden(head, features[view]), 1)
        condition, head = (params["predictor"][name] for name in ("condition", "projector"))
        embedded = norm(condition, linear(condition, hidden(condition, omegas[view]), 1), 1)
        prediction = linear(head, hidden(head, np.hstack([z, embedded])), 1)
        directions.append(np.sum(unit(prediction) * unit(targets[1 - view]), axis=1).mean())
    return -2 * sum(directions)


def test_the_loss_against_numpy():
    state = training(BYOL, CONDITIONING).state
    draw = np.random.default_rng(0)
    widths = WIDTH, CONDITIONING.size, BYOL.projector_out
    inputs = [draw.normal(size=(2, 2 * BATCH, width)) for width in widths]
    with jax.enable_x64(True):
        dtype = jnp.dtype("float64")
        networks = build_networks(BYOL, TinyEncoder, WIDTH, CONDITIONING, dtype=dtype)
        variables = jax.tree.map(
            lambda x: jnp.asarray(x, dtype),
            {"params": state.params, "batch_stats": state.batch_stats},
        )

        features, omegas, targets = map(jnp.asarray, inputs)

        def loss(networks):
            online = {
                view: networks.project(features[view], omegas[view], train=True) for view in (0, 1)
            }
            target = {view: Encoded(features[view], targets[view]) for view in (0, 1)}
            return BYOL.loss(Step(online, target, {}, Progress(0, 0.0, 1.0)), networks)

        found, _ = compiled(nn.apply(loss, networks, mutable=["batch_stats"]))(variables)
    np.testing.assert_allclose(found, expected(state.params, *inputs), rtol=1e-6)


def test_omega_is_each_views_difference_from_the_other():
    """Blur and gray by subtraction, as they are drawn; the heads get no other ω."""
    deviations = np.array([[0.5, 1.5, 0.0], [2.0, 0.25, 0.0]], np.float32)
    gray = np.array([[1, 0, 1], [0, 0, 1]], bool)
    images, shift = jnp.zeros((3, 4, 4, 3)), jnp.zeros((3, 3))
    views = [
        View(images, view_params(3, blur=sigma > 0, sigma=sigma, grayscale=is_gray), shift)
        for sigma, is_gray in zip(deviations, gray, strict=True)
    ]
    some = dataclasses.replace(CONDITIONING, descriptors=("blur", "grayscale"))
    first, second = some.describe(views, [AugmentSpec(size=4)] * 2)
    by = np.stack([deviations[0] - deviations[1], np.float32(gray[0]) - gray[1]], axis=1)
    np.testing.assert_allclose(first, by)
    np.testing.assert_allclose(second, -by)
