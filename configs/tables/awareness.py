"""What a conditioned encoder knows and its projector uses; CIFAR-10, slim ResNet-18.

nice python -m cassle_jax.tables --table=awareness --to=runs/awareness --parallel=2 \\
    --set=data.path=/data/cifar10 --datasets=cifar10=/data/cifar10,flowers17=/data/flowers17

The base cell of `map`, with more seeds and protocols.
"""

from cassle_jax.sweep.slim import BASE, METHODS, VARIANTS
from cassle_jax.sweep.table import Row, Table

NAMES = {"SimCLR": "simclr", "MoCo-v2": "moco_v2", "Barlow Twins": "barlow_twins"}


def get_table():
    return Table(
        title="Awareness",
        question="Do features follow the augmentation, and at which stage? Does the projector use "
        "ω? What does it bring with few labels?",
        rows=tuple(
            Row(
                f"{name}, {variant}",
                f"configs/cifar10.py:method={method}",
                (*METHODS[method], *settings),
            )
            for name, method in NAMES.items()
            for variant, settings in VARIANTS.items()
        ),
        seeds=(0, 1, 2),
        datasets=("cifar10", "flowers17"),
        tasks=("linear", "knn", "few_shot", "invariance", "matching", "augmentation_probes"),
        overrides=BASE,
    )
