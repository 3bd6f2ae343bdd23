"""Transfer of three methods with three seeds; Tiny-ImageNet at 64 pixels, ResNet-18.

python -m cassle_jax.tables --table=short_transfer --to=runs/short_transfer --parallel=8 \\
    --set=data.path=/data/tiny_imagenet --set=data.classes=/data/tiny_imagenet/pretrain.txt \\
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet=/data/held_out

`pretrain.txt` lists the pretraining classes, one per line; /data/held_out has the other classes.
"""

from cassle_jax.sweep.table import Row, Table

BASE = (
    "epochs=12",
    "batch_size=256",
    "encoder.small_images=False",
    "optimizer.name=adamw",
    "optimizer.base_learning_rate=0.002",
    "optimizer.weight_decay=1e-4",
    "optimizer.warmup_epochs=1.0",
    "checkpoint.every_steps=100000",
)
# Name and settings of the methods, by name in the table.
METHODS = {
    "SimCLR": ("simclr", ()),
    "MoCo-v2": ("moco_v2", ("method.momentum=0.99", "method.queue_size=16384")),
    "Barlow Twins": (
        "barlow_twins",
        (
            "method.projector_hidden=1024",
            "method.projector_out=1024",
            "method.vector_rate=1.0",
        ),
    ),
}
COLOURS = "color.hue+color.saturation+grayscale"
VARIANTS = {
    "plain": ("conditioning=none",),
    "AugSelf": ("conditioning=none", "augself=main"),
    "CASSLE": ("conditioning=cassle",),
    "leak-free": ("conditioning=leak_free",),
    "CASSLE + plain branch": ("conditioning=cassle", "conditioning.plain_branch=0.5"),
    "leak-free + plain branch": ("conditioning=branched",),
    "leak-free + plain branch 0.8": ("conditioning=leak_free", "conditioning.plain_branch=0.8"),
    "leak-free + dropout 0.5": ("conditioning=leak_free", "conditioning.dropout=0.5"),
    "leak-free from a third on": ("conditioning=leak_free", "conditioning.start_epoch=4"),
    "colours": (f"conditioning={COLOURS}",),
    "colours + crop + blur": (f"conditioning=blur+crop+{COLOURS}",),
    "colours + plain branch": (f"conditioning={COLOURS}", "conditioning.plain_branch=0.5"),
}
COMPARED = ("plain", "AugSelf", "CASSLE", "leak-free", "leak-free + plain branch")


def row(method, variant, *settings, name=""):
    """A variant of a method; its baseline is the plain variant with the same further settings."""
    builder, own = METHODS[method]
    return Row(
        f"{method}{name}, {variant}",
        f"configs/tiny_imagenet.py:method={builder}",
        (*own, *VARIANTS[variant], *settings),
        against=f"{method}{name}, plain",
    )


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
