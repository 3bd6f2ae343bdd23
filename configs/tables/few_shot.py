"""Few-shot classification of MoCo-v2 on ImageNet-100: 5 ways, 1 and 5 shots.

python -m cassle_jax.tables --table=few_shot --to=runs/few_shot \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100
"""

from cassle_jax.sweep.paper import moco_rows
from cassle_jax.sweep.table import Table


def get_table():
    return Table(
        title="Few-shot",
        question="Does CASSLE help with one or five training images per class?",
        rows=moco_rows(),
        seeds=(0,),
        datasets=("fc100", "cub200_few_shot", "plant_village"),
        tasks=("few_shot",),
    )
