"""The families of drawn images by name, and how to open their splits."""

from cassle_jax.data.errors import DataError
from cassle_jax.data.factors import Drawn
from cassle_jax.data.motifs import Motifs
from cassle_jax.data.scenes import Scenes

FAMILIES: dict[str, type[Drawn]] = {family.FAMILY: family for family in (Motifs, Scenes)}
SPLITS = ("train", "validation", "test")
_MOST = 2**31  # images; no memory holds the factors of as many
_TEST_SHARE = 5


def open_drawn(family: str, count: int, size: int, split: str) -> Drawn:
    """Opens an embedded dataset: `count` images in 'train', a fifth each in the other splits.

    Args:
      family: a name in `FAMILIES`.
      count: number of images in 'train'.
      size: side of an image in pixels.
      split: one of `SPLITS`.

    Raises:
      DataError: unknown split, a count or size too small, or a count too large.
    """
    if split not in SPLITS:
        raise DataError(
            f"data.source={family!r} has no split {split!r}; there: {', '.join(SPLITS)}"
        )
    if not 1 <= count < _MOST:
        raise DataError(f"data.scenes={count} cannot be drawn; use 1 or more, below 2**31")
    if size < 8:
        raise DataError(f"data.canvas={size} is too small for a scene; use 8 or more")
    images = count if split == "train" else -(-count // _TEST_SHARE)
    return FAMILIES[family](images, seed=0, size=size, split=split)
