"""What is evaluated: networks with their weights, and what they were trained on."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cassle_jax.augment import AugmentSpec
from cassle_jax.methods import Networks
from cassle_jax.methods.base import PyTree
from cassle_jax.methods.build import Conditioning
from cassle_jax.models import VisionTransformer
from cassle_jax.models.vit import check_image_size


@dataclasses.dataclass(frozen=True)
class Subject:
    """Frozen networks, whoever trained them.

    Attributes:
      name: what the report calls it.
      networks: encoder and, of this project's own runs, heads; float32, on one device's axis.
      variables: `params` and `batch_stats`, each by network, on the host.
      spec: size and normalisation of images, and the augmentation of training.
      views: how training augmented its first two views, where they differ.
      conditioning: what the heads are told; without descriptors where nothing is known of it.
      facts: what is known of how it came about, as a model card has it.
    """

    name: str
    networks: Networks
    variables: Mapping[str, PyTree]
    spec: AugmentSpec
    conditioning: Conditioning
    views: tuple[AugmentSpec, AugmentSpec]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def has_projector(self) -> bool:
        """Whether there is more than an encoder."""
        return "projector" in self.variables["params"]

    def with_images(self, **prepared: Any) -> "Subject":
        """The subject on images of another `size`, `mean` or `std` than training had.

        Raises:
          ValueError: one that cannot be, or a size that a ViT's patches do not make up.
        """
        encoder = self.networks.factories["encoder"]()
        if "size" in prepared and isinstance(encoder, VisionTransformer):
            check_image_size(prepared["size"], encoder.patch_size)
        spec, *views = (dataclasses.replace(e, **prepared) for e in (self.spec, *self.views))
        return dataclasses.replace(self, spec=spec, views=tuple(views))

    def fingerprint(self) -> str:
        """A name for what makes the features: equal for equal weights, of 16 hexadecimal digits."""
        return self._digest(lambda network: network in ("encoder", "image_conditioner"))

    def whole_fingerprint(self) -> str:
        """Likewise for all that analyses see: every network, and how training augmented views."""
        described = repr((self.spec, self.views, self.conditioning))
        return self._digest(lambda _: True, described)

    def _digest(self, counts: Callable[[str], bool], described: str = "") -> str:
        digest = hashlib.blake2b(described.encode(), digest_size=8)
        # The arrays of a ViT are the same whatever its heads; the features are not.
        heads = getattr(self.networks.factories["encoder"](), "heads", None)
        if heads is not None:
            digest.update(f"heads={heads}".encode())
        for collection in ("params", "batch_stats"):
            networks = self.variables.get(collection, {})
            counted = {name: tree for name, tree in networks.items() if counts(name)}
            for path, array in jax.tree_util.tree_leaves_with_path(counted):
                digest.update(f"{collection}{jax.tree_util.keystr(path)}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
