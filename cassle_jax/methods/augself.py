"""AugSelf, the baseline: auxiliary heads that predict how two views' augmentations differ."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from cassle_jax.augment import DESCRIPTORS
from cassle_jax.checks import ConfigError, check_at_least, check_positive
from cassle_jax.methods.base import HeadShape, Networks


def _regression(outputs, targets):
    return optax.squared_error(jnp.tanh(outputs), targets).mean()


def _binary(outputs, targets):
    return optax.sigmoid_binary_cross_entropy(outputs, targets).mean()


def _classification(outputs, targets):
    return optax.softmax_cross_entropy(outputs, targets).mean()


LOSSES = {"value": _regression, "binary": _binary, "class": _classification}
"""The loss of a head by the kind of the descriptor that it predicts."""

PREDICTED = {name: each for name, each in DESCRIPTORS.items() if each.predicted}
"""The descriptors whose differences a head can predict."""


@dataclasses.dataclass(frozen=True)
class AugSelf:
    """AugSelf (Lee et al., 2021): loss = base + Σ weight · head.

    Attributes:
      weights: weight of each predicted difference, by name; the main setting is
        `{"crop": 0.5, "color": 0.5}`. Empty for no AugSelf.
      hidden: width of each head's hidden layers.
    """

    weights: Mapping[str, float]
    hidden: int = 512

    def __post_init__(self):
        check_at_least("augself.hidden", self.hidden, 1)
        for name, weight in self.weights.items():
            if name not in PREDICTED:
                raise ConfigError(
                    f"augself.{name} cannot be predicted; use any of {', '.join(PREDICTED)}"
                )
            check_positive(f"augself.{name}", weight)

    @property
    def names(self) -> tuple[str, ...]:
        """The predicted differences, in alphabetical order."""
        return tuple(sorted(self.weights))

    def heads(self) -> dict[str, HeadShape]:
        """The heads, by their names among the networks."""
        return {
            f"augself_{name}": HeadShape(self.hidden, PREDICTED[name].size, depth=3)
            for name in self.names
        }

    def losses(
        self,
        networks: Networks,
        first: Float[Array, "B F"],
        second: Float[Array, "B F"],
        differences: tuple[Mapping[str, Float[Array, "B K"]], ...],
    ) -> dict[str, Float[Array, ""]]:
        """The unweighted loss of each head, the mean over the pairs (1, 2) and (2, 1).

        Both orders pass a head as one batch, so they share its BatchNorm statistics.

        Args:
          networks: bound networks that have the heads.
          first: features of the first view.
          second: features of the second view (the momentum encoder's, where the method has one).
          differences: the targets by name, for each of the two orders of the pair.
        """
        pairs = jnp.concatenate(
            [jnp.concatenate([first, second], 1), jnp.concatenate([second, first], 1)]
        )
        result = {}
        for name in self.names:
            head = getattr(networks, f"augself_{name}")
            targets = jnp.concatenate([difference[name] for difference in differences])
            result[name] = LOSSES[PREDICTED[name].kind](head(pairs, True), targets)
        return result

    def total(self, losses: Mapping[str, Float[Array, ""]]) -> Float[Array, ""]:
        """The weighted sum to add to the method's loss."""
        return sum((self.weights[name] * losses[name] for name in losses), jnp.zeros(()))
