"""Re-encodes an image whose short side is larger than requested."""

import io

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from cassle_jax.data.decode import ANY_SIDE, decode

_LONGEST_JPEG = 65_500  # pixels on a side, with which libjpeg-turbo writes a JPEG


def reencoded(image: bytes | UInt8[np.ndarray, "..."], short_side: int, quality: int) -> bytes:
    """An image file of at most `short_side` pixels on its short side, aspect ratio kept.

    A file that is no larger stays as it is, byte for byte; an array that is no larger becomes a
    PNG. Anything larger becomes an upright RGB JPEG, reduced by Pillow's bicubic filter; a PNG
    where it is longer than a JPEG may be.

    Args:
      image: the bytes of an image file, or uint8 pixels of shape [height, width, 1 or 3].
      short_side: largest short side, pixels.
      quality: JPEG quality, 1 to 100.

    Raises:
      DamagedImage: the image cannot be decoded completely.
    """
    pixels = decode(image, ANY_SIDE)
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale < 1:
        size = max(1, round(scale * width)), max(1, round(scale * height))
        reduced = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(reduced)
        if max(size) <= _LONGEST_JPEG:
            return simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420")
    elif isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
