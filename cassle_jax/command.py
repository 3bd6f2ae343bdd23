"""Runs any command: parses flags, ends with one line for a user's mistake, sets the exit code."""

import contextlib
import itertools
import logging
import os
import re
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from cassle_jax.checks import ConfigError, UserError
from cassle_jax.config import check_setting, flat_settings
from cassle_jax.config_files import find_config
from cassle_jax.faults import Outage, hurry, passing

EXIT_WRONG_SETTING = 2
EXIT_DIVERGED = 3
EXIT_OUTAGE = 69  # EX_UNAVAILABLE: storage or a process is out of reach; it may be started again
EXIT_NOT_SAVED = 74  # EX_IOERR: fix the disk; the same command continues from the last checkpoint
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved; the same command continues

_EXAMPLES = {"config": "configs/photos.py", "table": "configs/tables/field.py"}

T = TypeVar("T")


class Stop(BaseException):
    """Ends a command with a message on standard error and an exit code.

    A signal handler may raise it. All processes of a run raise it together, unless it is `alone`:
    then one process raises it, and ends the others.
    """

    def __init__(self, message: str, code: int, *, alone: bool = False):
        super().__init__(message)
        self.code, self.alone = code, alone


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; reports a user's mistake as one line.

    SIGTERM and a closed terminal stop it as Ctrl-C does, except where `main` handles them itself.
    """
    open_streams()
    set_up_logging()
    switch_64_bits_off()
    for number in stopping_signals():
        if number != signal.SIGINT:  # of which Python makes a KeyboardInterrupt
            signal.signal(number, _interrupt)
    try:
        app.run(lambda _: _guarded(main), flags_parser=_parse_flags)
    except (Stop, KeyboardInterrupt) as error:
        _leave(stop_of(error))
    finally:
        end_undisturbed()
        hurry.set()  # Python waits for reading threads before it ends
        flush_log()


def stopping_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, Ctrl-C and, except under `nohup`, a closed terminal."""
    always = signal.SIGTERM, signal.SIGINT
    hidden = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return always if hidden else (*always, signal.SIGHUP)


def end_undisturbed() -> None:
    """Ignores the signals that have nothing left to stop; another Ctrl-C kills the process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(*_) -> NoReturn:
    # SLURM sends one of them several times, systemd both, and the end takes a while.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def open_streams() -> None:
    """Opens closed standard streams, as by `2>&-`, so that no other file takes their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def say(text: object) -> None:
    """Prints a line to standard output; drops it where that cannot be written, as to `| head`."""
    encoding = sys.stdout.encoding or "utf-8"
    # A path may have characters that the stream cannot encode.
    shown = str(text).encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(OSError):
        print(shown, flush=True)


def say_error(message: str) -> None:
    """Prints a message as one line to standard error, where that can be written."""
    line = message.replace("\n", "\\n")  # a path may have one
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)


def flush_log() -> None:
    """Drops text that standard output and error cannot take, such as files on a full disk.

    Otherwise Python would fail at its exit, and change the command's exit code.
    """
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115


def set_up_logging() -> None:
    """Logs the project's messages, and the libraries' warnings, to standard error."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("cassle_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(handler)


def switch_64_bits_off() -> None:
    """Undoes JAX_ENABLE_X64: it would draw other numbers, and mix float64 with a run's float32."""
    jax.config.update("jax_enable_x64", False)


def _guarded(main: Callable[[], None]) -> None:
    try:
        main()
    except BaseException as error:
        stop = stop_of(error)
        if stop is None:
            raise
        _leave(stop)


def stop_of(error: BaseException) -> Stop | None:
    """The `Stop` with which an error ends a command; `None` for a fault of the program."""
    if isinstance(error, Stop):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stop("stopped; the same command continues", EXIT_PREEMPTED, alone=True)
    if (code := code_of(error)) is not None:  # first: its words may quote a lack of memory
        return Stop(words_of(error), code, alone=True)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        said = next(iter(str(error).splitlines()), "none is left")  # a device says many lines
        line = f"this machine's memory does not suffice: {said}; use smaller settings"
        return Stop(line, EXIT_WRONG_SETTING, alone=True)
    return None


def code_of(error: BaseException) -> int | None:
    """The exit code of a user's mistake, or of storage out of reach; `None` for any other error.

    An `OSError` that names a file is a user's mistake, such as wrong permissions.
    """
    mistake, of_system = isinstance(error, UserError), isinstance(error, OSError)
    if isinstance(error, Outage) or ((mistake or of_system) and passing(error)):
        return EXIT_OUTAGE
    if mistake or (of_system and error.filename is not None):
        return EXIT_WRONG_SETTING
    return None


def _parse_flags(arguments: Sequence[str]) -> list[str]:
    try:
        if "config" in flags.FLAGS:
            arguments = _with_files_found(arguments)
        _check_overrides(arguments)
        rest = flags.FLAGS(arguments)
        check_given_once(flags.FLAGS)
        if "config" in flags.FLAGS:
            _ = flags.FLAGS.config.seed  # a missing file fails at its first use only
        if rest[1:]:
            raise ConfigError(f"{rest[1]!r} is not an option; options begin with --")
    except (OSError, ImportError) as error:
        code = EXIT_OUTAGE if passing(error) else EXIT_WRONG_SETTING
        raise Stop(f"config cannot be read: {_last_line(error)}", code) from error
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Stop(_last_line(error), code_of(error) or EXIT_WRONG_SETTING) from error
    return rest


def check_given_once(given: flags.FlagValues) -> None:
    """Raises ConfigError for a flag of one value that is given again: the first would be lost.

    An override, such as `--config.seed=1`, may follow another one of a script.
    """
    for name in given:
        several = given[name].present > 1 and not isinstance(given[name], flags.MultiFlag)
        if several and not name.startswith("config."):
            raise ConfigError(f"--{name} is given {given[name].present} times; give it once")


def _with_files_found(arguments: Sequence[str]) -> list[str]:
    """Makes `--config FILE` one word, and finds the file (see `find_config`)."""
    words, found = iter(arguments), []
    for word in words:
        if word in ("-config", "--config"):
            word = "=".join([word, *itertools.islice(words, 1)])
        match = re.fullmatch(r"(--?config=)(.+)", word, re.DOTALL)
        found.append(f"{match[1]}{find_config(match[2])}" if match else word)
    return found


def _check_overrides(arguments: Sequence[str]) -> None:
    """Raises ConfigError for a second configuration, or an override of an unknown setting."""
    pattern = re.compile(r"--?(?:no)?config(?:=(.+)|\.([\w.]+))", re.DOTALL)
    matches = [pattern.match(word) for word in arguments]
    files = [match[1] for match in matches if match and match[1]]
    if not files:
        return
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times; give it once")
    known = flat_settings(config_of(files[0]))
    for name in [match[2] for match in matches if match and match[2]]:
        check_setting(name, known, "config.")


def config_of(written: str) -> ConfigDict:
    """The configuration of a file with its arguments, such as `configs/cifar10.py:method=simclr`.

    Raises:
      ConfigError: the file cannot be read, fails, or returns none; the message names its line.
    """
    path, colon, chosen = written.partition(":")
    return made_by("config", path, ConfigDict, *[chosen] if colon else [])


def made_by(setting: str, path: str, kind: type[T], *chosen: str, **named: Any) -> T:
    """The result of the function `get_<setting>` of a user's Python file.

    Args:
      setting: the setting that names the file, `config` or `table`.
      path: path of the file.
      kind: type of what the function returns.
      chosen: arguments of the function.
      named: its keyword arguments.

    Raises:
      ConfigError: the file cannot be read, fails, or returns another type; the message names its
        line.
    """
    try:
        Path(path).read_bytes()  # runpy looks for a program in a folder
    except OSError as error:
        raise ConfigError(f"{setting} cannot be read: {_last_line(error)}") from error
    try:
        make = runpy.run_path(path).get(f"get_{setting}")
        made = make(*chosen, **named) if make else None
    except UserError:
        raise
    except Exception as error:  # of the user's code
        frames = traceback.extract_tb(error.__traceback__)
        lines = [each.lineno for each in frames if each.filename == path]
        # A file with null bytes, such as one in UTF-16, has no line.
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.lineno else []
        where = f" in its line {lines[-1]}" if lines else ""
        said = f"{type(error).__name__}: {_last_line(error)}"
        raise ConfigError(f"{setting}={path} fails{where}: {said}") from error
    if not isinstance(made, kind):
        returning = f"get_{setting} that returns a {kind.__name__}"
        lacks = returning if make else f"function get_{setting}"
        raise ConfigError(f"{setting}={path} lacks a {lacks}; {_EXAMPLES[setting]} has one")
    return made


def _last_line(error: Exception) -> str:
    """The last line of an error; a failing configuration file arrives as a whole traceback."""
    lines = [line.strip() for line in words_of(error).splitlines() if line.strip()]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else repr(error)


def words_of(error: BaseException) -> str:
    """The message of an error; for one of the file system, the path and the reason."""
    path = getattr(error, "filename", None)  # or a descriptor
    if isinstance(error, OSError) and isinstance(path, str | bytes) and error.filename2 is None:
        return f"{os.fsdecode(path)}: {error.strerror}"
    return str(error)


def _leave(stop: Stop) -> None:
    say_error(str(stop))
    sys.exit(stop.code)
