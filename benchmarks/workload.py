"""The size of the measured work, with its configurations and images."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cassle_jax.checks import ConfigError
from cassle_jax.config import base_config
from cassle_jax.data.families import open_drawn


@dataclasses.dataclass(frozen=True)
class Workload:
    """The size of all measurements.

    Attributes:
      encoder: encoder of the training step.
      size: side of the training step's views, in pixels.
      batch: batch size of the training step.
      dtype: type of convolutions and matrix products in the training step.
      views_size: side of the views in the measurement of augmentation alone, in pixels.
      views_batch: batch size in that measurement.
      canvas: side of the canvases for decoded images, in pixels.
      steps: number of steps per timed call.
      rounds: number of rounds.
      jpegs: files of the input pipeline.
    """

    encoder: str
    size: int
    batch: int
    dtype: str
    views_size: int
    views_batch: int
    canvas: int
    steps: int
    rounds: int
    jpegs: tuple[Path, ...] = ()

    def config(self, arguments: str, **overrides: object) -> ConfigDict:
        """The configuration of a run with this workload.

        Args:
          arguments: arguments of the configuration, as in `--config=…:arguments`.
          overrides: settings by full name, with `__` in place of dots.
        """
        config = base_config(arguments)
        config.batch_size = self.batch
        config.dtype = self.dtype
        config.encoder.name = self.encoder
        config.augment.size = self.size
        config.data.canvas = max(self.size, self.canvas * self.size // self.views_size)
        config.compilation_cache = ""
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
        return config


def synthetic_batch(batch: int, canvas: int) -> dict[str, np.ndarray]:
    """Random canvases with images of ImageNet's aspect ratios, as large as the canvas allows."""
    random = np.random.default_rng(0)
    long_side = min(canvas, 500)
    short_side = random.integers(long_side * 2 // 3, long_side + 1, batch)
    sizes = np.stack([short_side, np.full(batch, long_side)], 1).astype(np.int32)
    images = random.integers(0, 256, (batch, canvas, canvas, 3), np.uint8)
    return {"image": images, "size": sizes}


def workload_for(platform: str) -> Workload:
    """A workload that suits a platform: the paper's on accelerators, a few minutes on CPUs."""
    if platform == "cpu":
        return Workload("resnet18", 64, 64, "float32", 224, 32, 512, 2, 7)
    return Workload("resnet50", 224, 256, "bfloat16", 224, 256, 512, 20, 7)


def numbers_in(name: str, values: Sequence[str]) -> list[int]:
    """The numbers that a flag lists.

    Raises:
      ConfigError: a value is not a whole number of at least 1, or there is none.
    """
    if not values or not all(value.strip().isdecimal() and int(value) for value in values):
        raise ConfigError(f"{name}={','.join(values)} must list numbers of at least 1, such as 1,2")
    return [int(value) for value in values]


def jpegs_in(folder: Path) -> tuple[Path, ...]:
    """The JPEG files of a folder, at any depth.

    Raises:
      ConfigError: the folder has none.
    """
    files = [path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")]
    if not files:
        raise ConfigError(f"data={folder} has no .jpg or .jpeg files")
    return tuple(sorted(files))


def draw_jpegs(folder: Path, count: int) -> tuple[Path, ...]:
    """Writes rendered scenes as JPEGs of 500 × 375 pixels, a typical size in ImageNet."""
    scenes = open_drawn("scenes", count, 128, "train")
    paths = []
    for index in range(count):
        # Noise like a photograph's gives files of about 100 kB.
        pixels = np.asarray(Image.fromarray(scenes[index].image).resize((500, 375))).astype(int)
        noise = np.random.default_rng(index).normal(0, 12, pixels.shape)
        image = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
        image.save(buffer := io.BytesIO(), "JPEG", quality=90)
        path = folder / "train" / "scenes" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
        paths.append(path)
    return tuple(paths)


def folder_of(files: tuple[Path, ...], where: Path) -> Path:
    """Links files into a folder with the layout of `data.source=folder`, `<split>/<class>/`."""
    classes = where / "train" / "all"
    classes.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(files):
        (classes / f"{number:06}{path.suffix}").symlink_to(path.resolve())
    return where


def devices() -> dict[str, object]:
    """Platform, kind and number of JAX's devices; occupies them for this process."""
    found = jax.devices()
    platform = jax.default_backend()
    return {"platform": platform, "device": found[0].device_kind, "devices": len(found)}
