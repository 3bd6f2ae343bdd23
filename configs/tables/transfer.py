"""Transfer after pretraining on Tiny-ImageNet, within a time budget: the paper's claim.

bash launch/transfer.sh --to=runs/transfer --minutes=1200 --data=/data/tiny_imagenet \\
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet20=/data/tiny_imagenet

Pretraining sees 80 classes, and `tiny_imagenet20` has 20 others; `--set=data.classes=` takes all.
"""

from cassle_jax.sweep.table import Row, Table

METHODS = ("simclr", "moco_v2", "barlow_twins")
VARIANTS = {
    "plain": "conditioning=none",
    "CASSLE": "conditioning=cassle",
    "leak-free": "conditioning=leak_free",
    "AugSelf": "conditioning=none,augself=main",
    # A budget measures the last row per method. This one has the longest step: two projectors.
    "leak-free + plain branch": "conditioning=branched",
}


def get_table(methods=METHODS):
    return Table(
        title="Transfer",
        question="Do features transfer better if the projector is conditioned (CASSLE), if its ω "
        "does not reveal the image's mean colour (leak-free), or if an auxiliary loss predicts ω "
        "(AugSelf)? A row is ahead where its interval against plain is above 0.",
        rows=tuple(
            Row(f"{method}, {variant}", f"configs/tiny_imagenet.py:method={method},{arguments}")
            for method in methods
            for variant, arguments in VARIANTS.items()
        ),
        datasets=("flowers17", "cifar10", "tiny_imagenet20"),
        tasks=("linear", "knn", "few_shot", "spectrum", "invariance", "matching"),
        overrides=("data.classes=tiny_imagenet80",),
    )
