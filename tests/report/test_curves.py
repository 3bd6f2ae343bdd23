import re
from xml.etree import ElementTree

from cassle_jax.report.axis import axis
from cassle_jax.report.curves import Line, lines_svg

SVG = "{http://www.w3.org/2000/svg}"


def curves_svg(name: str, runs: dict[str, list[tuple[int, float]]]) -> str:
    drawn = [Line(run, points, colour=index) for index, (run, points) in enumerate(runs.items())]
    points = [point for line in drawn for point in line.points]
    x_axis, y_axis = axis([x for x, _ in points]), axis([y for _, y in points], to_ticks=True)
    return lines_svg(name, drawn, x_axis, y_axis)


def lines(svg: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """The class and the points of every line and dot."""
    found = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if "run-" in path.get("class"):
            numbers = re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))
            found.append((path.get("class"), [(float(x), float(y)) for x, y in numbers]))
    return found


def test_lines_follow_the_values():
    ((kind, points),) = lines(curves_svg("loss", {"plain": [(0, 1.0), (50, 3.0), (100, 2.0)]}))
    assert kind == "line run-0"
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == x2 - x1 > 0
    assert abs((y0 - y1) - 2 * (y2 - y1)) < 0.3 and y0 > y2 > y1


def test_values_that_are_not_finite_leave_a_gap():
    nan = float("nan")
    points = [
        (0, 1.0),
        (1, 2.0),
        (2, nan),
        (3, 2.0),
        (4, nan),
        (5, float("inf")),
        (6, 1.0),
        (7, 0.0),
    ]
    drawn = lines(curves_svg("loss", {"plain": points, "CASSLE": []}))
    assert [(kind, len(points)) for kind, points in drawn] == [
        ("line run-0", 2),
        ("dot run-0", 1),
        ("line run-0", 2),
    ]


def test_a_chart_without_values_says_so():
    for runs in ({}, {"plain": []}, {"plain": [(0, float("nan"))]}):
        assert "no values" in curves_svg("loss", runs)


def test_constant_and_single_values_are_drawn():
    assert lines(curves_svg("loss", {"plain": [(5, 0.0)]}))[0][0] == "dot run-0"
    assert len(lines(curves_svg("loss", {"plain": [(5, 2.0), (6, 2.0)]}))[0][1]) == 2


def texts_left(svg: str) -> list[str]:
    """The labels of the vertical axis."""
    return [each.text for each in ElementTree.fromstring(svg).iter(f"{SVG}text")
            if each.get("class") == "left"]  # fmt: skip


def test_labels_of_an_axis_differ():
    for low, high in ((0.99991, 0.99999), (12345, 12349), (1e6, 1e6 + 30), (-1e-5, 0)):
        labels = texts_left(curves_svg("cosine", {"plain": [(0, low), (1, high)]}))
        assert len(set(labels)) == len(labels) > 2
        assert float(labels[0]) <= low < high <= float(labels[-1])


def test_equal_values_have_labels_above_and_below():
    for value, other in ((0.5, 0.5 + 1e-16), (0.0, 0.0), (-3.0, -3.0)):
        labels = texts_left(curves_svg("accuracy", {"plain": [(0, value), (1, other)]}))
        assert len(set(labels)) == len(labels)
        assert float(labels[0]) < value < float(labels[-1])


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [(step, float(step)) for step in range(10_000)]
    ((_, drawn),) = lines(curves_svg("loss", {"plain": points}))
    ((_, ends),) = lines(curves_svg("loss", {"plain": [points[0], points[-1]]}))
    assert len(drawn) <= 501
    assert [drawn[0], drawn[-1]] == ends


def test_names_are_escaped():
    assert '"><b>' not in curves_svg('"><b>', {})
