"""PyTorch's arrays into Flax variables, and what shapes show of a network."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tests.parity.golden_file import GoldenError


def load(
    from_pytorch: Callable, to_pytorch: Callable, state: Mapping[str, np.ndarray], shapes: Any
) -> Any:
    """The variables that hold `state`, from which they can be made again exactly."""
    variables = from_pytorch(state, shapes)
    back = to_pytorch(variables)
    if back.keys() != state.keys():
        raise GoldenError(f"not the same after loading: {sorted(back.keys() ^ state.keys())}")
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    return variables


def with_dtype(shapes: Any, dtype: Any) -> Any:
    """Shapes of variables, to be loaded as `dtype`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def mlp_sizes(state: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, int]:
    """Hidden width, result's width and depth of the `Sequential` whose names start so."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.weight")
    found = {pattern.fullmatch(name): array for name, array in state.items()}
    linear = {int(match[1]): array for match, array in found.items() if match and array.ndim == 2}
    if not linear:
        raise GoldenError(f"there are no weights called {prefix}0.weight and so on")
    widths = [len(linear[index]) for index in sorted(linear)]
    return {"hidden": widths[0], "out": widths[-1], "depth": len(widths)}
