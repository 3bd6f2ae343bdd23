"""Your own folder of photographs, slim ResNet-18 at 64 pixels: minutes on a laptop.

python -m cassle_jax.pretrain --config=configs/photos.py:method=simclr,conditioning=branched \\
    --config.data.path=photos --workdir=runs/photos

Arguments: see `base_config`. The images need no labels and no splits. Larger runs take more steps
and a wider encoder (`encoder.width`).
"""

from cassle_jax.config import base_config, narrow_heads


def get_config(arguments=""):
    config = base_config(arguments)
    config.steps = 1000
    config.batch_size = 128
    config.encoder.name = "resnet18"
    config.encoder.width = 16
    config.augment.size = 64
    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 0.008
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 0.5
    config.data.source = "folder"
    config.data.canvas = 96
    config.probe.every_epochs = 0
    narrow_heads(config, 256)
    if config.method.name == "moco_v2":
        config.method.queue_size = 4096
        config.method.momentum = 0.99
    return config
