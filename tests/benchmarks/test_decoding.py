import numpy as np
from PIL import Image

from benchmarks import decoding


def test_images_are_measured_by_what_they_need(tmp_path):
    files = [tmp_path / f"{side}.jpg" for side in (60, 72, 128, 103)]
    for file in files:
        side = int(file.stem)
        Image.fromarray(np.zeros((side // 2, side, 3), np.uint8)).save(file)
    found = decoding.costs(files, 64)
    # 72 is reduced to 7/8 and 128 to 4/8; 4/8 of 103 would be less than 7/8 of the canvas.
    numbers = {decoding.FITS: 1, decoding.REDUCED: 2, decoding.RESIZED: 1}
    assert {need: len(times) for need, times in found.items()} == numbers
    assert all((times >= 0).all() for times in found.values())
