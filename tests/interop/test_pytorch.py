import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.pytorch import (
    encoder_from_pytorch,
    encoder_to_pytorch,
    mlp_from_pytorch,
    mlp_to_pytorch,
    predictor_from_pytorch,
    predictor_to_pytorch,
    projector_from_pytorch,
    projector_to_pytorch,
)
from cassle_jax.models import MLP, ConditionedProjector, ImageConditioner, make_encoder
from tests.interop.states import ENCODERS, by_rule, encoder_variables, filled

GOLDEN = Path(__file__).parents[1] / "golden"


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


def test_a_plain_predictor_is_a_bare_sequential():
    predictor = ConditionedProjector(hidden=5, out=3, depth=2, treatment="none")
    variables = predictor.init(jax.random.key(0), jnp.ones((2, 3)), jnp.ones((2, 0)), False)
    state = predictor_to_pytorch(variables)
    assert state.keys() == {
        "0.weight",
        *(f"1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
        "3.weight",
        "3.bias",
    }
    back = predictor_from_pytorch(state, variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_a_conditioned_predictor_has_a_projectors_names():
    predictor = ConditionedProjector(hidden=5, out=3, depth=2, condition_depth=1, condition_width=4)
    variables = predictor.init(jax.random.key(0), jnp.ones((2, 3)), jnp.ones((2, 6)), False)
    state = predictor_to_pytorch(variables)
    assert {"aug_processor.0.weight", "projector.0.weight"} < state.keys()
    back = predictor_from_pytorch(state, variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_small"])
def test_an_encoder_has_the_published_names_and_shapes(name):
    shapes = json.loads((GOLDEN / "backbone_shapes.json").read_text())[name]
    state = encoder_to_pytorch(filled(encoder_variables(make_encoder(name), 224)))
    assert {key: list(array.shape) for key, array in state.items()} == shapes


@pytest.mark.exhaustive
def test_a_vits_arrays_are_laid_out_as_published():
    """The golden features are PyTorch's for a state in its own layouts."""
    state = by_rule(json.loads((GOLDEN / "backbone_shapes.json").read_text())["vit_small"])
    encoder = make_encoder("vit_small")
    variables = encoder_from_pytorch(state, encoder_variables(encoder, 224))
    images = np.random.default_rng(3).standard_normal((4, 3, 224, 224)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        features = jax.jit(lambda v, x: encoder.apply(v, x, False))(
            variables, images.transpose(0, 2, 3, 1)
        )
    with np.load(GOLDEN / "backbone_features.npz") as golden:
        expected = golden["vit_small/eval_features"]
    assert np.linalg.norm(features - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_comes_back_as_it_was(name):
    variables = filled(encoder_variables(ENCODERS[name]))
    back = encoder_from_pytorch(encoder_to_pytorch(variables), variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_some_problems_per_kind_are_reported():
    variables = encoder_variables(make_encoder("resnet50"), 32)
    state = {f"blocks.{i}": np.ones(1) for i in range(9)} | {"conv1.weight": np.ones(2)}
    with pytest.raises(ValueError, match="does not fit") as raised:
        encoder_from_pytorch(state, variables)
    message = str(raised.value)
    assert message.count("is missing") == 8 and "and 256 more" in message
    assert message.count("is unexpected") == 8 and "and 1 more" in message
    assert "conv1.weight has shape (2,), not (64, 3, 7, 7)" in message


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


@pytest.mark.parametrize("dtype", ["<U3", "S2", np.complex64, bool, np.int8, [("a", np.float32)]])
def test_arrays_of_other_than_floating_point_numbers_are_refused(variables, state, dtype):
    state["1.bias"] = np.zeros(5, dtype)
    with pytest.raises(WeightsError, match=r"1\.bias holds .* floating-point"):
        mlp_from_pytorch(state, variables)


class OwnPredictor(nn.Module):
    """A predictor of a user's own, with parameters of any name, rank and depth."""

    @nn.compact
    def __call__(self, x):
        self.param("temperature", nn.initializers.ones, ())
        self.param("prototypes", nn.initializers.normal(), (4, 3))
        self.param("mixture", nn.initializers.normal(), (1, 2, 3, 4, 5))
        x = nn.Dense(3, name="projector")(x)
        return OwnCentres(name="bn_of_centres")(x)


class OwnCentres(nn.Module):
    @nn.compact
    def __call__(self, x):
        centres = self.param("centres", nn.initializers.normal(), (2, 3))
        return OwnInner(name="inner")(x) + centres[0]


class OwnInner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("centres", nn.initializers.normal(), (3,))


def test_a_predictor_of_a_users_own_comes_back_as_it_was():
    variables = OwnPredictor().init(jax.random.key(0), jnp.ones((2, 5)))
    state = predictor_to_pytorch(variables)
    assert {name: array.shape for name, array in state.items()} == {
        "temperature": (),
        "prototypes": (4, 3),  # SwAV's: only kernels are laid out differently in PyTorch
        "mixture": (1, 2, 3, 4, 5),
        "projector.weight": (3, 5),
        "projector.bias": (3,),
        "bn_of_centres.centres": (2, 3),
        "bn_of_centres.inner.centres": (3,),
    }
    np.testing.assert_array_equal(state["prototypes"], variables["params"]["prototypes"])
    back = predictor_from_pytorch(state, variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_a_predictors_own_part_beside_its_layers_keeps_its_name():
    ones = partial(np.ones, dtype=np.float32)
    dense = {"kernel": ones((5, 3)), "bias": ones(3)}
    head = {"linear_0": dense, "prototypes": {"centres": ones(3)}}
    variables = {"params": {"projector": head}}
    state = predictor_to_pytorch(variables)
    assert state.keys() == {"0.weight", "0.bias", "prototypes.centres"}
    back = predictor_from_pytorch(state, variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_two_arrays_cannot_take_one_name():
    variables = {"params": {"norm": {"kernel": np.ones((2, 2)), "scale": np.ones(2)}}}
    with pytest.raises(WeightsError, match=r"two arrays would be called norm\.weight"):
        predictor_to_pytorch(variables)
