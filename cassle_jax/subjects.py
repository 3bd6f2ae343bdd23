"""Opens what is to be evaluated: a run, what was exported of one, or an encoder of others."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from cassle_jax.augment import AugmentSpec
from cassle_jax.config import ConfigError
from cassle_jax.evaluation.subject import Subject
from cassle_jax.interop.architecture import architecture_of
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.weights import Weights, load_weights
from cassle_jax.methods import Networks, ViewBatch
from cassle_jax.methods.build import Conditioning
from cassle_jax.parallel import AXIS
from cassle_jax.training.run import augment_spec, build_method, networks_of, view_specs
from cassle_jax.training.run_weights import read_run
from cassle_jax.training.state import initial_variables

IMAGE_SIZE = 224  # of an encoder that comes without a word about it


def open_subject(path: epath.PathLike, *, name: str = "", network: str = "online") -> Subject:
    """The subject at `path`.

    Args:
      path: workdir of a run, or a file of weights: of an export, of torchvision, timm, MoCo-v3 or
        the published CASSLE code.
      name: for the report; empty for the path's last part.
      network: of a run: `online`, or `momentum` where there is one.

    Raises:
      ConfigError: it is not there, or holds no encoder that is known.
    """
    path = epath.Path(path)
    # A dot in a folder's name begins no suffix: runs/lr0.03 and runs/lr0.06 are not both `lr0`.
    name = name or (path.resolve().name if path.is_dir() else path.stem)
    if not path.exists():
        raise ConfigError(f"{path} is not there; give the workdir of a run or a file of weights")
    try:
        weights = read_run(path, network=network) if path.is_dir() else load_weights(str(path))
        if "config" in weights.card:
            return _of_run(name, weights)
        return _of_encoder(name, weights)
    except WeightsError as error:
        raise ConfigError(str(error)) from error


def _of_run(name: str, weights: Weights) -> Subject:
    config = ConfigDict(weights.card["config"])
    networks = networks_of(config, axis_name=AXIS)
    conditioning = Conditioning(**config.conditioning.to_dict())
    spec = augment_spec(config)
    shapes = _shapes(networks, spec.size, conditioning.size)
    known = [each for each in shapes["params"] if each in weights.networks]
    shapes = {part: {n: tree[n] for n in known if n in tree} for part, tree in shapes.items()}
    variables = _loaded(weights, shapes)
    views = view_specs(config, build_method(config))[:2]
    return Subject(name, networks, variables, spec, conditioning, views, weights.card)


def _of_encoder(name: str, weights: Weights) -> Subject:
    architecture = architecture_of(weights.encoder, weights.heads)
    networks = Networks({"encoder": partial(architecture.encoder, AXIS)})
    told = weights.card.get("input", {})
    size = getattr(architecture, "image_size", None) or told.get("size", IMAGE_SIZE)
    spec = AugmentSpec(size, **{k: tuple(told[k]) for k in ("mean", "std") if k in told})
    only_encoder = weights.without(*(each for each in weights.networks if each != "encoder"))
    variables = _loaded(only_encoder, _shapes(networks, size, 0))
    views = (spec, spec)
    return Subject(name, networks, variables, spec, Conditioning(()), views, weights.card)


def _shapes(networks: Networks, size: int, descriptor: int):
    """Shapes of all variables, those of the encoder alone where there is no projector."""
    view = ViewBatch(jnp.zeros((2, size, size, 3)), jnp.zeros((2, descriptor)))

    def make():
        key = jax.random.key(0)
        if "projector" in networks.factories:
            return initial_variables(networks, view, key)
        return networks.init(key, view, train=False, method="encode")

    return dict(jax.eval_shape(make))


def _loaded(weights: Weights, shapes) -> dict:
    return jax.tree.map(np.asarray, weights.into({"batch_stats": {}, **shapes}))
