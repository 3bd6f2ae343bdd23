"""Finds features of a tfds builder, such as the image and the label, in nested dictionaries."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds

FeaturePath = tuple[str, ...]
"""The names that lead to a feature in nested dictionaries of features."""


def image_path(features) -> FeaturePath | None:
    """Path of the image: 'image', else the first in colour; `None` without one."""
    images = [
        path
        for path, feature in leaves(features)
        if isinstance(feature, tfds.features.Image) and feature.np_dtype in (np.uint8, np.uint16)
    ]
    in_grey = {path: value_at(features, path).shape[-1] != 3 for path in images}
    return min(images, key=lambda path: (path != ("image",), in_grey[path]), default=None)


def label_path(features) -> FeaturePath | None:
    """Path of the label: 'label', else the first `ClassLabel`; `None` without one."""
    labels = [
        path for path, feature in leaves(features) if isinstance(feature, tfds.features.ClassLabel)
    ]
    return min(labels, key=lambda path: path != ("label",), default=None)


def leaves(features, path: FeaturePath = ()) -> Iterator[tuple[FeaturePath, object]]:
    """The features with their paths, ordered by name; those inside `path` where it is given."""
    # As they are read from a file, their order differs from process to process.
    for key, feature in sorted(features.items(), key=lambda each: each[0]):
        if isinstance(feature, tfds.features.FeaturesDict):
            yield from leaves(feature, (*path, key))
        else:
            yield (*path, key), feature


def features_at(features, paths: Sequence[FeaturePath]) -> tfds.features.FeaturesDict:
    """The features at `paths` alone, nested as before."""
    return tfds.features.FeaturesDict(nested({path: value_at(features, path) for path in paths}))


def nested(values: Mapping[FeaturePath, object]) -> dict:
    """Nested dictionaries of values by path."""
    tree: dict = {}
    for path, value in values.items():
        level = tree
        for key in path[:-1]:
            level = level.setdefault(key, {})
        level[path[-1]] = value
    return tree


def value_at(tree, path: FeaturePath):
    """The value at a path in nested dictionaries."""
    for key in path:
        tree = tree[key]
    return tree
