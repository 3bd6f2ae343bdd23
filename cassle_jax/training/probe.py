"""Looks at the features while a run goes on: k-NN accuracy and RankMe, every few epochs."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from cassle_jax.data import DamagedLog, Source, evaluation_batches, open_source
from cassle_jax.evaluation.features import feature_extractor
from cassle_jax.evaluation.knn import knn_accuracy
from cassle_jax.evaluation.spectrum import rank_me
from cassle_jax.training.run import Run
from cassle_jax.training.state import TrainState


class OnlineProbe:
    """Measures the features of a part of the dataset.

    Opening the splits happens here, so that a missing one is found before the run starts.

    Args:
      config: its `probe` and `data` settings.
      run: for networks and augmentation settings.
      mesh: the devices.
    """

    def __init__(self, config: ConfigDict, run: Run, mesh: Mesh):
        settings = config.probe
        self._limits = (settings.train_images, settings.test_images)
        self._sources = tuple(
            open_source(config.data, split)
            for split in (settings.train_split or config.data.train_split, settings.test_split)
        )
        self._batch = run.batch_size
        self._canvas = config.data.canvas
        self._threads = config.data.threads
        self._max_bad_fraction = config.data.max_bad_fraction
        self._extract = feature_extractor(
            run.networks, run.augment, run.conditioning.descriptors, mesh
        )

    def __call__(self, state: TrainState) -> dict[str, float]:
        """k-NN accuracy in [0, 1] and RankMe, from 1 to the width of the features."""
        (train, train_labels), (test, test_labels) = (
            self._features(state, source, limit)
            for source, limit in zip(self._sources, self._limits, strict=True)
        )
        return {
            "knn_accuracy": knn_accuracy(train, train_labels, test, test_labels),
            "rank_me": rank_me(test),
        }

    def _features(self, state: TrainState, source: Source, limit: int):
        batches = evaluation_batches(
            source,
            batch=self._batch,
            canvas=self._canvas,
            threads=self._threads,
            limit=limit,
            damaged=DamagedLog(len(source), self._max_bad_fraction),
        )
        return self._extract(state.params, state.batch_stats, batches)
