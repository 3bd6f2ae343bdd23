"""Joins the other processes of a run as an evaluation does, and waits to be stopped."""

import sys
import time
from pathlib import Path

import jax

from cassle_jax import command
from cassle_jax.distributed import agree, all_processes


def main(folder):
    with all_processes():
        agree({"folder": str(folder)})
        (folder / f"joined{jax.process_index()}").touch()
        time.sleep(300)


if __name__ == "__main__":
    joined = Path(sys.argv.pop())
    command.run(lambda: main(joined))
