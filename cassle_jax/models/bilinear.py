"""The linear hypernetwork: a matrix for each sample, linear in a code."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cassle_jax.models.conditioning import check_row_each
from cassle_jax.models.mlp import MLP


class Bilinear(nn.Module):
    """W(code) · x with W(code) = Σ_k code_k W_k, which a Linear without bias makes of the code.

    Computes it from x ⊗ code, which takes inputs × code numbers per sample; the matrices W would
    take inputs × out.

    Attributes:
        out: width of the result.
        dtype: dtype of the product; parameters are float32.
    """

    out: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch inputs"], code: Float[Array, "batch code"], train: bool
    ) -> Float[Array, "batch {self.out}"]:
        """The product per sample, float32; `train` changes nothing.

        Raises:
            ValueError: there is not one code per sample.
        """
        check_row_each("code", code, x)
        products = jnp.einsum("bi,bk->bik", x, code).reshape(len(x), -1)
        linear = MLP(self.out, self.out, 1, last_bias=False, dtype=self.dtype, name="hypernetwork")
        return linear(products, train)
