"""How large the work is that is measured, and the configurations and images it is done with."""

import dataclasses
import io
import os
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cassle_jax.config import ConfigError, base_config
from cassle_jax.data.families import open_drawn


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
      encoder: of the training step.
      size: pixels of its views.
      batch: its images.
      dtype: of its convolutions and products.
      views_size: pixels of the views where augmentation is measured alone.
      views_batch: images there.
      canvas: pixels of the canvases images are decoded into.
      steps: that one run of a contender takes.
      rounds: of all contenders.
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
          arguments: as `--config=…:arguments`.
          overrides: settings by full name, with `__` for the dots.
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
    """Random canvases with pictures of the shapes ImageNet has, as large as the canvas allows."""
    random = np.random.default_rng(0)
    long_side = min(canvas, 500)
    short_side = random.integers(long_side * 2 // 3, long_side + 1, batch)
    sizes = np.stack([short_side, np.full(batch, long_side)], 1).astype(np.int32)
    images = random.integers(0, 256, (batch, canvas, canvas, 3), np.uint8)
    return {"image": images, "size": sizes}


def workload_for(platform: str) -> Workload:
    """What suits a platform: the paper's on accelerators, what ends in minutes on CPUs."""
    if platform == "cpu":
        return Workload("resnet18", 64, 64, "float32", 224, 32, 512, 2, 7)
    return Workload("resnet50", 224, 256, "bfloat16", 224, 256, 512, 20, 7)


def jpegs_in(folder: Path) -> tuple[Path, ...]:
    """The JPEG files of a folder, at any depth.

    Raises:
      ConfigError: there is none.
    """
    files = [path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")]
    if not files:
        raise ConfigError(f"data={folder} has no .jpg or .jpeg files")
    return tuple(sorted(files))


def draw_jpegs(folder: Path, count: int) -> tuple[Path, ...]:
    """Writes drawn scenes as JPEGs of 500 × 375 pixels, as large as ImageNet's usual ones."""
    scenes = open_drawn("scenes", count, 128, "train")
    paths = []
    for index in range(count):
        # Noise, as a photograph has it: about 100 kB a file.
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
    """A folder of links to files in the layout `data.source=folder` reads, `<split>/<class>/`."""
    classes = where / "train" / "all"
    classes.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(files):
        (classes / f"{number:06}{path.suffix}").symlink_to(path.resolve())
    return where


def cpus() -> int:
    """The CPUs this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def devices() -> dict[str, object]:
    """What JAX computes on, and takes for this process with the question."""
    found = jax.devices()
    platform = jax.default_backend()
    return {"platform": platform, "device": found[0].device_kind, "devices": len(found)}
