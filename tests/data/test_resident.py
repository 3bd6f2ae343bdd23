"""Batches drawn on the devices are those the host would have sent."""

import jax
import numpy as np
import pytest

from cassle_jax.data import DamagedLog, DataError, training_batches
from cassle_jax.data.feed import DeviceFeed
from cassle_jax.data.resident import ResidentFeed, resident_bytes
from cassle_jax.data.scenes import Scenes
from cassle_jax.data.sources import Record
from cassle_jax.parallel import device_mesh

CANVAS = 24


class WithDamage:
    """Scenes of which one cannot be decoded."""

    name = "scenes with damage"

    def __init__(self, damaged):
        self._scenes, self._damaged = Scenes(11, size=16), damaged
        self.class_names = self._scenes.class_names

    def __len__(self):
        return len(self._scenes)

    def __getitem__(self, index):
        if index == self._damaged:
            return Record(b"\xff\xd8 no image", 0, f"broken #{index}")
        return self._scenes[index]


def settings(source):
    damaged = DamagedLog(len(source), 0.5)
    return {"batch": 4, "canvas": CANVAS, "seed": 3, "damaged": damaged, "threads": 2}


@pytest.mark.parametrize("devices", [1, 2])
def test_batches_and_states_are_those_of_the_host(devices):
    source, mesh = WithDamage(5), device_mesh(jax.devices()[:devices])
    resident = ResidentFeed(source, mesh, **settings(source))
    fed = DeviceFeed(training_batches(source, **settings(source)), mesh)
    assert iter(resident) is resident
    for _ in range(7):  # over the end of three epochs of two batches
        (batch, state), (expected, expected_state) = next(resident), next(fed)
        assert state == expected_state
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert batch[name].sharding.is_equivalent_to(value.sharding, value.ndim)
            np.testing.assert_array_equal(batch[name], value)
    fed.close()
    resident.close()


def test_a_state_continues_and_one_of_another_order_is_refused():
    source, mesh = Scenes(11, size=16), device_mesh(jax.devices()[:1])
    through = ResidentFeed(source, mesh, **settings(source))
    for _ in range(3):
        _, state = next(through)
    expected, _ = next(through)
    continued, _ = next(ResidentFeed(source, mesh, **settings(source), state=state))
    np.testing.assert_array_equal(continued["index"], expected["index"])
    with pytest.raises(DataError, match="seed=4, this run 3"):
        ResidentFeed(source, mesh, **settings(source), state={**state, "seed": 4})


def test_the_bytes_it_says_are_the_bytes_it_takes():
    source, mesh = Scenes(11, size=16), device_mesh(jax.devices()[:1])
    feed = ResidentFeed(source, mesh, **settings(source))
    next(feed)
    taken = sum(each.nbytes for each in feed._images.values())
    assert taken == resident_bytes(source, CANVAS)
