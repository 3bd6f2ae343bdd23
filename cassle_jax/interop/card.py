"""The model card: the origin of a set of weights, for people and for programs."""

import dataclasses
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cassle_jax.augment.spec import IMAGENET_MEAN, IMAGENET_STD, AugmentSpec
from cassle_jax.interop.architecture import Architecture, image_size
from cassle_jax.methods import AUXILIARIES
from cassle_jax.models.conditioning import is_conditioned
from cassle_jax.storage import open_to_read
from cassle_jax.versions import versions

Card = dict[str, Any]
# The metrics that a card shows, with their titles.
METRICS = {"loss": "Training loss", "knn_accuracy": "k-NN accuracy", "rank_me": "RankMe"}
# The assumed input of an encoder whose file says nothing about its images.
ASSUMED_INPUT = {
    "size": 224,
    "mean": list(IMAGENET_MEAN),
    "std": list(IMAGENET_STD),
    "assumed": True,
}


def run_card(
    config: ConfigDict,
    *,
    step: int,
    network: str,
    metrics: Mapping[str, Sequence[tuple[int, float]]],
    start: Mapping[str, Any],
) -> Card:
    """The card of a run's weights.

    Args:
        config: configuration of the run.
        step: number of training steps behind the weights.
        network: `online` or `momentum`.
        metrics: values by metric, as (step, value) in order.
        start: facts of the run's last start: `versions`, `devices`, `images`, and the method's
            `heads` and `views`, which evaluation needs.
    """
    last = {
        name: [(at, value) for at, value in values if at <= step][-1:]
        for name, values in metrics.items()
        if name in METRICS
    }
    data = config.data.to_dict()
    if data["source"] != "tfds":
        data["name"] = ""  # no other source reads the configuration's name
    dataset = {name: data[name] for name in ("source", "name", "train_split", "classes")}
    if "images" in start:
        dataset["images"] = start["images"]
    return {
        "method": config.method.name,
        "conditioning": config.conditioning.to_dict(),
        **{name: config[name].to_dict() for name in AUXILIARIES},
        "network": network,
        "step": step,
        "images_seen": step * config.batch_size,
        "epochs": config.epochs if not config.steps else None,
        "dataset": {name: value for name, value in dataset.items() if value != ""},
        "metrics": {name: {"step": v[0][0], "value": v[0][1]} for name, v in last.items() if v},
        "input": {
            "size": config.augment.size,
            "mean": list(config.augment.mean),
            "std": list(config.augment.std),
        },
        "devices": start.get("devices", "unknown"),
        "versions": start.get("versions", {}),
        **{name: start[name] for name in ("heads", "views") if name in start},
        "config": config.to_dict(),
    }


def file_card(path: Path, card: Mapping[str, Any]) -> Card:
    """The card of weights from a file, around the card that the file carries, if any."""
    with open_to_read(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    source = {"file": path.name, "sha256": digest}
    return {**card, "converted_from": source}


def with_encoder(
    card: Mapping[str, Any], architecture: Architecture, networks: Sequence[str]
) -> Card:
    """Adds the encoder's architecture, the networks and today's date to a card.

    A card without the images' size and normalisation gets the assumed ones.
    """
    known = {"input": ASSUMED_INPUT, "versions": versions(), **card}
    return {
        **known,
        "input": {**known["input"], "size": image_size(architecture, known["input"])},
        "encoder": architecture.name,
        "architecture": dataclasses.asdict(architecture),
        "feature_width": architecture.feature_width,
        "networks": sorted(networks),
        "exported": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def is_card(card: Any) -> bool:
    """Whether the card that a file carries has a card's entries."""
    try:
        card = {
            "input": ASSUMED_INPUT,
            "versions": {},
            **card,
            **{"encoder": "", "feature_width": 0, "networks": [], "exported": ""},
        }
        size, mean, std = (card["input"][name] for name in ("size", "mean", "std"))
        AugmentSpec(size, mean=tuple(mean), std=tuple(std))
        card.get("config", {}).keys()
        markdown(card, {})
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def markdown(card: Card, loading: Mapping[str, tuple[str, list[str]]]) -> str:
    """The card for people to read.

    Args:
        card: the card, as from `with_encoder`.
        loading: the language and the lines that load each format, by its title.
    """
    sections = [_front_matter(card), f"# {card['encoder']}, {_origin(card)}", _table(card)]
    size, mean, std = (card["input"][name] for name in ("size", "mean", "std"))
    are = "are assumed to be" if card["input"].get("assumed") else "are"
    sections.append(
        f"Images {are} RGB in [0, 1], {size}×{size} pixels in training, normalised by mean "
        f"{tuple(mean)} and standard deviation {tuple(std)}. In evaluation mode the model returns "
        f"{card['feature_width']} features per image." + _further_channels(card)
    )
    sections += ["## Loading"]
    for title, (language, lines) in loading.items():
        sections.append("\n".join([f"{title}:", "", f"```{language}", *lines, "```"]))
    if "config" in card:
        sections += ["## Configuration", "All settings of the run are in `model_card.json`."]
    return "\n\n".join(sections) + "\n"


def _further_channels(card: Card) -> str:
    """A sentence on the channels that the encoder takes beside the image's three."""
    channels = card.get("architecture", {}).get("channels", 3)
    if channels == 3:
        return ""
    if "image_conditioner" in card["networks"]:
        return (
            f" After the image's 3 channels the model takes {channels - 3} of ω, which the network "
            "image_conditioner makes; only cassle_jax's format has it."
        )
    return f" The model takes {channels} channels."


def _front_matter(card: Card) -> str:
    tags = [
        "self-supervised",
        "feature-extraction",
        *([card["method"]] if "method" in card else []),
    ]
    lines = ["---", "library_name: pytorch", "tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _origin(card: Card) -> str:
    if "method" not in card:
        source = card.get("converted_from")
        return f"converted from {source['file']}" if source else "of unknown origin"
    kind = "with CASSLE" if _descriptors(card["conditioning"]) else "plain"
    return f"pretrained by {card['method']}, {kind}"


def _table(card: Card) -> str:
    rows = _of_run(card) if "method" in card else {}
    if "converted_from" in card:
        source = card["converted_from"]
        rows["Converted from"] = f"{source['file']} (sha256 {source['sha256']})"
    rows["Networks"] = ", ".join(card["networks"])
    rows["Versions"] = _listed(card["versions"])
    rows["Exported"] = card["exported"]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {rows[name]} |" for name in rows)])


def _of_run(card: Card) -> dict[str, str]:
    conditioning = dict(card["conditioning"])
    descriptors = _descriptors(conditioning)
    del conditioning["descriptors"]
    planned = f" of a run of {card['epochs']} epochs" if card["epochs"] else ""
    rows = {
        "Method": card["method"],
        "Conditioned on": f"{descriptors} ({_listed(conditioning)})" if descriptors else "nothing",
        **{each.title: _auxiliary(card[n]) for n, each in AUXILIARIES.items() if n in card},
        "Network": card["network"],
        "Data": _listed(card["dataset"]),
        "Devices": card["devices"],
        "Step": f"{card['step']}{planned}, {card['images_seen']:,} images seen",
    }
    for name, title in METRICS.items():
        if name in card["metrics"]:
            metric = card["metrics"][name]
            rows[title] = f"{metric['value']:.4g} at step {metric['step']}"
    return rows


def _descriptors(conditioning: Mapping[str, Any]) -> str:
    """The descriptors that a run was conditioned on; empty for the plain method."""
    conditioned = is_conditioned(conditioning["treatment"], conditioning["injection"])
    return ", ".join(conditioning["descriptors"]) if conditioned else ""


def _auxiliary(settings: Mapping[str, Any]) -> str:
    """The settings of an auxiliary objective of weight above 0, without sizes of heads."""
    used = {n: value for n, value in settings.items() if n not in ("hidden", "out") and value}
    return _listed(used) if used and settings.get("weight") != 0 else "none"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
