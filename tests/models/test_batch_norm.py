import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cassle_jax.models import BatchNorm

DEVICES = 4


def closed_form(x, scale, bias):
    mean, var = x.mean(axis=(0, 1)), x.var(axis=(0, 1))
    count = x.shape[0] * x.shape[1]
    y = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    return y, 0.9 * 0.5 + 0.1 * mean, 0.9 * 2.0 + 0.1 * var * count / (count - 1)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (8, 3, 5)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 5)).astype(np.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": np.full(5, 0.5, np.float32), "var": np.full(5, 2.0, np.float32)},
    }
    return jnp.asarray(x), jax.tree.map(jnp.asarray, variables)


def test_training_normalises_by_the_batch_and_records_the_unbiased_variance(problem):
    x, variables = problem
    y, updates = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    expected, mean, var = closed_form(np.asarray(x, np.float64), **variables["params"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-6)


def test_evaluation_uses_the_running_averages(problem):
    x, variables = problem
    y = BatchNorm().apply(variables, x, False)
    params = variables["params"]
    expected = (x - 0.5) / np.sqrt(2.0 + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_a_large_mean_does_not_destroy_the_variance(problem):
    x, variables = problem
    variables["batch_stats"]["mean"] = jnp.full(5, 10_000.0)
    y, _ = BatchNorm(False, False).apply(
        {"batch_stats": variables["batch_stats"]}, x + 10_000, True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(np.std(y, axis=(0, 1)), 1.0, rtol=1e-3)


@pytest.mark.parametrize("mean", [30, 3000])
def test_the_first_steps_variance_of_many_values_is_exact(mean):
    """The running mean is still 0 then, and a plain sum of 65 536 values rounds a lot."""
    x = np.random.default_rng(0).normal(mean, 1, (64, 32, 32, 8)).astype(np.float32)
    norm = BatchNorm(False, False, momentum=0.0)
    variables = norm.init(jax.random.key(0), jnp.asarray(x), True)
    _, updates = norm.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
    expected = np.var(x, axis=(0, 1, 2), dtype=np.float64, ddof=1)
    np.testing.assert_allclose(updates["batch_stats"]["var"], expected, rtol=1e-5)


def test_eight_bit_mantissas_in_still_give_float32_statistics(problem):
    x, variables = problem
    x = jnp.asarray(x, jnp.bfloat16)
    y, updates = BatchNorm(dtype=jnp.bfloat16).apply(variables, x, True, mutable=["batch_stats"])
    _, mean, var = closed_form(np.asarray(x, np.float64), **variables["params"])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-6)


@pytest.mark.skipif(jax.device_count() < DEVICES, reason=f"needs {DEVICES} devices")
def test_four_devices_equal_one_gradient_included(problem):
    x, variables = problem
    # Images differ in mean, so that statistics of one device would show.
    x = x + jnp.arange(8.0)[:, None, None]
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    stats = variables["batch_stats"]

    def step(axis_name):
        norm = BatchNorm(axis_name=axis_name)

        def loss(params, x, weights):
            y, updates = norm.apply(
                {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
            )
            return jnp.mean(weights * y**2), (y, updates["batch_stats"])

        def gradients(params, x, weights):
            (_, (y, new_stats)), (of_params, of_x) = jax.value_and_grad(
                loss, argnums=(0, 1), has_aux=True
            )(params, x, weights)
            if axis_name:
                of_params, of_x = jax.lax.pmean(of_params, axis_name), of_x / DEVICES
            return y, new_stats, of_params, of_x

        return gradients

    mesh = jax.make_mesh(
        (DEVICES,), ("devices",), (AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )
    sharded = jax.shard_map(
        step("devices"),
        mesh=mesh,
        in_specs=(P(), P("devices"), P("devices")),
        out_specs=(P("devices"), P(), P(), P("devices")),
        check_vma=False,
    )
    one = jax.jit(step(None))(variables["params"], x, weights)
    four = jax.jit(sharded)(variables["params"], x, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, four)


def test_initialising_needs_no_mapped_axis_and_leaves_the_averages_alone():
    variables = BatchNorm(axis_name="devices").init(jax.random.key(0), jnp.ones((1, 3)), True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))


def test_one_value_per_channel_has_no_variance():
    norm = BatchNorm(False, False)
    stats = norm.init(jax.random.key(0), jnp.ones((1, 3)), False)
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        norm.apply(stats, jnp.ones((1, 3)), True, mutable=["batch_stats"])


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_are_those_of_the_closed_form(problem, affine):
    x, variables = problem
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    norm = BatchNorm(affine, affine)

    def ours(x, params):
        stats = variables["batch_stats"]
        given = {"params": params if affine else {}, "batch_stats": stats}
        return (weights * norm.apply(given, x, True, mutable=["batch_stats"])[0]).sum()

    def plain(x, params):
        y = (x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + 1e-5)
        y = y * params["scale"] + params["bias"] if affine else y
        return (weights * y).sum()

    ours, plain = (jax.grad(f, (0, 1))(x, variables["params"]) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, plain)
