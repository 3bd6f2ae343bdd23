"""Measures augmentation alone: two views per image of a batch that is already on the device."""

from functools import partial

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.contest import Contender, Row, TimedCall, contest
from benchmarks.rivals import augmax_chain, dm_pix_naive, published, stable_pretraining
from benchmarks.workload import Workload, synthetic_batch
from cassle_jax.methods.views import augmented_views
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel, shard_batch
from cassle_jax.training.run import build_run


def measure(work: Workload) -> list[Row]:
    """Measures views/s on one device; ours include crop and descriptors."""
    return contest(
        "augmentation",
        "views/s",
        2 * work.views_batch * work.steps,
        [
            Contender("cassle_jax, crop and ω included", partial(ours, work)),
            Contender(
                "kornia, without its crop", partial(published.augmentation, work, tuned=False)
            ),
            Contender(
                "kornia, blur made separable, without its crop",
                partial(published.augmentation, work, tuned=True),
            ),
            Contender("dm-pix, composed naively", partial(dm_pix_naive.augmentation, work)),
            Contender("augmax", partial(augmax_chain.augmentation, work)),
            Contender(
                "stable-pretraining's JAX: no hue, saturation, blur",
                partial(stable_pretraining.augmentation, work),
            ),
        ],
        work.rounds,
        lead_in=True,
    )


def ours(work: Workload) -> TimedCall:
    """Draws both views of the paper's recipe from uint8 canvases, and their ω."""
    mesh = device_mesh(jax.devices()[:1])
    config = work.config("method=simclr", batch_size=work.views_batch, encoder__name="resnet18")
    config.augment.size, config.data.canvas = work.views_size, work.canvas
    return augmented(config, synthetic_batch(work.views_batch, work.canvas), work.steps, mesh)


def augmented(config: ConfigDict, batch: dict, steps: int, mesh: Mesh) -> TimedCall:
    """Draws both views of a batch and their ω `steps` times, as a configuration's step does."""
    run = build_run(config, mesh, 1000 * config.batch_size)
    batch = shard_batch(batch, mesh)

    def draw(key, batch):
        views = augmented_views(key, batch["image"], batch["size"], run.views, AXIS)
        return [view.image for view in views], run.conditioning.describe(views, run.views)

    make = parallel(draw, mesh, inputs=(REPLICATED, SHARDED), outputs=SHARDED)
    keys = iter(range(10**9))

    def once():
        for _ in range(steps):
            views = make(jax.random.key(next(keys)), batch)
        return jax.block_until_ready(views)

    once()
    return once
