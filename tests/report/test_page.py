import base64
from html.parser import HTMLParser

import pytest
from PIL import Image

from cassle_jax.report.page import write_page
from cassle_jax.report.table import Table, cell_text


class Elements(HTMLParser):
    """Collects a page's elements and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def written(tmp_path, **changes) -> str:
    content = {
        "title": "a <b>title</b>",
        "summary": "one\n\ntwo & <script>three</script>",
        "curves": {
            "loss": {"plain": [(0, 2.0), (10, 1.25)], "CASSLE": [(0, 2.0), (10, 1.5)]},
            "k-NN": {"CASSLE": [(10, 0.5)]},
        },
        "table": Table(("factor", "plain", "CASSLE"), [("hue", 0.123456789, 1), ("x", "–", 0.5)]),
        "settings": {"batch_size": 256, "names": ("blur", "crop")},
    }
    path = tmp_path / "deep" / "page.html"
    write_page(path, **(content | changes))
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    page = written(tmp_path, figures={"a picture": picture})
    elements = Elements(page).elements
    assert not {"script", "link", "iframe"} & {tag for tag, _ in elements}
    (source,) = (attributes["src"] for _, attributes in elements if "src" in attributes)
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert data == picture.read_bytes()
    assert "url(" not in page and "@import" not in page
    assert not [attributes for _, attributes in elements if "href" in attributes]


def test_text_is_escaped_and_paragraphs_are_kept(tmp_path):
    page = Elements(written(tmp_path))
    assert "two & <script>three</script>" in page.words
    assert [tag for tag, _ in page.elements].count("p") == 2
    assert "a <b>title</b>" in page.words


def test_values_are_what_came_out(tmp_path):
    page = Elements(written(tmp_path))
    titles = [attributes["title"] for tag, attributes in page.elements if "title" in attributes]
    assert titles == ["0.123456789", "1", "0.5"]
    assert {"0.123", "1.250", "1.500", "256", "('blur', 'crop')"} <= set(page.words)


def test_a_run_has_one_colour_in_every_chart(tmp_path):
    elements = Elements(written(tmp_path)).elements
    classes = [attributes["class"] for tag, attributes in elements if tag == "li"]
    assert classes == ["run-0", "run-1", "run-1"]
    drawn = [
        attributes["class"]
        for tag, attributes in elements
        if tag == "path" and attributes["class"] != "grid"
    ]
    assert drawn == ["line run-0", "line run-1", "dot run-1"]


def test_a_page_of_a_title_alone(tmp_path):
    page = written(tmp_path, curves={}, table=None, settings=None)
    assert "<section>" not in page


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        written(tmp_path, figures={"none": tmp_path / "none.png"})
    with pytest.raises(
        ValueError, match=r"row \['hue', 1\] has 2 cells for \['factor', 'a', 'b'\]"
    ):
        written(tmp_path, table=Table(("factor", "a", "b"), [("hue", 1)]))


@pytest.mark.parametrize(
    ("cell", "text"),
    [(0.12345, "0.123"), (-0.0004, "-0.000"), (123456.7, "1.235e+05"), (7, "7"), ("–", "–")],
)
def test_numbers_are_printed_to_three_decimals(cell, text):
    assert cell_text(cell) == text
