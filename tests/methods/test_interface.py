"""A method of a user's own, with all a method may ask for; and every conditioning of one."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.methods import HeadShape, Method, Networks, SimCLR, TrainingViews, ViewBatch
from cassle_jax.methods.base import FROZEN, constant
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.methods.losses import normalize
from cassle_jax.training.state import initial_variables
from tests.methods.one_device import (
    PLAIN,
    SPEC,
    compiled,
    random_views,
    training,
)
from tests.tiny import TinyEncoder

OUT = 6
STEPS = 4


@dataclasses.dataclass(frozen=True)
class OwnMethod(Method):
    """BYOL on centred targets, with a constrained projector and a frozen first convolution."""

    target_passes: ClassVar = ((0,), (1,))

    first_momentum: float = 0.8

    def projector(self, feature_width):
        return HeadShape(feature_width, OUT, depth=2)

    def predictor(self, feature_width):
        return HeadShape(8, OUT, depth=2)

    def initial_memory(self, key):
        return {"centre": jnp.zeros(OUT)}

    def loss(self, step, networks):
        def cosine(index, other):
            centred = normalize(step.target[other].projection - step.memory["centre"])
            return jnp.sum(normalize(step.online[index].prediction) * centred, axis=-1).mean()

        return -2 * (cosine(0, 1) + cosine(1, 0))

    def update_memory(self, step):
        mean = (step.target[0].projection.mean(0) + step.target[1].projection.mean(0)) / 2
        if step.axis_name is not None:
            mean = jax.lax.pmean(mean, step.axis_name)
        return {"centre": 0.9 * step.memory["centre"] + 0.1 * mean}

    def target_momentum(self, progress):
        cosine = jnp.cos(jnp.pi * progress.whole_epoch / progress.epochs)
        return 1 - (1 - self.first_momentum) * (cosine + 1) / 2

    def after_update(self, params):
        def constrain(path, array):
            last = path[0].key == "projector" and path[-1].key == "kernel"
            return array / jnp.linalg.norm(array) if last else array

        return jax.tree_util.tree_map_with_path(constrain, params)

    def parameter_group(self, path, array):
        if path[:2] == ("encoder", "net_0"):
            return FROZEN
        return "predictor" if path[0] == "predictor" else "default"

    def group_schedules(self, schedule, peak):
        return {"default": schedule, "predictor": constant(peak / 2)}


class FollowingFirst(OwnMethod):
    target_first: ClassVar[bool] = True


def momentum(step):
    """From 0.8 at the first epoch along half a cosine to 1; an epoch is two steps of six."""
    return 1 - 0.2 * (np.cos(np.pi * (step // 2) / 3) + 1) / 2


def rate(path, step):
    if path[:2] == ("encoder", "net_0"):
        return 0.0
    return 0.1 if path[0] == "predictor" else 0.1 * (np.cos(np.pi * step / 6) + 1)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {tuple(entry.key for entry in path): value for path, value in leaves}


def assert_close(found, expected, rtol=1e-4, atol=1e-6):
    found, expected = by_path(found), by_path(expected)
    assert found.keys() == expected.keys() and found
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=rtol, atol=atol, err_msg="/".join(path))


class Witness:
    """What a step should see, from `embed` and the equations alone."""

    def __init__(self, embed):
        self._embed = embed
        self._embed_compiled = compiled(embed)
        self.loss_and_gradient = compiled(jax.value_and_grad(self._loss))

    def targets(self, target_params, state, views):
        return [
            self._embed_compiled(target_params, state.target_batch_stats, view)[0].projection
            for view in views
        ]

    def _loss(self, params, state, views, targets):
        predictions = [self._embed(params, state.batch_stats, view)[0].prediction for view in views]

        def cosine(a, b):
            lengths = jnp.sqrt(jnp.sum(a * a, -1) * jnp.sum(b * b, -1))
            return jnp.mean(jnp.sum(a * b, -1) / lengths)

        centred = [target - state.memory["centre"] for target in targets]
        return -2 * cosine(predictions[0], centred[1]) - 2 * cosine(predictions[1], centred[0])


@dataclasses.dataclass
class Step:
    views: tuple[ViewBatch, ...]
    before: object
    after: object
    loss: float


def take_steps(method, count):
    _, state, update, embed = training(method)
    state = state.replace(
        target_params=jax.tree.map(lambda x: 0.8 * x + 0.05, state.target_params),
        memory={"centre": jnp.linspace(-0.5, 0.5, OUT)},
    )
    steps = []
    for number in range(count):
        inputs = random_views(number)
        after, metrics = update(state, inputs)
        steps.append(Step(inputs.views, state, after, float(metrics["loss"])))
        state = after
    return steps, Witness(embed)


@pytest.fixture(scope="module")
def own():
    return take_steps(OwnMethod(), STEPS)


@pytest.mark.exhaustive
def test_the_loss_sees_predictions_targets_and_memory(own):
    steps, witness = own
    for step in steps:
        targets = witness.targets(step.before.target_params, step.before, step.views)
        loss, _ = witness.loss_and_gradient(step.before.params, step.before, step.views, targets)
        np.testing.assert_allclose(step.loss, loss, rtol=1e-4)


def test_every_group_follows_sgd_at_its_own_rate(own):
    steps, witness = own
    buffers = {}
    for number, step in enumerate(steps):
        targets = witness.targets(step.before.target_params, step.before, step.views)
        _, gradient = witness.loss_and_gradient(
            step.before.params, step.before, step.views, targets
        )
        gradient, found = by_path(gradient), by_path(step.after.params)
        for path, value in by_path(step.before.params).items():
            decayed = gradient[path] + SPEC.weight_decay * value
            buffers[path] = SPEC.momentum * buffers.get(path, 0) + decayed
            expected = value - rate(path, number) * buffers[path]
            if path[0] == "projector" and path[-1] == "kernel":
                expected = expected / np.linalg.norm(expected)
            np.testing.assert_allclose(
                found[path], expected, rtol=1e-3, atol=1e-5, err_msg="/".join(path)
            )


def test_only_the_frozen_group_stays_where_it_was(own):
    steps, _ = own
    first, last = by_path(steps[0].before.params), by_path(steps[-1].after.params)
    unchanged = {path for path in first if np.array_equal(first[path], last[path])}
    assert unchanged == {("encoder", "net_0", "kernel")}


def test_the_constraint_holds_after_every_step(own):
    steps, _ = own
    for step in steps:
        for layer in step.after.params["projector"]["projector"].values():
            if "kernel" in layer:
                np.testing.assert_allclose(np.linalg.norm(layer["kernel"]), 1, rtol=1e-6)


def test_the_memory_is_what_the_method_made_of_the_targets(own):
    steps, witness = own
    for step in steps:
        targets = witness.targets(step.before.target_params, step.before, step.views)
        expected = 0.9 * step.before.memory["centre"] + 0.1 * np.mean(targets, axis=(0, 1))
        np.testing.assert_allclose(step.after.memory["centre"], expected, rtol=1e-3, atol=1e-6)


def test_momentum_networks_follow_after_the_step_by_the_epochs_schedule(own):
    steps, _ = own
    assert momentum(0) == momentum(1) != momentum(2)
    for number, step in enumerate(steps):
        assert step.after.target_params.keys() == {"encoder", "projector"}
        kept = momentum(number)
        expected = jax.tree.map(
            lambda old, new, kept=kept: kept * old + (1 - kept) * new,
            step.before.target_params,
            {name: step.after.params[name] for name in step.before.target_params},
        )
        assert_close(step.after.target_params, expected, rtol=1e-5)


@pytest.mark.exhaustive
def test_momentum_networks_may_follow_before_the_targets_are_computed():
    (step,), witness = take_steps(FollowingFirst(), 1)
    kept = momentum(0)
    expected = jax.tree.map(
        lambda old, new: kept * old + (1 - kept) * new,
        step.before.target_params,
        {name: step.before.params[name] for name in step.before.target_params},
    )
    assert_close(step.after.target_params, expected, rtol=1e-5)

    def loss(target_params):
        targets = witness.targets(target_params, step.before, step.views)
        return witness.loss_and_gradient(step.before.params, step.before, step.views, targets)[0]

    np.testing.assert_allclose(step.loss, loss(expected), rtol=1e-4)
    assert abs(step.loss - loss(step.before.target_params)) > 1e-3


CONDITIONED = [
    *[("mlp", injection) for injection in ("concat", "add", "multiply", "image")],
    *[("raw", injection) for injection in ("concat", "add", "multiply", "image")],
    ("hypernetwork", "concat"),
]
UNCONDITIONED = [("none", injection) for injection in ("concat", "add", "multiply", "image")]


class MeanColour(nn.Module):
    """The quickest encoder there is, as wide as CASSLE's ω so that raw ω can be added to it."""

    feature_width: ClassVar[int] = 13

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(self.feature_width)(images.mean((1, 2)))


def losses_of_two_steps(conditioning):
    """The second step's loss, and what it would be had the views been augmented otherwise."""
    method = SimCLR(projector_out=OUT)
    _, state, update, _ = training(method, conditioning, encoder=MeanColour)
    state, _ = update(state, random_views(0, conditioning.size))
    inputs = random_views(1, conditioning.size)
    others = random_views(2, conditioning.size)
    otherwise = TrainingViews(
        tuple(
            ViewBatch(view.images, other.descriptor)
            for view, other in zip(inputs.views, others.views, strict=True)
        )
    )
    return [float(update(state, each)[1]["loss"]) for each in (inputs, otherwise)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("treatment", "injection"), CONDITIONED)
def test_a_conditioned_projector_trains_and_depends_on_the_descriptor(treatment, injection):
    conditioning = Conditioning(treatment=treatment, injection=injection, depth=2, width=4)
    loss, otherwise = losses_of_two_steps(conditioning)
    assert np.isfinite([loss, otherwise]).all()
    assert abs(loss - otherwise) > 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize(("treatment", "injection"), UNCONDITIONED)
def test_a_plain_projector_trains_and_ignores_the_descriptor(treatment, injection):
    conditioning = Conditioning(treatment=treatment, injection=injection)
    assert conditioning == dataclasses.replace(conditioning, descriptors=())
    loss, otherwise = losses_of_two_steps(conditioning)
    assert np.isfinite(loss) and loss == otherwise


def test_a_method_without_descriptors_trains():
    loss, _ = losses_of_two_steps(PLAIN)
    assert np.isfinite(loss)


@pytest.mark.parametrize("injection", ["add", "multiply", "image"])
def test_a_hypernetwork_has_no_injection(injection):
    with pytest.raises(
        ValueError, match=f"injection='{injection}'.*treatment='hypernetwork'.*use injection"
    ):
        build(Conditioning(treatment="hypernetwork", injection=injection))


@pytest.mark.parametrize("injection", ["add", "multiply"])
def test_raw_descriptors_meet_features_of_their_own_width_only(injection):
    with pytest.raises(ValueError, match=r"treatment='raw'.*\(24\), not 13; use treatment='mlp'"):
        build(Conditioning(treatment="raw", injection=injection))


def test_an_unknown_descriptor_is_named_with_those_there_are():
    with pytest.raises(
        ValueError,
        match=r"conditioning\.descriptors=.*unknown name 'colour'; use any of blur, color",
    ):
        Conditioning(descriptors=("blur", "colour"))


def build(conditioning):
    return build_networks(SimCLR(), TinyEncoder, 24, conditioning)


@dataclasses.dataclass(frozen=True)
class Reporting(SimCLR):
    """SimCLR that reports the projections' lengths: their mean, or one by one."""

    each: bool = False

    def loss(self, step, networks):
        lengths = jnp.linalg.norm(step.pair[0].projection, axis=-1)
        return super().loss(step, networks), {"length": lengths if self.each else lengths.mean()}


@dataclasses.dataclass(frozen=True)
class Forgetful(SimCLR):
    """SimCLR whose loss, or a term of it, lacks its mean over the images."""

    named: bool = False

    def loss(self, step, networks):
        first, second = (view.projection for view in step.pair)
        distances = jnp.square(first - second).sum(axis=-1)
        terms = {"contrast": super().loss(step, networks), "pull": distances}
        return terms if self.named else distances


def test_metrics_of_a_method_are_logged_under_names_of_their_own():
    _, state, update, _ = training(Reporting())
    _, metrics = jax.eval_shape(update, state, random_views(0))
    _, _, plain, _ = training(SimCLR())
    own = metrics.keys() - jax.eval_shape(plain, state, random_views(0))[1].keys()
    assert own == {"method_length"}
    assert metrics["method_length"].shape == ()


def test_a_metric_that_is_no_mean_is_refused_by_name():
    _, state, update, _ = training(Reporting(each=True))
    with pytest.raises(ValueError, match=r"^method_length has shape \(4,\); return a mean"):
        jax.eval_shape(update, state, random_views(0))


@pytest.mark.parametrize(("named", "name"), [(False, "loss"), (True, "loss_pull")])
def test_a_loss_that_is_no_mean_is_refused_by_name(named, name):
    _, state, update, _ = training(Forgetful(named=named))
    with pytest.raises(ValueError, match=rf"^{name} has shape \(4,\); return a mean"):
        jax.eval_shape(update, state, random_views(0))


class Narrow(nn.Module):
    """A network of a user's own whose outputs are not float32."""

    @nn.compact
    def __call__(self, rows, *_):
        return nn.Dense(OUT, dtype=jnp.bfloat16)(rows.reshape(len(rows), -1))


def test_losses_see_float32_whatever_the_networks_return():
    networks = Networks(dict.fromkeys(("encoder", "projector", "predictor"), Narrow))
    view = ViewBatch(jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 0)))

    def embedded(key):
        return jax.tree.leaves(networks.init_with_output(key, view, train=True, method="embed")[0])

    dtypes = [array.dtype for array in jax.eval_shape(embedded, jax.random.key(0))]
    assert dtypes == 3 * [jnp.float32]


@pytest.mark.usefixtures("as_a_library")
def test_an_encoder_that_does_not_pool_is_refused():
    """Its maps passed the heads place by place, to an error of JAX after the loss."""

    class Maps(nn.Module):
        feature_width = 5

        @nn.compact
        def __call__(self, images, train):
            return nn.Conv(self.feature_width, (3, 3))(images)

    networks = build_networks(SimCLR(projector_out=8), Maps, Maps.feature_width, PLAIN)
    view = random_views(0).views[0]
    line = r"features of shape \(4, 8, 8, 5\) for 4 images; return \[4, features\], as by a mean"
    with pytest.raises(ValueError, match=line):
        jax.eval_shape(lambda: initial_variables(networks, view, jax.random.key(0)))
