"""Every protocol by its name: the datasets it takes, and how it runs on one."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh

from cassle_jax.data import Drawn, Source, decode
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.data.landmarks import TargetSource
from cassle_jax.data.splits import Crops, Joined, Part
from cassle_jax.evaluation.augmentation_probes import FEWEST_IMAGES as PROBED_IMAGES
from cassle_jax.evaluation.augmentation_probes import augmentation_prober
from cassle_jax.evaluation.factor_probes import group_means, probe_factors
from cassle_jax.evaluation.features import view_extractor
from cassle_jax.evaluation.few_shot import QUERIES, few_shot
from cassle_jax.evaluation.findings import Chart, Finding, Pixels, Score
from cassle_jax.evaluation.fine_tune import fine_tune
from cassle_jax.evaluation.invariance import invariance_meter
from cassle_jax.evaluation.knn import knn_evaluation
from cassle_jax.evaluation.leak import FEWEST_IMAGES as LEAK_IMAGES
from cassle_jax.evaluation.leak import leak_of, pictures_of
from cassle_jax.evaluation.linear import linear_evaluation
from cassle_jax.evaluation.matching import ViewMatcher
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.neighbours import nearest
from cassle_jax.evaluation.projection import encoder_takes_omega, projector_takes_omega
from cassle_jax.evaluation.regression import regression
from cassle_jax.evaluation.resampled import resampled_linear_evaluation
from cassle_jax.evaluation.sgd_probe import sgd_probe
from cassle_jax.evaluation.spectrum import alignment_and_uniformity, lidar, spectrum
from cassle_jax.evaluation.store import (
    Features,
    FeatureStore,
    computed_on,
    described,
    uncropped_side,
)
from cassle_jax.evaluation.subject import Subject
from cassle_jax.evaluation.views import protocol_key
from cassle_jax.versions import code_fingerprint

LOG = logging.getLogger(__name__)

GALLERY_QUERIES, GALLERY_NEIGHBOURS = 8, 6
THUMBNAIL = 96  # pixels
LIDAR_IMAGES, LIDAR_VIEWS = 1000, 10  # the paper takes 50 views, which changes little and costs 5×


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the protocols that a user may choose.

    Attributes:
      analysed: number of images that invariance, matching, leak and augmentation probes look at; 0
        for all.
      shots: images per class that few-shot fits to; one result per value.
      ways: classes per few-shot episode.
      episodes: number of few-shot episodes.
      neighbours: k of k-NN.
      fractions: shares of the labels for fine-tuning; one result per value.
      probe_epochs: epochs of the SGD probe.
      fine_tune_epochs: epochs of fine-tuning; 0 for its default, which depends on the fraction.
      seed: seed of all random draws.
      size: side of the images, pixels; 0 for that of the encoder's training.
      mean: mean per channel, subtracted from an image in [0, 1]; empty for training's.
      std: standard deviation per channel, which divides the image; empty for training's.
    """

    analysed: int = 2000
    shots: tuple[int, ...] = (1, 5)
    ways: int = 5
    episodes: int = 2000
    neighbours: int = 1
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    probe_epochs: int = 100
    fine_tune_epochs: int = 0
    seed: int = 0
    size: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Bench:
    """One subject on one dataset, with what the protocols share.

    Attributes:
      subject: the evaluated networks.
      data: the dataset.
      store: the subject's features.
      mesh: the devices.
      settings: the settings that the user chose.
    """

    subject: Subject
    data: EvaluationData
    store: FeatureStore
    mesh: Mesh
    settings: Settings

    def identity(self, *how: int) -> str:
        """All that the results depend on except the task: weights, images, settings, devices, code.

        Args:
          how: further settings that do not belong to the protocols.
        """
        parts = (self.data.train, self.data.val, self.data.test)
        images = [None if part is None else described(part) for part in parts]
        data = self.data.name, self.data.task, self.data.metric, self.data.ten_crops
        devices = self.mesh.size, computed_on(self.mesh)
        weights = self.subject.whole_fingerprint()
        return repr((weights, data, images, self.settings, how, devices, code_fingerprint()))

    @cached_property
    def train(self) -> Features:
        """Features of the training part."""
        return self.store(self.data.train)

    @cached_property
    def val(self) -> Features:
        """Features of the validation part."""
        return self.store(self.data.val)

    @cached_property
    def test(self) -> Features:
        """Features of the test part."""
        return self.store(self.data.test)

    def cropped(self) -> list[Features]:
        """Features of the three parts, as linear evaluation takes them.

        Where the dataset calls for ten crops, the crops of every image to fit are separate rows,
        and a test image is the centre of an image resized alike.
        """
        data, size = self.data, self.subject.spec.size
        if not data.ten_crops:
            return [self.train, self.val, self.test]
        side = uncropped_side(size)
        ten = [Crops(part, size, side, ten=True) for part in (data.train, data.val)]
        return [*map(self.store, ten), self.store(data.test, side)]

    def once(self, make: Callable, *arguments):
        """The result of `make` for the subject, made for one dataset and kept for the others."""
        programs = self.store.programs
        if make.__name__ not in programs:
            programs[make.__name__] = make(*arguments, self.mesh)
        return programs[make.__name__]

    def learnt_from(self) -> Source:
        """The images of `fitted`, for protocols that train on images and choose nothing."""
        parts = (self.store.limited(part) for part in (self.data.train, self.data.val))
        return Joined(*parts)

    @property
    def fitted(self) -> list[Features]:
        """Features of the parts that a classifier may learn from."""
        return [self.train, self.val]

    def analysed(self):
        """Batches of the test images that the analyses look at, in one random order for all.

        So a batch holds images of all classes even where the dataset is sorted by class.
        """
        order = np.random.default_rng(0).permutation(len(self.data.test))
        return self.store.batches(Part(self.data.test, order, "shuffled"), self.settings.analysed)


def _linear(bench: Bench) -> list[Finding]:
    parts = [(part.features, part.labels) for part in bench.cropped()]
    metric = bench.data.metric
    result = linear_evaluation(*parts, classes=bench.data.classes, metric=metric)
    return result.findings(bench.data.name, metric)


def _linear_resampled(bench: Bench) -> list[Finding]:
    parts = [(part.features, part.labels) for part in (bench.train, bench.val, bench.test)]
    metric = bench.data.metric
    result = resampled_linear_evaluation(
        parts, classes=bench.data.classes, metric=metric, seed=bench.settings.seed
    )
    return result.findings(bench.data.name, metric)


def _knn(bench: Bench) -> list[Finding]:
    features, labels = (
        np.concatenate([getattr(part, name) for part in bench.fitted])
        for name in ("features", "labels")
    )
    test = (bench.test.features, bench.test.labels)
    k = bench.settings.neighbours
    return knn_evaluation((features, labels), test, k=k).findings(bench.data.name)


def _few_shot(bench: Bench) -> list[Finding]:
    settings = bench.settings
    parts = [bench.test] if bench.data.task == "few-shot" else [*bench.fitted, bench.test]
    results = [
        few_shot(
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.labels for part in parts]),
            ways=settings.ways,
            shots=shots,
            episodes=settings.episodes,
            seed=settings.seed,
        )
        for shots in settings.shots
    ]
    return [finding for result in results for finding in result.findings(bench.data.name)]


def _regression(bench: Bench) -> list[Finding]:
    def split(part: Features, source: TargetSource):
        return part.features, source.targets[part.places]

    data = bench.data
    result = regression(
        split(bench.train, data.train), split(bench.val, data.val), split(bench.test, data.test)
    )
    return result.findings(data.name)


def _spectrum(bench: Bench) -> list[Finding]:
    findings = spectrum(bench.test.features).findings(bench.data.name)
    subject, seed = bench.subject, bench.settings.seed
    of_view = bench.once(
        view_extractor, subject.networks, subject.spec, subject.conditioning.neutral
    )
    images = min(LIDAR_IMAGES, len(bench.data.test))
    views = [
        of_view(bench.store.variables, bench.store.batches(bench.data.test, images), key)
        for key in jax.random.split(protocol_key("spectrum", seed), LIDAR_VIEWS)
    ]
    alignment, uniformity = alignment_and_uniformity(*views[:2])
    values = {
        "LiDAR": (lidar(np.stack(views, axis=1)), None),
        "alignment": (alignment, False),
        "uniformity": (uniformity, False),
    }
    return findings + [
        Score("spectrum", bench.data.name, name, value, higher_is_better=better)
        for name, (value, better) in values.items()
    ]


def _neighbours(bench: Bench) -> list[Finding]:
    part, source = bench.test, bench.data.test
    chosen = np.linspace(0, len(part.features) - 1, GALLERY_QUERIES).round().astype(int)
    chosen = np.unique(chosen)
    found = nearest(
        part.features[chosen],
        part.features,
        min(GALLERY_NEIGHBOURS, len(part.features) - 1),
        own_rows=chosen,
    )

    def picture(row: int) -> Pixels:
        return _thumbnail(source, int(part.places[row]))

    names = [_name(source, int(part.labels[row])) for row in chosen]
    return found.findings(
        bench.data.name, lambda query: picture(int(chosen[query])), picture, names=names
    )


def _name(source: Source, label: int) -> str:
    return source.class_names[label] if source.class_names and label >= 0 else "query"


def _thumbnail(source: Source, place: int) -> Pixels:
    return decode(source[place].image, THUMBNAIL)


def _invariance(bench: Bench) -> list[Finding]:
    subject = bench.subject
    if not subject.has_projector:
        LOG.info("invariance of %s: no projector, so of its encoder alone", subject.name)
    meter = bench.once(invariance_meter, subject.networks, subject.conditioning, subject.spec)
    found = meter(bench.store.variables, bench.analysed, bench.settings.seed)
    return found.findings(bench.data.name)


def _matching(bench: Bench) -> list[Finding]:
    subject = bench.subject
    if not subject.has_projector:
        LOG.info("matching of %s: no projector, so by its features alone", subject.name)
    elif projector_takes_omega(subject.conditioning) and encoder_takes_omega(subject.networks):
        LOG.info("matching of %s: ω enters with the image, so not by ω alone", subject.name)
    matcher = bench.once(ViewMatcher, subject.networks, subject.conditioning, subject.views)
    found = matcher(bench.store.variables, bench.analysed, bench.settings.seed)
    return found.findings(bench.data.name)


def _leak(bench: Bench) -> list[Finding]:
    subject = bench.subject
    if not subject.conditioning.descriptors:
        LOG.info("leak of %s: left out, as it has no ω", subject.name)
        return []
    pictures = pictures_of(bench.analysed(), bench.mesh)
    found = leak_of(subject.conditioning, subject.views, *pictures, seed=bench.settings.seed)
    return found.findings(bench.data.name)


def _augmentation_probes(bench: Bench) -> list[Finding]:
    subject = bench.subject
    prober = bench.once(
        augmentation_prober, subject.networks, subject.spec, subject.conditioning.neutral
    )
    found = prober(bench.store.variables, bench.analysed(), bench.settings.seed)
    return found.findings(bench.data.name)


def _factors(bench: Bench) -> list[Finding]:
    def factors(part: Features, source: Drawn):
        return {name: values[part.places] for name, values in source.factors.items()}

    known = bench.data.test.FACTORS
    # The probes split off the validation rows they need.
    scores = probe_factors(
        bench.train.features,
        factors(bench.train, bench.data.train),
        bench.test.features,
        factors(bench.test, bench.data.test),
        {name: factor.kind for name, factor in known.items()},
    )
    means = group_means(scores, {name: factor.group for name, factor in known.items()})
    bars = Chart(
        "factor probes",
        bench.data.name,
        "How well a linear probe reads each factor (1 perfect, 0 a constant answer)",
        "factor",
        "score",
        {"features": tuple(scores.items())},
    )
    rows = scores | {f"mean, {group}": mean for group, mean in means.items()}
    return [
        *(Score("factor probes", bench.data.name, name, value) for name, value in rows.items()),
        bars,
    ]


def _sgd_probe(bench: Bench) -> list[Finding]:
    found = sgd_probe(
        bench.subject,
        bench.learnt_from(),
        bench.store.limited(bench.data.test),
        classes=bench.data.classes,
        mesh=bench.mesh,
        epochs=bench.settings.probe_epochs,
        batch=bench.store.batch,
        seed=bench.settings.seed,
    )
    return found.findings(bench.data.name)


def _fine_tune(bench: Bench) -> list[Finding]:
    results = [
        fine_tune(
            bench.subject,
            bench.learnt_from(),
            bench.store.limited(bench.data.test),
            classes=bench.data.classes,
            fraction=fraction,
            mesh=bench.mesh,
            epochs=bench.settings.fine_tune_epochs,
            batch=bench.store.batch,
            seed=bench.settings.seed,
        )
        for fraction in bench.settings.fractions
    ]
    return [finding for result in results for finding in result.findings(bench.data.name)]


@dataclasses.dataclass(frozen=True)
class Task:
    """A protocol.

    Attributes:
      run: runs the protocol on a bench.
      takes: the kinds of dataset it suits: their tasks, or `drawn` for the embedded ones.
      usual: the kinds it runs on by default.
      needs: requirements on a dataset, by the settings and the number of devices.
    """

    run: Callable[[Bench], list[Finding]]
    takes: frozenset[str]
    usual: frozenset[str]
    needs: Callable[[Settings, int], Needs]

    def suits(self, data: EvaluationData, *, asked_for: bool) -> bool:
        """Whether the protocol runs on a dataset."""
        kinds = {data.task} | ({"drawn"} if isinstance(data.test, Drawn) else set())
        takes = self.takes if asked_for else self.usual
        return bool(kinds & takes)


_TWO_IMAGES = Needs(test=2)


def _task(
    run,
    takes: str,
    usual: str | None = None,
    needs: Needs | Callable[[Settings, int], Needs] = _TWO_IMAGES,
) -> Task:
    kinds = frozenset(takes.split())
    usual_kinds = kinds if usual is None else frozenset(usual.split())
    return Task(run, kinds, usual_kinds, (lambda *_: needs) if isinstance(needs, Needs) else needs)


def _episodes(settings: Settings, _: int) -> Needs:
    images = max(settings.shots, default=1) + QUERIES
    return Needs(labels=True, ways=settings.ways, of_a_class=images)


def _neighbours_asked(settings: Settings, _: int) -> Needs:
    return Needs(labels=True, neighbours=settings.neighbours)


def _training(_: Settings, devices: int) -> Needs:
    return Needs(labels=True, every_class=True, devices=max(2, devices))


def _training_on_few(settings: Settings, devices: int) -> Needs:
    needs = _training(settings, devices)
    return dataclasses.replace(needs, share=min(settings.fractions, default=1.0))


_ANY = "classification regression few-shot unlabelled"
_LINEAR = Needs(train=2, val=1, labels=True)

TASKS: Mapping[str, Task] = {
    "linear": _task(_linear, "classification", needs=_LINEAR),
    "linear_resampled": _task(_linear_resampled, "classification", usual="", needs=_LINEAR),
    "knn": _task(_knn, "classification", needs=_neighbours_asked),
    "few_shot": _task(_few_shot, "few-shot classification", usual="few-shot", needs=_episodes),
    "regression": _task(_regression, "regression", needs=Needs(train=2, val=2, test=2)),
    "factors": _task(_factors, "drawn", needs=Needs(train=10)),
    "spectrum": _task(_spectrum, _ANY),
    "neighbours": _task(_neighbours, _ANY),
    "invariance": _task(_invariance, _ANY, needs=Needs(analysed=2)),
    "matching": _task(_matching, _ANY, needs=Needs(analysed=2)),
    "augmentation_probes": _task(_augmentation_probes, _ANY, needs=Needs(analysed=PROBED_IMAGES)),
    "leak": _task(_leak, _ANY, usual="", needs=Needs(analysed=LEAK_IMAGES)),
    "sgd_probe": _task(_sgd_probe, "classification", usual="", needs=_training),
    "fine_tune": _task(_fine_tune, "classification", usual="", needs=_training_on_few),
}
