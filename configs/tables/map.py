"""Varies one factor at a time to find where conditioning helps; CIFAR-10, slim ResNet-18.

nice python -m cassle_jax.tables --table=map --to=runs/map --parallel=2 \\
    --set=data.path=/data/cifar10 --datasets=cifar10=/data/cifar10,flowers17=/data/flowers17

On one H200 shared with five other runs, a run of the base cell compiles for 93 s and trains for
22 s. On one CPU core, runs with MoCo-v2 or Barlow Twins take 12 to 28 minutes. On two CPU cores,
the three runs of width 16, of width 32 and of 64 pixels take 20, 38 and 54 minutes.
"""

from cassle_jax.sweep.slim import BASE, METHODS, VARIANTS
from cassle_jax.sweep.table import Row, Table

# Method and differences from the base by cell; the learning rate scales with the root of the batch.
CELLS = {
    "SimCLR": ("simclr", ()),
    "SimCLR, batch 128": ("simclr", ("batch_size=128", "optimizer.base_learning_rate=0.0057")),
    "SimCLR, batch 1024": ("simclr", ("batch_size=1024", "optimizer.base_learning_rate=0.002")),
    "SimCLR, 48 epochs": ("simclr", ("epochs=48",)),
    "SimCLR, width 16": ("simclr", ("encoder.width=16",)),
    "SimCLR, width 32": ("simclr", ("encoder.width=32",)),
    "SimCLR, 64 pixels": ("simclr", ("augment.size=64", "data.canvas=64")),
    "SimCLR, colour 0.5": ("simclr", ("augment.color_strength=0.5",)),
    "SimCLR, colour 2": ("simclr", ("augment.color_strength=2.0",)),
    "SimCLR, rate × 1/2": ("simclr", ("optimizer.base_learning_rate=0.002",)),
    "SimCLR, rate × 2": ("simclr", ("optimizer.base_learning_rate=0.008",)),
    "MoCo-v2, queue 1024": ("moco_v2", ("method.queue_size=1024",)),
    "MoCo-v2": ("moco_v2", ()),
    "MoCo-v2, queue 65536": ("moco_v2", ("method.queue_size=65536",)),
    "Barlow Twins": ("barlow_twins", ()),
}


def get_table():
    return Table(
        title="The map",
        question="Where does a conditioned projector improve features, and where not? It does "
        "where the difference to plain is above 0 by more than its interval.",
        rows=tuple(
            Row(
                f"{cell}, {variant}",
                f"configs/cifar10.py:method={method}",
                (*METHODS[method], *differences, *settings),
            )
            for cell, (method, differences) in CELLS.items()
            for variant, settings in VARIANTS.items()
        ),
        seeds=(0,),
        datasets=("cifar10", "flowers17"),
        tasks=("linear", "knn"),
        overrides=BASE,
    )
