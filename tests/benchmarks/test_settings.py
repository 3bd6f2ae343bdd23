"""Every measuring command names a wrong flag in one line, before it measures."""

import pytest

from tests.commands import run_command

QUICKSTART = "--config=configs/quickstart.py:method=moco_v2"


@pytest.mark.parametrize(
    ("module", "flags", "words"),
    [
        ("evaluation", ["--rows=ten"], "rows=ten must list numbers of at least 1"),
        ("evaluation", ["--protocols=nearest"], "protocols='nearest'"),
        ("evaluation", ["--classes=1"], "classes=1 must be at least 2"),
        ("evaluation", ["--classes=2049"], "classes=2049 is out of range; use at most 2048"),
        ("evaluation", ["--features=1"], "features=1 must be at least 2"),
        ("decoding", ["--data=/nowhere"], "data=/nowhere has no .jpg"),
        ("decoding", ["--data=/nowhere", "--canvas=0"], "canvas=0 must be at least 1"),
        ("linear_evaluation", ["--rows=4"], "rows=4 must be at least 10"),
        ("xla_flags", ["--method=mocov2"], "method='mocov2'"),
        ("xla_flags", ["--seconds=0"], "seconds=0.0 must be"),
        ("convolutions", ["--size=48"], "size=48 must be a multiple of 32"),
        ("weak_scaling", [QUICKSTART, "--processes=0"], "processes=0 must list numbers"),
        ("weak_scaling", [QUICKSTART, "--steps=0"], "steps=0 must be at least 1"),
        (
            "weak_scaling",
            [QUICKSTART, "--config.data.source=folder", "--config.data.path=/nowhere"],
            "data.path='/nowhere'",
        ),
    ],
)
def test_a_wrong_flag_is_one_line(module, flags, words, capsys):
    assert run_command(module, *flags, package="benchmarks") == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert words in line
    assert said.out == ""
