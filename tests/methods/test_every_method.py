"""Every method with every conditioning: what holds whatever the objective."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import RARE, AugmentSpec
from cassle_jax.config import base_config, flat_settings
from cassle_jax.methods import METHODS, STL, Progress, TrainingViews, ViewBatch
from cassle_jax.methods.augself import PREDICTED
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.models import ENCODERS
from cassle_jax.optimizer import learning_rate, make_optimizer
from cassle_jax.parallel import device_mesh
from cassle_jax.training.run import build_run
from cassle_jax.training.state import create_state
from cassle_jax.training.step import Update, make_train_step
from tests.everyday import everyday
from tests.methods.one_device import BATCH, CLOCK, SPEC, compiled, random_views
from tests.tiny import EVERY_AUXILIARY, TinyEncoder, tiny_config

SIZES = {"projector_hidden": 24, "projector_out": 8, "predictor_hidden": 8, "prototypes": 6}
CONDITIONINGS = {
    "plain": Conditioning(()),
    "cassle": Conditioning(depth=2, width=8),
    **{
        f"{treatment} {injection}": Conditioning(
            treatment=treatment, injection=injection, depth=2, width=8
        )
        for treatment, injection in [
            *[("mlp", injection) for injection in ("add", "multiply", "image")],
            *[("raw", injection) for injection in ("concat", "image")],
            ("hypernetwork", "concat"),
        ]
    },
    "relative": Conditioning(relative=True, depth=2, width=8),
}
WITH_PREDICTOR = ("byol", "moco_v3", "simsiam")
# What each method sees of conditioning: none, heads that take ω, images with more channels. How a
# head takes ω is the same for all; the one method shows it that has most parts.
WITH_EVERY_METHOD = ("plain", "cassle", "mlp image")
METHODS_AND_CONDITIONINGS = [
    (name, conditioning)
    for name in METHODS
    for conditioning in CONDITIONINGS
    if name == "moco_v3" or conditioning in WITH_EVERY_METHOD
]
EVERYDAY = [each for each in METHODS_AND_CONDITIONINGS if "moco_v3" in each or "cassle" in each]


def small(name):
    """The method with small heads and, for MoCo-v2, a queue of eight batches."""
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    queue = {"queue_size": 8 * BATCH} if name == "moco_v2" else {}
    return METHODS[name](**{k: v for k, v in SIZES.items() if k in fields}, **queue)


def views_for(method, conditioning):
    specs = method.views(AugmentSpec(8, kernel_size=3), AugmentSpec(8, kernel_size=3))
    return random_views(0, conditioning.size, sizes=[spec.size for spec in specs])


def start(name, conditioning, auxiliaries=()):
    method = small(name)
    networks = build_networks(method, TinyEncoder, 24, conditioning, auxiliaries)
    schedule = learning_rate(SPEC, CLOCK, 256)
    optimizer = make_optimizer(SPEC, method, schedule, 256)
    views = views_for(method, conditioning)
    branch = conditioning.plain_branch
    update = Update(
        networks, method, auxiliaries, optimizer, schedule, CLOCK, None, plain_branch=branch
    )

    def state():
        return create_state(networks, method, optimizer, views.views[0], seed=0)

    return state, update, views


@pytest.mark.parametrize("pair", everyday(METHODS_AND_CONDITIONINGS, *EVERYDAY), ids="-".join)
def test_a_step_of_every_method_goes_with_every_conditioning(pair):
    name, conditioning = pair
    state, update, views = start(name, CONDITIONINGS[conditioning])
    before = jax.eval_shape(state)
    after, metrics = jax.eval_shape(update, before, views)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", everyday(METHODS, "moco_v2"))
def test_a_process_with_64_bits_trains_the_same_state(name):
    """`JAX_ENABLE_X64=1` made MoCo-v2's queue float64, which no float32 embedding could enter."""
    conditioning = Conditioning(dropout=0.5, plain_branch=0.5, depth=2, width=8)
    auxiliaries = (STL(weight=1.0, hidden=8, out=8, code=8),)
    state, update, views = start(name, conditioning, auxiliaries)
    usual = jax.eval_shape(state)
    with jax.enable_x64(True):
        before = jax.eval_shape(state)
        after, metrics = jax.eval_shape(update, before, views)
    assert usual == before == after
    assert {name: each.dtype for name, each in metrics.items() if each.dtype != jnp.float32} == {}


@pytest.mark.parametrize("name", everyday(METHODS, "simclr", "byol"))
def test_a_step_of_every_method_goes_with_every_auxiliary(name, monkeypatch):
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)
    predicted = "+".join(PREDICTED)
    config = tiny_config(f"method={name},{EVERY_AUXILIARY},augself={predicted}")
    config.augment.update(dict.fromkeys(RARE, 0.5))
    mesh = device_mesh(jax.devices()[:1])
    run = build_run(config, mesh, 64)
    before = jax.eval_shape(run.initial_state)
    batch = {
        "image": jax.ShapeDtypeStruct((16, 24, 24, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((16, 2), jnp.int32),
    }
    after, metrics = jax.eval_shape(make_train_step(run, mesh), before, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    losses = {f"loss_augself_{each}" for each in PREDICTED}
    losses |= {"loss_equimod_prediction", "loss_essl_rotation", "loss_sie_equivariance"}
    losses |= {"loss_stl_equivariance", "loss_stl_transformation"}
    assert losses | {"equimod_gain", "essl_accuracy", "sie_gain"} <= metrics.keys()
    assert all(metric.dtype == jnp.float32 for metric in metrics.values())


@pytest.mark.exhaustive
@pytest.mark.parametrize("into", ["predictor", "both"])
@pytest.mark.parametrize("name", WITH_PREDICTOR)
def test_the_predictor_can_be_conditioned_instead_of_the_projector_or_as_well(name, into):
    conditioning = Conditioning(into=into, depth=2, width=8)
    state, update, views = start(name, conditioning)
    before = compiled(state)()
    assert "condition" in before.params["predictor"]
    assert ("condition" in before.params["projector"]) == (into == "both")

    update = compiled(update)
    _, metrics = update(before, views)
    others = random_views(1, conditioning.size).views
    told_otherwise = TrainingViews(
        tuple(
            ViewBatch(view.images, other.descriptor)
            for view, other in zip(views.views, others, strict=True)
        )
    )
    _, otherwise = update(before, told_otherwise)
    assert abs(metrics["loss"] - otherwise["loss"]) > 1e-4


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(WITH_PREDICTOR)))
def test_a_method_without_a_predictor_cannot_be_conditioned_through_it(name):
    message = r"conditioning\.into='both' needs a predictor, which .* lacks"
    with pytest.raises(ValueError, match=message):
        start(name, Conditioning(into="both"))


def test_channels_of_the_image_are_no_way_into_a_predictor():
    message = r"conditioning\.injection='image' .*conditioning\.into='predictor'.*'projector'"
    with pytest.raises(ValueError, match=message):
        start("byol", Conditioning(into="predictor", injection="image"))


def test_raw_descriptors_must_be_as_wide_as_what_the_predictor_takes():
    with pytest.raises(ValueError, match=r"treatment='raw'.*\(8\), not 13"):
        start("byol", Conditioning(into="predictor", treatment="raw", injection="add"))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_sets_in_a_configuration_exists(name):
    known = flat_settings(base_config(f"method={name}"))
    for settings in (METHODS[name].recipe, METHODS[name].published):
        for setting, value in settings.items():
            assert setting in known
            assert isinstance(json.loads(json.dumps(value)), type(known[setting]))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("byol", {"momentum": 1.5}, r"method\.momentum=1\.5 is not in \[0, 1\]; 0\.996 is usual"),
        ("byol", {"momentum_by": "week"}, r"method\.momentum_by='week'.*use one of epoch, step"),
        ("byol", {"predictor_hidden": 0}, r"method\.predictor_hidden=0 must be at least 1"),
        ("simsiam", {"projector_depth": 0}, r"method\.projector_depth=0 must be at least 1"),
        ("barlow_twins", {"redundancy_weight": -1.0}, r"method\.redundancy_weight=-1\.0 must be"),
        (
            "moco_v3",
            {"momentum_schedule": "up"},
            r"momentum_schedule='up'.*constant, cosine",
        ),
        ("moco_v3", {"temperature": 0.0}, r"method\.temperature=0\.0 must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](**settings)


def test_momentum_rises_to_one_along_half_a_cosine():
    byol = METHODS["byol"](momentum=0.9)
    found = [byol.target_momentum(Progress(0, epoch, 10.0)) for epoch in (0.0, 5.0, 7.5, 10.0)]
    np.testing.assert_allclose(found, [0.9, 0.95, 1 - 0.05 * (1 - 0.5**0.5), 1], rtol=1e-6)
    by_epoch = METHODS["byol"](momentum=0.9, momentum_by="epoch")
    assert by_epoch.target_momentum(Progress(0, 5.9, 10.0)) == byol.target_momentum(
        Progress(0, 5.0, 10.0)
    )
    assert METHODS["moco_v3"](momentum=0.99).target_momentum(Progress(0, 5.0, 10.0)) == 0.99
    cosine = METHODS["moco_v3"](momentum=0.9, momentum_schedule="cosine")
    np.testing.assert_allclose(cosine.target_momentum(Progress(0, 5.0, 10.0)), 0.95, rtol=1e-6)
