"""ImageNet, ResNet-50 at 224 pixels.

python -m cassle_jax.pretrain --config=configs/imagenet.py --workdir=runs/imagenet

Arguments: method, conditioning, augself, follow; see `base_config`. The recipe is MoCo-v2's own
(Chen et al., 2020): batch 256, 200 epochs, base learning rate 0.03, weight decay 1e-4. The images
come from tensorflow-datasets, or from a folder <path>/<split>/<class>/<file>:
--config.data.source=folder --config.data.path=… --config.probe.test_split=val.
"""

from cassle_jax.config import base_config


def get_config(arguments=""):
    config = base_config(arguments)
    config.epochs = 200
    config.batch_size = 256
    config.encoder.name = "resnet50"
    config.augment.size = 224
    config.optimizer.base_learning_rate = 0.03
    config.optimizer.weight_decay = 1e-4
    config.data.source = "tfds"
    config.data.name = "imagenet2012"
    config.data.canvas = 512
    config.data.cache_gib = 0.0
    config.probe.test_split = "validation"
    config.probe.train_images = 50_000
    config.probe.test_images = 10_000
    return config
