"""A batch that passes the encoder in chunks: the gradient of one shot, in the memory of a chunk."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import ConfigError
from cassle_jax.data import DamagedLog, open_source, training_batches
from cassle_jax.methods import ESSL, METHODS, SIE, STL, AugSelf, EquiMod, Features, Step
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.models import ENCODERS
from cassle_jax.models.resnet import ARCHITECTURES, BasicBlock
from cassle_jax.optimizer import learning_rate
from cassle_jax.parallel import device_mesh, shard_batch
from cassle_jax.training.chunks import in_chunks
from cassle_jax.training.run import build_run
from cassle_jax.training.saved_config import changes
from cassle_jax.training.state import state_from_variables
from cassle_jax.training.step import Update, make_train_step
from tests.methods.one_device import CLOCK, PLAIN, SPEC, compiled, random_variables, random_views
from tests.methods.test_every_method import small
from tests.states import filled_state
from tests.tiny import EVERY_AUXILIARY, TinyEncoder, cropped_only, tiny_config

BATCH, CHUNKS = 16, 4
AUGSELF = AugSelf({"crop": 0.5, "flip": 0.3}, hidden=8)
EQUIMOD = EquiMod(0.5, ("crop", "flip"), hidden=8, out=6)
SIE_TINY = SIE(1.0, ("crop", "flip"), hidden=8, out=6)
STL_TINY = STL(1.0, hidden=8, out=6, code=5)
TINY_AUXILIARIES = (AUGSELF, EQUIMOD, ESSL(0.4, hidden=8), SIE_TINY, STL_TINY)
CASSLE = Conditioning(depth=2, width=8)
INTO_THE_IMAGE = Conditioning(injection="image", depth=2, width=8)
CASES = {name: (name, CASSLE) for name in METHODS}
CASES["byol into the image"] = "byol", INTO_THE_IMAGE
CASES["simclr plain"] = "simclr", PLAIN
# The tests compile for seconds and run for milliseconds.
QUICKLY = {"xla_backend_optimization_level": 0}
# After its step, a state has the gradient itself.
RECORD = optax.trace(decay=0.0)


class WithoutNorm(nn.Module):
    """An encoder in which no image depends on another."""

    feature_width = 8

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(self.feature_width, (4, 4), 4, name="conv")(images)
        return nn.gelu(x).mean((1, 2))


def prepare(name, conditioning, encoder=TinyEncoder, auxiliaries=(AUGSELF,)):
    """A method's networks, a first state whose momentum networks have moved, and a batch."""
    method = small(name)
    networks = build_networks(method, encoder, encoder().feature_width, conditioning, auxiliaries)
    views = batch_for(method, conditioning, auxiliaries)
    key = jax.random.key(0)
    variables = random_variables(networks, views.views[0])
    state = state_from_variables(variables, method.initial_memory(key), method, RECORD, key)
    moved = jax.tree.map(lambda x: np.float32(0.9) * x, jax.device_get(state.target_params))
    return method, networks, state.replace(target_params=moved), views


def batch_for(method, conditioning, auxiliaries):
    specs = method.views(AugmentSpec(8, kernel_size=3), AugmentSpec(8, kernel_size=3))
    sizes = [spec.size for spec in specs] + [8] * sum(each.further for each in auxiliaries)

    def part(seed):
        views = random_views(seed, conditioning.size, AUGSELF.descriptors, sizes)
        omegas = tuple(view.descriptor for view in random_views(seed, 5).views)
        return views.replace(targets={**views.targets, "equimod": omegas, "sie": omegas[0]})

    parts = [part(seed) for seed in range(BATCH // 4)]
    return jax.tree.map(lambda *rows: jnp.asarray(np.concatenate(rows)), *parts)


def update_of(method, networks, chunks, auxiliaries=(AUGSELF,)):
    schedule = learning_rate(SPEC, CLOCK, 256)
    return compiled(
        Update(networks, method, auxiliaries, RECORD, schedule, CLOCK, None, chunks=chunks)
    )


def assert_close(found, expected):
    """Each array within 1e-5 of its length, or of where float32 rounds the longest of them."""
    trees = jax.device_get((found, expected))  # JAX compiles a difference per shape
    found, expected = map(jax.tree_util.tree_leaves_with_path, trees)
    assert [path for path, _ in found] == [path for path, _ in expected] and found
    rounding = np.finfo(np.float32).eps * max(np.linalg.norm(value) for _, value in expected)
    for (path, one), (_, other) in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        error, allowed = np.linalg.norm(one - other), 1e-5 * np.linalg.norm(other)
        assert error <= max(allowed, rounding), jax.tree_util.keystr(path)


class OneShot:
    """The step as one program: the encoder vmapped over the chunks, one gradient of the loss."""

    def __init__(self, method, networks):
        self.method, self.networks = method, networks

    def encode(self, passes, params, batch_stats, views):
        """Features by view, and the mean of the statistics that the chunks leave."""

        def encode_chunk(index):
            rows = index + jnp.arange(0, BATCH, CHUNKS)
            chunk = jax.tree.map(lambda x: x[rows], views)

            def encode(networks):
                features = {}
                for indices in passes:
                    rows = jax.tree.map(lambda *x: jnp.concatenate(x), *[chunk[i] for i in indices])
                    parts = jnp.split(networks.encode(rows, train=True), len(indices))
                    features |= dict(zip(indices, parts, strict=True))
                return features

            variables = {"params": params, "batch_stats": batch_stats}
            return nn.apply(encode, self.networks, mutable=["batch_stats"])(variables)

        features, changed = jax.vmap(encode_chunk)(jnp.arange(CHUNKS))
        by_image = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(BATCH, -1), features)
        return by_image, jax.tree.map(lambda x: x.mean(0), changed["batch_stats"])

    def project(self, networks, features, views, passes, predict):
        encoded = {}
        for indices in passes:
            parts = networks.project(
                jnp.concatenate([features[i] for i in indices]),
                jnp.concatenate([views[i].descriptor for i in indices]),
                train=True,
                predict=predict,
            )
            for place, index in enumerate(indices):
                rows = slice(place * BATCH, (place + 1) * BATCH)
                encoded[index] = jax.tree.map(lambda x, rows=rows: x[rows], parts)
        return encoded

    def loss(self, params, target_params, state, inputs):
        views, method = inputs.views, self.method
        target, target_stats = {}, {}
        if method.target_passes:
            features, target_stats = self.encode(
                method.target_passes, target_params, state.target_batch_stats, views
            )
            target, changed = nn.apply(
                lambda networks: self.project(
                    networks, features, views, method.target_passes, False
                ),
                self.networks,
                mutable=["batch_stats"],
            )({"params": target_params, "batch_stats": target_stats})
            target_stats = changed["batch_stats"]
        features, stats = self.encode(method.online_passes, params, state.batch_stats, views)

        def total(networks):
            passes = method.head_passes or method.online_passes
            online = self.project(networks, features, views, passes, True)
            step = Step(online, target, state.memory, CLOCK.at(state.step))
            loss = method.loss(step, networks)
            loss = loss[0] if isinstance(loss, tuple) else loss
            loss = sum(loss.values()) if isinstance(loss, dict) else loss
            seen = ({i: each.features for i, each in e.items()} for e in (online, target))
            predicted, _ = AUGSELF.losses(networks, Features(*seen, (), inputs.targets), (), None)
            return loss + 0.5 * predicted["crop"] + 0.3 * predicted["flip"]

        loss, changed = nn.apply(total, self.networks, mutable=["batch_stats"])(
            {"params": params, "batch_stats": stats}
        )
        return loss, (changed["batch_stats"], target_stats)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_shot(case):
    method, networks, state, views = prepare(*CASES[case])
    after, metrics = update_of(method, networks, CHUNKS)(state, views)

    target_params = state.target_params
    if method.target_first:
        stays = float(method.target_momentum(CLOCK.at(state.step)))
        target_params, params = jax.device_get((target_params, state.params))
        target_params = jax.tree.map(
            lambda old, new: stays * old + (1 - stays) * new,
            target_params,
            {name: params[name] for name in target_params},
        )
    one_shot = compiled(jax.value_and_grad(OneShot(method, networks).loss, has_aux=True))
    (loss, statistics), gradient = one_shot(state.params, target_params, state, views)

    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_close(after.opt_state.trace, gradient)
    assert_close((after.batch_stats, after.target_batch_stats), statistics)


def test_the_plain_methods_omega_without_numbers_passes_in_chunks():
    images = jnp.arange(BATCH)
    omega = jnp.zeros((BATCH, 0))
    (kept, empty), _ = in_chunks(lambda rows: (rows, ()), (images, omega), CHUNKS)
    assert kept.tolist() == images.tolist() and empty.shape == omega.shape


@pytest.mark.exhaustive
def test_an_encoder_without_batch_norm_takes_the_ordinary_step():
    method, networks, state, views = prepare("byol", CASSLE, WithoutNorm, TINY_AUXILIARIES)
    whole, metrics = update_of(method, networks, 1, TINY_AUXILIARIES)(state, views)
    after, metrics_in_chunks = update_of(method, networks, CHUNKS, TINY_AUXILIARIES)(state, views)
    assert_close(after.opt_state.trace, whole.opt_state.trace)
    assert_close(after.params, whole.params)
    assert_close(after.batch_stats, whole.batch_stats)
    assert metrics_in_chunks.keys() == metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(metrics_in_chunks[key], value, rtol=1e-5, atol=1e-6)


def quick_config(arguments, chunk_size):
    config = tiny_config(arguments)
    config.chunk_size = chunk_size
    cropped_only(config)
    return config


def train(devices, chunk_size, auxiliaries=EVERY_AUXILIARY):
    """Losses and last state of two steps from the images on, with views drawn by the step."""
    config = quick_config(f"method=moco_v2,{auxiliaries}", chunk_size)
    source = open_source(config.data, "train")
    mesh = device_mesh(jax.devices()[:devices])
    run = build_run(config, mesh, len(source))
    batches = training_batches(
        source,
        batch=run.batch_size,
        canvas=config.data.canvas,
        seed=0,
        damaged=DamagedLog(len(source), 0.0),
    )
    state = filled_state(run, mesh)
    step, losses = None, []
    for _ in range(2):
        before, batch = state, shard_batch(next(batches), mesh)
        # What is compiled takes no state but those of the first one's shapes and dtypes.
        step = step or make_train_step(run, mesh).lower(state, batch).compile(QUICKLY)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert all(array.is_deleted() for array in jax.tree.leaves(before.params))
    batches.close()
    return losses, jax.device_get(
        (state.params, state.batch_stats, state.target_batch_stats, state.memory)
    )


def assert_same_run(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        found[1],
        expected[1],
    )


@pytest.mark.exhaustive
def test_a_chunk_has_the_same_images_on_any_number_of_devices():
    # Statistics show which images share a chunk; ESSL's views pass the encoder, too.
    four, one = (train(devices, 8, "essl=main") for devices in (4, 1))
    assert_same_run(four, one)


@pytest.mark.exhaustive
def test_every_image_has_the_views_it_would_have_in_one_shot(monkeypatch):
    monkeypatch.setitem(ENCODERS, "tiny", lambda **_: WithoutNorm())
    assert_same_run(train(devices=2, chunk_size=4), train(devices=1, chunk_size=0))


@pytest.mark.exhaustive
def test_what_a_state_is_made_of_stays_in_bfloat16_and_with_recomputed_blocks(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, 18, (BasicBlock, (1, 1)))
    config = quick_config(f"method=byol,{EVERY_AUXILIARY}", chunk_size=4)
    config.encoder.update({"name": "resnet18", "small_images": True, "remat": True, "width": 4})
    config.dtype = "bfloat16"
    mesh = device_mesh(jax.devices()[:2])
    run = build_run(config, mesh, 64)
    state = jax.eval_shape(run.initial_state)
    batch = {
        "image": jax.ShapeDtypeStruct((16, 24, 24, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((16, 2), jnp.int32),
    }
    after, _ = jax.eval_shape(make_train_step(run, mesh), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def megabytes(batch_size, chunk_size):
    """What a step needs beside its arguments, on one device."""
    config = quick_config("method=byol,conditioning=none", chunk_size)
    config.batch_size = batch_size
    config.augment.size = config.data.canvas = 32
    mesh = device_mesh(jax.devices()[:1])
    run = build_run(config, mesh, 10_000)
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, 32, 32, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
    }
    step = make_train_step(run, mesh).lower(jax.eval_shape(run.initial_state), batch)
    return step.compile(QUICKLY).memory_analysis().temp_size_in_bytes / 1e6


@pytest.mark.exhaustive
def test_memory_is_that_of_a_chunk():
    whole, chunked, smaller = megabytes(256, 0), megabytes(256, 16), megabytes(64, 16)
    assert chunked < 1.25 * smaller
    assert chunked < whole / 8


@pytest.mark.parametrize(
    ("chunk_size", "devices", "works"),
    [(1, 1, 2), (6, 1, 4), (32, 1, 16), (4, 8, 8), (12, 8, 8), (2, 4, 4), (6, 4, 4)],
)
def test_chunks_that_cannot_be_are_refused_with_what_would_work(chunk_size, devices, works):
    config = tiny_config()
    config.chunk_size = chunk_size
    mesh = device_mesh(jax.devices()[:devices])
    message = rf"^chunk_size={chunk_size} must divide batch_size=16, .* {works} would work, or 0 .*"
    with pytest.raises(ConfigError, match=message):
        build_run(config, mesh, 64)
    config.chunk_size = works
    assert build_run(config, mesh, 64).chunks == 16 // works


def test_a_chunk_is_no_negative_number_of_images_and_may_be_the_batch():
    config = tiny_config()
    mesh = device_mesh(jax.devices()[:1])
    for chunk_size in (0, 16):
        config.chunk_size = chunk_size
        assert build_run(config, mesh, 64).chunks == 1
    config.chunk_size = -4
    with pytest.raises(ConfigError, match=r"^chunk_size=-4 must be at least 0$"):
        build_run(config, mesh, 64)


def test_a_run_is_not_continued_with_other_chunks():
    begun, now = tiny_config(), tiny_config()
    now.chunk_size = 8
    assert changes(begun, now) == {"chunk_size": "chunk_size=8 was 0"}
