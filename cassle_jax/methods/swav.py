"""SwAV: from any crop of an image, predict the cluster codes of its two large crops."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from typing_extensions import override

from cassle_jax.checks import (
    LARGEST_SIDE,
    LONGEST,
    WIDEST,
    check_area,
    check_at_least,
    check_positive,
)
from cassle_jax.methods import losses
from cassle_jax.methods.base import HeadShape, Method, Networks, Step, check_queue, small_size

# The views whose codes are computed.
LARGE = (0, 1)


class Prototypes(nn.Module):
    """Similarities of an embedding to cluster centres, which start at unit length.

    Attributes:
      count: number of centres.
    """

    count: int

    @nn.compact
    def __call__(
        self, projection: Float[Array, "B D"], descriptor: Float[Array, "B W"], train: bool
    ) -> Float[Array, "B {self.count}"]:
        """Cosine similarities, while the centres have unit length."""
        del descriptor, train
        shape = (self.count, projection.shape[-1])
        prototypes = self.param("prototypes", _unit_rows, shape, jnp.float32)
        return jnp.matmul(
            losses.normalize(projection), prototypes.T, precision=jax.lax.Precision.HIGHEST
        )


def _unit_rows(key, shape, dtype):
    return losses.normalize(jax.random.uniform(key, shape, dtype, -1))


@dataclasses.dataclass(frozen=True)
class SwAV(Method):
    """SwAV with multi-crop (Caron et al., 2020); its recipe is the paper's for a batch of 256.

    Views 0 and 1 are large, as `augment` makes them (14 % to 100 % of the image, in the recipe).
    The others are small, and otherwise like view 0.

    Attributes:
      temperature: temperature of the softmax that predicts the codes.
      prototypes: number of cluster centres.
      epsilon: softness of the codes.
      sinkhorn_iterations: number of iterations that make the codes use all prototypes equally.
      small_crops: number of small views.
      small_crop_size: side of small views, pixels; 0 for the multiple of 8 nearest to 3/7 of a
        large one's, which is the paper's 96 at 224.
      small_crop_area: range of a small view's area, as a fraction of the image's.
      queue_size: embeddings kept per large crop for the codes, a multiple of the batch; 0 for no
        queue, as in the paper at a batch of 4096.
      queue_start: epochs before the queue is used.
      freeze_prototypes_epochs: epochs before the prototypes move; the paper's code has one, stated
        in steps of ImageNet: 313 at a batch of 4096 and 5005 at 256.
      freeze_prototypes_steps: steps before the prototypes move; above 0 it replaces the epochs.
      projector_hidden: width of the projector's hidden layers; 0 for the features' width.
      projector_out: width of the embedding.
      projector_depth: number of linear layers.
    """

    recipe: ClassVar = {
        "augment.crop_area": (0.14, 1.0),
        "optimizer.name": "lars",
        "optimizer.base_learning_rate": 0.6,
        "optimizer.weight_decay": 1e-6,
        "optimizer.final_fraction": 0.001,
    }

    temperature: float = 0.1
    prototypes: int = 3000
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    small_crops: int = 6
    small_crop_size: int = 0
    small_crop_area: Sequence[float] = (0.05, 0.14)
    queue_size: int = 3840
    queue_start: float = 15.0
    freeze_prototypes_epochs: float = 1.0
    freeze_prototypes_steps: int = 0
    projector_hidden: int = 2048
    projector_out: int = 128
    projector_depth: int = 2

    def __post_init__(self):
        check_positive("method.temperature", self.temperature)
        check_positive("method.epsilon", self.epsilon)
        check_at_least("method.prototypes", self.prototypes, 2, WIDEST)
        check_at_least("method.sinkhorn_iterations", self.sinkhorn_iterations, 1, LONGEST)
        check_at_least("method.small_crops", self.small_crops, 0, LONGEST)
        check_at_least("method.small_crop_size", self.small_crop_size, 0, LARGEST_SIDE)
        check_at_least("method.queue_size", self.queue_size, 0, WIDEST)
        check_at_least("method.queue_start", self.queue_start, 0)
        check_at_least("method.freeze_prototypes_epochs", self.freeze_prototypes_epochs, 0)
        check_at_least("method.freeze_prototypes_steps", self.freeze_prototypes_steps, 0)
        area = check_area("method.small_crop_area", self.small_crop_area)
        object.__setattr__(self, "small_crop_area", area)
        self.check_projector(self.projector_hidden, self.projector_out, self.projector_depth)

    @property
    def _small(self) -> tuple[int, ...]:
        return tuple(range(len(LARGE), len(LARGE) + self.small_crops))

    @property
    @override
    def online_passes(self):
        return (LARGE, self._small) if self.small_crops else (LARGE,)

    @property
    @override
    def head_passes(self):
        return ((*LARGE, *self._small),)

    @override
    def views(self, first, second):
        if not self.small_crops:
            return first, second
        size = small_size("method.small_crop_size", self.small_crop_size, first)
        small = dataclasses.replace(first, size=size, crop_area=self.small_crop_area)
        return first, second, *(small for _ in self._small)

    @override
    def projector(self, feature_width):
        hidden = self.projector_hidden or feature_width
        return HeadShape(hidden, self.projector_out, self.projector_depth)

    @override
    def predictor(self, feature_width):
        return partial(Prototypes, self.prototypes)

    @override
    def initial_memory(self, key):
        if not self.queue_size:
            return {}
        shape = len(LARGE), self.queue_size, self.projector_out
        return {"queue": jnp.zeros(shape, jnp.float32)}

    @override
    def loss(self, step, networks):
        codes = [self._codes(step, networks, crop) for crop in LARGE]
        pairs = len(LARGE) * (len(step.online) - 1)

        def swapped(views: Iterable[int]) -> Float[Array, ""]:
            return sum(
                optax.softmax_cross_entropy(
                    step.online[view].prediction / self.temperature, codes[crop]
                ).mean()
                for crop in LARGE
                for view in views
                if view != crop
            )

        terms = {"large": swapped(LARGE) / pairs}
        return terms | {"small": swapped(self._small) / pairs} if self.small_crops else terms

    def _codes(self, step: Step, networks: Networks, crop: int) -> Float[Array, "B K"]:
        queued, use_queue = None, False
        if self.queue_size:
            queue = step.memory["queue"][crop]
            queued = networks.predictor(queue, jnp.zeros((len(queue), 0)), True)
            # The queue starts at zeros and fills from its first row to its last.
            use_queue = queue[-1].any() & (step.progress.epoch >= self.queue_start)
        return losses.sinkhorn_codes(
            step.online[crop].prediction,
            queued,
            use_queue,
            epsilon=self.epsilon,
            iterations=self.sinkhorn_iterations,
            axis_name=step.axis_name,
        )

    @override
    def update_memory(self, step):
        if not self.queue_size:
            return step.memory
        rows = jnp.stack(
            [
                losses.gather(losses.normalize(step.online[crop].projection), step.axis_name)
                for crop in LARGE
            ]
        )
        batch = rows.shape[1]
        place = step.progress.step % (self.queue_size // batch) * batch
        queue = jax.lax.dynamic_update_slice_in_dim(step.memory["queue"], rows, place, axis=1)
        return {"queue": queue}

    @override
    def after_update(self, params):
        return {**params, "predictor": jax.tree.map(losses.normalize, params["predictor"])}

    @override
    def parameter_group(self, path, array):
        return "prototypes" if path[0] == "predictor" else "default"

    @override
    def in_steps(self, steps_per_epoch):
        if self.freeze_prototypes_steps:
            return self
        steps = math.ceil(self.freeze_prototypes_epochs * steps_per_epoch)
        return dataclasses.replace(self, freeze_prototypes_steps=steps)

    @override
    def late_settings(self, epochs, steps):
        if self.queue_start >= epochs and self.queue_size:
            yield (
                f"method.queue_start={self.queue_start:g} is not within the run's {epochs:g} "
                "epochs, so the queue is never used; use a smaller value, or method.queue_size=0"
            )
        if (frozen := self.freeze_prototypes_steps) >= steps:
            yield (
                f"method.freeze_prototypes_steps={frozen} is not within the run's {steps} steps, "
                "so the prototypes never move; lower it, or method.freeze_prototypes_epochs"
            )

    @override
    def group_schedules(self, schedule, peak):
        def prototypes(step):
            return jnp.where(step < self.freeze_prototypes_steps, 0.0, schedule(step))

        return {"default": schedule, "prototypes": prototypes}

    @override
    def check(self, global_batch, local_batch):
        check_queue(self.queue_size, global_batch, ", or 0 for no queue")
