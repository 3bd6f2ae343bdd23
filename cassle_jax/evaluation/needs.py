"""Requirements of a protocol on a dataset, checked before an image is read."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from cassle_jax.data import Source
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.data.pipeline import evenly_spaced
from cassle_jax.data.sources import DAMAGED, labels_of


@dataclasses.dataclass(frozen=True)
class Needs:
    """A protocol's least requirements on a dataset; 0 for none.

    Attributes:
      train, val, test: images per part.
      analysed: test images that an analysis looks at.
      labels: whether every image needs a label, and the images to learn from at least two classes.
      every_class: whether each class of the test images must occur in the images to learn from.
      neighbours: images to learn from, the training and the validation part together.
      devices: number of devices that share the images to learn from.
      share: smallest share of each class's images that is learnt from.
      ways: classes per episode.
      of_a_class: images per class that an episode takes.
    """

    train: int = 0
    val: int = 0
    test: int = 1
    analysed: int = 0
    labels: bool = False
    every_class: bool = False
    neighbours: int = 0
    devices: int = 0
    share: float = 1.0
    ways: int = 0
    of_a_class: int = 0

    def unmet(self, data: EvaluationData, *, limit: int = 0, analysed: int = 0) -> str:
        """The first need that the dataset does not meet, in one line; "" where it meets all.

        Args:
          data: the dataset; its labels are read only where they matter.
          limit: largest number of images per part; 0 for all.
          analysed: number of test images that analyses look at; 0 for all.
        """
        return next(self._too_few_images(data, limit, analysed), "") or next(
            self._wrong_labels(data, limit), ""
        )

    def _too_few_images(self, data: EvaluationData, limit: int, analysed: int) -> Iterator[str]:
        for part in ("train", "val", "test"):
            source, least = getattr(data, part), getattr(self, part)
            count = _at_most(len(source), limit) if source is not None else 0
            if count < least:
                yield _too_few(f"images in its {part} part", count, least, limit=limit)
        count = _at_most(_at_most(len(data.test), limit), analysed)
        if count < self.analysed:
            what = "test images to analyse"
            yield _too_few(what, count, self.analysed, limit=limit, analysed=analysed)

    def _wrong_labels(self, data: EvaluationData, limit: int) -> Iterator[str]:
        if not self.labels:
            return
        learnt = [part for part in (data.train, data.val) if part is not None]
        by_part = {part: _labels(part, limit) for part in (*learnt, data.test)}
        for part, labels in by_part.items():
            if unlabelled := int(np.sum(labels < 0)):
                yield f"images of {part.name} without a label: {unlabelled} of {len(labels)}"
        fitted = np.concatenate([by_part[part] for part in learnt] or [np.zeros(0, int)])
        if learnt:
            yield from self._wrong_to_learn_from(data, fitted, by_part[data.test], limit)
        # A few-shot dataset has only a test part.
        yield from self._no_episodes(np.concatenate([fitted, by_part[data.test]]), data, limit)

    def _wrong_to_learn_from(
        self, data: EvaluationData, fitted: np.ndarray, tested: np.ndarray, limit: int
    ) -> Iterator[str]:
        classes, counts = np.unique(fitted, return_counts=True)
        if len(np.unique(_labels(data.train, limit))) < 2:
            yield f"all images of {data.train.name} are of one class; two are needed"
        if len(fitted) < self.neighbours:
            count = len(fitted)
            yield f"neighbours={self.neighbours} is more than the {count} images to learn from"
        learnt = int(np.maximum(1, np.round(self.share * counts)).sum())
        if learnt < self.devices:
            yield _too_few("images to learn from", learnt, self.devices, limit=limit)
        unknown = sorted(set(tested.tolist()) - set(classes.tolist()))
        if self.every_class and unknown:
            names = ", ".join(repr(data.test.class_names[label]) for label in unknown[:3])
            yield f"classes of {data.test.name} without an image to learn from: {names}"

    def _no_episodes(self, labels: np.ndarray, data: EvaluationData, limit: int) -> Iterator[str]:
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < self.ways:
            yield f"ways={self.ways} is more than its {len(classes)} classes"
        if counts.size and counts.min() < self.of_a_class:
            fewest = int(np.argmin(counts))
            name = data.test.class_names[classes[fewest]]
            what = f"images of class {name!r} for shots + queries"
            yield _too_few(what, int(counts[fewest]), self.of_a_class, limit=limit)


def _at_most(count: int, limit: int) -> int:
    return min(count, limit) if limit else count


def _labels(source: Source, limit: int) -> Int[np.ndarray, " images"]:
    """Labels of the images that are read; the labels of damaged records are unknown."""
    labels = np.asarray(labels_of(source))[evenly_spaced(len(source), limit)]
    return labels[labels != DAMAGED]


def _too_few(what: str, count: int, least: int, **settings: int) -> str:
    """One line, with the settings that may be the cause."""
    chosen = ", ".join(f"{name}={value}" for name, value in settings.items() if value)
    return f"too few {what}: {count}; use at least {least}" + (f" ({chosen})" if chosen else "")
