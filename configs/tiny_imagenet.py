"""Tiny-ImageNet, ResNet-18 at 64 pixels.

python -m cassle_jax.pretrain --config=configs/tiny_imagenet.py \\
    --config.data.path=/data/tiny_imagenet --workdir=runs/tiny_imagenet

Arguments: see `base_config`. The recipe is that of the published CASSLE code for STL-10, at 64
pixels; the paper does not pretrain on Tiny-ImageNet. The images come from a folder with the splits
train and val, as published or <path>/<split>/<class>/<file>.
"""

from cassle_jax.config import base_config


def get_config(arguments=""):
    config = base_config(arguments)
    config.epochs = 200
    config.batch_size = 256
    config.encoder.name = "resnet18"
    config.encoder.small_images = True
    config.augment.size = 64
    if config.optimizer.name == "sgd":  # methods with AdamW or LARS set their own rates
        config.optimizer.base_learning_rate = 0.03
        config.optimizer.weight_decay = 5e-4
    if config.method.name == "simsiam":
        config.method.projector_depth = 2  # as in SimSiam's paper for small images
    config.data.source = "folder"
    config.data.canvas = 64
    config.probe.test_split = "val"
    return config
