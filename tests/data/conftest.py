"""Image folders and data settings for the tests of this room."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cassle_jax.data.decode import MAX_PIXELS
from tests.drawn_once import ANEW


@pytest.fixture(autouse=True)
def _drawn_anew(monkeypatch):
    """Here the drawing itself is tested."""
    for family, draw in ANEW.items():
        monkeypatch.setattr(family, "draw", staticmethod(draw))


def _image_bytes(seed: int, height: int = 20, width: int = 24, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def image_bytes():
    """Encodes a random image, by seed."""
    return _image_bytes


@pytest.fixture
def settings():
    """A config's `data` section with some values changed."""

    def make(**changed) -> SimpleNamespace:
        usual = {
            "source": "scenes",
            "name": "",
            "path": "",
            "classes": "",
            "scenes": 20,
            "canvas": 32,
            "max_pixels": MAX_PIXELS,
        }
        return SimpleNamespace(**{**usual, **changed})

    return make


@pytest.fixture
def image_folder(tmp_path):
    """Writes `<root>/train/<class>/<n>.png` with images of different sizes."""

    def make(counts: dict[str, int], split: str = "train") -> Path:
        root = tmp_path / "images"
        seed = 0
        for name, count in counts.items():
            directory = root / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                data = _image_bytes(seed, 10 + seed % 23, 12 + seed % 17)
                (directory / f"{number:03d}.png").write_bytes(data)
                seed += 1
        return root

    return make
