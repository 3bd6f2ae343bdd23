"""The initial values of every convolution and linear layer."""

from flax import linen as nn
from jax.nn.initializers import Initializer

# Uniform in ±1/√fan_in has a variance of 1/(3·fan_in).
fan_in_uniform: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_uniform(fan_in: int) -> Initializer:
    """Uniform in ±1/√fan_in, for the bias of a linear layer with `fan_in` inputs."""
    bound = fan_in**-0.5

    def initialize(key, shape, dtype=float):
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return initialize
