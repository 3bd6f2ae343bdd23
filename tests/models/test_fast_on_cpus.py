"""What stands in for XLA's convolution, pooling and sums gives the same numbers and gradients."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from cassle_jax.models import winograd
from cassle_jax.models.convolve import convolve
from cassle_jax.models.pooling import max_pool
from cassle_jax.models.sums import channel_sums, tree_norm
from cassle_jax.parallel import REPLICATED, SHARDED, device_mesh, parallel
from tests.everyday import everyday_pairs
from tests.platforms import programs

HOW = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def value_and_gradients(function, *arguments):
    weights = jnp.cos(jnp.arange(function(*arguments).size, dtype=jnp.float32))
    weighed = lambda *each: (function(*each).ravel() * weights).sum()  # noqa: E731
    places = tuple(range(len(arguments)))
    return function(*arguments), jax.grad(weighed, places)(*arguments)


SIZES = [(1, 1), (2, 2), (1, 3), (2, 5), (4, 4), (5, 5)]
KERNELS = {"3": (3, 1), "3 by twos": (3, 2), "7 by twos": (7, 2), "3 by fours": (3, 4)}


@pytest.mark.parametrize(
    ("size", "kernel"),
    everyday_pairs(
        SIZES,
        KERNELS,
        ((1, 1), "3"),
        ((2, 2), "3 by twos"),
        ((1, 3), "7 by twos"),
        ((2, 5), "7 by twos"),
        ((4, 4), "3"),
        ((5, 5), "3 by fours"),
    ),
)
def test_a_convolution_of_a_map_smaller_than_its_kernel_is_a_convolution(size, kernel):
    side, stride = KERNELS[kernel]
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, *size, 3)), jnp.float32)
    kernel = jnp.asarray(random.standard_normal((side, side, 3, 4)), jnp.float32)
    around = ((side // 2, side // 2),) * 2
    ours, theirs = (
        value_and_gradients(lambda x, k, f=f: f(x, k, (stride, stride), around, **HOW), x, kernel)
        for f in (convolve, lax.conv_general_dilated)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_strides_and_the_padding_of_each_side_may_differ():
    random = np.random.default_rng(1)
    x = jnp.asarray(random.standard_normal((2, 2, 1, 3)), jnp.float32)
    kernel = jnp.asarray(random.standard_normal((4, 5, 3, 4)), jnp.float32)
    ours, theirs = (
        value_and_gradients(lambda x, k, f=f: f(x, k, (1, 3), ((3, 2), (1, 4)), **HOW), x, kernel)
        for f in (convolve, lax.conv_general_dilated)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


WIDE = [(3, 3), (4, 4), (7, 8)]


def wide(size, dtype=jnp.float32):
    random = np.random.default_rng(6)
    shapes = ((8, *size, 32), (3, 3, 32, 32))
    return tuple(jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)


def close_to_a_part_of_the_largest(actual, expected, part):
    error = np.abs(np.float64(actual) - np.float64(expected)).max()
    assert error <= part * np.abs(np.float64(expected)).max()


@pytest.fixture
def traced_anew():
    """JAX keeps what it has traced, also with groups of other sizes."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("images", [1, 3, 100])  # in a group
@pytest.mark.parametrize("size", WIDE)
@pytest.mark.usefixtures("traced_anew")
def test_a_convolution_of_wide_maps_is_a_convolution(monkeypatch, size, images):
    monkeypatch.setattr(winograd, "_AT_ONCE", images * 4 * 4 * math.prod(size) * 32)
    ours, theirs = (
        value_and_gradients(
            jax.jit(lambda x, k, f=f: f(x, k, (1, 1), ((1, 1), (1, 1)), **HOW)), *wide(size)
        )
        for f in (convolve, lax.conv_general_dilated)
    )
    jax.tree.map(lambda a, b: close_to_a_part_of_the_largest(a, b, 2e-6), ours, theirs)


def test_no_wide_maps_give_no_maps():
    x, kernel = wide((4, 4))
    assert convolve(x[:0], kernel, (1, 1), ((1, 1), (1, 1)), **HOW).shape == (0, 4, 4, 32)


@pytest.mark.parametrize(
    "shape", [(64, 56, 56, 128), (64, 96, 96, 64), (7, 14, 14, 256), (1, 8, 8, 32)]
)
def test_groups_of_images_are_equal_and_fit_the_cache(shape):
    groups, images, *_ = jax.eval_shape(
        winograd._groups, jax.ShapeDtypeStruct(shape, jnp.float32)
    ).shape
    assert 0 <= groups * images - shape[0] < groups
    assert images == 1 or images * 4 * 4 * math.prod(shape[1:]) <= winograd._AT_ONCE


def test_devices_convolve_their_wide_maps():
    x, kernel = wide((4, 4))

    def by(f, x, kernel):
        def weighed(x, kernel):
            images = f(x, kernel, (1, 1), ((1, 1), (1, 1)), **HOW).reshape(len(x), -1)
            return (images * jnp.cos(jnp.arange(images.shape[1]))).sum()

        of_maps, of_kernel = jax.grad(weighed, (0, 1))(x, kernel)
        return of_maps, of_kernel[None]

    sharded = parallel(
        partial(by, convolve), device_mesh(), inputs=(SHARDED, REPLICATED), outputs=SHARDED
    )
    of_maps, of_kernel = sharded(x, kernel)
    expected = by(lax.conv_general_dilated, x, kernel)
    close_to_a_part_of_the_largest(of_maps, expected[0], 2e-6)
    close_to_a_part_of_the_largest(of_kernel.sum(0), expected[1][0], 2e-6)


def test_the_gradient_of_a_small_bfloat16_map_is_rounded_once():
    random = np.random.default_rng(5)
    shapes = ((2, 2, 2, 64), (3, 3, 64, 64), (2, 2, 2, 64))
    x, kernel, gradient = (jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in shapes)

    def back(f, x, kernel, gradient):
        around = ((1, 1), (1, 1))
        return jax.vjp(lambda x: f(x, kernel, (1, 1), around, **HOW), x)[1](gradient)[0]

    ours = back(convolve, x, kernel, gradient)
    exact = back(lax.conv_general_dilated, *map(jnp.float32, (x, kernel, gradient)))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(jnp.float32(ours), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8), (8, 7)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pooling_and_its_gradient_are_xlas_also_among_equals(size, dtype):
    random = np.random.default_rng(1)
    x = jnp.asarray(random.integers(-2, 3, (2, *size, 3)), dtype)  # many equal maxima

    def theirs(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    ours, theirs = (value_and_gradients(jax.jit(f), x) for f in (max_pool, theirs))
    assert ours[0].dtype == dtype and ours[1][0].dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2  # several windows' gradients are added up
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
        ),
        ours,
        theirs,
    )


@pytest.mark.parametrize("shape", [(5,), (6, 5), (4, 3, 2, 5), (3, 0, 5), (0, 5)])
def test_sums_per_channel_and_their_gradient_are_plain_sums(shape):
    x = jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    ours, theirs = (
        value_and_gradients(f, x) for f in (channel_sums, lambda x: x.reshape(-1, 5).sum(0))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)


def traced(function, *shapes, dtype=jnp.float32):
    """The function, traced for arrays of these shapes."""
    return jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def test_only_cpus_sum_by_products():
    program = programs(traced(channel_sums, (8, 4, 4, 5)))
    assert [each for each, text in program.items() if "dot_general" in text] == ["cpu"]


def test_only_cpus_store_the_maps_around_a_convolution():
    step = jax.grad(lambda x, k: convolve(x, k, (1, 1), ((1, 1), (1, 1)), **HOW).sum(), (0, 1))
    program = programs(traced(step, (2, 8, 8, 3), (3, 3, 3, 4)))
    assert [each for each, text in program.items() if "optimization_barrier" in text] == ["cpu"]


@pytest.mark.parametrize(("dtype", "where"), [(jnp.float32, ["cpu"]), (jnp.bfloat16, [])])
def test_only_cpus_multiply_tiles_and_only_in_float32(dtype, where):
    def step(x, k):
        return convolve(x, k, (1, 1), ((1, 1), (1, 1)), **HOW).astype(jnp.float32).sum()

    step = jax.value_and_grad(step, (0, 1))
    program = programs(traced(step, (2, 4, 4, 32), (3, 3, 32, 32), dtype=dtype))
    assert [each for each, text in program.items() if "dot_general" in text] == where
    del program["cpu"]
    assert {text.count("stablehlo.convolution(") for text in program.values()} == {3}


def test_the_sum_of_many_values_hardly_rounds():
    x = np.random.default_rng(3).normal(1, 1, (64, 32, 32, 8)).astype(np.float32)
    exact = x.sum((0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(channel_sums(jnp.asarray(x)), exact, rtol=1e-6)


def test_the_norm_of_a_tree_is_that_of_all_its_numbers():
    random = np.random.default_rng(4)
    tree = {"a": random.standard_normal((3, 3, 4, 5)), "b": {"c": random.standard_normal(7)}}
    tree |= {"d": 2.0, "e": np.ones((0, 5)), "f": np.ones((5, 0))}
    tree = jax.tree.map(jnp.float32, tree)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    np.testing.assert_allclose(tree_norm(tree), np.linalg.norm(flat), rtol=1e-6)
    assert tree_norm({}) == 0
