"""CIFAR-10, ResNet-18 at 32 pixels.

python -m cassle_jax.pretrain --config=configs/cifar10.py --workdir=runs/cifar10

Arguments: see `base_config`. The recipe is that of the published CASSLE code for STL-10, at 32
pixels; the paper does not pretrain on CIFAR-10. The images come from tensorflow-datasets, or from a
folder <path>/<split>/<class>/<file>:
--config.data.source=folder --config.data.path=…
"""

from cassle_jax.config import base_config


def get_config(arguments=""):
    config = base_config(arguments)
    config.epochs = 200
    config.batch_size = 256
    config.encoder.name = "resnet18"
    config.encoder.small_images = True
    config.augment.size = 32
    if config.optimizer.name == "sgd":  # methods with AdamW or LARS set their own rates
        config.optimizer.base_learning_rate = 0.03
        config.optimizer.weight_decay = 5e-4
    if config.method.name == "simsiam":
        config.method.projector_depth = 2  # as in SimSiam's paper for small images
    config.data.source = "tfds"
    config.data.name = "cifar10"
    config.data.canvas = 32
    return config
