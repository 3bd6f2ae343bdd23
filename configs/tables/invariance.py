"""Invariance by stage of the network, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=invariance --to=runs/invariance \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100
"""

from cassle_jax.sweep.paper import moco_rows
from cassle_jax.sweep.table import Table


def get_table():
    return Table(
        title="Invariance",
        question="Are CASSLE's features less invariant to augmentations, and at which stage?",
        rows=moco_rows(),
        seeds=(0,),
        datasets=("imagenet100",),
        tasks=("invariance",),
        evaluation=("analysed=0",),
    )
