"""Matching of views with right, wrong and no ω, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=matching --to=runs/matching \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100
"""

from cassle_jax.sweep.paper import moco_rows
from cassle_jax.sweep.table import Table


def get_table():
    return Table(
        title="Matching",
        question="Does the projector use ω: do views match worse with the ω of another image?",
        rows=moco_rows(),
        seeds=(0,),
        datasets=("imagenet100",),
        tasks=("matching",),
        evaluation=("analysed=0",),
    )
