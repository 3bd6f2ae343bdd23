"""Measures how far every stage of the network is invariant to each augmentation."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from cassle_jax.augment import CHANCES, AugmentSpec, View
from cassle_jax.checks import check_positive
from cassle_jax.evaluation.agreement import (
    TEMPERATURE,
    Agreement,
    agreement,
    agreement_sums,
    batch_rows,
    counts,
    unit_length,
)
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.projection import (
    check_two,
    has_projector,
    project,
    projector_takes_omega,
    with_wrong_omega,
)
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Analysis
from cassle_jax.evaluation.views import (
    Batch,
    alone,
    draw_for_each,
    every_augmentation,
    nothing,
    on_devices,
    protocol_key,
    view_under,
)
from cassle_jax.methods import Networks, ViewBatch
from cassle_jax.methods.base import PyTree
from cassle_jax.methods.build import Conditioning
from cassle_jax.methods.losses import gather
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, parallel

LOG = logging.getLogger(__name__)

INTERPOLATED = ("jitter", "blur")
STRENGTHS = tuple(eighths / 8 for eighths in range(1, 17))

PROJECTOR, WRONG_PROJECTOR = "projector", "projector, wrong ω"
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "features", PROJECTOR, WRONG_PROJECTOR)

_MEASURES = {
    "similarity of plain and augmented": lambda found: found.same,
    "similarity of different images": lambda found: found.different,
    "difference of the similarities": lambda found: found.difference,
    "InfoNCE": lambda found: found.info_nce,
}


@dataclasses.dataclass(frozen=True)
class Invariance:
    """Agreement of plain and augmented images at the stages of a network.

    Attributes:
      agreements: agreements by augmentation and strength, then by stage. The projector is there
        only where the run has one, and `WRONG_PROJECTOR` only where another image's ω differs.
      images: number of images.
      candidates: number of images among which InfoNCE looks for the plain one, averaged over the
        images.
    """

    agreements: Mapping[tuple[str, float], Mapping[str, Agreement]]
    images: int
    candidates: float

    def alone(self) -> dict[str, Mapping[str, Agreement]]:
        """Agreements at the run's own strength, by augmentation, then by stage."""
        return {name: found for (name, strength), found in self.agreements.items() if strength == 1}

    def curves(self, augmentation: str) -> dict[str, list[tuple[float, Agreement]]]:
        """Agreements over the strengths of an augmentation, from weak to strong, by stage."""
        strengths = sorted(strength for name, strength in self.agreements if name == augmentation)
        found = [(strength, self.agreements[augmentation, strength]) for strength in strengths]
        return {
            stage: [(strength, stages[stage]) for strength, stages in found if stage in stages]
            for stage in STAGES
            if any(stage in stages for _, stages in found)
        }

    def findings(self, dataset: str) -> list[Finding]:
        """Differences at features and projector as scores; bars over stages; curves."""
        return [*self._scores(dataset), *self._bars(dataset), *self._lines(dataset)]

    def _scores(self, dataset):
        return [
            Score(
                PROTOCOL.name,
                dataset,
                f"difference under {augmentation}, {stage}",
                found.difference,
                higher_is_better=None,
            )
            for augmentation, stages in self.alone().items()
            for stage, found in stages.items()
            if stage in ("features", PROJECTOR, WRONG_PROJECTOR)
        ]

    def _bars(self, dataset):
        for label, value in _MEASURES.items():
            series = {
                augmentation: tuple((stage, value(found)) for stage, found in stages.items())
                for augmentation, stages in self.alone().items()
            }
            title = f"Invariance to each augmentation: {self._among(label)}"
            yield Chart(PROTOCOL.name, dataset, title, "stage", label, series)

    def _lines(self, dataset):
        for augmentation in INTERPOLATED:
            curves = self.curves(augmentation)
            if all(len(points) < 2 for points in curves.values()):
                continue
            for label, value in _MEASURES.items():
                series = {
                    stage: tuple((strength, value(found)) for strength, found in points)
                    for stage, points in curves.items()
                }
                title = f"Strength of {augmentation}: {self._among(label)}"
                yield Chart(
                    PROTOCOL.name, dataset, title, "strength (1: as trained)", label, series
                )

    def _among(self, label):
        return f"InfoNCE among {self.candidates:.0f} images" if label == "InfoNCE" else label


def invariance_meter(
    networks: Networks,
    conditioning: Conditioning,
    spec: AugmentSpec,
    mesh: Mesh,
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Callable[..., Invariance]:
    """Returns a function that measures invariance stage by stage; its first call compiles it.

    Compares every image with itself under each augmentation alone. The augmentation is drawn from
    the run's own ranges and applied to all images. The same draws of jitter and blur are also
    applied at other strengths (see `Chosen`). The plain image and the uncropped ones show the
    image's largest centred square, resized as a crop is, so that they differ by the augmentation
    alone.

    Stages are the feature maps that the encoder sows, its features and, where the run has one, the
    projection. A feature map is compared as one vector of all positions and channels, so a change
    of place counts as a change. The projector takes each view's own ω. In the stage
    `WRONG_PROJECTOR`, the augmented view takes the ω that the same augmentation has for another
    image (`another_image`).

    The similarity of different images is the mean over all pairs. InfoNCE and accuracy look for the
    plain image of an augmented one among the images of its batch. So they depend on the batch:
    compare them only between equal batch sizes, with images in random order. BatchNorm uses its
    running statistics.

    Each device holds the plain feature maps of a whole batch: 7 MB per image of 224 pixels for a
    ResNet-50 in float32. It also holds two sums of feature maps per augmentation and strength,
    0.5 GB in all.

    Args:
      networks: the run's networks.
      conditioning: the projector's conditioning.
      spec: the run's augmentation.
      mesh: the devices.
      strengths: strengths of jitter and blur besides the run's own, which is 1; each above 0; empty
        for no curves.

    Returns:
      A function of the variables (`params` and `batch_stats`), of a function that returns the
      batches (as from `evaluation_batches`), and of the seed of the augmentations (default 0). It
      reads the batches twice where the projector takes ω. It raises ValueError for fewer than
      two images, where no batch has two, or where an embedding is not finite.

    Raises:
      ValueError: a strength is not positive.
    """
    for strength in strengths:
        check_positive("strength", strength)
    spec = every_augmentation(spec)
    compared = _compared(spec, strengths)
    measure = _Measurement(networks, conditioning, spec, compared, mesh)
    describe = _description(conditioning, spec, compared, mesh)
    # The sums stay on the devices from batch to batch.
    add = jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0)

    def meter(
        variables: PyTree, batches: Callable[[], Iterable[Batch]], seed: int = 0
    ) -> Invariance:
        key, circle_key = jax.random.split(protocol_key("invariance", seed))
        if has_projector(variables) and projector_takes_omega(conditioning):
            analysed = with_wrong_omega(partial(describe, key), batches, circle_key, mesh)
        else:
            analysed = batches()
        sums = None
        for batch in analysed:
            found = measure(variables, key, on_devices(batch, mesh))
            sums = found if sums is None else add(sums, found)
        if sums is None:
            raise ValueError("there are no batches to analyse; give at least one")
        return _invariance(compared, *jax.device_get(sums))

    return meter


def _invariance(compared: Sequence[tuple[str, float]], every, omega_differs, count) -> Invariance:
    """The agreements from the sums over all images, one of `every` for each of the `compared`."""
    check_two(int(count.images))
    if count.ranked == 0:
        raise ValueError("no batch has two images to compare; use a larger batch")
    agreements = {
        each: {
            stage: agreement(found[stage], count, stage)
            for stage in STAGES
            if stage in found and (stage != WRONG_PROJECTOR or otherwise)
        }
        for each, found, otherwise in zip(compared, every, omega_differs, strict=True)
    }
    return Invariance(agreements, int(count.images), float(count.candidates / count.ranked))


def _compared(spec: AugmentSpec, strengths: Sequence[float]) -> list[tuple[str, float]]:
    """Every augmentation that the run draws, at every strength, once."""
    alone = [("crop", 1.0), *((name, 1.0) for name in CHANCES if getattr(spec, name) > 0)]
    curves = [(name, float(strength)) for name in INTERPOLATED for strength in strengths]
    return list(dict.fromkeys(alone + curves))


def _description(
    conditioning: Conditioning, spec: AugmentSpec, compared: Sequence[tuple[str, float]], mesh: Mesh
) -> Callable[..., Float[Array, "B C D"]]:
    """Returns a function of key and batch: ω of its images under each of the C `compared`."""

    def under(key, batch, chosen):
        drawn = draw_for_each(key, batch, spec)
        views = [view_under(each, drawn, batch, spec) for each in (nothing(), chosen)]
        return conditioning.describe(views, (spec, spec))[1]

    under = parallel(under, mesh, inputs=(REPLICATED, SHARDED, REPLICATED), outputs=SHARDED)

    def describe(key, batch):
        return jnp.stack([under(key, batch, alone(*each)) for each in compared], axis=1)

    return describe


class _Measurement:
    """Compares the images of a batch with themselves under each augmentation in `compared`."""

    def __init__(
        self,
        networks: Networks,
        conditioning: Conditioning,
        spec: AugmentSpec,
        compared: Sequence[tuple[str, float]],
        mesh: Mesh,
    ):
        self._networks, self._conditioning, self._spec = networks, conditioning, spec
        self._compared = compared
        self._plain = parallel(
            self._encode_plain,
            mesh,
            inputs=(REPLICATED, REPLICATED, SHARDED),
            outputs=(SHARDED, REPLICATED, REPLICATED),
        )
        self._under = parallel(
            self._compare,
            mesh,
            inputs=(REPLICATED, SHARDED, SHARDED, REPLICATED, REPLICATED, REPLICATED),
            outputs=REPLICATED,
        )

    def __call__(self, variables: PyTree, key: PRNGKeyArray, batch: Batch) -> PyTree:
        """The sums over a batch.

        Returns:
          By stage, the `AgreementSums` for each of `compared`; the number of images whose `wrong` ω
          differs from their own for each; and the `Counts`.
        """
        local, keys, count = self._plain(variables, key, batch)
        # The augmentation is an argument, so that one compiled program serves all.
        every = [
            self._under(variables, batch, local, keys, np.int32(number), alone(*each))
            for number, each in enumerate(self._compared)
        ]
        sums, omega_differs = zip(*every, strict=True)
        return sums, omega_differs, count

    def _encode_plain(self, variables, key, batch):
        """This device's draws, views and features; all devices' plain embeddings; the `Counts`."""
        rows = batch_rows(batch["mask"], AXIS)
        drawn = draw_for_each(key, batch, self._spec)
        view = view_under(nothing(), drawn, batch, self._spec)
        omega, _ = self._omegas(view, view)
        stages = _stages(self._networks, variables, ViewBatch(view.image, omega))
        keys = {name: gather(unit_length(stage), AXIS) for name, stage in stages.items()}
        return (drawn, view, stages["features"]), keys, jax.lax.psum(counts(rows), AXIS)

    def _compare(self, variables, batch, local, keys, number, chosen):
        """The sums under one choice of augmentations."""
        rows = batch_rows(batch["mask"], AXIS)
        drawn, plain_view, plain_features = local
        view = view_under(chosen, drawn, batch, self._spec)
        plain_omega, omega = self._omegas(plain_view, view)
        queries = _stages(self._networks, variables, ViewBatch(view.image, omega))
        features, keys = queries["features"], dict(keys)
        omega_differs = jnp.float32(0)

        def projected(view, omega, features):
            return project(self._networks, variables, ViewBatch(view.image, omega), features)

        if has_projector(variables):
            plain_projected = projected(plain_view, plain_omega, plain_features)
            keys[PROJECTOR] = gather(unit_length(plain_projected), AXIS)
            queries[PROJECTOR] = projected(view, omega, features)
        if "wrong" in batch:
            wrong = batch["wrong"][:, number]
            keys[WRONG_PROJECTOR] = keys[PROJECTOR]
            queries[WRONG_PROJECTOR] = projected(view, wrong, features)
            # Another program computed `wrong`, so equal values may differ by rounding.
            differs = jnp.any(jnp.abs(wrong - omega) > 1e-5, axis=1) & rows.counted
            omega_differs = differs.sum(dtype=jnp.float32)
        sums = {
            name: agreement_sums(rows, queries[name], keys[name], TEMPERATURE) for name in queries
        }
        return jax.lax.psum((sums, omega_differs), AXIS)

    def _omegas(self, first: View, second: View) -> tuple[Array, Array]:
        return self._conditioning.describe((first, second), (self._spec, self._spec))


def _stages(networks: Networks, variables: PyTree, view: ViewBatch) -> dict[str, Array]:
    """The outputs of the encoder's stages for a view, each one float32 vector per image [B, D]."""
    features, state = networks.apply(
        variables, view, train=False, method="encode", mutable=["intermediates"]
    )
    sown = state.get("intermediates", {}).get("encoder", {})
    found = {name: sown[name][0] for name in STAGES if name in sown} | {"features": features}
    return {
        name: array.reshape(len(array), -1).astype(jnp.float32) for name, array in found.items()
    }


def _run(bench: Bench, settings: Analysis) -> list[Finding]:
    subject = bench.subject
    if not has_projector(subject.variables):
        LOG.info("invariance of %s: its encoder alone, as it has no projector", subject.name)
    meter = bench.once(invariance_meter, subject.networks, subject.conditioning, subject.spec)
    batches = partial(bench.analysed, settings.analysed)
    return meter(bench.store.variables, batches, settings.seed).findings(bench.data.name)


PROTOCOL = Protocol(
    "invariance",
    title="Invariance to each augmentation",
    needs=Needs(analysed=2),
    settings=Analysis,
    run=_run,
)
