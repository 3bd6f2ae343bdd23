"""States the parameters of views from their defaults: nothing applied."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from cassle_jax.augment import ViewParams

_NOTHING = {
    "crop": np.array([0, 0, 1, 1], np.float32),
    "jitter_order": np.arange(4, dtype=np.int32),
    "brightness": np.float32(1),
    "contrast": np.float32(1),
    "saturation": np.float32(1),
    "sigma": np.float32(1),
    "solarize_threshold": np.float32(0.5),
}


def view_params(count, **given):
    """view_params(count, flip=..., ...) -> ViewParams of `count` views; the rest not applied."""
    values = {}
    for field in dataclasses.fields(ViewParams):
        shape = tuple(map(int, field.type.dim_str.split()[1:]))
        value = np.asarray(given.pop(field.name, _NOTHING.get(field.name, 0)))
        array = np.broadcast_to(value, (count, *shape))
        values[field.name] = jnp.asarray(array, field.type.dtypes[0])
    assert not given, f"unknown parameters {sorted(given)}"
    return ViewParams(**values)
