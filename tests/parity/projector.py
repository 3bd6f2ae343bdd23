"""The conditioned projector, in each treatment and injection, against the published code's."""

import functools

import jax
import jax.numpy as jnp

from cassle_jax.interop.pytorch import projector_from_pytorch, projector_to_pytorch
from cassle_jax.models import ConditionedProjector
from tests.methods.one_device import compiled
from tests.parity.comparison import Comparison
from tests.parity.golden_file import GoldenFile
from tests.parity.weights import load, mlp_sizes

BOUND = 1e-5

# What the shapes of a case's arrays do not show.
HYPERNETWORK = {"treatment": "hypernetwork", "injection": "none", "depth": 2}
CASES = {
    "mlp_concat": {},
    "mlp_add": {"injection": "add"},
    "mlp_multiply": {"injection": "multiply"},
    "raw_concat": {"treatment": "raw"},
    "none": {"treatment": "none", "injection": "none"},
    "mlp_concat_3layer_last_bn": {"last_bn": True, "last_bn_affine": False},
    "hypernet": HYPERNETWORK,
    "hypernet_bn": {**HYPERNETWORK, "hypernetwork_bn": True},
}


def compare_projector(golden: GoldenFile, comparison: Comparison) -> None:
    for case, settings in CASES.items():
        features, descriptor = golden[f"{case}/features"], golden[f"{case}/descriptor"]
        state = golden.under(f"{case}/state")
        out = golden[f"{case}/train_output"].shape[1]
        projector = _projector(settings, state, features.shape[1], out)
        trained, evaluated = _train_then_evaluate(projector, state, features, descriptor)
        entry = f"{case}/train_output"
        comparison.relative("training", trained, golden, entry, BOUND)
        entry = f"{case}/eval_output_after_one_train_step"
        comparison.relative("evaluation", evaluated, golden, entry, BOUND)


def _projector(settings, state, feature_width, out):
    if "depth" in settings:
        sizes = {"hidden": feature_width, "out": out}
    else:
        sizes = mlp_sizes(state, "projector.")
    for network in ("aug_processor.", "projector_hn."):
        if any(name.startswith(network) for name in state):
            condition = mlp_sizes(state, network)
            sizes |= {"condition_depth": condition["depth"], "condition_width": condition["hidden"]}
    return ConditionedProjector(**sizes, **settings)


def _train_then_evaluate(projector, state, features, descriptor):
    """Embeddings in training, then with the statistics that leaves."""
    shapes = jax.eval_shape(
        lambda: projector.init(
            jax.random.key(0), jnp.asarray(features), jnp.asarray(descriptor), False
        )
    )
    variables = load(projector_from_pytorch, projector_to_pytorch, state, shapes)
    with jax.default_matmul_precision("highest"):
        return _compiled(projector)(variables, features, descriptor)


@functools.cache
def _compiled(projector):
    @compiled
    def train_then_evaluate(variables, features, descriptor):
        trained, updates = projector.apply(
            variables, features, descriptor, True, mutable=["batch_stats"]
        )
        return trained, projector.apply(variables | updates, features, descriptor, False)

    return train_then_evaluate
