"""Fine-tunes the encoder with a linear head on a part of the labels, and measures both."""

import dataclasses
import logging
from dataclasses import dataclass

import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int

from cassle_jax.checks import WIDEST, ConfigError, check_at_least, check_positive, check_seed
from cassle_jax.data import Source
from cassle_jax.data.sources import labels_of
from cassle_jax.data.splits import Part, hashed_by_class
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.classifier import Training, measured_accuracies, train_classifier
from cassle_jax.evaluation.findings import Finding, Score
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Seeded, check_distinct, setting
from cassle_jax.evaluation.subject import Subject
from cassle_jax.evaluation.trainable import check_classes, fitting_batch, needs_of_training
from cassle_jax.methods.base import Schedule

LOG = logging.getLogger(__name__)

EPOCHS = 20
# As many as 20 epochs of 1 % of ImageNet; on a small dataset 20 epochs are a handful of steps.
LEAST_STEPS = 1000


@dataclass(frozen=True)
class Rates:
    """The initial learning rates of fine-tuning, for a batch of 256."""

    encoder: float
    head: float

    def schedules(self, batch: int, steps: int) -> dict[str, Schedule]:
        """Half a cosine from the rate for a batch of this size down to 0, by trained part."""
        return {
            part: optax.cosine_decay_schedule(rate * batch / 256, steps)
            for part, rate in vars(self).items()
        }


# SwAV's on ImageNet. SwAV gives none for all labels: as in SimCLR, they are those for 10 %.
FEW_LABELS, MANY_LABELS = Rates(0.02, 5.0), Rates(0.01, 0.2)
FEW = 0.03  # fractions up to it are nearer to 1 % than to 10 %


@dataclass(frozen=True)
class FineTuneResult:
    """Accuracies of a fine-tuned classifier.

    Attributes:
      fraction: share of the labels that was used.
      images: number of images trained on.
      steps: number of training steps.
      batch: images per step; less than requested where there are fewer images.
      accuracy: share of the test images classified correctly, in [0, 1].
      class_average: the mean of that share over the classes of the test images.
      top_5: share of the test images whose class is among the five most probable; `None` below ten
        classes.
    """

    fraction: float
    images: int
    steps: int
    batch: int
    accuracy: float
    class_average: float
    top_5: float | None

    def findings(self, dataset: str) -> list[Finding]:
        """All accuracies."""
        labels = f"{100 * self.fraction:g} % of the labels"
        scores = {
            "accuracy": self.accuracy,
            "mean per class": self.class_average,
            "top-5 accuracy": self.top_5,
        }
        return [
            Score(PROTOCOL.name, dataset, f"{name}, {labels}", value)
            for name, value in scores.items()
            if value is not None
        ]


def fine_tune(
    subject: Subject,
    train: Source,
    test: Source,
    *,
    classes: int,
    fraction: float,
    mesh: Mesh,
    epochs: int = 0,
    batch: int = 256,
    encoder_rate: float = 0.0,
    head_rate: float = 0.0,
    seed: int = 0,
    dtype: DTypeLike | None = None,
) -> FineTuneResult:
    """Trains the encoder and a linear head together on some of the labels, and measures them.

    SGD with momentum 0.9 and no weight decay, half a cosine down to 0, separate learning rates for
    encoder and head; random crops and flips; BatchNorm over the batches of all devices. The
    accuracies are those after the last step. The subject is not changed.

    Args:
      subject: provides the pretrained encoder.
      train: labelled images to take the subset from.
      test: labelled images to measure on.
      classes: number of classes.
      fraction: share of every class's images, in (0, 1], see `labelled_subset`.
      mesh: the devices.
      epochs: number of epochs; 0 for 20 epochs, but at least 1000 steps.
      batch: images per step, all devices together; with fewer training images, as many as the
        devices can share.
      encoder_rate: initial learning rate of the encoder for a batch of 256; it is scaled by
        batch / 256. 0 for SwAV's: 0.02 up to 3 % of the labels, 0.01 above.
      head_rate: initial learning rate of the head, scaled likewise. 0 for SwAV's: 5 up to 3 % of
        the labels, 0.2 above.
      seed: seed of the head's initial values, the order of the images and their augmentation; the
        subset does not depend on it.
      dtype: dtype of the encoder's products; `None` for bfloat16 on accelerators, float32 on CPUs.

    Raises:
      ValueError: before training, a setting out of its range, one class only, unlabelled images, a
        class that only the test images have, or a batch that the devices cannot share; during it, a
        loss that is not finite.

    References:
      Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments,
      2020, and its published code (epochs, batch, learning rates; there they fall in steps).
      Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020,
      section 5 (subsets balanced over the classes, crops and flips only).
    """
    _check_settings(fraction, epochs, encoder_rate, head_rate, seed)
    labels = labels_of(train)
    check_classes(train, test, labels, labels_of(test), classes)
    subset = Part(train, labelled_subset(labels, fraction), f"{100 * fraction:g} %")
    shared = fitting_batch(batch, len(subset), mesh)
    steps_per_epoch = len(subset) // shared
    steps = epochs * steps_per_epoch or max(EPOCHS * steps_per_epoch, LEAST_STEPS)
    LOG.info("fine-tuning on %d images, %d steps of %d", len(subset), steps, shared)
    usual = FEW_LABELS if fraction <= FEW else MANY_LABELS
    first = Rates(encoder_rate or usual.encoder, head_rate or usual.head)
    training = Training(first.schedules(shared, steps), steps, shared, seed, dtype)
    variables = train_classifier(subject, subset, training, classes=classes, mesh=mesh)
    found = measured_accuracies(
        subject, variables, test, classes=classes, batch=batch, mesh=mesh, dtype=dtype
    )
    return FineTuneResult(
        fraction=fraction,
        images=len(subset),
        steps=steps,
        batch=shared,
        accuracy=found.top_1,
        class_average=found.class_average,
        top_5=found.top_5,
    )


def labelled_subset(labels: Int[np.ndarray, " N"], fraction: float) -> Int[np.ndarray, " chosen"]:
    """Chooses the images that keep their labels: the same share of every class.

    A class with n images keeps round(fraction · n) of them, at least one. They are those with the
    smallest BLAKE2b digests (8 bytes) of their place in the dataset, as decimal ASCII. So every
    subject gets the same subset, and the subset of a smaller fraction lies within that of a larger
    one.

    Args:
      labels: labels of all images; images with a negative one are never chosen.
      fraction: share to keep, in (0, 1].

    Returns:
      Places in the dataset, ascending.
    """
    chosen = [
        places[: max(1, round(fraction * len(places)))]
        for places in hashed_by_class(labels).values()
    ]
    return np.sort(np.concatenate(chosen))


def _check_settings(
    fraction: float, epochs: int, encoder_rate: float, head_rate: float, seed: int
) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} is not in (0, 1]; 0.01, 0.1 and 1 are usual")
    check_at_least("epochs", epochs, 0, WIDEST)
    check_seed("seed", seed)
    for name, rate in (("encoder_rate", encoder_rate), ("head_rate", head_rate)):
        if rate:
            check_positive(name, rate)


@dataclass(frozen=True)
class FineTuneSettings(Seeded):
    """Settings of the protocol."""

    fractions: tuple[float, ...] = setting(
        (0.01, 0.1, 1.0), "Shares of the labels, each in (0, 1]; one result per share."
    )
    fine_tune_epochs: int = setting(0, "Number of epochs; 0: 20, but at least 1000 steps.")

    def __post_init__(self):
        super().__post_init__()
        check_distinct("fractions", self.fractions)
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ConfigError(f"fractions={fraction:g} is not in (0, 1]")
        check_at_least("fine_tune_epochs", self.fine_tune_epochs, 0, WIDEST)


def _run(bench: Bench, settings: FineTuneSettings) -> list[Finding]:
    results = [
        fine_tune(
            bench.subject,
            bench.learnt_from(),
            bench.store.limited(bench.data.test),
            classes=bench.data.classes,
            fraction=fraction,
            mesh=bench.mesh,
            epochs=settings.fine_tune_epochs,
            batch=bench.store.batch,
            seed=settings.seed,
        )
        for fraction in settings.fractions
    ]
    return [finding for result in results for finding in result.findings(bench.data.name)]


PROTOCOL = Protocol(
    "fine_tune",
    title="Fine-tuning",
    takes=("classification",),
    usual=(),
    needs=lambda settings, devices: dataclasses.replace(
        needs_of_training(devices), share=min(settings.fractions)
    ),
    settings=FineTuneSettings,
    run=_run,
)
