"""ImageNet, ResNet-50: MoCo-v3's own recipe.

python -m cassle_jax.pretrain --config=configs/imagenet_moco_v3_resnet50.py \\
    --workdir=runs/imagenet_moco_v3_resnet50

Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers, 2021, and its
code: batch 4096, 300 epochs, LARS, temperature 1, momentum from 0.99, asymmetric views; 72.8 % in
linear evaluation. Arguments: see `base_config`, without method. The paper's own run has
conditioning=none.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments, recipe_of="moco_v3"))
    config.epochs = 300
    config.batch_size = 4096
    config.encoder.name = "resnet50"
    config.method.temperature = 1.0
    config.method.momentum = 0.99
    config.method.momentum_schedule = "cosine"
    config.method.projector_depth = 2
    config.method.predictor_last_bn = False
    config.augment.asymmetric = True
    config.augment.solarize_after = "blur"
    config.augment.saturation = (0.8, 1.2)
    config.optimizer.name = "lars"
    config.optimizer.base_learning_rate = 0.3
    config.optimizer.weight_decay = 1e-6
    config.optimizer.warmup_epochs = 10.0
    return config
