"""Ends a command that cannot start with one line: it lacks a package, or was stopped."""

import itertools
import sys
import traceback
from types import TracebackType

EXTRA_OF = {
    "pretrain": "train",
    "export": "train",
    "prepare": "train",
    "evaluate": "evaluate",
    "quickstart": "evaluate",
    "sweep": "sweep",
    "tables": "sweep",
    "transfer": "sweep",
}
"""For each command the extra of pyproject.toml that it needs."""

_REQUIREMENT_OF = {f"cassle_jax.{name}": f"cassle_jax[{extra}]" for name, extra in EXTRA_OF.items()}
_REQUIREMENT_OF["cassle_jax"] = "cassle_jax"


def explain_failed_starts() -> None:
    """Makes commands end with one line if a package is missing (2) or Ctrl-C comes early (75).

    A command imports its packages before its first line runs; only the hook for uncaught errors
    sees all of them fail. Other errors keep their traceback.
    """
    previous = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
        package = (getattr(error, "name", None) or "").partition(".")[0]
        needing = _outermost_module(trace)
        if isinstance(error, KeyboardInterrupt) and needing in _commands_started():
            print("error: stopped; the same command continues", file=sys.stderr)
            sys.exit(75)  # as in `command`, which imports what may be missing
        missing = isinstance(error, ModuleNotFoundError) and package not in ("", "cassle_jax")
        if not missing or needing not in _REQUIREMENT_OF:
            return previous(kind, error, trace)
        mend = f"pip install '{_REQUIREMENT_OF[needing]}'"
        print(f"error: {needing} needs the package {package}; {mend}", file=sys.stderr)
        sys.exit(2)

    sys.excepthook = report


def _commands_started() -> set[str]:
    """The modules that this process was started with as `python -m`: one, or none."""
    return {
        module
        for option, module in itertools.pairwise(sys.orig_argv)
        if option == "-m" and module in _REQUIREMENT_OF
    }


def _outermost_module(trace: TracebackType | None) -> str:
    """The command, or the first module of the project, that the error went through; "" for none."""
    for frame, _ in traceback.walk_tb(trace):
        spec = frame.f_globals.get("__spec__")
        parts = getattr(spec, "name", "").split(".")
        if parts[0] == "cassle_jax":
            return ".".join(parts[:2])
    return ""
