"""Every setting of a run with its default, and what a configuration file is built from.

A file in `configs/` is a function of an argument string, as in
`--config=configs/cifar10.py:method=simclr,conditioning=none,augself=main`. It starts from
`base_config`, which knows the arguments, and sets what is particular to its dataset. Any value can
then be overridden: `--config.optimizer.weight_decay=1e-4`.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable

from ml_collections import ConfigDict

from cassle_jax.augment import (
    CASSLE_DESCRIPTORS,
    COMPONENTS,
    LEAK_FREE_DESCRIPTORS,
    AugmentSpec,
)
from cassle_jax.methods import METHODS
from cassle_jax.methods.augself import PREDICTED
from cassle_jax.methods.build import Conditioning
from cassle_jax.training.optimizer import OptimizerSpec

ARGUMENTS = ("method", "conditioning", "augself", "follow")

# How the published CASSLE code differs from the papers, whatever the method.
PUBLISHED = {"augment.jitter_order": "batch", "optimizer.schedule_by": "epoch"}


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that names it and what would work."""


def base_config(arguments: str = "", *, recipe_of: str = "") -> ConfigDict:
    """The default configuration of a method with its conditioning.

    Args:
      recipe_of: for a configuration that is one method's recipe, its name: the only value that the
        argument `method` may then have.
      arguments: comma-separated `name=value`:
        `method`: a name in `METHODS` (default `moco_v2`).
        `conditioning`: `cassle` (default: blur, color, color_diff, crop, grayscale), `leak_free`
        (palette in the place of color_diff, which gives the image's mean colour away), `branched`
        (leak_free, with half of the loss through a plain projector beside the conditioned one; see
        docs/evidence.md), `none` for the plain method, or names of descriptors and components, such
        as color.hue, joined by `+`.
        `augself`: `none` (default), `main` (crop and color at 0.5, the paper's main setting), or
        `name:weight` joined by `+`.
        `follow`: `paper` (default), or `published` for what the published CASSLE code does where it
        differs: MoCo's queue takes queries, SimCLR's negatives come from the own device, BYOL's
        momentum rises once an epoch, a batch shares its order of jitter operations, the learning
        rate moves once an epoch.

    Raises:
      ConfigError: an unknown argument or value.
    """
    chosen = _parse(arguments, recipe_of)
    method = METHODS[chosen["method"]]
    config = ConfigDict()
    config.seed = 0
    config.epochs = 200
    config.steps = 0  # more than 0: the length of the run, instead of `epochs`
    config.batch_size = 256  # of all devices together
    # Images, of all devices together, that pass the encoder at a time, for memory; 0: the batch.
    # Loss, gradient and the heads' BatchNorm stay the batch's; the encoder's is then a chunk's.
    config.chunk_size = 0
    config.dtype = "auto"  # of convolutions and products: bfloat16 on accelerators, or float32
    config.deterministic = False  # GPU: only kernels that repeat to the bit
    config.compilation_cache = "auto"  # a folder; "auto": in the user's cache; "": none

    config.encoder = ConfigDict(
        {
            "name": "resnet18",
            "width": 0,  # of a ResNet's stem, or of a Vision Transformer; 0: its own
            "small_images": False,  # ResNets: a stem for images of about 32 pixels
            "patch_size": 16,  # Vision Transformers: pixels
            "remat": False,  # recompute activations in the backward pass, for memory
        }
    )
    config.method = ConfigDict({"name": chosen["method"], **dataclasses.asdict(method())})
    config.weights = ConfigDict(
        {
            "path": "",  # of a file to start from; "": random weights
            "networks": "all",  # that the file has, or only its encoder
        }
    )
    config.conditioning = _from_dataclass(_conditioning(chosen["conditioning"]))
    config.augself = ConfigDict({"hidden": 512, **dict.fromkeys(PREDICTED, 0.0)})
    config.augself.update(_augself_weights(chosen["augself"]))
    config.augment = _from_dataclass(AugmentSpec(size=32))
    config.augment.color_strength = 1.0  # scales the jitter and the share of grayscale views
    config.augment.asymmetric = False  # BYOL's: only second views are solarized, few are blurred
    config.optimizer = _from_dataclass(OptimizerSpec())

    config.data = ConfigDict(
        {
            "source": "scenes",  # scenes or motifs (drawn, need no files), folder or tfds
            "name": "",  # tfds: the builder, such as cifar10
            "path": "",  # folder: holds <split>/<class>/<file>; tfds: its data_dir, "" for tfds's
            "train_split": "train",
            "classes": "",  # "": all; imagenet100; or a text file of class names, one a line
            "canvas": 32,  # pixels; larger images are reduced to fit
            "scenes": 50_000,  # how many images are drawn, where they are
            "threads": 0,  # that read and decode; 0: half the CPUs, at least 2
            "cache_gib": 4.0,  # decoded images are kept in memory if they all fit in this much
            "on_device": "auto",  # all images on every device: where they fit; or always, never
            "max_bad_fraction": 0.01,  # of images that cannot be decoded, before the run stops
        }
    )
    config.probe = ConfigDict(
        {
            "every_epochs": 10,  # k-NN accuracy and RankMe; 0: never
            "train_split": "",  # "": data.train_split
            "test_split": "test",
            "train_images": 10_000,  # at most; 0: all
            "test_images": 2_000,  # at most; 0: all
        }
    )
    config.checkpoint = ConfigDict(
        {
            "every_steps": 1000,
            "keep": 3,  # the newest
            "keep_every_steps": 0,  # and every one at a multiple of this; 0: none
        }
    )
    config.log = ConfigDict({"every_steps": 50})
    config.update_from_flattened_dict(method.recipe)
    if chosen["follow"] == "published":
        config.update_from_flattened_dict({**PUBLISHED, **method.published})
    config.lock()
    return config


def imagenet(config: ConfigDict, *, classes: str = "") -> ConfigDict:
    """The configuration with ImageNet as its dataset, at 224 pixels.

    Args:
      config: is changed, too.
      classes: as `data.classes`: empty for all, `imagenet100`, or a file of their names.
    """
    config.augment.size = 224
    config.data.update(
        {"source": "tfds", "name": "imagenet2012", "classes": classes, "canvas": 512}
    )
    config.data.cache_gib = 0.0  # larger than memory: every epoch reads it anew
    config.probe.test_split = "validation"
    if not classes:
        config.probe.update({"train_images": 50_000, "test_images": 10_000})
    return config


def knows(name: str, value: str, known: Iterable[str]) -> None:
    """Raises ConfigError, with the closest name there is, unless `value` is one of `known`."""
    known = sorted(known)
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(known)}{hint}")


def flat_settings(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """All settings by names such as `optimizer.weight_decay`, with the values JSON has for them."""
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, ConfigDict)
        flat |= flat_settings(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return json.loads(json.dumps(flat))


def _from_dataclass(instance) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(instance))


def _parse(arguments: str, recipe_of: str) -> dict[str, str]:
    defaults = (recipe_of or "moco_v2", "cassle", "none", "paper")
    chosen = dict(zip(ARGUMENTS, defaults, strict=True))
    for item in filter(None, arguments.split(",")):
        name, separator, value = item.partition("=")
        if not separator or name not in ARGUMENTS:
            raise ConfigError(
                f"config argument {item!r} is unknown; use {', '.join(f'{a}=…' for a in ARGUMENTS)}"
            )
        chosen[name] = value
    knows("method", chosen["method"], METHODS)
    if recipe_of and chosen["method"] != recipe_of:
        raise ConfigError(
            f"method={chosen['method']!r} cannot follow this recipe, which is {recipe_of}'s; use "
            f"configs/imagenet.py:method={chosen['method']}"
        )
    knows("follow", chosen["follow"], ("paper", "published"))
    return chosen


def _conditioning(value: str) -> Conditioning:
    named = {
        "cassle": Conditioning(CASSLE_DESCRIPTORS),
        "leak_free": Conditioning(LEAK_FREE_DESCRIPTORS),
        "branched": Conditioning(LEAK_FREE_DESCRIPTORS, plain_branch=0.5),
        "none": Conditioning(()),
    }
    if value in named:
        return named[value]
    components = [f"{name}.{part}" for name, parts in COMPONENTS.items() for part in parts]
    for name in value.split("+"):
        knows("conditioning", name, (*named, *(components if "." in name else COMPONENTS)))
    return Conditioning(tuple(sorted(value.split("+"))))


def _augself_weights(value: str) -> dict[str, float]:
    if value == "none":
        return {}
    if value == "main":
        return {"crop": 0.5, "color": 0.5}
    weights = {}
    for item in value.split("+"):
        name, _, weight = item.partition(":")
        knows("augself", name, PREDICTED)
        try:
            weights[name] = float(weight or 0.5)
        except ValueError:
            raise ConfigError(
                f"augself weight {item!r} is not a number; write {name}:0.5"
            ) from None
    return weights
