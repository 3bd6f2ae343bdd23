"""SimCLR, Trainer step and augmentation of stable-pretraining's JAX backend (0.1.8).

It has no MoCo. Its augmentation is crop, flip, and jitter of brightness and contrast, without hue,
saturation and blur.
"""

import jax
import jax.numpy as jnp

from benchmarks.contest import TimedCall
from benchmarks.workload import Workload, synthetic_batch


def augmentation(work: Workload) -> TimedCall:
    """Draws both views from float images; ignores the true sizes of images."""
    from stable_pretraining.jax import augment

    images = jax.device_put(synthetic_batch(work.views_batch, work.canvas)["image"])
    make = jax.jit(lambda key, images: augment.two_crop(key, images / 255.0, work.views_size))
    keys = iter(range(10**9))

    def once():
        for _ in range(work.steps):
            views = make(jax.random.key(next(keys)), images)
        return jax.block_until_ready(views)

    once()
    return once


def step(work: Workload) -> TimedCall:
    """Trains SimCLR with augmentation on the device, by the steps of its Trainer."""
    from flax import nnx
    from stable_pretraining import jax as spj

    dtype = jnp.dtype(work.dtype)
    rngs = nnx.Rngs(0)
    backbone = getattr(spj.backbone, work.encoder)(rngs=rngs, dtype=dtype)
    width = backbone.embed_dim
    model = spj.SimCLR(
        backbone=backbone,
        embed_dim=width,
        rngs=rngs,
        projector_dims=(width, 128),
        temperature=0.2,
        optim={"type": "sgd", "learning_rate": 0.03, "momentum": 0.9},
        transform=spj.augment.two_view_transform(work.size),
        dtype=dtype,
    )
    canvas = work.config("method=simclr").data.canvas
    images = jax.device_put(synthetic_batch(work.batch, canvas)["image"] / 255.0)
    loader = [{"image": jnp.asarray(images, jnp.float32)}] * work.steps
    trainer = spj.Trainer(max_epochs=1, enable_validation=False)
    trainer.fit(model, [])  # creates the optimiser; a second fit would compile again

    def once():
        trainer._train_epoch(model, loader)
        return jax.block_until_ready(nnx.state(model))

    once()
    return once
