"""Barlow Twins: each unit correlates across the two views, and with no other unit."""

import dataclasses
from typing import ClassVar

from typing_extensions import override

from cassle_jax.checks import check_positive
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method


@dataclasses.dataclass(frozen=True)
class BarlowTwins(Method):
    """Barlow Twins (Zbontar et al., 2021).

    Attributes:
      redundancy_weight: λ, the weight of the correlations between different units.
      vector_rate: learning rate of biases and BatchNorm's parameters, relative to that of weights.
      projector_hidden: width of the projector's hidden layers; 0 for the features' width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers.
    """

    recipe: ClassVar = {"optimizer.warmup_epochs": 10.0}

    redundancy_weight: float = 0.0051
    vector_rate: float = 0.024
    projector_hidden: int = 8192
    projector_out: int = 8192
    projector_depth: int = 3

    def __post_init__(self):
        check_positive("method.redundancy_weight", self.redundancy_weight)
        check_positive("method.vector_rate", self.vector_rate)
        self.check_projector(self.projector_hidden, self.projector_out, self.projector_depth)

    @override
    def projector(self, feature_width):
        return HeadShape(
            self.projector_hidden or feature_width,
            self.projector_out,
            self.projector_depth,
            last_bn=True,
            last_bn_affine=False,
        )

    @override
    def loss(self, step, networks):
        first, second = step.pair
        invariance, redundancy = losses.cross_correlation(
            first.projection, second.projection, step.axis_name
        )
        return {"invariance": invariance, "redundancy": self.redundancy_weight * redundancy}

    @override
    def parameter_group(self, path, array):
        return "vectors" if array.ndim == 1 else "default"

    @override
    def group_schedules(self, schedule, peak):
        return {"default": schedule, "vectors": lambda step: self.vector_rate * schedule(step)}
