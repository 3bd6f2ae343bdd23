"""Exports weights: python -m cassle_jax.export --run=WORKDIR --to=FOLDER, or --weights=FILE."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from safetensors import SafetensorError

from cassle_jax import command
from cassle_jax.checks import ConfigError, check_one_of, naming
from cassle_jax.faults import reason_of, retried
from cassle_jax.interop.architecture import Architecture, architecture_of, check_arrays
from cassle_jax.interop.card import Card, file_card, is_card, markdown, with_encoder
from cassle_jax.interop.errors import WeightsError
from cassle_jax.interop.formats import FORMATS, USUAL
from cassle_jax.interop.weights import Weights, load_weights
from cassle_jax.lock import folder_held
from cassle_jax.storage import local_folder, path_of, remove_dead_partials, write_whole
from cassle_jax.training.run_weights import NETWORKS, read_run

LOG = logging.getLogger("cassle_jax.export")  # also where this is the main module

_FILES = (
    "model_card.json",
    "model_card.md",
    *(file for each in FORMATS.values() for file in each.files),
)


def export_command(
    *,
    run: str = "",
    weights: str = "",
    to: str,
    formats: Sequence[str] = (),
    network: str = "online",
    step: int | None = None,
    heads: int | None = None,
) -> None:
    """Exports as the command does.

    Args:
      run: workdir of the run to export; empty with `weights`.
      weights: a file to convert, that `load_weights` reads; empty with `run`.
      to: folder of the files; made where missing.
      formats: names in `FORMATS`; empty for the usual ones that can be written.
      network: network of a run, `online` or `momentum`.
      step: step of the run's checkpoint; `None` for the newest.
      heads: number of attention heads of a ViT, where its file does not give it.

    Raises:
      ConfigError: there is nothing to export, or a format cannot hold it.
    """
    if bool(run) == bool(weights):
        raise ConfigError("export needs one of --run=WORKDIR and --weights=FILE")
    if weights and (network != "online" or step is not None):
        raise ConfigError("--network and --step choose within a run; use them with --run=WORKDIR")
    if run and heads is not None:
        raise ConfigError("--heads is for a file; use it with --weights=FILE")
    folder = _checked(to, formats)
    check_one_of("network", network, NETWORKS)
    try:
        if run:
            read = read_run(run, network=network, step=step).in_pytorch()
            if read.ignored:
                LOG.warning("left out: %s", ", ".join(read.ignored))
        else:
            read = load_weights(weights, heads)
            read = dataclasses.replace(read, card=file_card(Path(path_of(weights)), read.card))
        export(read, folder, formats)
    except WeightsError as error:
        setting = "run" if run else "weights"
        raise ConfigError(naming(setting, run or weights, error)) from error


def export(weights: Weights, folder: Path | str, formats: Sequence[str] = ()) -> None:
    """Writes weights, and the model card they have, in each of `formats`.

    Args:
      weights: from `load_weights`, or for networks of your own from `weights_of`.
      folder: folder of the files; made where missing.
      formats: names in `FORMATS`; empty for the usual ones that can be written.

    Raises:
      ConfigError: it is no local folder, or a format is unknown.
      WeightsError: the encoder is unknown or does not fit a format; the folder cannot be written,
        or has files of another export; or the caller's own card cannot be written.
    """
    folder = _checked(folder, formats)
    architecture = architecture_of(weights.encoder, weights.heads, weights.position_offset)
    check_arrays(weights.encoder, architecture)
    formats = _that_fit(architecture, formats)
    _check_card(weights.card)
    card = with_encoder(weights.card, architecture, [*weights.networks])
    loading = {FORMATS[n].title: FORMATS[n].loading(architecture, card) for n in formats}

    def write() -> None:
        _check_renewed(folder, formats)
        for file in _FILES:  # a killed export's halves may fill the disk; this one holds the folder
            remove_dead_partials(folder, file, after=0.0)
        for name in formats:
            FORMATS[name].write(weights, architecture, card, folder)
        write_whole(folder / "model_card.json", json.dumps(card, indent=2))
        write_whole(folder / "model_card.md", markdown(card, loading))

    try:
        with folder_held(folder, setting="to", holder="export", leaves_file=False):
            retried(f"to={folder}", write)
    except (OSError, SafetensorError) as error:
        reason = reason_of(error)
        raise WeightsError(f"to={folder} cannot be written: {reason}") from error
    LOG.info("%s written to %s as %s", architecture.name, folder, ", ".join(formats))


def _checked(to: Path | str, formats: Sequence[str]) -> Path:
    """The folder to write to; refuses one that is not local, and unknown formats."""
    for name in formats:
        check_one_of("formats", name, FORMATS)
    return local_folder("to", to)


def _check_card(card: Card) -> None:
    """Refuses a card of the caller's own that could not be written or read again."""
    try:
        json.dumps(card)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the weights' card is not JSON: {error}") from error
    if not is_card(card):
        raise WeightsError(
            "the weights' card cannot be written: `method` needs all entries of a run, `input` a "
            "size, mean and std; leave them out"
        )


def _check_renewed(folder: Path, formats: Sequence[str]) -> None:
    """Refuses a folder in which files of an earlier export would stay beside the new card."""
    others = [name for name in FORMATS if name not in formats]
    stale = [file for name in others for file in FORMATS[name].files if (folder / file).exists()]
    if stale:
        raise WeightsError(
            f"to={folder} has {', '.join(stale)} of an earlier export, which would stay beside the "
            "new model card; export to another folder, or remove what is there"
        )


def _that_fit(architecture: Architecture, formats: Sequence[str]) -> list[str]:
    """The requested formats, or the usual ones that can be written."""
    fitting = []
    for name in formats or USUAL:
        try:
            FORMATS[name].check(architecture)
        except WeightsError as error:
            if formats:
                raise
            LOG.info("%s", error)
        else:
            fitting.append(name)
    return fitting


if __name__ == "__main__":
    run_flag = flags.DEFINE_string("run", "", "Workdir of the run to export.")
    weights_flag = flags.DEFINE_string("weights", "", "Or a file of weights to convert.")
    to_flag = flags.DEFINE_string("to", None, "Folder to write to.")
    formats_flag = flags.DEFINE_list(
        "formats",
        [],
        f"Formats to write; default: the usual ones. One or more of {', '.join(FORMATS)}.",
    )
    network_flag = flags.DEFINE_string(
        "network", "online", "Network to export: online, or momentum where there is one."
    )
    step_flag = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
    heads_flag = flags.DEFINE_integer(
        "heads", None, "Attention heads of a ViT whose file does not record them."
    )
    flags.mark_flags_as_required(["to"])
    command.run(
        lambda: export_command(
            run=run_flag.value,
            weights=weights_flag.value,
            to=to_flag.value,
            formats=formats_flag.value,
            network=network_flag.value,
            step=step_flag.value,
            heads=heads_flag.value,
        )
    )
