"""Lends large arrays and takes them back once nothing refers to them any more."""

import ctypes
import threading
import weakref

import numpy as np
from jaxtyping import UInt8


class BufferPool:
    """uint8 arrays of one size whose memory is reused.

    The kernel must map and clear fresh memory, page by page and under one lock: with many threads
    that costs more than decoding. A lent array's memory comes back when the array and every view of
    it are gone, so a consumer that holds on to one (JAX does, while it copies) is safe.
    Thread-safe.
    """

    def __init__(self, shape: tuple[int, ...]):
        """Sets up for arrays of `shape`; nothing is allocated."""
        self._shape = shape
        self._size = int(np.prod(shape))
        self._free: list[bytearray] = []
        self._lock = threading.Lock()

    def lend(self) -> UInt8[np.ndarray, "..."]:
        """An array of undefined content."""
        with self._lock:
            memory = self._free.pop() if self._free else bytearray(self._size)
        # A new owner per loan, which every view keeps alive; the memory itself outlives it.
        owner = (ctypes.c_uint8 * self._size).from_buffer(memory)
        weakref.finalize(owner, self._take_back, memory).atexit = False
        return np.frombuffer(owner, np.uint8).reshape(self._shape)

    def _take_back(self, memory: bytearray) -> None:
        # list.append needs no lock; a finalizer may run while this thread holds it.
        self._free.append(memory)
