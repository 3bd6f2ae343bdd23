"""Contenders take turns, and what disturbs all of them does not change their ratio."""

import pytest

from benchmarks.contest import Contender, NotComparableError, contest


class Clock:
    """A machine that gets slower and slower; a contender's run takes its seconds, times that."""

    def __init__(self):
        self.now, self.slowness, self.order = 0.0, 1.0, []

    def __call__(self):
        return self.now

    def contender(self, name, seconds, items=None):
        def run():
            self.order.append(name)
            self.now += seconds * self.slowness

        return Contender(name, lambda: run, items)


def test_rates_are_reported_by_round_and_ratios_do_not_feel_the_machine():
    clock = Clock()
    contenders = [clock.contender("ours", 1.0), clock.contender("theirs", 3.0, items=20)]

    def ticking():
        clock.slowness = 1.0 + len(clock.order) // 2  # slower in every round
        return clock.now

    ours, theirs = contest("speed", "items/s", 10, contenders, 3, ticking)
    assert ours.values == pytest.approx((10.0, 5.0, 10 / 3))
    assert theirs.values == pytest.approx((20 / 3, 10 / 3, 20 / 9))
    assert ours.ratio is None and theirs.ratio == pytest.approx(1.5)
    assert clock.order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert ours.median == 5.0 and (ours.unit, ours.measurement) == ("items/s", "speed")


def test_what_was_made_during_others_turns_does_not_count():
    clock = Clock()

    class Reader:
        made = 0  # one batch more in every second that others take

        def __call__(self):
            self.made = min(2, self.made + clock.now - self.asked) if clock.order else 0
            clock.now += 4 - self.made  # seconds for four batches, one each
            self.made, self.asked = 0, clock.now

        asked = 0.0

    reader = Reader()
    contenders = [Contender("reader", lambda: reader), clock.contender("other", 3.0)]
    flattered, _ = contest("speed", "batches/s", 4, contenders, 2, clock)
    honest, _ = contest("speed", "batches/s", 4, contenders, 2, clock, lead_in=True)
    assert max(flattered.values) == 2.0  # two of the four were there
    assert honest.values == (1.0, 1.0)


def test_what_is_not_installed_or_fails_is_reported_and_the_others_run():
    def not_installed():
        import no_such_package  # noqa: F401

    def breaks():
        raise RuntimeError("no memory\nand a long story")

    def lacks_a_library():
        raise ImportError("libcudnn.so.9: cannot open shared object file")

    def elsewhere():
        raise NotComparableError("it has no such device")

    clock = Clock()
    rows = contest(
        "speed",
        "items/s",
        1,
        [
            clock.contender("ours", 1.0),
            Contender("missing", not_installed),
            Contender("elsewhere", elsewhere),
            Contender("half installed", lacks_a_library),
            Contender("at once", breaks),
            Contender("later", lambda: breaks),
        ],
        2,
        clock,
    )
    assert rows[0].values == (1.0, 1.0)
    assert [row.values for row in rows[1:]] == [()] * 5
    assert [row.failed for row in rows] == [False, False, False, True, True, True]
    assert [row.note for row in rows[1:]] == [
        "not installed: no_such_package",
        "it has no such device",
        "ImportError: libcudnn.so.9: cannot open shared object file",
        "RuntimeError: no memory",
        "RuntimeError: no memory",
    ]
    (ours,) = contest("speed", "items/s", 1, [Contender("ours", not_installed)], 1, clock)
    assert ours.failed
