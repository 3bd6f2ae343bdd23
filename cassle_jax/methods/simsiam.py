"""SimSiam: each view's prediction matches the other's projection, which gets no gradient."""

import dataclasses
from typing import ClassVar

import jax
from typing_extensions import override

from cassle_jax.checks import WIDEST, check_at_least
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method, constant


@dataclasses.dataclass(frozen=True)
class SimSiam(Method):
    """SimSiam (Chen and He, 2021).

    Attributes:
      projector_hidden: width of the projector's hidden layers; 0 for the features' width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers; 3 on ImageNet, 2 on small datasets.
      projector_last_affine: whether the projector's last BatchNorm has a scale and a shift, as in
        the published CASSLE code; the paper's code has neither.
      predictor_hidden: width of the predictor's hidden layer, its bottleneck.
    """

    recipe: ClassVar = {"optimizer.base_learning_rate": 0.05}
    published: ClassVar = {"method.projector_last_affine": True}

    projector_hidden: int = 2048
    projector_out: int = 2048
    projector_depth: int = 3
    projector_last_affine: bool = False
    predictor_hidden: int = 512

    def __post_init__(self):
        self.check_projector(self.projector_hidden, self.projector_out, self.projector_depth)
        check_at_least("method.predictor_hidden", self.predictor_hidden, 1, WIDEST)

    @override
    def projector(self, feature_width):
        return HeadShape(
            self.projector_hidden or feature_width,
            self.projector_out,
            self.projector_depth,
            last_bn=True,
            last_bn_affine=self.projector_last_affine,
        )

    @override
    def predictor(self, feature_width):
        return HeadShape(self.predictor_hidden, self.projector_out, depth=2)

    @override
    def loss(self, step, networks):
        first, second = step.online[0], step.online[1]
        return -0.5 * (
            losses.cosine(first.prediction, jax.lax.stop_gradient(second.projection))
            + losses.cosine(second.prediction, jax.lax.stop_gradient(first.projection))
        )

    @override
    def parameter_group(self, path, array):
        return "predictor" if path[0] == "predictor" else "default"

    @override
    def group_schedules(self, schedule, peak):
        return {"default": schedule, "predictor": constant(peak)}
