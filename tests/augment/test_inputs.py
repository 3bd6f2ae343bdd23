"""What cannot be meant is refused in one line while a program is traced, and costs it nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import (
    DESCRIPTORS,
    AugmentSpec,
    Descriptor,
    View,
    apply,
    augment,
    center_view,
    concatenate,
    denormalize,
    describe,
    difference,
    draw,
    identity_descriptor,
    identity_difference,
)

pytestmark = pytest.mark.usefixtures("as_a_library")

SPEC = AugmentSpec(8, jitter=0, grayscale=0, blur=0)
KEY = jax.random.key(0)
BYTES = np.zeros((12, 10, 3), np.uint8)
FLOATS = np.full((12, 10, 3), 0.5, np.float32)
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


class _Tensor:
    """What PyTorch's loaders give: NumPy does not know its dtype."""

    shape, dtype = (12, 10, 3), object()


IMAGES = {
    "grey": (BYTES[..., 0], r"shape \(12, 10\), that of a grey image; use .*np\.stack"),
    "grey channel": (BYTES[..., :1], r"shape \(12, 10, 1\), that of a grey image; .*np\.repeat"),
    "RGBA": (np.zeros((12, 10, 4), np.uint8), r"transparency; use its RGB, as by image\[\.\.\., :"),
    "channels first": (np.zeros((3, 12, 10), np.uint8), r"channels first; .*transpose\(1, 2, 0\)"),
    "two channels": (BYTES[..., :2], r"\(12, 10, 2\), which lacks RGB's three channels"),
    "batch": (BYTES[None], r"shape \(1, 12, 10, 3\), that of a batch.* use jax\.vmap"),
    "row": (BYTES[0, 0], r"shape \(3,\), that of no image"),
    "empty": (BYTES[:0], r"shape \(0, 10, 3\), which has no pixels"),
    "0 to 255": (255 * FLOATS, r"floats from 127\.5 to 127\.5; use .*image / 255, or uint8"),
    "−1 to 1": (2 * FLOATS - 1.5, r"floats from -0\.5 to -0\.5; use floats in \[0, 1\]"),
    "NaN": (np.nan * FLOATS, r"floats from nan to nan"),
    "float64": (FLOATS.astype(np.float64), r"dtype float64; use float32, as by image\.astype"),
    "long double": (FLOATS.astype(np.longdouble), r"dtype float128; use float32"),
    "int32": (BYTES.astype(np.int32), r"dtype int32; use uint8, or float32 in \[0, 1\]"),
    "list": (BYTES.tolist(), r"image is a list; use an array"),
    "of another library": (_Tensor(), r"image is a _Tensor; use an array, as by np\.asarray"),
    "other byte order": (FLOATS.astype(">f4"), r"dtype >f4; use float32, as by image\.astype"),
}


@pytest.fixture(scope="module")
def view():
    return augment(KEY, BYTES, SPEC)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_cannot_be_meant_is_one_line(name, view):
    image, message = IMAGES[name]
    for use in (
        lambda: augment(KEY, image, SPEC),
        lambda: apply(image, view.params, SPEC),
        lambda: center_view(image, None, SPEC),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            use()
        assert "\n" not in str(refused.value)


def test_it_is_refused_while_it_is_traced():
    compiled = jax.jit(jax.vmap(lambda image: augment(KEY, image, SPEC).image))
    with pytest.raises(ValueError, match="that of a grey image"):
        jax.eval_shape(compiled, jax.ShapeDtypeStruct((4, 12, 10), jnp.uint8))
    with pytest.raises(ValueError, match="that of a batch"):
        jax.eval_shape(compiled, jax.ShapeDtypeStruct((4, 2, 12, 10, 3), jnp.uint8))


@pytest.mark.parametrize("floats", [255 * FLOATS, FLOATS - 1])
def test_a_view_of_traced_floats_that_cannot_be_meant_is_nan(floats):
    def views(image, size):
        view = augment(KEY, image, SPEC, size)
        return view.image, view.color_diff, center_view(image, size, SPEC)

    compiled = jax.jit(jax.vmap(views))
    size = np.array([[8, 9]], np.int32)
    assert all(np.isnan(each).all() for each in compiled(floats[None], size)[::2])
    # What lies beyond the picture may be anything finite.
    padded = np.where((np.arange(12) < 8)[:, None, None], FLOATS, floats)
    for found, wanted in zip(
        compiled(padded[None], size), compiled(FLOATS[None], size), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("spec", [224, {"size": 224}, None])
def test_anything_but_a_spec_is_one_line(spec, view):
    for use in (
        lambda: augment(KEY, BYTES, spec),
        lambda: draw(KEY, np.array([12, 10]), spec),
        lambda: apply(BYTES, view.params, spec),
        lambda: center_view(BYTES, None, spec),
        lambda: describe(view, spec),
        lambda: denormalize(view.image, spec),
    ):
        with pytest.raises(ValueError, match=r"spec is of type \w+; use an AugmentSpec, as by"):
            use()


def test_a_view_for_its_parameters_and_the_reverse_is_one_line(view):
    for use, said in (
        (lambda: apply(BYTES, view, SPEC), "params is of type View; use ViewParams, such as"),
        (lambda: describe(view.params, SPEC), "view is of type ViewParams; use a View, as by"),
        (lambda: difference(view, view.image, SPEC), r"view is of type \w+; use a View, as by"),
        (lambda: concatenate(view, ["crop"]), "descriptors is of type View; use a dict, as by"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            use()


def test_values_of_a_traced_image_are_not_looked_at():
    with jax.transfer_guard("disallow"):
        traced = jax.jit(lambda image: augment(KEY, image, SPEC).image).trace(
            jax.ShapeDtypeStruct(FLOATS.shape, jnp.float32)
        )
    assert "callback" not in str(traced.jaxpr)


def test_padding_may_hold_anything():
    canvas = np.full((12, 10, 3), 99, np.float32)
    canvas[:6, :5] = 0.5
    size = np.array([6, 5], np.int32)
    np.testing.assert_array_equal(
        augment(KEY, canvas, SPEC, size).image, augment(KEY, canvas[:6, :5], SPEC).image
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (np.array([12, 10, 3]), r"size has shape \(3,\) .*two integers"),
        (np.array([12.0, 10.0]), r"dtype float64; use two integers"),
        (np.array([[12, 10]] * 2), r"shape \(2, 2\) .* jax\.vmap for several"),
        (np.array([0, 10]), r"size=\(0, 10\) is not the size of a picture; use at least 1×1"),
        (np.array([13, 10]), r"size=\(13, 10\) .* at most the canvas's 12×10"),
    ],
)
def test_a_size_that_is_none(size, message):
    with pytest.raises(ValueError, match=message):
        augment(KEY, BYTES, SPEC, size)
    with pytest.raises(ValueError, match=message):
        center_view(BYTES, size, SPEC)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (0, "0"),
        (None, "None"),
        (np.int32(3), r"int32\[\]"),
        (jnp.zeros(3, jnp.uint32), r"uint32\[3\]"),
        (jnp.zeros(2), r"float32\[2\]"),
        (BYTES, r"uint8\[12, 10, 3\]"),  # arguments in another order
    ],
)
def test_a_key_that_is_none(key, named):
    with pytest.raises(ValueError, match=rf"^key={named} is not a random key; use one, as by"):
        augment(key, BYTES, SPEC)
    if key is not None:
        spec = dataclasses.replace(SPEC, jitter_order="batch")
        with pytest.raises(ValueError, match=rf"^order_key={named} is not a random key"):
            augment(KEY, BYTES, spec, order_key=key)


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)])
@pytest.mark.parametrize("order_key", [jax.random.key(4), jax.random.PRNGKey(4)])
def test_keys_of_both_kinds_draw_the_same(key, order_key):
    spec, size = dataclasses.replace(SPEC, jitter_order="batch"), np.array([12, 10])
    drawn = draw(key, size, spec, order_key)
    expected = draw(jax.random.key(3), size, spec, jax.random.key(4))
    for name in ("crop", "jitter_order"):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(expected, name))


def test_keys_of_two_generators_are_one_line():
    other = jax.random.key(4, impl="rbg")
    with pytest.raises(ValueError, match=r"^order_key is a key<rbg> and key a key<fry>; use keys"):
        draw(KEY, np.array([12, 10]), AugmentSpec(8, jitter_order="batch"), other)
    draw(KEY, np.array([12, 10]), SPEC, other)  # which uses no order_key


def test_64_bits_change_neither_a_view_nor_its_omega():
    """They drew other augmentations from the same key, and doubled the memory of a view."""
    spec = AugmentSpec(8, solarize=0.5, rotation=0.5)

    @jax.jit
    def views(key):
        first = augment(key, IMAGE, spec)
        second = augment(jax.random.fold_in(key, 1), IMAGE, spec, np.array([9, 7]))
        omegas = describe(first, spec), difference(first, second, spec)
        centre = center_view(IMAGE, None, spec)
        return first, second, omegas, centre, denormalize(centre, spec)

    keys = jax.random.split(KEY, 4)
    expected = jax.vmap(views)(keys)
    with jax.enable_x64(True):
        found = jax.vmap(views)(keys)
    for own, before in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.dtype == before.dtype
        np.testing.assert_array_equal(own, before)


def test_settings_at_their_bounds_give_numbers():
    bounds = dict.fromkeys(("brightness", "contrast", "saturation"), (1e30, 1e30))
    spec = AugmentSpec(8, jitter=1, blur=1, sigma=(1e-6, 1e-6), crop_aspect=(1e30, 1e30), **bounds)
    assert np.isfinite(augment(KEY, BYTES, spec).image).all()


def test_several_keys_views_or_parameters_want_vmap(view):
    with pytest.raises(ValueError, match=r"key has shape \(2,\).* use jax\.vmap for several"):
        draw(jax.random.split(KEY), np.array([12, 10]), SPEC)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), view)
    for use in (
        lambda: apply(BYTES, several.params, SPEC),
        lambda: describe(several, SPEC),
        lambda: difference(view, several, SPEC),
    ):
        with pytest.raises(ValueError, match=r"params\.crop has shape \(4, 4\).* use jax\.vmap"):
            use()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": np.float32([0, 0, 32, 32])}, r"params\.crop=.*32.* out of range; use 0 to 1"),
        ({"crop": np.float32([0.5, 0, 0.6, 1])}, r"params\.crop=.* is not a box within the pic"),
        ({"crop": np.float32([0, 0, 1, 0])}, r"params\.crop=.* use a height and width above 0"),
        ({"jitter": np.True_, "hue": np.float32(36)}, r"params\.hue=36\.0 .*use -0\.5 to 0\.5"),
        ({"jitter": np.True_, "contrast": np.float32(-1)}, r"params\.contrast=-1\.0 .* 0 to inf"),
        ({"blur": np.True_, "sigma": np.float32(0)}, r"params\.sigma=0\.0 is out of range"),
        ({"turns": np.int32(90)}, r"params\.turns=90 is out of range; use 0 to 3"),
        ({"jitter_order": np.int32([0, 0, 1, 2])}, r"jitter_order=\[0, 0, 1, 2\] is not an order"),
    ],
)
def test_parameters_out_of_range_make_no_view_and_no_descriptor(view, wrong, message):
    params = view.params.replace(**wrong)
    with pytest.raises(ValueError, match=message):
        apply(BYTES, params, SPEC)
    with pytest.raises(ValueError, match=message):
        describe(View(image=view.image, params=params, color_diff=view.color_diff), SPEC)


def test_what_is_not_applied_may_have_any_value(view):
    params = view.params.replace(blur=np.False_, sigma=np.float32(0), jitter=np.False_)
    apply(BYTES, params.replace(hue=np.float32(9)), SPEC)


@pytest.mark.parametrize(
    "given",
    [
        {"flip": True, "grayscale": False, "turns": 1, "crop": [0, 0, 1, 1]},
        {"jitter": 1, "jitter_order": [2, 0, 3, 1], "brightness": 1.25, "hue": np.float64(0.25)},
    ],
)
def test_parameters_may_be_pythons_numbers(view, given):
    spec = AugmentSpec(8, kernel_size=3, rotation=1)

    def seen(given):
        changed = apply(BYTES, view.params.replace(**given), spec)
        by_hand = View(changed.image, view.params.replace(**given), changed.color_diff)
        return changed, describe(changed, spec), difference(by_hand, view, spec)

    arrays = {name: jnp.asarray(value) for name, value in given.items()}
    jax.tree.map(np.testing.assert_array_equal, seen(given), seen(arrays))


@pytest.fixture
def relative(view, monkeypatch):
    """relative(read, compare): a view's difference from itself in an entry of one's own."""

    def of_own(read, compare):
        own = Descriptor(
            ("tilted",), read, "rotation", "binary", (0,), compare, alike=(1,), predicted=True
        )
        monkeypatch.setitem(DESCRIPTORS, "own", own)
        return difference(view, view, SPEC)["own"]

    return of_own


def test_an_entry_may_return_truths_and_whole_numbers(relative):
    result = relative(lambda view, _: view.params.flip[None], lambda *_: jnp.ones(1, bool))
    assert (result.shape, result.dtype) == ((1,), jnp.float32)
    assert identity_difference(["own"]).dtype == identity_descriptor(["own"]).dtype == jnp.float32


@pytest.mark.parametrize("function", ["read", "compare"])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_an_entry_of_another_number_of_values_is_refused(relative, function, shape):
    """A head's loss would spread one value per view over all outputs of the batch."""
    fits = {"read": lambda *_: jnp.ones(1), "compare": lambda *_: jnp.ones(1)}
    with pytest.raises(ValueError, match=rf"^{function} of the descriptor 'own' returns shape \("):
        relative(**fits | {function: lambda *_: jnp.ones(shape)})


def test_one_text_is_no_tuple_of_components():
    with pytest.raises(ValueError, match=r"^components='tilt' is one name; use a tuple, \('tilt',"):
        Descriptor("tilt", lambda *_: jnp.zeros(1), setting="rotation")


def test_descriptors_of_another_width_are_not_concatenated(view):
    descriptors = describe(view, SPEC)
    with pytest.raises(ValueError, match=r"descriptor 'crop' has shape \(3,\); use \[\.\.\., 4\]"):
        concatenate({**descriptors, "crop": descriptors["crop"][:3]}, ("blur", "crop"))
    with pytest.raises(ValueError, match=r"descriptor 'crop' is missing"):
        concatenate({"blur": descriptors["blur"]}, ("blur", "crop.row"))


def test_pictures_have_their_channels_last(view):
    with pytest.raises(ValueError, match=r"\(3, 8, 8\); use \[\.\.\., height, width, 3\]"):
        denormalize(view.image.transpose(2, 0, 1), SPEC)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": float("nan")}, r"augment\.size=nan .*integer >= 1"),
        ({"size": "8"}, r"augment\.size='8' .*integer >= 1"),
        ({"crop": "no"}, r"augment\.crop='no' is not valid; use True or False"),
        ({"flip": "often"}, r"augment\.flip='often' is not a probability"),
        ({"sigma": ("a", 2)}, r"augment\.sigma=.*no number; use \(low, high\)"),
        ({"sigma": None}, r"augment\.sigma=None does not have 2 values; use \(low, high\)"),
    ],
)
def test_settings_of_another_type_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AugmentSpec(**{"size": 8, **settings})
