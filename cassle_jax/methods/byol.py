"""BYOL: the online network predicts the projection of a slowly following network."""

import dataclasses
from typing import ClassVar

from typing_extensions import override

from cassle_jax.checks import WIDEST, check_at_least, check_fraction, check_one_of
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method, Passes, rising_momentum


@dataclasses.dataclass(frozen=True)
class BYOL(Method):
    """BYOL (Grill et al., 2020).

    The loss is the sum of eq. 2 over both orders of the views, without the constant 4.

    Attributes:
      momentum: initial share of the momentum networks that a step keeps; it rises to 1 along a
        cosine.
      momentum_by: `step` raises it every step, as the paper does; `epoch` once an epoch, as the
        published CASSLE code does.
      projector_hidden: width of the projector's hidden layers; 0 for the features' width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers.
      predictor_hidden: width of the predictor's hidden layer.
    """

    published: ClassVar = {"method.momentum_by": "epoch"}
    target_passes: ClassVar[Passes] = ((0,), (1,))

    momentum: float = 0.996
    momentum_by: str = "step"
    projector_hidden: int = 0
    projector_out: int = 256
    projector_depth: int = 2
    predictor_hidden: int = 4096

    def __post_init__(self):
        self.check_projector(self.projector_hidden, self.projector_out, self.projector_depth)
        check_at_least("method.predictor_hidden", self.predictor_hidden, 1, WIDEST)
        check_fraction("method.momentum", self.momentum, 0.996)
        check_one_of("method.momentum_by", self.momentum_by, ("step", "epoch"))

    @override
    def projector(self, feature_width):
        hidden = self.projector_hidden or feature_width
        return HeadShape(hidden, self.projector_out, self.projector_depth)

    @override
    def predictor(self, feature_width):
        return HeadShape(self.predictor_hidden, self.projector_out, depth=2)

    @override
    def loss(self, step, networks):
        return -2 * (
            losses.cosine(step.online[0].prediction, step.target[1].projection)
            + losses.cosine(step.online[1].prediction, step.target[0].projection)
        )

    @override
    def target_momentum(self, progress):
        return rising_momentum(self.momentum, progress, per_step=self.momentum_by == "step")
