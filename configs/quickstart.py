"""The embedded scenes at 32 pixels, a small ResNet: a minute or two on a laptop.

python -m cassle_jax.pretrain --config=configs/quickstart.py --workdir=runs/quickstart

Arguments: method, conditioning, augself, follow; see `base_config`. `launch/quickstart.sh` runs it
plain and with CASSLE, and shows what either representation keeps of the scenes' factors.
"""

from cassle_jax.config import base_config


def get_config(arguments=""):
    config = base_config(arguments)
    config.steps = 200
    config.batch_size = 128
    config.encoder.name = "resnet18"
    config.encoder.width = 16
    config.encoder.small_images = True
    config.conditioning.depth = 2
    config.augment.size = 32
    config.optimizer.base_learning_rate = 0.2
    config.optimizer.weight_decay = 1e-4
    config.data.source = "scenes"
    config.data.scenes = 10_000
    config.data.canvas = 48
    config.log.every_steps = 20
    config.probe.every_epochs = 1
    config.probe.train_images = 2_000
    config.probe.test_images = 500
    if "queue_size" in config.method:
        config.method.queue_size = 4096
        config.method.momentum = 0.99
    return config
