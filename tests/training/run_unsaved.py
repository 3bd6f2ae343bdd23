"""The tiny run, where a disk fails under process 1 at every checkpoint from step 10 on."""

import errno
import os
import sys

import orbax.checkpoint as ocp

from cassle_jax import command
from tests.training import run_tiny

_save = ocp.CheckpointManager.save


def failing(manager, step, *arguments, **settings):
    if step >= 10 and os.environ["JAX_PROCESS_ID"] == "1":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return _save(manager, step, *arguments, **settings)


if __name__ == "__main__":
    ocp.CheckpointManager.save = failing
    command.set_up_logging()
    run_tiny.main(*sys.argv[1:])
