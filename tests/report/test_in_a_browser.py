"""The page of a comparison in Chromium: axe-core, two widths, two schemes, keyboard, print."""

import shutil

import numpy as np
import pytest

from cassle_jax.evaluation.findings import Chart, Failure, Gallery, Score
from cassle_jax.report.files import write_report
from cassle_jax.report.overview import Pairing, named_baselines

pytestmark = pytest.mark.browser

DATASETS = (
    "aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers102", "food101",
    "mit67", "pets", "sun397",
)  # fmt: skip
NAMES = [f"{m}, {v}" for m in ("MoCo-v2", "SimCLR") for v in ("plain", "CASSLE")]
SEEDS = (0, 1, 2)
A4 = 720  # pixels between usual margins


def findings(place: int, generator: np.random.Generator) -> list:
    values = 0.5 + 0.04 * place + generator.normal(0, 0.02, len(DATASETS))
    scores = [
        Score("linear", d, "mean per class" if d in ("aircraft", "pets") else "accuracy", value)
        for d, value in zip(DATASETS, values.tolist(), strict=True)
        if (place, d) != (3, "cifar10")
    ]
    probes = generator.uniform(size=14).tolist()
    scores += [Score("probes", "stl10", f"R² of {i}", value) for i, value in enumerate(probes)]
    scores.append(Score("spectrum", "stl10", "alignment", 0.5 - 0.03 * place, None, False))
    series = {"features": [(1, values[0]), (2, values[1])]}
    picture = [[(np.full((8, 8, 3), 99, np.uint8), "query")]]
    return [
        *scores,
        Chart("linear", "cars", "Accuracy", "x", "y", series),
        Chart("probes", "cars", "By stage", "x", "y", {"a": [("stem", 0.5), ("features", 0.25)]}),
        Gallery("neighbours", "cars", "Nearest", picture),
    ]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    generator = np.random.default_rng(0)
    subjects = {n: [findings(i, generator) for _ in SEEDS] for i, n in enumerate(NAMES)}
    subjects[NAMES[1]][0].append(Failure("few_shot", "cars", "ways=5 is more than its 4 classes"))
    pairing = Pairing(dict.fromkeys(NAMES, SEEDS), named_baselines(NAMES))
    facts = {name: {"weights": "3fa9", "config": {"lr": 0.1}} for name in NAMES}
    return write_report(
        tmp_path_factory.mktemp("page"),
        subjects,
        title="A comparison",
        question="Which is ahead?",
        summary="Twelve epochs.",
        provenance=facts,
        pairing=pairing,
    ).as_uri()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found)
        yield started
        started.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page; it must ask for no other file."""
    pages, requested = [], set()

    def open_page(width=1280, height=900, **options):
        viewport = {"width": width, "height": height}
        pages.append(browser.new_page(viewport=viewport, **options))
        pages[-1].on("request", lambda request: requested.add(request.url))
        pages[-1].goto(address)
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
    assert requested == {address}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_and_the_table_is_on_the_first_screen(opened, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(width, {390: 844, 1280: 900}[width], color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    table = page.locator("table").first.bounding_box()
    assert table["y"] < 450
    if width == 1280:
        assert table["x"] + table["width"] <= 1280  # with the mean rank


def column(page, place: int) -> list[str]:
    cells = page.locator("table").first.locator(f"tbody tr > :nth-child({place})").all_inner_texts()
    return [" ".join(cell.split()) for cell in cells]


def test_a_keyboard_sorts_by_any_column_and_back(opened):
    page = opened()
    order = column(page, 1)
    assert order == NAMES

    def press(name, place):
        button = page.get_by_role("button", name=name).first
        button.focus()
        page.keyboard.press("Enter")
        return button.locator("..").get_attribute("aria-sort"), column(page, place)

    state, values = press("cars", 4)
    numbers = [float(each.split()[0]) for each in values]
    assert state == "descending" and numbers == sorted(numbers, reverse=True)
    state, values = press("cars", 4)
    assert state == "ascending" and [float(each.split()[0]) for each in values] == numbers[::-1]
    for expected in ("descending", "ascending"):
        state, values = press("cifar10", 5)
        assert state == expected and values.index("–") == len(NAMES) - 1
    assert page.locator("[aria-sort]").count() == 1
    state, ranks = press("mean rank", len(DATASETS) + 2)
    assert state == "ascending" and ranks == sorted(ranks, key=float)
    assert press("method", 1) == ("ascending", order)
    lower = page.locator("table", has_text="Spread of the features").first
    lower.get_by_role("button", name="stl10").press("Enter")
    assert lower.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    assert "CASSLE" in lower.locator("tbody tr").first.inner_text()


def test_the_page_reads_without_its_script(opened, browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    with_script = opened()
    assert column(page, 3) == column(with_script, 3)
    assert page.locator("button").count() == 0 < with_script.locator("button").count()
    context.close()


def test_print_is_dark_on_white_and_cuts_no_table(opened):
    page = opened(A4, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    body = "getComputedStyle(document.body)"
    assert page.evaluate(f"{body}.backgroundColor") == "rgb(255, 255, 255)"
    for table in page.locator(".overview table").all():
        box = table.bounding_box()
        assert box["x"] + box["width"] <= A4
