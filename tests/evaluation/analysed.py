"""Networks whose every number is known, and the batches they are analysed on."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cassle_jax.augment import AugmentSpec
from cassle_jax.methods import HeadShape, Method, ViewBatch
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.parallel import device_mesh

PIXELS = 8
PLAIN = Conditioning(descriptors=())
COLOR_DIFF = Conditioning(descriptors=("color_diff",), treatment="raw")
# Views in [0, 1], so that features are colours.
SPEC = AugmentSpec(PIXELS, mean=(0, 0, 0), std=(1, 1, 1))
JITTERED = dataclasses.replace(SPEC, crop=False, flip=0, grayscale=0, blur=0, jitter=1)


class Colour(nn.Module):
    """Sows the pixels as its stem; its features are the mean colour. It has no parameters."""

    feature_width: ClassVar[int] = 3
    traced: ClassVar[list] = []

    @nn.compact
    def __call__(self, images, train):
        self.traced.append(images.shape)
        self.sow("intermediates", "stem", images)
        return images.mean((1, 2))


@dataclasses.dataclass(frozen=True)
class Linear(Method):
    """A projector of one linear layer onto three numbers."""

    def projector(self, feature_width):
        return HeadShape(3, 3, depth=1)


def colour_networks(conditioning=PLAIN, encoder=Colour):
    """Networks whose projector adds ω to the mean colour, and their variables.

    With `color_diff`, it undoes what the jitter did to the mean colour: π(f(t(x)) | ω) = f(x).
    """
    networks = build_networks(Linear(), encoder, 3, conditioning)
    view = ViewBatch(jnp.zeros((2, PIXELS, PIXELS, 3)), jnp.zeros((2, conditioning.size)))
    shapes = jax.eval_shape(
        lambda: networks.init(jax.random.key(0), view, train=False, method="embed")
    )

    def values(path, like):
        if path[-1].key != "kernel":
            return np.zeros(like.shape, np.float32)
        return np.tile(np.eye(3, dtype=np.float32), (like.shape[0] // 3, 1))

    params = jax.tree_util.tree_map_with_path(values, shapes["params"])
    return networks, {"params": params, "batch_stats": {}}


def pictures(count, seed=0):
    """Colourful noise [count, 8, 8, 3], each picture of a colour of its own."""
    draw = np.random.default_rng(seed)
    colours = draw.uniform(40, 215, size=(count, 1, 1, 3))
    noise = draw.uniform(-40, 40, size=(count, PIXELS, PIXELS, 3))
    return (colours + noise).astype(np.uint8)


def batches_of(images, size, holes=0):
    """As `evaluation_batches` yields them, with `holes` damaged images before the first."""
    index = np.concatenate([np.full(holes, -1), np.arange(len(images))])
    index = np.pad(index, (0, -len(index) % size), constant_values=-1)
    for rows in index.reshape(-1, size):
        real = rows >= 0
        yield {
            "image": np.where(real[:, None, None, None], images[rows], 0).astype(np.uint8),
            "size": np.where(real[:, None], images.shape[1:3], 1).astype(np.int32),
            "label": rows.astype(np.int32),
            "index": rows.astype(np.int32),
            "mask": real,
        }


def devices(count):
    return device_mesh(jax.devices()[:count])


def cosine(first, second):
    first, second = (np.reshape(each, (len(each), -1)).astype(float) for each in (first, second))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.sum(first * second, axis=1) / lengths


def similarity_of_different(first, second):
    """The mean cosine of all pairs of different rows, in float64."""
    shifts = range(1, len(first))
    return np.mean([cosine(first, np.roll(second, shift, 0)).mean() for shift in shifts])


def info_nce(queries, keys, temperature=0.2):
    """By the definition, in float64."""
    every = np.stack([cosine(queries, np.roll(keys, -shift, 0)) for shift in range(len(keys))])
    # Row 0 holds the images' own embeddings.
    return np.mean(np.log(np.exp(every / temperature).sum(0)) - every[0] / temperature)
