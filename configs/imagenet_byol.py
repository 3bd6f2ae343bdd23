"""ImageNet, ResNet-50: BYOL's own recipe.

python -m cassle_jax.pretrain --config=configs/imagenet_byol.py --workdir=runs/imagenet_byol

Grill et al., Bootstrap Your Own Latent, 2020 (section 3.3, appendix B): batch 4096, 1000 epochs,
LARS, momentum from 0.996, asymmetric views; 74.3 % in linear evaluation. Arguments: see
`base_config`, without method. The paper's own run has conditioning=none.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments, recipe_of="byol"))
    config.epochs = 1000
    config.batch_size = 4096
    config.encoder.name = "resnet50"
    config.method.projector_hidden = 4096
    config.augment.asymmetric = True
    config.augment.solarize_after = "blur"
    config.augment.crop_area = (0.08, 1.0)
    config.augment.saturation = (0.8, 1.2)
    config.optimizer.name = "lars"
    config.optimizer.base_learning_rate = 0.2
    config.optimizer.weight_decay = 1.5e-6
    config.optimizer.warmup_epochs = 10.0
    return config
