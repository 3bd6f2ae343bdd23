"""Reads a checkpoint back in the background, on the host alone, and compares it with the state."""

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from cassle_jax.checks import first_line
from cassle_jax.faults import retried
from cassle_jax.training.checkpoint_reading import read_checkpoint
from cassle_jax.training.checksums import host_checksum
from cassle_jax.training.state import TrainState


class ReadBack:
    """Reads one checkpoint once it is complete.

    Args:
      folder: folder of the checkpoint.
      state: the state saved in it; only its shapes are kept.
      saved: the data saved with it, including the checksums.

    Attributes:
      problem: the reason why no run can continue from the checkpoint; `None` where one can.
      cause: the error behind it, if any; an `Outage` where it could not be read for now.
    """

    def __init__(self, folder: epath.Path, state: TrainState, saved: Mapping[str, Any]):
        self.step = int(folder.name)
        self._folder, self._saved = folder, dict(saved)
        self._like = jax.tree.map(_on_the_host, state)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.problem: str | None = None
        self.cause: Exception | None = None

    def start(self) -> None:
        """Starts reading."""
        self._thread.start()

    @property
    def started(self) -> bool:
        """Whether reading was started."""
        return self._thread.ident is not None

    def ended(self, *, wait: bool) -> bool:
        """Whether reading was started and has ended; with `wait`, waits for its end."""
        if not self.started:
            return False
        self._thread.join(None if wait else 0.0)
        return not self._thread.is_alive()

    def _read(self) -> None:
        try:
            read = partial(read_checkpoint, self._folder, self._like)
            state, saved = retried(f"checkpoint {self.step}", read)
            found = {name: host_checksum(part) for name, part in vars(state).items()}
            expected = self._saved["checksums"]
            wrong = [name for name in found if found[name] != expected[name]]
            if wrong or saved != self._saved:
                self.problem = f"its {', '.join(wrong) or 'data'} differ from what was saved"
        except Exception as error:  # Orbax and TensorStore raise any type
            self.problem, self.cause = first_line(error), error


def _on_the_host(leaf: Any) -> Any:
    """A target without memory, in the shape and dtype to read the leaf in."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = np.zeros(jax.random.key_data(leaf).shape, np.uint32)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
