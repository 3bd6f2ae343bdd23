"""Checksums of the parts of a training state, computed on the devices or on the host."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from cassle_jax.storage import has_type
from cassle_jax.training.state import TrainState

_CHUNK = 2**22  # words per step of the checksum on the host


def checksums(state: TrainState, data_state: dict[str, Any]) -> dict[str, int]:
    """A checksum per part of the state, and one for the data state.

    Neither the format nor most file systems notice a flipped bit in the middle of an array. The
    devices compute the checksums, so nothing is transferred; their number does not matter.
    """
    place = json.dumps(data_state, sort_keys=True)
    return {**checksums_of(vars(state)), "data": zlib.crc32(place.encode())}


def checksums_of(parts: Mapping[str, Any]) -> dict[str, int]:
    """A checksum per part of a state, by name."""
    return {name: int(value) for name, value in _checksums_of(dict(parts)).items()}


def check_sums(found: Mapping[str, int], saved: Any) -> None:
    """Raises ValueError where parts differ from the saved ones, if their checksums were saved."""
    if not has_type(saved, {str: int}):
        raise ValueError("its checksums are damaged")
    wrong = [name for name in found if saved and saved.get(name) != found[name]]
    if wrong:
        raise ValueError(f"its {', '.join(wrong)} differ from what was saved")


@jax.jit
def _checksums_of(parts: dict[str, Any]) -> dict[str, UInt32[jax.Array, ""]]:
    def checksum(part) -> UInt32[jax.Array, ""]:
        total = jnp.uint32(0)
        for leaf in jax.tree.leaves(part):
            total = total * jnp.uint32(16777619) + _checksum(leaf)
        return total

    return {name: checksum(part) for name, part in parts.items()}


def _checksum(array: jax.Array) -> UInt32[jax.Array, ""]:
    """Σ (2i + 1)·wordᵢ mod 2³²: as the factors are odd, no change of one word goes unnoticed."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, words).astype(jnp.uint32).ravel()
    return (words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)


def host_checksum(part: Any) -> int:
    """The checksum of a part on the host, as `checksums_of` computes it on devices."""
    total = 0
    for leaf in jax.tree.leaves(part):
        total = (total * 16777619 + _host_checksum(leaf)) % 2**32
    return total


def _host_checksum(leaf: Any) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(leaf)
    words = array.ravel().view(f"u{array.dtype.itemsize}")
    total = 0
    for start in range(0, words.size, _CHUNK):
        chunk = words[start : start + _CHUNK].astype(np.uint32)
        factors = 2 * np.arange(start, start + chunk.size, dtype=np.uint32) + np.uint32(1)
        total += int((chunk * factors).sum(dtype=np.uint32))
    return total % 2**32
