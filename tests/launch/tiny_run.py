"""A configuration file for sweeps: the tiny run, three steps."""

from cassle_jax.models import ENCODERS
from tests.tiny import TinyEncoder, tiny_config

ENCODERS["tiny"] = TinyEncoder


def get_config(arguments=""):
    config = tiny_config(f"method=simclr,{arguments}")
    config.steps = 3
    config.data.scenes = 32
    config.log.every_steps = 1
    return config
