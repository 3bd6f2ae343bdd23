"""Silences what Orbax prints of a failure in addition to raising an exception."""

import contextlib
import logging
import sys


@contextlib.contextmanager
def abandoned_reads_silenced():
    """Silences the reads that are still running when a restore fails.

    Orbax closes its event loop at the first array that cannot be read. After that, every read that
    ends prints a traceback from a thread of TensorStore, and every read that has not ended prints
    its own. Every other failure prints one more when it is garbage-collected.
    """
    hook, log = sys.unraisablehook, logging.getLogger("asyncio")
    late = "Event loop is closed", "Encountered error while reading array index"

    def ignoring(unraisable):
        if not str(unraisable.exc_value).startswith(late):
            hook(unraisable)

    def retrieved(record):
        return "exception was never retrieved" not in record.getMessage()

    sys.unraisablehook = ignoring
    log.addFilter(retrieved)
    yield  # an exception here leaves both in place
    sys.unraisablehook = hook
    log.removeFilter(retrieved)


@contextlib.contextmanager
def orbax_logs_errors_once():
    """Silences the tracebacks that Orbax logs of an exception which it then raises."""
    log = logging.getLogger("absl")

    def kept(record):
        return not (record.exc_info and "orbax" in record.pathname)

    log.addFilter(kept)
    yield
    log.removeFilter(kept)
