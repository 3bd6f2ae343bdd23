"""Ablation of γ, the MLP on ω: depth and width, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=gamma --to=runs/gamma \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100
"""

from cassle_jax.sweep.paper import ablation

DEPTHS, WIDTHS = (2, 4, 6, 8), (16, 64, 256)


def get_table():
    return ablation(
        "Depth and width of γ",
        "How large must the MLP on ω be?",
        {
            f"γ {depth}×{width}": (f"conditioning.depth={depth}", f"conditioning.width={width}")
            for depth in DEPTHS
            for width in WIDTHS
        },
    )
