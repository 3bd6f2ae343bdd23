"""Batches arrive in order on their devices, each with its place in the data; errors arrive too."""

import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from cassle_jax.data.feed import DeviceFeed
from cassle_jax.parallel import device_mesh

PATIENCE = 60  # seconds, on a machine with other work


class Batches(Iterator):
    """Batch n holds the number n; the state after it is n + 1. Ends by raising `end`."""

    def __init__(self, count=10**6, end=StopIteration, rows=4):
        self.step, self._count, self._end, self._rows = 0, count, end, rows

    def __next__(self):
        if self.step == self._count:
            raise self._end
        self.step += 1
        return {"image": np.full((self._rows, 2), self.step - 1)}

    def get_state(self):
        return {"step": self.step}


@pytest.fixture
def feed_of():
    feeds = []

    def make(batches, devices=1, **settings):
        feeds.append(DeviceFeed(batches, device_mesh(jax.devices()[:devices]), **settings))
        return feeds[-1]

    yield make
    for feed in feeds:
        feed.close()


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def threads():
    return set(threading.enumerate())


def test_batches_come_in_order_with_the_state_after_each(feed_of):
    batches = Batches()
    feed = feed_of(batches)
    wait_until(lambda: batches.step >= 3)  # it reads ahead of what is requested
    for number in range(6):
        batch, state = next(feed)
        np.testing.assert_array_equal(batch["image"], np.full((4, 2), number))
        assert state == {"step": number + 1}


def test_it_reads_no_further_ahead_than_its_depth(feed_of):
    batches = Batches()
    feed_of(batches, depth=3)
    wait_until(lambda: batches.step >= 4)
    time.sleep(0.1)
    assert batches.step == 4  # three held ready and one in the thread's hands


def test_a_batch_is_split_over_the_devices_in_order(feed_of):
    class Rows(Batches):
        def __next__(self):
            return {"image": np.arange(8).reshape(8, 1)}

    batch, _ = next(feed_of(Rows(), devices=4))
    assert batch["image"].shape == (8, 1)
    shards = sorted(batch["image"].addressable_shards, key=lambda shard: shard.device.id)
    rows = [np.ravel(shard.data).tolist() for shard in shards]
    assert rows == [[0, 1], [2, 3], [4, 5], [6, 7]]


def outcomes(feed, count):
    """The results of `count` calls of `next`, in a thread, so that waiting for ever fails."""
    found = []

    def ask():
        for _ in range(count):
            try:
                found.append(next(feed)[1]["step"])
            except OSError as error:
                found.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found


def test_an_exception_arrives_after_the_batches_before_it(feed_of):
    feed = feed_of(Batches(count=2, end=OSError("the disk is gone")))
    assert outcomes(feed, 3) == [1, 2, "the disk is gone"]


def test_a_feed_that_ended_stays_ended(feed_of):
    feed = feed_of(Batches(count=1, end=OSError("the disk is gone")))
    assert outcomes(feed, 3) == [1, "the disk is gone", "the disk is gone"]


def test_a_finite_iterator_ends_a_for_loop(feed_of):
    assert [state["step"] for _, state in feed_of(Batches(count=3))] == [1, 2, 3]


@pytest.mark.parametrize("taken", [0, 1])
def test_close_ends_the_thread_while_it_waits_for_room(taken):
    before = threads()
    batches = Batches()
    feed = DeviceFeed(batches, device_mesh(jax.devices()[:1]))
    for _ in range(taken):
        next(feed)
    wait_until(lambda: batches.step >= 3 + taken)
    feed.close()
    assert not threads() - before
    feed.close()


def test_close_ends_the_thread_after_an_exception():
    before = threads()
    feed = DeviceFeed(Batches(count=0, end=OSError("gone")), device_mesh(jax.devices()[:1]))
    feed.close()
    assert not threads() - before


def test_it_says_how_long_was_waited_for_data(feed_of):
    class Slow(Batches):
        def __next__(self):
            time.sleep(0.1)
            return super().__next__()

    batches = Batches()
    quick, slow = feed_of(batches), feed_of(Slow())
    wait_until(lambda: batches.step >= 3)
    for feed in (slow, slow, quick, quick):
        next(feed)
    assert slow.waited > 0.1
    assert quick.waited < slow.waited / 2
