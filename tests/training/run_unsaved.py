"""The tiny run on a disk that fails at checkpoint 10, while 25 is written, and from step 55 on."""

import errno
import os
import resource
import sys

import orbax.checkpoint as ocp

from cassle_jax import command
from cassle_jax.training import loop
from tests.training import run_tiny

_save = ocp.CheckpointManager.save


def failing(manager, step, *arguments, **settings):
    if step == 10 or step >= 55:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    largest = 1000 if step == 25 else resource.RLIM_INFINITY  # bytes of a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    return _save(manager, step, *arguments, **settings)


if __name__ == "__main__":
    ocp.CheckpointManager.save = failing
    loop.LAST_SAVE_SECONDS = 2.0
    command.set_up_logging()
    run_tiny.main(*sys.argv[1:])
