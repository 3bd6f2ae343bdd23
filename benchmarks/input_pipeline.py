"""Measures the input pipeline alone, from JPEG files to batches on the host."""

import contextlib
import itertools
import tempfile
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import simplejpeg

from benchmarks.contest import Contender, Row, TimedCall, contest
from benchmarks.rivals import published
from benchmarks.workload import Workload, folder_of
from cassle_jax.data import open_source
from cassle_jax.data.damaged import DamagedLog
from cassle_jax.data.pipeline import training_batches, usable_cpus

BATCH = 32
BATCHES = 4  # per CPU, as a PyTorch worker builds whole batches


def measure(work: Workload) -> list[Row]:
    """Measures images/s per CPU, with all data that two views of an image need."""
    count = BATCHES * usable_cpus() * BATCH
    files = tuple(itertools.islice(itertools.cycle(work.jpegs), count))
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(canvases(work, folder_of(files, Path(folder)))) as batches,
    ):
        return contest(
            "input pipeline",
            "images/s and CPU",
            count / usable_cpus(),
            [
                Contender("cassle_jax: canvases", partial(ours, batches, count)),
                Contender("simplejpeg alone, whole images", partial(decoder, files)),
                Contender(
                    "PyTorch, published: Pillow, two crops",
                    partial(published.loader, files, BATCH, work.views_size),
                ),
            ],
            work.rounds,
            lead_in=True,
        )


def canvases(work: Workload, root: Path) -> Generator[dict]:
    """The batches of a run that reads a folder, with one thread per CPU."""
    config = work.config("method=simclr").data
    config.source, config.path, config.canvas = "folder", str(root), work.canvas
    source = open_source(config, "train")
    damaged = DamagedLog(len(source), 1.0)
    return training_batches(
        source, batch=BATCH, canvas=work.canvas, seed=0, damaged=damaged, threads=usable_cpus()
    )


def decoder(files: tuple[Path, ...]) -> TimedCall:
    """Decodes the files with one thread per CPU, and does nothing with the pixels."""
    threads = ThreadPoolExecutor(usable_cpus())

    def once() -> None:
        for _ in threads.map(lambda file: simplejpeg.decode_jpeg(file.read_bytes()).shape, files):
            pass

    once()
    return once


def ours(batches: Iterator[dict], count: int) -> TimedCall:
    """Reads `count` images per call; prefetched batches serve the next call."""

    def once():
        return [batch["size"].sum() for batch in itertools.islice(batches, count // BATCH)]

    once()
    return once
