"""The table of descriptors: how to read them off a view, compare two views, and use them."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from cassle_jax.augment import operations
from cassle_jax.augment.apply import View
from cassle_jax.augment.draw import ViewParams
from cassle_jax.augment.spec import CHANCES, AugmentSpec
from cassle_jax.checks import check_one_of

Reader = Callable[[View, AugmentSpec], Float32[Array, "_"]]
Comparison = Callable[[View, View], Float32[Array, "_"]]

# Greys, then muted red, green and blue: far enough from 0 and 1 that the jitter clips few of them.
PALETTE = np.float32(
    [
        (0.25, 0.25, 0.25),
        (0.5, 0.5, 0.5),
        (0.75, 0.75, 0.75),
        (0.75, 0.25, 0.25),
        (0.25, 0.75, 0.25),
        (0.25, 0.25, 0.75),
    ]
)
"""The reference colours of the descriptor ``palette``, RGB in [0, 1]."""

_PALETTE_NAMES = ("dark", "grey", "light", "red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A description of an augmentation by a vector of numbers.

    Attributes:
      components: the names of the numbers.
      read: returns the numbers of a view.
      setting: the field of ``AugmentSpec`` that decides whether the augmentation is ever drawn.
      kind: `value` for real numbers, `binary` for one number that is 0 or 1, `class` for one-hot
        numbers. Decides AugSelf's loss and the probe of an evaluation.
      neutral: the numbers of an unaugmented image; zeros by default. A `class` needs its own.
      compare: returns the augmentation of view 1 relative to view 2; by default the difference of
        their numbers. A head predicts it by the loss of ``kind``, so a predicted `binary` or
        `class` needs one that returns 0 or 1, or one-hot numbers.
      alike: the result of ``compare`` for two views with equal augmentation; zeros by default.
      predicted: whether AugSelf has a head for it.
      from_image: whether the numbers are computed from the image, and so may reveal it.
      restates: another descriptor that has the same information in fewer numbers; probes and
        pictures show that one.

    Raises:
      ValueError: numbers do not fit the components or the kind; the message says what would.
    """

    components: tuple[str, ...]
    read: Reader
    setting: str
    kind: Literal["value", "binary", "class"] = "value"
    neutral: tuple[float, ...] = ()
    compare: Comparison | None = None
    alike: tuple[float, ...] = ()
    predicted: bool = False
    from_image: bool = False
    restates: str = ""

    def __post_init__(self):
        zeros = (0.0,) * len(self.components)
        object.__setattr__(self, "neutral", self.neutral or zeros)
        object.__setattr__(self, "alike", self.alike or zeros)
        check_one_of("setting", self.setting, ("crop", *CHANCES))
        check_one_of("kind", self.kind, ("value", "binary", "class"))
        self._check_lengths()
        self._check_class()

    def _check_lengths(self) -> None:
        if isinstance(self.components, str):
            raise ValueError(
                f"components={self.components!r} is one name; use a tuple, ({self.components!r},)"
            )
        for name in ("neutral", "alike"):
            if len(getattr(self, name)) != self.size:
                raise ValueError(
                    f"{name}={getattr(self, name)} does not have one number for each of the "
                    f"components {self.components}; use {self.size}"
                )
        if self.kind == "binary" and self.size != 1:
            raise ValueError(
                f"kind='binary' is one number, and the components are {self.components}; use one, "
                "or kind='class'"
            )

    def _check_class(self) -> None:
        """Refuses numbers and differences that are not a class and would be wrong targets."""
        if self.predicted and self.kind != "value" and self.compare is None:
            raise ValueError(
                f"a head cannot predict the difference of numbers of kind={self.kind!r} "
                f"{self.components}; set compare to a function of two views whose result is of "
                "this kind, too, and alike to its result for equal views"
            )
        compared = ("alike",) if self.compare else ()
        for name in ("neutral", *compared) if self.kind == "class" else ():
            if sorted(getattr(self, name)) != [0.0] * (self.size - 1) + [1.0]:
                raise ValueError(
                    f"{name}={getattr(self, name)} is none of the classes {self.components}; use 1 "
                    "for one of them, and 0 for the others"
                )

    @property
    def size(self) -> int:
        """The number of components."""
        return len(self.components)


def _flag(name: str) -> Reader:
    """Reads a parameter that is true or false as 1 or 0."""
    return lambda view, _: getattr(view.params, name).astype(jnp.float32)[None]


def _flipped_alike(view_1: View, view_2: View) -> Float32[Array, "1"]:
    return (view_1.params.flip == view_2.params.flip).astype(jnp.float32)[None]


def _crop(view: View, spec: AugmentSpec) -> Float32[Array, "4"]:
    del spec
    row, column, height, width = _box(view.params)
    return jnp.stack([row, jnp.where(view.params.flip, 1 - column, column), height, width])


def _crop_difference(view_1: View, view_2: View) -> Float32[Array, "4"]:
    mirrored = jnp.array([1.0, -1.0, 1.0, 1.0])
    direction = jnp.where(view_1.params.flip, mirrored, jnp.ones(4))
    return direction * (_box(view_1.params) - _box(view_2.params))


def _box(params: ViewParams) -> Float32[Array, "4"]:
    """Centre row, centre column, height, width, as fractions of the unflipped image."""
    return jnp.concatenate([params.crop[:2] + params.crop[2:] / 2, params.crop[2:]])


def _color(view: View, spec: AugmentSpec) -> Float32[Array, "4"]:
    params = view.params
    shifts = jnp.stack(
        [params.brightness - 1, params.contrast - 1, params.saturation - 1, params.hue]
    )
    ranges = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    inverse_widths = [1 / (high - low) if high > low else 0.0 for low, high in ranges]
    return jnp.where(params.jitter, shifts * jnp.array(inverse_widths), 0)


def _palette(view: View, spec: AugmentSpec) -> Float32[Array, "18"]:
    """The reference colours after the jitter minus before it, as one column of pixels."""
    del spec
    colours = jnp.asarray(PALETTE)
    jittered = operations.color_jitter(colours[:, :, None], view.params)[:, :, 0]
    return (jittered - colours).reshape(-1)


def _rotation_difference(view_1: View, view_2: View) -> Float32[Array, "4"]:
    turns = (view_1.params.turns - view_2.params.turns) % 4
    return jax.nn.one_hot(turns, 4, dtype=jnp.float32)


DESCRIPTORS = {
    "blur": Descriptor(
        ("sigma",),
        lambda view, _: jnp.where(view.params.blur, view.params.sigma, 0)[None],
        setting="blur",
        predicted=True,
    ),
    "color": Descriptor(
        ("brightness", "contrast", "saturation", "hue"), _color, setting="jitter", predicted=True
    ),
    "color_diff": Descriptor(
        ("red", "green", "blue"),
        lambda view, _: view.color_diff,
        setting="jitter",
        from_image=True,
    ),
    "crop": Descriptor(
        ("row", "column", "height", "width"),
        _crop,
        setting="crop",
        neutral=(0.5, 0.5, 1.0, 1.0),
        compare=_crop_difference,
        predicted=True,
    ),
    "flip": Descriptor(
        ("flipped",),
        _flag("flip"),
        setting="flip",
        kind="binary",
        compare=_flipped_alike,
        alike=(1.0,),
        predicted=True,
    ),
    "grayscale": Descriptor(
        ("grey",),
        _flag("grayscale"),
        setting="grayscale",
        kind="binary",
    ),
    "palette": Descriptor(
        tuple(f"{name}_{channel}" for name in _PALETTE_NAMES for channel in "rgb"),
        _palette,
        setting="jitter",
        restates="color",
    ),
    "rotation": Descriptor(
        ("0", "90", "180", "270"),
        lambda view, _: jax.nn.one_hot(view.params.turns, 4, dtype=jnp.float32),
        setting="rotation",
        kind="class",
        neutral=(1.0, 0.0, 0.0, 0.0),
        compare=_rotation_difference,
        alike=(1.0, 0.0, 0.0, 0.0),
        predicted=True,
    ),
    "solarize": Descriptor(
        ("threshold",),
        lambda view, _: jnp.where(view.params.solarize, view.params.solarize_threshold, 1)[None],
        setting="solarize",
        neutral=(1.0,),
        predicted=True,
    ),
}
"""Every descriptor by name; ``color.hue`` names a component of one."""
