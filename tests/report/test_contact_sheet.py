import numpy as np
import pytest
from PIL import Image

from cassle_jax.report.contact_sheet import contact_sheet

SIZES = {
    "blur": 1,
    "color": 4,
    "color_diff": 3,
    "crop": 4,
    "flip": 1,
    "grayscale": 1,
    "rotation": 4,
    "solarize": 1,
}


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def views(rows: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(rows, side, side, 3)).astype(np.float32)


def images(rows: int) -> list[np.ndarray]:
    return [np.full((20 + 9 * i, 30, 3), 40 * i, np.uint8) for i in range(rows)]


def descriptors(rows: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {n: generator.uniform(size=(rows, s)).astype(np.float32) for n, s in SIZES.items()}


def test_every_descriptor_and_unknown_ones_are_drawn(tmp_path):
    described = descriptors(3) | {"vignette": np.ones((3, 6), np.float32)}
    path = tmp_path / "deep" / "sheet.png"
    contact_sheet(images(3), views(3), views(3), described, described, path, title="three")
    assert pixels_of(path).std() > 10
    without = tmp_path / "without.png"
    contact_sheet(images(3), views(3), views(3), {}, {}, without)
    assert pixels_of(without).shape[1] == pixels_of(path).shape[1]


def test_a_row_an_image(tmp_path):
    heights = []
    for rows in (1, 2, 3):
        path = tmp_path / f"{rows}.png"
        contact_sheet(images(rows), views(rows), views(rows), {}, {}, path)
        heights.append(pixels_of(path).shape[0])
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=2)


def test_the_box_is_drawn_where_it_was_cut_whether_or_not_the_view_is_flipped(tmp_path):
    def left_column(column: float, flip: float) -> np.ndarray:
        described = {
            "crop": np.array([[0.5, column, 0.4, 0.3]], np.float32),
            "flip": np.array([[flip]], np.float32),
        }
        path = tmp_path / "sheet.png"
        contact_sheet(images(1), views(1), views(1), described, {}, path)
        pixels = pixels_of(path)
        return pixels[:, : pixels.shape[1] // 6]

    plain = left_column(0.25, 0)
    np.testing.assert_array_equal(plain, left_column(0.75, 1))
    assert (plain != left_column(0.75, 0)).any()


def test_views_keep_their_colours(tmp_path):
    red = np.zeros((1, 16, 16, 3), np.float32)
    red[..., 0] = 1.5  # clipped to 1
    contact_sheet(images(1), red, 0 * red, {}, {}, tmp_path / "sheet.png")
    pixels = pixels_of(tmp_path / "sheet.png")
    assert (pixels == (255, 0, 0)).all(axis=-1).mean() > 0.1


def test_missing_rows_are_named(tmp_path):
    path = tmp_path / "sheet.png"
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], views(1)[:0], views(1)[:0], {}, {}, path)
    with pytest.raises(ValueError, match="view_1 has 3 rows for 2 images"):
        contact_sheet(images(2), views(3), views(3), {}, {}, path)
