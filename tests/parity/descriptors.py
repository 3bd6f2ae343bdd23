"""Whole views, their descriptors and their differences against the published code's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cassle_jax.augment import (
    CASSLE_DESCRIPTORS,
    AugmentSpec,
    View,
    concatenate,
    describe,
    difference,
)
from tests.augment.view_params import view_params
from tests.parity.comparison import Comparison
from tests.parity.golden_file import GoldenFile
from tests.parity.operations import BOUND, compiled_apply

DESCRIPTORS = ("blur", "color", "color_diff", "crop", "flip", "grayscale")
DIFFERENCES = ("blur", "color", "color_diff", "crop", "flip")


def compare_descriptors(golden: GoldenFile, comparison: Comparison) -> None:
    images = golden["images"]
    size = images.shape[1]
    # The published code has nine taps for everything but 224 pixels.
    spec = AugmentSpec(size, kernel_size=23 if size == 224 else 9)

    views = []
    for index in (1, 2):
        params = view_params(len(images), **_published_params(golden, index))
        view = compiled_apply(spec)(images, params)
        comparison.absolute("views", view.image, golden, f"view_{index}", BOUND)
        # The images are not cropped, but described as if they were.
        params = params.replace(crop=jnp.asarray(golden[f"crop_{index}"]))
        views.append(View(image=view.image, params=params, color_diff=view.color_diff))

    # One program for both views, and one for both directions.
    described = jax.jit(jax.vmap(functools.partial(describe, spec=spec)))
    differing = jax.jit(jax.vmap(functools.partial(difference, spec=spec)))
    for index, view in enumerate(views, 1):
        omega = described(view)
        for name in DESCRIPTORS:
            entry = f"descriptor_{index}_{name}"
            comparison.absolute("descriptors", omega[name], golden, entry, BOUND)
        expected = [golden[f"descriptor_{index}_{name}"] for name in CASSLE_DESCRIPTORS]
        joined = concatenate(omega, CASSLE_DESCRIPTORS) - np.concatenate(expected, axis=1)
        comparison.within("descriptors", np.max(np.abs(joined)), BOUND, f"descriptor_{index}_*")

    for index, pair in enumerate((views, views[::-1]), 1):
        differences = differing(*pair)
        for name in DIFFERENCES:
            entry = f"difference_{index}_{name}"
            comparison.absolute("differences", differences[name], golden, entry, BOUND)


def _published_params(golden, index):
    colours = ("brightness", "contrast", "saturation", "hue")
    return {
        "flip": golden[f"flip_{index}"],
        "jitter": golden[f"jitter_applied_{index}"],
        "jitter_order": golden[f"jitter_order_{index}"],
        **{name: golden[f"{name}_factor_{index}"] for name in colours},
        "grayscale": golden[f"grayscale_{index}"],
        "blur": golden[f"blur_applied_{index}"],
        "sigma": golden[f"blur_sigma_{index}"],
    }
