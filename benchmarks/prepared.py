"""Measures what preparing a dataset and keeping a part of it in memory bring, and what they cost.

Decoding is timed in CPU seconds of one thread; a view of prepared images is compared with the view
of the originals that has the same parameters.
"""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.contest import Contender, Row, TimedCall, contest
from benchmarks.workload import Workload, folder_of
from cassle_jax.augment import AugmentSpec, apply, draw
from cassle_jax.data import Source, open_source
from cassle_jax.data.damaged import DamagedLog
from cassle_jax.data.decode import decode
from cassle_jax.data.memory import KeptRecords
from cassle_jax.data.pipeline import training_batches, usable_cpus
from cassle_jax.prepare import Preparation, prepare

SHARES = (1.0, 0.5, 0.25, 0.0)
BATCH = 32
IMAGES = 300


def measure(work: Workload) -> list[Row]:
    """Measures decoding and views of prepared images, and reading with a part of them kept."""
    with tempfile.TemporaryDirectory() as folder:
        root = folder_of(work.jpegs[:IMAGES], Path(folder) / "files")
        data = work.config("method=simclr").data
        data.update({"source": "folder", "path": str(root), "canvas": work.canvas})
        # In memory, as threads still read when the folder goes.
        originals = KeptRecords(open_source(data, "train"), IMAGES, 2**40)
        files = {"the originals": encoded(originals)}
        prepared = {}
        for side in (work.views_size * eighths // 7 for eighths in (8, 10, 12)):
            how = Preparation(f"side_{side}", short_side=side)
            prepare(data, ["train"], folder, how)
            found = ConfigDict({**data, "source": "tfds", "name": how.name, "path": folder})
            prepared[f"short side {side}, quality {how.quality}"] = encoded(
                open_source(found, "train")
            )
        rows = decoding({**prepared, **files}, work)
        for name, images in prepared.items():
            rows += views(name, files["the originals"], images, work)
        return [*rows, *kept(originals, work)]


def encoded(source: Source) -> list[bytes]:
    """The stored images of a source."""
    return [source[index].image for index in range(len(source))]


def decoding(files: Mapping[str, Sequence[bytes]], work: Workload) -> list[Row]:
    """Measures images/s and core of decoding onto the canvas; the first files are compared."""
    largest = max(sum(map(len, images)) for images in files.values())

    def decoded(images: Sequence[bytes]) -> TimedCall:
        scratch = np.empty(4 * 3 * work.canvas**2, np.uint8)

        def once() -> None:
            for image in images:
                decode(image, work.canvas, scratch, roughly=True)

        once()
        return once

    contenders = [
        Contender(f"{name}: {sum(map(len, images)) / largest:.0%} of the bytes",
                  partial(decoded, images))
        for name, images in files.items()
    ]  # fmt: skip
    items = len(next(iter(files.values())))
    unit = "images/s and core"
    return contest("decoding", unit, items, contenders, work.rounds, time.process_time)


def views(name: str, before: Sequence[bytes], after: Sequence[bytes], work: Workload) -> list[Row]:
    """Measures how crops of prepared images differ from those of the originals.

    A crop's corners are whole pixels of either image, as in training, so that a part of the
    difference is a shift by less than a pixel.
    """
    never = dict.fromkeys(("flip", "jitter", "grayscale", "blur", "solarize"), 0.0)
    spec = AugmentSpec(size=work.views_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **never)
    seen = jax.jit(lambda canvas, params, size: 255 * apply(canvas, params, spec, size).image)
    differences, gradients = [], []
    for index, pair in enumerate(zip(before, after, strict=True)):
        canvases = [on_canvas(decode(image, work.canvas, roughly=True), work) for image in pair]
        params = draw(jax.random.key(index), canvases[0][1], spec)
        whole, reduced = (np.asarray(seen(image, params, size)) for image, size in canvases)
        differences.append(float(np.abs(whole - reduced).mean()))
        gradients.append(gradient(reduced) / max(gradient(whole), 1e-6))
    measurement = f"views of {name}, beside those of the originals"
    return [
        Row(measurement, "mean difference", "grey levels", tuple(differences)),
        Row(measurement, "mean gradient", "of the originals'", tuple(gradients)),
    ]


def kept(source: Source, work: Workload) -> list[Row]:
    """Measures images/s and CPU with a part of the decoded images in memory."""
    count = len(source) // BATCH * BATCH or len(source)
    batch = min(BATCH, len(source))
    whole = len(source) * 3 * work.canvas**2

    def reader(share: float) -> TimedCall:
        batches = stack.enter_context(
            contextlib.closing(
                training_batches(
                    source,
                    batch=batch,
                    canvas=work.canvas,
                    seed=0,
                    damaged=DamagedLog(len(source), 1.0),
                    threads=usable_cpus(),
                    cache_bytes=int(share * whole),
                )
            )
        )

        def once() -> list:
            return [each["size"].sum() for each in itertools.islice(batches, count // batch)]

        once()
        once()  # what the first pass left out as its last partial batch is kept now
        return once

    with contextlib.ExitStack() as stack:
        contenders = [Contender(f"{share:.0%} kept", partial(reader, share)) for share in SHARES]
        unit, items = "images/s and CPU", count / usable_cpus()
        return contest("images kept in memory", unit, items, contenders, work.rounds, lead_in=True)


def on_canvas(pixels: np.ndarray, work: Workload) -> tuple[np.ndarray, np.ndarray]:
    """An image in the top left corner of a canvas, and its height and width."""
    height, width = pixels.shape[:2]
    image = np.zeros((work.canvas, work.canvas, 3), np.uint8)
    image[:height, :width] = pixels
    return image, np.array([height, width], np.int32)


def gradient(view: np.ndarray) -> float:
    """Mean absolute difference between neighbouring pixels."""
    return float(np.abs(np.diff(view, axis=0)).mean() + np.abs(np.diff(view, axis=1)).mean()) / 2
