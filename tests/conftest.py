"""Gives every test eight pretend CPU devices and a compilation cache that outlives the run.

Adds the options of the parity tests, which pytest must know before it looks into their folder.
"""

import gc
import os
import signal
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from tests import type_checks
from tests.forking.preloaded import start as start_preloaded

type_checks.install()

# All of this is set before anything imports jax, and through the environment so that commands
# started by a test inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# With fewer cores than devices, steps dispatched ahead of each other can starve a collective of
# the threads it waits for (seen with jax 0.12 on two cores: XLA aborts after a minute).
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
# Most of the suite's time is compiling: 2.0 s of CPU for a tiny run's step so, 8.8 s otherwise. The
# parity tests have their programs optimised; JAX_DISABLE_MOST_OPTIMIZATIONS=0 does it for all.
unoptimised = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
# jaxlib 0.12 does not know the flag, and ends.
if unoptimised and metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# XLA cuts a program into 32 parts that are compiled side by side. The tests keep every core busy,
# and a whole one takes a seventh less.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

# In scikit-learn's small reference fits, BLAS's threads spent nine tenths of the CPU time waiting
# for each other. The processes of pytest-xdist, which import NumPy later, heed this.
for library in ("OPENBLAS", "OMP"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def _compilation_cache() -> Path:
    """A directory of this user alone, since what lies in it is executed."""
    directory = Path(tempfile.gettempdir()) / f"cassle_jax-tests-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="cassle_jax-tests-"))
    return directory


os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compilation_cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def pytest_addoption(parser):
    group = parser.getgroup("parity", "parity with the published implementation")
    group.addoption(
        "--golden",
        metavar="DIR",
        default=Path(__file__).parent / "golden",
        help="folder of golden figures that tests/parity replays (default: tests/golden)",
    )
    group.addoption(
        "--golden-seed",
        metavar="N",
        type=int,
        help="seed of the weights behind backbone_features.npz (default: found by trying)",
    )


def pytest_runtest_setup(item):
    if item.get_closest_marker("pytorch"):
        pytest.importorskip("torch")
    if item.get_closest_marker("browser"):
        pytest.importorskip("axe_playwright_python")


def pytest_configure(config):
    # Absolute, as the processes of pytest-xdist get it from here.
    folder = config.invocation_params.dir / config.getoption("golden")
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden={config.getoption('golden')} is not a folder")
    config.option.golden = str(folder.resolve())
    if "CASSLE_JAX_PRELOADED" not in os.environ and (end := start_preloaded()):
        config.add_cleanup(end)


def pytest_collection_modifyitems(items):
    # It waits for minutes, which the other processes of pytest-xdist use.
    items.sort(key=lambda item: item.path.name != "test_slurm.py")


def pytest_collection_finish():
    # What is imported stays: looking through it again and again is a twentieth of the time.
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def pytest_sessionfinish():
    # pytest-xdist kills a process that takes ten seconds to end, and with it what it has measured.
    coverage = sys.modules.get("coverage")
    current = coverage and coverage.Coverage.current()
    if current:
        current.save()


@pytest.fixture(scope="session", autouse=True)
def _no_contact_sheets():
    """A run begins with a picture, which takes seconds of each: here it has one pixel."""
    from tests.tiny import blank_sheet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cassle_jax.training.loop.write_contact_sheet", blank_sheet)
        yield


@pytest.fixture(scope="session", autouse=True)
def _shared_programs():
    from tests.shared_programs import share_programs

    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_context():
    from tests.one_context import share_contexts

    with pytest.MonkeyPatch.context() as patch:
        share_contexts(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _drawn_once():
    from tests.drawn_once import draw_once

    draw_once()


@pytest.fixture(autouse=True)
def _no_end():
    """A command that ends has the rest of its process wait for no storage, and heed no SIGTERM."""
    _undo_end()  # of a command in a fixture of the module
    yield
    _undo_end()


# What a script starts in the background ignores Ctrl-C, and under nohup a closed terminal; so would
# all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
_HANDLERS = {
    number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
}


def _undo_end():
    from cassle_jax.faults import hurry

    hurry.clear()
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def as_a_library(monkeypatch):
    """Without the checks of shapes that the tests run with, and a user does not."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


@pytest.fixture
def contact_sheets(monkeypatch):
    """The picture as users have it."""
    from cassle_jax.training.sheet import write_contact_sheet

    monkeypatch.setattr("cassle_jax.training.loop.write_contact_sheet", write_contact_sheet)
