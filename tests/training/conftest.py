"""Makes the tiny encoder a choice of `encoder.name`, and programs that compile in half the time."""

import pytest

from cassle_jax.models import ENCODERS
from tests.tiny import TinyEncoder


@pytest.fixture(autouse=True)
def _tiny_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)


@pytest.fixture(scope="module", autouse=True)
def _quickly_compiled(quickly_compiled):
    pass
