"""The documented example of an augmentation: its changes apply, and everything follows."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.changes import apply_change

ROOT = Path(__file__).parents[1]

CHECKS = """
import contextlib
import dataclasses
import inspect
import numpy as np
import sys
from cassle_jax.augment import CASSLE_DESCRIPTORS, DESCRIPTORS, draw, identity_descriptor
from cassle_jax.config import base_config
from cassle_jax.evaluation.augmentation_probes import _factors
from cassle_jax.evaluation.views import (
    alone, draw_for_each, every_augmentation, nothing, view_under)
from cassle_jax.methods.views import augmented_views

levels = np.unique(np.round(np.asarray(view.image) * spec.std + spec.mean, 4)[..., 0]).size
assert 1 < levels <= round(float(view.params.levels)) <= 8, levels
np.testing.assert_allclose(describe(view, spec)["posterize"], [1 / view.params.levels])
assert identity_descriptor(["posterize"]) == 0

never = dataclasses.replace(spec, posterize=0.0)
drawn, without = (draw(jax.random.key(1), jnp.array([40, 48]), each) for each in (spec, never))
changed = {each.name for each in dataclasses.fields(drawn)
           if not np.array_equal(getattr(drawn, each.name), getattr(without, each.name))}
assert changed == {"posterize"}, changed

grey = AugmentSpec(size=32, posterize=0.5, grayscale=0.0, blur=0.0)
batch = {"image": image[None], "size": np.array([[40, 48]]), "index": np.array([0])}
every = every_augmentation(grey)
params = jax.jit(lambda key: draw_for_each(key, batch, every))(jax.random.key(0))
seen = jax.jit(lambda chosen: view_under(chosen, params, batch, every).image)
plain, posterized = seen(nothing()), seen(alone("posterize"))
assert not np.allclose(plain, posterized)
assert len(np.unique(np.round(posterized[0, ..., 0], 4))) <= 8 < len(np.unique(plain[0, ..., 0]))

images, sizes = jnp.zeros((8, 40, 48, 3), jnp.uint8), jnp.full((8, 2), 40)
pair = jax.jit(lambda key: augmented_views(key, images, sizes, (grey,), paired=True))
(paired,) = pair(jax.random.key(0))
assert len(np.unique(paired.params.levels)) == 8 and len(np.unique(paired.params.hue)) == 4

config = base_config("conditioning=crop+posterize,augself=posterize:0.5")
assert config.augment.posterize == 0 and config.augself.posterize == 0.5
assert "posterize coarseness" in _factors({"posterize": np.ones((3, 1))})

# A sixth number of a step, which the page says does not exist, is no copy of the fifth.
draw_module = sys.modules["cassle_jax.augment.draw"]
place, sixth = 'uniform["posterize"][1]', 'uniform["posterize"][5]'
source = inspect.getsource(draw_module.draw)
assert place in source
exec(source.replace(place, sixth), vars(draw_module))
with contextlib.suppress(IndexError):
    draw_module.draw(jax.random.key(1), jnp.array([40, 48]), spec)
    raise AssertionError("there is a sixth number")
"""


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "adding_an_augmentation.md").read_text()


def test_the_documented_changes_are_all_that_an_augmentation_takes(page, tmp_path):
    shutil.copytree(ROOT / "cassle_jax", tmp_path / "cassle_jax")
    for change in re.findall(r"```diff\n(.*?)```", page, re.DOTALL):
        apply_change(change, tmp_path)
    script = tmp_path / "example.py"
    script.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1] + CHECKS)
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert "values per channel" in ran.stdout
