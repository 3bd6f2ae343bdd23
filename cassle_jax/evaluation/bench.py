"""A bench: one subject on one dataset, with the features that the protocols share."""

import dataclasses
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from cassle_jax.data import Source
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.data.splits import Joined, Part, TenCrops
from cassle_jax.evaluation.features import repeated_rows
from cassle_jax.evaluation.store import (
    Features,
    FeatureStore,
    computed_on,
    described,
    uncropped_side,
)
from cassle_jax.evaluation.subject import Subject
from cassle_jax.versions import code_fingerprint

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Bench:
    """One subject on one dataset, with what the protocols share.

    Attributes:
      subject: the evaluated networks.
      data: the dataset.
      store: the subject's features.
    """

    subject: Subject
    data: EvaluationData
    store: FeatureStore

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.store.mesh

    def identity(self) -> str:
        """Identifies the weights, images, devices and code that results depend on."""
        parts = (self.data.train, self.data.val, self.data.test)
        images = [None if part is None else described(part) for part in parts]
        data = self.data.name, self.data.task, self.data.metric, self.data.ten_crops
        # Images of more pixels are left out.
        reading = self.store.batch, self.store.limit, Image.MAX_IMAGE_PIXELS
        devices = self.mesh.size, computed_on(self.mesh)
        weights = self.subject.whole_fingerprint()
        return repr((weights, data, images, reading, devices, code_fingerprint()))

    @cached_property
    def train(self) -> Features:
        """Features of the training part."""
        return self.store(self.data.train)

    @cached_property
    def val(self) -> Features:
        """Features of the validation part."""
        return self.store(self.data.val)

    @cached_property
    def test(self) -> Features:
        """Features of the test part."""
        return self.store(self.data.test)

    def cropped(self) -> list[Features]:
        """Features of the three parts for linear evaluation.

        Where the dataset calls for ten crops, every crop of a training or validation image is a
        row. A test image is resized to the same size, and its centre is cropped.
        """
        data, size = self.data, self.subject.spec.size
        if not data.ten_crops:
            return [*self.fitted, self.test]
        side = uncropped_side(size)
        images = map(self.store.limited, (data.train, data.val))
        ten = (TenCrops(each, size, side) for each in images)
        return [*map(self.store, ten), self.store(data.test, side)]

    def once(self, make: Callable, *arguments: Any) -> Any:
        """`make(*arguments, mesh)`, such as a compiled function; made once for all datasets.

        Args:
          make: a function or class.
          *arguments: its arguments before the mesh. A later call with equal ones (arrays, tuples of
            them, and what `==` compares) returns the same object.
        """
        for known, given, made in self.store.made:
            if known == make and _equal(given, arguments):
                return made
        made = make(*arguments, self.mesh)
        self.store.made.append((make, arguments, made))
        return made

    def learnt_from(self) -> Source:
        """The images of `fitted`, for protocols that train on images without choosing a setting."""
        parts = (self.store.limited(part) for part in (self.data.train, self.data.val))
        return Joined(*parts)

    @cached_property
    def fitted(self) -> list[Features]:
        """Features of the parts that a classifier may learn from; warns of test images there."""
        parts = [self.train, self.val]
        if repeated := repeated_rows([part.features for part in parts], self.test.features):
            LOG.warning(
                "%s on %s: %d of %d test images have exactly the features of an image to learn "
                "from; if these are the same images, scores are too high",
                self.subject.name,
                self.data.name,
                repeated,
                len(self.test.features),
            )
        return parts

    def analysed(self, images: int):
        """Batches of test images in a random order, the same one for all analyses.

        A batch holds images of all classes even where the dataset is sorted by class.

        Args:
          images: number of images; 0 for all.
        """
        order = np.random.default_rng(0).permutation(len(self.data.test))
        return self.store.batches(Part(self.data.test, order, "shuffled"), images)


def _equal(first: Any, second: Any) -> bool:
    """Whether values are the same object, or equal and of the same type, arrays in tuples too."""
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, (jax.Array, np.ndarray)):
        return first.dtype == second.dtype and np.array_equal(first, second)
    return bool(first == second)
