"""MoCo-v2: queries of the online network against keys of a momentum network and a queue."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from cassle_jax.checks import check_at_least, check_positive
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method


@dataclasses.dataclass(frozen=True)
class MoCoV2(Method):
    """MoCo-v2 (He et al., 2020; Chen et al., 2020).

    Attributes:
      temperature: of the softmax over similarities.
      momentum: how much of the momentum networks stays at each step.
      queue_size: number of embeddings kept as negatives; a multiple of the global batch.
      enqueue: `keys` fills the queue with momentum embeddings of the second view, as the paper
        does; `queries` with online embeddings of the first, as the published CASSLE code does.
      projector_hidden: width of the projector's hidden layers; 0 for the features' width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers.
    """

    online_views: ClassVar[tuple[int, ...]] = (0,)
    target_views: ClassVar[tuple[int, ...]] = (1,)

    temperature: float = 0.2
    momentum: float = 0.999
    queue_size: int = 65_536
    enqueue: str = "keys"
    projector_hidden: int = 0
    projector_out: int = 128
    projector_depth: int = 2

    def __post_init__(self):
        check_positive(method__temperature=self.temperature)
        check_at_least(1, method__queue_size=self.queue_size)
        self.check_projector(self.projector_hidden, self.projector_out, self.projector_depth)
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"method.momentum={self.momentum} is not in [0, 1]; 0.999 is usual")
        if self.enqueue not in ("keys", "queries"):
            raise ValueError(f"method.enqueue={self.enqueue!r} is unknown; use 'keys' or 'queries'")

    @override
    def projector(self, feature_width):
        hidden = self.projector_hidden or feature_width
        return HeadShape(hidden, self.projector_out, self.projector_depth)

    @override
    def initial_memory(self, key):
        queue = jax.random.normal(key, (self.queue_size, self.projector_out))
        return {"queue": losses.normalize(queue), "next": jnp.zeros((), jnp.int32)}

    @override
    def loss(self, online, target, memory, axis_name):
        return losses.queue_info_nce(
            online[0].projection,
            target[1].projection,
            memory["queue"],
            temperature=self.temperature,
        )

    @override
    def update_memory(self, memory, online, target, axis_name):
        newest = target[1] if self.enqueue == "keys" else online[0]
        rows = losses.gather(losses.normalize(newest.projection), axis_name)
        queue = jax.lax.dynamic_update_slice_in_dim(memory["queue"], rows, memory["next"], axis=0)
        return {"queue": queue, "next": (memory["next"] + len(rows)) % self.queue_size}

    @override
    def target_momentum(self, epoch, epochs):
        return self.momentum

    @override
    def check(self, global_batch, local_batch):
        if self.queue_size % global_batch:
            whole = max(self.queue_size // global_batch, 1)
            raise ValueError(
                f"method.queue_size={self.queue_size} is not a multiple of batch_size="
                f"{global_batch}; {whole * global_batch} would work"
            )
