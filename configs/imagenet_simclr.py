"""ImageNet, ResNet-50: SimCLR's own recipe.

python -m cassle_jax.pretrain --config=configs/imagenet_simclr.py --workdir=runs/imagenet_simclr

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020 (section
2.2, appendix A and B.6): batch 4096, 1000 epochs, LARS, strong colour jitter; 69.3 % in linear
evaluation. Arguments: see `base_config`, without method. The paper's own run has conditioning=none.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments, recipe_of="simclr"))
    config.epochs = 1000
    config.batch_size = 4096
    config.encoder.name = "resnet50"
    config.method.temperature = 0.1
    config.augment.crop_area = (0.08, 1.0)
    config.augment.color_strength = 2.0
    config.augment.grayscale = 0.1  # times the strength: 0.2
    config.optimizer.name = "lars"
    config.optimizer.base_learning_rate = 0.3
    config.optimizer.weight_decay = 1e-6
    config.optimizer.warmup_epochs = 10.0
    return config
