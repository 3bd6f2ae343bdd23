"""Exports encoders for detection on VOC 2007+2012 with detectron2, MoCo-v2 on ImageNet-100.

python -m cassle_jax.tables --table=detection --to=runs/detection \\
    --set=data.path=/data/tfds --data_dir=/data/tfds --weights_of=runs/linear_imagenet100

runs/detection/runs/<row>-<seed>/exported has the weights and a model card with the code to load
them; detectron2 does the fine-tuning.
"""

from cassle_jax.sweep.paper import moco_rows
from cassle_jax.sweep.table import Table


def get_table():
    return Table(
        title="Detection",
        question="Does CASSLE's encoder improve a detector? (In the paper the gain is marginal.) "
        "The k-NN accuracy checks that the exported encoders are trained.",
        rows=moco_rows(),
        seeds=(0,),
        datasets=("imagenet100",),
        tasks=("knn",),
        export=("detectron2",),
        toy=("encoder.name=resnet50", "encoder.small_images=False"),
    )
