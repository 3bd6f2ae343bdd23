"""Pretrains an encoder: python -m cassle_jax.pretrain --config=configs/… --workdir=… ."""

import logging
import os
from collections.abc import Iterable

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from cassle_jax import command
from cassle_jax.checks import ConfigError
from cassle_jax.config import FLAG_OPTIONS
from cassle_jax.distributed import all_processes
from cassle_jax.faults import FULL, passing
from cassle_jax.storage import cache_folder, check_no_file, is_utf8, path_of
from cassle_jax.training.checkpoints import NotSaved
from cassle_jax.training.idle import idle_settings
from cassle_jax.training.loop import Diverged, Preempted, pretrain
from cassle_jax.training.state import TrainState

LOG = logging.getLogger("cassle_jax.pretrain")  # also where this is the main module


def pretrain_command(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    accept_changes: bool = False,
    given: Iterable[str] = (),
) -> TrainState:
    """Pretrains as the command does, and returns the state after the last step.

    Args:
      config: a configuration, as from `base_config`.
      workdir: folder of the run, see `pretrain`.
      accept_changes: continues a run with changed settings or images, where that is possible.
      given: names of the settings that the user gave; a warning names those without effect.

    Raises:
      Stop: with the exit code for a run that diverged, was preempted or could not be saved.
      Outage: storage did not come back in time.
      ConfigError, DataError: a setting that cannot work.
    """
    set_up_devices(config)
    with all_processes(saves_when_stopped=True):
        for line in idle_settings(config, given):
            LOG.warning("%s", line)
        try:
            return pretrain(config, workdir, accept_changes=accept_changes)
        except Diverged as error:
            raise command.Stop(str(error), command.EXIT_DIVERGED) from error
        except Preempted as error:
            raise command.Stop(str(error), command.EXIT_PREEMPTED) from error
        except NotSaved as error:
            fault = passing(error)
            full = fault is None or fault.errno in FULL
            code = command.EXIT_NOT_SAVED if full else command.EXIT_OUTAGE
            raise command.Stop(str(error), code, alone=True) from error


def set_up_devices(config: ConfigDict) -> None:
    """Sets JAX's options for the whole process; call it before the first use of a device.

    Args:
      config: a configuration; `deterministic` and `compilation_cache` are read.

    Raises:
      ConfigError: `compilation_cache` cannot keep programs.
    """
    command.switch_64_bits_off()  # workers and other programs do not pass `command.run`
    if config.deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true"
    if config.compilation_cache:
        cache = _cache_of_programs(config.compilation_cache)
        if cache and not is_utf8(cache):
            raise ConfigError(
                f"compilation_cache={str(cache)!r} has bytes that are not UTF-8; use another, "
                "or '' for none"
            )
        if cache:
            check_no_file("compilation_cache", cache)
        jax.config.update("jax_compilation_cache_dir", str(cache) if cache else None)


def _cache_of_programs(chosen: str) -> epath.Path | None:
    """The folder of compiled programs; `None` where 'auto' has no home folder to be in."""
    if chosen != "auto":
        return path_of(chosen)
    try:
        return epath.Path(cache_folder() / "compiled")
    except ConfigError as error:
        LOG.warning("compiled programs are not kept: %s", error)
        return None


if __name__ == "__main__":
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "Configuration: a file or a name, with its arguments.", **FLAG_OPTIONS
    )
    workdir_flag = flags.DEFINE_string(
        "workdir", None, "Folder of the run; the same one continues it."
    )
    accept_flag = flags.DEFINE_bool(
        "accept_changes", False, "Continue a run although its settings or images have changed."
    )
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(
        lambda: pretrain_command(
            config_flag.value,
            workdir_flag.value,
            accept_changes=accept_flag.value,
            given=config_flags.get_override_values(flags.FLAGS["config"]),
        )
    )
