"""Every place that takes a seed refuses one that a random key would cut to its last 32 bits."""

import jax
import numpy as np
import pytest

from cassle_jax.evaluate import evaluate_command
from cassle_jax.evaluation.views import protocol_key
from cassle_jax.sweep.space import _draws
from cassle_jax.training.state import seed_keys


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
@pytest.mark.parametrize(
    "take",
    [
        seed_keys,
        lambda seed: protocol_key("leak", seed),
        lambda seed: _draws({}, 1, seed),
        lambda seed: evaluate_command(runs=["none"], datasets=["scenes"], to="none", seed=seed),
    ],
)
def test_a_seed_beyond_32_bits_is_refused(take, seed):
    with pytest.raises(ValueError, match=rf"seed={seed} is not a seed; use .* below 2\*\*32"):
        take(seed)


def test_numpys_seeds_are_seeds():
    """As those of `np.arange(3)`, which were taken for keys."""
    for own, expected in zip(seed_keys(np.int64(3)), seed_keys(3), strict=True):
        assert (jax.random.key_data(own) == jax.random.key_data(expected)).all()
