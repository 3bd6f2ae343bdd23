"""STL-10, ResNet-18 at 96 pixels: the paper's recipe.

python -m cassle_jax.pretrain --config=configs/stl10.py --workdir=runs/stl10

Arguments: see `base_config`. `--config=configs/stl10.py:follow=published` is the published command:
MoCo-v2, batch 256, 200 epochs, base learning rate 0.03, weight decay 5e-4. As published,
pretraining uses the training and the unlabelled images; the k-NN probe classifies test images by
training images.
"""

from cassle_jax.augment import STL10_MEAN, STL10_STD
from cassle_jax.config import base_config


def get_config(arguments=""):
    config = base_config(arguments)
    config.epochs = 200
    config.batch_size = 256
    config.encoder.name = "resnet18"
    config.augment.size = 96
    config.augment.mean = STL10_MEAN
    config.augment.std = STL10_STD
    if config.optimizer.name == "sgd":  # methods with AdamW or LARS set their own rates
        config.optimizer.base_learning_rate = 0.03
        config.optimizer.weight_decay = 5e-4
    if config.method.name == "simsiam":
        config.method.projector_depth = 2  # as in SimSiam's paper for small images
    config.data.source = "tfds"
    config.data.name = "stl10"
    config.data.train_split = "train+unlabelled"
    config.data.canvas = 96
    config.probe.train_split = "train"
    return config
