"""Reads the weights of a run from its newest checkpoint, with a card of their origin."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict

from cassle_jax.checks import first_line
from cassle_jax.faults import Outage, retried
from cassle_jax.interop.card import run_card
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.pytorch import Variables, check_fit
from cassle_jax.interop.weights import Weights, weights_of
from cassle_jax.models import make_encoder
from cassle_jax.storage import absolute, check_address, is_there, path_of
from cassle_jax.training.checksums import check_sums, checksums_of
from cassle_jax.training.metrics import read_metrics
from cassle_jax.training.quiet_orbax import abandoned_reads_silenced
from cassle_jax.training.recorded import todays_settings, with_defaults
from cassle_jax.training.saved_config import read_config
from cassle_jax.training.start_records import last_start_record

LOG = logging.getLogger(__name__)

# The parts of a run's state that hold its networks.
NETWORKS = {
    "online": ("params", "batch_stats"),
    "momentum": ("target_params", "target_batch_stats"),
}


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """The networks of a run as its checkpoint holds them.

    Attributes:
        variables: `params` and `batch_stats`, each by network.
        card: their origin as a model card describes it.
        heads: number of attention heads of a ViT encoder; `None` for a ResNet.
    """

    variables: Variables
    card: Mapping[str, Any]
    heads: int | None = None

    @property
    def networks(self) -> list[str]:
        """The networks' names."""
        return [*self.variables["params"]]

    def without(self, *names: str) -> "RunWeights":
        """These weights without the networks called `names`."""
        kept = {
            collection: {n: tree for n, tree in networks.items() if n not in names}
            for collection, networks in self.variables.items()
        }
        return dataclasses.replace(self, variables=kept)

    def into(self, variables: Variables) -> dict[str, Any]:
        """The values of these weights for every network of `variables`, arrays or shapes.

        Raises:
            WeightsError: an array is missing, unexpected or of another shape, or not finite.
        """
        taken = {
            collection: {name: self.variables[collection].get(name, {}) for name in networks}
            for collection, networks in variables.items()
        }
        shapes = {name: tuple(each.shape) for name, each in _by_name(variables).items()}
        check_fit(_by_name(taken), shapes, "the checkpoint")
        return taken

    def in_pytorch(self) -> Weights:
        """The same under PyTorch's names and in its layouts.

        Raises:
            WeightsError: there are weights that are not finite.
        """
        return weights_of(self.variables, self.card, self.heads)


def _by_name(variables: Variables) -> dict[str, Any]:
    return {".".join(path): array for path, array in flatten_dict(variables).items()}


def read_run(
    workdir: epath.PathLike, *, network: str = "online", step: int | None = None
) -> RunWeights:
    """Reads the weights of a run, whatever devices it ran on; its data is not needed.

    Args:
        workdir: workdir of the run.
        network: `online`, the trained networks, or `momentum`, their moving averages.
        step: step of the checkpoint; `None` for the newest readable one.

    Raises:
        WeightsError: there is no such run, checkpoint or network.
        ConfigError: see `check_address`.
    """
    check_address("run", workdir)
    workdir = absolute(path_of(workdir))
    if not retried(str(workdir), lambda: is_there(workdir / "config.json")):
        raise WeightsError(f"run={workdir} has no config.json; give the workdir of a run")
    with _damage_in_one_line(workdir):
        config = with_defaults(read_config(workdir))
        encoder = todays_settings(config)[0].encoder
        heads = getattr(make_encoder(**encoder.to_dict()), "heads", None)
        method = config.method.name
    step, variables = _newest(workdir / "checkpoints", NETWORKS[network], step)
    if not variables["params"]:
        raise WeightsError(
            f"network={network!r} is not in the run of {method} in {workdir}; use network=online"
        )
    with _damage_in_one_line(workdir):
        card = run_card(
            config,
            step=step,
            network=network,
            metrics=read_metrics(workdir),
            start=last_start_record(workdir, step),
        )
    return RunWeights(variables, card, heads)


@contextlib.contextmanager
def _damage_in_one_line(workdir: epath.Path):
    """Turns the errors of a damaged file into one line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"run={workdir} has a config.json or metrics.jsonl that is damaged or lacks something: "
            f"{error}"
        ) from error


def _newest(folder: epath.Path, names: tuple[str, str], step: int | None):
    """The step and variables of the checkpoint at `step`, or of the newest readable one."""
    steps = sorted(ocp.utils.checkpoint_steps(folder), reverse=True)
    if not steps:
        raise WeightsError(f"run={folder.parent} has no checkpoint yet")
    if step is not None and step not in steps:
        there = ", ".join(str(each) for each in reversed(steps))
        raise WeightsError(f"step={step} is not among the checkpoints of {folder.parent}: {there}")
    for each in steps if step is None else [step]:
        try:
            with abandoned_reads_silenced():
                read = partial(_restore, folder / str(each), names)
                return each, retried(f"checkpoint {each}", read)
        except Outage:
            raise
        except Exception as error:  # Orbax and TensorStore raise any type, by the damage.
            LOG.warning("checkpoint %d cannot be read: %s", each, first_line(error))
    if step is None and max(ocp.utils.checkpoint_steps(folder), default=0) > steps[0]:
        return _newest(folder, names, step)  # a run in progress has replaced them meanwhile
    there = "checkpoints, and none of them can" if step is None else f"step {step}, and it cannot"
    raise WeightsError(f"run={folder.parent} has {there} be read")


def _restore(checkpoint: epath.Path, names: tuple[str, str]) -> dict[str, dict]:
    """Two parts of a saved state as numpy arrays, under the names `params` and `batch_stats`."""
    state = checkpoint / "state"
    with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        data = handler.restore(checkpoint / "data", args=ocp.args.JsonRestore())
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        saved = handler.metadata(state).tree
        wanted = {name: saved[name] for name in names}
        if not wanted[names[0]]:
            return {"params": {}, "batch_stats": {}}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        arguments = ocp.args.PyTreeRestore(wanted, as_numpy, partial_restore=True)
        restored = handler.restore(state, args=arguments)
    check_sums(checksums_of({name: restored[name] for name in names}), data.get("checksums", {}))
    return {"params": restored[names[0]], "batch_stats": restored[names[1]]}
