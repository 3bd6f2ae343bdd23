from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from cassle_jax.models import make_encoder
from cassle_jax.models.attention import attend

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("


@pytest.fixture
def ampere(monkeypatch):
    """Programs are lowered as where there is an NVIDIA GPU, which nothing here runs."""
    monkeypatch.setattr("cassle_jax.models.attention.have_flash_attention", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lowered(function, *arguments, platform="cuda"):
    traced_anew = jax.jit(lambda *each: function(*each))
    return traced_anew.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def heads(dtype, channels=32):
    shape = (2, 5, 3, channels)  # an odd number of tokens, as with a class token
    return [jax.random.normal(jax.random.key(k), shape).astype(dtype) for k in range(3)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_every_token_gets_the_weighted_mean_of_the_values(dtype, tolerance):
    query, key, value = heads(dtype)
    attended = attend(query, key, value)
    assert attended.dtype == dtype
    query, key, value = (np.asarray(each, np.float64) for each in (query, key, value))
    weights = np.exp(np.einsum("bqhc,bkhc->bhqk", query, key) / np.sqrt(32))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhc->bqhc", weights, value)
    np.testing.assert_allclose(np.asarray(attended, np.float64), expected, atol=tolerance)


@pytest.mark.exhaustive
def test_a_vit_in_bfloat16_uses_flash_attention_on_gpus_in_both_directions(ampere):
    make = partial(make_encoder, "vit_small", width=96, patch_size=8, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: make().init(jax.random.key(0), x, True), images)

    def gradient(encoder):
        return jax.grad(lambda variables, images: encoder.apply(variables, images, True).sum())

    program = lowered(gradient(make()), variables, images)
    assert program.count(FORWARD) == program.count(BACKWARD) == make().depth
    assert "cudnn" not in lowered(gradient(make(flash_attention=False)), variables, images)


@pytest.mark.parametrize(("dtype", "channels"), [("float32", 32), ("bfloat16", 12)])
def test_what_the_kernel_cannot_compute_is_left_to_xla(ampere, dtype, channels):
    assert FORWARD in lowered(attend, *heads(jnp.bfloat16))
    assert "cudnn" not in lowered(attend, *heads(dtype, channels))


def test_a_machine_without_such_a_gpu_uses_xla():
    assert "cudnn" not in lowered(attend, *heads(jnp.bfloat16), platform="cpu")
