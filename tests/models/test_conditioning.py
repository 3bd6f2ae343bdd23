import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.models import (
    Bilinear,
    ConditionedProjector,
    ImageConditioner,
    check_conditioning,
)
from cassle_jax.models.conditioning import TREATMENTS


def projector_for(**fields):
    defaults = {"hidden": 24, "out": 12, "depth": 2, "condition_depth": 3, "condition_width": 16}
    return ConditionedProjector(**defaults | fields)


def variables_of(projector, descriptor_width=13):
    return jax.eval_shape(
        lambda: projector.init(
            jax.random.key(0), jnp.ones((2, 24)), jnp.ones((2, descriptor_width)), False
        )
    )


def test_image_injection_leaves_the_projector_plain():
    projector = projector_for(injection="image")
    assert variables_of(projector) == variables_of(projector_for(injection="none"))


def test_raw_descriptors_as_wide_as_the_features_multiply():
    projector = projector_for(treatment="raw", injection="multiply", depth=1)
    features, descriptor = jax.random.normal(jax.random.key(0), (2, 4, 24))
    output, variables = projector.init_with_output(jax.random.key(1), features, descriptor, False)
    layer = variables["params"]["projector"]["linear_0"]
    np.testing.assert_allclose(
        output, (features * descriptor) @ layer["kernel"] + layer["bias"], rtol=1e-4, atol=1e-5
    )


def test_a_hypernetworks_projector_may_end_in_a_norm():
    projector = projector_for(treatment="hypernetwork", last_bn=True, last_bn_affine=False)
    assert "bn_1" not in variables_of(projector)["params"]
    features, descriptor = jnp.split(jax.random.normal(jax.random.key(0), (8, 37)), [24], axis=1)
    variables = projector.init(jax.random.key(1), features, descriptor, False)
    output, _ = projector.apply(variables, features, descriptor, True, mutable=["batch_stats"])
    np.testing.assert_allclose(np.mean(output, axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(output, axis=0), 1, rtol=1e-2)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_loss_gets_float32_embeddings_of_bfloat16_layers(treatment):
    projector = projector_for(treatment=treatment, dtype=jnp.bfloat16)
    features, descriptor = jnp.split(jax.random.normal(jax.random.key(0), (8, 37)), [24], axis=1)
    # Without biases, which are float32: a product is not hidden behind them.
    variables = jax.tree.map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key == "bias" else leaf,
        projector.init(jax.random.key(1), features, descriptor, True),
    )
    output, _ = projector.apply(variables, features, descriptor, True, mutable=["batch_stats"])
    assert output.dtype == jnp.float32
    assert np.mean(output != output.astype(jnp.bfloat16)) > 0.9


@pytest.mark.parametrize(("treatment", "added"), [("mlp", 16), ("raw", 13)])
def test_the_image_gets_the_descriptor_at_every_pixel(treatment, added):
    conditioner = ImageConditioner(treatment, condition_depth=2, condition_width=16)
    images = jax.random.uniform(jax.random.key(0), (3, 4, 4, 3), jnp.bfloat16)
    descriptor = jax.random.normal(jax.random.key(1), (3, 13))
    conditioned, variables = conditioner.init_with_output(
        jax.random.key(2), images, descriptor, False
    )
    assert conditioned.shape == (3, 4, 4, 3 + added)
    assert conditioned.dtype == images.dtype
    np.testing.assert_array_equal(conditioned[..., :3], images)
    np.testing.assert_array_equal(
        conditioned[:, :1, :1, 3:] + 0 * conditioned[..., 3:], conditioned[..., 3:]
    )
    if treatment == "raw":
        assert not variables
        np.testing.assert_array_equal(conditioned[:, 2, 1, 3:], descriptor.astype(jnp.bfloat16))


def test_image_conditioners_need_a_treatment():
    with pytest.raises(ValueError, match="treatment='none'"):
        ImageConditioner("none").init(
            jax.random.key(0), jnp.ones((1, 2, 2, 3)), jnp.ones((1, 4)), False
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mpl", "concat"), r"treatment='mpl' is unknown; use one of .*mlp"),
        (("mlp", "cat"), r"injection='cat' is unknown; use one of .*'concat'"),
        (("hypernetwork", "add"), "injection='add' does nothing .* use injection='none'"),
        (("hypernetwork", "image"), "injection='image' does nothing"),
    ],
)
def test_impossible_combinations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_conditioning(*arguments)


@pytest.mark.usefixtures("as_a_library")
@pytest.mark.parametrize("shape", [(1, 13), (13,), (3, 13)])
@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (projector_for(), (4, 24)),
        (projector_for(injection="add"), (2, 24)),
        (projector_for(treatment="hypernetwork"), (4, 24)),
        (ImageConditioner(), (4, 8, 8, 3)),
        (Bilinear(3), (4, 24)),
    ],
    ids=["concat", "add", "hypernetwork", "image", "bilinear"],
)
def test_an_omega_that_is_not_one_per_image_is_refused(module, inputs, shape):
    """Some injections gave every image the one ω, others did not."""
    line = rf"^\w+ has shape \({shape[0]},.*\) for {inputs[0]} inputs; use \[{inputs[0]}, width\]"
    with pytest.raises(ValueError, match=line):
        module.init(jax.random.key(0), jnp.ones(inputs), jnp.ones(shape), False)


def test_widths_that_cannot_meet_are_refused():
    check_conditioning("raw", "add")
    check_conditioning("raw", "add", feature_width=13, descriptor_width=13)
    check_conditioning("none", "concat", descriptor_width=0)
    with pytest.raises(ValueError, match=r"as wide as the features \(24\), not 13"):
        variables_of(projector_for(treatment="raw", injection="add"))
    with pytest.raises(ValueError, match="has no entries; condition on at least one"):
        variables_of(projector_for(), descriptor_width=0)
