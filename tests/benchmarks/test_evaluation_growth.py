import pytest

from benchmarks import evaluation
from benchmarks.evaluation import Cost, law
from benchmarks.isolated import run_isolated


@pytest.mark.exhaustive
@pytest.mark.parametrize("protocol", evaluation.PROTOCOLS)
def test_every_protocol_is_measured(protocol):
    found = run_isolated(evaluation.cost, protocol, 60, 8, 5)
    assert found.rows == 60
    assert found.seconds > 0
    assert 0 < found.gib < 2


def test_the_law_is_that_of_the_last_two_sizes():
    costs = [Cost(10, 9.0, 3.0), Cost(1000, 2.0, 1.0), Cost(2000, 8.0, 1.5)]
    times, gib = 8 * (evaluation.IMAGES / 2000) ** 2, 1.5 + 0.5 * (evaluation.IMAGES - 2000) / 1000
    assert law(costs) == (
        "time grows with images^2.00, memory by 500.00 GiB per million; "
        f"1281167 images would take {times:.3g} s and {gib:.3g} GiB"
    )
    assert law(costs[:1]) == "one size shows no growth"
