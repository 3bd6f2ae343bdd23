"""Checks that a classifier can be trained on a dataset's images, and fits its batch to them."""

import logging

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from cassle_jax.checks import check_at_least
from cassle_jax.data import Source
from cassle_jax.data.sources import DAMAGED
from cassle_jax.evaluation.needs import Needs

LOG = logging.getLogger(__name__)


def needs_of_training(devices: int) -> Needs:
    """Requirements on a dataset of a protocol that trains on images."""
    return Needs(labels=True, every_class=True, devices=max(2, devices))


def check_classes(
    train: Source,
    test: Source,
    train_labels: Int[np.ndarray, " N"],
    test_labels: Int[np.ndarray, " M"],
    classes: int,
) -> None:
    """Checks that a classifier of `classes` classes can learn from `train` what `test` measures.

    Raises:
      ValueError: no images or no labels, labels outside the classes, one class only, or a class of
        the test images that no training image has.
    """
    check_at_least("classes", classes, 2)
    if train.class_names != test.class_names:
        raise ValueError(f"{train.name} and {test.name} do not have the same list of classes")
    for source, labels in ((train, train_labels), (test, test_labels)):
        readable = labels[labels != DAMAGED]
        if not len(readable):
            raise ValueError(f"{source.name} has no image that can be read")
        outside = readable[(readable < 0) | (readable >= classes)]
        if len(outside):
            raise ValueError(
                f"{source.name} has {len(outside)} images with labels such as {outside[0]}; "
                f"classes={classes} takes 0 to {classes - 1}"
            )
    known, tested = (set(labels[labels >= 0].tolist()) for labels in (train_labels, test_labels))
    if len(known) < 2:
        raise ValueError(f"{train.name} has images of one class only; at least two are needed")
    unknown = sorted(tested - known)
    if unknown:
        raise ValueError(
            f"{train.name} has no image of {len(unknown)} of the classes of {test.name}: "
            + ", ".join(repr(_class_name(train, label)) for label in unknown[:3])
        )


def _class_name(source: Source, label: int) -> str:
    return source.class_names[label] if label < len(source.class_names) else str(label)


def fitting_batch(batch: int, images: int, mesh: Mesh) -> int:
    """The batch, or with fewer images, as many as the devices can share equally.

    Raises:
      ValueError: the devices cannot share the batch, or there are more devices than images.
    """
    devices = mesh.size
    if batch < 2 or batch % devices:
        raise ValueError(
            f"batch={batch} cannot be split over {devices} devices; use a multiple of them, from 2"
        )
    if images >= batch:
        return batch
    fitting = images // devices * devices
    if fitting < 2:
        raise ValueError(
            f"the {images} training images are fewer than the {devices} devices; use more of the "
            "images or fewer devices"
        )
    LOG.warning("batch=%d is more than the %d images; taking %d", batch, images, fitting)
    return fitting
