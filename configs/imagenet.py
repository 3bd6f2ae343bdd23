"""ImageNet, ResNet-50 at 224 pixels.

python -m cassle_jax.pretrain --config=configs/imagenet.py --workdir=runs/imagenet

Arguments: see `base_config`. The recipe is MoCo-v2's own (Chen et al., Improved Baselines with
Momentum Contrastive Learning, 2020): batch 256, 200 epochs, base learning rate 0.03, weight decay
1e-4. Other methods use the optimiser that their class sets in `recipe`; imagenet_<method>.py has
the full recipes of their papers. The images come from tensorflow-datasets, or from a folder
<path>/<split>/<class>/<file>:
--config.data.source=folder --config.data.path=… --config.probe.test_split=val.
"""

from cassle_jax.config import base_config, imagenet


def get_config(arguments=""):
    config = imagenet(base_config(arguments))
    config.epochs = 200
    config.batch_size = 256
    config.encoder.name = "resnet50"
    return config
