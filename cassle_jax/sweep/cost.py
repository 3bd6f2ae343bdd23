"""Estimates the cost of a table: runs, steps, and GPU hours from one measured rate."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from cassle_jax.data import open_source
from cassle_jax.sweep.space import RunSpec
from cassle_jax.training.run import (
    augment_spec,
    build_auxiliaries,
    build_method,
    further_sizes,
    view_specs,
)

# Images/s measured on one H100: ResNet-50 at 224 pixels with MoCo-v2 and CASSLE, batch 256,
# bfloat16 (docs/performance.md).
RATE = 3780.0

# Number of training images of well-known datasets, by builder and classes.
_IMAGES = {
    ("imagenet2012", ""): 1_281_167,
    ("imagenet2012", "imagenet100"): 126_689,
    ("stl10", ""): 105_000,  # labelled and unlabelled
    ("cifar10", ""): 50_000,
}
# 10⁹ multiplications per image and forward pass at 224 pixels; proportional to the image's area.
_ENCODERS = {
    "resnet18": 1.82,
    "resnet34": 3.67,
    "resnet50": 4.1,
    "resnet101": 7.8,
    "resnet152": 11.5,
    "wide_resnet50_2": 11.4,
    "wide_resnet101_2": 22.8,
    "convnext_tiny": 4.5,
    "convnext_small": 8.7,
    "convnext_base": 15.4,
    "vit_tiny": 1.26,
    "vit_small": 4.6,
    "vit_base": 17.5,
    "vit_large": 61.6,
}
_SMALL_IMAGES = 15.0  # factor of the stem for small images
# Cost of a view in forward passes: the backward pass of the online network costs two more.
_ONLINE, _TARGET = 3, 1
_MEASURED = (_ONLINE + _TARGET) * _ENCODERS["resnet50"]


def images_of(config: ConfigDict) -> int:
    """The number of training images of a configuration; well-known datasets stay closed.

    Raises:
      DataError: the dataset is not a well-known one and cannot be opened.
    """
    data = config.data
    known = _IMAGES.get((data.name, data.classes)) if data.source == "tfds" else None
    return known or len(open_source(data, data.train_split))


def hours_of(config: ConfigDict, rate: float = RATE) -> float:
    """Estimates the GPU hours of a run from the measured rate and the encoder's multiplications.

    The estimate leaves out heads, input and evaluation, and takes all encoders as equally
    efficient.

    Args:
      config: configuration with a number of steps.
      rate: images/s of a ResNet-50 at 224 pixels with MoCo-v2.
    """
    method = build_method(config)
    sizes = [spec.size for spec in view_specs(config, method)]
    passes = (method.online_passes, _ONLINE), (method.target_passes, _TARGET)
    area = sum(
        cost * (sizes[view] / 224) ** 2
        for network, cost in passes
        for views in network
        for view in views
    )
    further = further_sizes(build_auxiliaries(config), augment_spec(config))
    area += _ONLINE * sum((size / 224) ** 2 for _, size in further)
    encoder = config.encoder
    work = area * _ENCODERS.get(encoder.name, _ENCODERS["resnet50"])
    work *= _SMALL_IMAGES if encoder.small_images else 1.0
    work *= (encoder.width / 64) ** 2 if encoder.width and "resnet" in encoder.name else 1.0
    return config.steps * config.batch_size * work / _MEASURED / rate / 3600


def cost_table(runs: Sequence[RunSpec], images: Sequence[int], rate: float) -> str:
    """Lists seeds, steps and GPU hours, one line per row, and the total.

    Args:
      runs: runs with their numbers of steps.
      images: number of training images per run.
      rate: see `hours_of`.
    """
    rows: dict[str, list[tuple[RunSpec, int]]] = {}
    for run, count in zip(runs, images, strict=True):
        rows.setdefault(run.subject, []).append((run, count))
    width = max(map(len, rows))
    lines, total = [], 0.0
    for subject, seeds in rows.items():
        config, count = seeds[0][0].config, seeds[0][1]
        hours = hours_of(config, rate)
        total += len(seeds) * hours
        epochs = config.steps / max(1, count // config.batch_size)
        lines.append(
            f"{subject:{width}}  {len(seeds)} × {config.steps} steps of {config.batch_size} images "
            f"({epochs:.3g} epochs): {_shown(hours)} per run"
        )
    lines.append(
        f"{len(runs)} runs, {_shown(total)} without evaluation, where a ResNet-50 at 224 px "
        f"with MoCo-v2 makes {rate:g} images/s"
    )
    return "\n".join(lines)


def _shown(hours: float) -> str:
    """The hours as text; below a hundredth, compiling takes longer than the steps."""
    return f"{hours:.3g} GPU hours" if hours >= 0.01 else "less than 0.01 GPU hours"
