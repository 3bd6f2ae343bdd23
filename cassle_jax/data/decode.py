"""Decodes one image file into uint8 RGB that fits a square canvas, whatever the file holds."""

import io

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused unread: Pillow's own line for a decompression bomb."""

_ORIENTATION_TAG = 0x0112
_EXIF_WITHIN = 65536
_JPEG_START = b"\xff\xd8\xff"
_DIRECT_COLOURS = ("YCbCr", "RGB", "Gray")
_FLOAT_MODES = ("F", "F;16", "F;32F")

# EXIF orientation to the view of the stored array that stands upright.
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
    """The bytes are no image that can be shown: truncated, empty, something else, or too large."""


def decode(
    data: bytes | np.ndarray,
    canvas: int,
    scratch: UInt8[np.ndarray, " bytes"] | None = None,
    *,
    roughly: bool = False,
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image, upright and in RGB, and reduces it to fit a square of `canvas` pixels.

    Aspect ratio is kept, an image that fits already is never enlarged, and each side keeps at
    least one pixel. JPEG takes libjpeg-turbo, which reduces while it decodes; what is left is an
    antialiased bilinear resize. Everything else, and any JPEG that libjpeg-turbo declines (CMYK for
    one), takes Pillow. 16-bit greys are scaled to 8 bits, transparent pixels are composited on
    white, EXIF orientation is applied, and of an animation the first frame counts.

    Args:
      data: the bytes of an image file, or an already decoded uint8 array of shape [height, width]
        or [height, width, 1 or 3].
      canvas: largest side of the result in pixels, ≥ 1.
      scratch: memory to decode into where it suffices; the result may lie in it. Threads that
        decode image after image spare the kernel the mapping and clearing of fresh memory.
      roughly: a JPEG that libjpeg-turbo itself reduces to at least 7/8 of the canvas is left at
        that, which spares the resize: most of the time that images larger than the canvas take.

    Returns:
      uint8 RGB in [0, 255] of shape [height, width, 3], max(height, width) ≤ canvas.

    Raises:
      DamagedImage: the image cannot be decoded whole, or has more than `MAX_PIXELS` pixels.
    """
    if isinstance(data, np.ndarray):
        return _reduce(_three_channels(data), canvas)
    if not data:
        raise DamagedImage("the file is empty")
    image = _decode_jpeg(data, canvas, scratch, roughly) if data[:3] == _JPEG_START else None
    return _decode_with_pillow(data, canvas) if image is None else image


def fitted_size(height: int, width: int, canvas: int) -> tuple[int, int]:
    """Height and width after reducing to at most `canvas` pixels a side, aspect ratio kept."""
    longest = max(height, width)
    if longest <= canvas:
        return height, width
    return max(1, round(height * canvas / longest)), max(1, round(width * canvas / longest))


def _eighths_size(height: int, width: int, canvas: int) -> tuple[int, int]:
    """The size by the largest n/8 that fits, or the fitted one where that is much smaller."""
    longest = max(height, width)
    eighths = 8 * canvas // longest
    if longest <= canvas or 8 * -(-longest * eighths // 8) < 7 * canvas:
        return fitted_size(height, width, canvas)
    return -(-height * eighths // 8), -(-width * eighths // 8)


def _decode_jpeg(
    data: bytes, canvas: int, scratch: UInt8[np.ndarray, " bytes"] | None, roughly: bool
) -> UInt8[np.ndarray, "height width 3"] | None:
    """Decodes an ordinary JPEG; None hands the file to Pillow, which tolerates more."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in _DIRECT_COLOURS:
        return None
    _refuse_bomb(height, width)
    fitted = _eighths_size if roughly else fitted_size
    target_height, target_width = fitted(height, width, canvas)
    if scratch is not None and height * width * 3 > scratch.size:
        scratch = None
    try:
        image = simplejpeg.decode_jpeg(
            data, min_height=target_height, min_width=target_width, buffer=scratch
        )
    except ValueError:
        return None
    image = _resize(image, target_height, target_width)
    return _upright(image, data)


def _upright(image: UInt8[np.ndarray, "h w 3"], data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Applies the EXIF orientation; only files that carry EXIF pay for reading it."""
    if data.find(b"Exif\0\0", 0, _EXIF_WITHIN) < 0:
        return image
    try:
        orientation = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION_TAG, 1)
    except (
        Exception
    ):  # Pillow raises any of a dozen types here, and broken EXIF is no broken image.
        return image
    return _UPRIGHT[orientation](image) if orientation in _UPRIGHT else image


def _decode_with_pillow(data: bytes, canvas: int) -> UInt8[np.ndarray, "height width 3"]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _refuse_bomb(image.height, image.width)
            image.load()
            upright = ImageOps.exif_transpose(image)
            pixels = _to_rgb(upright)
    except (DamagedImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DamagedImage("not an image in any known format") from error
    except Exception as error:  # Pillow's plugins raise whatever the bytes led them to.
        raise DamagedImage(f"{type(error).__name__}: {_one_line(error)}") from error
    return _reduce(pixels, canvas)


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode in _FLOAT_MODES:
        raise DamagedImage("its pixels are floating point, whose range the file does not state")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Read as numbers: Pillow's own conversion clips at 255 instead of scaling.
        sixteen = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return _three_channels(((sixteen * 255 + 32767) // 65535).astype(np.uint8))
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
    if height * width > MAX_PIXELS:
        raise DamagedImage(f"{width}x{height} pixels are more than the {MAX_PIXELS} that are read")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
