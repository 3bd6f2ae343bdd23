"""Reads one checkpoint, and refuses one that is damaged or belongs to other networks."""

import contextlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from cassle_jax.checks import ConfigError, differing
from cassle_jax.storage import has_type
from cassle_jax.training.checksums import check_sums, checksums
from cassle_jax.training.quiet_orbax import abandoned_reads_silenced
from cassle_jax.training.state import TrainState


def verified_checkpoint(folder: epath.Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state and the data state of a checkpoint; raises ValueError for a damaged one."""
    with abandoned_reads_silenced():
        state, data_state = read_checkpoint(folder, like)
    saved = data_state.pop("checksums", {})
    if not has_type(data_state, {str: int}):
        raise ValueError("its place in the images is damaged")
    check_sums(checksums(state, data_state), saved)
    return state, data_state


def read_checkpoint(folder: epath.Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state, in the shapes and placement of `like`, and the data saved with it."""
    # Not by Orbax's manager, which ends with a barrier: a process that cannot read would miss it.
    with (
        contextlib.closing(ocp.StandardCheckpointHandler()) as arrays,
        contextlib.closing(ocp.JsonCheckpointHandler()) as data,
    ):
        state = arrays.restore(folder / "state", args=ocp.args.StandardRestore(like))
        return state, data.restore(folder / "data", args=ocp.args.JsonRestore())


def check_shapes(folder: epath.Path, like: TrainState) -> None:
    """Raises ConfigError where a checkpoint belongs to other networks or another optimizer."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        saved = _shapes(handler.metadata(folder / "state").tree)
    now = _shapes(like)
    for name in differing(saved, now):
        raise ConfigError(
            f"workdir={folder.parent.parent} holds checkpoints of other networks or another "
            f"optimizer: {name} is {_shape_text(saved.get(name))} in checkpoint {folder.name} and "
            f"{_shape_text(now.get(name))} now; use another workdir, or the settings the "
            "run was started with"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by array name, without keys, whose shape depends on their implementation."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves
    ]
    return {name: tuple(leaf.shape) for name, leaf in named if name != "key"}


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(str(each) for each in shape) or "a number"
