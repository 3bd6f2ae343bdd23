"""The queue fills and wraps, the momentum networks follow, and wrong sizes are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.methods import Encoded, MoCoV2, Progress, Step
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from tests.methods.one_device import BATCH, compiled, random_views, training, unit

OUT = 6


def method(**settings):
    return MoCoV2(**{"queue_size": 3 * BATCH, "projector_out": OUT, "momentum": 0.9, **settings})


def encoded(seed):
    rows = jnp.asarray(5 * np.random.default_rng(seed).normal(size=(BATCH, OUT)), jnp.float32)
    return Encoded(features=rows, projection=rows)


def updated(moco, memory, queries, keys, axis_name=None):
    progress = Progress(step=0, epoch=0.0, epochs=1.0)
    return moco.update_memory(Step({0: queries}, {1: keys}, memory, progress, axis_name))


def test_the_first_queue_has_unit_length_and_is_not_all_alike():
    queue = method(queue_size=64).initial_memory(jax.random.key(0))["queue"]
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(queue.mean(0)) < 0.5
    other = method(queue_size=64).initial_memory(jax.random.key(1))["queue"]
    assert not np.allclose(queue, other)


@pytest.mark.parametrize("enqueue", ["keys", "queries"])
def test_the_queue_fills_in_order_and_wraps_round(enqueue):
    moco = method(enqueue=enqueue)
    memory = moco.initial_memory(jax.random.key(0))
    expected = np.array(memory["queue"])
    for step in range(4):
        queries, keys = encoded(2 * step), encoded(2 * step + 1)
        memory = updated(moco, memory, queries, keys)
        place = step % 3 * BATCH
        newest = keys if enqueue == "keys" else queries
        expected[place : place + BATCH] = unit(newest.projection)
        np.testing.assert_allclose(memory["queue"], expected, rtol=1e-5)
    assert memory["next"] == BATCH


def test_the_queue_takes_the_rows_of_four_devices_in_their_order():
    moco = method()
    memory = moco.initial_memory(jax.random.key(0))
    pair = encoded(0), encoded(1)
    split = parallel(
        lambda memory, queries, keys: updated(moco, memory, queries, keys, AXIS),
        device_mesh(jax.devices()[:4]),
        inputs=(REPLICATED, SHARDED, SHARDED),
        outputs=REPLICATED,
    )(memory, *pair)
    whole = updated(moco, memory, *pair)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), split, whole)


@pytest.fixture(scope="module")
def one_step():
    """`embed`, the state, a step's metrics and the state after it.

    The momentum networks begin at parameters and statistics of their own.
    """
    _, state, update, embed = training(method())
    params, batch_stats = jax.tree.map(
        lambda x: 0.8 * x + 0.05, (state.target_params, state.target_batch_stats)
    )
    state = state.replace(target_params=params, target_batch_stats=batch_stats)
    after, metrics = update(state, random_views(1))
    return compiled(embed), state, metrics, after


def test_momentum_networks_keep_their_share_and_take_the_rest_of_the_new_parameters(one_step):
    _, before, _, after = one_step
    assert after.target_params.keys() == {"encoder", "projector"}
    jax.tree.map(
        lambda found, old, new: np.testing.assert_allclose(found, 0.9 * old + 0.1 * new, rtol=1e-6),
        after.target_params,
        before.target_params,
        after.params,
    )


def test_momentum_networks_have_batch_statistics_of_their_own(one_step):
    embed, before, _, after = one_step
    online, target = random_views(1).views
    _, expected = embed(before.target_params, before.target_batch_stats, target)
    _, trained = embed(before.params, before.batch_stats, online)
    for found, statistics in ((after.target_batch_stats, expected), (after.batch_stats, trained)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, statistics
        )
    mean = expected["encoder"]["net_1"]["mean"]
    assert not np.allclose(mean, trained["encoder"]["net_1"]["mean"], atol=1e-3)


def test_a_step_contrasts_queries_with_keys_and_the_queue_before_it_is_filled(one_step):
    embed, before, metrics, after = one_step
    views = random_views(1).views
    queries = unit(embed(before.params, before.batch_stats, views[0])[0].projection)
    keys = unit(embed(before.target_params, before.target_batch_stats, views[1])[0].projection)
    positives = np.sum(queries * keys, axis=1, keepdims=True)
    logits = np.concatenate([positives, queries @ np.array(before.memory["queue"]).T], 1) / 0.2
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(after.memory["queue"][:BATCH], keys, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(after.memory["queue"][BATCH:], before.memory["queue"][BATCH:])


def test_a_queue_that_no_whole_number_of_batches_fills_names_one_that_works():
    with pytest.raises(ValueError, match=r"method\.queue_size=100.*batch_size=32; 96 would work"):
        method(queue_size=100).check(32, 4)
    with pytest.raises(ValueError, match=r"method\.queue_size=20.*batch_size=32; 32 would work"):
        method(queue_size=20).check(32, 4)
    method(queue_size=96).check(32, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue_size": 0}, r"method\.queue_size=0 must be at least 1"),
        ({"momentum": 1.5}, r"method\.momentum=1\.5 .*\[0, 1\].*0\.999"),
        ({"momentum": float("nan")}, r"method\.momentum=nan"),
        ({"enqueue": "both"}, r"method\.enqueue='both'.*use one of keys, queries"),
        ({"temperature": 0.0}, r"method\.temperature=0\.0 must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)
