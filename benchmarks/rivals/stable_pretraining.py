"""stable-pretraining's JAX backend (0.1.8): its SimCLR, its Trainer's step and its augmentation.

It has no MoCo, so SimCLR is compared with SimCLR. Its views are cropped, flipped, and jittered in
brightness and contrast; hue, saturation and blur it does not have.
"""

import jax
import jax.numpy as jnp

from benchmarks.contest import Run
from benchmarks.workload import Workload, synthetic_batch


def augmentation(work: Workload) -> Run:
    """Both views from float images; it does not know pictures' true sizes."""
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


def step(work: Workload) -> Run:
    """Steps of SimCLR with augmentation on the device, as its Trainer runs them."""
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
    trainer.fit(model, [])  # makes the optimiser; another fit would compile anew

    def once():
        trainer._train_epoch(model, loader)
        return jax.block_until_ready(nnx.state(model))

    once()
    return once
