"""The SGD linear probe: a linear classifier on the frozen encoder, trained on augmented images."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cassle_jax.checks import WIDEST, check_at_least, check_positive, check_seed
from cassle_jax.data import Source
from cassle_jax.data.sources import labels_of
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.classifier import Training, measured_accuracies, train_classifier
from cassle_jax.evaluation.findings import Finding, Score
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Seeded, setting
from cassle_jax.evaluation.subject import Subject
from cassle_jax.evaluation.trainable import check_classes, fitting_batch, needs_of_training
from cassle_jax.methods.base import Schedule


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies of the SGD probe.

    Attributes:
      accuracy: share of the test images classified correctly, in [0, 1].
      class_average: the mean of that share over the classes of the test images.
      epochs: number of training epochs.
      batch: images per step; less than requested where there are fewer images.
      weights: the weights, per feature and class.
      biases: the biases, per class.
    """

    accuracy: float
    class_average: float
    epochs: int
    batch: int
    weights: Float32[np.ndarray, "features classes"]
    biases: Float32[np.ndarray, " classes"]

    def findings(self, dataset: str) -> list[Finding]:
        """Both accuracies."""
        return [
            Score(PROTOCOL.name, dataset, "accuracy", self.accuracy),
            Score(PROTOCOL.name, dataset, "mean per class", self.class_average),
        ]


def sgd_probe(
    subject: Subject,
    train: Source,
    test: Source,
    *,
    classes: int,
    mesh: Mesh,
    epochs: int = 100,
    batch: int = 256,
    learning_rate: float = 30.0,
    seed: int = 0,
    dtype: DTypeLike | None = None,
) -> ProbeResult:
    """Trains a linear classifier on frozen features by MoCo's protocol, and measures it.

    SGD with momentum 0.9 and no weight decay, ×0.1 at 60 % and 80 % of the epochs; random crops
    and flips; the encoder in evaluation mode. The accuracies are those after the last epoch.

    Args:
      subject: provides the encoder.
      train: labelled images to learn from.
      test: labelled images to measure on.
      classes: number of classes.
      mesh: the devices.
      epochs: number of epochs.
      batch: images per step, all devices together; with fewer training images, as many as the
        devices can share.
      learning_rate: the initial one for a batch of 256; it is scaled by batch / 256.
      seed: seed of the head's initial values, the order of the images and their augmentation.
      dtype: dtype of the encoder's products; `None` for bfloat16 on accelerators, float32 on CPUs.

    Raises:
      ValueError: before training, a setting out of its range, one class only, unlabelled images, a
        class that only the test images have, or a batch that the devices cannot share; during it, a
        loss that is not finite.

    References:
      He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020,
      section 4.1, and its published code.
    """
    check_at_least("epochs", epochs, 1, WIDEST)
    check_seed("seed", seed)
    check_positive("learning_rate", learning_rate)
    check_classes(train, test, labels_of(train), labels_of(test), classes)
    shared = fitting_batch(batch, len(train), mesh)
    steps = epochs * (len(train) // shared)
    rates = {"head": dropping(learning_rate * shared / 256, steps)}
    training = Training(rates, steps, shared, seed, dtype)
    variables = train_classifier(subject, train, training, classes=classes, mesh=mesh)
    found = measured_accuracies(
        subject, variables, test, classes=classes, batch=batch, mesh=mesh, dtype=dtype
    )
    weights, biases = (np.asarray(variables["params"]["head"][name]) for name in ("kernel", "bias"))
    return ProbeResult(found.top_1, found.class_average, epochs, shared, weights, biases)


def dropping(rate: float, steps: int) -> Schedule:
    """A learning rate that is divided by ten at 60 % and at 80 % of the steps."""

    def schedule(step) -> Float[Array, ""]:
        step = jnp.asarray(step)
        drops = (10 * step >= 6 * steps).astype(jnp.float32) + (10 * step >= 8 * steps)
        return rate * 0.1**drops

    return schedule


@dataclass(frozen=True)
class ProbeSettings(Seeded):
    """Settings of the protocol."""

    probe_epochs: int = setting(100, "Number of epochs.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least("probe_epochs", self.probe_epochs, 1, WIDEST)


def _run(bench: Bench, settings: ProbeSettings) -> list[Finding]:
    found = sgd_probe(
        bench.subject,
        bench.learnt_from(),
        bench.store.limited(bench.data.test),
        classes=bench.data.classes,
        mesh=bench.mesh,
        epochs=settings.probe_epochs,
        batch=bench.store.batch,
        seed=settings.seed,
    )
    return found.findings(bench.data.name)


PROTOCOL = Protocol(
    "sgd_probe",
    title="SGD probe",
    takes=("classification",),
    usual=(),
    needs=lambda _, devices: needs_of_training(devices),
    settings=ProbeSettings,
    run=_run,
)
