"""Decodes an image file of any raster format into uint8 RGB that fits a square canvas."""

import io
import re
import struct
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError, features

from cassle_jax.data.errors import DataError

MAX_PIXELS = 89_478_485
"""Largest number of pixels in an image by default: Pillow's limit against bombs."""

ANY_SIDE = 1 << 30
"""A canvas, in pixels, so large that no image is reduced."""

_PIXEL_BYTES = 8  # red, green, blue and opacity in 16 bits, not compressed
_OTHER_BYTES = 1 << 26  # for what else an image's file has, such as a preview

_EXTENSIONS = {
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# Raster formats alone: for others Pillow starts a program, such as Ghostscript, on the bytes.
_FORMATS = tuple(form for form in _EXTENSIONS if form != "AVIF" or features.check("avif"))

EXTENSIONS = frozenset(each for extensions in _EXTENSIONS.values() for each in extensions)
"""Lower-case extensions of image files."""

_METADATA_WITH_ORIENTATION = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = b"\xda"  # marks the pixels
_JPEG_SCANS = re.compile(b"\xff" + _JPEG_SCAN)
_JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))  # sequential and progressive
_PROGRESSIVE = (0xC2, 0xCA)
# What libjpeg-turbo says where it makes pixels up; its other warnings concern none.
_LOST_PIXELS = re.compile("premature end of data|bad (Huffman|arithmetic) code|instead of RST")
_LEFT_OVER = re.compile("([0-9]+) extraneous bytes before marker 0x(..)")
_FEW_BYTES = 16  # webcams write up to ten of them before a marker of a whole image
_FILLING = b"\0\xff"  # cameras fill a file up with these
_COEFFICIENTS = 64  # per block of pixels
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND"
_ZEROS = bytes(512)  # disks lose whole blocks
_UNWRITTEN = "it ends in zeros: its last part was never written"
_HOLE = "it has zeros in place of pixels: a part of it was never written"
_SILENT = ("AVIF", "WEBP")  # their decoders, too, take such zeros for pixels
_PIXELS = (b"VP8 ", b"VP8L", b"ANMF", b"mdat")
_PIXELS_PER_ZERO = 1024  # where an image has one colour, a zero may stand for 2700 pixels
_PNG_EXTRAS = (b"tRNS", b"eXIf")  # the optional parts of a PNG that change how it is shown
_DIRECT_COLOURS = ("YCbCr", "RGB", "Gray")
_TIFF_BITS = ExifTags.Base.BitsPerSample
_TIFF_FORMAT = ExifTags.Base.SampleFormat
_SIGNED = 2
_TIFF_BLACK = ExifTags.Base.PhotometricInterpretation  # 0 where black is the largest number
_UNKNOWN_RANGE = "the value of white is unknown"
_FLOAT_MODES = ("F", "F;16", "F;32F")

SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations of images that are stored with height and width exchanged."""

# EXIF orientation to the view of the stored array that is upright.
_UPRIGHT = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image[::-1].transpose(1, 0, 2),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: image[:, ::-1].transpose(1, 0, 2),
}


class DamagedImage(ValueError):
    """The bytes are not a whole image: truncated, empty, something else, or too large.

    Args:
      reason: why, in words.
      file: name of the record where a source raises the error; "" elsewhere.
    """

    def __init__(self, reason: str, file: str = ""):
        super().__init__(reason)
        self.file = file


def check_bytes(size: int, file: str) -> None:
    """Raises DamagedImage where a file has more bytes than any image of `data.max_pixels`.

    Reading it all would take this machine's memory.
    """
    allowed = Image.MAX_IMAGE_PIXELS
    if allowed is not None and size > _PIXEL_BYTES * allowed + _OTHER_BYTES:
        raise DamagedImage(
            f"it has {size:,} bytes, more than an image of data.max_pixels={allowed} has", file
        )


def decode(
    data: bytes | np.ndarray,
    canvas: int,
    scratch: UInt8[np.ndarray, " bytes"] | None = None,
    *,
    roughly: bool = False,
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image, upright and in RGB, and reduces it to fit a square of `canvas` pixels.

    Aspect ratio is kept, an image that fits is never enlarged, and each side keeps at least one
    pixel. JPEGs go to libjpeg-turbo, which reduces while it decodes; an antialiased bilinear resize
    does the rest. Everything else, and any JPEG that libjpeg-turbo declines (CMYK, for example),
    goes to Pillow. Greys of 12 and 16 bits are scaled to 8 bits, transparent pixels are composited
    on white, EXIF orientation is applied, and only the first frame of an animation is used.

    Defects outside the pixels do no harm: broken or oversized EXIF, text and colour profiles are
    ignored, and a JPEG may lack its end marker. A JPEG or PNG whose last part is zeros, as after an
    interrupted download into a file of full size, is damaged; so is a WebP or AVIF with a part of
    zeros within its pixels.

    Args:
      data: the bytes of an image file, or an already decoded uint8 array of shape [height, width]
        or [height, width, 1 or 3].
      canvas: largest side of the result in pixels, ≥ 1.
      scratch: memory to decode into where it is large enough; the result may lie in it. Reusing it
        for many images saves the mapping and clearing of fresh memory.
      roughly: leaves a JPEG at the size to which libjpeg-turbo reduces it, if that is at least 7/8
        of the canvas. This saves the resize: most of the time of images larger than the canvas.

    Returns:
      uint8 RGB in [0, 255] of shape [height, width, 3], max(height, width) ≤ canvas.

    Raises:
      DamagedImage: the image cannot be decoded completely, or has more pixels than are allowed.
    """
    if isinstance(data, np.ndarray):
        return _reduce(_three_channels(data), canvas)
    if not data:
        raise DamagedImage("the file is empty")
    if _ends_unwritten(data):
        raise DamagedImage(_UNWRITTEN)
    if data[:3] != _JPEG_START:
        return _decode_with_pillow(data, canvas)
    # libjpeg reports missing pixels; a file that lacks only its end marker gets one here.
    ended = data if data.endswith(_JPEG_END) else data + _JPEG_END
    if ended is not data and _lacks_scans(ended):
        raise DamagedImage("it is cut short: whole scans of its pixels are missing")
    image = _decode_jpeg(ended, canvas, scratch, roughly)
    if image is not None:
        return image
    # libjpeg-turbo also notices missing pixels in CMYK; Pillow does not.
    whole = _decode_strictly(ended, colorspace="CMYK") is not None
    return _decode_with_pillow(ended if whole else data, canvas)


def open_image(file: io.BufferedIOBase) -> Image.Image:
    """Opens an image of the raster formats with Pillow; only its header is read.

    Raises:
      OSError: it cannot be read, or is not such an image.
    """
    return Image.open(file, formats=_FORMATS)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of the stored image; 1, upright, where it cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises any of a dozen types; broken EXIF does not break the image.
        return 1


def allow_pixels(most: int) -> None:
    """Sets the largest number of pixels of an image, for the whole process as Pillow does.

    Raises:
      DataError: `most` is below 1.
    """
    if most < 1:
        raise DataError(f"data.max_pixels={most} leaves no image; the default is {MAX_PIXELS}")
    Image.MAX_IMAGE_PIXELS = most


def fitted_size(height: int, width: int, canvas: int) -> tuple[int, int]:
    """Height and width after reducing to at most `canvas` pixels per side, aspect ratio kept."""
    longest = max(height, width)
    if longest <= canvas:
        return height, width
    return max(1, round(height * canvas / longest)), max(1, round(width * canvas / longest))


def _ends_unwritten(data: bytes) -> bool:
    """Whether a JPEG or PNG has zeros instead of its end, as after a lost write.

    Both decoders take such zeros for pixels.
    """
    if not data.endswith(_ZEROS):
        return False
    held = data.rstrip(b"\0")
    if data.startswith(_JPEG_START):  # the marker is not among the bytes of the pixels
        *_, scan = _segments(data)
        return held.find(_JPEG_END, scan) < 0
    return data.startswith(_PNG_START) and _PNG_END not in held


def _has_hole(data: bytes, pixels: int, exif: bytes) -> bool:
    """Whether the pixels of a WebP or AVIF have more zeros in a row than encoders write."""
    zeros = bytes(max(len(_ZEROS), pixels // _PIXELS_PER_ZERO))
    is_webp = data.startswith(b"RIFF")
    if not is_webp and zeros in exif:  # which lies among an AVIF's pixels
        return False
    start = 12 if is_webp else 0
    while start + 8 <= len(data):  # part by part
        if is_webp:
            kind, size = struct.unpack_from("<4sI", data, start)
            end = start + 8 + size + size % 2
        else:
            size, kind = struct.unpack_from(">I4s", data, start)
            end = start + (size if size >= 8 else len(data))  # 0 and 1: to the end, a longer number
        if kind in _PIXELS and data.find(zeros, start, end) >= 0:
            return True
        start = end
    return False


def _eighths_size(height: int, width: int, canvas: int) -> tuple[int, int]:
    """Height and width at the largest n/8 that fits, or fitted where that is much smaller."""
    longest = max(height, width)
    eighths = 8 * canvas // longest
    if longest <= canvas or 8 * -(-longest * eighths // 8) < 7 * canvas:
        return fitted_size(height, width, canvas)
    return -(-height * eighths // 8), -(-width * eighths // 8)


def _decode_jpeg(
    data: bytes, canvas: int, scratch: UInt8[np.ndarray, " bytes"] | None, roughly: bool
) -> UInt8[np.ndarray, "height width 3"] | None:
    """Decodes an ordinary JPEG; returns None for a file left to Pillow, which tolerates more."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _refuse_bomb(height, width)
    if colours not in _DIRECT_COLOURS:
        return None
    fitted = _eighths_size if roughly else fitted_size
    target_height, target_width = fitted(height, width, canvas)
    if scratch is not None and height * width * 3 > scratch.size:
        scratch = None
    image = _decode_strictly(data, min_height=target_height, min_width=target_width, buffer=scratch)
    if image is None:
        return None
    image = _resize(image, target_height, target_width)
    if not _may_have_orientation(data):  # most images; Pillow would take longer
        return image
    try:
        with open_image(io.BytesIO(data)) as opened:
            return _upright(image, orientation_of(opened))
    except Exception:  # As below: libjpeg-turbo has decoded what Pillow cannot open.
        return image


def _decode_strictly(data: bytes, **options: Any) -> UInt8[np.ndarray, "h w c"] | None:
    """Decodes a JPEG; returns None where libjpeg-turbo has doubts, which Pillow would not mention.

    Raises:
      DamagedImage: pixels are missing, as after a hole in the file; Pillow would make some up.
    """
    try:
        return simplejpeg.decode_jpeg(data, **options)
    except ValueError as error:
        if _loses_pixels(str(error), data):
            raise DamagedImage("it is cut short, or has a hole: pixels are missing") from error
        return None


def _loses_pixels(warning: str, data: bytes) -> bool:
    """Whether a warning of libjpeg-turbo means that pixels of a JPEG are made up."""
    if _LOST_PIXELS.search(warning):
        return True
    left_over = _LEFT_OVER.search(warning)
    if left_over is None or (size := int(left_over[1])) <= _FEW_BYTES:
        return False
    *_, pixels = _segments(data)
    if not data.startswith(b"\xff" + _JPEG_SCAN, pixels):  # before the pixels
        return False
    if left_over[2] != _JPEG_END[1:].hex():  # between restart markers, or scans
        return True
    end = data.find(_JPEG_END, pixels)
    return bool(data[end - size : end].strip(_FILLING))


def _segments(data: bytes) -> Iterator[int]:
    """The start of each segment before a JPEG's pixels, and the end of the last one."""
    start = 2
    while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != _JPEG_SCAN:
        yield start
        start += 2 + int.from_bytes(data[start + 2 : start + 4])
    yield start


def _lacks_scans(data: bytes) -> bool:
    """Whether scans are missing from a JPEG whose only end marker is its last two bytes.

    The decoder takes the detail of a missing scan for zeros. Encoders send every coefficient of
    every colour, down to the last bit.
    """
    *segments, first = _segments(data)
    frame = next((at for at in segments if data[at + 1] in _JPEG_FRAMES), None)
    if frame is None or data.find(_JPEG_END, first) < len(data) - len(_JPEG_END):
        return False
    whole = set()
    for found in _JPEG_SCANS.finditer(data, first):
        start = found.start() + 4
        size = int.from_bytes(data[start - 2 : start]) - 2
        header = data[start : start + size]
        if len(header) < size or size < 6 or size != 4 + 2 * header[0] or header[0] > 4:
            continue  # no scan
        low, high, bits = header[-3:]
        if data[frame + 1] not in _PROGRESSIVE:
            low, high, bits = 0, _COEFFICIENTS - 1, 0
        if bits % 16 == 0:  # no later scan refines these
            kept = range(low, min(high, _COEFFICIENTS - 1) + 1)
            whole |= {(colour, each) for colour in header[1:-3:2] for each in kept}
    colours = sum(data[frame + 9 : frame + 10])  # one byte, or none where the frame is cut
    return len(whole) < _COEFFICIENTS * colours


def _may_have_orientation(data: bytes) -> bool:
    """Whether a JPEG has an EXIF or XMP segment before its pixels."""
    *segments, end = _segments(data)
    if any(data.startswith(_METADATA_WITH_ORIENTATION, start + 4) for start in segments):
        return True
    # Where something other than a segment follows, such as a fill byte, search for the names.
    is_scan = data[end : end + 2] == b"\xff" + _JPEG_SCAN
    return not is_scan and any(name in data for name in _METADATA_WITH_ORIENTATION)


def _upright(
    image: UInt8[np.ndarray, "h w 3"], orientation: int
) -> UInt8[np.ndarray, "height width 3"]:
    return _UPRIGHT[orientation](image) if orientation in _UPRIGHT else image


def _decode_with_pillow(data: bytes, canvas: int) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return _reduce(_pillow_pixels(data), canvas)
    except (DamagedImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DamagedImage(f"more than data.max_pixels={Image.MAX_IMAGE_PIXELS}") from error
    except Exception as error:  # Pillow's plugins raise any type, depending on the bytes.
        for extras in (_PNG_EXTRAS, ()):
            bare = _bare_png(data, extras)
            if bare != data:
                return _decode_with_pillow(bare, canvas)
        if isinstance(error, UnidentifiedImageError):
            raise DamagedImage("not an image in any known format") from error
        raise DamagedImage(f"{type(error).__name__}: {_one_line(error)}") from error


def _pillow_pixels(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    with open_image(io.BytesIO(data)) as image:
        _refuse_bomb(image.height, image.width)
        pixels, exif = image.height * image.width, image.info.get("exif", b"")
        if image.format in _SILENT and _has_hole(data, pixels, exif):
            raise DamagedImage(_HOLE)
        image.load()
        return _upright(_to_rgb(image), orientation_of(image))


def _bare_png(data: bytes, extras: Collection[bytes]) -> bytes:
    """A PNG's pixels without what is around them, except `extras`; other files unchanged."""
    if not data.startswith(_PNG_START):
        return data
    kept, start = [_PNG_START], len(_PNG_START)
    while len(data) - start >= 12:  # length, kind and checksum
        length, kind = struct.unpack_from(">I4s", data, start)
        chunk = data[start : start + 12 + length]
        is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind[:1].isupper() or (kind in extras and is_sound):
            kept.append(chunk)
        start += len(chunk)
    return b"".join(kept)


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode in _FLOAT_MODES:
        raise DamagedImage(f"its pixels are floating-point numbers; {_UNKNOWN_RANGE}")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_TIFF_BITS, (16,))[0]
    is_wide = image.mode == "I" or image.mode.startswith("I;16")
    if is_wide and bits > 16:
        raise DamagedImage(f"its pixels are integers of {bits} bits; {_UNKNOWN_RANGE}")
    if _SIGNED in tags.get(_TIFF_FORMAT, ()):
        raise DamagedImage(f"its pixels are signed integers; {_UNKNOWN_RANGE}")
    if is_wide:
        # Converted here: Pillow's own conversion clips at 255 instead of scaling.
        white = (1 << bits) - 1
        grey = np.clip(np.asarray(image).astype(np.int64), 0, white)
        if tags.get(_TIFF_BLACK) == 0:  # Pillow inverts 8 bits alone
            grey = white - grey
        grey[grey == image.info.get("transparency", -1)] = white
        return _three_channels(((grey * 255 + white // 2) // white).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image.convert("RGB"))


def _three_channels(image: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    grey = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1)
    if grey:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DamagedImage(
            f"an array of {image.dtype}{list(image.shape)} is not uint8[h, w, 1 or 3]"
        )
    return image


def _reduce(image: UInt8[np.ndarray, "h w 3"], canvas: int) -> UInt8[np.ndarray, "height width 3"]:
    return _resize(image, *fitted_size(*image.shape[:2], canvas))


def _resize(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    if image.shape[:2] == (height, width):
        return image
    source = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(source.resize((width, height), Image.Resampling.BILINEAR))


def _refuse_bomb(height: int, width: int) -> None:
    allowed = Image.MAX_IMAGE_PIXELS
    if allowed is not None and height * width > allowed:
        raise DamagedImage(f"{width}x{height} pixels are more than data.max_pixels={allowed}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
