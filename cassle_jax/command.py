"""Shared by all commands: flag parsing, one-line errors for users' mistakes, exit codes."""

import logging
import re
import runpy
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging

from cassle_jax.config import ConfigError, closest_setting, flat_settings
from cassle_jax.data import DataError

EXIT_WRONG_SETTING = 2
EXIT_DIVERGED = 3
EXIT_NOT_SAVED = 74  # EX_IOERR: fix the disk; the same command continues from the last checkpoint
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved; the same command continues


class Stop(BaseException):
    """Ends a command with a message on standard error and an exit code.

    A signal handler may raise it. All processes of a run raise it together, unless it is `alone`:
    then one process raises it, and ends the others.
    """

    def __init__(self, message: str, code: int, *, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; reports a user's mistake as one line."""
    set_up_logging()
    try:
        app.run(lambda _: _guarded(main), flags_parser=_parse_flags)
    except Stop as stop:
        _leave(stop)


def set_up_logging() -> None:
    """Logs the project's messages, and the libraries' warnings, to standard error."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("cassle_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(handler)


def _guarded(main: Callable[[], None]) -> None:
    try:
        main()
    except Stop as stop:
        _leave(stop)
    except (ConfigError, DataError) as error:
        _leave(Stop(str(error), EXIT_WRONG_SETTING))


def _parse_flags(arguments: Sequence[str]) -> list[str]:
    try:
        _check_overrides(arguments)
        rest = flags.FLAGS(arguments)
        if "config" in flags.FLAGS:
            _ = flags.FLAGS.config.seed  # a missing file fails at its first use only
        if rest[1:]:
            raise ConfigError(f"{rest[1]!r} is not an option; options begin with --")
    except OSError as error:
        raise Stop(f"config cannot be read: {_last_line(error)}", EXIT_WRONG_SETTING) from error
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Stop(_last_line(error), EXIT_WRONG_SETTING) from error
    return rest


def _check_overrides(arguments: Sequence[str]) -> None:
    """Raises ConfigError for `--config.….name=…` where the configuration has no such setting."""
    # A value may follow its flag as a separate word.
    arguments = re.sub(r"(?m)^(--?config)\n", r"\1=", "\n".join(arguments)).splitlines()
    matches = [re.match(r"--?config(?:=([^:]*):?(.*)|\.([\w.]+))", word) for word in arguments]
    files = [(match[1], match[2]) for match in matches if match and match[1]]
    overridden = [match[3] for match in matches if match and match[3]]
    if not files or not overridden:
        return
    path, chosen = files[-1]
    known = flat_settings(runpy.run_path(path)["get_config"](chosen))
    for name in overridden:
        if name not in known:
            close = closest_setting(name, known)
            hint = f"; did you mean config.{close}?" if close else ""
            raise ConfigError(f"config.{name} is not a setting of this configuration{hint}")


def _last_line(error: Exception) -> str:
    """The last line of an error; a failing configuration file arrives as a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else repr(error)


def _leave(stop: Stop) -> None:
    print(f"error: {stop}", file=sys.stderr, flush=True)
    sys.exit(stop.code)
