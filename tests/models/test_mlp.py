from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.models import MLP, ConvNeXt, ResNet


def shapes(**fields):
    variables = jax.eval_shape(
        lambda: MLP(hidden=5, out=3, **fields).init(jax.random.key(0), jnp.ones((2, 4)), True)
    )
    return jax.tree.map(lambda leaf: leaf.shape, variables)


def test_only_a_last_linear_without_norm_has_a_bias():
    assert shapes(depth=2)["params"] == {
        "linear_0": {"kernel": (4, 5)},
        "bn_0": {"scale": (5,), "bias": (5,)},
        "linear_1": {"kernel": (5, 3), "bias": (3,)},
    }
    assert shapes(depth=1)["params"] == {"linear_0": {"kernel": (4, 3), "bias": (3,)}}


def test_a_last_norm_may_go_without_scale_and_shift():
    assert shapes(depth=1, last_bn=True)["params"]["bn_0"] == {"scale": (3,), "bias": (3,)}
    plain = shapes(depth=1, last_bn=True, last_bn_affine=False)
    assert plain["params"] == {"linear_0": {"kernel": (4, 3)}}
    assert plain["batch_stats"] == {"bn_0": {"mean": (3,), "var": (3,)}}


def test_weights_and_biases_start_uniform_within_one_over_root_fan_in():
    params = MLP(hidden=8, out=2000, depth=1).init(jax.random.key(0), jnp.ones((1, 16)), False)
    for values in params["params"]["linear_0"].values():
        assert 0.24 < jnp.max(values) <= 0.25
        assert -0.25 <= jnp.min(values) < -0.24
        np.testing.assert_allclose(np.std(values), 0.25 / np.sqrt(3), rtol=0.05)


@pytest.mark.parametrize("last_bn", [False, True])
def test_bfloat16_layers_give_a_float32_result(last_bn):
    mlp = MLP(hidden=5, out=3, depth=2, last_bn=last_bn, dtype=jnp.bfloat16)
    result, variables = mlp.init_with_output(jax.random.key(0), jnp.ones((2, 4)), True)
    assert result.dtype == jnp.float32
    assert last_bn or not np.array_equal(result, result.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_the_last_bias_is_not_rounded_to_bfloat16():
    mlp = MLP(hidden=5, out=3, depth=1, dtype=jnp.bfloat16)
    result, variables = mlp.init_with_output(jax.random.key(0), jnp.zeros((1, 4)), True)
    np.testing.assert_array_equal(result[0], variables["params"]["linear_0"]["bias"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(MLP, 5, 3, depth=0), "depth=0 .*; use 1 or more"),
        (partial(MLP, 0, 3, depth=2), "hidden=0 must be at least 1"),
        (partial(MLP, 5, -1, depth=2), "out=-1 must be at least 1"),
        (partial(ResNet, 18, width=0), r"encoder\.width=0 must be at least 1"),
        (partial(ConvNeXt, (1, 1, 1, 1), width=0), r"encoder\.width=0 must be at least 1"),
        (partial(ConvNeXt, (1, 0, 1, 1)), r"depths=\(1, 0, 1, 1\) are not four numbers"),
    ],
)
def test_a_network_without_channels_or_layers_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
