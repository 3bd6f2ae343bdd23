"""AugmentSpec: the distribution of augmentations, their rate and strength; checked when made."""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real

from cassle_jax.checks import LARGEST_SIDE, SMALLEST, ConfigError, check_at_least, check_one_of

__all__ = [
    "CHANCES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "RARE",
    "STL10_MEAN",
    "STL10_STD",
    "AugmentSpec",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STL10_MEAN = (0.43, 0.42, 0.39)
STL10_STD = (0.27, 0.26, 0.27)

Number = float | int

_LARGEST = 1e30  # float32 computes well up to it

_LEAST_TAPS = 3  # for a blur whose number of taps follows from the view's size

LEAST_SIGMA = 1e-6
"""Smallest standard deviation of a blur, pixels; it changes nothing."""

# setting: (smallest low end, largest high end)
_RANGES = {
    "crop_area": (0.0, 1.0),
    "crop_aspect": (0.0, _LARGEST),
    "brightness": (0.0, _LARGEST),
    "contrast": (0.0, _LARGEST),
    "saturation": (0.0, _LARGEST),
    "hue": (-0.5, 0.5),
    "sigma": (LEAST_SIGMA, _LARGEST),
    "solarize_threshold": (0.0, 1.0),
}
_POSITIVE_RANGES = ("crop_area", "crop_aspect")

SWITCHES = {
    "flip": "flip",
    "jitter": "jitter",
    "grayscale": "grayscale",
    "blur": "blur",
    "solarize": "solarize",
    "rotation": "turns",
}
"""Per augmentation, the field of `ViewParams` that is false, or 0, where it is not applied."""

CHANCES = tuple(SWITCHES)
"""The settings that are probabilities of augmentations."""


@dataclasses.dataclass(frozen=True)
class AugmentSpec:
    """The distribution of augmentations; the defaults are CASSLE's for ImageNet.

    Hashable, so that it can be a static argument of a compiled function. Lists, integers and arrays
    become tuples and floats, so that values may come straight from a config file.

    Args:
      size: height and width S of a view, pixels.
      crop: whether to crop at random; otherwise the whole image is resized to S x S.
      crop_area: range of the box's area, as a fraction of the image's.
      crop_aspect: range of the box's width / height, drawn uniformly in its logarithm.
      flip: probability of a horizontal flip.
      jitter: probability of colour jitter.
      brightness: range of the factor on every value.
      contrast: range of the factor on every value's distance to the image's mean grey.
      saturation: range of the factor on HSV saturation.
      hue: range of the shift of HSV hue, in turns.
      jitter_order: 'image' draws the order of the four colour operations for every image (as
        torchvision does), 'batch' once for all images that share an ``order_key`` (as the published
        CASSLE code does).
      grayscale: probability of turning the view grey.
      blur: probability of a Gaussian blur.
      sigma: range of the blur's standard deviation, pixels of the view.
      kernel_size: taps of the blur, odd; 0 derives the odd number near S / 10 (23 at 224 px, 9 at
        96 px, never below 3).
      solarize: probability of inverting all values at or above a threshold.
      solarize_threshold: range of that threshold, in [0, 1].
      solarize_after: 'jitter' solarizes before grayscale and blur, as the published CASSLE code
        does, 'blur' after them, as BYOL, Barlow Twins, VICReg and MoCo-v3 do.
      rotation: probability of a rotation by a number of quarter turns, uniform over 0 to 3.
      mean: mean per channel, subtracted from the view in [0, 1].
      std: standard deviation per channel, which divides the view.

    Raises:
      ConfigError: if a setting is out of its range; the message names the setting and what works.
    """

    size: int
    crop: bool = True
    crop_area: Sequence[Number] = (0.2, 1.0)
    crop_aspect: Sequence[Number] = (3 / 4, 4 / 3)
    flip: Number = 0.5
    jitter: Number = 0.8
    brightness: Sequence[Number] = (0.6, 1.4)
    contrast: Sequence[Number] = (0.6, 1.4)
    saturation: Sequence[Number] = (0.6, 1.4)
    hue: Sequence[Number] = (-0.1, 0.1)
    jitter_order: str = "image"
    grayscale: Number = 0.2
    blur: Number = 0.5
    sigma: Sequence[Number] = (0.1, 2.0)
    kernel_size: int = 0
    solarize: Number = 0.0
    solarize_threshold: Sequence[Number] = (0.0, 1.0)
    solarize_after: str = "jitter"
    rotation: Number = 0.0
    mean: Sequence[Number] = IMAGENET_MEAN
    std: Sequence[Number] = IMAGENET_STD

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(field.name, getattr(self, field.name)))
        self._check_integer("size", 1)
        check_at_least("augment.size", self.size, 1, LARGEST_SIDE)
        self._check_integer("kernel_size", 0)
        for name in _RANGES:
            self._check_range(name)
        for name in CHANCES:
            self._check_probability(name)
        for name in ("mean", "std"):
            values = self._set_floats(name, 3, "use three numbers, one per channel")
            if max(map(abs, values)) > 1:
                raise ConfigError(
                    f"augment.{name}={values} has a value beyond 1, the white of an image; divide "
                    "those of images in [0, 255] by 255"
                )
        if min(self.std) <= 0:
            raise ConfigError(f"augment.std={self.std} has a value that is not positive; use > 0")
        if not isinstance(self.crop, Real) or self.crop not in (True, False):
            raise ConfigError(f"augment.crop={self.crop!r} is not valid; use True or False")
        check_one_of("augment.jitter_order", self.jitter_order, ("image", "batch"))
        check_one_of("augment.solarize_after", self.solarize_after, ("jitter", "blur"))
        self._check_kernel()

    @property
    def blur_kernel_size(self) -> int:
        """Taps of the blur: ``kernel_size``, or the odd number near S / 10 where that is 0."""
        return self.kernel_size or max(_LEAST_TAPS, self.size // 20 * 2 + 1)

    @property
    def least_size(self) -> int:
        """Smallest side of a view whose borders the blur can reflect, pixels."""
        return (self.kernel_size or _LEAST_TAPS) // 2 + 1 if self.blur > 0 else 1

    def asymmetric_pair(self) -> tuple["AugmentSpec", "AugmentSpec"]:
        """The two distributions of BYOL's asymmetric views (arXiv 2006.07733, appendix B).

        Returns:
          This spec with blur in every view and without solarize; and this spec with blur in a tenth
          of the views, and a fifth of all views solarized from 0.5 on.
        """
        return (
            dataclasses.replace(self, blur=1.0, solarize=0.0),
            dataclasses.replace(self, blur=0.1, solarize=0.2, solarize_threshold=(0.5, 0.5)),
        )

    def asymmetric_mean(self) -> "AugmentSpec":
        """One distribution for both views of `asymmetric_pair`.

        Returns:
          This spec with the mean of the two probabilities of blur, and of solarize.
        """
        first, second = self.asymmetric_pair()
        means = {name: (getattr(first, name) + getattr(second, name)) / 2 for name in CHANCES}
        return dataclasses.replace(second, **means)

    def with_color_strength(self, strength: Number) -> "AugmentSpec":
        """This spec with its colour augmentation scaled: 0.5 is weak, 1 unchanged, 2 strong.

        The ends of a jitter range keep their side of the neutral value (1 for factors, 0 for hue),
        at ``strength`` times their distance; factors stay at 0 or above. The probability of
        grayscale is multiplied, too. The defaults become max(0, 1 - 0.4 s) to 1 + 0.4 s, hue
        +-0.1 s and grayscale 0.2 s.

        Args:
          strength: s, at least 0.

        Returns:
          A new spec.

        Raises:
          ConfigError: if strength is negative or no number, or takes hue beyond half a turn or
            grayscale past 1.
        """
        strength = _plain("color_strength", strength)
        if not isinstance(strength, Real):
            raise ConfigError(f"augment.color_strength={strength!r} is not a number; use 1 or 0.5")
        hue = tuple(strength * end for end in self.hue)
        possible = strength >= 0 and max(map(abs, hue)) <= 0.5 and strength * self.grayscale <= 1
        if not (possible and math.isfinite(strength)):
            raise ConfigError(
                f"augment.color_strength={strength} takes hue to {hue} and grayscale to "
                f"{strength * self.grayscale}; use a strength from 0 on that keeps hue within "
                "(-0.5, 0.5) and grayscale within [0, 1]"
            )
        factors = {
            name: tuple(max(0.0, 1 + strength * (end - 1)) for end in getattr(self, name))
            for name in ("brightness", "contrast", "saturation")
        }
        return dataclasses.replace(self, **factors, hue=hue, grayscale=strength * self.grayscale)

    def _check_integer(self, name: str, smallest: int) -> None:
        value = getattr(self, name)
        number = isinstance(value, Real) and math.isfinite(value) and not isinstance(value, bool)
        if not number or int(value) != value or value < smallest:
            raise ConfigError(
                f"augment.{name}={value!r} is not valid; use an integer >= {smallest}"
            )
        object.__setattr__(self, name, int(value))

    def _check_probability(self, name: str) -> None:
        value = getattr(self, name)
        if not (isinstance(value, Real) and 0 <= value <= 1):
            raise ConfigError(
                f"augment.{name}={value!r} is not a probability; use a value in [0, 1]"
            )
        object.__setattr__(self, name, float(value))

    def _check_range(self, name: str) -> None:
        smallest, largest = _RANGES[name]
        bracket = "(" if name in _POSITIVE_RANGES else "["
        advice = f"use (low, high) with low <= high, both in {bracket}{smallest:g}, {largest:g}]"
        low, high = self._set_floats(name, 2, advice)
        if not smallest <= low <= high <= largest or (name in _POSITIVE_RANGES and low <= 0):
            raise ConfigError(f"augment.{name}={(low, high)} is not a valid range; {advice}")

    def _set_floats(self, name: str, length: int, advice: str) -> tuple[float, ...]:
        value = getattr(self, name)
        if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != length:
            raise ConfigError(f"augment.{name}={value!r} does not have {length} values; {advice}")
        if not all(map(_is_number, value)):
            raise ConfigError(
                f"augment.{name}={value} has a value that is too large, too small or no number; "
                f"{advice}"
            )
        floats = tuple(float(entry) for entry in value)
        object.__setattr__(self, name, floats)
        return floats

    def _check_kernel(self) -> None:
        taps = self.blur_kernel_size
        if taps % 2 == 0:
            raise ConfigError(
                f"augment.kernel_size={taps} is even; use an odd number such as {taps + 1}, "
                "or 0 for the one near size / 10"
            )
        if self.size < self.least_size:
            raise ConfigError(
                f"augment.kernel_size={taps} needs {taps // 2} pixels of reflect padding, more "
                f"than a view of augment.size={self.size} has; use a kernel of at most "
                f"{2 * self.size - 1}, or augment.blur=0"
            )


def _plain(name: str, value: object) -> object:
    """Turns arrays into numbers and tuples, also inside a list; returns other values unchanged."""
    if isinstance(value, list | tuple):
        return tuple(_plain(name, each) for each in value)
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except TypeError as error:  # JAX traces it
        raise ConfigError(
            f"augment.{name} is traced, and a spec is static: make it outside the compiled function"
        ) from error


def _is_number(value: object) -> bool:
    """Whether float32 can compute with it."""
    return isinstance(value, Real) and (value == 0 or SMALLEST <= abs(value) <= _LARGEST)


RARE = tuple(
    each.name
    for each in dataclasses.fields(AugmentSpec)
    if each.name in CHANCES and each.default == 0
)
"""The augmentations that are drawn only where a configuration sets their probability."""
