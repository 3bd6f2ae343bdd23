import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t

from cassle_jax.checks import ConfigError
from cassle_jax.evaluation.findings import Chart, Failure, Gallery, Score
from cassle_jax.report.axis import axis
from cassle_jax.report.comparison import rows_of
from cassle_jax.report.files import is_complete, read_parts, read_report, write_report
from cassle_jax.report.overview import Pairing

NAN = float("nan")
VOID = {"meta", "img", "br"}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
STRENGTHS = (0.125, 0.25, 0.5)


class Page(HTMLParser):
    """A page's elements and cells; fails where a tag is not closed in its turn."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.rows, self.words, self._open = [], [], [], []
        self.scripts = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
            return
        self.words.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [
            attributes[name]
            for kind, attributes in self.elements
            if kind == tag and name in attributes
        ]


def accuracy(value, interval=None, dataset="cifar10"):
    return Score("linear", dataset, "accuracy", value, interval)


def lines(gain=0.0, names=("features",), **options):
    series = {name: [(x, 1 - x + gain) for x in STRENGTHS] for name in names}
    return Chart("interpolation", "stl10", "Jitter", "strength", "similarity", series, **options)


def bars(gain=0.0, names=("crop",)):
    series = {name: [("stem", 0.5 + gain), ("projector, right ω", -0.25)] for name in names}
    return Chart("invariance", "stl10", "Invariance", "stage", "difference", series)


def gallery(caption="query"):
    return Gallery("neighbours", "pets", "Nearest", [[(PIXELS, caption), (PIXELS, "0.9")]])


def page_of(tmp_path, subjects, **options) -> Page:
    return Page(write_report(tmp_path / "deep", subjects, **options).read_text(encoding="utf-8"))


def row_of(page: Page, dataset: str) -> list[str]:
    (row,) = (row for row in page.rows if row[0].startswith(f"{dataset} "))
    return row[1:]


def drawings(path) -> list[ElementTree.Element]:
    found = re.findall(r'<svg viewBox[^>]*role="img".*?</svg>', path.read_text(encoding="utf-8"))
    return [ElementTree.fromstring(svg) for svg in found]


def paths(svg, kind: str) -> list[ElementTree.Element]:
    return [item for item in svg.iter() if item.get("class", "").split(" ")[0] == kind]


def test_the_mean_over_seeds_stands_with_students_interval(tmp_path):
    values = [0.812345, 0.82, 0.807]
    page = page_of(tmp_path, {"CASSLE": [[accuracy(value, 0.5)] for value in values]})
    low, high = t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / math.sqrt(3))
    assert row_of(page, "cifar10") == [f"{np.mean(values):.3f}", f"± {(high - low) / 2:.3f}"]
    (title,) = page.attributes("td", "title")
    mean, interval = re.match(
        r"([\d.]+) ± ([\d.]+); 3 seeds: 0.812345, 0.82, 0.807$", title
    ).groups()
    assert float(mean) == np.mean(values)
    assert float(interval) == pytest.approx((high - low) / 2, rel=1e-12)


def test_one_seed_has_the_protocols_own_interval_or_none(tmp_path):
    findings = [accuracy(0.51234, 0.0042), accuracy(0.5, dataset="pets")]
    page = page_of(tmp_path, {"CASSLE": [findings]})
    assert row_of(page, "cifar10") == ["0.512", "± 0.004"]
    assert row_of(page, "pets") == ["0.500", ""]
    assert page.attributes("td", "title") == ["0.51234 ± 0.0042", "0.5"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((0.5, -412.25), ("0.500", "-412.250")),
        ((0.00371, 0.0002), ("0.00371", "0.00020")),
        ((123456.0, 0.5), ("1.235e+05", "0.500")),
        ((0.0, float("inf")), ("0.000", "inf")),
    ],
)
def test_small_numbers_keep_three_digits(values, texts, tmp_path):
    page = page_of(tmp_path, {str(value): [[accuracy(value)]] for value in values})
    assert row_of(page, "cifar10")[::2] == list(texts)


def test_what_a_subject_lacks_is_a_dash_and_what_is_no_number_says_so(tmp_path):
    subjects = {"a": [[accuracy(NAN), lines(), bars(), gallery()]], "b": [[]]}
    page = page_of(tmp_path, subjects)
    assert row_of(page, "cifar10") == ["NaN", "", "–", ""]
    assert page.words.count("b –") == 2  # in the legends of both charts
    assert page.words[page.words.index("Nearest ") :].count("–") == 1


def test_values_that_are_no_numbers_do_not_stop_charts(tmp_path):
    chart = Chart("i", "d", "t", "x", "y", {"s": [(1, NAN), (2, 0.5)]})
    empty = Chart("i", "d", "none", "x", "y", {"s": [(1, NAN)]})
    stages = Chart("i", "d", "b", "x", "y", {"s": [("stem", NAN), ("features", 1.0)]})
    without = Chart("i", "d", "no bars", "x", "y", {"s": [("stem", NAN)]})
    page_of(tmp_path, {"a": [[chart, empty, stages, without]], "b": [[chart, stages]]})
    drawn = drawings(tmp_path / "deep" / "report.html")
    assert [len(paths(svg, "dot")) for svg in drawn] == [2, 0, 0, 0]
    assert ["".join(drawn[number].itertext()) for number in (1, 3)] == ["no values"] * 2
    assert [text.text for text in paths(drawn[2], "left") if "value" in text.get("class")] == [
        "NaN", "NaN", "1.000", "1.000"
    ]  # fmt: skip


def best(*estimates, higher=True):
    """The subjects marked, of those with these (value, interval)."""
    subjects = {
        str(index): [[Score("t", "d", "m", value, interval, higher)]]
        for index, (value, interval) in enumerate(estimates)
    }
    (row,) = rows_of(subjects, "t")
    return "".join(sorted(row.best))


@pytest.mark.parametrize(
    ("estimates", "marked"),
    [
        ([(0.8, 0.01), (0.7, 0.01)], "0"),
        ([(0.8, 0.01), (0.785, 0.01), (0.7, 0.01)], "01"),
        ([(0.8, 0.01), (0.785, 0.01)], ""),  # no difference is clear
        ([(0.8, None), (0.79, None)], "0"),
        ([(0.8, None), (0.8, None), (0.7, None)], "01"),
        ([(0.8, 0.01), (0.75, 0.05), (0.76, None), (0.7, None)], "012"),  # what lies between
        ([(NAN, None), (0.8, NAN), (0.7, None)], "1"),
        ([(NAN, None)], ""),
        ([(0.8, None)], ""),
    ],
)
def test_the_best_is_marked_where_intervals_distinguish_it(estimates, marked):
    assert best(*estimates) == marked
    mirrored = [(-value, interval) for value, interval in estimates]
    assert best(*mirrored, higher=False) == marked
    assert best(*estimates, higher=None) == ""


def test_the_mark_is_in_the_table_and_the_arrow_says_which_way(tmp_path):
    subjects = {
        name: [[Score("spectrum", "d", "alignment", value, None, False)]]
        for name, value in (("a", 0.25), ("b", 0.125))
    }
    path = write_report(tmp_path, subjects)
    marked = re.findall("<strong>(.*?)</strong>", path.read_text(encoding="utf-8"))
    assert marked == ["0.125", "0.125"]  # in the overview, and in the task's table
    assert "alignment ↓" in Page(path.read_text(encoding="utf-8")).words


def test_lines_are_means_over_seeds_and_bands_their_range(tmp_path):
    runs = [[lines(gain)] for gain in (0.0, 0.1, 0.5)]
    write_report(tmp_path / "three", {"a": runs, "b": [[lines(0.2)]]})
    (svg,) = drawings(tmp_path / "three" / "report.html")
    first, second = (
        re.findall(r"[ML]([\d.]+) ([\d.]+)", line.get("d")) for line in paths(svg, "line")
    )
    assert first == second  # the mean of the gains is 0.2
    assert [line.get("class") for line in paths(svg, "line")] == ["line run-0", "line run-1"]
    (band,) = paths(svg, "band")
    corners = np.array(re.findall(r"([\d.]+) ([\d.]+)", band.get("d")), float)
    mean = np.array(first, float)
    above, below = corners[:3, 1], corners[:2:-1, 1]
    # Upwards is negative; the highest is 0.3 above the mean and the lowest 0.2 below it.
    np.testing.assert_allclose((mean[:, 1] - above) / (below - mean[:, 1]), 1.5, atol=0.02)


@pytest.mark.parametrize(
    ("subjects", "series", "panels", "drawn"),
    [
        (1, 8, 1, "run-0 run-1 run-2 run-3 run-4 run-5 run-0|dash-1 run-1|dash-1"),
        (1, 9, 9, "run-0"),
        (2, 2, 1, "run-0 run-1 run-0|dash-1 run-1|dash-1"),
        (2, 4, 4, "run-0 run-1"),
        (7, 1, 1, "run-0 run-1 run-2 run-3 run-4 run-5 run-0|dash-1"),
    ],
)
def test_every_line_of_a_chart_looks_different(subjects, series, panels, drawn, tmp_path):
    chart = lines(names=[f"series {index}" for index in range(series)])
    write_report(tmp_path, {f"subject {index}": [[chart]] for index in range(subjects)})
    found = drawings(tmp_path / "report.html")
    assert len(found) == panels
    looks = [line.get("class").removeprefix("line ") for line in paths(found[0], "line")]
    assert " ".join(look.replace(" ", "|") for look in looks) == drawn


def test_bars_begin_at_zero_and_are_as_long_as_their_values(tmp_path):
    write_report(tmp_path, {"a": [[bars(0.0)], [bars(0.5)]], "b": [[bars(0.25)]]})
    (svg,) = drawings(tmp_path / "report.html")
    widths = [float(bar.get("width")) for bar in paths(svg, "bar")]
    assert widths[0] == widths[1] and widths[2] == widths[3]
    assert widths[0] == pytest.approx(3 * widths[2], abs=0.3)  # 0.75 and -0.25
    left = [float(bar.get("x")) for bar in paths(svg, "bar")]
    assert left[0] == pytest.approx(left[2] + widths[2], abs=0.15)  # on either side of zero
    (whisker,) = paths(svg, "whisker")
    start, end = map(float, re.match(r"M([\d.]+) .*H([\d.]+)", whisker.get("d")).groups())
    assert end - start == pytest.approx(2 / 3 * widths[0], abs=0.3)  # from 0.5 to 1


def test_bars_of_many_subjects_look_as_their_legend(tmp_path):
    path = write_report(tmp_path, {f"subject {index}": [[bars()]] for index in range(14)})
    (svg,) = drawings(path)
    looks = [bar.get("class").removeprefix("bar ") for bar in paths(svg, "bar")]
    stem, projector = looks[:14], looks[14:]
    assert stem == projector and len(set(stem)) == 14
    legend = re.search('<ul class="keys">(?:(?!</ul>).)*subject 13', path.read_text("utf-8"))[0]
    assert re.findall('class="line (.*?)"', legend)[-14:] == stem


def test_bars_of_several_subjects_have_a_panel_a_series(tmp_path):
    page = page_of(
        tmp_path, {"a": [[bars(names=("crop", "flip"))]], "b": [[bars(names=("flip",))]]}
    )
    assert len(drawings(tmp_path / "deep" / "report.html")) == 2
    assert "crop" in page.words and "flip" in page.words


def test_a_log_axis_gives_equal_ratios_equal_room(tmp_path):
    points = [(10**power, 10.0**-power) for power in range(4)]
    chart = Chart("t", "d", "c", "x", "y", {"s": [*points, (20_000, 0.0)]}, log_x=True, log_y=True)
    write_report(tmp_path, {"a": [[chart]]})
    (svg,) = drawings(tmp_path / "report.html")
    (line,) = paths(svg, "line")
    drawn = np.array(re.findall(r"([\d.]+) ([\d.]+)", line.get("d")), float)
    assert len(drawn) == 4  # zero has no place on a log
    np.testing.assert_allclose(np.diff(drawn, 2, axis=0), 0, atol=0.2)


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(
    "values",
    [(1, 512), (3e-7, 2e5), (0.5, 0.5), (1000, 1000), (1, 1.0001), (0.013, 0.9), (1e-23, 1e-5)],
)
def test_axes_hold_their_values_and_have_a_few_ticks(values, is_log):
    found = axis([*values, NAN], is_log=is_log, to_ticks=True)
    assert found.low <= min(values) <= max(values) <= found.high and found.low < found.high
    assert 2 <= len(found.ticks) <= 9 and list(found.ticks) == sorted(set(found.ticks))
    assert found.share(found.low) == 0 and found.share(found.high) == pytest.approx(1)
    assert axis([0.0, -1.0] if is_log else [NAN], is_log=is_log) is None


def test_pictures_are_in_the_page(tmp_path):
    large = np.zeros((300, 400, 3), np.uint8)
    shown = Gallery("neighbours", "pets", "Nearest", [[(PIXELS, "q"), (large, "0.9")]])
    page = page_of(tmp_path, {"a": [[shown], [gallery()]]})
    small, big = page.attributes("img", "src")
    decoded = Image.open(io.BytesIO(base64.b64decode(small.removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(decoded), PIXELS)
    decoded = Image.open(io.BytesIO(base64.b64decode(big.removeprefix("data:image/jpeg;base64,"))))
    assert decoded.size == (224, 168)
    assert "first of 2 seeds" in page.words


def hostile(text: str) -> dict:
    chart = Chart(text, text, text, text, text, {text: [(1, 1.0), (2, 2.0)]})
    stages = Chart(text, text, "2" + text, text, text, {text: [(text, 1.0)]})
    return {
        text: [
            [
                Score(text, text, text, 0.5),
                chart,
                stages,
                Gallery(text, text, text, [[(PIXELS, text)]]),
            ]
        ]
    }


def test_every_text_is_escaped(tmp_path):
    text = "\"><script>x</script>'&amp;{body}"
    facts = {text: {text: text, "long " + text: text * 9}}
    subjects = hostile(text) | {"b": hostile(text)[text]}
    page = page_of(tmp_path, subjects, title=text, summary=text, provenance=facts)
    harmless = page_of(tmp_path / "harmless", {"a": [[accuracy(0.5)]], "b": [[accuracy(0.4)]]})
    assert page.scripts == harmless.scripts and len(page.scripts) == 1  # what sorts tables
    assert page.words.count(text) > 15 and text in page.attributes("img", "alt")
    for svg in drawings(tmp_path / "deep" / "report.html"):
        assert text in svg.get("aria-label")


def test_the_page_needs_nothing_else_and_its_links_arrive(tmp_path):
    findings = [accuracy(0.5), lines(), bars(), gallery()]
    page = page_of(tmp_path, {"a": [findings]}, provenance={"a": {"weights": "3fa9"}})
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    targets = page.attributes("section", "id")
    assert page.attributes("a", "href") == [f"#{target}" for target in targets]
    assert len(targets) == 5


def test_provenance_is_given_in_short_and_in_full(tmp_path):
    config = {"optimizer": {"lr": 0.03}}
    facts = {"a": {"weights": "3fa9", "config": config}, "b": {"date": "2025-01-31"}}
    page = page_of(tmp_path, {"a": [[]], "b": [[]]}, provenance=facts)
    assert ["weights", "3fa9", "–"] in page.rows and ["date", "–", "2025-01-31"] in page.rows
    assert json.dumps(config, indent=2) in page.words


def test_the_csv_has_a_row_for_every_score_in_full(tmp_path):
    subjects = {
        "a, b": [[accuracy(0.1 + 0.2, 0.004), bars()], [accuracy(NAN)]],
        "c": [
            [Score("s", "d", "α-ReQ", 1 / 3, None, None), Score("s", "d", "L1", 2.0, None, False)]
        ],
    }
    write_report(tmp_path, subjects)
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (name, run, score)
        for name, runs in subjects.items()
        for run, findings in enumerate(runs)
        for score in findings
        if isinstance(score, Score)
    ]
    assert len(rows) == len(expected) == 4
    better = {"true": True, "false": False, "": None}
    for row, (name, run, score) in zip(rows, expected, strict=True):
        assert (row["subject"], int(row["run"])) == (name, run)
        read = Score(
            row["task"],
            row["dataset"],
            row["metric"],
            float(row["value"]),
            float(row["interval"]) if row["interval"] else None,
            better[row["higher_is_better"]],
        )
        assert repr(read) == repr(score)


def test_a_report_of_what_was_read_is_the_same_report(tmp_path):
    findings = [accuracy(NAN, 0.1), bars(), lines(log_x=True), gallery("ü")]
    subjects = {"a": [findings, [accuracy(0.1 + 0.2)]], "b": [[]]}
    facts = {"a": {"lr": float("inf"), "path": tmp_path}}
    write_report(tmp_path / "1", subjects, title="t", summary="s", provenance=facts)
    json.loads((tmp_path / "1" / "report.json").read_text("utf-8"), parse_constant=pytest.fail)
    read, provenance = read_report(tmp_path / "1" / "report.json")
    assert provenance == {"a": {"lr": "Infinity", "path": str(tmp_path)}}
    write_report(tmp_path / "2", read, title="t", summary="s", provenance=provenance)
    for name in ("report.json", "report.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_what_failed_stands_at_the_top_and_what_was_found_is_found_by_its_key(tmp_path):
    failure = Failure("few_shot", "pets", "ways=5 is more than its <4> classes")
    subjects = {"a": [[accuracy(0.5), failure, accuracy(0.7, dataset="pets")]]}
    parts = {"a": [[("one", 1), ("", 1), ("two", 1)]]}
    page = page_of(tmp_path, subjects, parts=parts, complete=False)
    words = " ".join(page.words)
    assert "INCOMPLETE" in words
    assert words.index("ways=5 is more than its <4> classes") < words.index("linear")
    assert "failed" in page.attributes("section", "class")
    report = tmp_path / "deep" / "report.json"
    assert read_parts(report) == {"one": [accuracy(0.5)], "two": [accuracy(0.7, dataset="pets")]}
    assert read_report(report)[0]["a"][0][1] == failure
    whole = {"a": [[accuracy(0.5)]]}
    for found, complete in ((subjects, True), (whole, False), (whole, True)):
        write_report(report.parent, found, complete=complete)
        assert is_complete(report) == (found is whole and complete)
    assert not is_complete(tmp_path / "report.json")
    content = json.loads(report.read_text())
    (content["subjects"]["a"],) = ({"runs": [[]], "parts": [[[3, "x"]]]},)
    (tmp_path / "parts.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"parts\.json is damaged .*3, 'x' is not a part"):
        read_parts(tmp_path / "parts.json")
    report.write_bytes(report.read_bytes()[:100])  # as a power cut leaves it
    assert not is_complete(report)


@pytest.mark.parametrize(
    ("seeds", "run"), [({"a": [3, 7]}, "a, run 2 of 2 (seed 7)"), ({}, "a, run 2 of 2")]
)
def test_a_task_that_failed_in_one_of_several_runs_names_the_run(seeds, run, tmp_path):
    """The mean of the others does not show which seed it lacks."""
    failure = Failure("linear", "cifar10", "too few images")
    subjects = {"a": [[accuracy(0.5)], [failure]], "b": [[failure]]}
    pairing = Pairing(seeds, {})
    words = " ".join(" ".join(page_of(tmp_path, subjects, pairing=pairing).words).split())
    assert f"linear of {run} on cifar10: too few images" in words
    assert "linear of b on cifar10" in words


@pytest.mark.parametrize(
    ("subjects", "options", "message"),
    [
        ({}, {}, "at least one subject"),
        ({"a": []}, {}, "subject 'a' has no runs"),
        ({"a": [[], [accuracy(1.0)] * 2]}, {}, "'a', run 1 has two findings for linear, cifar10"),
        (
            {"a": [[]]},
            {"provenance": {"b": {}}},
            "provenance of 'b', which is not a subject; use one of a",
        ),
        (
            {"a": [[Score("t", "d", "m", 1.0)]], "b": [[Score("t", "d", "m", 1.0, None, False)]]},
            {},
            "higher_is_better of t, d, m is False for 'b' and True for 'a'",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_written(
    subjects, options, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "none", subjects, **options)
    assert not (tmp_path / "none").exists()


def test_a_section_has_the_title_of_its_protocol_and_the_name_that_the_csv_has(tmp_path):
    found = [
        Score("knn", "d", "accuracy", 0.5),
        Score("pretraining", "d", "loss", 2.0),
    ]
    page = write_report(tmp_path, {"a": [found]}).read_text()
    assert '<h2>k-NN <span class="metric">knn</span></h2>' in page
    assert "<h2>pretraining</h2>" in page
    with (tmp_path / "report.csv").open() as file:
        assert [row["task"] for row in csv.DictReader(file)] == [each.task for each in found]


def test_findings_of_earlier_versions_are_read_under_todays_names(tmp_path):
    former = {
        ("k-NN (k = 1)", "accuracy"): ("knn", "accuracy"),
        ("k-NN (k = 20)", "accuracy"): ("knn", "accuracy, k = 20"),
        ("few-shot", "5-way 1-shot accuracy"): ("few_shot", "5-way 1-shot accuracy"),
        ("fine-tuning, 10 % of the labels", "top-5 accuracy"): (
            "fine_tune",
            "top-5 accuracy, 10 % of the labels",
        ),
        ("SGD probe", "accuracy"): ("sgd_probe", "accuracy"),
        ("linear, random splits", "accuracy"): ("linear_resampled", "accuracy"),
        ("factor probes", "hue"): ("factors", "hue"),
        ("augmentation probes", "R² of hue"): ("augmentation_probes", "R² of hue"),
        ("linear", "accuracy"): ("linear", "accuracy"),
        ("pretraining", "loss"): ("pretraining", "loss"),
    }
    scores = [Score(task, "d", metric, 0.5) for task, metric in former]
    write_report(tmp_path, {"a": [scores]})
    (read,) = read_report(tmp_path / "report.json")[0]["a"]
    assert [(each.task, each.metric) for each in read] == list(former.values())
