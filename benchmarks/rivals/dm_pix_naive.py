"""A naive composition of dm-pix: its random functions one after the other, under vmap.

The jitter has a fixed order, brightness is additive, and a view is returned without its parameters.
dm-pix has no crop of a random area; `jax.image.scale_and_translate` replaces it.
"""

import dm_pix as pix
import jax
import jax.numpy as jnp

from benchmarks.contest import TimedCall
from benchmarks.workload import Workload, synthetic_batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def one_view(key, image, true_size, size: int):
    """Augments one image: [canvas, canvas, 3] uint8 → [size, size, 3], normalised."""
    keys = jax.random.split(key, 9)
    image = image.astype(jnp.float32) / 255
    area = jax.random.uniform(keys[0], minval=0.2, maxval=1.0) * true_size.prod()
    ratio = jnp.exp(jax.random.uniform(keys[1], minval=-0.2877, maxval=0.2877))
    box = jnp.minimum(jnp.sqrt(jnp.stack([area / ratio, area * ratio])), true_size)
    start = jax.random.uniform(keys[2], (2,)) * (true_size - box)
    scale = size / box
    image = jax.image.scale_and_translate(
        image, (size, size, 3), (0, 1), scale, -start * scale, "linear"
    )
    image = pix.random_flip_left_right(keys[3], image)
    jittered = pix.random_brightness(keys[4], image, 0.4)
    jittered = pix.random_contrast(keys[5], jittered, 0.6, 1.4)
    jittered = pix.random_saturation(keys[6], jittered, 0.6, 1.4)
    jittered = jnp.clip(pix.random_hue(keys[7], jittered, 0.1), 0, 1)
    chance = jax.random.uniform(keys[8], (4,))
    image = jnp.where(chance[0] < 0.8, jittered, image)
    image = jnp.where(chance[1] < 0.2, pix.rgb_to_grayscale(image, keep_dims=True), image)
    kernel = int(0.1 * size) // 2 * 2 + 1
    blurred = pix.gaussian_blur(image, 0.1 + 1.9 * chance[2], kernel)
    image = jnp.where(chance[3] < 0.5, blurred, image)
    return (image - jnp.array(MEAN)) / jnp.array(STD)


def augmentation(work: Workload) -> TimedCall:
    """Draws both views from uint8 canvases."""
    batch = jax.device_put(synthetic_batch(work.views_batch, work.canvas))
    keys = iter(range(10**9))

    @jax.jit
    def make(key, batch):
        def view(key):
            image_keys = jax.random.split(key, work.views_batch)
            sizes = batch["size"].astype(jnp.float32)
            return jax.vmap(one_view, (0, 0, 0, None))(
                image_keys, batch["image"], sizes, work.views_size
            )

        return [view(key) for key in jax.random.split(key)]

    def once():
        for _ in range(work.steps):
            views = make(jax.random.key(next(keys)), batch)
        return jax.block_until_ready(views)

    once()
    return once
