"""SwAV's codes, swapped prediction, queue, prototypes and views against NumPy and the paper."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec, draw
from cassle_jax.config import base_config
from cassle_jax.methods import Encoded, Networks, Progress, Step, losses
from cassle_jax.methods.swav import Prototypes, SwAV
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from cassle_jax.training.run import build_run
from tests.methods.one_device import BATCH, CLOCK, compiled, random_views, training, unit

SAMPLES, COUNT, OUT, DEVICES = 16, 5, 4, 8
SIZES = (8, 8, 4, 4)
EPSILON, TEMPERATURE = 0.2, 0.3
# The queue may be used from the second step on, an epoch being two, and is full after the third.
QUEUE, QUEUE_START, FROZEN_STEPS = 3 * BATCH, 0.5, 2


def method(**settings):
    small = {
        "prototypes": COUNT,
        "epsilon": EPSILON,
        "temperature": TEMPERATURE,
        "small_crops": 2,
        "queue_size": QUEUE,
        "queue_start": QUEUE_START,
        "freeze_prototypes_steps": FROZEN_STEPS,
        "projector_hidden": 8,
        "projector_out": OUT,
    }
    return SwAV(**{**small, **settings})


def sinkhorn(scores, epsilon=EPSILON, iterations=3):
    """Algorithm of the paper, in double precision and without logarithms."""
    table = np.exp(np.float64(scores) / epsilon)
    for _ in range(iterations):
        table /= table.sum(0) * table.shape[1]
        table /= table.sum(1, keepdims=True) * table.shape[0]
    return table * table.shape[0]


def cross_entropy(codes, scores):
    logits = np.float64(scores) / TEMPERATURE
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -np.mean(np.sum(codes * log_softmax, axis=1))


def swapped_prediction(scores, codes):
    """The mean over both codes and, for each, over all other views."""
    terms = [
        cross_entropy(codes[crop], scores[view])
        for crop in (0, 1)
        for view in range(len(scores))
        if view != crop
    ]
    return np.mean(terms)


@pytest.fixture(scope="module")
def scores():
    """Cosines of as many views as there are sizes, from float32."""
    draw = np.random.default_rng(0)
    cosines = np.tanh(draw.normal(size=(len(SIZES), SAMPLES, COUNT)) + draw.normal(size=COUNT))
    return jnp.asarray(cosines, jnp.float32)


def codes(scores, *queue, epsilon=EPSILON, iterations=3, axis_name=None):
    return losses.sinkhorn_codes(
        scores, *queue, epsilon=epsilon, iterations=iterations, axis_name=axis_name
    )


@pytest.mark.parametrize("iterations", [1, 3])
def test_codes_are_sinkhorns(scores, iterations):
    found = codes(scores[0], iterations=iterations)
    np.testing.assert_allclose(found, sinkhorn(scores[0], iterations=iterations), rtol=1e-5)


def test_many_iterations_use_all_prototypes_equally_and_change_nothing_more(scores):
    found = compiled(lambda scores: codes(scores, iterations=200))(scores[0])
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.sum(0), SAMPLES / COUNT, rtol=1e-4)
    again = codes(EPSILON * jnp.log(found), iterations=1)
    np.testing.assert_allclose(again, found, rtol=1e-4)
    few = codes(scores[0], iterations=1).sum(0)
    assert np.abs(few - SAMPLES / COUNT).max() > 0.1


def test_a_small_epsilon_gives_hard_codes_and_no_overflow(scores):
    found = np.asarray(codes(scores[0], epsilon=1e-4))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert np.median(found.max(1)) > 0.99


def test_a_queue_shares_the_prototypes_unless_it_is_not_used(scores):
    own, queued = scores[0], scores[1]
    shared = sinkhorn(np.concatenate([own, queued]))[:SAMPLES]
    alone = sinkhorn(own)
    assert np.abs(shared - alone).max() > 0.01
    np.testing.assert_allclose(codes(own, queued), shared, rtol=1e-5)
    np.testing.assert_allclose(codes(own, queued, jnp.array(False)), alone, rtol=1e-5)


def step_of(scores, memory, epoch=0.0, axis_name=None):
    """A step whose predictions are given, and whose embeddings are made of them."""
    online = {
        view: Encoded(each, jnp.tanh(each[:, :OUT] + 0.5), each) for view, each in enumerate(scores)
    }
    return Step(online, {}, memory, Progress(step=0, epoch=epoch, epochs=3.0), axis_name)


def test_the_loss_is_the_swapped_prediction_and_no_gradient_goes_through_the_codes(scores):
    swav = method(queue_size=0)

    def total(scores):
        terms = swav.loss(step_of(scores, {}), Networks({}))
        return sum(terms.values()), terms

    (loss, terms), gradient = compiled(jax.value_and_grad(total, has_aux=True))(scores)
    targets = [sinkhorn(scores[0]), sinkhorn(scores[1])]
    np.testing.assert_allclose(loss, swapped_prediction(scores, targets), rtol=1e-5)
    large = cross_entropy(targets[0], scores[1]) + cross_entropy(targets[1], scores[0])
    np.testing.assert_allclose(terms["large"], large / 6, rtol=1e-5)

    softmax = np.exp(np.float64(scores) / TEMPERATURE)
    softmax /= softmax.sum(-1, keepdims=True)
    wanted = [targets[1:], targets[:1], targets, targets]
    for view, codes_of_others in enumerate(wanted):
        pull = sum(softmax[view] - code for code in codes_of_others)
        expected = pull / TEMPERATURE / SAMPLES / 6
        np.testing.assert_allclose(gradient[view], expected, rtol=1e-4, atol=1e-7)


def test_without_small_crops_the_two_views_predict_each_other(scores):
    swav = method(queue_size=0, small_crops=0)
    terms = swav.loss(step_of(scores[:2], {}), Networks({}))
    assert terms.keys() == {"large"}
    targets = [sinkhorn(scores[0]), sinkhorn(scores[1])]
    np.testing.assert_allclose(terms["large"], swapped_prediction(scores[:2], targets), rtol=1e-5)


def test_a_queue_that_no_whole_number_of_batches_fills_names_one_that_works_or_none():
    with pytest.raises(ValueError, match=r"queue_size=100.*; 96 would work, or 0 for no queue$"):
        method(queue_size=100).check(32, 4)
    method(queue_size=96).check(32, 4)
    method(queue_size=0).check(32, 4)


def random_queue(size):
    rows = np.random.default_rng(1).normal(size=(2, size, OUT))
    return jnp.asarray([unit(each) for each in rows], jnp.float32)


def random_prototypes():
    """Networks that score by them."""
    prototypes = jnp.asarray(np.random.default_rng(2).normal(size=(COUNT, OUT)), jnp.float32)
    networks = Networks({"predictor": partial(Prototypes, COUNT)})
    return networks.bind({"params": {"predictor": {"prototypes": prototypes}}})


@pytest.mark.exhaustive
def test_eight_devices_are_one_with_and_without_the_queue(scores):
    """The gradient as a training step takes it: of weights that all devices have alike."""
    swav, networks = method(queue_size=SAMPLES), random_prototypes()

    def value_and_gradient(weights, memory, epoch, scores, axis_name=None):
        def step(weights):
            views = [scores[:, view] @ weights for view in range(len(SIZES))]
            return step_of(views, memory, epoch, axis_name)

        def loss(weights):
            return sum(swav.loss(step(weights), networks).values())

        result = jax.value_and_grad(loss)(weights)
        result = result if axis_name is None else jax.lax.pmean(result, axis_name)
        return result, swav.update_memory(step(weights))

    whole = compiled(value_and_gradient)
    split = parallel(
        partial(value_and_gradient, axis_name=AXIS),
        device_mesh(jax.devices()[:DEVICES]),
        inputs=(REPLICATED, REPLICATED, REPLICATED, SHARDED),
        outputs=REPLICATED,
    )
    weights, memory = jnp.eye(COUNT) + 0.1, {"queue": random_queue(SAMPLES)}
    for epoch in (0.0, QUEUE_START):
        inputs = weights, memory, epoch, scores.swapaxes(0, 1)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            split(*inputs),
            whole(*inputs),
        )


@pytest.fixture(scope="module")
def run():
    """Six steps: each with its views, the state before and after it, and its metrics."""
    swav = method()
    networks, state, update, _ = training(swav)
    state = state.replace(params=swav.after_update(state.params))
    steps = []
    for number in range(CLOCK.total_steps):
        inputs = random_views(number, sizes=SIZES)
        after, metrics = update(state, inputs)
        steps.append((inputs.views, state, after, metrics))
        state = after
    return steps, embedder(networks)


def embedder(networks):
    """Projections of all views: encoded with those of equal size, projected all together."""

    def project(networks, views):
        passes = [jax.tree.map(lambda *x: jnp.concatenate(x), *views[at : at + 2]) for at in (0, 2)]
        features = jnp.concatenate([networks.encode(each, train=True) for each in passes])
        return networks.projector(features, jnp.zeros((len(features), 0)), True)

    def embed(state, views):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        run = nn.apply(lambda networks: project(networks, views), networks, mutable=True)
        return run(variables)[0]

    return compiled(embed)


def embeddings(embed, state, views):
    """Projections per view, at unit length."""
    return [unit(rows) for rows in np.split(np.float64(embed(state, views)), len(views))]


def prototypes_of(state):
    return np.float64(state.params["predictor"]["prototypes"])


def test_a_step_swaps_codes_that_the_queue_takes_part_in_once_it_is_full(run):
    steps, embed = run
    for number, (views, before, _, metrics) in enumerate(steps):
        rows, centres = embeddings(embed, before, views), prototypes_of(before).T
        alone = [sinkhorn(rows[crop] @ centres) for crop in (0, 1)]
        queue = np.float64(before.memory["queue"])
        shared = [
            sinkhorn(np.concatenate([rows[crop], queue[crop]]) @ centres)[:BATCH] for crop in (0, 1)
        ]
        scores = [each @ centres for each in rows]
        wanted, other = (shared, alone) if number >= 3 else (alone, shared)
        expected = swapped_prediction(scores, wanted)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
        assert abs(swapped_prediction(scores, other) - expected) > 1e-3


def test_a_full_queue_waits_for_its_epoch(scores):
    swav, networks = method(queue_size=4, queue_start=1.5), random_prototypes()
    memory = {"queue": random_queue(4)}
    large = compiled(lambda epoch: swav.loss(step_of(scores, memory, epoch), networks)["large"])
    first, before, then = (large(epoch) for epoch in (0.0, 1.0, 1.5))
    assert first == before != then


def test_the_queue_starts_empty_fills_in_order_and_wraps_round(run):
    steps, embed = run
    expected = np.zeros((2, QUEUE, OUT))
    for number, (views, before, after, _) in enumerate(steps):
        np.testing.assert_allclose(before.memory["queue"], expected, rtol=1e-3, atol=1e-4)
        place = number % 3 * BATCH
        expected[:, place : place + BATCH] = embeddings(embed, before, views)[:2]
        np.testing.assert_allclose(after.memory["queue"], expected, rtol=1e-3, atol=1e-4)


def test_prototypes_stay_for_the_frozen_steps_and_then_move_at_unit_length(run):
    steps, _ = run
    for number, (_, before, after, _) in enumerate(steps):
        old, new = prototypes_of(before), prototypes_of(after)
        np.testing.assert_allclose(np.linalg.norm(new, axis=1), 1, rtol=1e-6)
        moved = np.abs(new - old).max()
        assert moved < 1e-6 if number < FROZEN_STEPS else moved > 1e-3


def test_prototypes_are_frozen_for_an_epoch_of_whatever_dataset_and_batch():
    for images, batch in ((64, 8), (96, 32), (50, 16)):
        config = base_config("method=swav,conditioning=none")
        config.batch_size = batch
        config.method.queue_size = 0
        run = build_run(config, device_mesh(jax.devices()[:1]), images)
        rates = run.method.group_schedules(lambda step: 1.0, 1.0)["prototypes"]
        epoch = images // batch
        np.testing.assert_array_equal(rates(jnp.arange(2 * epoch)), [0.0] * epoch + [1.0] * epoch)
    assert method(freeze_prototypes_steps=7).in_steps(100).freeze_prototypes_steps == 7


def test_the_terms_are_logged_and_add_up_to_the_loss(run):
    for _, _, _, metrics in run[0]:
        np.testing.assert_allclose(
            metrics["loss_large"] + metrics["loss_small"], metrics["loss"], rtol=1e-6
        )
        assert metrics["loss_large"] > 0 and metrics["loss_small"] > 0


def test_views_of_equal_size_share_their_batch_statistics():
    assert method().online_passes == ((0, 1), (2, 3))
    assert SwAV().online_passes == ((0, 1), (2, 3, 4, 5, 6, 7))
    assert SwAV(small_crops=0).online_passes == ((0, 1),)


def test_prototypes_start_at_unit_length_and_score_by_cosine():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, OUT)), jnp.float32)
    inputs = rows, jnp.zeros((3, 0)), True
    found, variables = Prototypes(COUNT).init_with_output(jax.random.key(0), *inputs)
    centres = np.asarray(variables["params"]["prototypes"])
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-6)
    assert np.linalg.norm(centres.mean(0)) < 0.9
    np.testing.assert_allclose(found, unit(rows) @ centres.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "small"), [(224, 96), (96, 40), (64, 24), (32, 16), (16, 8)])
def test_small_views_are_three_sevenths_of_the_large_ones(size, small):
    spec = AugmentSpec(size=size, crop_area=(0.14, 1.0), flip=0.25)
    views = SwAV().views(spec, spec)
    assert views[:2] == (spec, spec)
    assert [view.size for view in views[2:]] == [small] * 6
    assert {view.flip for view in views} == {0.25}
    assert SwAV(small_crops=0).views(spec, spec) == (spec, spec)


def test_views_cover_the_papers_shares_of_the_image():
    spec = AugmentSpec(size=32, crop_area=SwAV.recipe["augment.crop_area"])
    *_, small = SwAV(small_crop_size=12).views(spec, spec)
    assert small.size == 12
    keys = jax.random.split(jax.random.key(0), 200)

    def areas(spec):
        crop = jax.vmap(lambda key: draw(key, jnp.array([400, 400]), spec).crop)
        return np.prod(np.asarray(compiled(crop)(keys))[:, 2:], axis=1)

    for view, low, high in ((spec, 0.14, 1.0), (small, 0.05, 0.14)):
        found = areas(view)
        assert low - 0.01 < found.min() < low + 0.1 and high - 0.1 < found.max() < high + 0.01


def test_a_small_view_larger_than_a_large_one_is_refused():
    spec = AugmentSpec(size=32)
    message = r"^method\.small_crop_size=40 .* larger than augment\.size=32; use at most 32$"
    with pytest.raises(ValueError, match=message):
        SwAV(small_crop_size=40).views(spec, spec)


def test_a_queue_that_no_whole_number_of_batches_fills_names_one_that_works():
    with pytest.raises(ValueError, match=r"^method\.queue_size=100.*batch_size=32; 96 .*, or 0 "):
        method(queue_size=100).check(32, 4)
    method(queue_size=96).check(32, 4)
    method(queue_size=0).check(32, 4)


def test_a_queue_of_none_carries_nothing(scores):
    swav = method(queue_size=0)
    assert swav.initial_memory(jax.random.key(0)) == {}
    assert swav.update_memory(step_of(scores, {})) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"^method\.temperature=0\.0 must be above 0$"),
        ({"epsilon": -0.05}, r"^method\.epsilon=-0\.05 must be above 0$"),
        ({"prototypes": 1}, r"^method\.prototypes=1 must be at least 2$"),
        ({"sinkhorn_iterations": 0}, r"^method\.sinkhorn_iterations=0 must be at least 1$"),
        ({"small_crops": -1}, r"^method\.small_crops=-1 must be at least 0$"),
        ({"queue_size": -1}, r"^method\.queue_size=-1 must be at least 0$"),
        ({"queue_start": float("nan")}, r"^method\.queue_start=nan must be at least 0$"),
        ({"freeze_prototypes_steps": -1}, r"^method\.freeze_prototypes_steps=-1 must be at "),
        ({"small_crop_area": (0.2, 0.1)}, r"^method\.small_crop_area=\(0\.2, 0\.1\) .*low <= high"),
        ({"small_crop_area": (0.0, 0.1)}, r"^method\.small_crop_area=\(0\.0, 0\.1\) .*0 < low"),
        ({"projector_out": 0}, r"^method\.projector_out=0 must be at least 1$"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)
