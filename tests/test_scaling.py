"""What devices say to each other in a step is what docs/scaling.md says, and no more."""

import collections
import functools

import jax
import pytest

from benchmarks.scaling import (
    BATCH_NORM,
    BATCH_NORM_GRADIENTS,
    EMBEDDINGS,
    GRADIENTS,
    H100,
    METRICS,
    V5E,
    V6E,
    Collective,
    Part,
    Work,
    collectives_in,
    optimised,
    trace_step,
    work,
)
from cassle_jax.methods.losses import pair_similarities
from cassle_jax.models import ENCODERS
from cassle_jax.models.convolve import convolve
from cassle_jax.parallel import device_mesh
from cassle_jax.training.run import build_run
from tests.tiny import TinyEncoder, tiny_config

FLOAT = 4  # bytes
LOCAL_BATCH = 2
EMBEDDING = 32  # numbers
MEBIBYTES = Collective("all-reduce", (Part("f32", (2**20,), GRADIENTS),))
NOTHING = Collective("all-reduce", (Part("f32", (0,), BATCH_NORM),))


@pytest.fixture(autouse=True)
def _tiny_encoder(monkeypatch):
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)


@functools.cache
def compiled(arguments, devices):
    """The step's collectives for a batch that grows with the devices, and the initial state."""
    config = tiny_config(arguments)
    config.batch_size = LOCAL_BATCH * devices
    config.optimizer.warmup_epochs = 0.0
    mesh = device_mesh(jax.devices()[:devices])
    state = jax.eval_shape(build_run(config, mesh, 64).initial_state)
    return collectives_in(optimised(trace_step(config, mesh))), state


def by_purpose(collectives):
    """For each purpose and kind how many arrays are exchanged, and their bytes."""
    found = collections.defaultdict(list)
    for collective in collectives:
        for part in collective.parts:
            assert part.dtype == "f32"
            found[part.purpose, collective.kind] += collective.times * [part.bytes]
    return {key: (len(sizes), sum(sizes)) for key, sizes in found.items()}


def count_and_bytes(tree):
    """Number of a tree's arrays, and their bytes in float32."""
    return len(jax.tree.leaves(tree)), FLOAT * sum(leaf.size for leaf in jax.tree.leaves(tree))


def norms(*trees):
    """Layers of BatchNorm in trees of statistics, and the bytes of their means and variances."""
    count, size = count_and_bytes(trees)
    return count // 2, size


def scaled(pair, times):
    return pair[0] * times, pair[1] * times


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_moco_exchanges_gradients_statistics_keys_and_metrics(devices):
    collectives, state = compiled("method=moco_v2", devices)
    similarities = FLOAT * (2 * EMBEDDING + 1)
    assert by_purpose(collectives) == {
        (GRADIENTS, "all-reduce"): count_and_bytes(state.params),
        (BATCH_NORM, "all-reduce"): norms(state.batch_stats, state.target_batch_stats),
        (BATCH_NORM_GRADIENTS, "all-reduce"): norms(state.batch_stats),
        (EMBEDDINGS, "all-gather"): (1, FLOAT * EMBEDDING * LOCAL_BATCH * devices),
        (METRICS, "all-reduce"): (2, FLOAT + similarities),
    }


@pytest.mark.exhaustive
def test_a_step_starts_as_many_exchanges_on_eight_devices_as_on_two():
    # XLA combines those that do not wait for each other: all gradients are a few, not one each.
    of_two, state = compiled("method=moco_v2", 2)
    of_eight, _ = compiled("method=moco_v2", 8)
    assert len(of_eight) == len(of_two)
    layers = norms(state.batch_stats, state.target_batch_stats, state.batch_stats)[0]
    assert len(of_eight) <= layers + 4


@pytest.mark.exhaustive
def test_one_device_says_nothing():
    collectives, _ = compiled("method=moco_v2", 1)
    assert collectives == []


@pytest.mark.exhaustive
def test_simclr_gathers_both_views_and_scatters_their_gradients():
    devices = 8
    collectives, state = compiled("method=simclr", devices)
    found = by_purpose(collectives)
    embeddings = FLOAT * EMBEDDING * LOCAL_BATCH * devices
    assert found[EMBEDDINGS, "all-gather"] == (2, 2 * embeddings)
    assert found[EMBEDDINGS, "reduce-scatter"] == (2, 2 * embeddings // devices)
    assert found[BATCH_NORM, "all-reduce"] == scaled(norms(state.batch_stats), 2)
    assert found[BATCH_NORM_GRADIENTS, "all-reduce"] == scaled(norms(state.batch_stats), 2)
    assert found[GRADIENTS, "all-reduce"] == count_and_bytes(state.params)


@pytest.mark.exhaustive
def test_barlow_twins_averages_its_correlations_and_gathers_nothing():
    collectives, _ = compiled("method=barlow_twins", 8)
    found = by_purpose(collectives)
    matrices = {key: value for key, value in found.items() if key[0] == EMBEDDINGS}
    # Once: their gradients come out the same on all devices.
    assert matrices == {(EMBEDDINGS, "all-reduce"): (1, FLOAT * EMBEDDING**2)}


def test_a_batch_of_65536_has_more_pairs_than_an_int32_counts():
    rows = jax.ShapeDtypeStruct((65_536, EMBEDDING), "float32")
    found = jax.eval_shape(lambda first, second: pair_similarities(first, second, None), rows, rows)
    assert found["negative_similarity"].dtype == "float32"


@pytest.mark.exhaustive
def test_the_work_of_a_step_is_counted_for_one_device():
    config = tiny_config("method=simclr,follow=published")  # contrasts within each device
    alone = work(trace_step(config, device_mesh(jax.devices()[:1])))
    config.batch_size *= 8
    one_of_eight = work(trace_step(config, device_mesh(jax.devices()[:8])))
    assert one_of_eight.flops == pytest.approx(alone.flops, rel=0.02)
    assert one_of_eight.bytes == pytest.approx(alone.bytes, rel=0.02)


def test_the_work_is_an_accelerators():
    def traced(f):
        shapes = (2, 4, 4, 32), (3, 3, 32, 32)
        x, kernel = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
        around = ((1, 1), (1, 1))
        how = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        step = jax.value_and_grad(lambda x, kernel: f(x, kernel, (1, 1), around, **how).sum())
        return jax.jit(step).trace(x, kernel)

    assert work(traced(convolve)) == work(traced(jax.lax.conv_general_dilated))


def test_the_latency_between_hosts_is_nccls_own():
    # NCCL_DEBUG=INFO says «256 Bytes -> Algo 0 proto 0 time 25.229528» on two hosts of 8 H100s:
    # NVIDIA/nccl, issue 1453.
    assert H100.exchange_seconds(NOTHING, 16) == pytest.approx(25.2e-6)


def test_bytes_go_around_a_ring():
    # An all-reduce sends 2 (N - 1) / N of its bytes from each device, an all-gather half of that.
    size = 4 * 2**20
    assert H100.exchange_seconds(MEBIBYTES, 8) == pytest.approx(
        6.8e-6 + 14 * 0.6e-6 + 2 * 7 / 8 * size / 370e9
    )
    gather = Collective("all-gather", MEBIBYTES.parts)
    assert H100.exchange_seconds(gather, 8) == pytest.approx(
        6.8e-6 + 7 * 0.6e-6 + 7 / 8 * size / 370e9
    )
    scatter = Collective("reduce-scatter", (Part("f32", (2**20 // 8,), EMBEDDINGS),))
    assert H100.exchange_seconds(scatter, 8) == H100.exchange_seconds(gather, 8)
    assert H100.exchange_seconds(MEBIBYTES, 1) == 0


@pytest.mark.parametrize(("devices", "hops", "links"), [(8, 4, 2), (64, 14, 2), (256, 16, 4)])
def test_only_the_full_axes_of_a_pod_are_rings(devices, hops, links):
    assert V5E.exchange_seconds(NOTHING, devices) == pytest.approx(2 * hops * 1e-6)
    assert V6E.bandwidth(devices) == pytest.approx(links * 90e9)


def test_the_roofline_is_the_higher_of_its_two_sides():
    assert H100.roofline_seconds(Work(flops=989e12, bytes=3.35e12 / 2)) == pytest.approx(1.0)
    assert H100.roofline_seconds(Work(flops=989e12 / 2, bytes=3.35e12)) == pytest.approx(1.0)


def test_a_combined_exchange_and_a_loop_are_read():
    program = """HloModule step

FunctionNames
1 "<module>"
2 "_moments"
3 "averaged_gradient"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=1 function_name_id=2 line=2}
3 {file_name_id=1 function_name_id=3 line=3}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=3 parent_frame_id=1}

%body.1 (arg: (s32[], f32[5])) -> (s32[], f32[5]) {
  %gather.1 = f32[8,3]{1,0} all-gather(%x), dimensions={0}, metadata={stack_frame_id=1}
}

ENTRY %main (p: f32[5]) -> f32[5] {
  %loop = (s32[]) while(%t), body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[2,4]{1,0}, bf16[6]{0}) all-reduce(%a, %b), metadata={op_name="both"}
  %f = f32[2,4] get-tuple-element(%both), index=0, metadata={op_name="transpose(" stack_frame_id=2}
  %s = bf16[6] get-tuple-element(%both), index=1, metadata={stack_frame_id=3}
  %alone = f32[4]{0} all-reduce(%b), replica_groups={{0},{1}}, metadata={stack_frame_id=3}
  ROOT %loss = f32[] all-reduce(%c), replica_groups={{0,1}}, metadata={stack_frame_id=3}
}
"""
    assert collectives_in(program) == [
        Collective("all-gather", (Part("f32", (8, 3), EMBEDDINGS),), times=3),
        Collective(
            "all-reduce",
            (Part("f32", (2, 4), BATCH_NORM_GRADIENTS), Part("bf16", (6,), GRADIENTS)),
        ),
        Collective("all-reduce", (Part("f32", (), METRICS),)),
    ]
    sizes = [collective.bytes for collective in collectives_in(program)]
    assert sizes == [8 * 3 * 4, 2 * 4 * 4 + 6 * 2, 4]
