"""The faults that are repeated are rows of the storage page, with its exit codes."""

import re
from pathlib import Path

import pytest

from benchmarks.injected import FAULTS

PAGE = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()
ROWS = PAGE.split("| exit code | started again |")[1].split("\n\n")[0].splitlines()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_repeated_fault_is_a_row_of_the_page(fault):
    row = next(row for row in ROWS if row.startswith(f"| {fault.name.split(',')[0]}"))
    codes = {int(code) for code in re.findall(r"\d+", row.split("|")[3])}
    assert 75 in fault.codes or set(fault.codes) <= (codes or {0})
