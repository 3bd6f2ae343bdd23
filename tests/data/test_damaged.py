"""The account of damaged images: what counts, what is remembered, when it stops a run."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from cassle_jax.data import DamagedLog, DataError, TooManyDamaged


@pytest.fixture
def warnings():
    """Messages that reach absl's log."""
    messages = []

    class Kept(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Kept()
    logging.getLogger("cassle_jax").addHandler(handler)
    yield messages
    logging.getLogger("cassle_jax").removeHandler(handler)


def test_each_is_counted_and_named_once(warnings):
    log = DamagedLog(100, 0.5)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: log.add(f"image {i % 7}", "truncated"), range(200)))
    assert len(log) == 7
    assert log.names == tuple(f"image {i}" for i in range(7))
    for i in range(7):
        assert sum(f"image {i} (truncated)" in message for message in warnings) == 1


def test_more_than_the_fraction_stops():
    log = DamagedLog(200, 0.01)
    log.add("a", "empty")
    log.add("b", "empty")
    with pytest.raises(TooManyDamaged, match=r"3 of 200 .*a \(empty\); b \(empty\); c \(torn\)"):
        log.add("c", "torn")
    with pytest.raises(TooManyDamaged):
        log.add("a", "empty")


def test_a_long_list_is_cut():
    log = DamagedLog(100, 0.3)
    with pytest.raises(TooManyDamaged, match="and 11 more"):
        for i in range(31):
            log.add(f"image {i:02d}", "empty")


def test_zero_tolerates_none_and_one_tolerates_all():
    with pytest.raises(TooManyDamaged):
        DamagedLog(10, 0.0).add("a", "empty")
    log = DamagedLog(2, 1.0)
    log.add("a", "empty")
    log.add("b", "empty")


def test_a_restarted_run_remembers(tmp_path, warnings):
    first = DamagedLog(100, 0.02, tmp_path)
    first.add("folder/ä\tb\n\udcff.jpg", "broken\nin two lines")
    DamagedLog(100, 0.02, tmp_path, process_index=3).add("other", "empty")
    warnings.clear()

    again = DamagedLog(100, 0.02, tmp_path)
    assert len(again.remembered) == 2
    again.add("folder/ä\tb\n\udcff.jpg", "broken\nin two lines")
    again.add("other", "empty")
    assert len(again) == 2
    assert not warnings
    with pytest.raises(TooManyDamaged, match="other"):
        again.add("third", "empty")
    assert len(DamagedLog(100, 0.02, tmp_path).remembered) == 3


def test_what_was_mended_or_removed_does_not_count(tmp_path):
    before = DamagedLog(131, 0.02, tmp_path)
    with pytest.raises(TooManyDamaged, match="3 of 131"):
        for name in ("removed", "mended", "still torn"):
            before.add(name, "torn")
    now = DamagedLog(128, 0.02, tmp_path)
    assert (len(now), now.names) == (0, ())
    now.add("still torn", "torn")
    now.add("new", "empty")
    assert now.names == ("new", "still torn")
    with pytest.raises(TooManyDamaged, match="3 of 128"):
        now.add("mended", "torn once more")


def test_a_line_torn_by_a_kill_does_not_count(tmp_path):
    DamagedLog(100, 0.5, tmp_path).add("whole", "empty")
    (file,) = tmp_path.iterdir()
    with file.open("a") as opened:
        opened.write("tor")
    log = DamagedLog(100, 0.5, tmp_path)
    assert log.remembered == ("whole",)
    log.add("torn", "empty")
    assert DamagedLog(100, 0.5, tmp_path).remembered == ("torn", "whole")


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_fraction_outside_its_range(fraction):
    with pytest.raises(DataError, match=r"data\.max_bad_fraction="):
        DamagedLog(10, fraction)


@pytest.mark.parametrize(
    ("settings", "advice", "bound"),
    [
        ({}, "data.max_bad_fraction=0.01 allows; repair them, or raise it: ", "data.max_pixels"),
        ({"setting": None}, "the tolerated fraction 0.01; repair or remove them", "--max_pixels"),
    ],
)
def test_only_a_setting_that_the_user_has_is_named(settings, advice, bound):
    log = DamagedLog(100, 0.01, **settings)
    log.add("a", "empty")
    with pytest.raises(TooManyDamaged, match=rf"more than {advice}.* more than {bound}=6\)"):
        log.add("b", "9x9 pixels are more than data.max_pixels=6")
