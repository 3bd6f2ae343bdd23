"""Prepares a dataset: python -m cassle_jax.prepare --path=/data/imagenet --to=/data/prepared."""

import logging
import shlex

from absl import flags
from ml_collections import ConfigDict

from cassle_jax import command
from cassle_jax.checks import ConfigError
from cassle_jax.data.decode import MAX_PIXELS
from cassle_jax.prepare import Preparation, prepare

LOG = logging.getLogger("cassle_jax.prepare")

SOURCES = ("folder", "tfds", "webdataset")

if __name__ == "__main__":
    _source = flags.DEFINE_string("source", "folder", f"One of {', '.join(SOURCES)}.")
    _path = flags.DEFINE_string("path", "", "Folder of images or of tar files, or tfds' data_dir.")
    _name = flags.DEFINE_string("name", "", "Builder of --source=tfds.")
    _classes = flags.DEFINE_string("classes", "", "Classes to keep, as data.classes.")
    _splits = flags.DEFINE_list("splits", ["train"], "Splits to prepare.")
    _to = flags.DEFINE_string("to", "", "Folder of prepared datasets to write to.")
    _as = flags.DEFINE_string("as", "prepared", "Name of the prepared dataset.")
    _short_side = flags.DEFINE_integer("short_side", 256, "Largest short side, pixels.")
    _quality = flags.DEFINE_integer("quality", 90, "JPEG quality of larger images, 1 to 100.")
    _shard_mib = flags.DEFINE_integer("shard_mib", 128, "Size of a shard, MiB.")
    _max_pixels = flags.DEFINE_integer("max_pixels", MAX_PIXELS, "Largest image, pixels.")
    _bad = flags.DEFINE_float("max_bad_fraction", 0.01, "Largest unreadable fraction of a split.")
    _workers = flags.DEFINE_integer("workers", 0, "Number of processes; 0: one per CPU.")

    def main() -> None:
        """Prepares as the flags say, and prints how a run reads the result."""
        if _source.value not in SOURCES:
            raise ConfigError(f"--source={_source.value!r} is unknown; use {', '.join(SOURCES)}")
        data = {
            "source": _source.value,
            "path": _path.value,
            "name": _name.value,
            "classes": _classes.value,
            "scenes": 0,
            "canvas": 1,
            "max_pixels": _max_pixels.value,
        }
        how = Preparation(_as.value, _short_side.value, _quality.value, _shard_mib.value)
        folder = prepare(
            ConfigDict(data),
            _splits.value,
            _to.value,
            how,
            workers=_workers.value,
            max_bad_fraction=_bad.value,
        )
        LOG.info("%s is complete; a run reads it with", folder)
        options = {"source": "tfds", "name": how.name, "path": _to.value}
        settings = (f"--config.data.{name}={value}" for name, value in options.items())
        command.say(shlex.join(settings))

    command.run(main)
