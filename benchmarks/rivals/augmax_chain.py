"""One chain of augmax's transformations, under vmap; it ignores the true sizes of images."""

import math

import jax

from benchmarks.contest import TimedCall
from benchmarks.workload import Workload, synthetic_batch


def augmentation(work: Workload) -> TimedCall:
    """Draws both views from canvases."""
    import augmax

    whole = work.views_size / work.canvas  # zoom: pixels of the view per pixel of the canvas
    zooms = (whole, whole / math.sqrt(0.2))
    chain = augmax.Chain(
        augmax.ByteToFloat(),
        augmax.RandomSizedCrop(
            work.views_size, work.views_size, zoom_range=zooms, prevent_underzoom=False
        ),
        augmax.HorizontalFlip(),
        augmax.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        augmax.RandomGrayscale(p=0.2),
        augmax.GaussianBlur(sigma=2, p=0.5),
        augmax.Normalize(),
    )
    images = jax.device_put(synthetic_batch(work.views_batch, work.canvas)["image"])
    keys = iter(range(10**9))

    @jax.jit
    def make(key, images):
        views = jax.random.split(key, (2, work.views_batch))
        return [jax.vmap(chain)(view, images) for view in views]

    def once():
        for _ in range(work.steps):
            views = make(jax.random.key(next(keys)), images)
        return jax.block_until_ready(views)

    once()
    return once
