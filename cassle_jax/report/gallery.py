"""Formats rows of pictures as HTML with embedded image data."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from cassle_jax.evaluation.findings import Pixels

_LARGEST = 224
_SMALL = 64


def rows_html(rows: Sequence[Sequence[tuple[Pixels, str]]]) -> str:
    """Formats one list per row and one item per picture, with the caption underneath.

    A page holds hundreds of pictures: they shrink to at most 224 pixels, and become JPEGs above 64
    pixels. Smaller pictures are stored without loss.

    Args:
      rows: Rows of (picture, caption); pictures are uint8 RGB of any size. The page highlights the
        first picture of a row.

    Returns:
      ``<div class="strip">`` elements.
    """
    return "".join(f'<div class="strip">{"".join(map(_item, row))}</div>' for row in rows)


def _item(picture: tuple[Pixels, str]) -> str:
    pixels, caption = picture
    image = Image.fromarray(pixels)
    image.thumbnail((_LARGEST, _LARGEST))
    small = max(image.size) <= _SMALL
    kind, options = ("png", {"optimize": True}) if small else ("jpeg", {"quality": 88})
    file = io.BytesIO()
    image.save(file, kind, **options)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    text, marked = escape(caption), ' class="pixels"' if small else ""
    return (
        f'<figure><img{marked} alt="{text}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
