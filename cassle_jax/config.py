"""Defines every setting of a run with its default, the base of all configuration files.

A file in `configs/` defines a function of an argument string, as in
`--config=configs/cifar10.py:method=simclr,conditioning=none,augself=main`, or `--config=cifar10`.
It starts from `base_config`, which parses the arguments, and changes the settings of its dataset.
Flags override single values: `--config.optimizer.weight_decay=1e-4`.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable

from ml_collections import ConfigDict

from cassle_jax.augment import CASSLE_DESCRIPTORS, DESCRIPTORS, LEAK_FREE_DESCRIPTORS, AugmentSpec
from cassle_jax.checks import ConfigError, check_one_of
from cassle_jax.methods import AUXILIARIES, METHODS
from cassle_jax.methods.build import Conditioning
from cassle_jax.optimizer import OptimizerSpec

ARGUMENTS = ("method", "conditioning", *AUXILIARIES, "follow")

# The settings whose names the configuration leaves open.
OPEN = "optimizer.settings."

# Options of a flag `--config` with which the command line can give open settings; the
# configuration is locked without them.
FLAG_OPTIONS = {"lock_config": False, "accept_new_attributes": True}

# Settings in which the published CASSLE code differs from the papers, for all methods.
PUBLISHED = {"augment.jitter_order": "batch", "optimizer.schedule_by": "epoch"}


def base_config(arguments: str = "", *, recipe_of: str = "") -> ConfigDict:
    """Builds the default configuration of a method with its conditioning.

    Args:
      arguments: comma-separated `name=value`:
        `method`: a name in `METHODS` (default `moco_v2`).
        `conditioning`: `cassle` (default: blur, color, color_diff, crop, grayscale), `leak_free`
        (palette replaces color_diff, which reveals the image's mean colour), `branched`
        (leak_free, with half of the loss through a plain projector beside the conditioned one; see
        docs/evidence.md), `byol_conditional` (the predictor sees the relative ω, without what
        depends on pixels; Ghaemi et al. 2025), `none` for the plain method, or names of descriptors
        and components, such as color.hue, joined by `+`.
        `augself`: `none` (default), `main` (crop and color at 0.5, the paper's main setting), or
        `name:weight` joined by `+`.
        `equimod`: `none` (default), `main` (weight 1, the paper's; Devillers and Lefort 2022), or a
        weight.
        `essl`: `none` (default), `main` (weight 0.4 and small crops, the paper's for ImageNet;
        Dangovski et al. 2022), `cifar10` (its for CIFAR-10), or a weight.
        `sie`: `none` (default), `main` (the paper's, whose method is `vicreg`; Garrido et al.
        2023), or a factor of its weights.
        `stl`: `none` (default), `main` (weight 1, the paper's; Yu et al. 2024), or a weight.
        `follow`: `paper` (default), or `published` for the published CASSLE code. There, MoCo's
        queue holds queries, SimCLR takes negatives from its own device, BYOL's momentum and the
        learning rate change once per epoch, and a batch shares one order of jitter operations.
      recipe_of: name of the method whose recipe the configuration is; `method` accepts no other.
        Empty for all methods.

    Raises:
      ConfigError: an unknown argument or value.
    """
    chosen = _parse(arguments, recipe_of)
    method = METHODS[chosen["method"]]
    config = _defaults()
    config.method = ConfigDict({"name": chosen["method"], **dataclasses.asdict(method())})
    config.conditioning = _from_dataclass(_conditioning(chosen["conditioning"]))
    for name, auxiliary in AUXILIARIES.items():
        config[name] = ConfigDict(auxiliary.settings(chosen[name]))
    config.update_from_flattened_dict(method.recipe)
    for name, auxiliary in AUXILIARIES.items():
        if auxiliary.of(config[name].to_dict()).weights:
            config.update_from_flattened_dict(auxiliary.recipes.get(chosen["method"], {}))
    if chosen["follow"] == "published":
        config.update_from_flattened_dict({**PUBLISHED, **method.published})
    config.lock()
    config.optimizer.settings.unlock()  # its names are those of the optimiser's arguments
    return config


def narrow_heads(config: ConfigDict, most: int) -> None:
    """Bounds the widths of the method's heads at `most`, for a slim encoder."""
    for name in ("projector_hidden", "projector_out", "predictor_hidden", "prototypes"):
        if name in config.method:
            config.method[name] = min(config.method[name], most)


def _defaults() -> ConfigDict:
    """The settings that are the same for every method, until its recipe changes them."""
    config = ConfigDict()
    config.seed = 0
    config.epochs = 200
    config.steps = 0  # above 0: length of the run, in place of `epochs`
    config.batch_size = 256  # images per step, all devices together
    # Images per encoder pass, all devices together, to save memory; 0: the whole batch. Loss,
    # gradient and the heads' BatchNorm see the whole batch; the encoder's BatchNorm sees a chunk.
    config.chunk_size = 0
    config.dtype = "auto"  # for convolutions and matrix products: bfloat16 on accelerators
    config.deterministic = False  # GPU: use bitwise reproducible kernels only
    config.compilation_cache = "auto"  # a folder; "auto": in the user's cache; "": none

    config.encoder = _encoder_defaults()
    config.weights = ConfigDict(
        {
            "path": "",  # a file with the initial weights; "": random weights
            "networks": "all",  # all networks of the file, or its encoder
        }
    )
    config.augment = _from_dataclass(AugmentSpec(size=32))
    config.augment.color_strength = 1.0  # scales the jitter and the probability of grayscale
    # BYOL's pair of views: blur has a probability of 1 in the first and of 0.1 in the second,
    # solarize of 0 and 0.2. Replaces these probabilities, and solarize's threshold.
    config.augment.asymmetric = False
    config.optimizer = _from_dataclass(OptimizerSpec())
    config.data, config.probe = _data_defaults()
    config.checkpoint = ConfigDict(
        {
            "every_steps": 1000,
            "keep": 3,  # number of newest checkpoints to keep
            "keep_every_steps": 0,  # also save, and keep, at multiples of this step; 0: none
        }
    )
    config.log = ConfigDict(
        {
            "every_steps": 50,
            "to": (),  # in addition to metrics.jsonl and TensorBoard: wandb, mlflow
        }
    )
    return config


def _encoder_defaults() -> ConfigDict:
    """The settings of `make_encoder`."""
    return ConfigDict(
        {
            "name": "resnet18",
            "width": 0,  # channels of the stem, or of a Vision Transformer; 0: the default
            "small_images": False,  # ResNets: a stem for images of about 32 pixels
            "patch_size": 16,  # Vision Transformers: in pixels
            # Vision Transformers: attention heads; 0: the default. vit_small has 12 here and in
            # MoCo-v3, 6 in DINO and timm
            "heads": 0,
            "registers": 0,  # Vision Transformers: further learnt tokens; DINOv2 has 4
            # Vision Transformers: initial factor of each block's output; DINOv2 has 1e-5; 0: none
            "layer_scale": 0.0,
            "swiglu": False,  # Vision Transformers: gated feed-forward networks
            "rotary": False,  # Vision Transformers: rotary positions, as DINOv3 has
            "remat": False,  # recompute activations in the backward pass, to save memory
            # Vision Transformers on NVIDIA's GPUs in bfloat16: cuDNN's kernel instead of XLA's
            "flash_attention": True,
        }
    )


def _data_defaults() -> tuple[ConfigDict, ConfigDict]:
    """The settings of the training images, and of the online probe."""
    data = ConfigDict(
        {
            "source": "scenes",  # scenes or motifs (drawn), folder, tfds, webdataset
            "name": "",  # tfds: the builder, such as cifar10
            "path": "",  # see docs/datasets.md; tfds: its data_dir, "": the default
            "train_split": "train",
            "classes": "",  # "": all; a name in CLASS_LISTS; or a text file, a class name per line
            "canvas": 32,  # pixels; larger images are shrunk to fit
            "scenes": 50_000,  # number of rendered images, for scenes and motifs
            "threads": 0,  # reading and decoding threads; 0: half the CPUs, at least 2
            "cache_gib": 4.0,  # memory of a process for images that stay: what fits
            "on_device": "auto",  # all images on every device: auto (if they fit), always or never
            "max_pixels": 89_478_485,  # images with more pixels, Pillow's limit, count as damaged
            "max_bad_fraction": 0.01,  # stop the run above this fraction of undecodable images
        }
    )
    probe = ConfigDict(
        {
            "every_epochs": 10,  # interval of k-NN accuracy and RankMe; 0: never
            "train_split": "",  # "": data.train_split
            "test_split": "test",
            "train_images": 10_000,  # largest number; 0: all
            "test_images": 2_000,  # largest number; 0: all
        }
    )
    return data, probe


def imagenet(config: ConfigDict, *, classes: str = "") -> ConfigDict:
    """Sets ImageNet at 224 pixels as the dataset of a configuration.

    Args:
      config: the configuration, changed in place.
      classes: as `data.classes`: empty for all, `imagenet100`, or a file of class names.

    Returns:
      The same configuration.
    """
    config.augment.size = 224
    config.data.update(
        {"source": "tfds", "name": "imagenet2012", "classes": classes, "canvas": 512}
    )
    config.data.cache_gib = 0.0  # larger than memory, so every epoch reads the files again
    config.probe.test_split = "validation"
    if not classes:
        config.probe.update({"train_images": 50_000, "test_images": 10_000})
    return config


class UnknownSetting(ConfigError):
    """The name of a setting that does not exist, whatever its value."""


def check_setting(name: str, settings: Iterable[str], prefix: str = "") -> None:
    """Raises UnknownSetting, with the closest known name, where `name` is neither known nor open.

    Args:
      name: name of a setting, such as `optimizer.weight_decay`.
      settings: the settings that are known.
      prefix: prefix of the names in the message.
    """
    if name in settings or name.startswith(OPEN):
        return
    settings = sorted(settings)
    close = [other for other in settings if other.rpartition(".")[2] == name.rpartition(".")[2]]
    close += difflib.get_close_matches(name, settings, n=1, cutoff=0.8)
    hint = f"; did you mean {prefix}{close[0]}?" if close else ""
    raise UnknownSetting(f"{prefix}{name} is not a setting of this configuration{hint}")


def flat_settings(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """All settings as JSON values, by dotted names such as `optimizer.weight_decay`."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat |= flat_settings(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return json.loads(json.dumps(flat))


def _from_dataclass(instance) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(instance))


def _parse(arguments: str, recipe_of: str) -> dict[str, str]:
    chosen = {**dict.fromkeys(ARGUMENTS, "none"), "conditioning": "cassle", "follow": "paper"}
    chosen["method"] = recipe_of or "moco_v2"
    for item in filter(None, arguments.split(",")):
        name, separator, value = item.partition("=")
        if not separator or name not in ARGUMENTS:
            raise ConfigError(
                f"config argument {item!r} is unknown; use {', '.join(f'{a}=…' for a in ARGUMENTS)}"
            )
        chosen[name] = value
    check_one_of("method", chosen["method"], METHODS)
    if recipe_of and chosen["method"] != recipe_of:
        raise ConfigError(
            f"method={chosen['method']!r} does not fit this recipe, which is {recipe_of}'s; use "
            f"configs/imagenet.py:method={chosen['method']}"
        )
    check_one_of("follow", chosen["follow"], ("paper", "published"))
    return chosen


def _conditioning(value: str) -> Conditioning:
    named = {
        "cassle": Conditioning(CASSLE_DESCRIPTORS),
        "leak_free": Conditioning(LEAK_FREE_DESCRIPTORS),
        "branched": Conditioning(LEAK_FREE_DESCRIPTORS, plain_branch=0.5),
        "byol_conditional": Conditioning(
            ("blur", "color", "crop", "grayscale"), relative=True, into="predictor"
        ),
        "none": Conditioning(()),
    }
    if value in named:
        return named[value]
    components = [
        f"{name}.{part}" for name, each in DESCRIPTORS.items() for part in each.components
    ]
    for name in value.split("+"):
        check_one_of("conditioning", name, (*named, *(components if "." in name else DESCRIPTORS)))
    return Conditioning(tuple(sorted(value.split("+"))))
