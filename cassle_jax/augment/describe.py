"""Describes how views were augmented: the vectors omega that a projector is conditioned on."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float32

from cassle_jax.augment.apply import View
from cassle_jax.augment.descriptors import DESCRIPTORS
from cassle_jax.augment.inputs import (
    check_one,
    check_params,
    check_spec,
    check_type,
    in_float32,
)
from cassle_jax.augment.spec import AugmentSpec
from cassle_jax.checks import ConfigError

__all__ = [
    "CASSLE_DESCRIPTORS",
    "LEAK_FREE_DESCRIPTORS",
    "check_descriptors",
    "concatenate",
    "describe",
    "descriptor_width",
    "difference",
    "identity_descriptor",
    "identity_difference",
]

CASSLE_DESCRIPTORS = ("blur", "color", "color_diff", "crop", "grayscale")
"""The descriptors of the published pretraining: 13 numbers."""

LEAK_FREE_DESCRIPTORS = ("blur", "color", "crop", "grayscale", "palette")
"""The same with ``palette`` instead of ``color_diff``: 28 numbers, none computed from the image."""


@in_float32
def describe(view: View, spec: AugmentSpec) -> dict[str, Float32[Array, "_"]]:
    """The augmentation information omega of one view (CASSLE, arXiv 2306.06082).

    Args:
      view: one view; only ``params`` and ``color_diff`` are read.
      spec: gives the jitter ranges that ``color`` is relative to.

    Returns:
      All descriptors by name, float32 vectors of one number per component:
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
        palette: the colours of ``PALETTE`` after the view's exact jitter, order of operations
          included, minus the colours themselves; 0 if not applied. Unlike color_diff it reveals
          nothing about the image.
        rotation: quarter turns, one-hot.
        solarize: threshold; 1 if not applied.

    Raises:
      ValueError: if the input is more than one view, its parameters are out of range, or a
        descriptor has another number of values than components.
    """
    check_spec(spec)
    return _described(_checked(view), spec)


@in_float32
def difference(view_1: View, view_2: View, spec: AugmentSpec) -> dict[str, Float32[Array, "_"]]:
    """Augmentation of view 1 relative to view 2 (AugSelf, arXiv 2111.09613, section 3).

    Args:
      view_1: one view; only ``params`` and ``color_diff`` are read.
      view_2: another view of the same image.
      spec: gives the jitter ranges that ``color`` is relative to.

    Returns:
      Differences by name, float32 vectors of one number per component:
        blur, color, color_diff, grayscale, palette, solarize: the descriptor of view 1 minus that
          of view 2.
        crop: the boxes' centres and sizes, view 1 minus view 2, in view 1's frame: both columns are
          mirrored where view 1 is flipped, whether view 2 is or not.
        flip: 1 where both views are flipped or neither is, else 0.
        rotation: (turns 1 - turns 2) mod 4, one-hot: a class for cross-entropy.

    Raises:
      ValueError: for an error of ``describe`` in either view, or if a comparison has another
        number of values than components.
    """
    check_spec(spec)
    view_1, view_2 = _checked(view_1), _checked(view_2)
    omega_1, omega_2 = _described(view_1, spec), _described(view_2, spec)

    def relative(name: str):
        compare = DESCRIPTORS[name].compare
        if compare is None:
            return omega_1[name] - omega_2[name]
        return _numbers(name, "compare", compare(view_1, view_2))

    return {name: relative(name) for name in DESCRIPTORS}


def _described(view: View, spec: AugmentSpec) -> dict[str, Float32[Array, "_"]]:
    return {
        name: _numbers(name, "read", each.read(view, spec)) for name, each in DESCRIPTORS.items()
    }


def _checked(view: Any) -> View:
    """The view, its numbers as arrays; raises ValueError unless they are those of one view."""
    check_type("view", view, View, "a View, as by augment(key, image, spec)")
    params = check_params(view.params)
    check_one("color_diff", view.color_diff, (3,))
    return view.replace(params=params)


def _numbers(name: str, function: str, result: ArrayLike) -> Float32[Array, "_"]:
    """The result of a descriptor's function: one number for each component.

    Raises:
      ValueError: it has another shape, which a loss would broadcast.
    """
    numbers = jnp.asarray(result, jnp.float32)
    components = DESCRIPTORS[name].components
    if numbers.shape != (len(components),):
        raise ValueError(
            f"{function} of the descriptor {name!r} returns shape {numbers.shape}; return one "
            f"number for each of its components {components}, shape ({len(components)},)"
        )
    return numbers


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
      ValueError: for an error of ``check_descriptors``, if there is no name, or if a descriptor is
        missing or has another width than in ``DESCRIPTORS``.
    """
    check_type("descriptors", descriptors, Mapping, "a dict, as by describe(view, spec)")
    names = check_descriptors(names)
    if not names:
        raise ValueError("descriptors=() leaves nothing to concatenate; name at least one")
    for name in dict.fromkeys(name.partition(".")[0] for name in names):
        shape = jnp.shape(descriptors[name]) if name in descriptors else ()
        size = DESCRIPTORS[name].size
        if shape[-1:] != (size,):
            has = f"has shape {shape}" if name in descriptors else "is missing"
            raise ValueError(f"descriptor {name!r} {has}; use [..., {size}]")
    return jnp.concatenate([_select(descriptors, name) for name in names], axis=-1)


def _select(
    descriptors: Mapping[str, Float32[Array, "*batch _"]], name: str
) -> Float32[Array, "*batch _"]:
    descriptor, _, component = name.partition(".")
    values = descriptors[descriptor]
    if not component:
        return values
    place = DESCRIPTORS[descriptor].components.index(component)
    return values[..., place : place + 1]


def descriptor_width(names: Iterable[str]) -> int:
    """Width of the conditioning vector of these descriptors.

    Args:
      names: descriptors, or components of them.

    Returns:
      The sum of their sizes: 13 for ``CASSLE_DESCRIPTORS``.

    Raises:
      ValueError: for an error of ``check_descriptors``.
    """
    return sum(1 if "." in name else DESCRIPTORS[name].size for name in check_descriptors(names))


def identity_descriptor(names: Iterable[str]) -> Float32[Array, " width"]:
    """The conditioning vector of an unaugmented image.

    Args:
      names: descriptors, or components of them.

    Returns:
      [descriptor_width(names)]: crop (0.5, 0.5, 1, 1), solarize 1, rotation in its first class,
      everything else 0.

    Raises:
      ValueError: for an error of ``check_descriptors``, or if there is no name.
    """
    return _constant({name: each.neutral for name, each in DESCRIPTORS.items()}, names)


def identity_difference(names: Iterable[str]) -> Float32[Array, " width"]:
    """The concatenated differences of two views with equal augmentation.

    Args:
      names: descriptors, or components of them.

    Returns:
      [descriptor_width(names)]: flip 1, rotation in its first class, everything else 0.

    Raises:
      ValueError: for an error of ``check_descriptors``, or if there is no name.
    """
    return _constant({name: each.alike for name, each in DESCRIPTORS.items()}, names)


def _constant(
    values: Mapping[str, tuple[float, ...]], names: Iterable[str]
) -> Float32[Array, " width"]:
    return concatenate({name: jnp.array(each, jnp.float32) for name, each in values.items()}, names)


def check_descriptors(names: Iterable[str], prefix: str = "") -> list[str]:
    """The names in alphabetical order, the order of their numbers in the conditioning vector.

    Args:
      names: descriptors, or components of them such as ``color.hue``.
      prefix: prefix of the setting's name in a message, such as ``conditioning.``.

    Raises:
      ConfigError: a name is unknown, or selects numbers twice, as ``color`` and ``color.hue`` do;
        ``names`` is a string, or has several names in one; or a name in ``DESCRIPTORS`` has a blank
        or one of the signs ``.,:+()``.
    """
    given = [names] if isinstance(names, str) else [*map(str, names)]
    apart = tuple(name for each in given for name in re.split(r"[,+()\s]+", each) if name)
    if isinstance(names, str) or len(apart) > len(given):
        text = ",".join(given)
        raise ConfigError(f"{prefix}descriptors={text!r} is not a tuple of names; use {apart}")
    for name in DESCRIPTORS:
        if re.search(r"[.,:+()\s]", name):
            raise ConfigError(
                f"DESCRIPTORS has the name {name!r}, and settings separate names and components by "
                "such signs; use letters, digits and _"
            )
    names = sorted(given)
    for name in names:
        descriptor, dot, _ = name.partition(".")
        known = list(DESCRIPTORS)
        if dot and descriptor in DESCRIPTORS:
            known = [f"{descriptor}.{each}" for each in DESCRIPTORS[descriptor].components]
        if name not in known:
            raise ConfigError(
                f"{prefix}descriptors={names} has the unknown name {name!r}; use any of "
                f"{', '.join(known)}"
            )
        if names.count(name) > 1 or (dot and descriptor in names):
            raise ConfigError(
                f"{prefix}descriptors={names} names {name!r} twice; name each once, either a "
                "descriptor or its components"
            )
    return names
