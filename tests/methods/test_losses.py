"""The objectives against double loops over the equations, on one device and on four."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cassle_jax.methods import SimCLR, losses
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from tests.methods import reference

BATCH, WIDTH, QUEUE = 8, 3, 5
TEMPERATURE = 0.3
DEVICES = 4

naive_nt_xent = partial(reference.naive_nt_xent, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def embeddings():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(2 * BATCH + QUEUE, WIDTH)).astype(np.float32)
    first, second, queue = np.split(3 * rows, (BATCH, 2 * BATCH))
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    return tuple(map(jnp.asarray, (first, second, queue)))


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def naive_info_nce(queries, keys, queue):
    """MoCo's equation 1: every query finds its key among it and the queue."""
    total = 0.0
    for query, key in zip(np.float64(queries), np.float64(keys), strict=True):
        positive = np.exp(cosine(query, key) / TEMPERATURE)
        negatives = sum(np.exp(cosine(query, row) / TEMPERATURE) for row in np.float64(queue))
        total -= np.log(positive / (positive + negatives))
    return total / len(queries)


def numeric_gradient(function, *arrays, step=1e-5):
    """Central differences in double precision, for each of the arrays."""
    arrays = [np.array(array, np.float64) for array in arrays]
    gradients = [np.zeros_like(array) for array in arrays]
    for array, gradient in zip(arrays, gradients, strict=True):
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + step
            above = function(*arrays)
            array[index] = kept - step
            below = function(*arrays)
            array[index] = kept
            gradient[index] = (above - below) / (2 * step)
    return gradients


def nt_xent(first, second, axis_name=None):
    return losses.nt_xent(first, second, temperature=TEMPERATURE, axis_name=axis_name)


def queue_info_nce(queries, keys, queue):
    return losses.queue_info_nce(queries, keys, queue, temperature=TEMPERATURE)


def test_nt_xent_is_the_equation_with_its_gradient(embeddings):
    pair = embeddings[:2]
    value, gradients = jax.jit(jax.value_and_grad(nt_xent, (0, 1)))(*pair)
    np.testing.assert_allclose(value, naive_nt_xent(*pair), rtol=1e-5)
    for found, expected in zip(gradients, numeric_gradient(naive_nt_xent, *pair), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_queue_info_nce_is_the_equation_with_its_gradient(embeddings):
    queries, keys, queue = embeddings
    value, gradients = jax.jit(jax.value_and_grad(queue_info_nce, (0, 1)))(queries, keys, queue)
    np.testing.assert_allclose(value, naive_info_nce(queries, keys, queue), rtol=1e-5)
    numeric = numeric_gradient(lambda q, k: naive_info_nce(q, k, queue), queries, keys)
    for found, expected in zip(gradients, numeric, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_small_temperature_does_not_overflow(embeddings):
    queries, keys, queue = embeddings
    cold = jax.jit(partial(losses.queue_info_nce, temperature=1e-3))
    np.testing.assert_allclose(cold(queries, queries, queue), 0, atol=1e-5)
    cold = jax.jit(partial(losses.nt_xent, temperature=1e-3, axis_name=None))
    assert np.isfinite(cold(queries, keys))


def on_four_devices(loss, inputs):
    """The mean of the devices' losses, and its gradient as a training step takes it.

    The embeddings are `rows @ weights`, as those of a network whose parameters are replicated.
    """

    def one_device(weights, *batch):
        value, gradient = jax.value_and_grad(loss)(weights, *batch)
        return jax.lax.pmean((value, gradient), AXIS)

    mesh = device_mesh(jax.devices()[:DEVICES])
    return parallel(
        one_device, mesh, inputs=(REPLICATED, *inputs), outputs=(REPLICATED, REPLICATED)
    )


@pytest.fixture(scope="module")
def weights():
    return jnp.asarray(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)), jnp.float32)


def test_nt_xent_of_four_devices_is_that_of_one(embeddings, weights):
    def loss(weights, first, second, axis_name=AXIS):
        return nt_xent(first @ weights, jnp.tanh(second @ weights), axis_name)

    pair = embeddings[:2]
    whole = jax.jit(jax.value_and_grad(lambda w: loss(w, *pair, axis_name=None)))(weights)
    split = on_four_devices(loss, (SHARDED, SHARDED))(weights, *pair)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), split, whole)


def test_local_negatives_are_the_equation_on_each_devices_share(embeddings, weights):
    def loss(weights, first, second):
        return nt_xent(first, second, None) + 0 * weights.sum()

    first, second = embeddings[:2]
    value, _ = on_four_devices(loss, (SHARDED, SHARDED))(weights, first, second)
    shares = [
        naive_nt_xent(*share)
        for share in zip(np.split(first, DEVICES), np.split(second, DEVICES), strict=True)
    ]
    np.testing.assert_allclose(value, np.mean(shares), rtol=1e-5)


def test_queue_info_nce_of_four_devices_is_that_of_one(embeddings, weights):
    def loss(weights, queries, keys, queue):
        return queue_info_nce(queries @ weights, keys, queue)

    whole = jax.jit(jax.value_and_grad(loss))(weights, *embeddings)
    split = on_four_devices(loss, (SHARDED, SHARDED, REPLICATED))(weights, *embeddings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), split, whole)


@pytest.mark.parametrize("devices", [1, DEVICES])
def test_pair_similarities_are_the_mean_cosines(embeddings, devices):
    first, second = embeddings[:2]
    if devices == 1:
        found = losses.pair_similarities(first, second, None)
    else:
        found = parallel(
            lambda first, second: losses.pair_similarities(first, second, AXIS),
            device_mesh(jax.devices()[:devices]),
            inputs=(SHARDED, SHARDED),
            outputs=REPLICATED,
        )(first, second)
    table = np.array([[cosine(a, b) for b in np.float64(second)] for a in np.float64(first)])
    np.testing.assert_allclose(found["positive_similarity"], table.diagonal().mean(), rtol=1e-5)
    others = table[~np.eye(BATCH, dtype=bool)]
    np.testing.assert_allclose(found["negative_similarity"], others.mean(), rtol=1e-4)


def test_one_pair_has_no_negatives():
    pair = jnp.array([[3.0, 4.0]]), jnp.array([[4.0, 3.0]])
    found = losses.pair_similarities(*pair, None)
    np.testing.assert_allclose(found["positive_similarity"], 0.96, rtol=1e-6)
    assert found["negative_similarity"] == 0


def test_a_collapsed_network_has_both_similarities_at_one():
    same = jnp.tile(jnp.array([[1.0, 2.0, 2.0]]), (4, 1))
    found = losses.pair_similarities(same, 5 * same, None)
    np.testing.assert_allclose(list(found.values()), 1, rtol=1e-6)


def test_normalize_gives_unit_length_and_leaves_zero_alone():
    rows = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-6]])
    np.testing.assert_allclose(losses.normalize(rows), [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-6)


def test_a_zero_embedding_does_not_poison_the_gradient():
    rows = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    gradient = jax.grad(lambda rows: losses.normalize(rows)[:, 0].sum())(rows)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_embeddings_are_computed_with_in_float32(embeddings, dtype):
    # In float16, the square of 300 is infinite.
    first, second = ((300 * each).astype(dtype) for each in embeddings[:2])
    rounded = np.float64(first), np.float64(second)
    np.testing.assert_allclose(nt_xent(first, second), naive_nt_xent(*rounded), rtol=1e-5)
    correlation = rounded[0].T @ rounded[1] / BATCH
    diagonal = correlation.diagonal()
    wanted = np.sum((1 - diagonal) ** 2), np.sum(correlation**2) - np.sum(diagonal**2)
    np.testing.assert_allclose(losses.cross_correlation(first, second, None), wanted, rtol=1e-5)
    _, invariance, covariance = losses.variance_invariance_covariance(first, second, None)
    np.testing.assert_allclose(invariance, np.mean((rounded[0] - rounded[1]) ** 2), rtol=1e-5)
    squares = [np.cov(each.T) ** 2 for each in rounded]
    wanted = sum(each.sum() - each.trace() for each in squares) / WIDTH
    np.testing.assert_allclose(covariance, wanted, rtol=1e-5)
    codes = losses.sinkhorn_codes(first / 900, epsilon=0.05, iterations=3, axis_name=None)
    np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        nt_xent,
        lambda first, second: queue_info_nce(first, second, jnp.eye(WIDTH)),
        partial(losses.batch_info_nce, temperature=TEMPERATURE, axis_name=None),
        losses.cosine,
        lambda first, second: losses.cross_correlation(first, second, None),
        lambda first, second: losses.pair_similarities(first, second, None),
        lambda first, second: losses.variance_invariance_covariance(first, second, None),
    ],
)
def test_embeddings_of_other_images_are_refused(objective, monkeypatch):
    # Without the checks of shapes that the tests run with, and a user does not.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    rows = jnp.ones((BATCH, WIDTH))
    for first, second in ((rows, rows[:1]), (rows[: BATCH // 2], rows), (rows, rows[:, :1])):
        with pytest.raises(ValueError, match=r"shapes .* are not of the same images, row by row"):
            objective(first, second)


@pytest.mark.parametrize("temperature", [0.0, -0.2, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=rf"method\.temperature={temperature} must be above 0"):
        SimCLR(temperature=temperature)
