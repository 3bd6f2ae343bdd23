"""The overview: means, intervals, ranks and paired differences, against SciPy; and its table."""

import re

import numpy as np
import pytest
from scipy.stats import rankdata, ttest_1samp, ttest_rel

from cassle_jax.evaluation.findings import Score
from cassle_jax.report.files import write_report
from cassle_jax.report.growing_report import GrowingReport
from cassle_jax.report.overview import Pairing, named_baselines, overviews_of
from cassle_jax.sweep.page import _pairing
from cassle_jax.sweep.space import SweepRequest, runs_of
from tests.report.test_files import Page

NAMES = ("SimCLR, plain", "SimCLR, AugSelf", "SimCLR, CASSLE", "BYOL, plain", "BYOL, CASSLE")
CONFIG = "configs/quickstart.py"


def score(dataset, value, metric="accuracy", higher=True, task="linear"):
    return Score(task, dataset, metric, value, None, higher)


def overview_of(subjects, **pairing):
    (found,) = overviews_of(subjects, Pairing(**pairing))
    return found


def single(values, **options):
    """Subjects of one seed each, by their values on dataset 0, 1, …; `None` for a missing one."""
    return {
        name: [[score(str(i), v, **options) for i, v in enumerate(own) if v is not None]]
        for name, own in zip(NAMES, values, strict=False)
    }


@pytest.mark.parametrize("higher", [True, False])
def test_mean_ranks_are_scipys(higher):
    values = np.random.default_rng(0).integers(0, 4, (5, 6)) / 4  # many are equal
    found = overview_of(single(values.tolist(), higher=higher))
    expected = rankdata(-values if higher else values, axis=0).mean(axis=1)
    np.testing.assert_allclose([found.mean_ranks[name] for name in NAMES], expected)


def test_equal_means_share_a_rank_whatever_the_order_of_their_seeds():
    values = {"a": (0.1, 0.2, 0.3), "b": (0.3, 0.2, 0.1), "c": (0.2, 0.2, 0.2)}
    subjects = {
        name: [[score(d, v) for d in ("pets", "cars")] for v in of_seeds]
        for name, of_seeds in values.items()
    }
    assert overview_of(subjects).mean_ranks == {"a": 2, "b": 2, "c": 2}


def test_only_what_every_subject_has_is_ranked():
    subjects = single([(0.1, 0.9, 0.5), (0.2, None, 0.4), (0.3, 0.1, float("nan"))])
    for name, mean in zip(subjects, (0.9, 0.1, 0.1), strict=False):
        subjects[name][0].append(score("mean of 3", mean))
    subjects["not evaluated"] = [[]]
    found = overview_of(subjects)
    assert found.ranked == 1 and len(found.columns) == 4
    assert found.columns[-1].dataset == "mean of 3"
    assert [found.mean_ranks.get(name) for name in subjects] == [3, 2, 1, None]


def test_differences_are_paired_by_seed_and_their_interval_is_students():
    values = np.random.default_rng(1).uniform(size=(2, 10))  # by subject and seed
    seeds = {NAMES[0]: [3, 1, 0, 2], NAMES[2]: [0, 1, 2, 9]}
    subjects = {
        name: [[score("cifar10", own[seed])] for seed in seeds[name]]
        for name, own in zip(seeds, values, strict=True)
    }
    found = overview_of(subjects, seeds=seeds, against=named_baselines(NAMES))
    (difference,) = (each[NAMES[2]] for each in found.differences)
    low, high = ttest_rel(values[1, :3], values[0, :3]).confidence_interval(0.95)
    assert difference.mean == pytest.approx((low + high) / 2)
    assert difference.interval == pytest.approx((high - low) / 2)
    assert NAMES[0] not in found.differences[0]
    (row,) = found.columns
    low, high = ttest_1samp(row.estimates[NAMES[0]].values, 0).confidence_interval(0.95)
    assert row.estimates[NAMES[0]].interval == pytest.approx((high - low) / 2)


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ({NAMES[0]: [0], NAMES[1]: [0]}, (pytest.approx(0.25), None)),
        ({NAMES[0]: [0], NAMES[1]: [1]}, None),
        ({NAMES[0]: [0]}, None),
        ({}, None),
    ],
)
def test_one_seed_gives_a_difference_without_interval_and_other_seeds_none(seeds, expected):
    found = overview_of(
        single([(0.25,), (0.5,)]), seeds=seeds, against=named_baselines(NAMES)
    ).differences[0]
    assert [(each.mean, each.interval) for each in found.values()] == [expected] * bool(expected)


def test_a_seed_that_stands_twice_is_no_pair():
    subjects = {name: [[score("d", 0.5)], [score("d", 0.6)]] for name in NAMES[:2]}
    seeds = {NAMES[0]: [0, 1], NAMES[1]: [0, 0]}
    assert not overview_of(subjects, seeds=seeds, against=named_baselines(NAMES)).differences[0]


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        (["mean per class", "accuracy"], ["mean per class"]),
        (["5-way 1-shot accuracy", "5-way 5-shot accuracy", "other"], None),
        (["mean, colour", "hue", "mean, content", "shape"], ["mean, colour", "mean, content"]),
        (["mean, a", *map(str, range(20))], ["mean, a"]),
        ([f"R² of {letter}" for letter in "abcdefghijklmno"], []),
    ],
)
def test_a_dataset_has_its_first_metric_and_those_of_its_kind(metrics, shown):
    findings = [score("d", 0.5, metric="loss", higher=None)]
    findings += [score("d", 0.5, metric=metric) for metric in metrics]
    found = overviews_of({"a": [findings], "b": [findings]}, Pairing())
    columns = [row.metric for each in found for row in each.columns]
    assert columns == (metrics[:2] if shown is None else shown)


def table_of(tmp_path, subjects, **options):
    page = Page(write_report(tmp_path, subjects, **options).read_text(encoding="utf-8"))
    end = next(i for i, row in enumerate(page.rows) if i and row[0] in ("dataset", "method"))
    return page, page.rows[:end]


def test_methods_are_rows_and_datasets_columns(tmp_path):
    seeds = {name: [0, 1] for name in NAMES}
    subjects = {
        name: [
            [score("cifar10", 0.25 + (0.125 + s / 100) * i), score("cars", i), score("pets", 0.5)]
            for s in (0, 1)
        ]
        for i, name in enumerate(NAMES)
    }
    subjects[NAMES[4]] = [[score("cifar10", 0.125), score("cars", -1.0)]]
    page, (heads, *rows) = table_of(
        tmp_path, subjects, pairing=Pairing(seeds, named_baselines(NAMES))
    )
    assert heads == ["method", "seeds", "cifar10", "cars", "pets", "mean rank of 2"]
    assert [row[0].split(", ")[-1].strip() for row in rows] == [n.split(", ")[-1] for n in NAMES]
    assert rows[0][2] == "25.0 ± 0.0" and rows[0][-1] == "4.0"
    low, high = ttest_1samp([0.375, 0.385], 0).confidence_interval(0.95)
    half = f"± {50 * (high - low):.1f}"
    assert rows[1][2] == f"38.0 {half}  +13.0 {half}"
    # One seed has no interval.
    assert rows[4][1:] == ["1", "12.5  −50.0", "-100.0  −400.0", "–", "5.0"]
    begins = [dict(attributes).get("class") for tag, attributes in page.elements if tag == "tr"]
    assert begins[:6] == [None, None, None, None, "first", None]
    text = (tmp_path / "report.html").read_text()
    assert "difference to SimCLR, plain or BYOL, plain with the same seeds" in text
    assert text.index("<strong>") < text.index('id="section-0"')


def test_many_metrics_are_a_heat_map_with_its_numbers(tmp_path):
    probes = [(f"R² of {i}", True) for i in range(13)] + [("error", False)]
    gains = {"plain": 0.0, "CASSLE": 0.5, "AugSelf": -0.25}
    subjects = {
        name: [[score("d", 0.5 + gain, metric, higher, "probes") for metric, higher in probes]]
        for name, gain in gains.items()
    }
    pairing = Pairing({name: [0] for name in gains}, named_baselines(list(gains)))
    page = Page(write_report(tmp_path, subjects, pairing=pairing).read_text())
    cells = [a for tag, a in page.elements if tag == "td" and "number" in a.get("class", "")][
        : 3 * 14
    ]
    shades = [(each["class"].split()[1:], each.get("style")) for each in cells]
    better, worse = (["better"], "--shade:40%"), (["worse"], "--shade:20%")
    assert shades[:3] == [([], None), better, worse]
    assert shades[-3:] == [([], None), (["worse"], "--shade:40%"), (["better"], "--shade:20%")]
    assert page.rows[1][1::2] == ["0.500", "1.000", "0.250"]


@pytest.mark.parametrize(
    "pairing",
    [
        Pairing({name: [0] for name in ("plain", "CASSLE", "AugSelf")}),
        Pairing(against={"CASSLE": "plain", "AugSelf": "plain"}),  # of weights without a seed
    ],
)
def test_without_differences_to_a_baseline_shades_are_to_the_mean(tmp_path, pairing):
    probes = [f"R² of {i}" for i in range(14)]
    values = {"plain": 0.5, "CASSLE": 0.875, "AugSelf": 0.375}  # of mean 7/12
    subjects = {
        name: [[score("d", value, metric, True, "probes") for metric in probes]]
        for name, value in values.items()
    }
    page = Page(write_report(tmp_path, subjects, pairing=pairing).read_text())
    assert "than the mean of the row" in (tmp_path / "report.html").read_text()
    cells = [a for tag, a in page.elements if tag == "td" and "number" in a.get("class", "")][:3]
    shades = [(each["class"].split()[1:], each.get("style")) for each in cells]
    assert [kind for kind, _ in shades] == [["worse"], ["better"], ["worse"]]
    depths = [int(re.search(r"\d+", style)[0]) for _, style in shades]
    assert depths[1] == max(depths) and depths[0] / depths[1] == pytest.approx(2 / 7, abs=0.02)
    assert depths[2] / depths[1] == pytest.approx(5 / 7, abs=0.02)


def test_a_subject_without_what_is_ranked_has_a_dash(tmp_path):
    subjects = single([(0.1, 0.2), (0.3, 0.4)]) | {"not evaluated": [[]]}
    _, (heads, *rows) = table_of(tmp_path, subjects)
    assert heads[-1] == "mean rank"
    assert [row[-1] for row in rows] == ["2.0", "1.0", "–"]


def test_a_report_that_another_process_writes_is_none(tmp_path):
    report = GrowingReport(tmp_path, "", {}, writes=False)
    report.begin("a")
    report.add([score("d", 0.5)])
    assert report.write(complete=True) == tmp_path / "report.html"
    assert not list(tmp_path.iterdir())


def test_a_single_subject_has_no_overview_and_no_script(tmp_path):
    text = write_report(tmp_path, {"a": [[score("d", 0.5)]]}).read_text()
    assert "script" not in text and "mean rank" not in text


def test_an_evaluation_pairs_its_subjects_by_seed(tmp_path):
    seeds = {"plain": [4], "CASSLE": [4]}
    report = GrowingReport(tmp_path, "", {name: {} for name in seeds}, seeds=seeds)
    for name, value in (("plain", 0.5), ("CASSLE", 0.625)):
        report.begin(name)
        report.add([score("d", value)])
    text = report.write(complete=True).read_text()
    assert re.search(r"62\.5</strong> <br> <span [^>]*>\+12\.5<", text)


def test_a_sweep_pairs_with_the_run_without_omega_and_all_else_the_same():
    grid = "method=simclr,byol;conditioning=none,cassle;seed=0,1"
    pairing = _pairing(runs_of(SweepRequest(CONFIG, grid=grid)))
    assert pairing.seeds == {
        f"method {m}, conditioning {c}": [0, 1]
        for m in ("simclr", "byol")
        for c in ("none", "cassle")
    }
    assert pairing.against == {
        f"method {m}, conditioning cassle": f"method {m}, conditioning none"
        for m in ("simclr", "byol")
    }
    assert not _pairing(runs_of(SweepRequest(CONFIG, grid="seed=0,1;epochs=1,2"))).against
