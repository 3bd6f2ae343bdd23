"""Linear evaluation of every method on ImageNet-100: the paper's main table.

python -m cassle_jax.tables --table=linear_imagenet100 --to=runs/linear_imagenet100 \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --keep_weights

ResNet-50, 224 pixels, 500 epochs, batch 256. docs/reproducing.md has the authors' figures and the
criteria for success and failure.
"""

from cassle_jax.sweep.paper import IMAGENET100, LINEAR, MORE_LINEAR, rows_of
from cassle_jax.sweep.table import Table


def get_table():
    return Table(
        title="Linear evaluation, ImageNet-100",
        question="Does CASSLE transfer better than the plain method, and than AugSelf?",
        rows=rows_of(IMAGENET100),
        seeds=(0,),
        datasets=LINEAR + MORE_LINEAR,
        tasks=("linear", "regression"),
    )
