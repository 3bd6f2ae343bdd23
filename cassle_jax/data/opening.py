"""Opens the source a config names, and feeds a run from it."""

from typing import Any

import jax
from jax.sharding import Mesh

from cassle_jax.data import folder
from cassle_jax.data.damaged import DamagedLog
from cassle_jax.data.decode import allow_pixels
from cassle_jax.data.errors import DataError
from cassle_jax.data.families import FAMILIES, open_drawn
from cassle_jax.data.feed import DeviceFeed
from cassle_jax.data.pipeline import training_batches
from cassle_jax.data.resident import ResidentFeed, resident_bytes
from cassle_jax.data.sources import Source, closest
from cassle_jax.data.tar import open_tars
from cassle_jax.faults import retried

Feed = DeviceFeed | ResidentFeed

# Share of an accelerator's memory that images take on 'auto': the rest is for the step.
_RESIDENT_SHARE = 0.25


def open_source(data_config: Any, split: str) -> Source:
    """Opens one split of the dataset a config names.

    Args:
      data_config: the `data` settings of a configuration; these are read:
        source: 'motifs' or 'scenes' (drawn, embedded), 'folder', 'tfds' or 'webdataset'.
        name: tfds builder, for example 'stl10' or 'imagenet_resized/64x64'.
        path: root of the image folder, folder of the tar files, or tfds' data_dir ('' for tfds'
        default).
        classes: '' for all classes, a name in `CLASS_LISTS`, or the path of a text file with one
        class name per line. Labels follow the list's order.
        scenes: number of drawn images in the split 'train'.
        canvas: side of a drawn image, and the largest side of a decoded image, in pixels.
        max_pixels: largest number of pixels of an image, process-wide; see `allow_pixels`.
      split: 'train', 'test', … of a folder or of drawn images; for tfds any split expression,
        such as 'train[:90%]' or 'train+unlabelled'.

    Returns:
      The source; no image has been read.

    Raises:
      DataError: a setting cannot work; the message names it and what would work.
      Outage: storage was out of reach and did not come back in time.
    """
    openers = {
        **dict.fromkeys(FAMILIES, _open_drawn),
        "folder": _open_folder,
        "tfds": _open_tfds,
        "webdataset": _open_tars,
    }
    opener = openers.get(data_config.source)
    allow_pixels(data_config.max_pixels)
    if opener is None:
        raise DataError(
            f"data.source={data_config.source!r} is unknown{closest(data_config.source, openers)}"
            f"; known: {', '.join(openers)}"
        )
    return retried(f"data.source={data_config.source!r}", lambda: opener(data_config, split))


def open_feed(
    data_config: Any,
    source: Source,
    mesh: Mesh,
    *,
    batch: int,
    seed: int,
    damaged: DamagedLog,
    state: dict[str, int] | None,
) -> Feed:
    """Opens the batches of a run on its devices; they do not depend on where images are kept.

    Args:
      data_config: the `data` settings of a configuration; these are read:
        canvas: side of the square each image is decoded into, pixels.
        threads: number of threads that read and decode; 0 for half the CPUs.
        on_device: 'always' keeps all images on every device, 'never' sends each batch; 'auto' keeps
        them on accelerators where they take at most a quarter of the memory.
        cache_gib: memory of this process for images that stay, GiB, if batches are sent.
      source: the dataset.
      mesh: the devices, of all processes.
      batch: number of images in a global batch.
      seed: seed of the order.
      damaged: the log of this process's damaged records.
      state: the data state to continue from; `None` for the first step.

    Raises:
      DataError: the state belongs to another order.
    """
    settings = {
        "batch": batch,
        "canvas": data_config.canvas,
        "seed": seed,
        "damaged": damaged,
        "threads": data_config.threads,
    }
    if _is_resident(data_config, source, mesh):
        return ResidentFeed(source, mesh, **settings, state=state)
    batches = training_batches(
        source,
        **settings,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        cache_bytes=int(data_config.cache_gib * 2**30),
    )
    if state is not None:
        batches.set_state(state)
    return DeviceFeed(batches, mesh)


def _is_resident(data_config: Any, source: Source, mesh: Mesh) -> bool:
    if data_config.on_device != "auto":
        return data_config.on_device == "always"
    device = mesh.local_mesh.devices.flat[0]
    memory = device.memory_stats() if device.platform != "cpu" else None
    allowed = _RESIDENT_SHARE * (memory or {}).get("bytes_limit", 0)
    return resident_bytes(source, data_config.canvas) <= allowed


def _open_drawn(data_config: Any, split: str) -> Source:
    family = data_config.source
    if data_config.classes:
        raise DataError(
            f"data.classes={data_config.classes!r} does not go with data.source={family!r}; use ''"
        )
    return open_drawn(family, data_config.scenes, data_config.canvas, split)


def _open_folder(data_config: Any, split: str) -> Source:
    there = folder.split_there(data_config.path, split)
    return folder.open_folder(data_config.path, there, data_config.classes)


def _open_tars(data_config: Any, split: str) -> Source:
    if data_config.classes:
        raise DataError(
            f"data.classes={data_config.classes!r} chooses classes by name, and "
            "data.source='webdataset' has numbers alone; use ''"
        )
    return open_tars(data_config.path, split)


def _open_tfds(data_config: Any, split: str) -> Source:
    # tensorflow-datasets takes half a second to import: only its users wait for it.
    from cassle_jax.data import builder

    return builder.open_builder(data_config.name, data_config.path, split, data_config.classes)
