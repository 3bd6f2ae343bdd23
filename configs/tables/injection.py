"""Ablation of the treatment and injection of ω, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=injection --to=runs/injection \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100
"""

from cassle_jax.sweep.paper import ablation

WAYS = {
    "MLP, concatenated": ("mlp", "concat"),  # CASSLE
    "MLP, added": ("mlp", "add"),
    "MLP, multiplied": ("mlp", "multiply"),
    "MLP, beside the image": ("mlp", "image"),
    "raw, concatenated": ("raw", "concat"),
    "hypernetwork": ("hypernetwork", "none"),
}


def get_table():
    return ablation(
        "Treatment and injection",
        "How should ω enter the projector?",
        {
            name: (f"conditioning.treatment={treatment}", f"conditioning.injection={injection}")
            for name, (treatment, injection) in WAYS.items()
        },
    )
