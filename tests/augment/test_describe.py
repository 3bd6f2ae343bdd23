"""Descriptors and differences: closed forms, antisymmetry, names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import (
    CASSLE_DESCRIPTORS,
    DESCRIPTORS,
    LEAK_FREE_DESCRIPTORS,
    PALETTE,
    AugmentSpec,
    Descriptor,
    View,
    apply,
    augment,
    concatenate,
    describe,
    descriptor_width,
    difference,
    draw,
    identity_descriptor,
    identity_difference,
)
from cassle_jax.checks import ConfigError

SPEC = AugmentSpec(8, solarize=0.5, rotation=0.5)
ENTRY = {"components": ("left", "right"), "read": lambda *_: jnp.zeros(2), "setting": "rotation"}


def _view(params):
    """A view stated by what descriptors need alone."""
    count = params.flip.shape[0]
    color_diff = jax.random.uniform(jax.random.key(5), (count, 3), minval=-1)
    color_diff = jnp.where(params.jitter[:, None], color_diff, 0)
    return View(image=jnp.zeros((count, 1, 1, 3)), params=params, color_diff=color_diff)


@functools.cache
def _describe(spec=SPEC):
    return jax.jit(jax.vmap(lambda view: describe(view, spec)))


@functools.cache
def _difference():
    return jax.jit(jax.vmap(lambda one, two: difference(one, two, SPEC)))


@pytest.fixture(scope="module")
def pair():
    compiled = jax.jit(jax.vmap(lambda key: draw(key, np.array([90, 120]), SPEC)))
    return [_view(compiled(jax.random.split(jax.random.key(seed), 200))) for seed in (0, 1)]


def test_sizes(pair):
    omega = _describe()(pair[0])
    assert {name: vector.shape[1] for name, vector in omega.items()} == {
        name: each.size for name, each in DESCRIPTORS.items()
    }
    assert all(vector.dtype == jnp.float32 for vector in omega.values())


def test_alike_draws_have_alike_descriptors_but_for_those_computed_from_the_image():
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    spec = dataclasses.replace(SPEC, jitter=1)

    def omega(image):
        return describe(augment(jax.random.key(0), image, spec), spec)

    one, other = (jax.jit(omega)(image) for image in images)
    differing = {name for name in one if not np.array_equal(one[name], other[name])}
    assert differing == {name for name, each in DESCRIPTORS.items() if each.from_image}
    assert not differing & set(LEAK_FREE_DESCRIPTORS)


def test_a_view_without_augmentation_has_the_identity_descriptor(make_params):
    omega = _describe()(_view(make_params(1, brightness=1.4, sigma=2, hue=0.1)))
    names = list(DESCRIPTORS)
    np.testing.assert_array_equal(concatenate(omega, names)[0], identity_descriptor(names))


def test_steps_that_the_spec_leaves_out_are_described_as_not_applied(make_params):
    chances = dict.fromkeys(("jitter", "grayscale", "blur", "solarize", "rotation"), 0.0)
    spec = dataclasses.replace(SPEC, **chances)
    every = make_params(
        1, flip=True, jitter=True, hue=0.1, grayscale=True, blur=True, solarize=True, turns=1
    )
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    view = jax.jit(apply, static_argnums=2)(image, jax.tree.map(lambda each: each[0], every), spec)
    mirrored = image[:, ::-1] / 255
    np.testing.assert_allclose(view.image, (mirrored - spec.mean) / spec.std, atol=1e-5)
    omega = describe(view, spec)
    assert omega.pop("flip") == 1
    np.testing.assert_array_equal(concatenate(omega, omega), identity_descriptor(omega))


def test_each_descriptor_by_hand(make_params):
    params = make_params(
        1,
        crop=[0.1, 0.2, 0.4, 0.6],
        flip=True,
        jitter=True,
        brightness=1.4,
        contrast=0.6,
        saturation=1.2,
        hue=-0.05,
        grayscale=True,
        blur=True,
        sigma=1.5,
        solarize=True,
        solarize_threshold=0.25,
        turns=3,
    )
    omega = _describe()(_view(params))
    expected = {
        "blur": [1.5],
        "color": [0.5, -0.5, 0.25, -0.25],
        "crop": [0.3, 0.5, 0.4, 0.6],
        "flip": [1],
        "grayscale": [1],
        "rotation": [0, 0, 0, 1],
        "solarize": [0.25],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(omega[name][0], value, atol=1e-6, err_msg=name)


def test_color_stays_within_a_half(pair):
    color = _describe()(pair[0])["color"]
    assert np.abs(color).max() <= 0.5 + 1e-6
    assert np.abs(color).max() > 0.45


def test_a_range_without_width_is_described_by_zero(make_params):
    spec = dataclasses.replace(SPEC, hue=(0.0, 0.0))
    omega = _describe(spec)(_view(make_params(1, jitter=True, brightness=1.2)))
    np.testing.assert_allclose(omega["color"][0], [0.25, 0, 0, 0], atol=1e-6)


def test_the_mirrored_box_is_where_the_view_shows_it(make_params):
    left_half = make_params(2, crop=[0, 0, 1, 0.5], flip=[False, True])
    crop = _describe()(_view(left_half))["crop"]
    np.testing.assert_allclose(crop, [[0.5, 0.25, 1, 0.5], [0.5, 0.75, 1, 0.5]], atol=1e-6)


def test_differences_are_antisymmetric(pair):
    forth, back = _difference()(*pair), _difference()(*pair[::-1])
    for name in ("blur", "color", "color_diff", "grayscale", "solarize"):
        np.testing.assert_allclose(forth[name], -back[name], atol=1e-6)
    np.testing.assert_array_equal(forth["flip"], back["flip"])
    classes = forth["rotation"].argmax(1) + back["rotation"].argmax(1)
    np.testing.assert_array_equal(classes % 4, np.zeros(200))
    # The frame is view 1's: columns change their sign only where both views are flipped alike.
    same = np.asarray(forth["flip"])
    signs = np.concatenate([-np.ones((200, 1)), 1 - 2 * same, -np.ones((200, 2))], axis=1)
    np.testing.assert_allclose(forth["crop"], signs * back["crop"], atol=1e-6)


def test_a_view_does_not_differ_from_itself(pair):
    differences = _difference()(pair[0], pair[0])
    expected = {"flip": np.ones((200, 1)), "rotation": np.tile([1.0, 0, 0, 0], (200, 1))}
    for name, value in differences.items():
        np.testing.assert_allclose(value, expected.get(name, np.zeros_like(value)), atol=1e-7)
    np.testing.assert_allclose(
        concatenate(differences, DESCRIPTORS)[0],
        identity_difference(DESCRIPTORS),
        atol=1e-7,
    )


def test_rotation_difference_is_a_class(make_params):
    turns_1, turns_2 = np.divmod(np.arange(16), 4)
    views = [_view(make_params(16, turns=turns)) for turns in (turns_1, turns_2)]
    classes = _difference()(*views)["rotation"].argmax(1)
    np.testing.assert_array_equal(classes, (turns_1 - turns_2) % 4)


@pytest.mark.parametrize("kind", ["binary", "class"])
def test_a_head_for_classes_needs_a_difference_that_is_a_class(kind):
    # The difference of one-hot numbers has a 1, a -1 or neither, and cross-entropy takes it.
    one = {**ENTRY, "components": ("tilted",), "kind": kind, "neutral": (1.0,)}
    with pytest.raises(ValueError, match=f"cannot predict .*kind='{kind}'.*; set compare"):
        Descriptor(**one, predicted=True)
    Descriptor(**one)
    Descriptor(**one, predicted=True, compare=lambda *_: jnp.ones(1), alike=(1.0,))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"kind": "class"}, r"neutral=\(0.0, 0.0\) is none of the classes .*; use 1 for one"),
        ({"neutral": (1.0,)}, r"neutral=\(1.0,\) does not have one number .*; use 2"),
        ({"alike": (1.0, 0.0, 0.0)}, r"alike=\(1.0, 0.0, 0.0\) does not have .*; use 2"),
        ({"kind": "binary"}, r"kind='binary' is one number.*; use one, or kind='class'"),
        ({"setting": "turns"}, r"setting='turns' is unknown; use one of blur, crop, "),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused(fault, message):
    Descriptor(**ENTRY)
    with pytest.raises(ValueError, match=message):
        Descriptor(**{**ENTRY, **fault})


def test_concatenation_is_alphabetical(pair):
    omega = _describe()(pair[0])
    vector = concatenate(omega, ("flip", "crop", "blur"))
    np.testing.assert_array_equal(
        vector, np.concatenate([omega["blur"], omega["crop"], omega["flip"]], axis=1)
    )


def test_widths():
    assert descriptor_width(CASSLE_DESCRIPTORS) == 13
    assert descriptor_width(()) == 0
    widths = {"blur": 1, "color": 4, "color_diff": 3, "crop": 4, "flip": 1, "grayscale": 1}
    widths |= {"palette": 6 * 3, "rotation": 4, "solarize": 1}
    assert widths == {name: descriptor_width((name,)) for name in widths}
    assert descriptor_width(widths) == sum(widths.values())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("color", r"descriptors='color' is not a tuple of names; use \('color',\)"),
        (
            ("crop,hue+flip",),
            r"='crop,hue\+flip' is not a tuple of names; use \('crop', 'hue', 'flip'\)",
        ),
        (("(crop, hue)",), r"='\(crop, hue\)' is not a tuple of names; use \('crop', 'hue'\)"),
        (("crop", "zoom"), r"unknown name 'zoom'; use any of blur, color, "),
        (("color.tint",), r"unknown name 'color.tint'; use any of color.brightness, "),
        (("crop", "crop"), r"names 'crop' twice; name each once"),
        (("color", "color.hue"), r"names 'color.hue' twice; name each once"),
    ],
)
def test_unknown_and_repeated_names(names, message):
    for function in (descriptor_width, identity_descriptor, identity_difference):
        with pytest.raises(ValueError, match=message):
            function(names)


@pytest.mark.parametrize("name", ["own.blur", "own:blur"])
def test_an_entry_whose_name_has_a_sign_of_the_settings_is_refused(name, monkeypatch):
    """Its width was that of one component, and its numbers a KeyError."""
    monkeypatch.setitem(DESCRIPTORS, name, DESCRIPTORS["color"])
    for function in (descriptor_width, identity_descriptor, identity_difference):
        with pytest.raises(ConfigError, match=f"the name '{name}', .*; use letters, digits and _"):
            function((name,))


def test_components_are_the_numbers_of_their_descriptors(pair):
    omega = _describe()(pair[0])
    vector = concatenate(omega, ("grayscale", "color.saturation", "color.hue", "crop.row"))
    expected = [omega["color"][:, 3], omega["color"][:, 2], omega["crop"][:, 0]]
    np.testing.assert_array_equal(vector[:, :3], np.stack(expected, axis=1))
    assert descriptor_width(("color.hue", "crop")) == vector.shape[1] + 1 == 5
    np.testing.assert_array_equal(identity_descriptor(("crop.height", "flip")), [1, 0])


def test_the_palette_is_what_the_jitter_does_to_its_colours(make_params):
    """Brightness and contrast by hand, in both orders; the mean grey is the palette's own."""
    weights = np.array([0.2989, 0.587, 0.114])
    for order in ((0, 1, 2, 3), (3, 1, 2, 0)):
        params = make_params(
            1, jitter=True, brightness=1.3, contrast=0.7, jitter_order=np.array(order)
        )
        colours = PALETTE.astype(np.float64)
        for operation in order:
            if operation == 0:
                colours = np.clip(1.3 * colours, 0, 1)
            if operation == 1:
                colours = np.clip(0.7 * colours + 0.3 * (colours @ weights).mean(), 0, 1)
        found = _describe()(_view(params))["palette"][0]
        np.testing.assert_allclose(found, (colours - PALETTE).ravel(), rtol=0, atol=1e-6)
    untouched = _describe()(_view(make_params(1, brightness=1.3)))["palette"]
    np.testing.assert_array_equal(untouched, np.zeros((1, 18)))


def test_names_that_are_not_there(pair):
    differences = _difference()(*pair)
    with pytest.raises(ValueError, match=r"descriptors=\['zoom'\] has the unknown"):
        concatenate(differences, ("zoom",))
    with pytest.raises(ValueError, match="leaves nothing to concatenate"):
        concatenate(differences, ())
