"""SimCLR: both views through one network, each contrasted against the rest of the batch."""

import dataclasses
from typing import ClassVar

from typing_extensions import override

from cassle_jax.checks import ConfigError, check_one_of, check_positive
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method


@dataclasses.dataclass(frozen=True)
class SimCLR(Method):
    """SimCLR (Chen et al., 2020).

    Attributes:
      temperature: temperature of the softmax over similarities.
      negatives: `global` contrasts against the batch of all devices, as the paper does; `local`
        against this device's samples only, as the published CASSLE code does.
      projector_hidden: width of the projector's hidden layers; 0 for the features' width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers.
    """

    published: ClassVar = {"method.negatives": "local"}

    temperature: float = 0.2
    negatives: str = "global"
    projector_hidden: int = 0
    projector_out: int = 128
    projector_depth: int = 2

    def __post_init__(self):
        check_positive("method.temperature", self.temperature)
        self.check_projector(self.projector_hidden, self.projector_out, self.projector_depth)
        check_one_of("method.negatives", self.negatives, ("global", "local"))

    @override
    def projector(self, feature_width):
        hidden = self.projector_hidden or feature_width
        return HeadShape(hidden, self.projector_out, self.projector_depth)

    @override
    def loss(self, step, networks):
        return losses.nt_xent(
            step.online[0].projection,
            step.online[1].projection,
            temperature=self.temperature,
            axis_name=step.axis_name if self.negatives == "global" else None,
        )

    @override
    def check(self, global_batch, local_batch):
        contrasted = global_batch if self.negatives == "global" else local_batch
        if contrasted < 2:
            raise ConfigError(
                f"batch_size={global_batch} leaves SimCLR with method.negatives={self.negatives!r}"
                " no negative to contrast against; use at least 2 images"
                + ("" if self.negatives == "global" else " a device")
            )
