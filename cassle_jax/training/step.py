"""One training step: written for one device, mapped over all of them at the end."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cassle_jax.methods import AugSelf, Method, Networks, Step, TrainingViews
from cassle_jax.methods.base import (
    ENCODING,
    PLAIN,
    Encoded,
    Passes,
    PyTree,
    Schedule,
    branch_of,
    with_branch,
)
from cassle_jax.methods.losses import pair_similarities
from cassle_jax.methods.views import augmented_views, batch_positions, training_views
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, parallel
from cassle_jax.training.chunks import in_chunks
from cassle_jax.training.optimizer import Clock
from cassle_jax.training.run import Run
from cassle_jax.training.state import TrainState, joined, of_branches

Metrics = dict[str, Float[Array, ""]]


class _Features(NamedTuple):
    """What is kept of the views once they are encoded: all but their images.

    Attributes:
      online: by view index, the trained encoder's features.
      target: by view index, the momentum encoder's.
      descriptors: of every view, ω.
      differences: as in `TrainingViews`.
    """

    online: dict[int, Float[Array, "B F"]]
    target: dict[int, Float[Array, "B F"]]
    descriptors: tuple[Float[Array, "B D"], ...]
    differences: tuple[dict[str, Float[Array, "B K"]], ...]


def make_update(
    networks: Networks,
    method: Method,
    augself: AugSelf,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    clock: Clock,
    axis_name: str | None,
    chunks: int = 1,
    plain_branch: float = 0.0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The update of one step, written for one device of `axis_name`.

    Args:
      networks: whose BatchNorm is synchronised over the same axis.
      method: its loss, memory and momentum.
      augself: the auxiliary losses; empty weights for none.
      optimizer: its `init` made the state.
      schedule: only to report the learning rate.
      clock: how steps count as epochs.
      axis_name: the devices that share the global batch; `None` for a single one.
      chunks: how many parts the batch passes the encoder in, for memory. Heads, loss and gradient
        are those of the whole batch; only the encoder's BatchNorm (and the image conditioner's)
        normalises by its chunk, of all devices, and its running statistics take the chunks' mean.
      plain_branch: weight of the loss of the branch of heads without ω, where there is one.

    Returns:
      A function of the state, this device's share of the batch, and what makes training views of
      any rows of it (by default they are such views). Its metrics are means over the global batch.
    """
    branches = networks.branches
    weights = {"": 1.0 - plain_branch, PLAIN: plain_branch}

    def mean(tree: PyTree) -> PyTree:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def follow(target: PyTree, params: PyTree, step: Array) -> PyTree:
        stays = method.target_momentum(clock.at(step))
        return jax.tree.map(
            lambda old, new: stays * old + (1.0 - stays) * new,
            target,
            {name: params[name] for name in target},
        )

    def apply(function: Callable, params: PyTree, batch_stats: PyTree, branch: str = ""):
        own = branch_of(batch_stats, branch)
        result, changed = nn.apply(function, branches[branch], mutable=["batch_stats"])(
            {"params": branch_of(params, branch), "batch_stats": own}
        )
        own |= changed.get("batch_stats", {})
        return result, with_branch(batch_stats, branch, own)

    def encode(params, target_params, state: TrainState, views: TrainingViews):
        def features(passes: Passes, params: PyTree, batch_stats: PyTree):
            batch_stats = {name: batch_stats[name] for name in ENCODING if name in batch_stats}
            return apply(
                lambda networks: networks.encode_passes(views.views, passes), params, batch_stats
            )

        online, batch_stats = features(method.online_passes, params, state.batch_stats)
        target, target_batch_stats = features(
            method.target_passes, target_params, state.target_batch_stats
        )
        descriptors = tuple(view.descriptor for view in views.views)
        kept = _Features(online, target, descriptors, views.differences)
        return kept, (batch_stats, target_batch_stats)

    def project_target(features: _Features, target_params: PyTree, batch_stats: PyTree):
        def project(networks: Networks):
            return networks.project_passes(
                features.target, features.descriptors, method.target_passes, predict=False
            )

        target = {}
        for branch in branches:
            target[branch], batch_stats = apply(project, target_params, batch_stats, branch)
        return target, batch_stats

    def step_of(branch, online, target, state: TrainState):
        memory = of_branches(state.memory, branches)[branch]
        return Step(online, target, memory, clock.at(state.step), axis_name)

    def losses_of(branch, features: _Features, target: dict[int, Encoded], state, params, stats):
        def losses(networks: Networks):
            online = networks.project_passes(
                features.online, features.descriptors, method.head_passes or method.online_passes
            )
            step = step_of(branch, online, target, state)
            predicted = {}
            if not branch:
                first, second = step.pair
                predicted = augself.losses(
                    networks, first.features, second.features, features.differences
                )
            return online, method.loss(step, networks), predicted

        return apply(losses, params, stats, branch)

    def objective(params, target_params, state, inputs, make_views):
        features, (batch_stats, target_batch_stats) = in_chunks(
            lambda rows: encode(params, target_params, state, make_views(rows)), inputs, chunks
        )
        target, target_batch_stats = project_target(
            features, target_params, {**state.target_batch_stats, **target_batch_stats}
        )

        batch_stats = {**state.batch_stats, **batch_stats}
        online, total, parts = {}, jnp.zeros(()), {}
        for branch in branches:
            (online[branch], loss, predicted), batch_stats = losses_of(
                branch, features, target[branch], state, params, batch_stats
            )
            if isinstance(loss, Mapping):
                parts |= {f"loss_{branch}{name}": value for name, value in loss.items()}
                loss = sum(loss.values())
            if predicted or len(branches) > 1:
                parts |= {f"loss_{branch}method": loss}
            parts |= {f"loss_augself_{name}": value for name, value in predicted.items()}
            total += weights[branch] * loss + augself.total(predicted)
        seen = online, target, batch_stats, target_batch_stats
        return total, (seen, {"loss": total, **parts})

    def update(
        state: TrainState,
        inputs: PyTree,
        make_views: Callable[[PyTree], TrainingViews] = lambda views: views,
    ) -> tuple[TrainState, Metrics]:
        target_params = state.target_params
        if method.target_passes and method.target_first:
            target_params = follow(target_params, state.params, state.step)

        gradient, (seen, parts) = jax.grad(objective, has_aux=True)(
            state.params, target_params, state, inputs, make_views
        )
        online, target, batch_stats, target_batch_stats = seen
        gradient, parts = mean((gradient, parts))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        for branch in branches:
            constrained = method.after_update(branch_of(params, branch))
            params = with_branch(params, branch, constrained)

        if method.target_passes and not method.target_first:
            target_params = follow(target_params, params, state.step)

        norms = jnp.stack([parts["loss"], optax.tree.norm(gradient), optax.tree.norm(updates)])
        diverged = jnp.where(jnp.isfinite(norms).all(), -1, state.step)
        steps = {name: step_of(name, online[name], target[name], state) for name in branches}
        first, second = steps[""].pair
        metrics = {
            **parts,
            **pair_similarities(first.projection, second.projection, axis_name),
            "gradient_norm": optax.tree.norm(gradient),
            "learning_rate": schedule(state.step),
        }
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            target_params=target_params,
            target_batch_stats=target_batch_stats,
            memory=joined({name: method.update_memory(step) for name, step in steps.items()}),
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
        run.networks,
        run.method,
        run.augself,
        run.optimizer,
        run.schedule,
        run.clock,
        AXIS,
        run.chunks,
        run.conditioning.plain_branch,
    )

    def step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        epoch = run.clock.at(state.step).epoch
        inputs = batch["image"], batch["size"], batch_positions(len(batch["image"]), AXIS)

        def make_views(rows):
            images, sizes, positions = rows
            views = augmented_views(key, images, sizes, run.views, positions=positions)
            given = run.conditioning.given(key, positions, epoch)
            return training_views(views, run.views, run.conditioning, run.augself.names, given)

        return update(state, inputs, make_views)

    return parallel(
        step, mesh, inputs=(REPLICATED, SHARDED), outputs=(REPLICATED, REPLICATED), donate=(0,)
    )
