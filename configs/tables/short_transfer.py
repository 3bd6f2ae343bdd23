"""Transfer of three methods with three seeds; Tiny-ImageNet at 64 pixels, ResNet-18.

python -m cassle_jax.tables --table=short_transfer --to=runs/short_transfer --parallel=8 \\
    --set=data.path=/data/tiny_imagenet \\
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet20=/data/tiny_imagenet

Pretraining sees 80 classes; 20 others are held out for the evaluation.
"""

from cassle_jax.sweep.short import BASE, COMPARED, METHODS, row
from cassle_jax.sweep.table import Table


def get_table(compared=COMPARED):
    return Table(
        title="Transfer after twelve epochs",
        question="Does an encoder transfer better if its projector was conditioned? Yes where the "
        "difference to plain is above 0 by more than its interval.",
        rows=tuple(row(method, variant) for method in METHODS for variant in compared),
        datasets=("flowers17", "cifar10", "tiny_imagenet20"),
        tasks=("linear", "knn", "few_shot"),
        evaluation=("episodes=400",),
        overrides=BASE,
    )
