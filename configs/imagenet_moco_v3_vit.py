"""ImageNet, ViT-S/16: MoCo-v3's own recipe.

python -m cassle_jax.pretrain --config=configs/imagenet_moco_v3_vit.py \\
    --workdir=runs/imagenet_moco_v3_vit

Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers, 2021 (section
4), and its code: batch 4096, 300 epochs, AdamW, momentum from 0.99, asymmetric views; 73.2 % in
linear evaluation, and 76.7 % with ViT-B/16 (--config.encoder.name=vit_base). Arguments: see
`base_config`, without method. The paper's own run has conditioning=none.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments, recipe_of="moco_v3"))
    config.epochs = 300
    config.batch_size = 4096
    config.encoder.name = "vit_small"
    config.method.momentum = 0.99
    config.method.momentum_schedule = "cosine"
    config.augment.asymmetric = True
    config.augment.solarize_after = "blur"
    config.augment.crop_area = (0.08, 1.0)
    config.augment.saturation = (0.8, 1.2)
    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 1.5e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_epochs = 40.0
    return config
