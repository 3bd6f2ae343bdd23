"""ImageNet-100, ResNet-50 at 224 pixels: the paper's main run.

python -m cassle_jax.pretrain --config=configs/imagenet100.py --workdir=runs/imagenet100

Arguments: see `base_config`. `--config=configs/imagenet100.py:follow=published` is the published
command: MoCo-v2, batch 256, 500 epochs, base learning rate 0.03, weight decay 1e-4, ω through an
MLP of depth 6 and width 64, concatenated. The images come from the 100 classes of imagenet2012 in
tensorflow-datasets, or from a folder <path>/<split>/<class>/<file>: --config.data.source=folder
--config.data.path=… --config.probe.test_split=val.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments), classes="imagenet100")
    config.epochs = 500
    config.batch_size = 256
    config.encoder.name = "resnet50"
    return config
