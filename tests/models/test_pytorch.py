import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.interop.pytorch import (
    mlp_from_pytorch,
    mlp_to_pytorch,
    projector_from_pytorch,
    projector_to_pytorch,
)
from cassle_jax.models import MLP, ImageConditioner


@pytest.fixture(scope="module")
def variables():
    mlp = MLP(hidden=5, out=3, depth=2, last_bn=True, last_bn_affine=False)
    return mlp.init(jax.random.key(0), jnp.ones((2, 4)), False)


@pytest.fixture
def state(variables):
    return mlp_to_pytorch(variables)


def test_an_mlp_has_the_names_and_layouts_of_a_sequential(state):
    assert {name: array.shape for name, array in state.items()} == {
        "0.weight": (5, 4),
        "1.weight": (5,),
        "1.bias": (5,),
        "1.running_mean": (5,),
        "1.running_var": (5,),
        "3.weight": (3, 5),
        "4.running_mean": (3,),
        "4.running_var": (3,),
    }


def test_an_mlp_comes_back_as_it_was(variables, state):
    state["1.num_batches_tracked"] = np.asarray(7)
    back = mlp_from_pytorch(state, jax.eval_shape(lambda: variables))
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_an_image_conditioner_comes_back_as_it_was():
    conditioner = ImageConditioner(condition_depth=2, condition_width=3)
    variables = conditioner.init(jax.random.key(0), jnp.ones((2, 2, 2, 3)), jnp.ones((2, 4)), False)
    state = projector_to_pytorch(variables)
    assert "aug_processor.0.weight" in state
    back = projector_from_pytorch(state, variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_arrays_that_do_not_fit_are_named(variables, state):
    del state["1.bias"]
    state["fc.weight"] = np.ones((2, 2), np.float32)
    state["0.weight"] = state["0.weight"].T
    with pytest.raises(ValueError, match="does not fit") as raised:
        mlp_from_pytorch(state, variables)
    message = str(raised.value)
    assert "1.bias is missing" in message
    assert "fc.weight is unexpected" in message
    assert "0.weight has shape (4, 5), not (5, 4)" in message
