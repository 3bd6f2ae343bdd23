"""Silences reads that are still under way when restoring a checkpoint has failed."""

import contextlib
import logging
import sys


@contextlib.contextmanager
def abandoned_reads_silenced():
    """Silences the reads that are still under way when a restore fails.

    Orbax closes its event loop at the first array that cannot be read. After that, every read that
    ends prints a traceback from a thread of TensorStore, and every other failure prints one more
    whenever it is garbage-collected.
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
