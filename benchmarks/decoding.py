"""Measures decoding for a canvas beside bare decoding, by what an image needs to fit the canvas.

python -m benchmarks.decoding --data=/data/imagenet/val --limit=300

Every figure is CPU time of one thread, per image: the least of five.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from absl import flags

from benchmarks.workload import jpegs_in
from cassle_jax import command
from cassle_jax.checks import check_at_least
from cassle_jax.data.decode import decode

REPEATS = 5

FITS, REDUCED, RESIZED = "fits the canvas", "reduced by libjpeg-turbo", "reduced and resized"


def costs(files: Sequence[Path], canvas: int) -> dict[str, np.ndarray]:
    """Milliseconds of images by what they need, [images, 2]: bare decoding, and for the canvas.

    Args:
      files: JPEGs.
      canvas: side of the canvas, pixels.
    """
    found: dict[str, list[tuple[float, float]]] = {FITS: [], REDUCED: [], RESIZED: []}
    for file in files:
        data = file.read_bytes()
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        memory = np.empty(3 * max(height * width, canvas**2), np.uint8)

        def bare(data=data, memory=memory):
            return simplejpeg.decode_jpeg(data, buffer=memory)

        def fitted(data=data, memory=memory):
            return decode(data, canvas, memory, roughly=True)

        shape = fitted().shape[:2]
        longest = max(height, width)
        eighths = [(-(-height * n // 8), -(-width * n // 8)) for n in range(1, 8)]
        need = FITS if longest <= canvas else REDUCED if shape in eighths else RESIZED
        found[need].append((_least(bare), _least(fitted)))
    return {need: np.array(times).reshape(-1, 2) for need, times in found.items()}


def _least(call: Callable[[], object]) -> float:
    """Least CPU time of some calls, ms."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return 1000 * min(times)


def main() -> None:
    """Prints a Markdown table."""
    check_at_least("canvas", CANVAS.value, 1)
    check_at_least("limit", LIMIT.value, 0)
    files = jpegs_in(Path(DATA.value))[: LIMIT.value or None]
    print("| images | number | bare decoding, ms | for the canvas, ms | × |")
    print("|---|--:|--:|--:|--:|")
    for need, times in costs(files, CANVAS.value).items():
        if len(times):
            bare, fitted = times.mean(axis=0)
            print(f"| {need} | {len(times)} | {bare:.2f} | {fitted:.2f} | {fitted / bare:.2f} |")


if __name__ == "__main__":
    DATA = flags.DEFINE_string("data", None, "Folder of JPEGs.", required=True)
    CANVAS = flags.DEFINE_integer("canvas", 512, "Side of the canvas, pixels.")
    LIMIT = flags.DEFINE_integer("limit", 0, "Largest number of images; 0: all.")
    command.run(main)
