"""SIE's losses against its paper's in NumPy, its halves, and its statistics on many devices."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec, View, concatenate, difference, draw
from cassle_jax.checks import ConfigError
from cassle_jax.evaluation.projection import project as evaluated_projection
from cassle_jax.methods import SIE, Encoded, Features, Progress, SimCLR, Step, TrainingViews, VICReg
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from cassle_jax.training.recorded import record_of
from cassle_jax.training.run import build_run
from tests.methods.one_device import BATCH, PLAIN, compiled, random_views, training
from tests.tiny import TinyEncoder, tiny_config

SIE_TINY = SIE(weight=1.0, descriptors=("crop", "flip"), hidden=8, out=6)
HALF, OMEGA = 12, 5
# The paper's weights, for both halves as one embedding.
INVARIANCE, EQUIVARIANCE, VARIANCE, COVARIANCE = 10, 0.45, 10, 1


def projector(params, x):
    for layer in range(2):
        x = x @ np.float64(params[f"linear_{layer}"]["kernel"])
        norm = params[f"bn_{layer}"]
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x = np.maximum(x * np.float64(norm["scale"]) + np.float64(norm["bias"]), 0)
    assert "bias" not in params["linear_2"]
    return x @ np.float64(params["linear_2"]["kernel"])


def predictor(params, z, omega):
    """A hypernetwork: a Linear makes a matrix of each image's ω, which multiplies its z."""
    width = z.shape[1]
    linear = np.float64(params["hypernetwork"]["linear_0"]["kernel"]).reshape(width, -1, width)
    rows = []
    for each, code in zip(z, np.hstack([np.ones((len(omega), 1)), omega]), strict=True):
        matrix = np.einsum("ikj,k->ij", linear, code)
        rows.append(each @ matrix)
    return np.array(rows)


def shortfall(x):
    return np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean()


def off_diagonal(x):
    c = np.cov(x.T)
    return (c**2).sum() - (np.diag(c) ** 2).sum()


def papers_loss(invariant, z, predicted):
    """The whole loss, on both halves' embeddings side by side, as the paper's code has it."""
    views = [np.hstack(each) for each in zip(invariant, z, strict=True)]
    width = views[0].shape[1]
    return (
        INVARIANCE * ((invariant[0] - invariant[1]) ** 2).mean()
        + INVARIANCE * EQUIVARIANCE * ((predicted - z[1]) ** 2).mean()
        + VARIANCE * (sum(shortfall(view) / 2 for view in views) + shortfall(predicted) / 2)
        + COVARIANCE * sum(off_diagonal(view) / width for view in views)
    )


def random_inputs(seed, rows=2 * BATCH):
    normal = np.random.default_rng(seed).normal
    features = {view: normal(size=(rows, 2 * HALF)) for view in (0, 1)}
    return features, normal(size=(rows, OMEGA)), tuple(normal(size=(2, rows, SIE_TINY.out)))


@pytest.fixture(scope="module")
def vicreg():
    method = VICReg(10.0, 5.0, 0.5, projector_hidden=8, projector_out=6, projector_depth=2)
    return method, training(method, auxiliaries=(SIE_TINY,))


def test_with_vicreg_the_loss_is_the_papers(vicreg):
    method, (_, state, _, _) = vicreg
    features, omega, invariant = random_inputs(3)
    with jax.enable_x64(True):
        dtype = jnp.dtype("float64")
        networks = build_networks(method, TinyEncoder, 2 * HALF, PLAIN, (SIE_TINY,), dtype=dtype)
        variables = jax.tree.map(
            lambda x: jnp.asarray(x, dtype),
            {"params": state.params, "batch_stats": state.batch_stats},
        )
        inputs = jax.tree.map(jnp.asarray, (features, omega, invariant))

        def losses(networks):
            features, omega, invariant = inputs
            seen = Features(features, {}, (), {"sie": omega}, invariant)
            found, metrics = SIE_TINY.losses(networks, seen, (), None)
            online = {view: Encoded(features[view], invariant[view]) for view in (0, 1)}
            of_method = method.loss(Step(online, {}, {}, Progress(0, 0.0, 1.0)), networks)
            return SIE_TINY.total(found) + sum(of_method.values()), metrics["gain"]

        apply = compiled(nn.apply(losses, networks, mutable=["batch_stats"]))
        (total, gain), _ = apply(variables)
    z = [projector(state.params["sie_projector"], features[view][:, HALF:]) for view in (0, 1)]
    predicted = predictor(state.params["sie_predictor"], z[0], omega)
    np.testing.assert_allclose(total, papers_loss(invariant, z, predicted), rtol=1e-6)
    expected = ((z[0] - z[1]) ** 2).mean() - ((predicted - z[1]) ** 2).mean()
    np.testing.assert_allclose(gain, expected, rtol=1e-6)


@pytest.mark.exhaustive
def test_eight_devices_have_the_statistics_of_one(vicreg):
    method, (_, state, _, _) = vicreg

    def losses(axis_name, variables, features, omega, invariant):
        networks = build_networks(
            method, TinyEncoder, 2 * HALF, PLAIN, (SIE_TINY,), axis_name=axis_name
        )
        seen = Features(features, {}, (), {"sie": omega}, invariant)

        def total(params):
            apply = nn.apply(
                lambda networks: SIE_TINY.losses(networks, seen, (), axis_name),
                networks,
                mutable=["batch_stats"],
            )
            (found, metrics), _ = apply({**variables, "params": params})
            return SIE_TINY.total(found), (found, metrics)

        gradient, found = jax.grad(total, has_aux=True)(variables["params"])
        heads = {name: gradient[name] for name in ("sie_projector", "sie_predictor")}
        return jax.lax.pmean((heads, found), axis_name)

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    inputs = jax.tree.map(jnp.float32, random_inputs(4, rows=16))
    one, eight = (
        parallel(
            partial(losses, AXIS),
            device_mesh(jax.devices()[:count]),
            inputs=(REPLICATED, SHARDED, SHARDED, SHARDED),
            outputs=REPLICATED,
        )(variables, *inputs)
        for count in (1, 8)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), eight, one)


@pytest.mark.exhaustive
def test_the_method_sees_the_first_half_and_sie_the_last(vicreg):
    _, (networks, state, update, _) = vicreg
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    features, omega, _ = random_inputs(5)
    project = partial(networks.apply, variables, train=False, method="project")
    first, second = jnp.float32(features[0]), jnp.float32(features[1])
    nothing = jnp.zeros((len(first), 0))
    mixed = jnp.concatenate([first[:, :HALF], second[:, HALF:]], axis=1)
    found, same = (project(each, nothing).projection for each in (first, mixed))
    np.testing.assert_array_equal(found, same)
    assert state.params["projector"]["projector"]["linear_0"]["kernel"].shape[0] == HALF
    views = TrainingViews(random_views(6).views, {"sie": jnp.float32(omega[:BATCH])})
    encoded = networks.apply(variables, views.views[0], train=False, method="embed")
    evaluated = evaluated_projection(networks, variables, views.views[0], encoded.features)
    np.testing.assert_allclose(evaluated, encoded.projection, rtol=1e-6)
    _, metrics = update(state, views)
    parts = {name: metrics[f"loss_sie_{name}"] for name in SIE_TINY.weights}
    total = metrics["loss_method"] + SIE_TINY.total(parts)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)


def test_evaluation_knows_the_projector_of_the_first_half():
    config = tiny_config("method=simclr,sie=main")
    config.encoder.update(name="resnet18", width=4)
    run = build_run(config, device_mesh(), 64)
    assert record_of(run)["heads"]["projector"]["hidden"] == 32 // 2


def test_the_plain_branch_sees_the_first_half_too():
    conditioning = Conditioning(("crop",), depth=1, width=4, plain_branch=0.5)
    networks, state, _, _ = training(SimCLR(projector_out=6), conditioning, (SIE_TINY,))
    kernels = {
        name: state.params[name]["projector"]["linear_0"]["kernel"].shape[0]
        for name in ("projector", "plain_projector")
    }
    assert kernels == {"projector": HALF + 4, "plain_projector": HALF}
    assert networks.branches["plain_"].reserved == HALF


@pytest.mark.exhaustive
def test_omega_is_the_second_view_relative_to_the_first():
    spec = AugmentSpec(8, kernel_size=3)
    keys = jax.random.split(jax.random.key(0), (2, 3))
    drawn = jax.vmap(jax.vmap(lambda key: draw(key, jnp.array([16, 16]), spec)))(keys)
    views = [
        View(
            image=jnp.zeros((3, 8, 8, 3)),
            params=jax.tree.map(lambda x, i=i: x[i], drawn),
            color_diff=jnp.zeros((3, 3)),
        )
        for i in (0, 1)
    ]
    found = SIE_TINY.targets(views, (spec, spec))
    relative = jax.vmap(partial(difference, spec=spec))(views[1], views[0])
    np.testing.assert_array_equal(found, concatenate(relative, ("crop", "flip")))
    assert np.abs(found).max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"^sie\.weight=-1\.0 must be at least 0$"),
        ({"covariance_weight": -1.0}, r"^sie\.covariance_weight=-1\.0 must be at least 0$"),
        ({"hidden": 0}, r"^sie\.hidden=0 must be at least 1$"),
        ({"out": 0}, r"^sie\.out=0 must be at least 1$"),
        ({"descriptors": ()}, r"^sie\.descriptors=\(\) .* use \('crop',\)"),
        ({"descriptors": ("colour",)}, r"^sie\.descriptors=\['colour'\] has the unknown name"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        SIE(**settings)
