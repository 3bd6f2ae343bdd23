"""Refuses invalid images, sizes, parameters and distributions while a program is traced.

Shapes and dtypes are known then. Values are checked only where that is free: in numpy arrays and
in arrays in the host's memory, never in traced arrays or those of a device. Also keeps the
computation in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from cassle_jax.augment.spec import LEAST_SIGMA, AugmentSpec

__all__ = [
    "ROUNDING",
    "check_image",
    "check_key",
    "check_one",
    "check_params",
    "check_size",
    "check_spec",
    "check_type",
    "in_float32",
]

# parameter: (the flag it belongs to, lowest, highest)
_RANGES = {
    "brightness": ("jitter", 0, np.inf),
    "contrast": ("jitter", 0, np.inf),
    "saturation": ("jitter", 0, np.inf),
    "hue": ("jitter", -0.5, 0.5),
    "sigma": ("blur", LEAST_SIGMA, np.inf),
    "solarize_threshold": ("solarize", 0, 1),
    "turns": ("", 0, 3),
    "crop": ("", 0, 1),
}
ROUNDING = 1e-3
"""Tolerance for computed values, of an image's range and of a box's ends."""


def check_image(image: Any, size: Any = None) -> None:
    """Refuses anything but a [height, width, 3] picture of uint8, or of floats in [0, 1].

    Args:
      image: the caller's argument.
      size: height and width of the picture at its top left; None: all of it.

    Raises:
      ValueError: the message names the shape, dtype or values, and what would work.
    """
    try:
        np.dtype(image.dtype)
    except (AttributeError, TypeError) as error:
        what = type(image).__name__
        raise ValueError(f"image is a {what}; use an array, as by np.asarray") from error
    shape = tuple(image.shape)
    if advice := _wrong_shape(shape):
        raise ValueError(f"image has shape {shape}, {advice}")
    if image.dtype == np.uint8:
        return
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"image has dtype {image.dtype}; use uint8, or float32 in [0, 1]")
    dtype = np.dtype(image.dtype)
    if dtype.itemsize > 4 or not dtype.isnative:
        raise ValueError(
            f"image has dtype {image.dtype}; use float32, as by image.astype(np.float32)"
        )
    picture = _known(image)
    if picture is not None and size is not None:
        corner = _known(size)
        picture = None if corner is None else picture[: corner[0], : corner[1]]
    if picture is not None:
        low, high = float(picture.min()), float(picture.max())
        if not (-ROUNDING <= low <= high <= 1 + ROUNDING):
            raise ValueError(
                f"image has floats from {low:g} to {high:g}; use floats in [0, 1], such as "
                "image / 255, or uint8"
            )


def _wrong_shape(shape: tuple[int, ...]) -> str:
    """The fault of an image's shape, and what would work; empty where it is right."""
    if len(shape) == 2:
        return "that of a grey image; use [height, width, 3], as by np.stack([image] * 3, axis=-1)"
    if len(shape) > 3:
        return "that of a batch; use jax.vmap, as one image is augmented at a time"
    if len(shape) < 3:
        return "that of no image; use [height, width, 3]"
    if shape[-1] == 1:
        return "that of a grey image; use three channels, as by np.repeat(image, 3, axis=-1)"
    if shape[-1] == 4:
        return "that of an image with transparency; use its RGB, as by image[..., :3]"
    if shape[-1] != 3 and shape[0] == 3:
        return "its channels first; use [height, width, 3], as by image.transpose(1, 2, 0)"
    if shape[-1] != 3:
        return "which lacks RGB's three channels; use [height, width, 3]"
    if 0 in shape:
        return "which has no pixels; use an image of at least 1×1"
    return ""


def check_size(size: Any, canvas: tuple[int, int] | None = None) -> None:
    """Refuses anything but a height and width in whole pixels, within the canvas.

    Raises:
      ValueError: the message names the size and what would work.
    """
    shape, dtype = np.shape(size), getattr(size, "dtype", None) or np.asarray(size).dtype
    if shape != (2,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"size has shape {shape} and dtype {dtype}; use two integers, height and width of one "
            "picture, and jax.vmap for several"
        )
    pixels = _known(size)
    if pixels is None:
        return
    if pixels.min() < 1 or (canvas is not None and (pixels > canvas).any()):
        most = f", and at most the canvas's {canvas[0]}×{canvas[1]}" if canvas else ""
        raise ValueError(
            f"size={tuple(pixels.tolist())} is not the size of a picture; use at least 1×1{most}"
        )


def check_spec(spec: Any) -> None:
    """Refuses anything but an `AugmentSpec`, such as the size of a view alone.

    Raises:
      ValueError: the message names the type and what would work.
    """
    check_type("spec", spec, AugmentSpec, "an AugmentSpec, as by AugmentSpec(size=224)")


def check_type(name: str, value: Any, kind: type, usable: str) -> None:
    """Refuses a value of another type; `usable` says what works.

    Raises:
      ValueError: the message names the argument and its type.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} is of type {type(value).__name__}; use {usable}")


def check_key(name: str, key: Any, like: PRNGKeyArray | None = None) -> PRNGKeyArray:
    """Refuses anything but one random key, of `jax.random.key` or `jax.random.PRNGKey`.

    Args:
      name: the caller's argument.
      key: its value.
      like: a key whose generator it must share; `None` for any generator.

    Returns:
      The key as one of `jax.random.key`, which draws the same.

    Raises:
      ValueError: the message names the key or its shape, and what would work.
    """
    dtype = getattr(key, "dtype", None)
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError, AttributeError) as error:
            given = repr(key) if dtype is None else f"{dtype}{list(key.shape)}"
            raise ValueError(
                f"{name}={given} is not a random key; use one, as by jax.random.key(0)"
            ) from error
    check_one(name, key)
    if like is not None and key.dtype != like.dtype:
        raise ValueError(
            f"{name} is a {key.dtype} and key a {like.dtype}; use keys of one generator, as by "
            "jax.random.split(key)"
        )
    return key


def check_one(name: str, value: Any, shape: tuple[int, ...] = ()) -> None:
    """Refuses several values where one view's is needed: they would be misread as batches.

    Raises:
      ValueError: the message names the shape and what would work.
    """
    if np.shape(value) != shape:
        raise ValueError(
            f"{name} has shape {np.shape(value)}, but one view's has {shape}; use jax.vmap for "
            "several views"
        )


def check_params(params: Any) -> Any:
    """Refuses parameters of several views, and values that no view can have.

    Returns:
      The parameters as arrays; they may be Python's numbers and lists.

    Raises:
      ValueError: the message names the parameter, its value and what would work.
    """
    for field in dataclasses.fields(params):
        # Its annotation has the shape, such as "*batch 4".
        shape = tuple(map(int, field.type.dim_str.removeprefix("*batch").split()))
        check_one(f"params.{field.name}", getattr(params, field.name), shape)
    for name, (flag, lowest, highest) in _RANGES.items():
        applied, value = _known(getattr(params, flag, True)), _known(getattr(params, name))
        if value is None or not (flag == "" or (applied is not None and applied)):
            continue
        if not ((value >= lowest) & (value <= highest) & np.isfinite(value)).all():
            raise ValueError(
                f"params.{name}={value.tolist()} is out of range; use {lowest:g} to {highest:g}"
            )
    crop = _known(params.crop)
    if crop is not None and not ((crop[2:] > 0) & (crop[:2] + crop[2:] <= 1 + ROUNDING)).all():
        raise ValueError(
            f"params.crop={crop.tolist()} is not a box within the picture, as top, left, height "
            "and width; use a height and width above 0, and top + height and left + width up to 1"
        )
    order = _known(params.jitter_order)
    if order is not None and sorted(order.tolist()) != [0, 1, 2, 3]:
        raise ValueError(
            f"params.jitter_order={order.tolist()} is not an order of the four operations; use "
            "each of 0 to 3 once"
        )
    names = [field.name for field in dataclasses.fields(params)]
    return params.replace(**{name: jnp.asarray(getattr(params, name)) for name in names})


def in_float32(function: Callable) -> Callable:
    """The function, computed in float32 where JAX's 64 bits are switched on, too.

    A random key draws other numbers in float64, and so other augmentations.
    """

    @functools.wraps(function)
    def computed(*arguments: Any, **named: Any) -> Any:
        with jax.enable_x64(False):
            return function(*arguments, **named)

    return computed


def _known(value: Any) -> np.ndarray | None:
    """The values of an array in the host's memory; `None` for others."""
    if isinstance(value, jax.core.Tracer):
        return None
    if isinstance(value, jax.Array):
        on_host = all(device.platform == "cpu" for device in value.devices())
        return np.asarray(value) if on_host and value.is_fully_addressable else None
    return np.asarray(value)
