"""What an AugmentSpec accepts, and what it says of what it does not."""

import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import ConfigError


@pytest.mark.parametrize(
    ("size", "taps"), [(224, 23), (96, 9), (64, 7), (32, 3), (16, 3), (384, 39)]
)
def test_derived_kernel_is_odd_and_near_a_tenth(size, taps):
    assert AugmentSpec(size).blur_kernel_size == taps


def test_values_from_a_config_file_make_a_hashable_spec():
    spec = AugmentSpec(32, crop_area=[0.2, 1], flip=1, mean=[0, 0, 0], std=[1, 1, 1])
    expected = AugmentSpec(
        32, crop_area=(0.2, 1.0), flip=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    assert spec == expected
    assert hash(spec) == hash(expected)


@pytest.fixture
def as_outside_tests(monkeypatch):
    """Nothing checks the types of arguments."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_arrays_are_the_numbers_that_they_hold(array, as_outside_tests):
    given = {"size": 32, "kernel_size": 5, "crop": False, "flip": 0.25, "crop_area": (0.5, 1.0)}
    expected = AugmentSpec(**given, std=(0.5, 0.25, 1.0), hue=(-0.25, 0.25))
    spec = AugmentSpec(
        **{name: array(value) for name, value in given.items()},
        std=array([0.5, 0.25, 1], jnp.bfloat16),
        hue=(array(-0.25), array(0.25)),
    )
    assert spec == expected and hash(spec) == hash(expected) and repr(spec) == repr(expected)
    with_strength = inspect.unwrap(AugmentSpec.with_color_strength)  # which no test checks
    assert with_strength(spec, array(0.5)) == expected.with_color_strength(0.5)


def test_what_is_traced_is_refused_in_words(as_outside_tests):
    with pytest.raises(ConfigError, match=r"^augment\.size is traced, .* outside the compiled"):
        jax.jit(lambda size: AugmentSpec(size).size)(8)


@pytest.mark.parametrize(
    ("strength", "factor", "hue", "grayscale"),
    [
        (0.5, (0.8, 1.2), 0.05, 0.1),
        (1, (0.6, 1.4), 0.1, 0.2),
        (2, (0.2, 1.8), 0.2, 0.4),
        (3, (0.0, 2.2), 0.3, 0.6),
        (0, (1.0, 1.0), 0.0, 0.0),
    ],
)
def test_color_strength(strength, factor, hue, grayscale):
    spec = AugmentSpec(32).with_color_strength(strength)
    for name in ("brightness", "contrast", "saturation"):
        assert getattr(spec, name) == pytest.approx(factor)
    assert spec.hue == pytest.approx((-hue, hue))
    assert spec.grayscale == pytest.approx(grayscale)
    assert spec.jitter == 0.8
    assert spec.sigma == (0.1, 2.0)


@pytest.mark.parametrize("strength", [-1, 5.5, float("nan")])
def test_impossible_color_strength(strength):
    with pytest.raises(ValueError, match=rf"augment\.color_strength={strength} .*use a strength"):
        AugmentSpec(32).with_color_strength(strength)


def test_a_color_strength_of_another_type_is_named():
    with_strength = inspect.unwrap(AugmentSpec.with_color_strength)
    with pytest.raises(ConfigError, match=r"^augment\.color_strength='2' is not a number; use 1"):
        with_strength(AugmentSpec(32), "2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, r"augment\.size=0 .*integer >= 1"),
        ({"size": "8"}, r"augment\.size='8' is not valid; use an integer >= 1"),
        ({"size": np.array([8])}, r"augment\.size=\[8\] is not valid; use an integer >= 1"),
        ({"crop": np.array([1, 0])}, r"augment\.crop=\[1, 0\] is not valid; use True or False"),
        ({"flip": float("nan")}, r"augment\.flip=nan is not a probability"),
        ({"hue": (0.0, float("nan"))}, r"augment\.hue=.*no number; use \(low, high\)"),
        ({"sigma": (0.1, float("inf"))}, r"augment\.sigma=.*no number; use \(low, high"),
        ({"brightness": (1, 1e39)}, r"augment\.brightness=.*too large.*both in \[0, 1e\+30\]"),
        ({"sigma": (1e-40, 1)}, r"augment\.sigma=.*too small or no number; use \(low, high"),
        ({"mean": (123.7, 116.3, 103.5)}, r"augment\.mean=.*beyond 1.* divide .* by 255"),
        ({"std": (58, 57, 57)}, r"augment\.std=.*beyond 1.* divide .* by 255"),
        ({"std": (1e-46, 1, 1)}, r"augment\.std=.*too small or no number; use three numbers"),
        ({"std": (1, float("nan"), 1)}, r"augment\.std=.*no number; use three numbers"),
        ({"kernel_size": -1}, r"augment\.kernel_size=-1 .*integer >= 0"),
        ({"kernel_size": 8}, r"augment\.kernel_size=8 is even; use an odd number such as 9"),
        ({"kernel_size": 65}, r"augment\.kernel_size=65 needs 32 pixels.*size=32.*at most 63"),
        ({"size": 1}, r"augment\.kernel_size=3 needs 1 pixels.*augment\.blur=0"),
        ({"jitter_order": "shuffled"}, r"jitter_order='shuffled' is unknown; use one of batch,"),
        ({"flip": 1.2}, r"augment\.flip=1\.2 is not a probability; use a value in \[0, 1\]"),
        ({"flip": "0.5"}, r"augment\.flip='0\.5' is not a probability; use a value in \[0, 1\]"),
        ({"hue": "-0.1,0.1"}, r"augment\.hue='-0\.1,0\.1' does not have 2 values; use \(low, hi"),
        ({"jitter": -0.1}, r"augment\.jitter=-0\.1 is not a probability"),
        ({"grayscale": 2}, r"augment\.grayscale=2 is not a probability"),
        ({"blur": float("nan")}, r"augment\.blur=nan is not a probability"),
        ({"solarize": 5}, r"augment\.solarize=5 is not a probability"),
        ({"rotation": -1}, r"augment\.rotation=-1 is not a probability"),
        ({"hue": (-0.6, 0.1)}, r"augment\.hue=\(-0\.6, 0\.1\) .*both in \[-0\.5, 0\.5\]"),
        ({"brightness": (1.4, 0.6)}, r"augment\.brightness=\(1\.4, 0\.6\) .*low <= high"),
        ({"contrast": (-0.1, 1)}, r"augment\.contrast=\(-0\.1, 1\.0\) .*both in \[0, 1e\+30\]"),
        ({"saturation": (1.0,)}, r"augment\.saturation=\(1\.0,\) does not have 2 values"),
        ({"crop_area": (0, 1)}, r"augment\.crop_area=\(0\.0, 1\.0\) .*both in \(0, 1\]"),
        ({"crop_aspect": (0, 1)}, r"augment\.crop_aspect=\(0\.0, 1\.0\) .*both in \(0, 1e\+30\]"),
        ({"sigma": (0, 2)}, r"augment\.sigma=\(0\.0, 2\.0\) .*both in \[1e-06, 1e\+30\]"),
        ({"solarize_threshold": (0, 2)}, r"augment\.solarize_threshold=.*both in \[0, 1\]"),
        ({"mean": (0.5, 0.5)}, r"augment\.mean=\(0\.5, 0\.5\) does not have 3 values"),
        ({"std": (1.0, 0.0, 1.0)}, r"augment\.std=.* not positive; use > 0"),
    ],
)
def test_wrong_settings_are_named(settings, message, as_outside_tests):
    with pytest.raises(ValueError, match=message):
        AugmentSpec(**({"size": 32} | settings))


def test_a_view_of_one_pixel_needs_no_blur():
    assert AugmentSpec(1, blur=0).size == 1
