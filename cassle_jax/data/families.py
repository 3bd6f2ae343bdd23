"""The families of drawn images by name, and how to open their splits."""

from cassle_jax.data.errors import DataError
from cassle_jax.data.factors import Drawn
from cassle_jax.data.motifs import Motifs
from cassle_jax.data.scenes import Scenes

FAMILIES: dict[str, type[Drawn]] = {family.FAMILY: family for family in (Motifs, Scenes)}
SPLITS = ("train", "validation", "test")
_TEST_SHARE = 5


def open_drawn(family: str, count: int, size: int, split: str) -> Drawn:
    """Opens an embedded dataset: `count` images in 'train', a fifth each in the other splits.

    Args:
      family: a name in `FAMILIES`.
      count: number of images in 'train'.
      size: side of an image in pixels.
      split: one of `SPLITS`.

    Raises:
      DataError: unknown split, or a count or size too small.
    """
    if split not in SPLITS:
        raise DataError(
            f"data.source={family!r} has no split {split!r}; there: {', '.join(SPLITS)}"
        )
    if count < 1:
        raise DataError(f"data.scenes={count} draws nothing; use 1 or more")
    if size < 8:
        raise DataError(f"data.canvas={size} is too small for a scene; use 8 or more")
    images = count if split == "train" else -(-count // _TEST_SHARE)
    return FAMILIES[family](images, seed=0, size=size, split=split)
