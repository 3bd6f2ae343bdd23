"""Makes the tiny encoder a choice of `encoder.name`, and programs that compile in half the time."""

import os

import jax
import pytest

from cassle_jax.models import ENCODERS
from tests.tiny import TinyEncoder


@pytest.fixture(autouse=True)
def _tiny_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)


@pytest.fixture(scope="package", autouse=True)
def _quickly_compiled():
    """Runs are compared with each other here, and are short: XLA's optimisations are not worth it.

    Also in the processes that a test starts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
