"""Defines factors, and a source that draws images from them on access."""

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from cassle_jax.data.drawing import uniform_draws
from cassle_jax.data.sources import Record, check_index

COLOUR, FORM, CONTENT = "colour", "contrast, place and sharpness", "content"
"""The groups of factors; augmentations change all but the content."""


class Factor(NamedTuple):
    """A property of an image, determined by one number; a rotation by three.

    Attributes:
      kind: kind of the values: class numbers, real numbers, angles in radians of period 2π, or
        rotations as angles about the fixed axes x, y and z in turn, in radians.
      values: names of the classes, or ends of the range of the factor's uniform distribution.
      changed_by: augmentations that give a view another value than its image; empty for content.
      group: `COLOUR`, `FORM` or `CONTENT`.
    """

    kind: Literal["class", "value", "angle", "rotation"]
    values: tuple[str, ...] | tuple[float, float]
    changed_by: str = ""
    group: str = CONTENT

    def of(self, draws: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"] | Int[np.ndarray, " n"]:
        """The values at draws in [0, 1): int64 for classes, else float64; not for a rotation."""
        if self.kind == "class":
            return (draws * len(self.values)).astype(np.int64)
        low, high = self.values
        return low + (high - low) * draws


class Drawn:
    """Images drawn from independent, uniform factors.

    Image i of a split is a function of (seed, split, i): more images only append. A subclass is a
    family of images. It defines its name, its factors, the number of draws per image and the factor
    that is the label. With several views per object, it is an `ObjectSource`.
    """

    FAMILY: ClassVar[str]
    FACTORS: ClassVar[Mapping[str, Factor]]
    DRAWS: ClassVar[int]
    LABEL: ClassVar[str] = "shape"

    def __init__(
        self, count: int, seed: int = 0, size: int = 64, split: str = "train", views: int = 1
    ):
        """Draws the factors of `count` images; draws an image on access.

        Args:
          count: number of images, ≥ 1.
          seed: seed of the family's images, ≥ 0.
          size: side of an image in pixels, ≥ 8.
          split: any word; different splits are disjoint streams.
          views: number of consecutive images that show one object. They share the factors that no
            augmentation changes; each image draws the others.
        """
        self.name = f"{self.FAMILY} {split}" + (f", {views} views of each" if views > 1 else "")
        self.views = views
        self.class_names = self.FACTORS[self.LABEL].values
        self._arguments = (count, seed, size, split, views)
        self._size = size
        self._draws = uniform_draws(seed, split, count, self.DRAWS)
        if views > 1:
            own = [place for place, name in enumerate(self.FACTORS) if name in self.changing]
            first = self._draws[np.arange(count) // views * views]
            first[:, own] = self._draws[:, own]
            self._draws = first

    def __len__(self) -> int:
        return len(self._draws)

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        row = self._draws[index]
        factors = {name: values.item() for name, values in self._factors(row[None]).items()}
        image = self.draw(factors, row[len(factors) :], self._size)
        return Record(image, factors[self.LABEL], f"{self.name} #{index}")

    def __reduce__(self):
        return type(self), self._arguments

    def in_views(self, images: int, views: int) -> "Drawn":
        """The family's images of the same seed, size and split, with `views` per object."""
        _, *same, _ = self._arguments
        return type(self)(images, *same, views)

    @property
    def changing(self) -> dict[str, Factor]:
        """The factors in which views of an object differ: those that augmentations change."""
        return {name: factor for name, factor in self.FACTORS.items() if factor.changed_by}

    def factors_of(self, places: Int[np.ndarray, " images"]) -> dict[str, np.ndarray]:
        """See `ObjectSource`."""
        return {name: self.factors[name][places] for name in self.changing}

    @property
    def content(self) -> tuple[int, int, int, str, int]:
        """See `content_of`."""
        return self._arguments

    @property
    def labels(self) -> Int[np.ndarray, " images"]:
        """The label of every image."""
        return self.factors[self.LABEL].astype(np.int32)

    @property
    def factors(self) -> dict[str, np.ndarray]:
        """Every factor of `FACTORS` for all images: int64 for classes, float64 for the rest."""
        return self._factors(self._draws)

    def _factors(self, rows: Float[np.ndarray, "images draws"]) -> dict[str, np.ndarray]:
        columns = rows.T[: len(self.FACTORS)]
        return {
            name: factor.of(column)
            for (name, factor), column in zip(self.FACTORS.items(), columns, strict=True)
        }

    @staticmethod
    def draw(
        factors: Mapping[str, float], rest: Float[np.ndarray, " n"], size: int
    ) -> UInt8[np.ndarray, "size size 3"]:
        """The image of these factors and of the remaining numbers.

        The factors are Python's numbers: NumPy's would draw in float64, and round some pixels to
        another grey level.
        """
        raise NotImplementedError
