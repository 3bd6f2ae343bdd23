"""Switches off the fusions with which XLA computes wrong values on CPUs."""

import contextlib
import os
import pathlib
import sys
import warnings
from importlib import metadata

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# The releases of jaxlib that know the flag, out of those that are supported; an unknown flag would
# end the process. 0.10.2 computes wrong values and 0.11.0 crashes; without these fusions, a
# training step on a CPU takes no longer.
_FIRST, _BEYOND = (0, 10), (0, 13)


def switch_off_ynnpack() -> None:
    """Makes XLA compile for CPUs without YNNPACK, unless the environment's XLA_FLAGS say otherwise.

    Call it before JAX's first use of a device: a later call issues a `UserWarning`.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # to XLA, the name of a file that holds the flags
        with contextlib.suppress(OSError):  # XLA says that it cannot be read
            flags = pathlib.Path(flags).read_text()
    release = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
    if _FLAG in flags or not _FIRST <= release < _BEYOND:
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=".strip()
    if _computes_on_cpus():
        warnings.warn(
            "JAX computed on the CPU before cassle_jax was imported, with fusions that can give "
            f"wrong values; import cassle_jax first, or set XLA_FLAGS={_FLAG}=",
            stacklevel=3,
        )


def _computes_on_cpus() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    begun = getattr(bridge, "backends_are_initialized", bool)()
    return begun and sys.modules["jax"].default_backend() == "cpu"
