"""Every head's loss against NumPy, their weighted sum, and whose features they compare."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.methods import AugSelf, Features, MoCoV2, SimCLR, TrainingViews
from cassle_jax.training.state import TrainState
from tests.methods.one_device import BATCH, compiled, random_views, training

WEIGHTS = {"crop": 0.5, "color": 0.25, "blur": 2.0, "solarize": 1.0, "flip": 0.75, "rotation": 3.0}
AUGSELF = AugSelf(WEIGHTS, hidden=8)
TWO = AugSelf({"crop": 0.5, "rotation": 3.0}, hidden=8)


def head_outputs(params, pairs):
    """An MLP of three linear layers, BatchNorm over the batch and ReLU between them."""
    x = np.float64(pairs)
    for layer in range(2):
        x = x @ params[f"linear_{layer}"]["kernel"]
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x = np.maximum(x * params[f"bn_{layer}"]["scale"] + params[f"bn_{layer}"]["bias"], 0)
    return x @ params["linear_2"]["kernel"] + params["linear_2"]["bias"]


def head_loss(name, outputs, targets):
    if name == "flip":
        probability = 1 / (1 + np.exp(-outputs))
        return -np.mean(targets * np.log(probability) + (1 - targets) * np.log(1 - probability))
    if name == "rotation":
        exponentials = np.exp(outputs)
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        return -np.mean(np.log(probabilities[targets.astype(bool)]))
    return np.mean((np.tanh(outputs) - targets) ** 2)


def expected_losses(names, params, first, second, differences):
    pairs = np.concatenate([np.hstack([first, second]), np.hstack([second, first])])
    return {
        name: head_loss(
            name,
            head_outputs(jax.tree.map(np.float64, params[f"augself_{name}"]), pairs),
            np.concatenate([each[name] for each in differences]),
        )
        for name in names
    }


@pytest.mark.exhaustive
def test_each_head_against_numpy():
    networks, state, _, _ = training(SimCLR(), auxiliaries=(AUGSELF,))
    draw = np.random.default_rng(3)
    first, second = jnp.asarray(draw.normal(size=(2, BATCH, 24)), jnp.float32)
    targets = random_views(4, predicted=AUGSELF.descriptors).targets
    features = Features({0: first, 1: second}, {}, (), targets)
    apply = nn.apply(
        lambda networks: AUGSELF.losses(networks, features, (), None),
        networks,
        mutable=["batch_stats"],
    )
    (found, _), _ = compiled(apply)({"params": state.params, "batch_stats": state.batch_stats})
    expected = expected_losses(WEIGHTS, state.params, first, second, targets["augself"])
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        np.testing.assert_allclose(found[name], loss, rtol=1e-4, err_msg=name)


def test_the_total_is_the_weighted_sum():
    losses = {name: jnp.float32(value) for value, name in enumerate(WEIGHTS)}
    expected = sum(WEIGHTS[name] * float(loss) for name, loss in losses.items())
    np.testing.assert_allclose(AUGSELF.total(losses), expected, rtol=1e-6)
    assert AugSelf({}).total({}) == 0


class OneStep(NamedTuple):
    embed: Callable
    inputs: TrainingViews
    before: TrainState
    after: TrainState
    metrics: dict


def take_a_step(method):
    _, state, update, embed = training(method, auxiliaries=(TWO,))
    if state.target_params:  # so that the two networks differ
        drifted = jax.tree.map(lambda x: 0.5 * x + 0.1, state.target_params)
        state = state.replace(target_params=drifted)
    inputs = random_views(5, predicted=TWO.descriptors)
    return OneStep(compiled(embed), inputs, state, *update(state, inputs))


@pytest.fixture(scope="module")
def simclr():
    return take_a_step(SimCLR())


@pytest.fixture(scope="module")
def moco():
    return take_a_step(MoCoV2(queue_size=2 * BATCH, projector_out=6))


def features(step, networks, view):
    params, batch_stats = {
        "online": (step.before.params, step.before.batch_stats),
        "target": (step.before.target_params, step.before.target_batch_stats),
    }[networks]
    return np.asarray(step.embed(params, batch_stats, step.inputs.views[view])[0].features)


def assert_heads_compare(step, first, second):
    expected = expected_losses(
        TWO.descriptors, step.before.params, first, second, step.inputs.targets["augself"]
    )
    for name, loss in expected.items():
        found = step.metrics[f"loss_augself_{name}"]
        np.testing.assert_allclose(found, loss, rtol=1e-3, err_msg=name)
    share = sum(TWO.weights[name] * loss for name, loss in expected.items())
    total = step.metrics["loss_method"] + share
    np.testing.assert_allclose(step.metrics["loss"], total, rtol=1e-4)


def test_a_step_of_simclr_compares_the_online_features_of_both_views(simclr):
    assert_heads_compare(simclr, features(simclr, "online", 0), features(simclr, "online", 1))


def test_a_step_of_moco_compares_with_the_momentum_encoders_features(moco):
    assert_heads_compare(moco, features(moco, "online", 0), features(moco, "target", 1))


def test_the_heads_train_along(simclr):
    for head in (f"augself_{name}" for name in TWO.descriptors):
        kernels = (
            state.params[head]["linear_2"]["kernel"] for state in (simclr.before, simclr.after)
        )
        assert not np.allclose(*kernels), head


def test_a_difference_that_cannot_be_predicted_is_named():
    with pytest.raises(ValueError, match=r"augself\.grayscale cannot.*blur, color, crop"):
        AugSelf({"grayscale": 0.5})


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_named(weight):
    with pytest.raises(ValueError, match=rf"augself\.crop={weight} must be above 0"):
        AugSelf({"crop": weight})
