"""Methods that use ω, each in its own way, on the embedded motifs; 8 to 28 minutes per run on CPUs.

python -m cassle_jax.tables --table=field --to=runs/field --parallel=2 \\
    --datasets=motifs,flowers17=/data/flowers17,cifar10=/data/cifar10

Without `--datasets`, the motifs' factors alone: nothing has to be downloaded.
"""

from cassle_jax.sweep.slim import HEADS
from cassle_jax.sweep.table import Row, Table

# Arguments of the configuration by method and variant.
VARIANTS = {
    "SimCLR": {
        "plain": "conditioning=none",
        "AugSelf": "conditioning=none,augself=main",
        "CASSLE": "conditioning=cassle",
        "leak-free + plain branch": "conditioning=branched",
        "EquiMod": "conditioning=none,equimod=main",
        "E-SSL": "conditioning=none,essl=cifar10",
        "STL": "conditioning=none,stl=main",
    },
    "VICReg": {
        "plain": "conditioning=none",
        "SIE": "conditioning=none,sie=main",
    },
    "BYOL": {
        "plain": "conditioning=none",
        "CASSLE": "conditioning=cassle",
        "conditional": "conditioning=byol_conditional",
    },
}


def get_table():
    return Table(
        title="The field",
        question="What does an encoder keep of the images, and which way of using ω keeps more of "
        "it than the plain method? Factors by group, and how features follow their change; more "
        "where the difference to plain is above 0 by more than its interval.",
        rows=tuple(
            Row(
                f"{method}, {variant}",
                f"configs/quickstart.py:method={method.lower()},{arguments}",
                HEADS,
            )
            for method, variants in VARIANTS.items()
            for variant, arguments in variants.items()
        ),
        datasets=("motifs",),
        tasks=("factors", "equivariance", "linear", "knn"),
    )
