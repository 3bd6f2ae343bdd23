import pytest

from cassle_jax.report.table import cell_text


@pytest.mark.parametrize(
    ("cell", "text"),
    [(0.12345, "0.123"), (-0.0004, "-0.000"), (123456.7, "1.235e+05"), (7, "7"), ("–", "–")],
)
def test_numbers_are_printed_to_three_decimals(cell, text):
    assert cell_text(cell) == text
