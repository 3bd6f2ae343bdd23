"""ImageNet, ResNet-50: VICReg's own recipe.

python -m cassle_jax.pretrain --config=configs/imagenet_vicreg.py --workdir=runs/imagenet_vicreg

Bardes, Ponce and LeCun, VICReg, 2022 (section 4.2): batch 2048, 1000 epochs, LARS, weights 25, 25
and 1, asymmetric views; 73.2 % in linear evaluation. Arguments: see `base_config`, without method.
The paper's own run has conditioning=none.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments, recipe_of="vicreg"))
    config.epochs = 1000
    config.batch_size = 2048
    config.encoder.name = "resnet50"
    config.augment.asymmetric = True
    config.augment.solarize_after = "blur"
    config.augment.crop_area = (0.08, 1.0)
    config.augment.saturation = (0.8, 1.2)
    config.optimizer.name = "lars"
    config.optimizer.base_learning_rate = 0.2
    config.optimizer.weight_decay = 1e-6
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.final_fraction = 0.001
    return config
