"""Makes the views that analyses compare: plain, with chosen augmentations, or as in training.

An image's draws depend only on the key and on its index in the dataset, not on the batch size or
the number of devices. The order of the colour operations is therefore drawn per image, even where
`spec.jitter_order` shares it within a batch.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cassle_jax.augment import CHANCES, RARE, SWITCHES, AugmentSpec, View, ViewParams, apply, draw
from cassle_jax.checks import check_seed
from cassle_jax.methods.base import PyTree
from cassle_jax.parallel import shard_batch

AUGMENTATIONS = ("crop", *SWITCHES)

Batch = Mapping[str, Array | np.ndarray]
"""A batch of `evaluation_batches`: image uint8 [B, H, W, 3], size [B, 2], index [B], mask [B]."""


def protocol_key(protocol: str, seed: int) -> PRNGKeyArray:
    """The random key of a protocol, different for every protocol and seed in [0, 2³²)."""
    check_seed("seed", seed)
    return jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(protocol.encode())))


def on_devices(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows as global arrays; labels, which may be of any kind, are left out."""
    return shard_batch({name: batch[name] for name in batch if name != "label"}, mesh)


def of_all_images(
    function: Callable[[Batch], PyTree], batches: Iterable[Batch], mesh: Mesh
) -> PyTree:
    """Applies `function` to all batches; returns the results of all images on every host.

    Args:
      function: takes a sharded batch and returns arrays with the batch's rows, sharded likewise.
      batches: this process's rows.
      mesh: the devices.

    Returns:
      The results of `function`, concatenated over the batches, without rows that hold no image.

    Raises:
      ValueError: If there are no batches.
    """
    parts = []
    for batch in batches:
        batch = on_devices(batch, mesh)
        results = function(batch), batch["mask"]
        found, mask = multihost_utils.process_allgather(results, tiled=True)
        parts.append(jax.tree.map(lambda rows, mask=mask: rows[mask], found))
    if not parts:
        raise ValueError("there are no batches to analyse; give at least one")
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


@struct.dataclass
class Chosen:
    """The augmentations to apply out of those drawn for an image, and their strength.

    Attributes:
      applied: whether each of `AUGMENTATIONS` is applied.
      strength: strength of colour jitter and blur: brightness, contrast and saturation become
        max(0, 1 + strength · (factor − 1)), hue becomes strength · shift within half a turn, and σ
        becomes strength · σ; at 1 they are as drawn. The blur keeps its number of taps.
    """

    applied: dict[str, Bool[Array | np.ndarray, ""] | np.bool_]
    strength: Float[Array, ""] | np.float32


def alone(name: str, strength: float = 1.0) -> Chosen:
    """One augmentation and no other."""
    return Chosen(
        applied={each: np.bool_(each == name) for each in AUGMENTATIONS},
        strength=np.float32(strength),
    )


def nothing() -> Chosen:
    """No augmentation at all."""
    return alone("")


def every_augmentation(spec: AugmentSpec) -> AugmentSpec:
    """`spec` with every augmentation in every view, except those in `RARE` that it never draws.

    These stay out of the compiled program.
    """
    chances = {name: float(name not in RARE or getattr(spec, name) > 0) for name in CHANCES}
    return dataclasses.replace(spec, crop=True, jitter_order="image", **chances)


def draw_for_each(key: PRNGKeyArray, batch: Batch, spec: AugmentSpec) -> ViewParams:
    """The draws of every augmentation for each image of the batch."""
    spec = dataclasses.replace(spec, jitter_order="image")
    keys = jax.vmap(partial(jax.random.fold_in, key))(batch["index"])
    return jax.vmap(partial(draw, spec=spec))(keys, batch["size"])


def view_as_in_training(key: PRNGKeyArray, batch: Batch, spec: AugmentSpec) -> View:
    """One view per image, drawn from `spec`."""
    return _apply(batch, draw_for_each(key, batch, spec), spec)


def view_under(chosen: Chosen, drawn: ViewParams, batch: Batch, spec: AugmentSpec) -> View:
    """One view per image, with none but the chosen augmentations.

    Without the crop, the view shows the image's largest centred square, resized as a crop is
    (bilinear): only the chosen augmentations distinguish it from a view under `nothing()`.

    Args:
      chosen: the augmentations to apply.
      drawn: draws per image, from `every_augmentation`.
      batch: the images.
      spec: the augmentation that was drawn from.
    """
    keep = partial(_keep, chosen)
    return _apply(batch, jax.vmap(keep)(drawn, batch["size"]), spec)


def plain_view(batch: Batch, spec: AugmentSpec) -> View:
    """One view per image without augmentation: the largest centred square."""
    return view_under(nothing(), draw_for_each(jax.random.key(0), batch, spec), batch, spec)


def _apply(batch: Batch, params: ViewParams, spec: AugmentSpec) -> View:
    one = partial(apply, spec=spec)
    return jax.vmap(lambda image, params, size: one(image, params, size=size))(
        batch["image"], params, batch["size"]
    )


def _keep(chosen: Chosen, drawn: ViewParams, size: Int[Array, "2"]) -> ViewParams:
    """Keeps the chosen augmentations of one image, at the chosen strength."""
    applied = chosen.applied

    def factor(value):
        return jnp.maximum(0, 1 + chosen.strength * (value - 1))

    kept = {
        field: jnp.where(applied[name], getattr(drawn, field), 0).astype(
            getattr(drawn, field).dtype
        )
        for name, field in SWITCHES.items()
    }
    return drawn.replace(
        **kept,
        crop=jnp.where(applied["crop"], drawn.crop, _centred_square(size)),
        brightness=factor(drawn.brightness),
        contrast=factor(drawn.contrast),
        saturation=factor(drawn.saturation),
        hue=jnp.clip(chosen.strength * drawn.hue, -0.5, 0.5),
        sigma=chosen.strength * drawn.sigma,
    )


def _centred_square(size: Int[Array, "2"]) -> Float[Array, "4"]:
    """Top, left, height and width of the largest centred square, as fractions of the image."""
    size = size.astype(jnp.float32)
    side = size.min()
    return jnp.concatenate([jnp.floor((size - side) / 2), jnp.stack([side, side])]) / jnp.tile(
        size, 2
    )
