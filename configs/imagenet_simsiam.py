"""ImageNet, ResNet-50: SimSiam's own recipe.

python -m cassle_jax.pretrain --config=configs/imagenet_simsiam.py --workdir=runs/imagenet_simsiam

Chen and He, Exploring Simple Siamese Representation Learning, 2021 (section 3, appendix A): batch
512, 100 epochs, SGD, constant learning rate of the predictor; 68.1 % in linear evaluation.
Arguments: see `base_config`, without method. The paper's own run has conditioning=none.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments, recipe_of="simsiam"))
    config.epochs = 100
    config.batch_size = 512
    config.encoder.name = "resnet50"
    config.optimizer.name = "sgd"
    config.optimizer.base_learning_rate = 0.05
    config.optimizer.weight_decay = 1e-4
    return config
