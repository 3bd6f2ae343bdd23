"""Decoding against Pillow, over every kind of file that datasets turn out to hold."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from cassle_jax.config import base_config
from cassle_jax.data import DamagedImage, DataError, decode
from cassle_jax.data.decode import MAX_PIXELS, allow_pixels


def photo(height: int, width: int) -> np.ndarray:
    """A smooth colourful image, which JPEG keeps nearly as it is."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(4 * x * y + 1)]
    return np.stack([127.5 + 120 * wave for wave in waves], -1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def assert_close(got: np.ndarray, expected: np.ndarray, mean: float, most: int) -> None:
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    error = np.abs(got.astype(int) - expected.astype(int))
    assert error.mean() <= mean
    assert error.max() <= most


JPEGS = {
    "baseline": {"quality": 92},
    "progressive": {"quality": 85, "progressive": True},
    "stored as RGB": {"quality": 92, "keep_rgb": True},
    "no subsampling": {"quality": 95, "subsampling": 0},
    "restart markers": {"quality": 90, "restart_marker_blocks": 3},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_jpeg_is_pillows(options):
    data = encoded(photo(91, 120), "JPEG", **options)
    assert_close(decode(data, 120), pillow_rgb(data), mean=0.5, most=4)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_other_formats_are_pillows(form):
    data = encoded(photo(40, 33), form)
    np.testing.assert_array_equal(decode(data, 64), pillow_rgb(data))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(form):
    grey = photo(30, 40)[..., 0]
    data = encoded(grey, form)
    image = decode(data, 64)
    assert_close(image, pillow_rgb(data), mean=0.5, most=4)
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_cmyk_jpeg():
    """Pillow writes Adobe's inverted CMYK; pure inks must come back as their colours."""
    inks = {"cyan": (255, 0, 0, 0), "yellow": (0, 0, 255, 0), "black": (0, 0, 0, 255)}
    colours = {"cyan": (0, 255, 255), "yellow": (255, 255, 0), "black": (0, 0, 0)}
    for name, ink in inks.items():
        data = encoded(Image.new("CMYK", (24, 16), ink), "JPEG", quality=95)
        assert b"Adobe" in data
        expected = np.broadcast_to(np.array(colours[name], np.uint8), (16, 24, 3))
        assert_close(decode(data, 32), expected, mean=2, most=6)


def test_cmyk_without_adobe_marker_is_read_as_browsers_and_pillow_do():
    data = encoded(Image.new("CMYK", (24, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    start = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[start + 2 : start + 4])[0]
    plain = data[:start] + data[start + 2 + length :]
    np.testing.assert_array_equal(decode(plain, 32), pillow_rgb(plain))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_chunks(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand: the witness for depths that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def test_sixteen_bit_grey_png_is_scaled():
    values = np.array([[0, 128, 257, 25700], [32768, 40000, 65280, 65535]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    image = decode(png_chunks(4, 2, 16, 0, rows), 8)
    np.testing.assert_array_equal(image[..., 1], np.round(values / 257).astype(np.uint8))


def test_the_transparent_grey_of_a_sixteen_bit_png_is_white():
    values = np.array([[0, 1000, 60000], [1000, 1001, 65535]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    data = png_chunks(3, 2, 16, 0, rows)
    header = data[:33]  # signature and IHDR
    data = header + png_chunk(b"tRNS", struct.pack(">H", 1000)) + data[33:]
    expected = [[0, 255, 233], [255, 4, 255]]
    np.testing.assert_array_equal(decode(data, 8)[..., 0], expected)


def test_sixteen_bit_rgb_png_is_scaled():
    values = np.random.default_rng(0).integers(0, 65536, (5, 6, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    assert_close(decode(png_chunks(6, 5, 16, 2, rows), 8), (values // 257).astype(np.uint8), 1, 1)


def test_sixteen_bit_grey_tiff_is_scaled():
    values = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    image = decode(encoded(values, "TIFF"), 8)
    np.testing.assert_array_equal(image[..., 0], np.round(values / 257).astype(np.uint8))


def test_a_sixteen_bit_tiff_may_have_white_as_zero():
    """Scans and X-ray images do; they were shown as their negatives."""
    values = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    is_black_0 = struct.Struct("<HHIHxx").pack
    data = encoded(values, "TIFF")
    assert data.count(is_black_0(262, 3, 1, 1)) == 1
    inverted = data.replace(is_black_0(262, 3, 1, 1), is_black_0(262, 3, 1, 0))
    np.testing.assert_array_equal(decode(inverted, 8), 255 - decode(data, 8))


def test_twelve_bit_grey_tiff_is_scaled():
    values = (0, 4095, 2048, 17)
    packed = int("".join(f"{value:03x}" for value in values), 16).to_bytes(6)
    width, height, bits, is_black_0, offset, size = 256, 257, 258, 262, 273, 279
    tags = {width: 4, height: 1, bits: 12, is_black_0: 1, offset: 86, size: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries.ljust(76, b"\0") + packed
    expected = np.round(np.array([values]) / 4095 * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode(data, 8)[..., 0], expected)


def test_float_tiff_is_damaged():
    with pytest.raises(DamagedImage, match="floating-point"):
        decode(encoded(np.zeros((4, 4), np.float32), "TIFF"), 8)


def test_a_tiff_of_wide_integers_is_damaged():
    """They were taken for 16 bits: all above was white."""
    with pytest.raises(DamagedImage, match="integers of 32 bits; the value of white"):
        decode(encoded(np.full((4, 4), 1 << 20, np.int32), "TIFF"), 8)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_of_signed_integers_is_damaged(kind):
    """Those below zero were white, or black."""
    data = encoded(np.full((4, 4), 200, kind), "TIFF", tiffinfo={339: 2})
    with pytest.raises(DamagedImage, match="signed integers; the value of white"):
        decode(data, 8)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(form):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (200, 0, 0, 255)
    rgba[1] = (0, 0, 100, 51)
    image = decode(encoded(rgba, form, **({"lossless": True} if form == "WEBP" else {})), 8)
    assert image[0, 0].tolist() == [200, 0, 0]
    np.testing.assert_allclose(image[1, 0], [204, 204, 0.8 * 255 + 0.2 * 100], atol=1)


def test_palettes_with_and_without_transparency():
    paletted = Image.fromarray(photo(20, 20)).quantize(16)
    data = encoded(paletted, "PNG")
    np.testing.assert_array_equal(decode(data, 32), pillow_rgb(data))
    paletted.info["transparency"] = paletted.getpixel((0, 0))
    see_through = decode(encoded(paletted, "PNG"), 32)
    assert see_through[0, 0].tolist() == [255, 255, 255]


def test_one_bit_image():
    bits = Image.fromarray(np.eye(8, dtype=bool))
    np.testing.assert_array_equal(decode(encoded(bits, "PNG"), 8)[..., 0], np.eye(8) * 255)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(photo(24, 40))
    if form == "CMYK":
        image, form = image.convert("CMYK"), "JPEG"
    data = encoded(image, form, exif=exif, quality=95)
    got = decode(data, 64)
    assert got.shape[:2] == ((24, 40) if orientation < 5 else (40, 24))
    assert_close(got, pillow_rgb(data), mean=0.5, most=4)


@pytest.mark.parametrize("exif", [b"garbage!", b"MM\0*\xff\xff\xff\xff", b"\0\0"])
@pytest.mark.parametrize("form", ["JPEG", "CMYK", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_broken_exif_does_not_break_the_image(form, exif):
    image = Image.fromarray(photo(24, 40))
    if form == "CMYK":
        image, form = image.convert("CMYK"), "JPEG"
    whole = encoded(image, form, quality=95)
    broken = encoded(image, form, quality=95, exif=b"Exif\0\0" + exif)
    assert len(broken) > len(whole)
    np.testing.assert_array_equal(decode(broken, 64), decode(whole, 64))


def oversized_chunks() -> dict[str, bytes]:
    """What a PNG may carry beside its pixels, and Pillow stops at."""
    bomb, text = zlib.compress(bytes(2**21)), b"a" * 2**21
    return {
        "compressed text": png_chunk(b"zTXt", b"Comment\0\0" + bomb),
        "international text": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        "much text": png_chunk(b"iTXt", b"Comment\0\0\0\0\0" + text) * 40,
        "colour profile": png_chunk(b"iCCP", b"profile\0\0" + bomb),
        "wrong checksum": png_chunk(b"tEXt", b"Comment\0hello")[:-4] + b"oops",
        "short resolution": png_chunk(b"pHYs", b"\0"),
    }


@pytest.mark.parametrize("chunk", oversized_chunks().values(), ids=oversized_chunks())
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_what_is_wrong_beside_the_pixels_of_a_png_does_no_harm(chunk, before):
    exif = Image.Exif()
    exif[0x0112] = 6
    see_through = np.dstack([photo(24, 40), np.full((24, 40), 90, np.uint8)])
    whole = encoded(see_through, "PNG", exif=exif)
    place = whole.index(before) - 4
    broken = whole[:place] + chunk + whole[place:]
    np.testing.assert_array_equal(decode(broken, 64), decode(whole, 64))


def test_a_transparent_colour_cut_short_does_a_png_no_harm():
    whole = encoded(photo(24, 40), "PNG")
    place = whole.index(b"IDAT") - 4
    broken = whole[:place] + png_chunk(b"tRNS", b"\0") + whole[place:]
    np.testing.assert_array_equal(decode(broken, 64), decode(whole, 64))


@pytest.mark.parametrize("options", [*JPEGS.values(), {"grey": True}, {"cmyk": True}])
@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_may_lack_its_last_marker(options, lost):
    options = dict(options)
    image = Image.fromarray(photo(60, 80))
    if options.pop("grey", False):
        image = image.convert("L")
    if options.pop("cmyk", False):
        image = image.convert("CMYK")
    whole = encoded(image, "JPEG", **options)
    np.testing.assert_array_equal(decode(whole[:-lost], 96), decode(whole, 96))
    with pytest.raises(DamagedImage):
        decode(whole[:-40], 96)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_progressive_jpeg_cut_between_its_scans_is_damaged(mode):
    """libjpeg finds nothing wrong with it: the scans that it has are whole."""
    image = Image.fromarray(photo(60, 80)).convert(mode)
    whole = encoded(image, "JPEG", progressive=True, quality=90, comment=b"\xff\xda\0\x08\1" * 9)
    ends = [place for place in range(len(whole)) if whole[place : place + 2] == b"\xff\xc4"][2:]
    assert len(ends) >= 3
    ends.append(whole.rindex(b"\xff\xda"))  # cut in a scan's header, too
    for place in (place + more for place in ends for more in range(-1, 5)):
        with pytest.raises(DamagedImage):
            decode(whole[:place], 96)
    for complete in (whole[:-2], whole + bytes(600)):
        np.testing.assert_array_equal(decode(complete, 96), decode(whole, 96))


@pytest.mark.parametrize("profile", [bytes(200_000), b"\xff\xda" * 100])
@pytest.mark.parametrize("before", [b"", b"\xff", b"\xff\xff\xff"])
@pytest.mark.parametrize("kind", ["EXIF", "XMP"])
def test_orientation_is_found_behind_colour_profiles_and_filling_bytes(kind, before, profile):
    if kind == "EXIF":
        described = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    else:
        described = b"http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation='6'/>"
        described = described.replace(b"'", b'"')
    data = encoded(photo(24, 40), "JPEG", icc_profile=profile, quality=95)
    table = data.index(b"\xff\xdb")
    segment = b"\xff\xe1" + struct.pack(">H", len(described) + 2) + described
    turned = data[:table] + before + segment + data[table:]
    assert decode(turned, 64).shape == (40, 24, 3)
    assert_close(decode(turned, 64), pillow_rgb(turned), mean=0.5, most=4)


def test_no_program_is_started_on_what_calls_itself_postscript(monkeypatch):
    """Pillow would run Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with pytest.raises(DamagedImage, match="not an image in any known format"):
        decode(data, 64)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("height", "width", "canvas", "expected"),
    [
        (1, 1, 64, (1, 1)),
        (30, 20, 64, (30, 20)),
        (64, 64, 64, (64, 64)),
        (65, 10, 64, (64, 10)),
        (400, 200, 64, (64, 32)),
        (333, 500, 96, (64, 96)),
        (7, 10_000, 64, (1, 64)),
        (10_000, 300, 512, (512, 15)),
        (50, 40, 1, (1, 1)),
    ],
)
def test_size_on_the_canvas(form, height, width, canvas, expected):
    image = decode(encoded(photo(height, width), form), canvas)
    assert image.shape == (*expected, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("canvas", [300, 256, 160, 64])
def test_reduction_is_antialiased(form, canvas):
    """Reduced in two steps or in one, the image is Pillow's reduction of the full one."""
    data = encoded(photo(375, 500), form)
    full = Image.fromarray(pillow_rgb(data))
    expected = full.resize((canvas, round(375 * canvas / 500)), Image.Resampling.BILINEAR)
    assert_close(decode(data, canvas), np.asarray(expected), mean=1, most=8)


@pytest.mark.parametrize(
    ("size", "canvas", "expected"),
    [
        ((375, 500), 512, (375, 500)),  # fits
        ((600, 800), 512, (375, 500)),  # 5/8
        ((521, 350), 512, (456, 307)),  # 7/8, rounded up
        ((300, 845), 512, (182, 512)),  # 4/8 would be 423, too far from 512
        ((2400, 1600), 512, (512, 341)),  # 1/8 would be 300
        ((20, 8000), 512, (1, 512)),
    ],
)
def test_roughly_fitted_is_what_libjpeg_reduces_to_where_that_is_near(size, canvas, expected):
    data = encoded(photo(*size), "JPEG")
    image = decode(data, canvas, roughly=True)
    assert image.shape == (*expected, 3)
    full = Image.open(io.BytesIO(data)).convert("RGB")
    reference = full.resize(expected[::-1], Image.Resampling.BILINEAR)
    assert_close(image, np.asarray(reference), mean=1.5, most=24)


def test_fine_stripes_reduce_to_grey():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for form in ("PNG", "JPEG"):
        image = decode(encoded(stripes, form), 64).astype(int)[4:-4, 4:-4]
        assert np.abs(image - 127).max() <= 12


def test_animation_gives_its_first_frame():
    red, blue = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert decode(data, 8)[0, 0].tolist() == [255, 0, 0]


def test_trailing_bytes_do_no_harm():
    data = encoded(photo(20, 30), "JPEG")
    np.testing.assert_array_equal(decode(data + b"trailing" * 100, 64), decode(data, 64))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("left", [0.3, 0.98])
def test_a_file_whose_last_part_was_never_written_is_damaged(form, left):
    """As an interrupted download into a file of full size leaves it; the zeros became pixels."""
    noise = np.random.default_rng(0).integers(256, size=(200, 200, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010F] = encoded(photo(9, 9), "JPEG").decode("latin1")  # a preview has an end of its own
    data = encoded(noise, form, exif=b"" if form == "WEBP" else exif)  # which has it last
    written = int(left * len(data))
    with pytest.raises(DamagedImage, match="zeros"):
        decode(data[:written] + bytes(len(data) - written), 300)
    # A phone may append a film, whose bytes may be those of a marker, and a disk zeros.
    for after in (b"", b"\xff\xda film"):
        np.testing.assert_array_equal(decode(data + after + bytes(9999), 300), decode(data, 300))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("lost", ["middle", "end"])
def test_a_jpeg_that_lacks_pixels_is_damaged_whatever_ends_it(mode, lost):
    """The decoder makes the missing pixels up: they were 10 to 60 grey levels off."""
    noise = np.random.default_rng(0).integers(256, size=(100, 100, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).convert(mode), "JPEG")
    half = len(data) // 2
    kept = data[:half] + (data[half + 512 :] if lost == "middle" else b"\xff\xd9")
    with pytest.raises(DamagedImage, match="it is cut short, or has a hole: pixels are missing"):
        decode(kept, 100)


@pytest.mark.parametrize(
    ("form", "options"), [("WEBP", {}), ("WEBP", {"lossless": True}), ("AVIF", {})]
)
def test_a_file_with_a_hole_in_it_is_damaged(form, options):
    """As a download in several pieces leaves it; the pixels were up to 68 grey levels off."""
    noise = np.random.default_rng(0).integers(256, size=(200, 200, 3), dtype=np.uint8)
    data = encoded(noise, form, **options)
    half = len(data) // 2
    with pytest.raises(DamagedImage, match="it has zeros in place of pixels"):
        decode(data[:half] + bytes(1024) + data[half + 1024 :], 200)


@pytest.mark.parametrize("form", ["WEBP", "AVIF"])
@pytest.mark.parametrize("colour", [0, 255])
def test_zeros_may_stand_for_an_area_of_one_colour(form, colour):
    plain = np.full((2500, 2500, 3), colour, np.uint8)
    decoded = decode(encoded(plain, form, quality=1), 2500)
    np.testing.assert_allclose(decoded.astype(int), plain, atol=3)


@pytest.mark.parametrize("form", ["WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 3])
def test_zeros_in_exif_are_no_damage(form, orientation):
    """Cameras fill their notes up with zeros; an AVIF has them among its pixels."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker" + "\0" * 5000, orientation
    data = encoded(photo(60, 80), form, exif=exif)
    assert bytes(4000) in data
    assert decode(data, 80).shape == (60, 80, 3)


def test_warnings_that_pillow_tolerates_are_tolerated():
    """Stray bytes before a marker, as cameras write them."""
    data = encoded(photo(20, 30), "JPEG")
    quantisation = data.index(b"\xff\xdb")
    stray = data[:quantisation] + b"\xff\xfe\x00\x04ok" + data[quantisation:-2] + b"\0\0\xff\xd9"
    assert_close(decode(stray, 64), pillow_rgb(stray), mean=0.5, most=4)


def test_stray_bytes_between_the_tables_of_a_jpeg_are_no_damage():
    data = encoded(photo(20, 30), "JPEG")
    tables = data.index(b"\xff\xc4")
    np.testing.assert_array_equal(
        decode(data[:tables] + b"stray" + data[tables:], 64), decode(data, 64)
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {"progressive": True}])
@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_a_jpeg_with_a_hole_is_damaged_where_the_decoder_goes_on_behind_it(mode, options, at):
    """At the next restart marker or scan; the pixels were up to 55 grey levels off."""
    noise = np.random.default_rng(0).integers(256, size=(200, 200, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).convert(mode), "JPEG", quality=85, **options)
    hole = int(at * len(data))
    with pytest.raises(DamagedImage, match="pixels are missing"):
        decode(data[:hole] + bytes(2048) + data[hole + 2048 :], 200)


def test_a_jpeg_that_lost_a_restart_marker_is_damaged():
    data = encoded(photo(60, 80), "JPEG", restart_marker_blocks=3)
    lost = data.index(b"\xff\xd3")
    with pytest.raises(DamagedImage, match="pixels are missing"):
        decode(data[:lost] + data[lost + 2 :], 80)


@pytest.mark.parametrize("marker", [b"\xff\xd3", b"\xff\xd9"])
def test_few_bytes_before_a_marker_are_no_damage(marker):
    """Common webcams write up to ten of them."""
    data = encoded(photo(60, 80), "JPEG", restart_marker_blocks=3)
    before = data.index(marker)
    webcam = data[:before] + bytes(range(1, 11)) + data[before:]
    np.testing.assert_array_equal(decode(webcam, 80), pillow_rgb(data))


def test_a_jpeg_whose_bytes_outlast_its_pixels_is_damaged():
    """Bits were lost before: what followed decoded to other pixels."""
    data = encoded(photo(60, 80), "JPEG")
    with pytest.raises(DamagedImage, match="pixels are missing"):
        decode(data[:-2] + bytes(range(1, 99)) + data[-2:], 80)


def damaged_files() -> dict[str, bytes]:
    jpeg, png = encoded(photo(60, 80), "JPEG"), encoded(photo(60, 80), "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "zeros": bytes(1000),
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "jpeg header": jpeg[:30],
        "jpeg start": jpeg[:3],
        "half a png": png[: len(png) // 2],
        "corrupt png": bytes(flipped),
        "half a gif": encoded(photo(60, 80), "GIF")[:900],
        "half a webp": encoded(photo(60, 80), "WEBP")[:300],
        "huge": png_chunks(20_000, 20_000, 8, 2, b""),
    }


@pytest.mark.parametrize("data", damaged_files().values(), ids=damaged_files())
def test_damaged(data):
    with pytest.raises(DamagedImage) as caught:
        decode(data, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header():
    for data in (png_chunks(9_600, 9_600, 8, 2, b""), png_chunks(1, 2**31 - 1, 8, 2, b"")):
        with pytest.raises(DamagedImage, match=f"{MAX_PIXELS}|Bomb"):
            decode(data, 64)
    jpeg = bytearray(encoded(photo(60, 80), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(DamagedImage, match=str(MAX_PIXELS)):
        decode(bytes(jpeg), 64)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_how_many_pixels_an_image_may_have_is_a_setting(form, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS)  # is put back afterwards
    assert base_config().data.max_pixels == MAX_PIXELS
    data = encoded(photo(30, 40), form)
    allow_pixels(1200)
    assert decode(data, 64).shape == (30, 40, 3)
    for fewer in (1199, 300):
        allow_pixels(fewer)
        with pytest.raises(DamagedImage, match=f"data.max_pixels={fewer}"):
            decode(data, 64)
    with pytest.raises(DataError, match=f"data.max_pixels=0 .* {MAX_PIXELS}"):
        allow_pixels(0)


def test_images_above_the_usual_bound_can_be_allowed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS)
    data = encoded(Image.new("L", (9_600, 9_600)), "JPEG")
    with pytest.raises(DamagedImage, match=r"9600x9600 .* data\.max_pixels"):
        decode(data, 64)
    allow_pixels(100_000_000)
    assert decode(data, 64).shape == (64, 64, 3)


def test_arrays_pass_through_and_are_reduced():
    image = photo(40, 20)
    np.testing.assert_array_equal(decode(image, 64), image)
    np.testing.assert_array_equal(decode(image[..., :1], 64)[..., 2], image[..., 0])
    np.testing.assert_array_equal(decode(image[..., 0], 64)[..., 2], image[..., 0])
    assert decode(image, 10).shape == (10, 5, 3)
    for wrong in (
        image.astype(np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(DamagedImage, match="uint8"):
            decode(wrong, 64)
