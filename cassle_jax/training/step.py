"""One training step: written for one device, mapped over all of them at the end."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cassle_jax.methods import AugSelf, Encoded, Method, Networks, TrainingViews
from cassle_jax.methods.base import PyTree, Schedule
from cassle_jax.methods.losses import pair_similarities
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, parallel
from cassle_jax.training.optimizer import Clock
from cassle_jax.training.run import Run
from cassle_jax.training.state import TrainState
from cassle_jax.training.views import augmented_pair, training_views

Metrics = dict[str, Float[Array, ""]]


def make_update(
    networks: Networks,
    method: Method,
    augself: AugSelf,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    clock: Clock,
    axis_name: str | None,
) -> Callable[[TrainState, TrainingViews], tuple[TrainState, Metrics]]:
    """The update of one step, written for one device of `axis_name`.

    Args:
      networks: whose BatchNorm is synchronised over the same axis.
      method: its loss, memory and momentum.
      augself: the auxiliary losses; empty weights for none.
      optimizer: its `init` made the state.
      schedule: only to report the learning rate.
      clock: only for what moves once an epoch.
      axis_name: the devices that share the global batch; `None` for a single one.

    Returns:
      A function of the state and this device's views. Its metrics are means over the global batch.
    """

    def mean(tree: PyTree) -> PyTree:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def follow(target: PyTree, params: PyTree, step: Array) -> PyTree:
        stays = method.target_momentum(clock.epoch(step, whole=True), clock.epochs)
        return jax.tree.map(
            lambda old, new: stays * old + (1.0 - stays) * new,
            target,
            {name: params[name] for name in target},
        )

    def encode_target(target_params: PyTree, state: TrainState, inputs: TrainingViews):
        def encode(networks: Networks) -> dict[int, Encoded]:
            return {
                index: networks.embed(inputs.views[index], train=True, predict=False)
                for index in method.target_views
            }

        return apply(encode, target_params, state.target_batch_stats)

    def apply(function: Callable, params: PyTree, batch_stats: PyTree):
        result, changed = nn.apply(function, networks, mutable=["batch_stats"])(
            {"params": params, "batch_stats": batch_stats}
        )
        return result, {**batch_stats, **changed.get("batch_stats", {})}

    def objective(params, state, inputs, target):
        def encode(networks: Networks):
            online = {
                index: networks.embed(inputs.views[index], train=True)
                for index in method.online_views
            }
            second = online[1] if 1 in online else target[1]
            return online, augself.losses(
                networks, online[0].features, second.features, inputs.differences
            )

        (online, predicted), batch_stats = apply(encode, params, state.batch_stats)
        loss = method.loss(online, target, state.memory, axis_name)
        total = loss + augself.total(predicted)
        parts = {"loss": total}
        if predicted:
            parts |= {"loss_method": loss}
            parts |= {f"loss_augself_{name}": value for name, value in predicted.items()}
        return total, (online, batch_stats, parts)

    def update(state: TrainState, inputs: TrainingViews) -> tuple[TrainState, Metrics]:
        target_params, target, target_batch_stats = state.target_params, {}, {}
        if method.target_views:
            if method.target_first:
                target_params = follow(target_params, state.params, state.step)
            target, target_batch_stats = encode_target(target_params, state, inputs)

        gradient, (online, batch_stats, parts) = jax.grad(objective, has_aux=True)(
            state.params, state, inputs, target
        )
        gradient, parts = mean((gradient, parts))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = method.after_update(optax.apply_updates(state.params, updates))

        if method.target_views and not method.target_first:
            target_params = follow(target_params, params, state.step)

        norms = jnp.stack([parts["loss"], optax.tree.norm(gradient), optax.tree.norm(updates)])
        diverged = jnp.where(jnp.isfinite(norms).all(), -1, state.step)
        second = online[1] if 1 in online else target[1]
        metrics = {
            **parts,
            **pair_similarities(online[0].projection, second.projection, axis_name),
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": schedule(state.step),
        }
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            target_params=target_params,
            target_batch_stats=target_batch_stats,
            memory=method.update_memory(state.memory, online, target, axis_name),
            opt_state=opt_state,
            diverged_at=jnp.where(state.diverged_at < 0, diverged, state.diverged_at),
        )
        return new_state, metrics

    return update


def make_train_step(run: Run, mesh: Mesh) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The compiled step: a state (donated) and a global batch in, a state and metrics out.

    Args:
      run: what the step does.
      mesh: the devices it runs on.
    """
    update = make_update(
        run.networks, run.method, run.augself, run.optimizer, run.schedule, run.clock, AXIS
    )

    def step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        pair = augmented_pair(key, batch["image"], batch["size"], run.augment, AXIS)
        views = training_views(pair, run.augment, run.conditioning.descriptors, run.augself.names)
        return update(state, views)

    return parallel(
        step, mesh, inputs=(REPLICATED, SHARDED), outputs=(REPLICATED, REPLICATED), donate=(0,)
    )
