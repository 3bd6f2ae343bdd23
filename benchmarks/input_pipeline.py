"""The input pipeline alone: JPEG files in, batches on the host out."""

import itertools
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.contest import Contender, Row, Run, contest
from benchmarks.rivals import published
from benchmarks.workload import Workload, cpus, folder_of
from cassle_jax.data import open_source
from cassle_jax.data.damaged import DamagedLog
from cassle_jax.data.pipeline import training_batches


def measure(work: Workload) -> list[Row]:
    """Images a second and CPU, each with what two views of it need."""
    batch = min(work.views_batch, len(work.jpegs))
    count = len(work.jpegs) // batch * batch
    with tempfile.TemporaryDirectory() as folder:
        root = folder_of(work.jpegs, Path(folder))
        return contest(
            "input pipeline",
            "images/s and CPU",
            count / cpus(),
            [
                Contender("cassle_jax: canvases", partial(ours, work, root, batch, count)),
                Contender(
                    "PyTorch, published: Pillow, two crops",
                    partial(published.loader, work.jpegs, batch, work.views_size),
                ),
            ],
            work.rounds,
        )


def ours(work: Workload, root: Path, batch: int, count: int) -> Run:
    """One pass over the files, which are decoded into canvases."""
    config = work.config("method=simclr").data
    config.source, config.path, config.canvas = "folder", str(root), work.canvas
    source = open_source(config, "train")
    damaged = DamagedLog(len(source), 1.0)

    def once():
        # From its beginning: nothing was decoded while others had their turn.
        batches = training_batches(
            source, batch=batch, canvas=work.canvas, seed=0, damaged=damaged, threads=cpus()
        )
        sizes = [each["size"].sum() for each in itertools.islice(batches, count // batch)]
        batches.close()
        return sizes

    once()
    return once
