"""VICReg: views agree, every unit keeps its variance, and no two units covary."""

import dataclasses
from typing import ClassVar

from typing_extensions import override

from cassle_jax.checks import check_at_least
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method


@dataclasses.dataclass(frozen=True)
class VICReg(Method):
    """VICReg (Bardes, Ponce and LeCun, 2022); the defaults are the paper's.

    Attributes:
      invariance_weight: λ, weight of the squared difference between the views.
      variance_weight: μ, weight of the shortfall of the standard deviations from 1.
      covariance_weight: ν, weight of the squared covariances between different units.
      projector_hidden: width of the expander's hidden layers; 0 for the features' width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers.
    """

    # At a batch of 2048 for 1000 epochs; the paper's code uses 0.3 for 100 epochs at 512.
    recipe: ClassVar = {
        "optimizer.name": "lars",
        "optimizer.base_learning_rate": 0.2,
        "optimizer.weight_decay": 1e-6,
        "optimizer.warmup_epochs": 10.0,
        "optimizer.final_fraction": 0.001,
    }

    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0
    projector_hidden: int = 8192
    projector_out: int = 8192
    projector_depth: int = 3

    def __post_init__(self):
        check_at_least("method.invariance_weight", self.invariance_weight, 0)
        check_at_least("method.variance_weight", self.variance_weight, 0)
        check_at_least("method.covariance_weight", self.covariance_weight, 0)
        self.check_projector(self.projector_hidden, self.projector_out, self.projector_depth)

    @override
    def projector(self, feature_width):
        hidden = self.projector_hidden or feature_width
        return HeadShape(hidden, self.projector_out, self.projector_depth)

    @override
    def loss(self, step, networks):
        first, second = step.pair
        variance, invariance, covariance = losses.variance_invariance_covariance(
            first.projection, second.projection, step.axis_name
        )
        return {
            "invariance": self.invariance_weight * invariance,
            "variance": self.variance_weight * variance,
            "covariance": self.covariance_weight * covariance,
        }
