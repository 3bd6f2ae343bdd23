"""Tables: loading, expansion into runs, resumption, and results."""

import csv
import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.evaluation.findings import Score
from cassle_jax.faults import Outage
from cassle_jax.sweep import experiment, worker
from cassle_jax.sweep.budget import runs_to_measure, steps_within
from cassle_jax.sweep.cost import hours_of
from cassle_jax.sweep.evaluation import Evaluation, evaluation_of
from cassle_jax.sweep.experiment import _Results
from cassle_jax.sweep.jobs import write_outcome
from cassle_jax.sweep.pool import WorkerPool, gpu_shares
from cassle_jax.sweep.results import lines_of, with_means, write_results
from cassle_jax.sweep.space import SweepRequest, parsed
from cassle_jax.sweep.sweep import sweep
from cassle_jax.sweep.table import Row, Table, find_table, planned, rows_in, runs_of_table
from cassle_jax.sweep.worker import Job
from cassle_jax.tables import dry_run, run_table
from cassle_jax.training.saved_config import read_config, write_config
from cassle_jax.training.start_records import last_start_record
from tests.commands import run_command
from tests.tiny import on_one_device

ROOT = Path(__file__).parents[1]
TINY = "tests/launch/tiny_run.py"
TABLE = f'''
from cassle_jax.sweep.table import Row, Table

def get_table():
    return Table(
        title="Tiny",
        question="Does it run?",
        rows=(
            Row("plain", "{TINY}:conditioning=none"),
            Row("CASSLE", "{TINY}:conditioning=cassle"),
            Row("hasty", "{TINY}:conditioning=none", ("optimizer.base_learning_rate=1e30",)),
        ),
        seeds=(0, 1),
        datasets=("scenes",),
        tasks=("knn",),
        evaluation=("limit=32",),
    )
'''
CONFIG = "configs/quickstart.py"


def table(*rows, **settings):
    return Table("A table", "Which is ahead?", rows, **settings)


PAIR = table(Row("SimCLR, plain", f"{CONFIG}:method=simclr,conditioning=none"),
             Row("SimCLR, CASSLE", f"{CONFIG}:method=simclr"),
             Row("BYOL, plain", f"{CONFIG}:method=byol,conditioning=none"))  # fmt: skip


def names(runs):
    return [run.name for run in runs]


def test_all_rows_of_a_seed_come_before_the_next():
    runs = runs_of_table(PAIR, seeds=(3, 7), rows=("simclr",), overrides=("epochs=5",))
    assert names(runs) == ["simclr-plain-3", "simclr-cassle-3", "simclr-plain-7", "simclr-cassle-7"]
    assert [run.config.seed for run in runs] == [3, 3, 7, 7]
    assert {run.config.epochs for run in runs} == {5}
    assert names(runs_of_table(PAIR, rows=("plain",), seeds=(0,))) == [
        "simclr-plain-0",
        "byol-plain-0",
    ]


def test_the_rows_settings_come_before_the_commands():
    one = table(
        Row("a", CONFIG, ("epochs=3", "conditioning=none")), overrides=("epochs=2", "steps=9")
    )
    (run,) = runs_of_table(one, seeds=(0,), overrides=("steps=8",))
    assert (run.config.epochs, run.config.steps) == (3, 8)
    assert run.config.conditioning.descriptors == ()


def test_at_toy_size_every_run_is_small_and_draws_its_images():
    rows = (Row("a", "configs/imagenet_byol.py"), Row("b", "configs/imagenet_swav.py"))
    for run in runs_of_table(table(*rows), seeds=(0,), toy=True):
        assert (run.config.data.source, run.config.steps, run.config.encoder.width) == (
            "scenes",
            4,
            8,
        )
        assert run.config.method.projector_out == 32


def test_a_short_run_saves_seldom_and_warms_up_within_it():
    rows = (Row("a", CONFIG), Row("b", CONFIG, ("checkpoint.every_steps=7",)))
    overrides = ("steps=100", "optimizer.warmup_epochs=3")
    first, second = (
        planned(run, 1280).config
        for run in runs_of_table(table(*rows), seeds=(0,), overrides=overrides)
    )
    assert (first.checkpoint.every_steps, second.checkpoint.every_steps) == (20, 7)
    assert first.probe.every_epochs == 0
    assert first.optimizer.warmup_epochs == 3.0  # set by name
    (run,) = runs_of_table(table(rows[0]), seeds=(0,), overrides=("steps=20",))
    assert planned(run, 12_800).config.optimizer.warmup_epochs == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row("a", f"{CONFIG}:method=simclrr")], r"row 'a': method='simclrr' .* 'simclr'\?$"),
        ([Row("a", CONFIG, ("sed=1",))], r"row 'a': sed is not a setting .* did you mean seed\?$"),
        ([Row("a", CONFIG, ("sed",))], r"row 'a': 'sed' is not name=value$"),
    ],
)
def test_an_invalid_setting_names_its_row(rows, message):
    with pytest.raises(ConfigError, match=message):
        runs_of_table(table(*rows))


OUT_OF_RANGE = [
    ("batch_size=0", "batch_size=0 must be at least 2"),
    ("optimizer.momentum=1.5", r"optimizer\.momentum=1\.5 is not in \[0, 1\); 0\.9 is usual"),
    ("conditioning.dropout=2", r"conditioning\.dropout=2\.0 is not in \[0, 1\)"),
    ("augment.size=0", r"augment\.size=0 is not valid; use an integer >= 1"),
    ("data.threads=-1", r"data\.threads=-1 must be at least 0"),
    ("steps=-3", "steps=-3 must be at least 0"),
    ("chunk_size=3", "chunk_size=3 must divide batch_size="),
]


@pytest.mark.parametrize(("setting", "message"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_before_any_run_starts(tmp_path, setting, message):
    name, value = setting.split("=")
    request = SweepRequest(CONFIG, grid=f"seed=0,1;{name}={value}")
    for prefix, start in (
        ("row 'SimCLR, plain'", lambda to: run_table(PAIR, to, overrides=(setting,), toy=True)),
        ("row 'SimCLR, plain'", lambda to: dry_run(PAIR, overrides=(setting,))),
        ("run .*", lambda to: sweep(request, to)),
    ):
        with pytest.raises(ConfigError, match=f"^{prefix}: .*{message}"):
            start(tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_an_unknown_row_lists_the_known_ones():
    for rows in (("swav",), ("byol", "swav")):
        with pytest.raises(ConfigError, match=r"rows=swav matches none of 'SimCLR, plain', "):
            runs_of_table(PAIR, rows=rows)


SUBJECTS = ("MoCo-v2, plain", "MoCo-v2, plain, long", "BYOL, plain", "BYOL")
COPIED = table(*(Row(subject, f"{CONFIG}:method=simclr,conditioning=none") for subject in SUBJECTS))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MoCo-v2, plain", ["moco-v2-plain-0"]),
        ("moco-v2, Plain", ["moco-v2-plain-0"]),
        ("moco-v2-plain", ["moco-v2-plain-0"]),
        ("MoCo-v2, plain, long, BYOL", ["moco-v2-plain-long-0", "byol-0"]),
        ("BYOL,MoCo-v2, plain", ["moco-v2-plain-0", "byol-0"]),
        ("long,BYOL, plain", ["moco-v2-plain-long-0", "byol-plain-0"]),
        ("MoCo", ["moco-v2-plain-0", "moco-v2-plain-long-0"]),
        ("", ["moco-v2-plain-0", "moco-v2-plain-long-0", "byol-plain-0", "byol-0"]),
    ],
)
def test_a_copied_subject_selects_its_row_alone(text, expected):
    rows = rows_in(text, COPIED)
    assert names(runs_of_table(COPIED, rows=rows, seeds=(0,))) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("Row('a b', 'x'), Row('A-B', 'x')", "rows 'a b' and 'A-B' would have the same folder"),
        ("Row('a=b', 'x'),", "row 'a=b': a subject is a name without '='"),
        (
            "Row('a', 'x', against='c'), Row('b', 'x')",
            "against='c' of row 'a' is not a row .* 'a', 'b'",
        ),
        ("", "table 'T' has no rows"),
    ],
)
def test_an_invalid_table_is_refused(tmp_path, rows, message):
    file = tmp_path / "table.py"
    file.write_text(
        "from cassle_jax.sweep.table import Row, Table\n"
        f"def get_table(): return Table('T', 'Q', ({rows}))\n"
    )
    with pytest.raises(ConfigError, match=message):
        find_table(str(file))


def test_the_command_prints_what_a_dry_run_finds_and_refuses_what_is_no_seed(tmp_path, capsys):
    file = tmp_path / "table.py"
    file.write_text(TABLE)
    table = (f"--table={file}", "--rows=plain", "--dry_run")
    assert run_command("tables", *table, "--seeds=0,3", "--rate=100") == 0
    expected = dry_run(find_table(str(file)), rows=("plain",), seeds=(0, 3), rate=100.0)
    assert capsys.readouterr().out == f"{expected}\n"
    assert run_command("tables", *table, "--seeds=0,x") == 2
    assert capsys.readouterr().err == "error: seeds=0,x is not a list of integers\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TABLE = 1", "lacks a function get_table; configs/tables/field.py has one"),
        (
            "get_table = lambda: 1",
            "lacks a get_table that returns a Table; configs/tables/field.py",
        ),
        ("\nimport nothing_such", "fails in its line 2: ModuleNotFoundError: No module named"),
        ("\0", "fails: SyntaxError: source code .*null bytes"),
    ],
)
def test_a_file_without_a_table_is_refused(tmp_path, text, said):
    (tmp_path / "table.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"^table=.*/table\.py {said}"):
        find_table(str(tmp_path / "table.py"))


@pytest.mark.parametrize("name", ["", "a folder"])
def test_a_folder_in_the_place_of_a_table_is_refused(tmp_path, capsys, name):
    folder = tmp_path / name if name else ""
    if name:
        folder.mkdir()
    assert run_command("tables", f"--table={folder}") == 2
    assert capsys.readouterr().err.startswith("error: table cannot be read: ")


@pytest.mark.parametrize("flag", ["set", "evaluation"])
def test_a_setting_without_a_value_names_its_flag(tmp_path, capsys, flag):
    words = ("--table=transfer", "--toy", "--seeds=0", f"--to={tmp_path}", f"--{flag}=steps")
    assert run_command("tables", *words) == 2
    assert capsys.readouterr().err == f"error: {flag}='steps' is not name=value\n"


@pytest.mark.parametrize("flag", ["rows", "seeds", "datasets"])
def test_a_flag_of_one_value_is_not_replaced_by_a_second_one(tmp_path, capsys, flag):
    words = ("--table=transfer", "--toy", f"--to={tmp_path}", f"--{flag}=0", f"--{flag}=1")
    assert run_command("tables", *words) == 2
    assert capsys.readouterr().err == f"error: --{flag} is given 2 times; give it once\n"


def test_an_unknown_table_names_the_closest():
    with pytest.raises(ConfigError, match=r"^table='small_image' is unknown.* 'small_images'\?$"):
        find_table("small_image")
    with pytest.raises(ConfigError, match=r"^table cannot be read: none\.py: No such file"):
        find_table("none.py")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": ("cifar1",)}, "datasets='cifar1' is unknown"),
        ({"tasks": ("knnn",)}, "tasks='knnn' is unknown"),
        ({"evaluation": ("limt=3",)}, "evaluation='limt' is unknown.*'limit'"),
        ({"evaluation": ("limit=x",)}, "evaluation limit='x' is invalid"),
        ({"evaluation": ("limit=-1",)}, "evaluation limit=-1 .* 0"),
        ({"evaluation": ("network=target",)}, "evaluation network='target' is unknown.* online"),
        ({"evaluation": ("batch=1",)}, "evaluation batch=1 .* 2"),
        ({"evaluation": ("episodes=0",)}, "evaluation episodes=0 .* 1"),
        ({"evaluation": ("std=0.2,0,0.2",)}, r"evaluation std=\(0.2, 0.0, 0.2\)"),
        ({"overrides": ("data.source=folder", "data.path=/none")}, "/none"),
        ({"export": ("onnx",)}, "^export='onnx' is unknown"),
        ({"datasets": ("scenes",), "tasks": ("few_shot",), "evaluation": ("ways=9",)}, "ways=9"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_table(table(Row("a", CONFIG), **settings), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_processes_share_the_gpus_and_their_memory():
    def output(gpus, parallel):
        return [
            (each["CUDA_VISIBLE_DEVICES"], each["XLA_PYTHON_CLIENT_MEM_FRACTION"])
            for each in gpu_shares(gpus, parallel)
        ]

    assert output(["0"], 2) == [("0", "0.450")] * 2
    assert output(["0", "1", "2", "3"], 2) == [("0,1", "0.900"), ("2,3", "0.900")]
    assert output(["4", "5"], 3) == [("4", "0.450"), ("5", "0.450"), ("4", "0.450")]


def test_differences_are_paired_by_seed():
    def found(*values):
        return {seed: [Score("knn", "d", "accuracy", v)] for seed, v in values}

    lines = lines_of(
        PAIR,
        {
            "SimCLR, plain": found((0, 0.5), (1, 0.7), (2, 0.6)),
            "SimCLR, CASSLE": found((0, 0.6), (1, 0.8), (5, 0.1)),
            "BYOL, plain": found((0, 0.3)),
        },
    )
    plain, cassle, byol = (line.cells() for line in lines)
    assert cassle["against"] == "SimCLR, plain" and cassle["mean"] == pytest.approx(0.5)
    assert cassle["difference"] == pytest.approx(0.1) and cassle["paired_seeds"] == 2
    assert cassle["difference_interval"] == pytest.approx(0.0, abs=1e-12)
    assert plain["interval"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert plain["against"] == byol["against"] == "" and byol["interval"] is None


def test_a_metric_of_several_datasets_gets_a_mean():
    scores = [
        Score("knn", "a", "accuracy", 0.2),
        Score("knn", "b", "accuracy", 0.6),
        Score("knn", "b", "mean per class", 0.5),
        Score("spectrum", "a", "RankMe", 9.0, higher_is_better=None),
        Score("spectrum", "b", "RankMe", 7.0, higher_is_better=None),
    ]
    (mean,) = with_means(scores)[5:]
    assert (mean.task, mean.dataset, mean.metric) == ("knn", "mean of 2", "accuracy")
    assert mean.value == pytest.approx(0.4)


def test_the_last_row_of_every_group_is_measured_in_as_many_processes_as_the_table_uses():
    runs = runs_of_table(PAIR, seeds=(0, 1))
    assert names(runs_to_measure(runs, 3)) == [
        "simclr-cassle-1.0",
        "byol-plain-1.1",
        "simclr-cassle-1.2",
    ]


def test_all_runs_take_nine_tenths_of_a_budget():
    # 2 at a time: 100 s are used, 4 runs need 50 s outside their steps, a step of all takes 0.2 s.
    assert steps_within(10.0, 100.0, 4, 50.0, 0.2, parallel=2) == pytest.approx(3400, abs=1)
    with pytest.raises(ConfigError, match=r"minutes=1 is too short for 4 runs, 2 at .* use 4 or m"):
        steps_within(1.0, 100.0, 4, 50.0, 0.2, parallel=2)


class _Pool(WorkerPool):
    """Starts no process: a run takes 10 s and 0.01 s per step, and logs twice."""

    parallel = 2
    ran = ()
    takes = 10

    def __init__(self, parallel, seconds):
        assert (parallel, seconds) == (2, 0.0)

    def run(self, jobs, on_end):
        for job in jobs:
            config = parsed(job.arguments)
            job.workdir.mkdir(parents=True)
            write_config(config, job.workdir)
            rate = config.batch_size / 0.01
            lines = [{"step": step, "loss": 1.0, "images_per_second": rate} for step in (1, 2)]
            (job.workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
            write_outcome(job.workdir, 0, "", seconds=self.takes + 0.01 * config.steps)
            type(self).ran += (job,)
            on_end(job, 0)
        return True


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(_Pool, "ran", ())
    monkeypatch.setattr("cassle_jax.sweep.experiment.WorkerPool", _Pool)
    return _Pool


LONG = ("data.scenes=320", "batch_size=32", "steps=1000000", "compilation_cache=")


def test_a_budget_becomes_as_many_steps_as_fit_it(tmp_path, pool):
    settings = {"seeds": (0, 1), "overrides": LONG, "parallel": 2}
    page = run_table(PAIR, tmp_path, minutes=60.0, **settings)
    measured, runs = pool.ran[:2], pool.ran[2:]
    assert [job.workdir.name for job in measured] == ["simclr-cassle-1.0", "byol-plain-1.1"]
    assert {parsed(job.arguments).steps for job in measured} == {40}
    assert not (tmp_path / "measured").exists()
    # 54 minutes for 6 runs, 2 at a time: less what was measured and 10 s each outside their steps.
    (steps,) = {parsed(job.arguments).steps for job in runs}
    assert len(runs) == 6 and steps == pytest.approx((54 * 60 - 10.4 - 30) / 0.03, abs=1)
    assert f"Each run is pretrained for {steps} steps." in page.read_text()
    run_table(PAIR, tmp_path, **settings)  # the plan is kept, and nothing is left to run
    assert len(pool.ran) == 8
    with pytest.raises(ConfigError, match=r"^minutes=70 was 60 when .* use the same value, or"):
        run_table(PAIR, tmp_path, minutes=70.0, **settings)


def test_seeds_with_other_settings_are_refused_as_their_mean_would_be_of_both(tmp_path, pool):
    settings = {"overrides": LONG, "parallel": 2}
    run_table(PAIR, tmp_path, seeds=(0,), **settings)
    other = {**settings, "overrides": (*LONG, "optimizer.weight_decay=0.5")}
    said = (
        r"^(.*-0) holds a run of row .* with other settings \(optimizer\.weight_decay=0\.5 was "
        r".*, or move \1 away$"
    )
    with pytest.raises(ConfigError, match=said) as refused:
        run_table(PAIR, tmp_path, seeds=(1,), **other)
    assert "\n" not in str(refused.value)
    assert len(pool.ran) == 3
    run_table(PAIR, tmp_path, seeds=(1,), **settings)
    assert len(pool.ran) == 6


def test_rows_with_other_settings_are_refused_as_their_difference_would_be_of_both(
    tmp_path, pool, monkeypatch
):
    """The page compared rows of one call with rows of another, whatever --set they had."""

    def run(row, *given):
        run_table(PAIR, tmp_path, rows=(row,), seeds=(0,), overrides=(*LONG, *given), parallel=2)

    run("SimCLR, plain", "epochs=2", "data.threads=1")
    holds = r"^.*-plain-0 holds a run of row 'SimCLR, plain' with other settings \(.*epochs="
    with pytest.raises(ConfigError, match=rf"{holds}4 was 2"):
        run("SimCLR, CASSLE", "epochs=4")
    with pytest.raises(ConfigError, match=rf"{holds}.* was 2"):
        run("SimCLR, CASSLE")
    assert len(pool.ran) == 1
    opened = []
    opening = experiment.open_source
    monkeypatch.setattr(
        experiment, "open_source", lambda *data: opened.append(data) or opening(*data)
    )
    run("SimCLR, CASSLE", "data.threads=2", "epochs=2")
    assert len(pool.ran) == 2
    assert len(opened) == 1  # for rows of this call and of others


def test_a_row_without_a_setting_of_the_call_is_not_compared(tmp_path, pool):
    settings = {"seeds": (0,), "parallel": 2}
    run_table(PAIR, tmp_path, rows=("SimCLR, plain",), overrides=LONG, **settings)
    given = (*LONG, "method.momentum=0.9")
    run_table(PAIR, tmp_path, rows=("BYOL, plain",), overrides=given, **settings)
    assert len(pool.ran) == 2


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"options": ("limit=9", "episodes=3")}, ["evaluation=limit=9,episodes=3"]),
        ({"datasets": ("scenes",), "options": ("limit=9", "episodes=3")}, ["episodes=3"]),
    ],
)
def test_options_of_the_evaluation_without_effect_are_reported(caplog, settings, lines):
    evaluation_of(dataclasses.replace(PAIR, tasks=("knn",)), **settings)
    idle = [each for each in caplog.messages if "has no effect" in each]
    assert [each.partition(" ")[0] for each in idle] == lines


@pytest.mark.parametrize("of_table", [(), ("flowers17",)])
def test_toy_runs_are_evaluated_on_scenes_whatever_the_datasets(caplog, of_table):
    table = dataclasses.replace(PAIR, datasets=of_table)
    evaluation = evaluation_of(table, datasets=("cifar10=/none",), toy=True)
    assert evaluation.datasets == ("scenes",)  # also in a table without datasets of its own
    assert caplog.messages == ["datasets=cifar10=/none becomes scenes with toy=True"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": ("scenes", "scenes")}, r"^dataset 'scenes' is named twice"),
        ({"datasets": ("scenes",), "tasks": ("regression",)}, "^tasks=regression suit none of the"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_any_run(settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluation_of(dataclasses.replace(PAIR, **settings))


@pytest.mark.exhaustive
def test_a_lender_without_runs_is_refused_before_a_step_is_measured(tmp_path, pool):
    lender, settings = str(tmp_path / "lender"), {"overrides": LONG, "parallel": 2}
    with pytest.raises(ConfigError, match=rf"^weights_of={lender} holds no runs; use the folder"):
        run_table(PAIR, tmp_path / "to", minutes=60.0, weights_of=[lender], **settings)
    assert not pool.ran
    run_table(PAIR, tmp_path / "to", **settings)
    run_table(PAIR, tmp_path / "to", weights_of=[lender], **settings)  # it lacks no run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("weights.path=lost.pth",), r"^weights\.path='lost\.pth' is not a local file; download"),
        (
            ("encoder.small_images=True",),
            r"^row 'SimCLR, plain': export=.* 7×7 stem .*, this resnet18",
        ),
        (("log.to=('wandbb',)",), r"^row 'SimCLR, plain': log\.to='wandbb' is unknown"),
        (
            ("optimizer.settings.nestrov=1",),
            r"^row .*nestrov=1 is not an argument of adamw; use b1,",
        ),
    ],
)
def test_what_a_run_would_fail_of_is_refused_before_a_step_is_measured(
    tmp_path, pool, settings, message
):
    exported = dataclasses.replace(PAIR, export=("detectron2",))
    overrides = (*LONG, "encoder.small_images=False", "encoder.width=0", *settings)
    with pytest.raises(ConfigError, match=message) as refused:
        run_table(exported, tmp_path / "to", minutes=60.0, overrides=overrides, parallel=2)
    assert not pool.ran and "\n" not in str(refused.value)


def test_a_dataset_of_other_images_is_refused_as_its_results_would_be_mixed(tmp_path):
    def evaluated_on(folder, classes, *options):
        for path in (f"{split}/{name}" for split in ("train", "val") for name in classes):
            (tmp_path / folder / path).mkdir(parents=True, exist_ok=True)
            for number in range(10):
                (tmp_path / folder / path / f"{number}.png").touch()
        datasets = [f"tiny_imagenet={tmp_path / folder}"]
        _Results(tmp_path, PAIR, evaluation_of(PAIR, datasets=datasets, options=options))

    evaluated_on("other", "ac")  # no run has its results yet
    evaluated_on("some", "ab")
    (tmp_path / "runs" / "a-0").mkdir(parents=True)
    write_outcome(tmp_path / "runs" / "a-0", 0, "")
    evaluated_on("moved", "ab")
    said = r"^images=\{'tiny_imagenet': '27/3/30 of .* was .*'18/2/20 of .*, or another folder"
    with pytest.raises(ConfigError, match=said):
        evaluated_on("more", "abc")
    with pytest.raises(ConfigError, match=r"^images=.* was "):
        evaluated_on("other", "ac")
    with pytest.raises(ConfigError, match=r"^limit=50 was 0 for the runs in .*; use the same"):
        evaluated_on("some", "ab", "limit=50")
    record = tmp_path / "table.json"
    known = json.loads(record.read_text())
    del known["images"]  # as an older version
    record.write_text(json.dumps(known))
    evaluated_on("other", "ac")


def test_a_file_beside_the_runs_is_no_run(tmp_path, pool):
    """macOS leaves a .DS_Store in a folder that was looked at."""
    for folder in ("to", "lender"):
        (tmp_path / folder / "runs").mkdir(parents=True)
        (tmp_path / folder / "runs" / ".DS_Store").touch()
    settings = {"overrides": LONG, "rows": ("BYOL",), "seeds": (0,), "parallel": 2}
    run_table(PAIR, tmp_path / "to", **settings, weights_of=[str(tmp_path / "lender")])
    assert len(pool.ran) == 1


def test_a_damaged_record_of_the_evaluation_is_reported(tmp_path, pool, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cassle_jax"), "propagate", True)
    settings = {"overrides": LONG, "parallel": 2, "seeds": (0,)}
    run_table(PAIR, tmp_path, **settings)
    assert "damaged" not in caplog.text
    (tmp_path / "table.json").write_bytes(b"{")
    run_table(PAIR, tmp_path, **settings)
    assert f"{tmp_path / 'table.json'} is damaged; this call's evaluation" in caplog.text
    assert json.loads((tmp_path / "table.json").read_text())["table"] == PAIR.title


def test_a_measurement_that_is_damaged_is_taken_again(tmp_path, pool, monkeypatch):
    settings = {"minutes": 60.0, "seeds": (0,), "overrides": LONG, "parallel": 2}
    with monkeypatch.context() as patch:
        patch.setattr(pool, "takes", math.nan)
        with pytest.raises(Outage, match="lacks its measurement; the same command measures again"):
            run_table(PAIR, tmp_path, **settings)
    (tmp_path / "measured/simclr-cassle-0.0/evaluation").mkdir()
    run_table(PAIR, tmp_path, **settings)
    assert len(pool.ran) == 2 + 2 + 3 and json.loads((tmp_path / "plan.json").read_text())


def test_kept_weights_of_the_same_run_replace_pretraining(tmp_path, pool):
    settings = {"seeds": (0,), "overrides": LONG, "parallel": 2}
    lender = tmp_path / "first"
    run_table(PAIR, lender, **settings)
    for name in ("simclr-plain-0", "byol-plain-0"):
        (lender / f"runs/{name}/checkpoints/8").mkdir(parents=True)
    other = {**settings, "overrides": (*LONG, "optimizer.weight_decay=0.5")}
    run_table(PAIR, tmp_path / "other", **other, weights_of=[str(lender)])
    run_table(PAIR, tmp_path / "same", **settings, weights_of=[str(lender)])
    lent = [job.weights and job.weights.name for job in pool.ran[3:]]
    assert lent == [None] * 3 + ["simclr-plain-0", None, "byol-plain-0"]
    with pytest.raises(ConfigError, match=r"^weights_of=.* holds no runs; use the folder"):
        run_table(PAIR, tmp_path / "none", **settings, weights_of=[str(tmp_path)])


def test_a_run_with_the_weights_of_another_records_its_own_settings(tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr(worker, "set_up_devices", lambda config: None)
    monkeypatch.setattr(worker, "evaluate_command", lambda **asked: evaluated.append(asked))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the process is not its own
    evaluation = Evaluation(datasets=("motifs",), tasks=("knn",))
    arguments = (f"--config={ROOT / CONFIG}", "--config.seed=5")
    for name in ("own", "lent"):
        (tmp_path / name).mkdir()
    (tmp_path / "lent" / "starts.jsonl").write_text('{"step": 0, "names": "a digest"}')
    worker.pretrain_and_evaluate(
        Job("a", arguments, tmp_path / "own", evaluation, True, weights=tmp_path / "lent")
    )
    assert [each["runs"] for each in evaluated] == [[f"a={tmp_path / 'lent'}"]]
    assert read_config(tmp_path / "own").seed == 5
    assert last_start_record(tmp_path / "own", 0)["names"] == "a digest"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parallel": 0}, "^parallel=0 must be at least 1"),
        ({"parallel": 2**40}, "^parallel=1099511627776 is out of range; use at most 1024$"),
        ({"call_minutes": -1.0}, r"^call_minutes=-1\.0 must be at least 0"),
        ({"seeds": (0, -1)}, "seed=-1 is not a seed; use a whole number"),
    ],
)
def test_numbers_that_cannot_work_are_said_before_a_run_starts(tmp_path, wrong, message):
    rows = (Row("SimCLR", "configs/imagenet100.py:method=simclr"),)
    with pytest.raises(ConfigError, match=message):
        run_table(table(*rows), tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_a_dry_run_counts_steps_and_hours_without_the_dataset():
    rows = (
        Row("MoCo-v2", "configs/imagenet100.py"),
        Row("SimCLR", "configs/imagenet100.py:method=simclr"),
    )
    output = dry_run(table(*rows, seeds=(0, 1)), rate=3780.0)
    # 500 epochs of 494 batches of 256; SimCLR trains on both views.
    hours = 500 * 494 * 256 / 3780 / 3600
    assert output.splitlines() == [
        f"MoCo-v2  2 × 247000 steps of 256 images (500 epochs): {hours:.3g} GPU hours per run",
        "SimCLR   2 × 247000 steps of 256 images (500 epochs): "
        f"{1.5 * hours:.3g} GPU hours per run",
        f"4 runs, {5 * hours:.3g} GPU hours without evaluation, where a ResNet-50 at 224 px with "
        "MoCo-v2 makes 3780 images/s",
    ]


def test_a_dry_run_does_not_promise_runs_of_seconds():
    small = ("encoder.width=8", "augment.size=32", "epochs=1")
    output = dry_run(table(Row("slim", "configs/imagenet100.py", small)), rate=3780.0)
    assert "(1 epochs): less than 0.01 GPU hours per run" in output
    assert "3 runs, less than 0.01 GPU hours without evaluation" in output


@pytest.mark.parametrize(
    ("row", "work"),
    [
        (Row("a", "configs/imagenet100.py:method=byol"), 2.0),  # both views, by both networks
        (Row("a", "configs/imagenet100.py:equimod=main"), 1 + 3 / 4),  # one more, with gradient
        (Row("a", "configs/imagenet100.py:essl=main"), 1 + 3 * (96 / 224) ** 2),
        (Row("a", "configs/stl10.py"), 1.82 / 4.1 * (96 / 224) ** 2),
    ],
)
def test_hours_grow_with_the_number_of_multiplications(row, work):
    (run,) = runs_of_table(table(row), seeds=(0,), overrides=("steps=1000",))
    assert hours_of(run.config, 1.0) == pytest.approx(256_000 / 3600 * work)


def call(to, file, *arguments):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cassle_jax.tables",
            f"--table={file}",
            f"--to={to}",
            "--set=compilation_cache=",
            *arguments,
        ],
        cwd=ROOT,
        env=on_one_device(os.environ),
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    _, output = process.communicate(timeout=900)
    return process.returncode, output


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A table whose first call is stopped during a run, and whose second call resumes it."""
    to = tmp_path_factory.mktemp("table")
    file = to / "tiny.py"
    file.write_text(TABLE)
    first = call(to / "out", file, "--parallel=2")
    until = time.monotonic() + 600
    while not list((to / "out/runs").glob("*/log.txt")):
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    return to / "out", file, end(first), end(call(to / "out", file, "--parallel=2"))


def test_a_stopped_call_ends_with_75_and_the_next_one_resumes(ran):
    to, _, first, second = ran
    assert first[0] == 75 and "rerun the same command to resume" in first[1]
    assert second[0] == 1, second[1]
    assert not list(to.glob("runs/[!h]*/checkpoints"))
    assert len(list(to.glob("runs/*/evaluation/report.json"))) == 4


def test_a_diverged_run_is_reported_and_stops_no_other(ran):
    to, _, _, (_, output) = ran
    assert "2 of 6 runs failed; hasty-0: the loss or the update of step" in output
    runs = {each["run"]: each for each in json.loads((to / "results.json").read_text())["runs"]}
    assert {name: each["exit_code"] for name, each in runs.items()} == {
        "plain-0": 0, "plain-1": 0, "cassle-0": 0, "cassle-1": 0, "hasty-0": 3, "hasty-1": 3,
    }  # fmt: skip


def test_results_that_are_not_finite_are_still_json(tmp_path):
    """A collapsed encoder's α-ReQ is NaN, and most readers of JSON refuse a file with one."""
    scores = {
        seed: [Score("spectrum", "scenes", "α-ReQ", value, higher_is_better=None)]
        for seed, value in ((0, math.nan), (1, 0.5))
    }
    write_results(
        tmp_path, PAIR, {"SimCLR, plain": scores}, {}, [{"run": "a", "seconds": math.inf}]
    )
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    (line,) = content["lines"]
    assert (line["mean"], line["values"]) == ("nan", {"0": "nan", "1": 0.5})
    assert content["runs"] == [{"run": "a", "seconds": "inf"}]


def test_results_are_means_over_seeds_and_differences_to_the_first_row(ran):
    to, *_ = ran
    with (to / "results.csv").open() as file:
        lines = [each for each in csv.DictReader(file) if each["metric"] == "accuracy"]
    assert [(each["row"], each["seeds"], each["against"]) for each in lines] == [
        ("plain", "2", ""),
        ("CASSLE", "2", "plain"),
    ]
    plain, cassle = (float(each["mean"]) for each in lines)
    assert float(lines[1]["difference"]) == pytest.approx(cassle - plain)
    page = (to / "report.html").read_text()
    assert "Does it run?" in page and "Difference to the baseline" in page
    assert "difference to plain with the same seeds" in page


@pytest.mark.exhaustive
def test_a_finished_table_does_not_run_again_and_refuses_other_settings(ran):
    to, file, *_ = ran
    ends = {path: path.stat().st_mtime_ns for path in to.glob("runs/*/outcome.json")}
    code, output = end(call(to, file))
    assert code == 1 and "6 runs, 6 of them done" in output
    assert ends == {path: path.stat().st_mtime_ns for path in to.glob("runs/*/outcome.json")}
    code, output = end(call(to, file, "--set=steps=2"))
    assert code == 2 and "steps=2 was 3" in output
    code, output = end(call(to, file, "--evaluation=neighbours=5"))
    assert code == 2 and "neighbours=5 was 1" in output


@pytest.mark.exhaustive
def test_a_budget_measures_a_step_first_and_keeps_its_plan(tmp_path):
    file, to = tmp_path / "tiny.py", tmp_path / "out"
    file.write_text(TABLE)
    code, output = end(call(to, file, "--minutes=600", "--rows=plain", "--seeds=0"))
    assert code == 0, output
    assert "plain-0.0: measured" in output and not (to / "measured").exists()
    plan = json.loads((to / "plan.json").read_text())
    assert plan["minutes"] == 600 and plan["steps"] > 3
    assert "Each run is pretrained for 3 steps." in (to / "report.html").read_text()  # its own
    code, output = end(call(to, file, "--minutes=700", "--rows=plain", "--seeds=0"))
    assert code == 2 and "minutes=700 was 600" in output


@pytest.mark.exhaustive
def test_weights_of_the_same_run_in_another_table_are_reused(tmp_path):
    file, first, second = tmp_path / "tiny.py", tmp_path / "first", tmp_path / "second"
    file.write_text(TABLE)
    one = ("--rows=plain", "--seeds=0")
    code, output = end(call(first, file, *one, "--keep_weights"))
    assert code == 0, output
    code, output = end(call(second, file, *one, f"--weights_of={first}"))
    assert code == 0, output
    log = (second / "runs/plain-0/log.txt").read_text()
    assert f"using the weights of {first / 'runs/plain-0'}" in log and "pretrain" not in log
    assert not (second / "runs/plain-0/checkpoints").exists()
    assert (first / "runs/plain-0/checkpoints").exists()
    accuracies = [
        [line for line in (to / "results.csv").read_text().splitlines() if "accuracy" in line]
        for to in (first, second)
    ]
    assert accuracies[0] == accuracies[1] != []
    code, output = end(call(second, file, f"--weights_of={tmp_path}"))
    assert code == 2 and "holds no runs; use the folder of a table" in output
