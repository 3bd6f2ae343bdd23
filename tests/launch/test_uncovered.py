"""launch/coverage.sh's list: what it excuses, and what it names."""

import os
import runpy
import subprocess
import sys

import pytest

from tests.launch.test_scripts import LAUNCH, run

UNCOVERED = runpy.run_path(str(LAUNCH / "uncovered.py"))

MISSING = ["cassle_jax/a.py:3: raise A", "cassle_jax/a.py:9: raise B", "cassle_jax/b/c.py:1: x = 1"]


@pytest.mark.parametrize(
    ("excused", "left"),
    [
        ("", MISSING),
        ("# why\ncassle_jax/a.py: raise A\n\n", MISSING[1:]),
        ("cassle_jax/a.py:77: raise B\ncassle_jax/b/c.py: x = 1\n", MISSING[:1]),
        ("cassle_jax/b/a.py: raise A\n# cassle_jax/a.py: raise A\n", MISSING),
    ],
)
def test_a_line_is_excused_by_its_text_wherever_it_moves(excused, left):
    assert UNCOVERED["judged"](MISSING, excused, "cassle_jax")[0] == left


def test_an_excuse_without_need_is_named_in_the_folder_of_interest():
    excused = "cassle_jax/a.py: raise A\ncassle_jax/a.py: gone\ncassle_jax/b/c.py: gone, too\n"
    judged = UNCOVERED["judged"]
    assert judged(MISSING, excused, "cassle_jax")[1] == [
        "cassle_jax/a.py: gone",
        "cassle_jax/b/c.py: gone, too",
    ]
    assert judged(MISSING[2:], excused, "cassle_jax/b")[1] == ["cassle_jax/b/c.py: gone, too"]


def test_an_excuse_of_what_is_no_line_any_more_is_an_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.py").write_text("def f():\n    raise A\n")
    excused = "# why\na.py: raise A\na.py:7: raise A\na.py: raise B\nb.py: raise A\na.py: raise\n"
    stale = ["a.py: raise B", "b.py: raise A", "a.py: raise"]
    assert UNCOVERED["gone"](excused, tmp_path) == stale

    (tmp_path / "uncovered.txt").write_text(excused)
    state = UNCOVERED["main"].__globals__
    for name, value in (("ROOT", tmp_path), ("EXCUSED", tmp_path / "uncovered.txt")):
        monkeypatch.setitem(state, name, value)
    monkeypatch.setitem(state, "missing_lines", lambda of: ["a.py:2: raise A"])
    assert UNCOVERED["main"](".") == 1
    said = capsys.readouterr().out
    assert all(f"excuses what is not a line any more: {line}\n" in said for line in stale)
    (tmp_path / "uncovered.txt").write_text("a.py: raise A\n")
    assert UNCOVERED["main"](".") == 0


def test_every_excuse_of_this_project_has_its_line():
    assert not UNCOVERED["gone"](UNCOVERED["EXCUSED"].read_text(), UNCOVERED["ROOT"])


def test_lines_that_no_test_reaches_are_named_with_their_text(tmp_path, monkeypatch):
    pytest.importorskip("coverage")
    source = tmp_path / "half.py"
    source.write_text("def half(x):\n    if x:\n        return 1\n    return 2\n\n\nhalf(True)\n")
    monkeypatch.setenv("COVERAGE_FILE", str(tmp_path / "lines"))
    # A process that coverage.sh's own measurement, where there is one, neither enters nor follows.
    outer = ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")
    alone = {name: value for name, value in os.environ.items() if name not in outer}
    measure = [sys.executable, "-m", "coverage", "run", f"--include={source}", str(source)]
    subprocess.run(measure, cwd=tmp_path, env=alone, check=True)
    assert list(UNCOVERED["missing_lines"](str(tmp_path))) == [f"{source}:4: return 2"]


def test_a_folder_that_is_none_is_refused_before_the_tests():
    ended = run("coverage.sh", "--of", "cassle_jax/typo")
    assert ended.returncode == 1
    assert (
        "--of cassle_jax/typo is not a folder; give one such as cassle_jax/report" in ended.stderr
    )
