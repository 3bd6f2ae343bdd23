"""A command that waits for Ctrl-C and exits with 75, and finishes when it is started again.

With a second argument it exits with that at once.
"""

import signal
import sys
import time
from pathlib import Path

if len(sys.argv) > 2:
    sys.exit(int(sys.argv[2]))
folder = Path(sys.argv[1])
if (folder / "saved").exists():
    sys.exit(0)


def save(*_):
    (folder / "saved").touch()
    sys.exit(75)


signal.signal(signal.SIGINT, save)
time.sleep(300)
