"""The paper's claim in a budget of time: pretraining on Tiny-ImageNet, and what transfers.

bash launch/transfer.sh --to=runs/transfer --minutes=1200 --data=/data/tiny_imagenet \\
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet=/data/tiny_imagenet
"""

from cassle_jax.sweep.table import Row, Table

METHODS = ("simclr", "moco_v2", "barlow_twins")
VARIANTS = {
    "plain": "conditioning=none",
    "CASSLE": "conditioning=cassle",
    "leak-free": "conditioning=leak_free",
    "AugSelf": "conditioning=none,augself=main",
    # The last of a method is measured: with Barlow Twins' wide projector twice, the longest step.
    "leak-free + plain branch": "conditioning=branched",
}


def get_table(methods=METHODS):
    return Table(
        title="Transfer",
        question="Do features transfer better where the projector knows how views were augmented, "
        "without ω giving the image's mean colour away (leak-free), or where an auxiliary loss "
        "predicts it (AugSelf)? A row is ahead where its interval against plain is above 0.",
        rows=tuple(
            Row(f"{method}, {variant}", f"configs/tiny_imagenet.py:method={method},{arguments}")
            for method in methods
            for variant, arguments in VARIANTS.items()
        ),
        datasets=("flowers17", "cifar10", "tiny_imagenet"),
        tasks=("linear", "knn", "few_shot", "spectrum", "invariance", "matching"),
    )
