"""Joins the other processes of a run, and exchanges something with them; process 1 comes late."""

import sys
import time

import jax

from cassle_jax import command
from cassle_jax.distributed import all_processes
from cassle_jax.parallel import in_all_processes


def main(seconds):
    with all_processes():
        if jax.process_index() == 1:
            time.sleep(seconds)
        assert in_all_processes(True)


if __name__ == "__main__":
    late = float(sys.argv.pop())
    command.run(lambda: main(late))
