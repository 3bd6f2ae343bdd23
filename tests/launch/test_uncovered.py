"""launch/coverage.sh's list: what it excuses, and what it names."""

import runpy

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


def test_lines_that_no_test_reaches_are_named_with_their_text(tmp_path, monkeypatch):
    coverage = pytest.importorskip("coverage")
    source = tmp_path / "half.py"
    source.write_text("def half(x):\n    if x:\n        return 1\n    return 2\n")
    monkeypatch.setenv("COVERAGE_FILE", str(tmp_path / "lines"))
    measured = coverage.Coverage(data_file=str(tmp_path / "lines"), include=[str(source)])
    measured.start()
    runpy.run_path(str(source))["half"](True)
    measured.stop()
    measured.save()
    assert list(UNCOVERED["missing_lines"](str(tmp_path))) == [f"{source}:4: return 2"]


def test_a_folder_that_is_none_is_refused_before_the_tests():
    ended = run("coverage.sh", "--of", "cassle_jax/typo")
    assert ended.returncode == 1
    assert (
        "--of cassle_jax/typo is not a folder; give one such as cassle_jax/report" in ended.stderr
    )
