"""The state that a run carries from one step to the next, and its initial value."""

from collections.abc import Collection
from numbers import Integral

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import PRNGKeyArray

from cassle_jax.checks import check_seed
from cassle_jax.methods import Head, Method, Networks, ViewBatch
from cassle_jax.methods.base import PLAIN, PyTree

# The networks with a momentum copy, where a method has one.
TARGET_NETWORKS = ("encoder", "projector", "image_conditioner", f"{PLAIN}projector")

_MEMORY = {"": "conditioned", PLAIN: "plain"}


@struct.dataclass
class TrainState:
    """A run between two steps; equal on all devices, and complete for a checkpoint.

    Its leaves are arrays while it trains and shapes or shardings while Orbax handles it, so their
    types are not checked.

    Attributes:
      step: number of steps done, int32.
      key: the run's typed key; step, view and image are folded into it, so it never changes.
      params: parameters of the trained networks, by network, float32.
      batch_stats: running BatchNorm statistics of the trained networks, float32.
      target_params: parameters of the momentum networks; empty without them.
      target_batch_stats: statistics of the momentum networks, from their own training passes.
      memory: the method's memory, such as a queue; by branch where there is a plain one.
      opt_state: state of the optimiser.
      diverged_at: the first step whose loss or update was not finite; -1 while there is none.
    """

    step: PyTree
    key: PyTree
    params: PyTree
    batch_stats: PyTree
    target_params: PyTree
    target_batch_stats: PyTree
    memory: PyTree
    opt_state: PyTree
    diverged_at: PyTree


def initial_variables(networks: Networks, view: ViewBatch, key: PRNGKeyArray) -> PyTree:
    """Initial parameters and BatchNorm statistics of all networks.

    Args:
      networks: the run's networks.
      view: a view of the run's shapes; its values do not matter.
      key: the random key.
    """

    def run_all(networks):
        by_stage = networks.encode_stages(view, train=True)
        networks.project(by_stage[networks.stage], view.descriptor, train=True)
        features = by_stage[0]
        if f"{PLAIN}projector" in networks.factories:
            projection = networks.plain_projector(networks.seen(features), view.descriptor, True)
            if f"{PLAIN}predictor" in networks.factories:
                networks.plain_predictor(projection, view.descriptor, True)
        for name, factory in networks.factories.items():
            if isinstance(factory, Head):
                shapes = ((len(features), width) for width in factory.widths)
                inputs = (jnp.zeros(shape, jnp.float32) for shape in shapes)
                getattr(networks, name)(*inputs, True)

    return networks.init(key, method=run_all)


def joined(memories: dict[str, PyTree]) -> PyTree:
    """The memories of the branches as the state holds them: a single branch's memory directly."""
    if len(memories) == 1:
        return memories[""]
    return {_MEMORY[branch]: memory for branch, memory in memories.items()}


def of_branches(memory: PyTree, branches: Collection[str]) -> dict[str, PyTree]:
    """The memories by branch; undoes `joined`."""
    if len(branches) == 1:
        return {"": memory}
    return {branch: memory[_MEMORY[branch]] for branch in branches}


def seed_keys(seed: Integral | PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray]:
    """The keys of a run's steps, of its initial parameters and of its initial memory.

    Args:
      seed: seed in [0, 2³²), or its key.

    Raises:
      ValueError: the seed is out of that range.
    """
    if isinstance(seed, Integral):  # NumPy's, too
        check_seed("seed", seed)
        seed = jax.random.key(int(seed))
    return tuple(jax.random.split(seed, 3))


def create_state(
    networks: Networks,
    method: Method,
    optimizer: optax.GradientTransformation,
    view: ViewBatch,
    seed: Integral | PRNGKeyArray,
) -> TrainState:
    """The state before the first step: a function of the seed and the shapes alone.

    Momentum networks start as copies of the trained ones.

    Args:
      networks: the run's networks.
      method: provides the initial memory, and says whether there are momentum networks.
      optimizer: the run's optimizer.
      view: a view of the run's shapes; its values do not matter.
      seed: seed in [0, 2³²), or its key.

    Raises:
      ValueError: the seed is out of that range.
    """
    run_key, network_key, memory_key = seed_keys(seed)
    variables = initial_variables(networks, view, network_key)
    # A branch without ω has a memory of its own, which may start with the same values.
    memories = {branch: method.initial_memory(memory_key) for branch in networks.branches}
    return state_from_variables(variables, joined(memories), method, optimizer, run_key)


def state_from_variables(
    variables: PyTree,
    memory: PyTree,
    method: Method,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
) -> TrainState:
    """The state at step 0 around given parameters, statistics and memory."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    has_target = bool(method.target_passes)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        batch_stats=batch_stats,
        target_params=target_copies(params) if has_target else {},
        target_batch_stats=target_copies(batch_stats) if has_target else {},
        memory=memory,
        opt_state=optimizer.init(params),
        diverged_at=jnp.full((), -1, jnp.int32),
    )


def target_copies(tree: PyTree) -> PyTree:
    """Initial momentum networks: copies of the trained networks that they follow."""
    return {name: jax.tree.map(jnp.copy, tree[name]) for name in TARGET_NETWORKS if name in tree}
