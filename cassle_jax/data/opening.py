"""Opens the source a config names."""

from typing import Any

from cassle_jax.data import folder, scenes
from cassle_jax.data.errors import DataError
from cassle_jax.data.sources import Source, closest


def open_source(data_config: Any, split: str) -> Source:
    """Opens one split of the dataset a config names.

    Args:
      data_config: the `data` settings of a configuration; read are
        source: 'scenes' (drawn, embedded), 'folder' or 'tfds'.
        name: tfds builder, for example 'stl10' or 'imagenet_resized/64x64'.
        path: root of the image folder, or tfds' data_dir ('' is tfds' default).
        classes: '' keeps all classes, 'imagenet100' the hundred of ImageNet-100, anything else is
        the path of a text file with one class name a line. Labels follow the list's order.
        scenes: number of scenes in the split 'train'.
        canvas: side of a scene, and the largest side of a decoded image, in pixels.
      split: 'train', 'test', … of a folder or of the scenes; for tfds anything it understands,
        such as 'train[:90%]' or 'train+unlabelled'.

    Returns:
      The source; no image has been read.

    Raises:
      DataError: a setting cannot work; the message names it and what would.
    """
    openers = {"scenes": _open_scenes, "folder": _open_folder, "tfds": _open_tfds}
    opener = openers.get(data_config.source)
    if opener is None:
        raise DataError(
            f"data.source={data_config.source!r} is unknown{closest(data_config.source, openers)}"
            f"; known: {', '.join(openers)}"
        )
    return opener(data_config, split)


def _open_scenes(data_config: Any, split: str) -> Source:
    if data_config.classes:
        raise DataError(
            f"data.classes={data_config.classes!r} means nothing to data.source='scenes'; use ''"
        )
    return scenes.open_scenes(data_config.scenes, data_config.canvas, split)


def _open_folder(data_config: Any, split: str) -> Source:
    return folder.open_folder(data_config.path, split, data_config.classes)


def _open_tfds(data_config: Any, split: str) -> Source:
    # tensorflow-datasets takes half a second to import: only its users wait for it.
    from cassle_jax.data import builder

    return builder.open_builder(data_config.name, data_config.path, split, data_config.classes)
