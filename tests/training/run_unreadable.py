"""The tiny run whose images one process, given the word `fails`, cannot read after some steps."""

import sys

from cassle_jax import command
from cassle_jax.data.feed import DeviceFeed
from cassle_jax.faults import Outage
from tests.training import run_tiny

_next, _left = DeviceFeed.__next__, [21]


def failing(feed):
    _left[0] -= 1
    if _left[0] < 0:
        raise Outage("images: Input/output error; the same command continues")
    return _next(feed)


if __name__ == "__main__":
    settings = [each for each in sys.argv[1:] if each != "fails"]
    if len(settings) < len(sys.argv[1:]):
        DeviceFeed.__next__ = failing
    command.set_up_logging()
    run_tiny.main(*settings)
