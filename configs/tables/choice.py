"""Selects a kind of conditioning, in the set-up of `short_transfer`.

python -m cassle_jax.tables --table=choice --to=runs/choice --parallel=8 \\
    --set=data.path=/data/tiny_imagenet \\
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet20=/data/tiny_imagenet
"""

from cassle_jax.sweep.short import BASE, COMPARED, VARIANTS, row
from cassle_jax.sweep.table import Table

RATES = {" at half the rate": "0.001", " at twice the rate": "0.004"}


def get_table():
    return Table(
        title="Which conditioning",
        question="Which conditioning is ahead of plain? This table selects it, with a seed that "
        "the table short_transfer does not use.",
        rows=(
            *(row("SimCLR", variant) for variant in VARIANTS),
            *(row("MoCo-v2", variant) for variant in COMPARED),
            *(
                row("SimCLR", variant, f"optimizer.base_learning_rate={rate}", name=name)
                for name, rate in RATES.items()
                for variant in ("plain", "CASSLE", "leak-free + plain branch")
            ),
        ),
        seeds=(100,),
        datasets=("flowers17", "cifar10", "tiny_imagenet20"),
        tasks=("linear", "knn"),
        overrides=BASE,
    )
