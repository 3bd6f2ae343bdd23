"""Ablation of the descriptors in ω, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=descriptors --to=runs/descriptors \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100
"""

from cassle_jax.sweep.paper import IMAGENET100, LINEAR
from cassle_jax.sweep.table import Row, Table

ALL = "blur+color+crop+flip+grayscale"
SETS = {
    "plain": "none",
    "crop": "crop",
    "color": "color",
    "crop and color": "crop+color",
    "all": ALL,
    "all and color_diff": f"{ALL}+color_diff",
    "CASSLE": "cassle",  # all and color_diff without flip, as in the published command
    "leak-free": "leak_free",  # not in the paper: palette replaces color_diff
}


def get_table():
    return Table(
        title="Descriptors",
        question="Which descriptors does the projector need?",
        rows=tuple(
            Row(f"MoCo-v2, {name}", f"{IMAGENET100},conditioning={value}")
            for name, value in SETS.items()
        ),
        seeds=(0,),
        datasets=LINEAR,
        tasks=("linear",),
    )
