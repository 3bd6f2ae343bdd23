"""Keeps the configuration in the workdir of a run, and refuses to continue with another."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from cassle_jax.checks import ConfigError, differing
from cassle_jax.config import base_config, flat_settings
from cassle_jax.storage import is_there, read_surely, read_whole, write_whole

# Settings that may differ when a run is continued: its results do not depend on them. Whether the
# images at another `data.path` are the same is decided by their names.
FREE_TO_CHANGE = (
    "log.",
    "probe.",
    "checkpoint.",
    "compilation_cache",
    "data.path",
    "data.threads",
    "data.cache_gib",
    "data.on_device",
    "data.max_bad_fraction",
)

# Settings that may differ between the hosts of a run.
FREE_TO_DIFFER = ("compilation_cache", "data.path", "data.threads", "data.cache_gib")

# Settings that no run can change: they decide the next images, or the objective.
NEVER_TO_CHANGE = (
    "seed",
    "batch_size",
    "method.name",
    "data.source",
    "data.name",
    "data.train_split",
    "data.classes",
    "data.scenes",
)


def check_unchanged(
    config: ConfigDict, workdir: epath.Path, *, accept_changes: bool = False
) -> list[str]:
    """Returns the changed settings of the run in the workdir, such as `steps=9 was 7`.

    Empty where the workdir holds no run. Settings that never affect a run's results are left out.

    Args:
      config: configuration of the run that is about to continue.
      workdir: workdir of the run.
      accept_changes: accepts changes with which the run can continue.

    Raises:
      ConfigError: there are changes, and the run cannot continue with them, or they are not
        accepted.
    """
    if not holds_run(workdir):
        return []
    try:
        differences = changes(read_config(workdir), config)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"workdir={workdir} has a config.json that is damaged ({error}); write the settings it "
            "was started with, or move its checkpoints away to start again"
        ) from error
    impossible = [change for name, change in differences.items() if name in NEVER_TO_CHANGE]
    if accept_changes and impossible:
        raise ConfigError(
            f"workdir={workdir} holds a run that cannot continue with {'; '.join(impossible)}; "
            "use another workdir, or the settings it was started with"
        )
    if differences and not accept_changes:
        hint = "" if impossible else ", or --accept_changes to continue with these"
        raise ConfigError(
            f"workdir={workdir} holds a run with other settings "
            f"({'; '.join(differences.values())}); use another workdir, or the settings it was "
            f"started with{hint}"
        )
    return list(differences.values())


def changes(before: ConfigDict, now: ConfigDict) -> dict[str, str]:
    """The settings that differ and affect a run's results, by name: `steps=9 was 7`.

    Args:
      before: settings read from a workdir; those that an older version lacked count as today's
        defaults.
      now: the settings today.
    """
    after = flat_settings(now)
    defaults = flat_settings(base_config(f"method={now.method.name}"))
    earlier = {name: defaults[name] for name in defaults.keys() & after.keys()}
    earlier |= flat_settings(before)
    return {
        name: f"{name}={after[name]!r} was {earlier.get(name)!r}"
        if name in after
        else f"{name}, which is unknown here, was {earlier[name]!r}"
        for name in differing_settings(earlier, after)
    }


def differing_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the settings that affect a run's results and are not equal; sorted."""
    return [name for name in differing(one, other) if not name.startswith(FREE_TO_CHANGE)]


def holds_run(workdir: epath.Path) -> bool:
    """Whether the workdir has a configuration and checkpoints; OSError where it is out of reach."""
    saved = workdir / "checkpoints"
    return is_there(workdir / "config.json") and is_there(saved) and any(saved.iterdir())


def shared_settings(config: ConfigDict) -> dict[str, Any]:
    """The settings that must be equal in all processes of a run, by their full names."""
    return {
        name: value for name, value in flat_settings(config).items() if name not in FREE_TO_DIFFER
    }


def write_config(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the configuration of a run to `<workdir>/config.json`, unless it is there already.

    Raises:
      OSError: it cannot be written; the earlier one is unchanged.
    """
    path = epath.Path(workdir, "config.json")
    content = json.dumps(config.to_dict(), indent=2).encode()
    if not is_there(path) or read_whole(path) != content:
        write_whole(path, content)


def read_config(workdir: epath.PathLike) -> ConfigDict:
    """The configuration a run was started with.

    Raises:
      ConfigError: the file is damaged.
      OSError, Outage: it cannot be read, for good or for now.
    """
    path = epath.Path(workdir, "config.json")
    try:
        settings = json.loads(read_surely(path))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
        return ConfigDict(settings)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
