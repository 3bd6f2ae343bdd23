"""A tiny encoder and a tiny configuration: whole runs that compile in seconds."""

import io
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from PIL import Image

from cassle_jax.config import base_config, narrow_heads
from cassle_jax.methods import AUXILIARIES
from cassle_jax.models import BatchNorm

# Arguments of a configuration with all auxiliary objectives.
EVERY_AUXILIARY = ",".join(f"{name}=main" for name in AUXILIARIES)


class TinyEncoder(nn.Module):
    """Two 3×3 stride-2 convolutions with BatchNorm and activation, then the global mean."""

    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32
    width: int = 24
    small_images: bool = False
    patch_size: int = 16
    remat: bool = False
    activation: Callable = nn.relu

    @property
    def feature_width(self):
        return self.width

    @nn.compact
    def __call__(self, images, train):
        x = images
        for index, width in ((0, 16), (3, self.width)):
            convolution = partial(nn.Conv, use_bias=False, dtype=self.dtype, name=f"net_{index}")
            norm = partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
            x = convolution(width, (3, 3), 2, padding=1)(x)
            x = self.activation(norm(name=f"net_{index + 1}")(x, train))
        return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


# Rounding takes some of a million values across the edge of a ReLU, where gradients jump.
SmoothEncoder = partial(TinyEncoder, activation=nn.gelu)


def on_one_device(environment):
    """The environment of a process that is to have one device, not the tests' eight."""
    flags = environment["XLA_FLAGS"].split()
    kept = [flag for flag in flags if not flag.startswith("--xla_force_host_platform_device_count")]
    return {**environment, "XLA_FLAGS": " ".join(kept)}


def blank_sheet(run, source, data, path):
    """In the place of `write_contact_sheet`, which takes seconds."""
    del run, source, data
    Image.new("RGB", (1, 1)).save(pixel := io.BytesIO(), "PNG")
    path.write_bytes(pixel.getvalue())


def cropped_only(config):
    """Views that are but cropped and flipped compile in half the time."""
    config.augment.update({"jitter": 0.0, "grayscale": 0.0, "blur": 0.0})


def tiny_config(arguments="method=simclr"):
    """Scenes at 16 pixels, a batch of 16, 24 steps of 4 to an epoch; `encoder.name` is tiny."""
    config = base_config(arguments)
    config.steps = 24
    config.batch_size = 16
    config.encoder.name = "tiny"
    config.encoder.width = 24
    config.conditioning.depth = 2
    config.conditioning.width = 8
    for name in AUXILIARIES:
        config[name].hidden = 16
    config.equimod.out = config.sie.out = config.stl.out = config.stl.code = 8
    config.augment.size = 16
    config.data.scenes = 64
    config.data.canvas = 24
    config.data.threads = 2
    config.probe.every_epochs = 0
    config.checkpoint.every_steps = 5
    config.log.every_steps = 5
    config.compilation_cache = ""
    narrow_heads(config, 32)
    if config.method.name == "moco_v2":
        config.method.queue_size = 64
    config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, 1.0)
    return config
