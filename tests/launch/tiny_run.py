"""A configuration file for sweeps: the tiny run, three steps of views that compile in seconds."""

import sys

from cassle_jax.models import ENCODERS
from tests.tiny import TinyEncoder, blank_sheet, cropped_only, tiny_config

ENCODERS["tiny"] = TinyEncoder
if "cassle_jax.training.loop" in sys.modules:  # not in the process that plans the sweep
    sys.modules["cassle_jax.training.loop"].write_contact_sheet = blank_sheet


def get_config(arguments=""):
    config = tiny_config(f"method=simclr,{arguments}")
    config.steps = 3
    config.data.scenes = 32
    config.log.every_steps = 1
    cropped_only(config)
    return config
