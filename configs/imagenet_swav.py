"""ImageNet, ResNet-50: SwAV's own recipe.

python -m cassle_jax.pretrain --config=configs/imagenet_swav.py --workdir=runs/imagenet_swav

Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, 2020
(appendix A): batch 4096, 800 epochs, LARS, two views of 224 and six of 96 pixels; 75.3 % in linear
evaluation. Arguments: see `base_config`, without method. The paper's own run has conditioning=none.
Unlike the authors' LARC, LARS excludes biases and normalisation parameters from weight decay and
adaptation, and the warm-up starts at 0.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments, recipe_of="swav"))
    config.epochs = 800
    config.batch_size = 4096
    config.encoder.name = "resnet50"
    config.method.queue_size = 0  # a batch of this size needs no queue
    config.augment.color_strength = 2.0
    config.augment.grayscale = 0.1  # times the strength: 0.2
    config.optimizer.name = "lars"
    config.optimizer.base_learning_rate = 0.3
    config.optimizer.weight_decay = 1e-6
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.final_fraction = 0.001
    return config
