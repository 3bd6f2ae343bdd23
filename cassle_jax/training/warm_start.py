"""Starts a run from the weights of a file instead of random ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from cassle_jax.augment import DESCRIPTORS
from cassle_jax.checks import ConfigError
from cassle_jax.interop.architecture import architecture_of
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.naming import is_vit
from cassle_jax.interop.pytorch import Variables
from cassle_jax.interop.weights import Weights, load_weights
from cassle_jax.methods.base import PyTree
from cassle_jax.methods.build import Conditioning
from cassle_jax.models import VisionTransformer
from cassle_jax.storage import is_there, path_of
from cassle_jax.training.saved_config import holds_run
from cassle_jax.training.state import TrainState, target_copies

# What ω is, and how it enters: arrays of other ones may fit, too.
_OMEGA = ("descriptors", "relative", "injection")


def warm_started(
    state: TrainState,
    settings: ConfigDict,
    encoder: nn.Module | None = None,
    stage: int = 0,
    conditioning: Conditioning | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """The first state of a run with the weights of `settings.path`, momentum networks included.

    Networks that the file lacks stay as they are; without a path, the whole state does.

    Args:
      state: the first state of the run.
      settings: the `weights` settings of the configuration.
      encoder: the run's encoder; a message names the settings of a ViT that do not fit the file.
      stage: the encoder's earlier stage that the run's conditioned heads see; 0 for the last one.
      conditioning: the conditioning of the run's heads; `None` to accept those of any.
      optimizer: the run's, whose state then begins at these weights; `None` keeps its state.

    Raises:
      ConfigError: the file cannot be read, or does not fit the run's networks.
    """
    if not settings.path:
        return state
    try:
        weights = load_weights(settings.path)
        if is_vit(weights.encoder):
            _check_vit(weights, encoder)
        if settings.networks == "encoder":
            weights = weights.encoder_alone()
        loaded = _loaded(weights, {"params": state.params, "batch_stats": state.batch_stats})
        _check_heads(weights, encoder, stage, conditioning)
    except WeightsError as error:
        raise ConfigError(
            f"weights.path={settings.path!r} cannot start this run: {error}"
        ) from error
    params = jax.tree.map(_placed, loaded["params"], state.params)
    batch_stats = jax.tree.map(_placed, loaded["batch_stats"], state.batch_stats)
    return state.replace(
        params=params,
        batch_stats=batch_stats,
        target_params=target_copies(params) if state.target_params else {},
        target_batch_stats=target_copies(batch_stats) if state.target_params else {},
        opt_state=_begun(optimizer, params, state.opt_state) if optimizer else state.opt_state,
    )


def check_weights_file(settings: ConfigDict, workdir: Path) -> None:
    """Refuses initial weights that are not there, unless a run in the workdir has taken them.

    Args:
      settings: the `weights` settings of the configuration.
      workdir: workdir of the run; need not exist.

    Raises:
      ConfigError: there is no such local file.
      OSError: it is out of reach.
    """
    if not settings.path or holds_run(epath.Path(workdir)):
        return
    if "://" in settings.path or not is_there(path := path_of(settings.path)) or path.is_dir():
        raise ConfigError(
            f"weights.path={settings.path!r} is not a local file; download the weights, or export "
            "those of a run, first"
        )


def _placed(value: np.ndarray | jax.Array, like: jax.Array) -> jax.Array:
    """The value on the devices of an array of its shape."""
    # device_put would send every array between the processes, to check that they agree.
    return jax.make_array_from_callback(like.shape, like.sharding, np.asarray(value).__getitem__)


def _begun(optimizer: optax.GradientTransformation, params: PyTree, like: PyTree) -> PyTree:
    """The optimiser's first state, placed as another one is.

    Some optimisers, such as MADGRAD, Prodigy and DoG, keep the weights that they start from.
    """

    def begin(params):
        # Copies, since a step may not be given the memory of one array twice.
        return jax.tree.map(jnp.copy, optimizer.init(params))

    return jax.jit(begin, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))(params)


def _check_vit(weights: Weights, encoder: nn.Module | None) -> None:
    """Refuses a ViT with other options or another number of heads, even where its arrays fit."""
    if not isinstance(encoder, VisionTransformer):
        return
    found = architecture_of(weights.encoder, weights.heads)
    fitting = {
        name: getattr(found, name) for name in ("patch_size", "registers", "swiglu", "rotary")
    }
    other = {name: value for name, value in fitting.items() if getattr(encoder, name) != value}
    if bool(encoder.layer_scale) != found.layer_scale:
        other["layer_scale"] = 1e-5 if found.layer_scale else 0.0
    if other:
        use = ", ".join(f"encoder.{name}={value}" for name, value in other.items())
        raise WeightsError(f"its ViT is of another kind than the run's; use {use}")
    if encoder.heads != found.heads:
        taken = "has" if weights.heads else "does not record its heads and is taken to have"
        raise WeightsError(
            f"its ViT {taken} {found.heads} heads, not {encoder.heads}; "
            f"use encoder.heads={found.heads}"
        )


def _check_heads(
    weights: Weights, encoder: nn.Module | None, stage: int, conditioning: Conditioning | None
) -> None:
    """Refuses heads of another stage, or trained with another ω, where their arrays fit."""
    recorded = weights.card.get("conditioning")
    if len(weights.networks) == 1 or not isinstance(recorded, Mapping):
        return
    theirs = recorded.get("stage", 0)
    found = 0 if theirs == len(getattr(encoder, "stage_widths", ())) else theirs
    if found != stage:
        raise WeightsError(
            f"its heads are of conditioning.stage={theirs}, not of the run's {stage}; use "
            "weights.networks='encoder'"
        )
    if conditioning is None or not conditioning.descriptors:
        return
    for name in _OMEGA:
        ours = getattr(conditioning, name)
        theirs = recorded.get(name, ours)
        same = ours == theirs
        if name == "descriptors":
            ours, theirs = sorted(ours), sorted(theirs)
            same = _components(ours) == _components(theirs)
        if not same:
            raise WeightsError(
                f"its heads were trained with conditioning.{name}={theirs}, not the run's {ours}; "
                "use weights.networks='encoder'"
            )


def _components(descriptors: Sequence[str]) -> list[str]:
    """The components that make up an ω, in its order: that of the names, then of the table.

    So `blur` is `blur.sigma`. The four components of `color`, named one by one, are not `color`:
    their alphabetical order puts hue before saturation.
    """
    of = {name: [f"{name}.{c}" for c in each.components] for name, each in DESCRIPTORS.items()}
    return [number for name in sorted(map(str, descriptors)) for number in of.get(name, [name])]


def _loaded(weights: Weights, variables: Variables) -> dict[str, Any]:
    """`variables` with the weights' values; the error says if only the heads do not fit."""
    try:
        return weights.into(variables)
    except WeightsError as error:
        try:
            weights.encoder_alone().into(variables)
        except WeightsError:
            raise error from None
        hint = "weights.networks='encoder' would take the encoder alone"
        raise WeightsError(f"{error}; {hint}") from error
