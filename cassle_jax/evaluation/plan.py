"""Decides which protocols run on which datasets, before an image is read."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cassle_jax.checks import ConfigError
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.evaluation.extraction import Extraction
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.protocols import PROTOCOLS, all_settings
from cassle_jax.evaluation.settings import Settings

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A protocol to run on a dataset.

    Attributes:
      data: the dataset.
      protocol: the protocol.
      settings: its settings.
      unmet: the first need that the dataset does not meet, in one line; "" where it meets all.
    """

    data: EvaluationData
    protocol: Protocol
    settings: Settings
    unmet: str

    def __str__(self) -> str:
        return f"{self.protocol.name} on {self.data.name}"


def plan(
    opened: Sequence[EvaluationData],
    tasks: Sequence[str],
    settings: Mapping[str, Settings],
    *,
    limit: int = 0,
    devices: int = 1,
) -> list[Planned]:
    """The protocols to run, dataset by dataset, in the order of the table of protocols.

    Logs the requested protocols that do not suit a dataset.

    Args:
      opened: the datasets.
      tasks: names of the requested protocols; empty for a dataset's usual ones.
      settings: settings of every protocol, by its name.
      limit: largest number of images per part; 0 for all.
      devices: number of devices.

    Raises:
      ConfigError: the requested protocols suit none of the datasets.
    """
    planned = [
        Planned(
            data,
            each,
            settings[each.name],
            each.unmet(data, settings[each.name], limit=limit, devices=devices),
        )
        for data in opened
        for each in _suiting(data, tasks)
    ]
    if opened and not planned:
        names = ", ".join(data.name for data in opened)
        raise ConfigError(
            f"tasks={','.join(tasks)} suit none of the datasets {names}; use tasks that do"
        )
    return planned


def warn_of_idle(values: Mapping[str, Any], planned: Sequence[Planned]) -> None:
    """Logs the settings that differ from their defaults and that no task uses."""
    groups = Extraction, *(each.settings for each in planned)
    used = {field.name for group in groups for field in dataclasses.fields(group)}
    known, tasks = all_settings(), ",".join(dict.fromkeys(each.protocol.name for each in planned))
    for name in sorted(values.keys() - used):
        if values[name] != known[name].default:
            LOG.warning("%s=%s has no effect with tasks=%s", name, values[name], tasks)


def warn_of_no_datasets(**given: Sequence[str]) -> None:
    """Logs options of an evaluation that are given without datasets."""
    for name, values in given.items():
        if values:
            LOG.warning("%s=%s has no effect without datasets", name, ",".join(values))


def _suiting(data: EvaluationData, tasks: Sequence[str]) -> list[Protocol]:
    suiting = [
        each
        for name, each in PROTOCOLS.items()
        if (not tasks or name in tasks) and each.suits(data, requested=bool(tasks))
    ]
    for name in sorted(set(tasks) - {each.name for each in suiting}):
        LOG.warning("%s is left out: it does not suit %s", name, data.name)
    return suiting
