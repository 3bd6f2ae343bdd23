"""launch/slurm.sbatch on a real SLURM, as launch/test_slurm.sh has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import on_one_device

ROOT = Path(__file__).parents[2]
SKIPPED = 77


@pytest.mark.skipif(
    not os.environ.get("CASSLE_SLURM"),
    reason="CASSLE_SLURM=1 runs this, and installs SLURM where it is missing",
)
def test_two_tasks_stopped_preempted_and_requeued_end_bit_identical():
    # Each task is one process with one device, as on a cluster of CPUs.
    environment = {**on_one_device(os.environ), "VIRTUAL_ENV": sys.prefix}
    ended = subprocess.run(
        ["bash", "launch/test_slurm.sh"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2400,
        check=False,
    )
    print(ended.stdout)
    if ended.returncode == SKIPPED:
        pytest.skip(ended.stdout.strip().splitlines()[-1])
    assert ended.returncode == 0, ended.stdout
    assert "are the same to the bit" in ended.stdout
