"""The table of protocols, and all their settings by name."""

from collections.abc import Iterable, Mapping
from typing import Any

from cassle_jax.checks import check_one_of
from cassle_jax.evaluation import (
    augmentation_probes,
    equivariance,
    factor_probes,
    few_shot,
    fine_tune,
    invariance,
    knn,
    leak,
    linear,
    matching,
    neighbours,
    regression,
    resampled,
    sgd_probe,
    spectrum,
)
from cassle_jax.evaluation.extraction import Extraction
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Setting, Settings, settings_of

PROTOCOLS: dict[str, Protocol] = {
    file.PROTOCOL.name: file.PROTOCOL
    for file in (
        linear,
        resampled,
        knn,
        few_shot,
        regression,
        factor_probes,
        equivariance,
        spectrum,
        neighbours,
        invariance,
        matching,
        augmentation_probes,
        leak,
        sgd_probe,
        fine_tune,
    )
}
"""The protocols by name, in the order in which they are run and reported."""


def title_of(task: str) -> str:
    """The heading of a task's section: the title of its protocol, or its own name without one."""
    return PROTOCOLS[task].title if task in PROTOCOLS else task


def check_tasks(tasks: Iterable[str]) -> None:
    """Raises ConfigError, with the closest known name, for an unknown task."""
    for task in tasks:
        check_one_of("tasks", task, PROTOCOLS)


def all_settings() -> dict[str, Setting]:
    """Every setting by name: those of the extraction, then those of the protocols."""
    return settings_of([Extraction, *(each.settings for each in PROTOCOLS.values())])


def protocols_with(name: str) -> list[str]:
    """The names of the protocols that have a setting."""
    return [each.name for each in PROTOCOLS.values() if name in settings_of([each.settings])]


def parsed_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the name of their setting; parses those that are texts.

    Raises:
      ConfigError: a name is unknown, or a text is not a value.
    """
    known = all_settings()
    for name in values:
        check_one_of("settings", name, known)
    return {name: known[name].parsed(value) for name, value in values.items()}


def checked_settings(values: Mapping[str, Any]) -> tuple[Extraction, dict[str, Settings]]:
    """The settings of the extraction and, by name, of every protocol; missing values are defaults.

    Args:
      values: from `parsed_settings`.

    Raises:
      ConfigError: a value is out of its range.
    """
    each = {name: protocol.settings.of(values) for name, protocol in PROTOCOLS.items()}
    return Extraction.of(values), each
