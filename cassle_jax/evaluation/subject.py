"""The subject of an evaluation: networks with their weights, and what they were trained on."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import ConfigError
from cassle_jax.methods import Networks
from cassle_jax.methods.base import PyTree
from cassle_jax.methods.build import Conditioning
from cassle_jax.models import check_image_size


@dataclasses.dataclass(frozen=True)
class Subject:
    """Frozen networks, of this project or of another.

    Attributes:
      name: name in the report.
      networks: encoder and, for this project's own runs, heads; float32. Protocols that train the
        encoder need its BatchNorm synchronised over `parallel.AXIS`.
      variables: `params` and `batch_stats`, each by network, on the host.
      spec: size and normalisation of images, and the augmentation of training.
      views: augmentation of training's first two views, where they differ.
      conditioning: the heads' conditioning; without descriptors where it is unknown.
      facts: origin of the networks, as a model card has it.
    """

    name: str
    networks: Networks
    variables: Mapping[str, PyTree]
    spec: AugmentSpec
    conditioning: Conditioning
    views: tuple[AugmentSpec, AugmentSpec]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def feature_width(self) -> int:
        """Number of features of an image."""
        return self.networks.factories["encoder"]().feature_width

    def with_images(self, **prepared: Any) -> "Subject":
        """The subject for images of another `size`, `mean` or `std` than in training.

        Raises:
          ValueError: an impossible value, or a size that the encoder does not take.
        """
        if "size" in prepared:
            check_image_size(self.networks.factories["encoder"](), prepared["size"], "size")
            self._check_blur(prepared["size"])
        spec, *views = (dataclasses.replace(e, **prepared) for e in (self.spec, *self.views))
        return dataclasses.replace(self, spec=spec, views=tuple(views))

    def _check_blur(self, size: int) -> None:
        """Raises ConfigError where training's blur does not fit into images of a size."""
        least = max(each.least_size for each in (self.spec, *self.views))
        if size < least:
            raise ConfigError(
                f"size={size} is too small for the blur of training; use {least} or more"
            )

    def fingerprint(self) -> str:
        """Identifies the features: equal for equal weights; 16 hexadecimal digits."""
        return self._digest(lambda network: network in ("encoder", "image_conditioner"))

    def whole_fingerprint(self) -> str:
        """Identifies the inputs of analyses: all networks, and training's augmentation of views."""
        described = repr((self.spec, self.views, self.conditioning))
        return self._digest(lambda _: True, described)

    def _digest(self, counts: Callable[[str], bool], described: str = "") -> str:
        digest = hashlib.blake2b(described.encode(), digest_size=8)
        encoder = self.networks.factories["encoder"]()
        for setting in ("heads", "position_offset"):  # its arrays do not depend on a ViT's
            if (value := getattr(encoder, setting, None)) is not None:
                digest.update(f"{setting}={value}".encode())
        for collection in ("params", "batch_stats"):
            networks = self.variables.get(collection, {})
            counted = {name: tree for name, tree in networks.items() if counts(name)}
            for path, array in jax.tree_util.tree_leaves_with_path(counted):
                digest.update(f"{collection}{jax.tree_util.keystr(path)}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
