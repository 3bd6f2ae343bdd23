"""Opens the subject of an evaluation: a run, an exported file, or another project's encoder."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import ConfigError, naming
from cassle_jax.config import flat_settings
from cassle_jax.evaluation.subject import Subject
from cassle_jax.faults import retried
from cassle_jax.interop.architecture import architecture_of, image_size
from cassle_jax.interop.weights import EXPORTED, Weights, load_weights
from cassle_jax.methods import Networks, ViewBatch
from cassle_jax.methods.build import Conditioning
from cassle_jax.parallel import AXIS
from cassle_jax.storage import check_address, is_there, path_of
from cassle_jax.training.recorded import RecordedMethod, method_of, todays_settings
from cassle_jax.training.run import augment_spec, networks_of, view_specs
from cassle_jax.training.run_weights import RunWeights, read_run
from cassle_jax.training.saved_config import differing_settings
from cassle_jax.training.state import initial_variables

LOG = logging.getLogger(__name__)


def open_subject(path: epath.PathLike, *, name: str = "", network: str = "online") -> Subject:
    """Opens the subject at `path`.

    Args:
      path: workdir of a run, or a file of weights that `load_weights` reads.
      name: name in the report; empty for the path's last part.
      network: network of a run: `online`, or `momentum` if the method has one.

    Raises:
      ConfigError: the path does not exist, holds no known encoder, or is an export of the trained
        networks where `momentum` is requested.
    """
    check_address("run", path)
    path = path_of(path)
    # A folder's name has no suffix; runs/lr0.03 and runs/lr0.06 must not both become `lr0`.
    name = name or (path.resolve().name if path.is_dir() else path.stem)
    if not retried(str(path), lambda: is_there(path)):
        raise ConfigError(
            f"run={path} does not exist; use the workdir of a run or a file of weights"
        )
    try:
        weights = read_run(path, network=network) if path.is_dir() else load_weights(str(path))
        _check_network(weights.card, network)
        if "config" in weights.card:
            return _of_run(name, weights)
        return _of_encoder(name, weights)
    except ValueError as error:
        raise ConfigError(naming("run", path, error)) from error


def _check_network(card: Mapping[str, Any], network: str) -> None:
    """Raises ValueError where momentum networks are requested, and a file says it holds others."""
    held = card.get("network", network)
    if network != "online" and held != network:
        raise ValueError(
            f"it holds the {held} network, not network={network}; give the run's workdir, or "
            f"export the run with --network={network}"
        )


def other_settings(first: Subject, other: Subject) -> list[str]:
    """The settings, and step and network, in which a subject's run differs from another's.

    Leaves out the seed. Empty where a file does not say how it was trained.
    """
    facts = [each.facts for each in (first, other)]
    if any("config" not in each for each in facts):
        return []
    one, two = (
        flat_settings(todays_settings(ConfigDict(each["config"]))[0])
        | {name: each.get(name) for name in ("step", "network")}
        for each in facts
    )
    return [
        f"{name}={two.get(name)!r} beside {one.get(name)!r}"
        for name in differing_settings(one, two)
        if name != "seed"
    ]


def _of_run(name: str, weights: Weights | RunWeights) -> Subject:
    config, gone = todays_settings(ConfigDict(weights.card["config"]))
    if gone:
        LOG.warning("%s: settings that this version lacks are left out: %s", name, ", ".join(gone))
    method = method_of(config, weights.card)
    if isinstance(method, RecordedMethod):
        weights = weights.without(*method.missing)
    networks = networks_of(config, method=method, axis_name=AXIS)
    conditioning = Conditioning(**config.conditioning.to_dict())
    spec = augment_spec(config)
    shapes = _shapes(networks, spec.size, conditioning.size)
    known = [n for n in shapes["params"] if n in weights.networks and n in EXPORTED]
    shapes = {part: {n: tree[n] for n in known if n in tree} for part, tree in shapes.items()}
    variables = _loaded(weights, shapes)
    views = view_specs(config, method)[:2]
    return Subject(name, networks, variables, spec, conditioning, views, weights.card)


def _of_encoder(name: str, weights: Weights) -> Subject:
    architecture = architecture_of(weights.encoder, weights.heads, weights.position_offset)
    networks = Networks({"encoder": partial(architecture.encoder, AXIS)})
    given = weights.card.get("input", {})
    size = image_size(architecture, given)
    spec = AugmentSpec(size, **{k: tuple(given[k]) for k in ("mean", "std") if k in given})
    variables = _loaded(weights.encoder_alone(), _shapes(networks, size, 0))
    views = (spec, spec)
    return Subject(name, networks, variables, spec, Conditioning(()), views, weights.card)


def _shapes(networks: Networks, size: int, descriptor: int):
    """Shapes of all variables, or of the encoder's alone if there is no projector."""
    view = ViewBatch(jnp.zeros((2, size, size, 3)), jnp.zeros((2, descriptor)))

    def make():
        key = jax.random.key(0)
        if "projector" in networks.factories:
            return initial_variables(networks, view, key)
        return networks.init(key, view, train=False, method="encode")

    return dict(jax.eval_shape(make))


def _loaded(weights: Weights | RunWeights, shapes) -> dict:
    return jax.tree.map(np.asarray, weights.into({"batch_stats": {}, **shapes}))
