"""Heads on the encoder's third stage beside the same heads on its last, on the embedded motifs.

python -m cassle_jax.tables --table=stages --to=runs/stages --parallel=2 \\
    --datasets=motifs,flowers17=/data/flowers17,cifar10=/data/cifar10

Without `--datasets`, the motifs' factors alone: nothing has to be downloaded.
"""

from cassle_jax.sweep.slim import HEADS
from cassle_jax.sweep.table import Row, Table

# Arguments of the configuration and the setting of the stage, by what the heads do.
VARIANTS = {
    "AugSelf": ("conditioning=none,augself=main", "augself.stage=3"),
    "EquiMod": ("conditioning=none,equimod=main", "equimod.stage=3"),
    "leak-free + plain branch": ("conditioning=branched", "conditioning.stage=3"),
}


def _row(variant: str, arguments: str, *settings: str) -> Row:
    return Row(
        f"SimCLR, {variant}",
        f"configs/quickstart.py:method=simclr,{arguments}",
        (*HEADS, *settings),
    )


def get_table():
    return Table(
        title="Stages",
        question="Do heads cost the last stage's features less when they see an earlier stage?",
        rows=(
            _row("plain", "conditioning=none"),
            *(
                row
                for variant, (arguments, earlier) in VARIANTS.items()
                for row in (
                    _row(variant, arguments),
                    _row(f"{variant} at stage 3", arguments, earlier),
                )
            ),
        ),
        seeds=(0, 1, 2),
        datasets=("motifs",),
        tasks=("factors", "equivariance", "linear", "knn"),
    )
