"""Rendered motifs at 48 pixels, slim ResNet-18: some minutes on two CPU cores.

python -m cassle_jax.pretrain --config=configs/quickstart.py --workdir=runs/quickstart

Arguments: see `base_config`. `launch/quickstart.sh` trains the plain method and CASSLE, and
compares how well both representations predict the motifs' factors.
"""

from cassle_jax.config import base_config, narrow_heads


def get_config(arguments=""):
    config = base_config(arguments)
    config.steps = 500
    config.batch_size = 128  # small, for many steps
    config.encoder.name = "resnet18"
    config.encoder.width = 8
    config.conditioning.depth = 2
    config.conditioning.width = 8  # an eighth of the features, like 64 for ResNet-18's 512
    config.augment.size = 48
    # So strong that colour does not distinguish motifs without ω; darker, so that less is clipped.
    config.augment.brightness = (0.2, 1.4)
    config.augment.contrast = (0.2, 1.8)
    config.augment.saturation = (0.0, 2.0)
    config.augment.hue = (-0.5, 0.5)
    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 0.016
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 0.5
    config.data.source = "motifs"
    config.data.scenes = 10_000
    config.data.canvas = 48
    config.log.every_steps = 20
    config.probe.every_epochs = 2
    config.probe.train_images = 2_000
    config.probe.test_images = 500
    narrow_heads(config, 256)
    if config.method.name == "moco_v2":
        config.method.queue_size = 4096
        config.method.momentum = 0.99
    return config
