"""Linear evaluation of every method on STL-10.

python -m cassle_jax.tables --table=linear_stl10 --to=runs/linear_stl10 \\
    --set=data.path=/data/tfds --data_dir=/data/tfds

ResNet-18, 96 pixels, 200 epochs, batch 256, on training and unlabelled images.
"""

from cassle_jax.sweep.paper import LINEAR, rows_of
from cassle_jax.sweep.table import Table


def get_table():
    return Table(
        title="Linear evaluation, STL-10",
        question="Does CASSLE transfer better than the plain method, and than AugSelf?",
        rows=rows_of("configs/stl10.py:follow=published"),
        seeds=(0,),
        datasets=LINEAR,
        tasks=("linear",),
    )
