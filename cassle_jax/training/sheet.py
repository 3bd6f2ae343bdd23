"""Draws the contact sheet of a run: the network's inputs at its first step."""

from functools import partial

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from cassle_jax.augment import DESCRIPTORS, RARE, denormalize, describe
from cassle_jax.data import DamagedLog, Source, training_batches
from cassle_jax.methods.views import augmented_views
from cassle_jax.training.run import Run
from cassle_jax.training.state import seed_keys

IMAGES = 8

Described = tuple[Float[np.ndarray, "N S S 3"], dict[str, np.ndarray]]


def first_views(
    run: Run, source: Source, data: ConfigDict
) -> tuple[list[UInt8[np.ndarray, "_ _ 3"]], Described, Described]:
    """The first images of a run and their views at its first step, as pictures with descriptors.

    Args:
      run: the run, whose seed and augmentations decide the views.
      source: the training images.
      data: the `data` settings of the configuration.

    Returns:
      The images, and for each of the two views the pictures in [0, 1] with all their descriptors.
    """
    batches = training_batches(
        source,
        batch=min(IMAGES, len(source)),  # the order does not depend on it
        canvas=data.canvas,
        seed=run.seed,
        threads=data.threads,
        damaged=DamagedLog(len(source), data.max_bad_fraction),
    )
    batch = next(batches)
    batches.close()
    images = [
        image[:height, :width]
        for image, (height, width) in zip(batch["image"], batch["size"], strict=True)
    ]

    @jax.jit
    def draw(key, images, sizes):
        step_key = jax.random.fold_in(key, 0)
        views = augmented_views(step_key, images, sizes, run.views, paired=run.paired)
        return [
            (
                jax.vmap(partial(denormalize, spec=spec))(view.image),
                jax.vmap(partial(describe, spec=spec))(view),
            )
            for view, spec in zip(views[:2], run.views[:2], strict=True)
        ]

    run_key, _, _ = seed_keys(run.seed)
    views = jax.device_get(draw(run_key, batch["image"], batch["size"]))
    return images, *((image, _shown(described, run)) for image, described in views)


def _shown(described: dict[str, np.ndarray], run: Run) -> dict[str, np.ndarray]:
    """The descriptors that carry information of their own in this run."""
    return {
        name: values
        for name, values in described.items()
        if not (each := DESCRIPTORS[name]).restates
        and (each.setting not in RARE or run.draws(each.setting))
    }


def write_contact_sheet(run: Run, source: Source, data: ConfigDict, path: epath.PathLike) -> None:
    """Writes `first_views` as a PNG at `path`."""
    from cassle_jax.report.contact_sheet import contact_sheet  # Matplotlib delays every command

    images, (first, first_descriptors), (second, second_descriptors) = first_views(
        run, source, data
    )
    contact_sheet(
        images,
        first,
        second,
        first_descriptors,
        second_descriptors,
        path,
        "Images, their two views, and the descriptors drawn",
    )
