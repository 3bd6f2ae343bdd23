"""MoCo-v2: queries of the online network against keys of a momentum network and a queue."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from cassle_jax.checks import (
    WIDEST,
    check_at_least,
    check_fraction,
    check_one_of,
    check_positive,
)
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method, Passes, check_queue


@dataclasses.dataclass(frozen=True)
class MoCoV2(Method):
    """MoCo-v2 (He et al., 2020; Chen et al., 2020).

    Attributes:
      temperature: temperature of the softmax over similarities.
      momentum: share of the momentum networks that a step keeps.
      queue_size: number of embeddings kept as negatives; a multiple of the global batch.
      enqueue: `keys` fills the queue with momentum embeddings of the second view, as the paper
        does; `queries` with online embeddings of the first, as the published CASSLE code does.
      projector_hidden: width of the projector's hidden layers; 0 for the features' width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers.
    """

    published: ClassVar = {"method.enqueue": "queries"}
    online_passes: ClassVar[Passes] = ((0,),)
    target_passes: ClassVar[Passes] = ((1,),)

    temperature: float = 0.2
    momentum: float = 0.999
    queue_size: int = 65_536
    enqueue: str = "keys"
    projector_hidden: int = 0
    projector_out: int = 128
    projector_depth: int = 2

    def __post_init__(self):
        check_positive("method.temperature", self.temperature)
        check_at_least("method.queue_size", self.queue_size, 1, WIDEST)
        self.check_projector(self.projector_hidden, self.projector_out, self.projector_depth)
        check_fraction("method.momentum", self.momentum, 0.999)
        check_one_of("method.enqueue", self.enqueue, ("keys", "queries"))

    @override
    def projector(self, feature_width):
        hidden = self.projector_hidden or feature_width
        return HeadShape(hidden, self.projector_out, self.projector_depth)

    @override
    def initial_memory(self, key):
        queue = jax.random.normal(key, (self.queue_size, self.projector_out), jnp.float32)
        return {"queue": losses.normalize(queue), "next": jnp.zeros((), jnp.int32)}

    @override
    def loss(self, step, networks):
        return losses.queue_info_nce(
            step.online[0].projection,
            step.target[1].projection,
            step.memory["queue"],
            temperature=self.temperature,
        )

    @override
    def update_memory(self, step):
        newest = step.target[1] if self.enqueue == "keys" else step.online[0]
        rows = losses.gather(losses.normalize(newest.projection), step.axis_name)
        queue, place = step.memory["queue"], step.memory["next"]
        queue = jax.lax.dynamic_update_slice_in_dim(queue, rows, place, axis=0)
        return {"queue": queue, "next": (place + len(rows)) % self.queue_size}

    @override
    def target_momentum(self, progress):
        return self.momentum

    @override
    def check(self, global_batch, local_batch):
        check_queue(self.queue_size, global_batch)
