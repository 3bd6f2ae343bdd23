"""What a table would cost: runs, steps, and GPU hours from one measured rate."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from cassle_jax.data import open_source
from cassle_jax.sweep.space import Run
from cassle_jax.training.run import build_method, view_specs

# What one H100 was measured at: images/s of a ResNet-50 at 224 pixels with MoCo-v2 and CASSLE,
# batch 256, bfloat16 (docs/performance.md).
RATE = 3780.0

# Training images of datasets that need not be here to be counted, by builder and classes.
_IMAGES = {
    ("imagenet2012", ""): 1_281_167,
    ("imagenet2012", "imagenet100"): 126_689,
    ("stl10", ""): 105_000,  # with the unlabelled ones
    ("cifar10", ""): 50_000,
}
# Multiplications of an image passing an encoder, in 10⁹ at 224 pixels; they grow with its area.
_ENCODERS = {
    "resnet18": 1.82,
    "resnet34": 3.67,
    "resnet50": 4.1,
    "vit_small": 4.6,
    "vit_base": 17.5,
}
_SMALL_IMAGES = 15.0  # times as many with the stem for small images
_TRAINED, _FOLLOWED = 3, 1  # passes that a view costs: forwards and twice that backwards, or once
_MEASURED = (_TRAINED + _FOLLOWED) * _ENCODERS["resnet50"]


def images_of(config: ConfigDict) -> int:
    """How many training images a configuration has; of well-known datasets without opening them.

    Raises:
      DataError: they are not known and cannot be opened.
    """
    data = config.data
    known = _IMAGES.get((data.name, data.classes)) if data.source == "tfds" else None
    return known or len(open_source(data, data.train_split))


def hours_of(config: ConfigDict, rate: float = RATE) -> float:
    """GPU hours of a run, as the measured rate and the encoder's multiplications have them.

    Heads, input and evaluation are not counted, and all encoders count as equally efficient.

    Args:
      config: with its number of steps.
      rate: images/s of a ResNet-50 at 224 pixels with MoCo-v2.
    """
    method = build_method(config)
    sizes = [spec.size for spec in view_specs(config, method)]
    passes = (method.online_passes, _TRAINED), (method.target_passes, _FOLLOWED)
    area = sum(
        cost * (sizes[view] / 224) ** 2 for each, cost in passes for views in each for view in views
    )
    encoder = config.encoder
    work = area * _ENCODERS.get(encoder.name, _ENCODERS["resnet50"])
    work *= _SMALL_IMAGES if encoder.small_images else 1.0
    work *= (encoder.width / 64) ** 2 if encoder.width and encoder.name[:3] == "res" else 1.0
    return config.steps * config.batch_size * work / _MEASURED / rate / 3600


def cost_table(runs: Sequence[Run], images: Sequence[int], rate: float) -> str:
    """A line a row: its seeds, steps, and GPU hours; and all of it.

    Args:
      runs: with their numbers of steps.
      images: of each, for training.
      rate: see `hours_of`.
    """
    rows: dict[str, list[tuple[Run, int]]] = {}
    for run, count in zip(runs, images, strict=True):
        rows.setdefault(run.subject, []).append((run, count))
    width = max(map(len, rows))
    lines, total = [], 0.0
    for subject, each in rows.items():
        config, count = each[0][0].config, each[0][1]
        hours = hours_of(config, rate)
        total += len(each) * hours
        epochs = config.steps / max(1, count // config.batch_size)
        lines.append(
            f"{subject:{width}}  {len(each)} × {config.steps} steps of {config.batch_size} images "
            f"({epochs:.3g} epochs): {hours:.3g} GPU hours each"
        )
    lines.append(
        f"{len(runs)} runs, {total:.3g} GPU hours without evaluation, where a ResNet-50 at 224 px "
        f"with MoCo-v2 makes {rate:g} images/s"
    )
    return "\n".join(lines)
