"""Six training steps of each method against what the published implementation computes.

This side computes in float64, so that what is left between the two is the published float32's
rounding, and not two sides' that happen to add up.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cassle_jax.interop.pytorch import (
    encoder_from_pytorch,
    encoder_to_pytorch,
    mlp_from_pytorch,
    mlp_to_pytorch,
    predictor_from_pytorch,
    predictor_to_pytorch,
    projector_from_pytorch,
    projector_to_pytorch,
)
from cassle_jax.methods import METHODS, AugSelf, TrainingViews, ViewBatch
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.optimizer import Clock, OptimizerSpec, make_optimizer
from cassle_jax.training.state import initial_variables, state_from_variables
from cassle_jax.training.step import Update
from tests.methods.one_device import compiled
from tests.parity.comparison import Comparison, difference
from tests.parity.descriptors import DESCRIPTORS, DIFFERENCES
from tests.parity.golden_file import GoldenFile
from tests.parity.weights import load, mlp_sizes, with_dtype
from tests.tiny import TinyEncoder

STEPS = 6
FLOAT64 = jnp.dtype("float64")
BOUND = 1e-4
# Ten epochs, and all steps in the first of them.
CLOCK = Clock(steps_per_epoch=100, total_steps=1000)
AUGSELF_WEIGHT = 0.5
CONVERTERS = {
    "encoder": (encoder_from_pytorch, encoder_to_pytorch),
    "projector": (projector_from_pytorch, projector_to_pytorch),
    "predictor": (predictor_from_pytorch, predictor_to_pytorch),
}


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What a file's arrays do not show of the run they come from.

    Attributes:
      method: its name here.
      settings: of the method.
      optimizer: its name.
      weight_decay: of the optimizer.
      share_beyond: how many of the final parameters, as a share, may be off by more than `BOUND`.
      largest: the error that none of them, and none of the statistics, goes beyond.
    """

    method: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    share_beyond: float = 0.0
    largest: float = BOUND


TRAJECTORIES = {
    "barlow_twins": Trajectory("barlow_twins"),
    "byol": Trajectory("byol", {"momentum_by": "epoch"}),
    "moco": Trajectory("moco_v2", {"enqueue": "queries"}),
    # AdamW divides by the gradient's size. Where that vanishes, as for a shift before a BatchNorm,
    # rounding alone takes float32 up to the learning rate further at each step; float64 stays.
    "mocov3": Trajectory(
        "moco_v3",
        optimizer="adamw",
        weight_decay=0.1,
        share_beyond=0.01,
        largest=6e-3,
    ),
    "simclr": Trajectory("simclr"),
    "simclr_augself": Trajectory("simclr"),
    "simsiam": Trajectory("simsiam", {"projector_last_affine": True}),
}


def compare_trajectory(
    trajectory: Trajectory,
    golden: GoldenFile,
    comparison: Comparison,
    *,
    dtype: jnp.dtype = FLOAT64,
) -> None:
    with jax.enable_x64(dtype == FLOAT64):
        _replay(trajectory, golden, comparison, dtype)


def _replay(trajectory, golden, comparison, dtype):
    projector = golden.under("state/projector")
    augself = _augself(golden)
    auxiliaries = (augself,) if augself.weights else ()
    conditioning = _conditioning(golden, projector)
    method = METHODS[trajectory.method](**trajectory.settings, **_sizes(trajectory, golden))
    width = len(golden["state/backbone/net.3.weight"])
    encoder = partial(TinyEncoder, width=width, dtype=dtype)
    networks = build_networks(method, encoder, width, conditioning, auxiliaries, dtype=dtype)

    rate = float(golden["learning_rate"])
    schedule = partial(jnp.full_like, fill_value=rate, dtype=dtype)
    spec = OptimizerSpec(
        trajectory.optimizer, base_learning_rate=rate, weight_decay=trajectory.weight_decay
    )
    optimizer = make_optimizer(spec, method, schedule, 256)

    inputs = [_inputs(golden, step, conditioning, augself, dtype) for step in range(STEPS)]
    variables = _variables(networks, golden, inputs[0].views[0], dtype)
    memory = method.initial_memory(jax.random.key(0))
    if "queue" in memory:
        memory["queue"] = jnp.asarray(golden["queue"], dtype)
    state = state_from_variables(variables, memory, method, optimizer, jax.random.key(0))

    update = compiled(Update(networks, method, auxiliaries, optimizer, schedule, CLOCK, None))
    for step in range(STEPS):
        state, metrics = update(state, inputs[step])
        _compare_losses(golden, comparison, step, metrics, augself)
    _compare_final(golden, comparison, state, trajectory)


def _augself(golden):
    names = {name.split("/")[1] for name in golden if name.startswith("state/augself_")}
    if not names:
        return AugSelf({})
    weights = {name.removeprefix("augself_"): AUGSELF_WEIGHT for name in names}
    return AugSelf(weights, _mlp_sizes(golden, min(names))["hidden"])


def _conditioning(golden, projector):
    descriptors = tuple(golden["descriptor_order"].tolist())
    if not any(name.startswith("aug_processor.") for name in projector):
        return Conditioning(descriptors=())
    sizes = mlp_sizes(projector, "aug_processor.")
    return Conditioning(descriptors, depth=sizes["depth"], width=sizes["hidden"])


def _sizes(trajectory, golden):
    """The method's settings that are shapes of its networks and of its queue."""
    projector = mlp_sizes(golden.under("state/projector"), "projector.")
    sizes = {f"projector_{name}": size for name, size in projector.items()}
    settings = {field.name for field in dataclasses.fields(METHODS[trajectory.method])}
    if "predictor_hidden" in settings:
        sizes["predictor_hidden"] = _mlp_sizes(golden, "predictor")["hidden"]
    if "queue_size" in settings:
        sizes["queue_size"] = len(golden["queue"])
    return sizes


def _mlp_sizes(golden, network):
    return mlp_sizes(golden.under(f"state/{network}"))


def _inputs(golden, step, conditioning, augself, dtype):
    # Also what the run neither conditions on nor predicts.
    for index in (1, 2):
        golden.leave(*(f"step{step}/descriptor_{index}_{name}" for name in DESCRIPTORS))
        golden.leave(*(f"step{step}/difference_{index}_{name}" for name in DIFFERENCES))

    def array(name):
        return jnp.asarray(golden[f"step{step}/{name}"], dtype)

    def view(index):
        images = array(f"view_{index}")
        parts = [array(f"descriptor_{index}_{name}") for name in conditioning.descriptors]
        return ViewBatch(images, jnp.concatenate([jnp.zeros((len(images), 0), dtype), *parts], 1))

    def differences(index):
        return {name: array(f"difference_{index}_{name}") for name in augself.descriptors}

    return TrainingViews((view(1), view(2)), {"augself": (differences(1), differences(2))})


def _variables(networks, golden, view, dtype):
    shapes = jax.eval_shape(lambda: initial_variables(networks, view, jax.random.key(0)))
    variables = {"params": {}, "batch_stats": {}}
    for network in networks.factories:
        like = {collection: shapes[collection][network] for collection in shapes}
        state = golden.under(f"state/{_published(network)}")
        loaded = load(*_converters(network), state, with_dtype(like, dtype))
        for collection, values in loaded.items():
            variables[collection][network] = values
    return variables


def _published(network):
    return {"encoder": "backbone"}.get(network, network)


def _converters(network):
    return CONVERTERS.get(network, (mlp_from_pytorch, mlp_to_pytorch))


def _compare_losses(golden, comparison, step, metrics, augself):
    def compare(name, value):
        comparison.relative("losses", value, golden, f"step{step}/{name}", BOUND)

    if not augself.descriptors:
        compare("loss", metrics["loss"])
        golden.leave(f"step{step}/augself_total")
        return
    # The published loss of a step leaves AugSelf's share out.
    compare("loss", metrics["loss_method"])
    compare("augself_total", metrics["loss"] - metrics["loss_method"])
    for name in augself.descriptors:
        compare(f"augself_{name}", metrics[f"loss_augself_{name}"])


def _compare_final(golden, comparison, state, trajectory):
    beyond = []
    for network in state.params:
        _, to_pytorch = _converters(network)
        final = to_pytorch(
            {"params": state.params[network], "batch_stats": state.batch_stats[network]}
        )
        for name, value in final.items():
            entry = f"final/{_published(network)}/{name}"
            errors = np.abs(difference(value, golden, entry))
            if name.rsplit(".")[-1].startswith("running_"):
                # Statistics have whatever scale the activations have.
                errors /= np.maximum(1, np.abs(golden[entry]))
                comparison.within("statistics", errors.max(), trajectory.largest, entry)
            else:
                comparison.within("parameters", errors.max(), trajectory.largest, entry)
                beyond.append(errors.ravel() > BOUND)
    if trajectory.share_beyond:
        share = np.concatenate(beyond).mean()
        what = f"share of parameters beyond {BOUND:g}"
        comparison.within(what, share, trajectory.share_beyond, "final")
