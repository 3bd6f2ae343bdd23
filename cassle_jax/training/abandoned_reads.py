"""Silences the reads that are still running after a checkpoint could not be restored."""

import contextlib
import logging
import sys


@contextlib.contextmanager
def abandoned_reads_silenced():
    """Silences the reads that are still running when a restore fails.

    Orbax closes its event loop at the first array that cannot be read. After that, every read that
    ends prints a traceback from a thread of TensorStore. Every other failure prints one more when
    it is garbage-collected.
    """
    hook, log = sys.unraisablehook, logging.getLogger("asyncio")

    def ignoring(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    def retrieved(record):
        return "exception was never retrieved" not in record.getMessage()

    sys.unraisablehook = ignoring
    log.addFilter(retrieved)
    yield  # an exception here leaves both in place
    sys.unraisablehook = hook
    log.removeFilter(retrieved)
