import numpy as np
import pytest
from PIL import Image

from cassle_jax.report.figure import write_figure
from cassle_jax.report.table import Table

LOSS = {"plain": [(0, 2.0), (10, 1.0)], "CASSLE": [(0, 2.5)]}
TABLE = Table(("factor", "plain", "CASSLE"), [("hue", 0.25, -0.5), ("x", "–", float("nan"))])


def examples(rows: int) -> dict:
    views = np.random.default_rng(0).uniform(size=(rows, 8, 8, 3)).astype(np.float32)
    images = [np.full((8, 8 + i, 3), 200, np.uint8) for i in range(rows)]
    return {"images": images, "view_1": views, "view_2": 1 - views}


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


@pytest.mark.exhaustive
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_a_picture_of_any_number_of_examples(rows, tmp_path):
    path = tmp_path / "deep" / "figure.png"
    write_figure(
        path,
        title="a title",
        loss=LOSS,
        tables={"by factor": TABLE, "others": TABLE},
        **examples(rows),
    )
    width, height = size_of(path)
    assert width == 1650 and height > 500


def test_a_run_has_the_same_colour_in_curve_and_bar(tmp_path):
    path = tmp_path / "figure.png"
    table = Table(("factor", "CASSLE"), [("hue", 0.5)])
    loss = {"CASSLE": [(0, 1.0), (1, 2.0)]}
    write_figure(path, title="", loss=loss, tables={"": table}, **examples(0))
    with Image.open(path) as image:
        blue = (np.asarray(image.convert("RGB")) == (0x00, 0x72, 0xB2)).all(axis=-1)
    half = blue.shape[1] * 2 // 5
    assert blue[:, :half].any() and blue[:, half:].any()


def test_a_picture_takes_the_place_of_an_earlier_one_whole(tmp_path):
    path, earlier = tmp_path / "figure.png", tmp_path / "earlier.png"
    path.write_bytes(b"earlier")
    earlier.hardlink_to(path)  # what is written into the earlier file shows here
    write_figure(path, title="", loss=LOSS, tables={"": TABLE}, **examples(0))
    assert earlier.read_bytes() == b"earlier"
    assert size_of(path)[0] == 1650


@pytest.mark.parametrize("name", ["figure.pdf", "figure", "figure.png.svg"])
def test_a_picture_of_another_kind_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} would be a PNG; give it a name that ends in"):
        write_figure(tmp_path / name, title="", loss=LOSS, tables={"": TABLE}, **examples(0))
    assert not list(tmp_path.iterdir())


def test_missing_rows_are_named(tmp_path):
    wrong = examples(2) | {"images": examples(3)["images"]}
    with pytest.raises(ValueError, match="3 images, 2 and 2 views"):
        write_figure(tmp_path / "figure.png", title="", loss=LOSS, tables={"": TABLE}, **wrong)
    with pytest.raises(ValueError, match="2 cells"):
        table = Table(("factor", "a", "b"), [("hue", 1)])
        write_figure(
            tmp_path / "figure.png", title="", loss=LOSS, tables={"": table}, **examples(2)
        )
    with pytest.raises(ValueError, match="different columns"):
        tables = {"a": TABLE, "b": Table(("factor", "plain"), [])}
        write_figure(tmp_path / "figure.png", title="", loss=LOSS, tables=tables, **examples(2))
