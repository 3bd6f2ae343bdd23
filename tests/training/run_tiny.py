"""Pretrains the tiny configuration: python -m tests.training.run_tiny WORKDIR [name=value …]."""

import ast
import logging
import sys

sys.modules["torch"] = None  # nothing here needs it, and tensorboardX would import it for seconds

from cassle_jax import command
from cassle_jax.models import ENCODERS
from cassle_jax.pretrain import pretrain_command
from cassle_jax.training import loop
from tests.tiny import SmoothEncoder, blank_sheet, cropped_only, tiny_config


def main(workdir, *settings):
    ENCODERS["tiny"] = SmoothEncoder
    loop.write_contact_sheet = blank_sheet
    config = tiny_config("method=moco_v2")
    cropped_only(config)
    # So slow that training does not amplify rounding, which differs between processors.
    config.optimizer.base_learning_rate /= 10
    for setting in settings:
        name, value = setting.split("=")
        config.update_from_flattened_dict({name: ast.literal_eval(value)})
    pretrain_command(config, workdir)


if __name__ == "__main__":
    command.set_up_logging()
    logging.getLogger("cassle_jax").setLevel(logging.WARNING)
    try:
        main(*sys.argv[1:])
    except command.Stop as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.code)
