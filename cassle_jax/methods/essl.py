"""E-SSL: a head predicts by how many quarter turns a small view of an image was rotated."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
import optax
from typing_extensions import override

from cassle_jax.checks import LARGEST_SIDE, WIDEST, ConfigError, check_area, check_at_least
from cassle_jax.methods.auxiliary import Auxiliary, Head
from cassle_jax.methods.base import small_size
from cassle_jax.methods.views import augmented_views
from cassle_jax.models import MLP

TURNS = 4


@dataclasses.dataclass(frozen=True)
class ESSL(Auxiliary):
    """E-SSL (Dangovski et al., 2022, section 3): loss = base + weight · cross-entropy.

    A further view of every image, small and drawn as the others are, passes the encoder in all
    four rotations, as one batch; a head classifies the rotation.

    Attributes:
      weight: weight λ of the loss, 0.4 in the paper; 0 for no E-SSL.
      size: side of the small view, pixels; 0 for the multiple of 8 nearest to 3/7 of a view's,
        which is the paper's 96 at 224 and 16 at 32.
      crop_area: range of the small view's area, as a fraction of the image's: the paper's for
        ImageNet; the paper's for CIFAR-10 is 0.2 to 1.
      hidden: width of the head's hidden layers.
    """

    name: ClassVar = "essl"
    title: ClassVar = "E-SSL"
    named: ClassVar = {
        "none": {},
        "main": {"weight": 0.4},
        "cifar10": {"weight": 0.4, "crop_area": (0.2, 1.0)},
    }
    further: ClassVar = TURNS

    weight: float = 0.0
    size: int = 0
    crop_area: Sequence[float] = (0.05, 0.14)
    hidden: int = 2048

    def __post_init__(self):
        check_at_least("essl.weight", self.weight, 0)
        check_at_least("essl.size", self.size, 0, LARGEST_SIDE)
        check_at_least("essl.hidden", self.hidden, 1, WIDEST)
        object.__setattr__(self, "crop_area", check_area("essl.crop_area", self.crop_area))

    @property
    @override
    def weights(self):
        return {"rotation": self.weight} if self.weight else {}

    @override
    def sizes(self, spec):
        return (self._small(spec).size,) * TURNS

    def _small(self, spec):
        size = small_size("essl.size", self.size, spec)
        try:
            return dataclasses.replace(spec, size=size, crop_area=self.crop_area, rotation=0.0)
        except ConfigError as error:
            raise ConfigError(f"the small views of E-SSL, essl.size={size}: {error}") from error

    @override
    def images(self, key, canvases, spec):
        images, sizes, positions = canvases
        small = (self._small(spec),)
        (view,) = augmented_views(key, images, sizes, small, positions=positions)
        return tuple(jnp.rot90(view.image, turns, axes=(1, 2)) for turns in range(TURNS))

    @override
    def heads(self, feature_width, **settings):
        head = partial(MLP, self.hidden, TURNS, depth=3, layer_norm=True, **settings)
        return {"essl_head": Head(head, (feature_width,))}

    @override
    def losses(self, networks, features, own, axis_name):
        logits = networks.essl_head(jnp.concatenate([features.online[i] for i in own]), True)
        turns = jnp.repeat(jnp.arange(TURNS), len(logits) // TURNS)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, turns).mean()
        return {"rotation": loss}, {"accuracy": (logits.argmax(-1) == turns).mean()}
