"""Images that classifiers are taught on, in memory, and the subjects whose encoders they use."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cassle_jax.augment import AugmentSpec
from cassle_jax.data import Record
from cassle_jax.evaluation.subject import Subject
from cassle_jax.methods import Networks, SimCLR, ViewBatch
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.parallel import AXIS
from tests.evaluation.analysed import PIXELS, PLAIN, SPEC, Colour
from tests.tiny import TinyEncoder

IMAGE_CONDITIONED = Conditioning(injection="image", depth=2, width=4)


class Plain:
    """Images of one colour each, which neither crops nor flips change."""

    def __init__(self, colours, labels, name="colours"):
        self.name = name
        self.class_names = tuple(f"class {label}" for label in range(max(labels) + 1))
        self._colours, self._labels = np.asarray(colours, np.uint8), labels

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        image = np.broadcast_to(self._colours[index], (PIXELS, PIXELS, 3))
        return Record(np.ascontiguousarray(image), int(self._labels[index]), f"{index}")


def colours(count, classes, seed=0, spread=40):
    """Colours [count, 3] around a centre of their class, uint8, and their labels."""
    centres = np.random.default_rng(99).uniform(60, 195, (classes, 3))
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    noise = draw.normal(0, spread, (count, 3))
    return np.clip(centres[labels] + noise, 0, 255).astype(np.uint8), labels


def colour_subject():
    """Its features are an image's mean colour, in [0, 1]; there are no parameters."""
    networks = Networks({"encoder": Colour})
    return _subject(networks, {"params": {}, "batch_stats": {}}, SPEC, PLAIN)


def tiny_subject(*, width=24, conditioning=PLAIN, size=16):
    """Two random convolutions with BatchNorm; it has a projector."""
    encoder = partial(TinyEncoder, width=width, axis_name=AXIS)
    networks = build_networks(SimCLR(), encoder, width, conditioning, axis_name=AXIS)
    view = ViewBatch(jnp.zeros((2, size, size, 3)), jnp.zeros((2, conditioning.size)))
    init = jax.jit(partial(networks.init, train=False, method="embed"))
    variables = jax.device_get(init(jax.random.key(0), view))
    return _subject(networks, dict(variables), AugmentSpec(size), conditioning)


def _subject(networks, variables, spec, conditioning):
    return Subject("taught", networks, variables, spec, conditioning, views=(spec, spec))


def assert_equal(found, expected):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, atol):
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol, rtol=0), found, expected)
