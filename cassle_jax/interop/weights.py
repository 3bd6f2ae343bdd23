"""Reads a file of weights of any origin: an encoder and perhaps its heads."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from cassle_jax.checks import UserError
from cassle_jax.faults import reason_of, retried
from cassle_jax.interop.card import is_card
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.layouts import networks_in
from cassle_jax.interop.naming import from_detectron2, is_vit
from cassle_jax.interop.pytorch import (
    State,
    Variables,
    at_image_size,
    encoder_from_pytorch,
    encoder_to_pytorch,
    not_weights,
    predictor_from_pytorch,
    predictor_to_pytorch,
    projector_from_pytorch,
    projector_to_pytorch,
)
from cassle_jax.interop.torch_file import BEGIN, read_torch_file
from cassle_jax.storage import open_to_read, path_of

LOG = logging.getLogger(__name__)

FROM_PYTORCH = {
    "encoder": encoder_from_pytorch,
    "projector": projector_from_pytorch,
    "predictor": predictor_from_pytorch,
    "image_conditioner": projector_from_pytorch,
}
TO_PYTORCH = {
    "encoder": encoder_to_pytorch,
    "projector": projector_to_pytorch,
    "predictor": predictor_to_pytorch,
    "image_conditioner": projector_to_pytorch,
}
EXPORTED = tuple(TO_PYTORCH)  # the networks that files of weights hold, and evaluation uses
# The published checkpoints' name of the encoder.
PUBLISHED = {"encoder": "backbone"}


@dataclasses.dataclass(frozen=True)
class Weights:
    """An encoder's arrays, and those of the heads that came with it.

    Attributes:
        networks: the state per network, in the names of `interop.pytorch`, by this project's
            name of the network (`encoder`, `projector`, `predictor`, `image_conditioner`).
        ignored: names of everything else in the file.
        card: the origin of the weights as a model card describes it; empty where it is unknown.
        heads: number of attention heads of a ViT encoder; `None` where it is unknown.
        position_offset: a ViT encoder's, see `resize_positions`.
    """

    networks: Mapping[str, State]
    ignored: tuple[str, ...] = ()
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heads: int | None = None
    position_offset: float | None = None

    def __post_init__(self):
        if not self.networks.get("encoder"):
            raise WeightsError("there is no encoder")
        for network, state in self.networks.items():
            if problems := not_weights(state):
                raise WeightsError(f"its {network}: {problems[0]}")

    @property
    def encoder(self) -> State:
        """The encoder's state."""
        return self.networks["encoder"]

    @property
    def projector(self) -> State | None:
        """The projector's state; `None` without one."""
        return self.networks.get("projector")

    @property
    def predictor(self) -> State | None:
        """The predictor's state; `None` without one."""
        return self.networks.get("predictor")

    def into(self, variables: Variables) -> dict[str, Any]:
        """`variables` with the values of these weights, for every network that these have.

        Heads that the file lacks keep their values.

        Args:
            variables: `params` and `batch_stats`, each by network.

        Raises:
            WeightsError: an array is missing, unexpected or of another shape; the message names
                the network and each such array.
        """
        replaced = {collection: dict(networks) for collection, networks in variables.items()}
        for name, state in self.networks.items():
            if name not in variables["params"]:
                raise WeightsError(
                    f"the weights have a {name}, which this run lacks; choose the method and "
                    "conditioning they were trained with"
                )
            of_network = _of_network(variables, name)
            try:
                if name == "encoder":
                    state = at_image_size(state, of_network, self.position_offset)
                loaded = FROM_PYTORCH[name](state, of_network)
            except WeightsError as error:
                raise WeightsError(f"weights of the {name}: {error}") from error
            for collection, arrays in loaded.items():
                replaced[collection][name] = arrays
        return replaced

    def without(self, *names: str) -> "Weights":
        """These weights without the networks called `names`."""
        kept = {name: state for name, state in self.networks.items() if name not in names}
        return dataclasses.replace(self, networks=kept)

    def encoder_alone(self) -> "Weights":
        """These weights without any head."""
        return self.without(*(name for name in self.networks if name != "encoder"))

    def flat(self) -> State:
        """All arrays under the published checkpoints' names: `backbone.…`, `projector.…`, …."""
        return {
            f"{PUBLISHED.get(network, network)}.{name}": array
            for network, state in self.networks.items()
            for name, array in state.items()
        }


def weights_of(
    variables: Variables, card: Mapping[str, Any] | None = None, heads: int | None = None
) -> Weights:
    """The weights in `params` and `batch_stats`, each by network; other networks are ignored.

    Args:
        variables: `params` and `batch_stats`, each by network: `{"params": {"encoder": …}, …}`.
        card: facts to record beside them. Its `input` has the `size` of the images in pixels, and
            `mean` and `std`, which normalise them; without it, they are assumed.
        heads: number of attention heads of a ViT encoder.

    Raises:
        WeightsError: there is no encoder, or a network has arrays that are not weights.
    """
    names = variables["params"].keys()
    networks = {n: TO_PYTORCH[n](_of_network(variables, n)) for n in TO_PYTORCH if n in names}
    return Weights(networks, tuple(sorted(names - TO_PYTORCH.keys())), card or {}, heads)


def load_weights(path: str | Path, heads: int | None = None) -> Weights:
    """Reads a file of weights without running anything in it.

    The file may come from `cassle_jax.export`, hold a ResNet or ViT of torchvision or timm, or be a
    checkpoint of the projects that `layouts.KNOWN` names. It is a safetensors or a PyTorch file,
    whatever its name, of a model or of its `DataParallel` or compiled module.

    Args:
        path: path of the file.
        heads: number of a ViT's attention heads, where neither the file's card nor its origin has
            it.

    Raises:
        WeightsError: the file cannot be read, has no known encoder, or has weights that are not
            finite.
        Outage: it cannot be read for now.
    """
    if "://" in str(path):
        raise WeightsError(f"{path} is not a local file; download it first")
    path = Path(path_of(path))
    content, card = retried(str(path), partial(_read, path))
    try:
        weights = _weights(content)
        recorded = weights.heads or _recorded(card, "heads", int)
        offset = weights.position_offset
        if offset is None:
            offset = _recorded(card, "position_offset", float)
        if None not in (heads, recorded) and heads != recorded:
            raise WeightsError(f"heads={heads} differs from the {recorded} that it was made with")
        if heads is not None and not is_vit(weights.encoder):
            raise WeightsError(f"heads={heads} is for ViTs, and its encoder is not one")
        if weights.ignored:
            LOG.info("%s: not read: %s", path, ", ".join(weights.ignored))
        if unwritten := _all_zeros(weights):
            LOG.warning(
                "%s: only zeros in %d arrays, such as %s; if its download was interrupted, fetch "
                "it again",
                path,
                len(unwritten),
                unwritten[0],
            )
        heads = recorded or heads
        return dataclasses.replace(weights, card=card, heads=heads, position_offset=offset)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        with open_to_read(path) as file:
            size, begin = os.fstat(file.fileno()).st_size, file.read(BEGIN)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {reason_of(error)}") from error
    if path.suffix == ".json":
        raise WeightsError(
            f"{path} holds no weights but describes them; give the file beside it; join a "
            "model in parts into one file first (safetensors.numpy.save_file)"
        )
    is_safetensors = begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= size - 8
    if is_safetensors or path.suffix == ".safetensors":
        return _read_safetensors(path, begin)
    return read_torch_file(path), {}


def _read_safetensors(path: Path, begin: bytes) -> tuple[State, dict[str, Any]]:
    try:
        with safe_open(path, framework="np") as file:
            state = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118
            card = _card(path, (file.metadata() or {}).get("card", "{}"))
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {reason_of(error)}") from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged or no safetensors file ({error}): it begins with {begin}"
        ) from error
    half = ("float16", "bfloat16")
    return {k: v.astype(np.float32) if v.dtype.name in half else v for k, v in state.items()}, card


def _tensor(file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except AttributeError as error:  # numpy has no such type
        dtype = file.get_slice(name).get_dtype()
        raise WeightsError(f"{name} is stored as {dtype}; convert it to float32") from error


def _card(path: Path, text: str) -> dict[str, Any]:
    """The card in a file; empty where there is none."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError):
        card = None
    if is_card(card):
        return card
    LOG.warning("%s has a damaged model card, which is ignored", path)
    return {}


def _all_zeros(weights: Weights) -> list[str]:
    """Kernels and the like without a number but 0: a file of full size may lack its last part."""
    return [
        f"{network}.{name}"
        for network, state in weights.networks.items()
        for name, array in state.items()
        if array.ndim > 1 and array.size and not array.any()
    ]


def _recorded(card: Mapping[str, Any], name: str, kind: type) -> Any:
    """The entry `name` of a card's architecture; `None` where it has none of that kind."""
    architecture = card.get("architecture")
    value = architecture.get(name) if isinstance(architecture, Mapping) else None
    return value if isinstance(value, kind) else None


def _weights(content: Any) -> Weights:
    """The weights in the content of a file."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"it holds a {type(content).__name__}, not a state dict")
    try:
        if "__author__" in content:
            return Weights({"encoder": from_detectron2(_detectron2_arrays(content.get("model")))})
        networks, ignored, of_layout = networks_in(content)
        return Weights(networks, ignored, **of_layout)
    except UserError:
        raise
    except ValueError as error:
        raise WeightsError(f"its arrays do not fit each other: {error}") from error


def _detectron2_arrays(state: Any) -> State:
    if not isinstance(state, Mapping):
        raise WeightsError(f"it holds a {type(state).__name__} where a state dict should be")
    arrays = ((name, array) for name, array in state.items() if isinstance(array, np.ndarray))
    return {name: array for name, array in arrays if isinstance(name, str)}


def _of_network(variables: Variables, name: str) -> dict[str, Any]:
    """One network's variables, each collection it has."""
    found = {collection: networks.get(name, {}) for collection, networks in variables.items()}
    return {collection: arrays for collection, arrays in found.items() if jax.tree.leaves(arrays)}
