"""Transfer of three methods with three seeds; Tiny-ImageNet at 64 pixels, ResNet-18.

python -m cassle_jax.tables --table=short_transfer --to=runs/short_transfer --parallel=8 \\
    --set=data.path=/data/tiny_imagenet --set=data.classes=/data/tiny_imagenet/pretrain.txt \\
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet=/data/held_out

`pretrain.txt` lists the pretraining classes, one per line; /data/held_out has the other classes.
"""

from cassle_jax.sweep.short import BASE, COMPARED, METHODS, row
from cassle_jax.sweep.table import Table


def get_table(compared=COMPARED):
    return Table(
        title="Transfer after twelve epochs",
        question="Does an encoder transfer better if its projector was conditioned? Yes where the "
        "difference to plain is above 0 by more than its interval.",
        rows=tuple(row(method, variant) for method in METHODS for variant in compared),
        datasets=("flowers17", "cifar10", "tiny_imagenet"),
        tasks=("linear", "knn", "few_shot"),
        evaluation=("episodes=400",),
        overrides=BASE,
    )
