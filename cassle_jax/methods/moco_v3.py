"""MoCo-v3: each view's prediction finds the other's momentum key among those of the batch."""

import dataclasses
from typing import ClassVar

from typing_extensions import override

from cassle_jax.checks import check_fraction, check_one_of, check_positive
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method, Passes, rising_momentum


@dataclasses.dataclass(frozen=True)
class MoCoV3(Method):
    """MoCo-v3 (Chen, Xie and He, 2021), on Vision Transformers and ResNets.

    Attributes:
      temperature: temperature of the softmax over similarities.
      momentum: share of the momentum networks that a step keeps.
      momentum_schedule: `constant`; or `cosine`, which raises it to 1 step by step, as the paper's
        code does.
      projector_hidden: width of the hidden layers of projector and predictor; 0 for the features'
        width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers.
      predictor_last_bn: whether the predictor ends in a BatchNorm; in the paper's code it does on
        Vision Transformers and does not on ResNets.
    """

    recipe: ClassVar = {
        "optimizer.name": "adamw",
        "optimizer.base_learning_rate": 1.5e-4,
        "optimizer.weight_decay": 0.1,
        "optimizer.warmup_epochs": 40.0,
    }
    target_passes: ClassVar[Passes] = ((0,), (1,))
    target_first: ClassVar[bool] = True

    temperature: float = 0.2
    momentum: float = 0.999
    momentum_schedule: str = "constant"
    projector_hidden: int = 4096
    projector_out: int = 256
    projector_depth: int = 3
    predictor_last_bn: bool = True

    def __post_init__(self):
        check_positive("method.temperature", self.temperature)
        check_fraction("method.momentum", self.momentum, 0.999)
        check_one_of("method.momentum_schedule", self.momentum_schedule, ("constant", "cosine"))
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
    def predictor(self, feature_width):
        return HeadShape(
            self.projector_hidden or feature_width,
            self.projector_out,
            depth=2,
            last_bn=self.predictor_last_bn,
            last_bn_affine=False,
        )

    @override
    def loss(self, step, networks):
        def contrast(online, target):
            return losses.batch_info_nce(
                step.online[online].prediction,
                step.target[target].projection,
                temperature=self.temperature,
                axis_name=step.axis_name,
            )

        return 2 * self.temperature * (contrast(0, 1) + contrast(1, 0))

    @override
    def target_momentum(self, progress):
        if self.momentum_schedule == "constant":
            return self.momentum
        return rising_momentum(self.momentum, progress)
