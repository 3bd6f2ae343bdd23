"""Puts encoder, heads, conditioning and AugSelf together into the networks of a run."""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from cassle_jax.augment import CASSLE_DESCRIPTORS, DESCRIPTOR_SIZES, descriptor_width
from cassle_jax.checks import check_at_least
from cassle_jax.methods.augself import AugSelf
from cassle_jax.methods.base import HeadShape, Method, Networks
from cassle_jax.models import MLP, ConditionedProjector, ImageConditioner, check_conditioning


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the projector is told of each view, and how it takes it in (CASSLE, section 3).

    Attributes:
      descriptors: names of the descriptors that make up ω; empty for the plain method.
      treatment: `mlp` (the paper's choice), `raw` or `hypernetwork`.
      injection: `concat` (the paper's choice), `add`, `multiply` or `image`.
      depth: number of layers of the MLP on ω.
      width: of the MLP's hidden layers.
      hypernetwork_bn: whether the generated projector has BatchNorm between its layers.
    """

    descriptors: tuple[str, ...] = CASSLE_DESCRIPTORS
    treatment: str = "mlp"
    injection: str = "concat"
    depth: int = 6
    width: int = 64
    hypernetwork_bn: bool = False

    def __post_init__(self):
        check_at_least(1, conditioning__depth=self.depth, conditioning__width=self.width)
        unknown = [name for name in self.descriptors if name not in DESCRIPTOR_SIZES]
        if unknown:
            raise ValueError(
                f"conditioning.descriptors has {unknown[0]!r}; use any of "
                + ", ".join(sorted(DESCRIPTOR_SIZES))
            )

    @property
    def size(self) -> int:
        """Width of ω; 0 for the plain method."""
        return descriptor_width(self.descriptors)


def build_networks(
    method: Method,
    encoder: Callable[[], nn.Module],
    feature_width: int,
    conditioning: Conditioning,
    augself: AugSelf,
    *,
    dtype: jnp.dtype = jnp.float32,
    axis_name: str | None = None,
) -> Networks:
    """The networks of a run.

    Args:
      method: says which heads there are.
      encoder: builds the encoder.
      feature_width: of the encoder's features.
      conditioning: of the projector.
      augself: the auxiliary heads; empty weights for none.
      dtype: of convolutions and matrix products.
      axis_name: the mapped axis BatchNorm is synchronised over; `None` for one device.

    Raises:
      ValueError: a conditioning that cannot work, naming the setting.
    """
    plain = not conditioning.descriptors
    treatment = "none" if plain else conditioning.treatment
    injection = "none" if plain else conditioning.injection
    check_conditioning(
        treatment, injection, descriptor_width=conditioning.size, feature_width=feature_width
    )

    def head(shape: HeadShape, treatment="none", injection="none"):
        return partial(
            ConditionedProjector,
            **dataclasses.asdict(shape),
            treatment=treatment,
            injection=injection,
            condition_depth=conditioning.depth,
            condition_width=conditioning.width,
            hypernetwork_bn=conditioning.hypernetwork_bn,
            axis_name=axis_name,
            dtype=dtype,
        )

    factories = {
        "encoder": encoder,
        "projector": head(method.projector(feature_width), treatment, injection),
    }
    predictor = method.predictor(feature_width)
    if predictor is not None:
        factories["predictor"] = head(predictor)
    if injection == "image" and treatment != "none":
        factories["image_conditioner"] = partial(
            ImageConditioner,
            treatment=treatment,
            condition_depth=conditioning.depth,
            condition_width=conditioning.width,
            axis_name=axis_name,
            dtype=dtype,
        )
    for name, shape in augself.heads().items():
        factories[name] = partial(
            MLP, **dataclasses.asdict(shape), axis_name=axis_name, dtype=dtype
        )
    return Networks(factories)
