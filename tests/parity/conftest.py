"""Optimises what is replayed, and prints each file's largest errors at the end."""

import os

import jax
import pytest


# By module: what is of a package without `__init__.py` lasts until the session ends, and all tests
# after these would be compiled with optimisations, for minutes.
@pytest.fixture(scope="module", autouse=True)
def _optimized():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    others = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    jax.config.update("jax_disable_most_optimizations", others)


def pytest_terminal_summary(terminalreporter, config):
    lines = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "parity":
                    file, figures = value
                    lines[file] = figures + ("  FAILED" if report.failed else "")
    if lines:
        terminalreporter.section(f"parity with {config.getoption('golden')}")
        width = max(map(len, lines))
        for file, figures in sorted(lines.items()):
            terminalreporter.line(f"{file:{width}}  {figures}")
