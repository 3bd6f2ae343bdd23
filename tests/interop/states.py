"""Small encoders and heads with numbers in them, and the states PyTorch would have for them."""

import jax
import jax.numpy as jnp
import numpy as np

from cassle_jax.interop.pytorch import encoder_to_pytorch
from cassle_jax.models import ConvNeXt, ResNet, VisionTransformer

ENCODERS = {
    "resnet18": ResNet(18, width=4),
    "resnet34": ResNet(34, width=4),
    "resnet50": ResNet(50, width=4),
    "wide": ResNet(18),
    "small_images": ResNet(18, width=4, small_images=True),
    "bottlenecks": ResNet(101, width=4, widening=2),
    "convnext": ConvNeXt((1, 2, 1, 1), width=4),
    "vit": VisionTransformer(width=24, depth=2, heads=12, patch_size=8),
}
SIZE = 32


def encoder_variables(encoder, size=SIZE, channels=3):
    """The shapes of an encoder's variables."""
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    return jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, False), images)


def filled(shapes, seed=0):
    """Variables of the given shapes, at a scale at which a network's features stay of order 1."""
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        draw = random.standard_normal(leaf.shape).astype(np.float32)
        if name == "var":
            return 1 + 0.1 * np.abs(draw)
        if len(leaf.shape) == 1:
            return (name == "scale") + 0.1 * draw
        inputs = max(int(np.prod(leaf.shape[:-1])), 1) if len(leaf.shape) != 3 else 1
        return draw / np.float32(np.sqrt(inputs))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def by_rule(shapes):
    """The weights that `tests/golden/backbone_features.npz` was computed with."""
    state = {}
    for name, shape in shapes.items():
        draw = np.random.default_rng([0, *name.encode()]).standard_normal(shape)
        draw = draw.astype(np.float32)
        if len(shape) == 1:
            state[name] = name.endswith("weight") + 0.1 * draw
        else:
            state[name] = draw / np.float32(np.sqrt(np.prod(shape[1:])))
    return state


def encoder_state(name):
    """The state of a small encoder."""
    return encoder_to_pytorch(filled(encoder_variables(ENCODERS[name])))


def assert_same(state, expected):
    """Both have the same names, shapes and numbers."""
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert state[name].shape == array.shape, name
        np.testing.assert_array_equal(state[name], array, err_msg=name)
