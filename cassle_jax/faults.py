"""Distinguishes temporary faults of storage from lasting mistakes, and retries the former."""

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from cassle_jax.checks import ConfigError

LOG = logging.getLogger(__name__)

SECONDS = "CASSLE_STORAGE_SECONDS"  # how long to wait for a fault to pass

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
RESOURCES = ("EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EAGAIN", "EINTR")
"""Names of the errors with which this machine reports that it ran out of something."""

# Faults of a device or network, or of this machine's resources: none of them is a wrong setting.
# EBADMSG or EUCLEAN: a file, or the whole file system, is damaged; reading other files shows which.
TEMPORARY = (
    *("EIO", "EREMOTEIO", "ESTALE", "ENODEV", "ENXIO", "ENOMEDIUM", "ENOLINK", "ENOLCK", "EBUSY"),
    *("ETIMEDOUT", "ETIME", "ENOTCONN", "ESHUTDOWN", "EPIPE", "EHOSTDOWN", "EHOSTUNREACH"),
    *("ENETDOWN", "ENETUNREACH", "ENETRESET", "ENONET", "ECOMM", "EPROTO", "EKEYEXPIRED"),
    *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EBADMSG", "EUCLEAN", "ENOSPC", "EDQUOT"),
    *RESOURCES,
)
_PASSING = {getattr(errno, name) for name in TEMPORARY if hasattr(errno, name)}
# Answers of a server that is overloaded or down.
_HTTP = frozenset({408, 425, 429, *range(500, 600)})
_OURS = __name__.split(".")[0]
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 15.0

T = TypeVar("T")

hurry = threading.Event()
"""Set when the process is about to end: a retry that waits tries once more, and gives up."""


class Outage(RuntimeError):
    """Storage did not come back in time; once it does, the same command continues."""


def passing(error: BaseException | None) -> OSError | None:
    """The temporary fault of storage that caused `error`; `None` for any other cause.

    Libraries in other languages report a fault in words only, and those of object stores by their
    own types of exception. This project's own errors have the fault as their cause; their words may
    quote a past fault, or a path.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        code = _code_of(error)
        if code is not None:
            given = isinstance(error, OSError) and error.errno == code
            return error if given else OSError(code, os.strerror(code))
        seen.add(id(error))  # an error may be its own cause
        error = error.__cause__
    return None


def _code_of(error: BaseException) -> int | None:
    """The errno of an error that is itself a temporary fault, whatever its causes."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _PASSING else None
    library = type(error).__module__.split(".")[0]
    if library == _OURS:
        return None
    if not isinstance(error, OSError) and (code := code_in(str(error), sorted(_PASSING))):
        return code
    status = getattr(error, "status", getattr(error, "code", None))
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    if re.search("Timeout", kinds):
        return errno.ETIMEDOUT
    unreachable = re.search("Connection|Disconnected|Transport", kinds)
    overloaded = isinstance(status, int) and status in _HTTP
    return errno.ECONNRESET if unreachable or overloaded else None


def code_in(text: str, codes: Iterable[int] = errno.errorcode) -> int | None:
    """The first of some errnos whose words are in a text; `None` without one."""
    return next((code for code in codes if os.strerror(code) in text), None)


def reason_of(error: BaseException) -> str:
    """The reason for an error, in words; without the number and path of an OSError's text."""
    return getattr(error, "strerror", None) or str(error)


def is_of_machine(fault: OSError) -> bool:
    """Whether this machine ran out of something: no file or device is at fault."""
    return errno.errorcode.get(fault.errno) in RESOURCES


def storage_seconds() -> float:
    """Seconds to wait for a fault to pass: `CASSLE_STORAGE_SECONDS`, or five minutes."""
    return seconds_in(SECONDS, 300.0)


def seconds_in(variable: str, default: float) -> float:
    """The seconds in an environment variable, 0 or more; a default where it is not set.

    Raises:
      ConfigError: it is not a number.
    """
    text = os.environ.get(variable, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # refuses NaN, too
        raise ConfigError(f"{variable}={text!r} is not a number of seconds; use {default:g}")
    return seconds


def retried(what: str, action: Callable[[], T], *, seconds: float | None = None) -> T:
    """Runs an action on storage, and retries at growing intervals while a fault may pass.

    Args:
      what: name of the file or folder, for the log.
      action: the action; must leave nothing behind where it fails.
      seconds: time after which it gives up; `storage_seconds()` by default.

    Raises:
      Outage: the fault did not pass; caused by the last one.
      Exception: any other error of `action`, at once.
    """
    seconds = storage_seconds() if seconds is None else seconds
    until, pause, logged = time.monotonic() + seconds, _FIRST_PAUSE, False
    while True:
        try:
            return action()
        except Outage:  # of an action that has waited itself
            raise
        except Exception as error:  # libraries raise their own types for this
            fault = passing(error)
            if fault is None:
                raise
            reason = f"{what}: {reason_of(fault)}"
            left = until - time.monotonic()
            if left <= 0 or hurry.is_set():
                why = f"for {seconds:g} s" if left <= 0 else "and the process is to end"
                raise Outage(f"{reason}, {why}; the same command continues") from error
            if not logged:
                LOG.warning("%s; it is tried again for %.3g s", reason, seconds)
            logged = True
        hurry.wait(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
