"""Plain, AugSelf and CASSLE of three methods, with three seeds; CIFAR-10 at 32 pixels.

python -m cassle_jax.tables --table=small_images --to=runs/small_images \\
    --set=data.source=folder --set=data.path=/data/cifar10 \\
    --datasets=cifar10=/data/cifar10,flowers17=/data/flowers17
"""

from cassle_jax.sweep.paper import VARIANTS
from cassle_jax.sweep.table import Row, Table

METHODS = {"SimCLR": "simclr", "MoCo-v2": "moco_v2", "Barlow Twins": "barlow_twins"}


def get_table():
    return Table(
        title="Small images",
        question="Do features transfer better with a conditioned projector? Yes if CASSLE is ahead "
        "of plain by more than the interval on most datasets.",
        rows=tuple(
            Row(f"{method}, {variant}", f"configs/cifar10.py:method={name},{arguments}")
            for method, name in METHODS.items()
            for variant, arguments in VARIANTS.items()
        ),
        datasets=("cifar10", "flowers17"),
        tasks=("linear", "knn", "few_shot", "spectrum"),
        overrides=("epochs=20",),
    )
