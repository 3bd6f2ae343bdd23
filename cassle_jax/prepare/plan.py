"""Decides which images go into which shard, and whether they fit on the disk."""

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cassle_jax.checks import ConfigError
from cassle_jax.data import Source
from cassle_jax.data.reading import RecordReader, UnreadableRecord
from cassle_jax.data.sources import content_of
from cassle_jax.prepare.reencode import reencoded
from cassle_jax.storage import free_bytes, is_there, is_utf8, kept_json

PLAN = "prepared.json"
INFO = "dataset_info.json"  # what tensorflow-datasets reads first
_OF_SPLIT = ("source", "images")
_SAMPLE = 64  # images that are re-encoded to estimate the size
_MARGIN = 1.05  # factor on the estimate, for records' names and the files' indices


class Preparation(NamedTuple):
    """The settings that determine the prepared files.

    Attributes:
      name: name of the dataset that is written.
      short_side: largest short side of an image, pixels.
      quality: JPEG quality of images that are larger, 1 to 100.
      shard_mib: size of a shard to aim at, MiB.
    """

    name: str
    short_side: int = 256
    quality: int = 90
    shard_mib: int = 128


class Shard(NamedTuple):
    """One file of a split.

    Attributes:
      split: name of the split.
      path: path of the file.
      indices: places in the source of the images it holds.
    """

    split: str
    path: Path
    indices: range


def classes_of(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """The classes of all splits: the longest list, which begins with those of the other splits.

    Raises:
      ConfigError: two splits give one label to different classes, only some have labels, or a name
        is one that tensorflow-datasets cannot write.
    """
    most = max((source.class_names for source in sources.values()), key=len)
    for name in most:
        # A file holds one name per line, and its reader drops blanks around a name.
        if not is_utf8(name) or {"\n", "\r"} & {*name} or name != name.strip():
            raise ConfigError(
                f"--splits: class {name!r} has a line break, a blank at an end, or bytes that are "
                "not UTF-8, which tensorflow-datasets cannot keep; rename its folder"
            )
    for split, source in sources.items():
        names = source.class_names
        if most and not names:
            raise ConfigError(
                f"--splits: {split!r} has no labels, and another split has; prepare it apart, with "
                "another --as"
            )
        if names != most[: len(names)]:
            differs = next(a for a, b in zip(names, most, strict=False) if a != b)
            raise ConfigError(
                f"--splits: {split!r} has other classes than the rest, such as {differs!r}; a "
                "class needs a folder in every split; prepare others apart, with another --as"
            )
    return most


def plan_of(
    sources: Mapping[str, Source], folder: Path, preparation: Preparation, max_pixels: int
) -> dict[str, Any]:
    """The plan of the files to write, as JSON; an earlier call's where the folder has one.

    Raises:
      ConfigError: the folder holds another preparation, or a finished one of other images.
    """
    about = {
        **preparation._asdict(),
        "max_pixels": max_pixels,
        "classes": list(classes_of(sources)),
        "splits": {
            split: {
                "source": source.name,
                "images": len(source),
                "content": repr(content_of(source)),
            }
            for split, source in sources.items()
        },
    }
    earlier = kept_json(
        folder / PLAN, {"mean_bytes": {str: Real}, "splits": {str: dict}, "classes": [str]}
    )
    if earlier:
        _check_same(earlier, about, folder)
    if earlier and earlier["mean_bytes"].keys() == sources.keys():
        return {**about, "mean_bytes": earlier["mean_bytes"]}
    sizes = {split: _mean_size(source, preparation) for split, source in sources.items()}
    return {**about, "mean_bytes": sizes}


def _check_same(earlier: Mapping[str, Any], about: Mapping[str, Any], folder: Path) -> None:
    """Refuses to continue another preparation, or to change a finished one."""
    other = "choose another --to or --as, or remove the folder"
    was = _facts(earlier)
    for fact, now in _facts(about).items():
        if was.get(fact) != now:
            raise ConfigError(
                f"--to: {folder} was begun with {fact}={was.get(fact)}, and this is {now}; {other}"
            )
    for split, images in about["splits"].items():
        # Before it is finished, only the shards of changed images are written again.
        if images["content"] != earlier["splits"][split].get("content") and is_there(folder / INFO):
            raise ConfigError(
                f"--to: {folder} is finished, and images of split {split!r} have changed since; "
                f"{other}"
            )


def _facts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a continued preparation must share, each in a few words."""
    splits = plan["splits"]
    return {
        **{name: plan.get(name) for name in (*Preparation._fields, "max_pixels")},
        "splits": ",".join(sorted(splits)),
        **{f"{split}'s {fact}": splits[split].get(fact) for split in splits for fact in _OF_SPLIT},
        "classes": len(plan["classes"]),
        **{f"class {label}": name for label, name in enumerate(plan["classes"])},
    }


def shards_of(plan: Mapping[str, Any], folder: Path) -> list[Shard]:
    """The shards of a plan: equally many images each, in the order of their source."""
    shards = []
    for split, about in plan["splits"].items():
        images = about["images"]
        wanted = math.ceil(images * plan["mean_bytes"][split] / (plan["shard_mib"] << 20))
        count = min(max(wanted, 1), images)
        ends = [images * place // count for place in range(count + 1)]
        for place in range(count):
            name = f"{plan['name']}-{split}.array_record-{place:05d}-of-{count:05d}"
            shards.append(Shard(split, folder / name, range(ends[place], ends[place + 1])))
    return shards


def lacking_bytes(plan: Mapping[str, Any], folder: Path) -> tuple[float, float] | None:
    """Bytes that the folder still needs, and bytes free; `None` where these suffice."""
    free = free_bytes(folder)
    needed = _MARGIN * sum(
        plan["mean_bytes"][split] * about["images"] for split, about in plan["splits"].items()
    )
    needed -= sum(file.stat().st_size for file in folder.glob("*.array_record*"))
    return None if free is None or needed <= free else (needed, float(free))


def _mean_size(source: Source, preparation: Preparation) -> float:
    """Mean bytes of a re-encoded image, of images spread over the source."""
    decode = partial(reencoded, short_side=preparation.short_side, quality=preparation.quality)
    read, sizes = RecordReader(source, lambda _: False), []
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLE).astype(int)).tolist():
        with contextlib.suppress(UnreadableRecord):
            sizes.append(len(read(index, decode)[1]))
    return float(np.mean(sizes)) if sizes else 0.0
