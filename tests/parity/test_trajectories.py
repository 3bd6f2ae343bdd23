"""Six training steps of each method against what the published implementation computes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.interop.pytorch import (
    encoder_from_pytorch,
    encoder_to_pytorch,
    mlp_from_pytorch,
    mlp_to_pytorch,
    projector_from_pytorch,
    projector_to_pytorch,
)
from cassle_jax.methods import METHODS, AugSelf, TrainingViews, ViewBatch
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.training.optimizer import Clock, OptimizerSpec, make_optimizer
from cassle_jax.training.state import initial_variables, state_from_variables
from cassle_jax.training.step import make_update
from tests.tiny import TinyEncoder

GOLDEN = Path(__file__).parent.parent / "golden"
STEPS = 6


CASES = {
    "trajectory_simclr": ("simclr", {"projector_out": 12}, {}),
    "trajectory_simclr_augself": (
        "simclr",
        {"projector_out": 12},
        dict.fromkeys(("crop", "color", "flip", "blur"), 0.5),
    ),
    "trajectory_moco": ("moco_v2", {"queue_size": 64, "enqueue": "queries"}, {}),
}

FROM_PYTORCH = {"backbone": encoder_from_pytorch, "projector": projector_from_pytorch}
TO_PYTORCH = {"backbone": encoder_to_pytorch, "projector": projector_to_pytorch}


def network_name(published):
    return {"backbone": "encoder"}.get(published, published)


def published_state(golden, moment):
    """The arrays of `state/…` or `final/…`, by network and then by PyTorch's name."""
    networks = {}
    for key in golden.files:
        if key.startswith(f"{moment}/"):
            _, network, name = key.split("/")
            networks.setdefault(network, {})[name] = golden[key]
    return networks


@pytest.mark.parametrize("name", CASES)
def test_every_loss_and_the_final_parameters(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    method_name, settings, weights = CASES[name]
    method = METHODS[method_name](**settings)
    conditioning = Conditioning(
        descriptors=() if weights else tuple(golden["descriptor_order"].tolist()), depth=3, width=16
    )
    augself = AugSelf(weights, hidden=32)
    networks = build_networks(method, TinyEncoder, 24, conditioning, augself)
    clock = Clock(steps_per_epoch=100, total_steps=1000)
    learning_rate = float(golden["learning_rate"])
    spec = OptimizerSpec(base_learning_rate=learning_rate, weight_decay=5e-4)
    optimizer = make_optimizer(spec, method, lambda step: jnp.float32(learning_rate), 256)

    def views(step):
        def view(index):
            parts = [
                golden[f"step{step}/descriptor_{index}_{part}"] for part in conditioning.descriptors
            ]
            images = jnp.asarray(golden[f"step{step}/view_{index}"])
            omega = np.concatenate(parts, 1) if parts else np.zeros((len(images), 0), np.float32)
            return ViewBatch(images, jnp.asarray(omega))

        differences = tuple(
            {
                part: jnp.asarray(golden[f"step{step}/difference_{index}_{part}"])
                for part in augself.names
            }
            for index in (1, 2)
        )
        return TrainingViews((view(1), view(2)), differences)

    shapes = jax.eval_shape(
        lambda: initial_variables(networks, views(0).views[0], jax.random.key(0))
    )
    variables = {"params": {}, "batch_stats": {}}
    for network, arrays in published_state(golden, "state").items():
        ours = network_name(network)
        like = {collection: shapes[collection][ours] for collection in shapes}
        loaded = FROM_PYTORCH.get(network, mlp_from_pytorch)(arrays, like)
        for collection, values in loaded.items():
            variables[collection][ours] = values
    memory = method.initial_memory(jax.random.key(0))
    if "queue" in golden.files:
        memory["queue"] = jnp.asarray(golden["queue"])
    state = state_from_variables(variables, memory, method, optimizer, jax.random.key(0))

    update = jax.jit(
        make_update(
            networks, method, augself, optimizer, lambda s: jnp.float32(learning_rate), clock, None
        )
    )
    for step in range(STEPS):
        state, metrics = update(state, views(step))
        # The published loss of a step leaves AugSelf's share out.
        loss = metrics["loss_method" if augself.names else "loss"]
        np.testing.assert_allclose(loss, golden[f"step{step}/loss"], rtol=1e-4)
        for part in augself.names:
            np.testing.assert_allclose(
                metrics[f"loss_augself_{part}"], golden[f"step{step}/augself_{part}"], rtol=1e-4
            )

    for network, arrays in published_state(golden, "final").items():
        ours = network_name(network)
        to_pytorch = TO_PYTORCH.get(network, mlp_to_pytorch)
        final = to_pytorch({"params": state.params[ours], "batch_stats": state.batch_stats[ours]})
        for array_name, expected in arrays.items():
            np.testing.assert_allclose(
                final[array_name], expected, atol=1e-4, err_msg=f"{network}/{array_name}"
            )
