"""Images of objects in several views, which differ in known factors: 3DIEBench's."""

import functools
import io
import math
import pathlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from cassle_jax.data.errors import DataError
from cassle_jax.data.factors import COLOUR, Factor
from cassle_jax.data.listing import is_folder, local_root
from cassle_jax.data.sources import (
    Record,
    Source,
    check_index,
    content_of_files,
    digest_of,
    read_image,
)
from cassle_jax.faults import reason_of
from cassle_jax.storage import is_there, read_whole

LATENTS = 7
"""Numbers per image: angles about x, y and z, floor hue, light θ, light φ, light hue."""

RENDERED: dict[str, Factor] = {
    "rotation": Factor("rotation", (-math.pi / 2, math.pi / 2), group="pose"),
    "floor hue": Factor("value", (0.0, 1.0), group=COLOUR),
    "light hue": Factor("value", (0.0, 1.0), group=COLOUR),
    "light theta": Factor("value", (0.0, math.pi / 4), group="light"),
    "light phi": Factor("angle", (0.0, 2 * math.pi), group="light"),
}
"""The factors in which the views of an object differ; hues are numbers, as published."""


class ObjectSource(Source, Protocol):
    """Images of objects: `views` consecutive images show one object.

    They differ in the factors `changing`, whose values are known.
    """

    views: int
    changing: Mapping[str, Factor]

    def factors_of(self, places: Int[np.ndarray, " images"]) -> dict[str, np.ndarray]:
        """The values of `changing` for some images; [images, 3] for a rotation.

        Raises:
          DataError: they cannot be read.
        """
        ...


class RenderedObjects:
    """3DIEBench: `<path>/<class>/<object>/image_<k>.jpg`, and beside each its `latent_<k>.npy`.

    The objects of a split are listed in `<path>/<split>_images.npy`, as '/<class>/<object>/'.
    Images come by class, then by object, then by view.
    """

    def __init__(self, path: str, split: str):
        """Reads the list, counts the views of the first object, and reads its numbers.

        Args:
          path: root of the folder.
          split: 'train' or 'val'.

        Raises:
          DataError: the folder, the list, a class, or the first object's images or numbers are
            missing or of another form.
        """
        root = local_root(path, "the root of <class>/<object>/image_0.jpg")
        self._list = root / f"{split}_images.npy"
        self._objects = _listed(self._list)
        self.name, self.root = f"{root} {split}", str(root)
        folders = [each.split("/")[0] for each in self._objects]
        self.class_names = tuple(sorted(set(folders)))
        missing = [name for name in self.class_names if not is_folder(root / name)]
        if missing:
            raise DataError(
                f"data.path={path!r} lacks {len(missing)} of the {len(self.class_names)} class "
                f"folders of {self._list.name}, the first is {missing[0]!r}"
            )
        self.changing = RENDERED
        self.views = _count_views(root / self._objects[0])
        self._classes = np.searchsorted(self.class_names, folders).astype(np.int32)
        self._numbers(0)

    def __len__(self) -> int:
        return len(self._objects) * self.views

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        path = self._path(index, "image_{}.jpg")
        return Record(read_image(path), int(self._classes[index // self.views]), str(path))

    def _path(self, index: int, file: str) -> pathlib.Path:
        place, view = divmod(index, self.views)
        return pathlib.Path(self.root, self._objects[place], file.format(view))

    @property
    def labels(self) -> Int[np.ndarray, " images"]:
        """The class of every image."""
        return np.repeat(self._classes, self.views)

    @functools.cached_property
    def content(self) -> tuple[str, int]:
        """See `content_of`; covers the list alone, as there are millions of images."""
        return content_of_files([self._list]), self.views

    def has_changed(self) -> bool:
        """See `sources.has_changed`; covers the list alone, as `content` does."""
        return content_of_files([self._list]) != self.content[0]

    @property
    def names(self) -> str:
        """See `names_of`."""
        return digest_of("\n".join(self._objects).encode(), str(self.views).encode())

    def factors_of(self, places: Int[np.ndarray, " images"]) -> dict[str, np.ndarray]:
        """See `ObjectSource`; reads one file per image."""
        numbers = np.stack([self._numbers(place) for place in places.tolist()])
        return {
            "rotation": numbers[:, :3],
            "floor hue": numbers[:, 3],
            "light hue": numbers[:, 6],
            "light theta": numbers[:, 4],
            "light phi": numbers[:, 5],
        }

    def _numbers(self, place: int) -> Float[np.ndarray, " latents"]:
        path = self._path(place, "latent_{}.npy")
        found = _array_of(path, f"the {LATENTS} numbers that the view was rendered from")
        if found.shape != (LATENTS,) or found.dtype.kind != "f" or not np.isfinite(found).all():
            raise DataError(
                f"{str(path)!r} holds {found.dtype} of shape {found.shape}; a view has {LATENTS} "
                "finite numbers: three angles, floor hue, light θ and φ, light hue"
            )
        return found.astype(np.float64)


def _listed(path: pathlib.Path) -> list[str]:
    """The objects of a list, as '<class>/<object>', sorted."""
    wanted = "the split's objects as '/<class>/<object>/', published with the SIE paper's code"
    found = _array_of(path, wanted)
    is_text = found.ndim == 1 and found.dtype.kind == "U"
    objects = sorted({each.strip("/") for each in found.tolist()}) if is_text else []
    if not objects or any(each.count("/") != 1 for each in objects):
        raise DataError(
            f"{str(path)!r} holds {found.dtype} of shape {found.shape}; it should hold {wanted}"
        )
    return objects


def _array_of(path: pathlib.Path, wanted: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(read_whole(path)))
    except Exception as error:  # A damaged file raises any type, depending on its bytes.
        raise DataError(
            f"{str(path)!r} cannot be read ({reason_of(error)}); it should hold {wanted}"
        ) from error


def _count_views(folder: pathlib.Path) -> int:
    views = 0
    while is_there(folder / f"image_{views}.jpg"):
        views += 1
    if views < 2:
        raise DataError(
            f"{str(folder)!r} has {views} of the images image_0.jpg, image_1.jpg, …; an object "
            "has two views or more"
        )
    return views
