"""Conditioning that leaves some images, some epochs or a second projector without ω."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec, View
from cassle_jax.methods import METHODS, ViewBatch
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.methods.simclr import SimCLR
from cassle_jax.optimizer import learning_rate, make_optimizer
from cassle_jax.training.state import create_state
from cassle_jax.training.step import Update
from tests.augment.view_params import view_params
from tests.everyday import everyday
from tests.methods.one_device import BATCH, CLOCK, SPEC, compiled, random_views
from tests.methods.test_every_method import small, views_for
from tests.tiny import TinyEncoder

CASSLE = Conditioning(depth=2, width=8)
POSITIONS = jnp.arange(4000)


def with_options(**options):
    return dataclasses.replace(CASSLE, **options)


def share_given(conditioning, epoch):
    return float(conditioning.given(jax.random.key(0), POSITIONS, epoch).mean())


@pytest.mark.parametrize(
    ("options", "epoch", "share"),
    [
        ({"dropout": 0.3}, 0.0, 0.7),
        ({"start_epoch": 2.0}, 1.9, 0.0),
        ({"start_epoch": 2.0}, 2.0, 1.0),
        ({"start_epoch": 2.0, "ramp_epochs": 4.0}, 3.0, 0.25),
        ({"start_epoch": 2.0, "ramp_epochs": 4.0, "dropout": 0.5}, 9.0, 0.5),
    ],
)
def test_the_share_of_images_with_omega(options, epoch, share):
    # Four standard deviations of a mean of 4000 draws.
    assert abs(share_given(with_options(**options), epoch) - share) < 4 * 0.5 / 4000**0.5


def test_whether_an_image_is_given_omega_depends_on_its_position_alone():
    """So however many devices share a batch, the same images go without; and both views of one."""
    conditioning, key = with_options(dropout=0.5), jax.random.key(3)
    whole = conditioning.given(key, POSITIONS, 0.0)
    np.testing.assert_array_equal(conditioning.given(key, POSITIONS[1000:], 0.0), whole[1000:])
    assert (conditioning.given(jax.random.key(4), POSITIONS, 0.0) != whole).mean() > 0.4


def test_a_process_with_64_bits_draws_the_same_images():
    with jax.enable_x64(True):
        wide = with_options(dropout=0.5).given(jax.random.key(3), POSITIONS, 0.0)
    usual = with_options(dropout=0.5).given(jax.random.key(3), POSITIONS, 0.0)
    np.testing.assert_array_equal(wide, usual)


def test_a_process_with_64_bits_has_no_wider_omega():
    """That of the plain method was float64."""
    view = View(jnp.zeros((3, 4, 4, 3)), view_params(3), jnp.zeros((3, 3)))
    plain = Conditioning(())
    with jax.enable_x64(True):
        omegas = plain.neutral, *plain.describe([view], [AugmentSpec(size=4)])
    assert [(each.shape, each.dtype) for each in omegas] == [((0,), "float32"), ((3, 0), "float32")]


def test_omega_ends_with_whether_it_is_given():
    images, mirrored = jnp.zeros((3, 4, 4, 3)), [True, True, False]
    view, spec = View(images, view_params(3, flip=mirrored), jnp.zeros((3, 3))), AugmentSpec(size=4)
    sometimes = with_options(descriptors=("flip",), dropout=0.5)
    describe = compiled(lambda view, given: sometimes.describe([view], [spec], given))
    for given, flags in ((jnp.array([True, False, True]), [1, 0, 1]), (None, [1, 1, 1])):
        (omega,) = describe(view, given)
        assert omega.shape == (3, sometimes.size)
        np.testing.assert_array_equal(omega[:, 0], mirrored)
        np.testing.assert_array_equal(omega[:, 1], flags)


@pytest.mark.parametrize("injection", ["concat", "add", "multiply", "image"])
@pytest.mark.parametrize("treatment", ["mlp", "raw"])
def test_without_omega_its_numbers_do_not_matter(treatment, injection):
    if treatment == "raw" and injection in ("add", "multiply"):
        pytest.skip("needs an ω as wide as the features")
    conditioning = with_options(dropout=0.5, treatment=treatment, injection=injection)
    networks = build_networks(SimCLR(projector_out=8), TinyEncoder, 24, conditioning)
    view = random_views(0, conditioning.size).views[0]
    variables = networks.init(jax.random.key(0), view, train=False, method="embed")

    def projected(numbers, given):
        flags = jnp.full((BATCH, 1), given)
        omega = jnp.concatenate([numbers, flags], axis=1)
        return networks.apply(
            variables, ViewBatch(view.images, omega), train=False, method="embed"
        ).projection

    numbers = view.descriptor[:, :-1]
    np.testing.assert_array_equal(projected(numbers, 0.0), projected(numbers + 1, 0.0))
    assert not np.allclose(projected(numbers, 1.0), projected(numbers + 1, 1.0))


def started(name, conditioning, spec):
    method = small(name)
    networks = build_networks(method, TinyEncoder, 24, conditioning)
    schedule = learning_rate(spec, CLOCK, 256)
    optimizer = make_optimizer(spec, method, schedule, 256)
    update = Update(
        networks, method, (), optimizer, schedule, CLOCK, None,
        plain_branch=conditioning.plain_branch,
    )  # fmt: skip
    views = views_for(method, conditioning)
    return create_state(networks, method, optimizer, views.views[0], seed=0), update, views


@pytest.mark.parametrize("name", everyday(METHODS, "moco_v2", "moco_v3", "swav"))
def test_a_plain_branch_goes_with_every_method(name):
    state, update, views = started(name, with_options(plain_branch=0.25), SPEC)
    after, metrics = jax.eval_shape(update, state, views)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)
    assert {"loss_method", "loss_plain_method"} <= set(metrics)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["simclr", "moco_v2", "swav"])
def test_a_plain_branch_adds_the_plain_methods_loss(name):
    """Its loss and gradient are those of two runs, plain and conditioned, from the same weights."""
    spec = dataclasses.replace(SPEC, momentum=0.0, weight_decay=0.0)
    both, update, views = started(name, with_options(plain_branch=0.25), spec)
    own, update_own, _ = started(name, CASSLE, spec)
    plain, update_plain, plain_views = started(name, Conditioning(()), spec)

    heads = {n: p for n, p in both.params.items() if not n.startswith("plain_")}
    own = own.replace(params=heads)
    renamed = {n.removeprefix("plain_"): p for n, p in both.params.items() if "plain_" in n}
    plain = plain.replace(params={"encoder": both.params["encoder"], **renamed})
    images = [view.images for view in views.views]
    plain_views = plain_views.replace(
        views=tuple(
            view.replace(images=each) for view, each in zip(plain_views.views, images, strict=True)
        )
    )
    if both.target_params:
        own = own.replace(target_params={n: own.params[n] for n in own.target_params})
        plain = plain.replace(target_params={n: plain.params[n] for n in plain.target_params})
    if name == "moco_v2":
        queue = both.memory
        own, plain = own.replace(memory=queue["conditioned"]), plain.replace(memory=queue["plain"])

    (after, found), (after_own, its), (after_plain, theirs) = (
        compiled(each)(state, given)
        for each, state, given in (
            (update, both, views),
            (update_own, own, views),
            (update_plain, plain, plain_views),
        )
    )
    expected = 0.75 * its["loss"] + 0.25 * theirs["loss"]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)

    def moved(new, old):
        return jax.tree.map(
            lambda a, b: np.asarray(a - b), new.params["encoder"], old.params["encoder"]
        )

    pairs = zip(
        *map(
            jax.tree.leaves,
            (moved(after, both), moved(after_own, own), moved(after_plain, plain)),
        ),
        strict=True,
    )
    for change, conditioned, unconditioned in pairs:
        np.testing.assert_allclose(
            change, 0.75 * conditioned + 0.25 * unconditioned, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, r"conditioning\.dropout=1\.0 is not in \[0, 1\); 0\.0 is usual"),
        (
            {"plain_branch": -0.1},
            r"conditioning\.plain_branch=-0\.1 is not in \[0, 1\); 0\.5",
        ),
        ({"start_epoch": -1.0}, r"conditioning\.start_epoch=-1\.0 must be at least 0"),
        ({"descriptors": (), "stage": 2}, r"conditioning\.stage=2 does nothing without"),
        ({"descriptors": (), "dropout": 0.5}, r"conditioning\.dropout=0\.5 does nothing without"),
        ({"treatment": "hypernetwork", "dropout": 0.5}, r"use conditioning\.treatment='mlp'"),
        ({"injection": "image", "plain_branch": 0.5}, r"use conditioning\.injection='concat'"),
        ({"descriptors": "color"}, r"conditioning\.descriptors='color' is not a tuple of names;"),
        (
            {"descriptors": ("color", "color.hue")},
            r"conditioning\.descriptors=.* names 'color.hue'",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Conditioning(**settings)
