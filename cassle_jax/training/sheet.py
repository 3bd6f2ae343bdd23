"""Draws the contact sheet of a run: what the network sees at its first step."""

from functools import partial

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from cassle_jax.augment import denormalize, describe
from cassle_jax.data import DamagedLog, Source, training_batches
from cassle_jax.report.contact_sheet import contact_sheet
from cassle_jax.training.run import Run
from cassle_jax.training.state import seed_keys
from cassle_jax.training.views import augmented_pair

IMAGES = 8


def write_contact_sheet(run: Run, source: Source, data: ConfigDict, path: epath.PathLike) -> None:
    """Writes a PNG of the first images, their two views and the descriptors drawn.

    Args:
      run: its seed and augmentations decide what is shown; these are the views of step 1.
      source: of the training images.
      data: the `data` settings of the configuration.
      path: of the PNG.
    """
    batches = training_batches(
        source,
        batch=run.batch_size,
        canvas=data.canvas,
        seed=run.seed,
        threads=data.threads,
        damaged=DamagedLog(len(source), data.max_bad_fraction),
    )
    batch = {name: values[:IMAGES] for name, values in next(batches).items()}

    @jax.jit
    def draw(key, images, sizes):
        pair = augmented_pair(jax.random.fold_in(key, 0), images, sizes, run.augment)
        return [
            (
                jax.vmap(partial(denormalize, spec=run.augment))(view.image),
                jax.vmap(partial(describe, spec=run.augment))(view),
            )
            for view in pair
        ]

    run_key, _, _ = seed_keys(run.seed)
    (first, first_descriptors), (second, second_descriptors) = jax.device_get(
        draw(run_key, batch["image"], batch["size"])
    )
    for name, drawn in (("solarize", run.augment.solarize), ("rotation", run.augment.rotation)):
        if not drawn:
            del first_descriptors[name], second_descriptors[name]
    images = [
        np.asarray(image[:height, :width])
        for image, (height, width) in zip(batch["image"], batch["size"], strict=True)
    ]
    contact_sheet(
        images,
        first,
        second,
        first_descriptors,
        second_descriptors,
        path,
        "Images, their two views, and the descriptors drawn",
    )
