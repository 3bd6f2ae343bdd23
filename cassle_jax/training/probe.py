"""Measures the features during a run: k-NN accuracy and RankMe, every few epochs."""

import logging

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from cassle_jax.data import DamagedLog, DataError, Source, evaluation_batches, open_source
from cassle_jax.evaluation.features import feature_extractor, repeated_rows
from cassle_jax.evaluation.knn import knn_accuracy
from cassle_jax.evaluation.spectrum import rank_me
from cassle_jax.training.run import Run
from cassle_jax.training.state import TrainState

LOG = logging.getLogger(__name__)

MEASURED = "rank_me"
"""The measurement that every probe makes."""


class FeatureReader:
    """Reads a dataset's features from a run's encoder.

    Args:
      config: configuration; only its `data` settings are read.
      run: provides networks and augmentation settings.
      mesh: the devices.
    """

    def __init__(self, config: ConfigDict, run: Run, mesh: Mesh):
        self._data = config.data
        self._batch, self._size = run.batch_size, run.augment.size
        self._extract = feature_extractor(run.networks, run.augment, run.conditioning.neutral, mesh)

    def __call__(
        self, state: TrainState, source: Source, limit: int = 0, damaged: DamagedLog | None = None
    ) -> tuple[Float[np.ndarray, "N F"], Int[np.ndarray, " N"]]:
        """Features and labels of at most `limit` images (0 for all), in the source's order.

        Damaged images are left out and recorded in `damaged` (by default a log of this call alone).
        """
        if damaged is None:
            damaged = DamagedLog(len(source), self._data.max_bad_fraction)
        batches = evaluation_batches(
            source,
            batch=self._batch,
            canvas=self._size,
            short_side=self._size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=self._data.threads,
            limit=limit,
            damaged=damaged,
        )
        try:
            features, labels, _ = self._extract(state.params, state.batch_stats, batches)
            return features, labels
        finally:
            batches.close()


class OnlineProbe:
    """Measures the features of a part of the dataset.

    The splits are opened here, so that a missing one is reported before the run starts.

    Args:
      config: configuration; only its `probe` and `data` settings are read.
      run: provides networks and augmentation settings.
      mesh: the devices.
    """

    def __init__(self, config: ConfigDict, run: Run, mesh: Mesh):
        train_split = config.probe.train_split or config.data.train_split

        def opened(setting, split, limit):
            try:
                source = open_source(config.data, split)
            except DataError as error:
                raise DataError(
                    f"{setting}={split!r} cannot be opened: {error}; "
                    "probe.every_epochs=0 needs none"
                ) from error
            return source, limit, DamagedLog(len(source), config.data.max_bad_fraction)

        test_split = config.probe.test_split
        self._train = opened("probe.train_split", train_split, config.probe.train_images)
        try:
            self._test = opened("probe.test_split", test_split, config.probe.test_images)
        except DataError:
            if _has_classes(self._train[0]):
                raise
            # RankMe needs no held-out images, and unlabelled datasets seldom have any.
            self._test = opened("probe.train_split", train_split, config.probe.test_images)
        for source, *_ in (self._train, self._test):
            if not _has_classes(source):
                LOG.info("measuring RankMe without k-NN accuracy: %s has no labels", source.name)
        self._compares = self._has_comparable_labels(test_split)
        _check_same_classes(self._train[0], self._test[0], test_split)
        self._read, self._compared = FeatureReader(config, run, mesh), False

    @property
    def sources(self) -> tuple[Source, Source]:
        """The training and the test images of the probe."""
        return self._train[0], self._test[0]

    def _has_comparable_labels(self, test_split: str) -> bool:
        """Whether both parts have labels, and are not the same images."""
        train, test = self.sources
        if not (_has_classes(train) and _has_classes(test)):
            return False
        if train.name == test.name:
            LOG.warning(
                "measuring RankMe without k-NN accuracy: probe.test_split=%r has the images of the "
                "training split, so the nearest neighbour of an image would be itself",
                test_split,
            )
        return train.name != test.name

    def __call__(self, state: TrainState) -> dict[str, float]:
        """k-NN accuracy in [0, 1], of held-out images with labels; RankMe, from 1 to the width."""
        test, test_labels = self._read(state, *self._test)
        measured = {MEASURED: rank_me(test)}
        train, train_labels = self._read(state, *self._train)
        if self._compares and min(train_labels.min(), test_labels.min()) >= 0:
            measured["knn_accuracy"] = knn_accuracy(train, train_labels, test, test_labels)
            self._warn_of_repeated(train, test)
        return measured

    def _warn_of_repeated(self, train: np.ndarray, test: np.ndarray) -> None:
        """Looks at the first features alone: warns of test images that seem to be learnt from."""
        if self._compared:
            return
        self._compared = True
        if repeated := repeated_rows([train], test):
            LOG.warning(
                "%d of the probe's %d test images have exactly the features of a training image; "
                "if these are the same images, k-NN accuracy is too high (probe.train_split, "
                "probe.test_split)",
                repeated,
                len(test),
            )


def _has_classes(source: Source) -> bool:
    """Whether the labels distinguish images; one folder of images is not a class."""
    return len(source.class_names) > 1


def _check_same_classes(train: Source, test: Source, test_split: str) -> None:
    """Refuses splits with different lists of classes, as labels are places in these lists."""
    different = sorted(set(train.class_names) ^ set(test.class_names))
    if _has_classes(train) and _has_classes(test) and different:
        raise DataError(
            f"probe.test_split={test_split!r} lacks the classes of the training split: "
            f"{different[0]!r} is in one of them only; make them equal, or use probe.every_epochs=0"
        )
