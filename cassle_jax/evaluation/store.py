"""Extracts the features of a subject on a dataset's parts once, and keeps them on disk."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from PIL import Image

from cassle_jax.checks import is_finite
from cassle_jax.data import DamagedLog, DataError, Source, evaluation_batches
from cassle_jax.data.pipeline import evenly_spaced
from cassle_jax.data.sources import content_of, digest_of, has_changed, stored_of
from cassle_jax.data.splits import Part, TenCrops
from cassle_jax.evaluation.feature_cache import CACHE_GIB, FeatureCache
from cassle_jax.evaluation.features import feature_extractor
from cassle_jax.evaluation.subject import Subject
from cassle_jax.methods.base import PyTree
from cassle_jax.parallel import in_all_processes, replicate
from cassle_jax.versions import code_fingerprint

LOG = logging.getLogger(__name__)

_MAX_BAD_FRACTION = 0.01


def tolerant_log(source: Source) -> DamagedLog:
    """A log that tolerates 1 % of damaged images, and always at least one."""
    images = len(stored_of(source))  # all crops of an image are damaged as one
    bound = min(1.0, _MAX_BAD_FRACTION + 1 / images)
    return DamagedLog(images, bound, setting=None)


@dataclasses.dataclass(frozen=True)
class Features:
    """Frozen features of images, in their dataset's order.

    Attributes:
      features: float32, all finite.
      labels: classes; -1 where an image has none.
      places: places of the images in their source; damaged ones are left out.
    """

    features: Float[np.ndarray, "N F"]
    labels: Int[np.ndarray, " N"]
    places: Int[np.ndarray, " N"]


def canvas_for(size: int) -> int:
    """Side of the canvas that whole images are decoded into for views of `size` pixels."""
    return max(64, -(-size * 16 // 7 // 16) * 16)


def uncropped_side(size: int) -> int:
    """Pixels of the short side from which a centre crop of `size` is cut: 256 for 224."""
    return round(size * 256 / 224)


def described(source: Source) -> tuple[object, ...]:
    """Facts whose `repr` identifies a source, even among others of the same name."""
    return source.name, len(source), content_of(source), source.class_names


def computed_on(mesh: Mesh) -> tuple[str | None, ...]:
    """Facts that decide rounding: the kind of device, and the precision of products."""
    device = mesh.devices.flat[0]
    return device.platform, device.device_kind, jax.config.jax_default_matmul_precision


class FeatureStore:
    """The features of one subject, by source.

    Args:
      subject: the subject.
      mesh: the devices.
      batch: images per step, all devices together.
      folder: folder that keeps features between calls of the command; `None` for none.
      cache_gib: bound of the folder's size, GiB; the least recently read features go first.
      limit: largest number of images per source; 0 for all. `TenCrops` are taken whole: limit
        the images that are cropped.
    """

    def __init__(
        self,
        subject: Subject,
        mesh: Mesh,
        *,
        batch: int,
        folder: Path | None = None,
        cache_gib: float = CACHE_GIB,
        limit: int = 0,
    ):
        self.batch = batch
        # What serves the subject on every dataset: its maker, the arguments, the result.
        self.made: list[tuple[Callable, tuple, Any]] = []
        self._subject, self.mesh = subject, mesh
        self.limit = limit
        self._fingerprint = subject.fingerprint()
        self._cache = FeatureCache(folder, cache_gib) if folder else None
        # By description of the source: what several protocols read is logged once.
        self._damaged: dict[str, DamagedLog] = {}
        self._failed: dict[str, str] = {}  # why, by key
        self._extract = feature_extractor(
            subject.networks, subject.spec, subject.conditioning.neutral, mesh
        )

    @cached_property
    def variables(self) -> PyTree:
        """The subject's variables, copied to every device once."""
        return replicate(self._subject.variables, self.mesh)

    def __call__(self, source: Source, short_side: int = 0) -> Features:
        """The features of a source; reads them from disk where they are kept.

        Args:
          source: the images.
          short_side: pixels that the short side is resized to before the view is cut out of the
            centre; 0 for the view's own size.

        Raises:
          DataError: features are not finite, too many images are damaged, or the images change
            meanwhile.
        """
        short_side = short_side or self._subject.spec.size
        key = self._key(source, short_side)
        kept = self._cache and self._cache.read(self._fingerprint, key)
        features = kept and Features(**kept)
        # Some processes may find a file that others do not: all must extract, or none.
        if in_all_processes(bool(features)):
            return features
        features = self._extracted_once(key, source, short_side)
        # Damaged images may be repaired later and must then be read.
        whole = len(features.features) == len(self.limited(source))
        if whole and has_changed(source):
            raise DataError(
                f"{source.name}: its images changed while they were read; the same command reads "
                "them again"
            )
        if self._cache and whole and jax.process_index() == 0:
            self._cache.write(self._fingerprint, key, vars(features))
        return features

    def _extracted_once(self, key: str, source: Source, short_side: int) -> Features:
        """The features; what made them fail before makes them fail at once."""
        if key in self._failed:
            raise DataError(self._failed[key])
        try:
            return self._extracted(source, short_side)
        except DataError as error:
            self._failed[key] = str(error)
            raise

    def _extracted(self, source: Source, short_side: int) -> Features:
        LOG.info("features of %s on %s", self._subject.name, source.name)
        params, batch_stats = (self.variables.get(p, {}) for p in ("params", "batch_stats"))
        views = self._batches(source, canvas=self._subject.spec.size, short_side=short_side)
        features = Features(*self._extract(params, batch_stats, views))
        if not is_finite(features.features):
            raise DataError(
                f"{self._subject.name} has features that are not finite on {source.name}; "
                "its weights are damaged or its training diverged"
            )
        return features

    def limited(self, source: Source) -> Source:
        """The images that features are taken from, for protocols that read images themselves."""
        limit = self._limit_of(source)
        if not 0 < limit < len(source):
            return source
        return Part(source, evenly_spaced(len(source), limit), f"{limit} images")

    def _limit_of(self, source: Source) -> int:
        return 0 if isinstance(source, TenCrops) else self.limit

    def batches(self, source: Source, limit: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The whole images of a source, at most `limit` of them, to draw views from.

        They are reduced to fit a canvas, as in training. A view without augmentation is therefore
        resampled twice, by other filters than the view that `__call__` encodes. Analyses compare
        such views with each other, so only the augmentation makes a difference.
        """
        return self._batches(source, limit, canvas=canvas_for(self._subject.spec.size))

    def _batches(self, source: Source, limit: int = 0, **prepared) -> Iterator:
        limits = [each for each in (limit, self._limit_of(source)) if each]
        return evaluation_batches(
            source,
            batch=self.batch,
            damaged=self._damaged.setdefault(repr(described(source)), tolerant_log(source)),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            limit=min(limits, default=0),
            **prepared,
        )

    def _key(self, source: Source, short_side: int) -> str:
        """Digest of what features depend on besides the weights: images, code, device."""
        spec = self._subject.spec
        settings = (
            code_fingerprint(),
            computed_on(self.mesh),
            described(source),
            self._limit_of(source),
            spec.size,
            spec.mean,
            spec.std,
            short_side,
            Image.MAX_IMAGE_PIXELS,
            np.asarray(self._subject.conditioning.neutral).tolist(),
        )
        return digest_of(repr(settings).encode())
