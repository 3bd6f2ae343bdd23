"""Features of a subject on a dataset's parts: extracted once, and kept on disk."""

import dataclasses
import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int

from cassle_jax.data import DamagedLog, DataError, Source, evaluation_batches
from cassle_jax.data.sources import content_of
from cassle_jax.data.splits import Part
from cassle_jax.evaluation.features import feature_extractor
from cassle_jax.evaluation.subject import Subject
from cassle_jax.methods.base import PyTree
from cassle_jax.parallel import replicate

LOG = logging.getLogger(__name__)

MAX_BAD_FRACTION = 0.01


@dataclasses.dataclass(frozen=True)
class Features:
    """Frozen features of images, in their dataset's order.

    Attributes:
      features: float32, all finite.
      labels: classes; -1 where an image has none.
      places: of the images in their source; damaged ones are left out.
    """

    features: Float[np.ndarray, "N F"]
    labels: Int[np.ndarray, " N"]
    places: Int[np.ndarray, " N"]


def canvas_for(size: int) -> int:
    """The side that images are decoded into for views of `size` pixels: room for long images."""
    return max(64, -(-size * 16 // 7 // 16) * 16)


def uncropped_side(size: int) -> int:
    """What an image's short side is resized to where views of `size` pixels are cut out of it.

    256 for 224, in the same proportion for other sizes.
    """
    return round(size * 256 / 224)


class FeatureStore:
    """The features of one subject, by source.

    Args:
      subject: whose.
      mesh: the devices.
      batch: images of all devices together.
      folder: where they are kept between calls of the command; `None` to keep them nowhere.
      limit: at most so many images of a source; 0 for all.
      threads: that read and decode; 0 for half the CPUs.
    """

    def __init__(
        self,
        subject: Subject,
        mesh: Mesh,
        *,
        batch: int,
        folder: Path | None = None,
        limit: int = 0,
        threads: int = 0,
    ):
        self.batch = batch
        self.programs: dict[str, Any] = {}  # compiled for the subject, whatever the dataset
        self._subject, self._mesh = subject, mesh
        self._limit, self._threads = limit, threads
        self._folder = folder and folder / subject.fingerprint()
        self._extract = feature_extractor(
            subject.networks, subject.spec, subject.conditioning.neutral, mesh
        )

    @cached_property
    def variables(self) -> PyTree:
        """The subject's, put on every device once."""
        return replicate(self._subject.variables, self._mesh)

    def __call__(self, source: Source) -> Features:
        """The features of a source, from the disk where they are there.

        Raises:
          DataError: features that are not finite, or too many damaged images.
        """
        path = self._folder and self._folder / f"{self._key(source)}.npz"
        features = path and _read(path)
        # Some processes may find a file that others do not, and all must extract or none.
        if not multihost_utils.process_allgather(np.array(bool(features))).all():
            LOG.info("features of %s on %s", self._subject.name, source.name)
            params, batch_stats = (self.variables.get(p, {}) for p in ("params", "batch_stats"))
            extracted = self._extract(params, batch_stats, self.batches(source))
            features = Features(*extracted)
            if not np.isfinite(features.features).all():
                raise DataError(
                    f"{self._subject.name} has features that are not finite on {source.name}; "
                    "its weights are damaged or its training diverged"
                )
            # Damaged images may be mended, and are then to be seen.
            whole = len(features.features) == len(self.limited(source))
            if path and whole and jax.process_index() == 0:
                _write(path, features)
        return features

    def limited(self, source: Source) -> Source:
        """At most `limit` images of a source, evenly spread, for what reads images itself."""
        if not 0 < self._limit < len(source):
            return source
        places = np.arange(self._limit) * len(source) // self._limit
        return Part(source, places, f"{self._limit} images")

    def batches(self, source: Source, limit: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The images of a source, at most `limit` of them, as `evaluation_batches` gives them."""
        limits = [each for each in (limit, self._limit) if each]
        return evaluation_batches(
            source,
            batch=self.batch,
            canvas=canvas_for(self._subject.spec.size),
            damaged=DamagedLog(len(source), MAX_BAD_FRACTION),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=self._threads,
            limit=min(limits, default=0),
        )

    def _key(self, source: Source) -> str:
        """What else features depend on: the images and how they are prepared."""
        spec = self._subject.spec
        settings = (
            source.name,
            len(source),
            content_of(source),
            source.class_names,
            self._limit,
            spec.size,
            spec.mean,
            spec.std,
            canvas_for(spec.size),
            np.asarray(self._subject.conditioning.neutral).tolist(),
        )
        return hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()


def _read(path: Path) -> Features | None:
    """What is kept at `path`; `None` where there is nothing, or nothing that can be read."""
    try:
        with np.load(path) as kept:
            return Features(kept["features"], kept["labels"], kept["places"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        LOG.warning("%s cannot be read and is made anew: %s", path, error)
        return None


def _write(path: Path, features: Features) -> None:
    """Writes beside `path` first, so that nobody finds half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.savez(file, **vars(features))
        os.replace(file.name, path)  # noqa: PTH105 (a name, not a path)
    except OSError as error:
        LOG.warning("features cannot be kept in %s: %s", path.parent, error.strerror)
