"""Makes the tiny encoder a choice of `encoder.name`."""

import pytest

from cassle_jax.models import ENCODERS
from tests.tiny import TinyEncoder


@pytest.fixture(autouse=True)
def _tiny_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)
