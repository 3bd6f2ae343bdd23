"""Encoders for detection on VOC 2007+2012, in detectron2's format, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=detection --to=runs/detection \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100

runs/detection/runs/<row>-<seed>/exported has the weights and a model card with the lines that load
them; fine-tuning is detectron2's own.
"""

from cassle_jax.sweep.paper import moco_rows
from cassle_jax.sweep.table import Table


def get_table():
    return Table(
        title="Detection",
        question="Does a detector that starts from CASSLE's encoder find more? (Marginal, in the "
        "paper.) The k-NN accuracy says whether what is handed over was learned.",
        rows=moco_rows(),
        seeds=(0,),
        datasets=("imagenet100",),
        tasks=("knn",),
        export=("detectron2",),
        toy=("encoder.name=resnet50", "encoder.small_images=False"),
    )
