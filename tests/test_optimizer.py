"""The optimisers against PyTorch's rules in NumPy, the schedules against their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.methods import BYOL, SimCLR
from cassle_jax.methods.base import FROZEN, constant
from cassle_jax.methods.build import Conditioning
from cassle_jax.optimizer import (
    Clock,
    OptimizerSpec,
    learning_rate,
    make_optimizer,
    parameter_groups,
    peak_learning_rate,
)

STEPS = 5
BATCH = 512
CLOCK = Clock(steps_per_epoch=4, total_steps=40)
DRAW = np.random.default_rng(0)
PARAMS = {
    "encoder": {"kernel": DRAW.normal(size=(3, 2)), "scale": DRAW.normal(size=2)},
    "predictor": {"kernel": DRAW.normal(size=(2, 2)), "bias": DRAW.normal(size=2)},
}
GRADIENTS = [jax.tree.map(lambda x: DRAW.normal(size=x.shape), PARAMS) for _ in range(STEPS)]


def sgd(params, gradients, rates, momentum, decay):
    """`torch.optim.SGD` in the words of its documentation, for one array."""
    params, buffer = params.copy(), None
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = gradient + decay * params
        buffer = gradient if buffer is None else momentum * buffer + gradient
        params -= rate * buffer
    return params


def adamw(params, gradients, rates, decay, betas=(0.9, 0.999), epsilon=1e-8):
    """`torch.optim.AdamW` in the words of its documentation, for one array."""
    params, first, second = params.copy(), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        params *= 1 - rate * decay
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        unbiased_first = first / (1 - betas[0] ** step)
        unbiased_second = second / (1 - betas[1] ** step)
        params -= rate * unbiased_first / (np.sqrt(unbiased_second) + epsilon)
    return params


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def optimised(spec, method=SimCLR()):  # noqa: B008 (frozen)
    optimizer = make_optimizer(spec, method, learning_rate(spec, CLOCK, BATCH), BATCH)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params = float32(PARAMS)
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        params, state = step(params, state, float32(gradient))
    return params


def cosine(step, peak=0.06, epochs=10):
    return peak * 0.5 * (1 + np.cos(np.pi * step / 4 / epochs))


def assert_each(found, expected):
    for network, arrays in found.items():
        for name, value in arrays.items():
            gradients = [gradient[network][name] for gradient in GRADIENTS]
            np.testing.assert_allclose(
                value, expected(network, PARAMS[network][name], gradients), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.1), (0.0, 0.1), (0.9, 0.0)])
def test_sgd_is_pytorchs_and_decays_every_parameter(momentum, decay):
    found = optimised(OptimizerSpec(momentum=momentum, weight_decay=decay))
    rates = [cosine(step) for step in range(STEPS)]
    assert_each(found, lambda _, value, gradients: sgd(value, gradients, rates, momentum, decay))


def test_adamw_is_pytorchs():
    found = optimised(OptimizerSpec(name="adamw", weight_decay=0.1))
    rates = [cosine(step) for step in range(STEPS)]
    assert_each(found, lambda _, value, gradients: adamw(value, gradients, rates, 0.1))


def lars(params, gradients, rates, momentum, decay):
    """You et al., 2017, algorithm 1, as the methods' own code has it, for one array."""
    params, buffer = params.copy(), 0.0
    for gradient, rate in zip(gradients, rates, strict=True):
        if params.ndim > 1:
            gradient = gradient + decay * params
            gradient = 0.001 * np.linalg.norm(params) / np.linalg.norm(gradient) * gradient
        buffer = momentum * buffer + gradient
        params -= rate * buffer
    return params


def test_lars_adapts_and_decays_weights_alone():
    found = optimised(OptimizerSpec(name="lars", base_learning_rate=3.0, weight_decay=0.1))
    rates = [cosine(step, peak=6.0) for step in range(STEPS)]
    assert_each(found, lambda _, value, gradients: lars(value, gradients, rates, 0.9, 0.1))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_what_the_encoder_freezes_does_not_even_decay(name):
    spec = OptimizerSpec(name=name, weight_decay=0.5)
    optimizer = make_optimizer(spec, SimCLR(), constant(1.0), BATCH, frozen=("kernel",))
    params = float32(PARAMS)
    updates, _ = jax.jit(optimizer.update)(float32(GRADIENTS[0]), optimizer.init(params), params)
    np.testing.assert_array_equal(updates["encoder"]["kernel"], 0)
    assert all(np.all(updates[path][leaf] != 0) for path, leaf in MOVING)


MOVING = [("encoder", "scale"), ("predictor", "kernel"), ("predictor", "bias")]


@dataclasses.dataclass(frozen=True)
class Grouped(SimCLR):
    """The predictor at a tenth of the peak, norms frozen, the rest on the run's schedule."""

    def parameter_group(self, path, array):
        if array.ndim == 1 and path[0] == "encoder":
            return FROZEN
        return path[0]

    def group_schedules(self, schedule, peak):
        return {"encoder": schedule, "predictor": constant(peak / 10)}


def test_groups_have_rates_of_their_own():
    found = optimised(OptimizerSpec(weight_decay=0.1), Grouped())
    np.testing.assert_array_equal(
        found["encoder"].pop("scale"), float32(PARAMS)["encoder"]["scale"]
    )
    rates = {"encoder": [cosine(step) for step in range(STEPS)], "predictor": [0.006] * STEPS}
    assert_each(
        found, lambda network, value, gradients: sgd(value, gradients, rates[network], 0.9, 0.1)
    )


def nesterov(params, gradients, rates, momentum, decay):
    """`torch.optim.SGD` with `nesterov=True`, in the words of its documentation."""
    params, buffer = params.copy(), 0.0
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = gradient + decay * params
        buffer = momentum * buffer + gradient
        params -= rate * (gradient + momentum * buffer)
    return params


def lamb(params, gradients, rates, decay, betas=(0.9, 0.999), epsilon=1e-6):
    """You et al., 2020, algorithm 2, with biases and scales left out of weight decay."""
    params, first, second = params.copy(), 0.0, 0.0
    decay = decay if params.ndim > 1 else 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        ratio = first / (1 - betas[0] ** step)
        ratio = ratio / (np.sqrt(second / (1 - betas[1] ** step)) + epsilon) + decay * params
        params -= rate * np.linalg.norm(params) / np.linalg.norm(ratio) * ratio
    return params


RATES = [cosine(step) for step in range(STEPS)]


def test_an_optimiser_takes_settings_of_its_own():
    found = optimised(OptimizerSpec(name="adamw", weight_decay=0.1, settings={"b2": 0.9}))
    assert_each(found, lambda _, *arrays: adamw(*arrays, RATES, 0.1, betas=(0.9, 0.9)))
    found = optimised(OptimizerSpec(weight_decay=0.1, settings={"nesterov": True}))
    assert_each(found, lambda _, *arrays: nesterov(*arrays, RATES, 0.9, 0.1))


def test_any_optimiser_of_optax_goes_by_its_name_with_rates_and_decay_as_ours():
    spec = OptimizerSpec(name="lamb", weight_decay=0.1, settings={"b1": 0.8})
    found = optimised(spec, Grouped())
    np.testing.assert_array_equal(
        found["encoder"].pop("scale"), float32(PARAMS)["encoder"]["scale"]
    )
    rates = {"encoder": RATES, "predictor": [0.006] * STEPS}
    assert_each(found, lambda net, *arrays: lamb(*arrays, rates[net], 0.1, betas=(0.8, 0.999)))


@pytest.mark.parametrize("name", ["adopt", "lion", "muon", "nadamw"])
def test_newer_optimisers_train(name):
    found = optimised(OptimizerSpec(name=name, weight_decay=0.0), Grouped())
    np.testing.assert_array_equal(found["encoder"]["scale"], float32(PARAMS)["encoder"]["scale"])
    for network, leaf in [("encoder", "kernel"), ("predictor", "kernel"), ("predictor", "bias")]:
        moved = np.abs(found[network][leaf] - PARAMS[network][leaf])
        assert moved.min() > 1e-4 and moved.max() < 1


def test_clipping_is_by_the_norm_of_all_that_is_trained():
    found = optimised(OptimizerSpec(weight_decay=0.0, clip_norm=0.5), Grouped())
    del found["encoder"]["scale"]  # frozen, and so without a part in the norm
    trained = [("encoder", "kernel"), ("predictor", "kernel"), ("predictor", "bias")]
    norms = [np.sqrt(sum(np.sum(each[a][b] ** 2) for a, b in trained)) for each in GRADIENTS]
    assert min(norms) > 0.5
    rates = {"encoder": RATES, "predictor": [0.006] * STEPS}

    def expected(network, value, gradients):
        clipped = [0.5 / norm * each for norm, each in zip(norms, gradients, strict=True)]
        return sgd(value, clipped, rates[network], 0.9, 0.0)

    assert_each(found, expected)
    short = optimised(OptimizerSpec(clip_norm=1e3))
    jax.tree.map(np.testing.assert_array_equal, short, optimised(OptimizerSpec()))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sgd", (optax.add_decayed_weights(0.1), optax.trace(0.9))),
        ("adamw", (optax.scale_by_adam(), optax.add_decayed_weights(0.1))),
    ],
)
def test_checkpoints_of_earlier_versions_fit(name, parts):
    """The state is the chain that the checkpoints of version 0.1.0 hold."""
    optimizer = make_optimizer(OptimizerSpec(name=name), SimCLR(), constant(1.0), BATCH)
    groups = {"default": optax.scale_by_learning_rate(constant(1.0)), FROZEN: optax.set_to_zero()}
    labels = jax.tree.map(lambda _: "default", PARAMS)
    earlier = optax.chain(*parts, optax.partition(groups, labels))
    states = [each.init(float32(PARAMS)) for each in (optimizer, earlier)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "adam", "weight_decay": 1e-4},
            r"^optimizer\.weight_decay=0\.0001 has no effect on .*; use optimizer\.weight_decay=0$",
        ),
        (
            {"name": "lamb", "settings": {"b_2": 0.9}},
            r"^optimizer\.settings\.b_2=0\.9 is not an argument of lamb; use b1, b2, eps, eps_root"
            r"; did you mean 'b2'\?$",
        ),
        ({"settings": {"b2": 0.9}}, r"^optimizer\.settings\.b2=0\.9 .* of sgd; use nesterov$"),
        ({"settings": {"learning_rate": 1.0}}, r"^optimizer\.settings\.learning_rate=1\.0 is no"),
        (
            {"name": "lbfgs", "weight_decay": 0.0},
            r"^optimizer\.name='lbfgs' .* cannot train: .*missing .*'value_fn'$",
        ),
        (
            {"name": "adamw", "settings": {"b2": "high"}},
            r"^optimizer\.name='adamw' with optimizer\.settings=\{'b2': 'high'\} cannot train: ",
        ),
    ],
)
def test_what_an_optimiser_cannot_take_is_named(settings, message):
    with pytest.raises(ConfigError, match=message) as refused:
        make_optimizer(OptimizerSpec(**settings), SimCLR(), constant(1.0), BATCH)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw"])
def test_a_warm_up_from_zero_is_refused_where_the_optimiser_divides_by_the_rate(name):
    """The first steps would end the run, and blame too high a learning rate."""

    def made(name):
        spec = OptimizerSpec(name=name, weight_decay=0.0, warmup_epochs=1.0)
        return make_optimizer(spec, SimCLR(), learning_rate(spec, CLOCK, BATCH), BATCH)

    line = rf"^optimizer\.name='{name}' divides .*; use optimizer\.warmup_epochs=0 \(it is 1\.0\)"
    with pytest.raises(ConfigError, match=line):
        made(name)
    made("adam")


def test_the_method_sees_path_and_array_of_every_parameter():
    assert parameter_groups(Grouped(), float32(PARAMS)) == {
        "encoder": {"kernel": "encoder", "scale": FROZEN},
        "predictor": {"kernel": "predictor", "bias": "predictor"},
    }
    assert set(jax.tree.leaves(parameter_groups(SimCLR(), float32(PARAMS)))) == {"default"}


@pytest.mark.parametrize(("batch", "peak"), [(256, 0.03), (64, 0.0075), (1024, 0.12)])
def test_the_peak_scales_with_the_global_batch(batch, peak):
    spec = OptimizerSpec(base_learning_rate=0.03)
    np.testing.assert_allclose(peak_learning_rate(spec, batch), peak)
    schedule = learning_rate(spec, CLOCK, batch)
    np.testing.assert_allclose(schedule(jnp.int32(0)), peak, rtol=1e-6)


def rates_of(**settings):
    schedule = learning_rate(OptimizerSpec(**settings), CLOCK, BATCH)
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(CLOCK.total_steps + 1)))


def test_half_a_cosine_over_the_steps():
    rates = rates_of()
    np.testing.assert_allclose(rates, cosine(np.arange(41)), atol=1e-8)
    np.testing.assert_allclose(rates[[0, 20, 40]], [0.06, 0.03, 0], atol=1e-8)


def test_stepping_by_the_epoch_is_a_staircase_under_the_same_cosine():
    rates = rates_of(schedule_by="epoch").reshape(-1)[:40].reshape(10, 4)
    np.testing.assert_allclose(rates, np.tile(cosine(4 * np.arange(10)), (4, 1)).T, atol=1e-8)
    assert len(np.unique(rates)) == 10


def test_warm_up_is_linear_from_zero_and_the_cosine_fills_the_rest():
    rates = rates_of(warmup_epochs=2.5)
    np.testing.assert_allclose(rates[:11], 0.06 * np.arange(11) / 10, atol=1e-8)
    rest = np.arange(31) / 30
    np.testing.assert_allclose(rates[10:], 0.03 * (1 + np.cos(np.pi * rest)), atol=1e-8)


def test_warm_up_moves_every_step_even_if_the_cosine_moves_by_the_epoch():
    rates = rates_of(warmup_epochs=2.0, schedule_by="epoch")
    np.testing.assert_allclose(rates[:8], 0.06 * np.arange(8) / 8, atol=1e-8)
    np.testing.assert_allclose(rates[8:12], 0.06, atol=1e-8)


def test_a_rate_may_end_above_zero():
    rates = rates_of(final_fraction=0.1)
    np.testing.assert_allclose(rates, 0.006 + 0.9 * cosine(np.arange(41)), atol=1e-8)


def test_the_clock_counts_whole_epochs_and_parts():
    clock = Clock(steps_per_epoch=4, total_steps=10)
    assert clock.epochs == 2.5
    for step, epochs in ((0, 0), (3, 0.75), (4, 1), (9, 2.25)):
        progress = clock.at(jnp.int32(step))
        assert progress.epoch == epochs
        assert progress.whole_epoch == int(epochs)
    with pytest.raises(ConfigError, match=r"^steps_per_epoch=0 must be at least 1"):
        Clock(steps_per_epoch=100 // 256, total_steps=10)


@pytest.mark.parametrize("steps_per_epoch", [41, 100_000])
def test_whatever_changes_by_the_epoch_changes_at_its_first_step(steps_per_epoch):
    epochs = np.arange(1, 1001)
    clock = Clock(steps_per_epoch, 1001 * steps_per_epoch)

    schedule = learning_rate(OptimizerSpec(schedule_by="epoch"), clock, BATCH)

    @jax.jit
    @jax.vmap
    def changing(step):
        progress = clock.at(step)
        momentum = BYOL(momentum_by="epoch").target_momentum(progress)
        given = Conditioning(start_epoch=500.0).given(
            jax.random.key(0), jnp.zeros(1, int), progress.epoch
        )
        return progress.whole_epoch, given[0], schedule(step), momentum

    first, last = (changing(jnp.asarray(epochs * steps_per_epoch - before)) for before in (0, 1))
    np.testing.assert_array_equal(first[0], epochs)
    np.testing.assert_array_equal(last[0], epochs - 1)
    np.testing.assert_array_equal(first[1], epochs >= 500)
    np.testing.assert_array_equal(first[2][:-1], last[2][1:])
    np.testing.assert_array_equal(first[3][:-1], last[3][1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lamp"}, r"optimizer\.name='lamp'.*use one of acprop, .*lamb, .*mean 'lamb'\?$"),
        ({"name": "scale_by_adam"}, r"optimizer\.name='scale_by_adam' is unknown"),
        ({"clip_norm": -1.0}, r"optimizer\.clip_norm=-1\.0 must be at least 0"),
        ({"schedule_by": "week"}, r"optimizer\.schedule_by='week'.*use one of epoch, step"),
        ({"base_learning_rate": 0.0}, r"optimizer\.base_learning_rate=0\.0 must be above 0"),
        ({"base_learning_rate": float("nan")}, r"optimizer\.base_learning_rate=nan"),
        ({"weight_decay": -0.1}, r"optimizer\.weight_decay=-0\.1 must be at least 0"),
        ({"warmup_epochs": -1.0}, r"optimizer\.warmup_epochs=-1\.0 must be at least 0"),
        ({"momentum": 1.0}, r"optimizer\.momentum=1\.0 is not in \[0, 1\); 0\.9"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSpec(**settings)
