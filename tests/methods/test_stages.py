"""Conditioning and the auxiliary objectives on an earlier stage: whose features each head sees."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.evaluation.matching import ViewMatcher
from cassle_jax.methods import AugSelf, EquiMod, Features, SimCLR, TrainingViews
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.models import ConvNeXt, ResNet, VisionTransformer, features_by_stage, width_at
from cassle_jax.optimizer import learning_rate, make_optimizer
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from cassle_jax.training.recorded import record_of
from cassle_jax.training.run import build_run
from cassle_jax.training.state import create_state
from cassle_jax.training.step import Update
from tests.evaluation import analysed
from tests.interop.states import encoder_variables, filled
from tests.methods.one_device import CLOCK, PLAIN, SPEC, compiled, random_views
from tests.methods.reference import naive_nt_xent
from tests.tiny import TinyEncoder, tiny_config

WIDTHS = (7, 6, 5)
CASSLE = Conditioning(("crop",), treatment="raw", plain_branch=0.25)
METHOD = SimCLR(projector_hidden=8, projector_out=4)


class Staged(nn.Module):
    """Three Dense layers on the pixels, each with tanh: three stages."""

    stage_widths = WIDTHS
    feature_width = WIDTHS[-1]

    @nn.compact
    def __call__(self, images, train, stages=()):
        x, earlier = images.reshape(len(images), -1), {}
        for stage, width in enumerate(WIDTHS, 1):
            x = jnp.tanh(nn.Dense(width, name=f"stage{stage}")(x))
            if stage in stages:
                earlier[stage] = x
        return (x, earlier) if stages else x


def at_stage(params, images, stage):
    """The same in NumPy."""
    x = np.float64(images).reshape(len(images), -1)
    for number in range(1, (stage or len(WIDTHS)) + 1):
        layer = params["encoder"][f"stage{number}"]
        x = np.tanh(x @ np.float64(layer["kernel"]) + layer["bias"])
    return x


def started(conditioning=PLAIN, auxiliaries=(), axis_name=None):
    networks = build_networks(
        METHOD, Staged, WIDTHS[-1], conditioning, auxiliaries, axis_name=axis_name
    )
    schedule = learning_rate(SPEC, CLOCK, 256)
    optimizer = make_optimizer(SPEC, METHOD, schedule, 256)
    update = Update(
        networks, METHOD, auxiliaries, optimizer, schedule, CLOCK, axis_name,
        plain_branch=conditioning.plain_branch,
    )  # fmt: skip
    view = random_views(0, conditioning.size).views[0]
    return networks, create_state(networks, METHOD, optimizer, view, seed=0), update


def applied(networks, state, function):
    """What a function of the bound networks gives in training."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return nn.apply(function, networks, mutable=["batch_stats"])(variables)[0]


@pytest.mark.parametrize(
    "encoder",
    [
        ResNet(18, width=4, small_images=True),
        ConvNeXt((1, 1, 1, 1), width=4),
        VisionTransformer(width=8, depth=3, heads=2, patch_size=16, registers=1, layer_scale=0.5),
    ],
    ids=["resnet", "convnext", "vit"],
)
def test_a_stages_features_are_its_pooled_outputs(encoder):
    """A convolutional network's mean over places, a ViT's class token after a block."""
    variables = filled(encoder_variables(encoder))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    stages = tuple(range(1, len(encoder.stage_widths)))

    def both(variables, images):
        bound = partial(encoder.apply, variables, mutable=["intermediates"])
        plain, seen = bound(images, False)
        staged = encoder.bind(variables)
        return plain, seen["intermediates"], features_by_stage(staged, images, False, stages)

    plain, sown, found = compiled(both)(variables, images)
    np.testing.assert_array_equal(found[0], plain)
    assert [found[stage].shape[1] for stage in stages] == [width_at(encoder, n) for n in stages]
    for stage in stages:
        if isinstance(encoder, VisionTransformer):
            # A shallower ViT ends in a LayerNorm, which the stage has not.
            shallow = dataclasses.replace(encoder, depth=stage, parent=None)
            expected = compiled(partial(shallow.apply, train=False))(variables, images)
            norm, x = variables["params"]["norm"], np.float64(found[stage])
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
            np.testing.assert_allclose(x * norm["scale"] + norm["bias"], expected, atol=1e-4)
        else:
            expected = np.float64(sown[f"layer{stage}"][0]).mean((1, 2))
            np.testing.assert_allclose(found[stage], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def branched():
    """A run with the conditioned projector on stage 2, and the plain one on the last."""
    conditioning = dataclasses.replace(CASSLE, stage=2)
    return *started(conditioning), random_views(1, conditioning.size)


def test_the_conditioned_branch_sees_its_stage_and_the_plain_one_the_last(branched):
    """The logged losses and their sum are SimCLR's equation on projections of those features."""
    networks, state, update, inputs = branched
    _, metrics = compiled(update)(state, inputs)
    width = state.params["projector"]["projector"]["linear_0"]["kernel"].shape[0]
    assert width == WIDTHS[1] + CASSLE.size
    assert state.params["plain_projector"]["projector"]["linear_0"]["kernel"].shape[0] == WIDTHS[2]
    losses = {}
    for name, stage in (("projector", 2), ("plain_projector", 0)):
        rows = [at_stage(state.params, view.images, stage) for view in inputs.views]
        projections = [
            applied(
                networks,
                state,
                lambda bound, y=y, view=view, name=name: getattr(bound, name)(
                    jnp.float32(y), view.descriptor, True
                ),
            )
            for y, view in zip(rows, inputs.views, strict=True)
        ]
        losses[name] = naive_nt_xent(*projections, METHOD.temperature)
    found = metrics["loss_method"], metrics["loss_plain_method"]
    np.testing.assert_allclose(found, [*losses.values()], rtol=1e-4)
    expected = 0.75 * losses["projector"] + 0.25 * losses["plain_projector"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


def test_no_gradient_of_the_staged_loss_reaches_later_stages(branched):
    networks, state, _, inputs = branched

    def loss(params):
        bound = networks.branches[""]
        heads = {name: tree for name, tree in params.items() if not name.startswith("plain_")}
        apply = nn.apply(
            lambda own: own.embed(inputs.views[0], train=True).projection,
            bound,
            mutable=["batch_stats"],
        )
        stats = {n: tree for n, tree in state.batch_stats.items() if not n.startswith("plain_")}
        return (apply({"params": heads, "batch_stats": stats})[0] ** 3).sum()

    gradient = compiled(jax.grad(loss))(state.params)["encoder"]
    reached = {name: any(map(np.any, jax.tree.leaves(tree))) for name, tree in gradient.items()}
    assert reached == {"stage1": True, "stage2": True, "stage3": False}


@pytest.mark.exhaustive
def test_auxiliary_objectives_see_their_own_stage():
    """AugSelf the first stage, EquiMod the second, SimCLR the last, in one pass of the encoder."""
    augself = AugSelf({"crop": 0.5}, hidden=8, stage=1)
    equimod = EquiMod(0.5, descriptors=("crop",), hidden=8, out=4, stage=2)
    networks, state, update = started(auxiliaries=(augself, equimod))
    views = random_views(2, sizes=(8,) * 3, predicted=("crop",))
    omegas = tuple(each.descriptor for each in random_views(3, 4).views)
    inputs = TrainingViews(views.views, {**views.targets, "equimod": omegas})
    _, metrics = compiled(update)(state, inputs)
    for auxiliary, name in ((augself, "crop"), (equimod, "prediction")):
        rows = {
            view: jnp.float32(at_stage(state.params, each.images, auxiliary.stage))
            for view, each in enumerate(inputs.views)
        }
        seen = Features(rows, {}, (), inputs.targets)
        losses, _ = applied(
            networks,
            state,
            lambda bound, auxiliary=auxiliary, seen=seen: auxiliary.losses(bound, seen, (2,), None),
        )
        found = metrics[f"loss_{auxiliary.name}_{name}"]
        np.testing.assert_allclose(found, losses[name], rtol=1e-3)


@pytest.mark.exhaustive
def test_eight_devices_equal_one():
    augself = AugSelf({"crop": 0.5}, hidden=8, stage=1)
    conditioning = dataclasses.replace(CASSLE, stage=2)
    _, state, update = started(conditioning, (augself,), axis_name=AXIS)
    few = [random_views(seed, conditioning.size, ("crop",)) for seed in range(4)]
    inputs = jax.tree.map(lambda *rows: jnp.concatenate(rows), *few)
    one, eight = (
        parallel(
            update,
            device_mesh(jax.devices()[:count]),
            inputs=(REPLICATED, SHARDED),
            outputs=(REPLICATED, REPLICATED),
        )(state, inputs)
        for count in (1, 8)
    )
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, one[0].params, eight[0].params)
    jax.tree.map(close, one[1], eight[1])


def test_the_number_of_the_last_stage_is_the_default():
    auxiliaries = AugSelf({"crop": 0.5}, stage=3), EquiMod(0.5, stage=3)
    default = AugSelf({"crop": 0.5}), EquiMod(0.5)
    named, usual = (
        build_networks(METHOD, Staged, WIDTHS[-1], Conditioning(("crop",), stage=stage), each)
        for stage, each in ((3, auxiliaries), (0, default))
    )
    assert (named.stage, named.stages) == (usual.stage, usual.stages) == (0, ())
    shapes = [jax.eval_shape(lambda n=n: initial(n)) for n in (named, usual)]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])


def initial(networks):
    view = random_views(0, 4).views[0]
    return networks.init(jax.random.key(0), view, train=False, method="embed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 4}, r"^conditioning\.stage=4 is not a stage of this encoder; use 1 to 3, or 0"),
        ({"stage": -1}, r"^conditioning\.stage=-1 is not a stage of this encoder"),
        (
            {"stage": 1, "plain_branch": 0.0},
            r"^conditioning\.stage=1 leaves .* without a loss; use conditioning\.plain_branch=0\.5",
        ),
    ],
)
def test_a_stage_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_networks(METHOD, Staged, WIDTHS[-1], dataclasses.replace(CASSLE, **settings))


def test_so_is_one_of_an_auxiliary_or_of_an_encoder_without_stages():
    augself = AugSelf({"crop": 0.5}, stage=9)
    with pytest.raises(ConfigError, match=r"^augself\.stage=9 is not a stage .* use 1 to 3"):
        build_networks(METHOD, Staged, WIDTHS[-1], PLAIN, (augself,))
    equimod = EquiMod(0.5, stage=2)
    with pytest.raises(ConfigError, match=r"^equimod\.stage=2: .* no earlier stages; use 0$"):
        build_networks(METHOD, TinyEncoder, 24, PLAIN, (equimod,))
    config = tiny_config("method=vicreg,sie=main,conditioning=branched")
    config.encoder.update(name="resnet18", width=4)
    config.conditioning.stage = 3
    with pytest.raises(ConfigError, match=r"conditioning\.stage=3 cannot go with sie"):
        build_run(config, device_mesh(jax.devices()[:1]), 64)


@pytest.mark.parametrize(("width", "message"), [(0, "at least 1"), (6, "not the encoder's; use 5")])
def test_a_width_that_is_not_the_encoders_is_refused(width, message):
    with pytest.raises(ConfigError, match=f"feature_width={width} .*{message}"):
        build_networks(METHOD, Staged, width, PLAIN)


def test_a_run_records_the_head_that_it_has():
    config = tiny_config("method=simclr,conditioning=branched,augself=main,equimod=main")
    config.encoder.update(name="resnet18", width=4)
    config.method.projector_hidden = 0
    config.conditioning.stage, config.augself.stage, config.equimod.stage = 3, 2, 1
    run = build_run(config, device_mesh(jax.devices()[:1]), 64)
    params = jax.eval_shape(run.initial_state).params
    first = params["projector"]["projector"]["linear_0"]["kernel"]
    assert first.shape == (16 + config.conditioning.width, 16)
    assert record_of(run)["heads"]["projector"]["hidden"] == 16
    assert params["plain_projector"]["projector"]["linear_0"]["kernel"].shape == (32, 32)
    assert params["augself_crop"]["linear_0"]["kernel"].shape[0] == 2 * 8
    assert params["equimod_projector"]["linear_0"]["kernel"].shape[0] == 4


class ColourFirst(analysed.Colour):
    """The mean colour is its first stage; its features are of no use."""

    stage_widths = (3, 3)

    @nn.compact
    def __call__(self, images, train, stages=()):
        colour = images.mean((1, 2))
        features = jnp.tile(images[:, 0, 0, :1], (1, 3))
        return (features, {1: colour}) if stages else features


@pytest.mark.exhaustive
def test_evaluation_projects_what_the_projector_was_trained_on():
    """Views match as with an encoder whose features are that stage."""
    staged = dataclasses.replace(analysed.COLOR_DIFF, stage=1, plain_branch=0.5)
    found = {}
    for encoder, conditioning in ((analysed.Colour, analysed.COLOR_DIFF), (ColourFirst, staged)):
        networks, variables = analysed.colour_networks(conditioning, encoder)
        specs = (analysed.JITTERED,) * 2
        matcher = ViewMatcher(networks, conditioning, specs, analysed.devices(1))
        images = analysed.pictures(16)
        result = matcher(variables, lambda images=images: analysed.batches_of(images, 16))
        found[encoder] = result.agreements
    usual, staged = found.values()
    assert usual.keys() == staged.keys()
    for name in usual.keys() - {"features"}:
        assert math.isclose(usual[name].info_nce, staged[name].info_nce, rel_tol=1e-4), name
    assert usual["features"].info_nce != staged["features"].info_nce
