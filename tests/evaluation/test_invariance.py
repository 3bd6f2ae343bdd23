import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from cassle_jax.augment import AugmentSpec, draw
from cassle_jax.evaluation.findings import Score, from_json, to_json
from cassle_jax.evaluation.invariance import (
    PROJECTOR,
    STAGES,
    STRENGTHS,
    WRONG_PROJECTOR,
    _stages,
    invariance_meter,
)
from cassle_jax.evaluation.views import (
    alone,
    draw_for_each,
    every_augmentation,
    plain_view,
    view_under,
)
from cassle_jax.methods import SimCLR, ViewBatch
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.models import make_encoder
from tests.evaluation.analysed import (
    COLOR_DIFF,
    PIXELS,
    PLAIN,
    SPEC,
    Colour,
    batches_of,
    colour_networks,
    cosine,
    devices,
    info_nce,
    pictures,
    similarity_of_different,
)

ALONE = ["crop", "flip", "jitter", "grayscale", "blur"]

IMAGES = pictures(6)
# σ is what it is and the kernel as wide as the view allows, so that SciPy can blur likewise.
EXACT_BLUR = dataclasses.replace(SPEC, sigma=(0.5, 0.5), kernel_size=2 * PIXELS - 1)


@functools.cache
def meter(conditioning, count, strengths):
    networks, variables = colour_networks(conditioning)
    measure = invariance_meter(
        networks, conditioning, EXACT_BLUR, devices(count), strengths=strengths
    )
    return measure, variables


def measured(conditioning=COLOR_DIFF, count=1, strengths=(), *, size=8, images=IMAGES, holes=0):
    measure, variables = meter(conditioning, count, strengths)
    return measure(variables, lambda: batches_of(images, size, holes))


@pytest.fixture(scope="module")
def invariance():
    """Everything there is, of a batch of six."""
    return measured(strengths=STRENGTHS)


def assert_agree(found, expected):
    assert found.keys() == expected.keys()
    for name, stages in expected.items():
        assert found[name].keys() == stages.keys()
        for stage, each in stages.items():
            assert dataclasses.astuple(found[name][stage]) == pytest.approx(
                dataclasses.astuple(each), rel=1e-4, abs=1e-5
            ), (name, stage)


def blurred(sigma):
    images = IMAGES.astype(float)
    for axis in (1, 2):
        images = gaussian_filter1d(images, sigma, axis=axis, mode="mirror", radius=PIXELS - 1)
    return images


def test_a_mean_colour_does_not_see_a_flip_and_pixels_do(invariance):
    stages = invariance.alone()["flip"]
    colours = IMAGES.mean((1, 2))
    for name, before, after in (
        ("stem", IMAGES, IMAGES[:, :, ::-1]),
        ("features", colours, colours),
        (PROJECTOR, colours, colours),
    ):
        found = stages[name]
        different = similarity_of_different(after, before)
        assert found.same == pytest.approx(cosine(before, after).mean(), abs=1e-5)
        assert found.different == pytest.approx(different, abs=1e-5)
        assert found.difference == pytest.approx(found.same - different, abs=1e-5)
        assert found.info_nce == pytest.approx(info_nce(after, before), rel=1e-4)
    assert stages["features"].same == pytest.approx(1, abs=1e-6)
    assert stages["stem"].same < 0.995


def test_grayscale_and_blur_change_what_they_should(invariance):
    grey = np.repeat((IMAGES @ [0.299, 0.587, 0.114])[..., None], 3, axis=-1)
    for name, after in (("grayscale", grey), ("blur", blurred(0.5))):
        stages = invariance.alone()[name]
        assert stages["stem"].same == pytest.approx(cosine(IMAGES, after).mean(), abs=1e-5)
        expected = cosine(IMAGES.mean((1, 2)), after.mean((1, 2))).mean()
        assert stages["features"].same == pytest.approx(expected, abs=1e-5)


def test_only_the_right_descriptor_undoes_the_jitter(invariance):
    stages = invariance.alone()["jitter"]
    assert stages[PROJECTOR].same == pytest.approx(1, abs=1e-5)
    assert stages[PROJECTOR].accuracy == 1
    assert stages["features"].same < 0.999
    assert stages[WRONG_PROJECTOR].same < stages["features"].same


@pytest.mark.exhaustive
def test_relative_descriptors_relate_each_view_to_the_other():
    stages = measured(dataclasses.replace(COLOR_DIFF, relative=True)).alone()["jitter"]
    # The plain image's ω takes from its colour what the augmented one's adds: they change places.
    assert stages[PROJECTOR].same == pytest.approx(stages["features"].same, abs=1e-5)
    assert stages[WRONG_PROJECTOR].same < stages[PROJECTOR].same


@pytest.mark.exhaustive
def test_a_wrong_descriptor_is_shown_where_there_is_one_and_the_encoder_hears_none(invariance):
    alone = invariance.alone()
    assert list(alone) == ALONE
    # But for the jitter, color_diff is 0 in all images.
    assert [name for name in alone if WRONG_PROJECTOR in alone[name]] == ["jitter"]
    plain = measured(PLAIN).alone()
    assert all(list(stages) == ["stem", "features", PROJECTOR] for stages in plain.values())
    without_projector = [
        {name: {stage: stages[stage] for stage in ("stem", "features")}
         for name, stages in each.items()}
        for each in (plain, alone)
    ]  # fmt: skip
    assert_agree(*without_projector)
    assert plain["jitter"][PROJECTOR].same == pytest.approx(
        plain["jitter"]["features"].same, abs=1e-6
    )


def test_images_agree_less_the_stronger_the_augmentation(invariance):
    jitter, blur = (invariance.curves(name) for name in ("jitter", "blur"))
    for curve in (jitter["features"], jitter["stem"], blur["stem"]):
        assert [strength for strength, _ in curve] == list(STRENGTHS)
        same = [found.same for _, found in curve]
        # The weakest blurs move nothing that float32 would show.
        assert (np.diff(same) < 1e-6).all() and same[-1] < same[7] < same[0]
    assert all(found.same > 0.9999 for _, found in jitter[PROJECTOR])
    assert invariance.alone()["blur"]["stem"] == dict(blur["stem"])[1.0]


def test_the_blur_is_as_wide_as_its_strength_says(invariance):
    for strength, found in invariance.curves("blur")["stem"]:
        expected = cosine(IMAGES, blurred(0.5 * strength)).mean()
        assert found.same == pytest.approx(expected, abs=1e-5), strength


@pytest.mark.exhaustive
def test_all_augmentations_and_strengths_are_one_compiled_program():
    networks, variables = colour_networks()
    measure = invariance_meter(networks, PLAIN, EXACT_BLUR, devices(1), strengths=STRENGTHS)
    Colour.traced.clear()
    measure(variables, lambda: batches_of(pictures(12), 8))
    # Once for the plain views, once for the augmented ones.
    assert len(Colour.traced) == 2


DEVICES_SIZES_HOLES = [(2, 8, 0), (1, 16, 0), (4, 12, 3)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", DEVICES_SIZES_HOLES, ids=str)
def test_devices_padding_and_damage_change_nothing(invariance, how):
    count, size, holes = how
    found = measured(count=count, size=size, holes=holes)
    assert (found.images, found.candidates) == (invariance.images, invariance.candidates) == (6, 6)
    assert_agree(found.alone(), invariance.alone())


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", [3, 4, 5])
def test_the_batch_changes_only_the_images_that_an_image_is_compared_with(invariance, size):
    # Batches of five and one: the lone image is compared with none.
    candidates = {3: 3, 4: (4 * 4 + 2 * 2) / 6, 5: 5}[size]
    found = measured(strengths=STRENGTHS, size=size)
    assert (found.images, found.candidates) == (6, pytest.approx(candidates))
    for name, stages in invariance.agreements.items():
        for stage, expected in stages.items():
            other = found.agreements[name][stage]
            assert other.info_nce < expected.info_nce
            assert (other.same, other.different) == pytest.approx(
                (expected.same, expected.different), rel=1e-5
            ), (name, stage)


@pytest.mark.exhaustive
def test_an_encoder_without_a_projector_is_compared_at_its_stages(invariance):
    measure, variables = meter(COLOR_DIFF, 1, ())
    bare = measure({"params": {}, "batch_stats": {}}, lambda: batches_of(IMAGES, 8)).alone()
    encoder = {
        name: {stage: stages[stage] for stage in ("stem", "features")}
        for name, stages in invariance.alone().items()
    }
    assert_agree(bare, encoder)
    assert "projector" in variables["params"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_a_strength_scales_the_draws_as_it_scales_the_ranges(strength):
    spec = every_augmentation(AugmentSpec(PIXELS, grayscale=0, jitter_order="batch"))
    batch = jax.tree.map(jnp.asarray, next(batches_of(IMAGES, 6)))
    key = jax.random.key(3)

    @jax.jit
    def params():
        drawn = draw_for_each(key, batch, spec)
        return view_under(alone("jitter", strength), drawn, batch, spec).params

    found = params()
    scaled = dataclasses.replace(
        dataclasses.replace(spec, grayscale=0).with_color_strength(strength),
        sigma=tuple(strength * end for end in spec.sigma),
    )
    keys = jax.vmap(partial(jax.random.fold_in, key))(batch["index"])
    expected = jax.vmap(partial(draw, spec=scaled))(keys, batch["size"])
    for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-7
        )
    assert found.jitter.all() and not (found.blur | found.grayscale | found.flip).any()
    assert (found.crop == jnp.array([0, 0, 1, 1])).all()


def test_the_plain_view_is_the_centred_square():
    wide = np.zeros((1, PIXELS, 3 * PIXELS, 3), np.uint8)
    wide[:, :, PIXELS : 2 * PIXELS] = pictures(1)
    batch = jax.tree.map(jnp.asarray, next(batches_of(wide, 1)))
    view = jax.jit(partial(plain_view, spec=SPEC))(batch)
    np.testing.assert_allclose(view.image, pictures(1) / 255, atol=1e-6)
    assert not any((view.params.flip, view.params.jitter, view.params.blur, view.params.grayscale))


@pytest.mark.exhaustive
@pytest.mark.parametrize("injection", ["concat", "image"])
def test_a_resnet_is_compared_at_every_stage(injection):
    conditioning = Conditioning(injection=injection, depth=2, width=4)
    encoder = partial(make_encoder, "resnet18", width=4, dtype=jnp.bfloat16)
    networks = build_networks(SimCLR(), encoder, encoder().feature_width, conditioning)
    view = ViewBatch(jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, conditioning.size)))

    def stages():
        variables = networks.init(jax.random.key(0), view, train=False, method="embed")
        return _stages(networks, variables, view)

    shapes = jax.eval_shape(stages)
    sides = {"stem": 8, "layer1": 8, "layer2": 4, "layer3": 2, "layer4": 1, "features": 1}
    assert tuple(sides) == STAGES[:6]
    widths = {"stem": 4, "layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32, "features": 32}
    assert {name: found.shape for name, found in shapes.items()} == {
        name: (2, side * side * widths[name]) for name, side in sides.items()
    }
    assert all(found.dtype == jnp.float32 for found in shapes.values())


def test_findings_are_bars_curves_and_scores(invariance):
    findings = invariance.findings("scenes")
    assert from_json(to_json(findings)) == findings
    scores = {each.metric: each.value for each in findings if isinstance(each, Score)}
    assert len(scores) == 11
    assert scores[f"difference under jitter, {WRONG_PROJECTOR}"] == pytest.approx(
        invariance.alone()["jitter"][WRONG_PROJECTOR].difference
    )
    charts = {each.title: each for each in findings if not isinstance(each, Score)}
    assert len(charts) == 4 + 2 * 4
    bars = charts["Invariance to each augmentation: InfoNCE among 6 images"]
    assert bars.is_bars and list(bars.series) == ALONE
    assert [stage for stage, _ in bars.series["crop"]] == ["stem", "features", PROJECTOR]
    curves = charts["Strength of jitter: difference of the similarities"]
    assert not curves.is_bars
    assert list(curves.series) == ["stem", "features", PROJECTOR, WRONG_PROJECTOR]
    assert [strength for strength, _ in curves.series["stem"]] == list(STRENGTHS)


def test_without_other_strengths_there_are_no_curves(invariance):
    bare = {each: stages for each, stages in invariance.agreements.items() if each[1] == 1}
    findings = dataclasses.replace(invariance, agreements=bare).findings("scenes")
    titles = [each.title for each in findings if not isinstance(each, Score)]
    assert len(titles) == 4 and not any("Strength" in title for title in titles)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="1 images are too few to compare; use at least 2"):
        measured(images=IMAGES[:1])
    with pytest.raises(ValueError, match="no batch has two images"):
        measured(size=1)
    for conditioning in (COLOR_DIFF, PLAIN):  # with and without ω
        with pytest.raises(ValueError, match="there are no batches to analyse; give at least one"):
            measured(conditioning, images=IMAGES[:0])
    networks, _ = colour_networks()
    with pytest.raises(ValueError, match=r"strength=-1\.0 must be above 0"):
        invariance_meter(networks, PLAIN, SPEC, devices(1), strengths=(-1.0,))
