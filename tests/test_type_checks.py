"""The tests' own check of types and shapes sees what is wrong."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from cassle_jax.checks import check_at_least
from cassle_jax.evaluation.knn import KnnResult
from cassle_jax.methods.losses import nt_xent


def test_arrays_of_different_shapes_are_seen():
    with pytest.raises(TypeCheckError, match="second"):
        nt_xent(jnp.ones((4, 2)), jnp.ones((4, 3)), temperature=0.2, axis_name=None)


def test_a_wrong_type_is_seen_where_nothing_has_a_shape():
    with pytest.raises(TypeCheckError, match="name"):
        check_at_least(3, 2, 1)


def test_a_dataclass_is_seen():
    with pytest.raises(TypeCheckError, match="accuracy"):
        KnnResult(1, "half", 0.5)
