"""Renames and transposes PyTorch state dicts into Flax variables, and back, exactly.

A state is a mapping from PyTorch's names to numpy arrays in PyTorch's layouts (linear: out×in,
convolution: out×in×height×width); parameters other than kernels keep their layout. Names are
torchvision's for ResNets, MoCo-v3's (which are timm's) for ViTs, timm's for ConvNeXts, those of a
`torch.nn.Sequential` of Linear, BatchNorm1d and ReLU for MLPs, and the published CASSLE
implementation's for projectors and predictors; names unknown to these are unchanged.
`num_batches_tracked` is skipped: nothing depends on it.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cassle_jax.interop.errors import WeightsError
from cassle_jax.models.vit import resize_positions

LOG = logging.getLogger(__name__)

Path = tuple[str, ...]
State = dict[str, np.ndarray]
Variables = Mapping[str, Any]

LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
KERNEL_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # by number of axes, in PyTorch's order
VARIANCES = ("running_var", ".var")  # how their names end in PyTorch and here
PROBLEMS_SHOWN = 8  # per kind


def encoder_from_pytorch(state: Mapping[str, np.ndarray], variables: Variables) -> dict[str, Any]:
    """An encoder's variables with the values of `state`, which has no classifier.

    A ViT's positions are interpolated where `variables` are made for images of another size.

    Args:
        state: arrays by PyTorch name.
        variables: the Flax variables to replace, arrays or `jax.ShapeDtypeStruct`s: `params` and
            `batch_stats`, as `init` or `jax.eval_shape` returns them.

    Raises:
        WeightsError: an array is missing, unexpected, of another shape or not finite, or variances
            are below 0; the message names each.
    """
    return _from_pytorch(at_image_size(state, variables), variables, _encoder_module)


def at_image_size(
    state: Mapping[str, np.ndarray], variables: Variables, offset: float | None = None
) -> Mapping[str, np.ndarray]:
    """The state with its positions resized to the grid that `variables` have, where they differ.

    `offset` is that of `resize_positions`.

    Raises:
        WeightsError: the positions are not those of a square grid.
    """
    target, positions = variables.get("params", {}).get("pos_embed"), state.get("pos_embed")
    if target is None or positions is None or not len(target.shape) == positions.ndim == 3:
        return state
    if target.shape[1] == positions.shape[1]:
        return state
    side = math.isqrt(target.shape[1] - 1)
    try:
        resized = resize_positions(jnp.asarray(positions, jnp.float32), side, side, offset)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    LOG.info(
        "pos_embed is interpolated from %d to %d patches: the weights are of another image size",
        positions.shape[1] - 1,
        side**2,
    )
    return {**state, "pos_embed": np.asarray(resized)}


def check_encoder(state: Mapping[str, np.ndarray], variables: Variables) -> None:
    """Raises the errors of `encoder_from_pytorch`, without making anything."""
    _fitting_names(state, variables, _encoder_module)


def encoder_to_pytorch(variables: Variables) -> State:
    """A ResNet's variables in torchvision's names, a ViT's and a ConvNeXt's in timm's."""
    return _to_pytorch(variables, _encoder_module)


def mlp_from_pytorch(state: Mapping[str, np.ndarray], variables: Variables) -> dict[str, Any]:
    """An `MLP`'s variables with the values of `state`; as `encoder_from_pytorch` otherwise."""
    return _from_pytorch(state, variables, _mlp_module)


def mlp_to_pytorch(variables: Variables) -> State:
    """An `MLP`'s variables in the names of a `torch.nn.Sequential` (`0.weight`, …)."""
    return _to_pytorch(variables, _mlp_module)


def projector_from_pytorch(state: Mapping[str, np.ndarray], variables: Variables) -> dict[str, Any]:
    """A `ConditionedProjector`'s or `ImageConditioner`'s variables with the values of `state`.

    As `encoder_from_pytorch` otherwise.
    """
    return _from_pytorch(state, variables, _projector_module)


def projector_to_pytorch(variables: Variables) -> State:
    """A `ConditionedProjector`'s or `ImageConditioner`'s variables in the published names."""
    return _to_pytorch(variables, _projector_module)


def predictor_from_pytorch(state: Mapping[str, np.ndarray], variables: Variables) -> dict[str, Any]:
    """A predictor's variables with the values of `state`; as `encoder_from_pytorch` otherwise.

    A predictor is a `ConditionedProjector` here. A plain one is a bare `Sequential` in the
    published implementation; a conditioned one, which is missing there, has a projector's names.
    """
    return _from_pytorch(state, variables, _predictor_module(variables))


def predictor_to_pytorch(variables: Variables) -> State:
    """A predictor's variables in the names `predictor_from_pytorch` reads."""
    return _to_pytorch(variables, _predictor_module(variables))


def _encoder_module(path: Path) -> str:
    if path == ("patch_embed",):
        return "patch_embed.proj"
    # The one module of another library with an underscore in its name.
    return ".".join(path).replace("_", ".").replace("conv.dw", "conv_dw")


def _mlp_module(path: Path) -> str:
    match = re.fullmatch(r"(linear|bn)_(\d+)", path[0]) if len(path) == 1 else None
    if not match:
        return ".".join(path)
    return str(3 * int(match[2]) + {"linear": 0, "bn": 1}[match[1]])


def _projector_module(path: Path) -> str:
    networks = {
        "condition": "aug_processor",
        "projector": "projector",
        "hypernetwork": "projector_hn",
    }
    if path[0] in networks and len(path) > 1:
        return f"{networks[path[0]]}.{_mlp_module(path[1:])}"
    return ".".join((re.sub(r"^bn_(?=\d+$)", "projector_bns.", path[0]), *path[1:]))


def _predictor_module(variables: Variables) -> Callable[[Path], str]:
    plain = set(variables.get("params", {})) == {"projector"}
    return (lambda path: _mlp_module(path[1:] or path)) if plain else _projector_module


def _names(variables: Variables, module: Callable[[Path], str]) -> dict[Path, str]:
    """PyTorch's names of the arrays."""
    names = {path: _pytorch_name(path, module) for path in traverse_util.flatten_dict(variables)}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise WeightsError(f"two arrays would be called {twice[0]}; rename one of the parameters")
    return names


def _pytorch_name(path: Path, module: Callable[[Path], str]) -> str:
    collection, *modules, leaf = path
    if not modules:
        return leaf
    return f"{module(tuple(modules))}.{LEAVES.get((collection, leaf), leaf)}"


def _axes(path: Path, array: Any) -> tuple[int, ...]:
    """The axes of an array in PyTorch's order."""
    usual = tuple(range(len(array.shape)))
    return KERNEL_AXES.get(len(usual), usual) if path[-1] == "kernel" else usual


def _to_pytorch(variables: Variables, module: Callable[[Path], str]) -> State:
    names = _names(variables, module)
    return {
        names[path]: np.asarray(np.transpose(np.asarray(array), _axes(path, array)), order="C")
        for path, array in traverse_util.flatten_dict(variables).items()
    }


def _from_pytorch(
    state: Mapping[str, np.ndarray], variables: Variables, module: Callable[[Path], str]
) -> dict[str, Any]:
    names = _fitting_names(state, variables, module)
    return traverse_util.unflatten_dict(
        {
            path: jnp.asarray(
                np.transpose(state[names[path]], np.argsort(_axes(path, target))), target.dtype
            )
            for path, target in traverse_util.flatten_dict(variables).items()
        }
    )


def _fitting_names(
    state: Mapping[str, np.ndarray], variables: Variables, module: Callable[[Path], str]
) -> dict[Path, str]:
    """The names of `variables` in `state`; refuses a `state` with other or fewer arrays."""
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    names = _names(variables, module)
    expected = {
        names[path]: tuple(target.shape[axis] for axis in _axes(path, target))
        for path, target in traverse_util.flatten_dict(variables).items()
    }
    check_fit(state, expected, "the PyTorch state")
    return names


def check_fit(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Refuses arrays that a model of these shapes does not take; `what` names them.

    Raises:
        WeightsError: an array is missing, unexpected, of another shape or not finite, or variances
            are below 0; the message names each.
    """
    missing = [f"{name} is missing" for name in shapes if name not in arrays]
    unexpected = [f"{name} is unexpected" for name in arrays if name not in shapes]
    misshapen = [
        f"{name} has shape {arrays[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != shape
    ]
    kinds = (missing, unexpected, misshapen, not_weights(arrays))
    problems = [problem for kind in kinds for problem in _some(kind)]
    if problems:
        raise WeightsError(f"{what} does not fit the model: {'; '.join(problems)}")


def not_weights(state: Mapping[str, np.ndarray]) -> list[str]:
    """Faults of arrays that hold no finite float32 numbers, or a variance below 0, one by one."""
    problems = []
    for name, array in state.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"{name} holds {array.dtype} where floating-point numbers should be")
        elif not array.size:
            problems.append(f"{name} has shape {array.shape}, which holds no numbers")
        elif not _finite(array):
            problems.append(
                f"the weights {name} are not finite; the file is damaged or training diverged"
            )
        elif name.endswith(VARIANCES) and array.min() < 0:
            problems.append(f"the variances {name} are below 0; the file is damaged")
    return problems


def _finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):  # a float64 may be too large for a float32
        return bool(np.isfinite(array.astype(np.float32, copy=False)).all())


def _some(problems: list[str]) -> list[str]:
    """The first problems of each kind: a state of another architecture has hundreds."""
    more = len(problems) - PROBLEMS_SHOWN
    return problems if more <= 0 else [*problems[:PROBLEMS_SHOWN], f"and {more} more"]
