"""Ablation of γ, the MLP on ω: depth and width, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=gamma --to=runs/gamma \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100
"""

from cassle_jax.sweep.paper import IMAGENET100, LINEAR
from cassle_jax.sweep.table import Row, Table

DEPTHS, WIDTHS = (2, 4, 6, 8), (16, 64, 256)


def get_table():
    told = tuple(
        Row(
            f"γ {depth}×{width}",
            f"{IMAGENET100},conditioning=cassle",
            (f"conditioning.depth={depth}", f"conditioning.width={width}"),
            against="plain",
        )
        for depth in DEPTHS
        for width in WIDTHS
    )
    return Table(
        title="Depth and width of γ",
        question="How large must the MLP on ω be?",
        rows=(Row("plain", f"{IMAGENET100},conditioning=none"), *told),
        seeds=(0,),
        datasets=LINEAR,
        tasks=("linear",),
    )
