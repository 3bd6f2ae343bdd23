"""Describes how views were augmented: the vectors omega that a projector is conditioned on."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from cassle_jax.augment import operations
from cassle_jax.augment.apply import View
from cassle_jax.augment.draw import ViewParams
from cassle_jax.augment.spec import AugmentSpec

__all__ = [
    "CASSLE_DESCRIPTORS",
    "COMPONENTS",
    "DESCRIPTOR_SIZES",
    "FROM_IMAGE",
    "LEAK_FREE_DESCRIPTORS",
    "PALETTE",
    "check_descriptors",
    "concatenate",
    "describe",
    "descriptor_width",
    "difference",
    "identity_descriptor",
    "identity_difference",
]

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

COMPONENTS = {
    "blur": ("sigma",),
    "color": ("brightness", "contrast", "saturation", "hue"),
    "color_diff": ("red", "green", "blue"),
    "crop": ("row", "column", "height", "width"),
    "flip": ("flipped",),
    "grayscale": ("grey",),
    "palette": tuple(f"{name}_{channel}" for name in _PALETTE_NAMES for channel in "rgb"),
    "rotation": ("0", "90", "180", "270"),
    "solarize": ("threshold",),
}
"""The numbers of every descriptor; ``color.hue`` names one of them."""

DESCRIPTOR_SIZES = {name: len(components) for name, components in COMPONENTS.items()}
"""Every descriptor and how many numbers it has."""

FROM_IMAGE = frozenset({"color_diff"})
"""The descriptors that are computed from the image; all others from what was drawn for it."""

CASSLE_DESCRIPTORS = ("blur", "color", "color_diff", "crop", "grayscale")
"""What the published pretraining conditions on: 13 numbers."""

LEAK_FREE_DESCRIPTORS = ("blur", "color", "crop", "grayscale", "palette")
"""``palette`` in the place of ``color_diff``: 28 numbers, none computed from the image."""

# What an image that was not augmented has where that is not 0.
_NOT_APPLIED = {
    "crop": (0.5, 0.5, 1.0, 1.0),
    "rotation": (1.0, 0.0, 0.0, 0.0),
    "solarize": (1.0,),
}

# What two views augmented alike have where that is not 0.
_ALIKE = {
    "flip": (1.0,),
    "rotation": (1.0, 0.0, 0.0, 0.0),
}


def describe(view: View, spec: AugmentSpec) -> dict[str, Float32[Array, "_"]]:
    """The augmentation information omega of one view (CASSLE, arXiv 2306.06082).

    Args:
      view: one view; only ``params`` and ``color_diff`` are read.
      spec: gives the jitter ranges that ``color`` is relative to.

    Returns:
      All descriptors by name, float32 vectors of ``DESCRIPTOR_SIZES`` numbers:
        blur: sigma in pixels; 0 if not applied.
        color: (factor - 1) / width of its range for brightness, contrast, saturation, and hue /
          width of its range, within [-0.5, 0.5] for ranges around the neutral value; 0 if not
          applied or if the range has no width.
        color_diff: per channel, mean before the colour jitter minus mean after it; 0 if not
          applied.
        crop: centre row, centre column, height, width as fractions of the image; the column is
          1 - column where the view is flipped.
        flip: 1 or 0.
        grayscale: 1 or 0.
        palette: the colours of ``PALETTE`` after the very jitter of the view, order of operations
          included, minus the colours themselves; 0 if not applied. Unlike color_diff it says
          nothing about the image.
        rotation: quarter turns, one-hot.
        solarize: threshold; 1 if not applied.
    """
    params = view.params
    row, column, height, width = _box(params)
    column = jnp.where(params.flip, 1 - column, column)
    return {
        "blur": jnp.where(params.blur, params.sigma, 0)[None],
        "color": _color(params, spec),
        "color_diff": view.color_diff,
        "crop": jnp.stack([row, column, height, width]),
        "flip": params.flip.astype(jnp.float32)[None],
        "grayscale": params.grayscale.astype(jnp.float32)[None],
        "palette": _palette_change(params),
        "rotation": jax.nn.one_hot(params.turns, 4, dtype=jnp.float32),
        "solarize": jnp.where(params.solarize, params.solarize_threshold, 1)[None],
    }


def difference(view_1: View, view_2: View, spec: AugmentSpec) -> dict[str, Float32[Array, "_"]]:
    """How view 1 was augmented relative to view 2 (AugSelf, arXiv 2111.09613, section 3).

    Args:
      view_1: one view; only ``params`` and ``color_diff`` are read.
      view_2: another view of the same image.
      spec: gives the jitter ranges that ``color`` is relative to.

    Returns:
      Differences by name, float32 vectors of ``DESCRIPTOR_SIZES`` numbers:
        blur, color, color_diff, grayscale, palette, solarize: the descriptor of view 1 minus that
          of view 2.
        crop: the boxes' centres and sizes, view 1 minus view 2, in view 1's frame: both columns are
          mirrored where view 1 is flipped, whether view 2 is or not.
        flip: 1 where both views are flipped or neither is, else 0.
        rotation: (turns 1 - turns 2) mod 4, one-hot: a class for cross-entropy.
    """
    params_1, params_2 = view_1.params, view_2.params
    omega_1, omega_2 = describe(view_1, spec), describe(view_2, spec)
    values = {
        name: omega_1[name] - omega_2[name]
        for name in ("blur", "color", "color_diff", "grayscale", "palette", "solarize")
    }
    direction = jnp.where(params_1.flip, jnp.array([1.0, -1.0, 1.0, 1.0]), jnp.ones(4))
    turns = (params_1.turns - params_2.turns) % 4
    return values | {
        "crop": direction * (_box(params_1) - _box(params_2)),
        "flip": (params_1.flip == params_2.flip).astype(jnp.float32)[None],
        "rotation": jax.nn.one_hot(turns, 4, dtype=jnp.float32),
    }


def concatenate(
    descriptors: Mapping[str, Float32[Array, "*batch _"]], names: Iterable[str]
) -> Float32[Array, "*batch width"]:
    """The conditioning vector: the named descriptors side by side, in alphabetical order.

    Args:
      descriptors: from ``describe`` or ``difference``, with any leading axes.
      names: descriptors, or components of them such as ``color.hue``, in any order.

    Returns:
      [..., descriptor_width(names)].

    Raises:
      ValueError: what ``check_descriptors`` raises, or if there is no name.
    """
    names = check_descriptors(names)
    if not names:
        raise ValueError("descriptors=() leaves nothing to concatenate; name at least one")
    return jnp.concatenate([_select(descriptors, name) for name in names], axis=-1)


def _select(
    descriptors: Mapping[str, Float32[Array, "*batch _"]], name: str
) -> Float32[Array, "*batch _"]:
    descriptor, _, component = name.partition(".")
    values = descriptors[descriptor]
    if not component:
        return values
    place = COMPONENTS[descriptor].index(component)
    return values[..., place : place + 1]


def descriptor_width(names: Iterable[str]) -> int:
    """How many numbers the conditioning vector of these descriptors has.

    Args:
      names: descriptors, or components of them.

    Returns:
      The sum of their sizes: 13 for ``CASSLE_DESCRIPTORS``.

    Raises:
      ValueError: what ``check_descriptors`` raises.
    """
    return sum(1 if "." in name else DESCRIPTOR_SIZES[name] for name in check_descriptors(names))


def identity_descriptor(names: Iterable[str]) -> Float32[Array, " width"]:
    """The conditioning vector of an image that was not augmented.

    Args:
      names: descriptors, or components of them.

    Returns:
      [descriptor_width(names)]: crop (0.5, 0.5, 1, 1), solarize 1, rotation in its first class,
      everything else 0.

    Raises:
      ValueError: what ``check_descriptors`` raises, or if there is no name.
    """
    return _constant(_NOT_APPLIED, names)


def identity_difference(names: Iterable[str]) -> Float32[Array, " width"]:
    """The concatenated differences of two views that were augmented alike.

    Args:
      names: descriptors, or components of them.

    Returns:
      [descriptor_width(names)]: flip 1, rotation in its first class, everything else 0.

    Raises:
      ValueError: what ``check_descriptors`` raises, or if there is no name.
    """
    return _constant(_ALIKE, names)


def _constant(
    values: Mapping[str, tuple[float, ...]], names: Iterable[str]
) -> Float32[Array, " width"]:
    sizes = DESCRIPTOR_SIZES.items()
    return concatenate({n: jnp.array(values.get(n, (0.0,) * size)) for n, size in sizes}, names)


def check_descriptors(names: Iterable[str]) -> list[str]:
    """The names in alphabetical order, the order of their numbers in the conditioning vector.

    Args:
      names: descriptors, or components of them such as ``color.hue``.

    Raises:
      ValueError: if a name is unknown, or what it names is named twice (``color`` and
        ``color.hue``, say).
    """
    names = sorted(names)
    for name in names:
        descriptor, dot, _ = name.partition(".")
        known = list(COMPONENTS)
        if dot and descriptor in COMPONENTS:
            known = [f"{descriptor}.{each}" for each in COMPONENTS[descriptor]]
        if name not in known:
            raise ValueError(
                f"descriptors={names} has the unknown name {name!r}; use any of {', '.join(known)}"
            )
        if names.count(name) > 1 or (dot and descriptor in names):
            raise ValueError(
                f"descriptors={names} names {name!r} twice; name each once, either a descriptor "
                "or its components"
            )
    return names


def _palette_change(params: ViewParams) -> Float32[Array, "18"]:
    """What the jitter does to the reference colours, as one column of pixels."""
    colours = jnp.asarray(PALETTE)
    jittered = operations.color_jitter(colours[:, :, None], params)[:, :, 0]
    return (jittered - colours).reshape(-1)


def _box(params: ViewParams) -> Float32[Array, "4"]:
    """Centre row, centre column, height, width, as fractions of the unflipped image."""
    return jnp.concatenate([params.crop[:2] + params.crop[2:] / 2, params.crop[2:]])


def _color(params: ViewParams, spec: AugmentSpec) -> Float32[Array, "4"]:
    shifts = jnp.stack(
        [params.brightness - 1, params.contrast - 1, params.saturation - 1, params.hue]
    )
    ranges = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    inverse_widths = [1 / (high - low) if high > low else 0.0 for low, high in ranges]
    return jnp.where(params.jitter, shifts * jnp.array(inverse_widths), 0)
