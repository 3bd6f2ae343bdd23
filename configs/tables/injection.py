"""Ablation of how ω enters: treatments and injections, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=injection --to=runs/injection \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100
"""

from cassle_jax.sweep.paper import IMAGENET100, LINEAR
from cassle_jax.sweep.table import Row, Table

WAYS = {
    "MLP, concatenated": ("mlp", "concat"),  # CASSLE
    "MLP, added": ("mlp", "add"),
    "MLP, multiplied": ("mlp", "multiply"),
    "MLP, beside the image": ("mlp", "image"),
    "raw, concatenated": ("raw", "concat"),
    "hypernetwork": ("hypernetwork", "none"),
}


def get_table():
    told = tuple(
        Row(
            name,
            f"{IMAGENET100},conditioning=cassle",
            (f"conditioning.treatment={treatment}", f"conditioning.injection={injection}"),
            against="plain",
        )
        for name, (treatment, injection) in WAYS.items()
    )
    return Table(
        title="Treatment and injection",
        question="How should ω enter the projector?",
        rows=(Row("plain", f"{IMAGENET100},conditioning=none"), *told),
        seeds=(0,),
        datasets=LINEAR,
        tasks=("linear",),
    )
