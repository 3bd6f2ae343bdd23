"""AugSelf, the baseline: auxiliary heads that predict how two views' augmentations differ."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from cassle_jax.augment import DESCRIPTORS, difference
from cassle_jax.checks import WIDEST, ConfigError, check_at_least, check_positive
from cassle_jax.methods.auxiliary import Auxiliary, Head, parsed_weights
from cassle_jax.models import MLP

LOSSES = {
    "value": lambda outputs, targets: optax.squared_error(jnp.tanh(outputs), targets),
    "binary": optax.sigmoid_binary_cross_entropy,
    "class": optax.softmax_cross_entropy,
}
"""The loss of a head per sample, by the kind of descriptor that it predicts."""

PREDICTED = {name: each for name, each in DESCRIPTORS.items() if each.predicted}
"""The descriptors whose differences a head can predict."""


@dataclasses.dataclass(frozen=True)
class AugSelf(Auxiliary):
    """AugSelf (Lee et al., 2021): loss = base + Σ weight · head.

    Attributes:
      weights: weight per predicted difference, by name; empty for no AugSelf.
      hidden: width of the heads' hidden layers.
      stage: the stage of the encoder whose features the heads see; 0 for the last one.
    """

    name: ClassVar = "augself"
    title: ClassVar = "AugSelf"
    named: ClassVar = {"none": {}, "main": {"crop": 0.5, "color": 0.5}}

    weights: Mapping[str, float]
    hidden: int = 512
    stage: int = 0

    def __post_init__(self):
        check_at_least("augself.hidden", self.hidden, 1, WIDEST)
        for name, weight in self.weights.items():
            if name not in PREDICTED:
                raise ConfigError(f"augself.{name} cannot be predicted; use {', '.join(PREDICTED)}")
            check_positive(f"augself.{name}", weight)

    @property
    @override
    def descriptors(self):
        return tuple(sorted(self.weights))

    @classmethod
    @override
    def settings(cls, argument="none"):
        none = {"hidden": cls.hidden, "stage": cls.stage, **dict.fromkeys(PREDICTED, 0.0)}
        named = cls.named.get(argument)
        return none | (parsed_weights("augself", argument, PREDICTED) if named is None else named)

    @classmethod
    @override
    def of(cls, settings):
        others = {name: settings[name] for name in ("hidden", "stage") if name in settings}
        weights = {name: w for name, w in settings.items() if name not in others and w != 0}
        return cls(weights, **others)

    @override
    def heads(self, feature_width, *, axis_name, dtype):
        head = partial(MLP, self.hidden, depth=3, axis_name=axis_name, dtype=dtype)
        return {
            f"augself_{name}": Head(partial(head, out=PREDICTED[name].size), (2 * feature_width,))
            for name in self.descriptors
        }

    @override
    def targets(self, views, specs):
        """The differences of the first two views by name, for the pairs (1, 2) and (2, 1)."""
        of_pair = jax.vmap(partial(difference, spec=specs[0]))
        both = of_pair(*views[:2]), of_pair(*views[1::-1])
        return tuple({name: values[name] for name in self.descriptors} for values in both)

    @override
    def losses(self, networks, features, own, axis_name):
        """A head's loss is the mean over the pairs (1, 2) and (2, 1), which form one batch."""
        first, second = features.pair
        pairs = jnp.block([[first, second], [second, first]])
        result = {}
        for name in self.descriptors:
            head = getattr(networks, f"augself_{name}")
            targets = jnp.concatenate([each[name] for each in features.targets[self.name]])
            result[name] = LOSSES[PREDICTED[name].kind](head(pairs, True), targets).mean()
        return result, {}
