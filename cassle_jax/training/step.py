"""One training step: views, features, embeddings, loss, update; mapped over the devices."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cassle_jax.methods import (
    Auxiliary,
    Canvases,
    Features,
    Method,
    Networks,
    Step,
    TrainingViews,
)
from cassle_jax.methods.auxiliary import further_images, with_own_views
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
from cassle_jax.models.sums import tree_norm
from cassle_jax.optimizer import Clock
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, parallel
from cassle_jax.training.chunks import in_chunks
from cassle_jax.training.run import Run
from cassle_jax.training.state import TrainState, joined, of_branches

Metrics = dict[str, Float[Array, ""]]
Embeddings = dict[str, dict[int, Encoded]]
"""The encoded views by branch of heads and index of the view."""


def make_train_step(run: Run, mesh: Mesh) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The compiled step: takes a state (donated) and a global batch, returns a state and metrics.

    Args:
      run: the objects of the run.
      mesh: the devices the step runs on.
    """
    update = update_of(run)

    def step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        epoch = run.clock.at(state.step).epoch
        positions = batch_positions(len(batch["image"]), AXIS)
        canvases = Canvases(batch["image"], batch["size"], positions)
        return update(state, canvases, partial(views_of, run, key, epoch))

    return parallel(
        step, mesh, inputs=(REPLICATED, SHARDED), outputs=(REPLICATED, REPLICATED), donate=(0,)
    )


def update_of(run: Run) -> "Update":
    """The update of a run's steps, for one device of `AXIS`."""
    return Update(
        run.networks,
        run.method,
        run.auxiliaries,
        run.optimizer,
        run.schedule,
        run.clock,
        AXIS,
        run.chunks,
        run.conditioning.plain_branch,
    )


def views_of(
    run: Run, key: PRNGKeyArray, epoch: float | Float[Array, ""], canvases: Canvases
) -> TrainingViews:
    """The training views of any images of a step.

    Args:
      run: the objects of the run.
      key: the step's random key.
      epoch: epochs passed before the step.
      canvases: the images.
    """
    images, sizes, positions = canvases
    views = augmented_views(key, images, sizes, run.views, positions=positions, paired=run.paired)
    given = run.conditioning.given(key, positions, epoch)
    further = further_images(run.auxiliaries, key, canvases, run.augment)
    return training_views(views, run.views, run.conditioning, run.auxiliaries, given, further)


class _Forward(NamedTuple):
    """Results of the forward pass that the update needs in addition to the loss.

    Attributes:
      online: embeddings of the trained networks.
      target: embeddings of the momentum networks.
      batch_stats: the trained networks' running statistics.
      target_batch_stats: the momentum networks' running statistics.
      losses: the loss, its parts and further metrics, by their names in the log.
    """

    online: Embeddings
    target: Embeddings
    batch_stats: PyTree
    target_batch_stats: PyTree
    losses: Metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The update of one step, written for one device of `axis_name`.

    Attributes:
      networks: their BatchNorm is synchronised over the same axis.
      method: gives the loss, memory and momentum.
      auxiliaries: the auxiliary objectives, whose losses are added.
      optimizer: its `init` made the state.
      schedule: the learning rate, for the metrics.
      clock: converts steps to epochs.
      axis_name: the devices that share the global batch; `None` for a single one.
      chunks: the number of parts in which the batch passes the encoder, to save memory. Heads, loss
        and gradient are those of the whole batch. Only the encoder's BatchNorm (and the image
        conditioner's) normalises per chunk, over all devices; its running statistics take the mean
        of the chunks.
      plain_branch: weight of the loss of the heads without ω, where there are any.
    """

    networks: Networks
    method: Method
    auxiliaries: tuple[Auxiliary, ...]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    clock: Clock
    axis_name: str | None
    chunks: int = 1
    plain_branch: float = 0.0

    def __call__(
        self,
        state: TrainState,
        inputs: PyTree,
        make_views: Callable[[PyTree], TrainingViews] = lambda views: views,
    ) -> tuple[TrainState, Metrics]:
        """The state after one step, and metrics that are means over the global batch.

        Args:
          state: the state before the step.
          inputs: this device's share of the batch.
          make_views: makes training views of any rows of `inputs`; by default `inputs` are views.
        """
        target_params = state.target_params
        if self.method.target_first:
            target_params = self._followed(target_params, state.params, state)
        gradient, forward = jax.grad(self._forward, has_aux=True)(
            state.params, target_params, state, inputs, make_views
        )
        gradient, losses = averaged_gradient((gradient, forward.losses), self.axis_name)

        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = self._constrained(optax.apply_updates(state.params, updates))
        if not self.method.target_first:
            target_params = self._followed(target_params, params, state)

        steps = {
            branch: self._step(branch, forward.online[branch], forward.target[branch], state)
            for branch in self.networks.branches
        }
        metrics = {
            **losses,
            **self._similarities(steps[""]),
            "gradient_norm": tree_norm(gradient),
            "learning_rate": self.schedule(state.step),
        }
        norms = losses["loss"], metrics["gradient_norm"], tree_norm(updates)
        memory = {branch: self.method.update_memory(step) for branch, step in steps.items()}
        return state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=forward.batch_stats,
            target_params=target_params,
            target_batch_stats=forward.target_batch_stats,
            memory=joined(memory),
            opt_state=opt_state,
            diverged_at=_diverged_at(state, norms),
        ), metrics

    def _forward(self, params, target_params, state, inputs, make_views):
        """The loss of the parameters, and the other results that the update needs."""
        features, (batch_stats, target_batch_stats) = in_chunks(
            lambda rows: self._encode(params, target_params, state, make_views(rows)),
            inputs,
            self.chunks,
        )
        target, target_batch_stats = self._project_target(
            features, target_params, {**state.target_batch_stats, **target_batch_stats}
        )
        online, losses, total = {}, {}, jnp.float32(0)
        batch_stats = {**state.batch_stats, **batch_stats}
        for branch in self.networks.branches:
            (online[branch], loss), batch_stats = self._losses(
                branch, features, target[branch], state, params, batch_stats
            )
            loss, parts = self._parts(branch, loss)
            weight = self.plain_branch if branch == PLAIN else 1.0 - self.plain_branch
            total += weight * loss
            losses |= parts
        pair = self._step("", online[""], target[""], state).pair
        features = features._replace(projections=tuple(each.projection for each in pair))
        for auxiliary, own in with_own_views(self.auxiliaries, len(features.descriptors)):
            (loss, parts), batch_stats = self._auxiliary_losses(
                auxiliary, features, own, params, batch_stats
            )
            total += loss
            losses |= parts
        losses = {"loss": total, **losses}
        return total, _Forward(online, target, batch_stats, target_batch_stats, losses)

    def _encode(self, params, target_params, state: TrainState, views: TrainingViews):
        """The features of the views, and the encoders' running statistics after them."""

        def features(passes: Passes, params: PyTree, batch_stats: PyTree):
            batch_stats = {name: batch_stats[name] for name in ENCODING if name in batch_stats}
            return self._apply(
                lambda networks: networks.encode_passes(views.views, passes), params, batch_stats
            )

        passes = self.method.online_passes
        for auxiliary, own in with_own_views(self.auxiliaries, len(views.views)):
            passes = auxiliary.passes(passes, own)
        online, batch_stats = features(passes, params, state.batch_stats)
        target, target_batch_stats = features(
            self.method.target_passes, target_params, state.target_batch_stats
        )
        descriptors = tuple(view.descriptor for view in views.views)
        earlier = {stage: (online[stage], target[stage]) for stage in self.networks.stages}
        kept = Features(online[0], target[0], descriptors, views.targets, earlier=earlier)
        return kept, (batch_stats, target_batch_stats)

    def _project_target(self, features: Features, target_params: PyTree, batch_stats: PyTree):
        """The momentum networks' embeddings, and their running statistics."""

        def project(networks: Networks):
            return networks.project_passes(
                features.at(networks.stage).target,
                features.descriptors,
                self.method.target_passes,
                predict=False,
            )

        target = {}
        for branch in self.networks.branches:
            target[branch], batch_stats = self._apply(project, target_params, batch_stats, branch)
        return target, batch_stats

    def _losses(self, branch, features: Features, target, state, params, batch_stats):
        """The embeddings and the method's loss of a branch, and running statistics."""
        method = self.method

        def losses(networks: Networks):
            online = networks.project_passes(
                features.at(networks.stage).online,
                features.descriptors,
                method.head_passes or method.online_passes,
            )
            return online, method.loss(self._step(branch, online, target, state), networks)

        return self._apply(losses, params, batch_stats, branch)

    def _parts(self, branch, loss) -> tuple[Float[Array, ""], Metrics]:
        """The method's loss as one number, and the metrics to log."""
        parts = {}
        if isinstance(loss, tuple):
            loss, metrics = loss
            parts |= {f"method_{branch}{name}": value for name, value in metrics.items()}
        if isinstance(loss, Mapping):
            parts |= {f"loss_{branch}{name}": value for name, value in loss.items()}
            loss = sum(loss.values())
        for name, value in (parts | {"loss": loss}).items():
            if jnp.shape(value):
                raise ValueError(f"{name} has shape {jnp.shape(value)}; return a mean")
        if self.auxiliaries or len(self.networks.branches) > 1:
            parts |= {f"loss_{branch}method": loss}
        return loss, parts

    def _auxiliary_losses(self, auxiliary, features: Features, own, params, batch_stats):
        """An auxiliary objective's weighted loss and metrics to log, and running statistics."""

        def losses(networks: Networks):
            seen = features.at(auxiliary.stage)
            losses, metrics = auxiliary.losses(networks, seen, own, self.axis_name)
            parts = {f"loss_{auxiliary.name}_{name}": value for name, value in losses.items()}
            parts |= {f"{auxiliary.name}_{name}": value for name, value in metrics.items()}
            return auxiliary.total(losses), parts

        return self._apply(losses, params, batch_stats)

    def _apply(self, function: Callable, params: PyTree, batch_stats: PyTree, branch: str = ""):
        """The result of a function of a branch's networks, and all running statistics after it."""
        own = branch_of(batch_stats, branch)
        networks = self.networks.branches[branch]
        result, changed = nn.apply(function, networks, mutable=["batch_stats"])(
            {"params": branch_of(params, branch), "batch_stats": own}
        )
        own |= changed.get("batch_stats", {})
        return result, with_branch(batch_stats, branch, own)

    def _followed(self, target: PyTree, params: PyTree, state: TrainState) -> PyTree:
        """The momentum networks' parameters, moved towards the trained ones."""
        if not self.method.target_passes:
            return target
        momentum = self.method.target_momentum(self.clock.at(state.step))
        return jax.tree.map(
            lambda old, new: momentum * old + (1.0 - momentum) * new,
            target,
            {name: params[name] for name in target},
        )

    def _constrained(self, params: PyTree) -> PyTree:
        """The parameters after the method's constraints, branch by branch."""
        for branch in self.networks.branches:
            constrained = self.method.after_update(branch_of(params, branch))
            params = with_branch(params, branch, constrained)
        return params

    def _step(self, branch, online, target, state: TrainState) -> Step:
        """The method's inputs from a branch."""
        memory = of_branches(state.memory, self.networks.branches)[branch]
        return Step(online, target, memory, self.clock.at(state.step), self.axis_name)

    def _similarities(self, step: Step) -> Metrics:
        first, second = step.pair
        return pair_similarities(first.projection, second.projection, self.axis_name)


def _diverged_at(state: TrainState, norms: tuple[Float[Array, ""], ...]) -> Int[Array, ""]:
    """The first step with a norm that is not finite, which may be this one; -1 for none."""
    diverged = jnp.where(jnp.isfinite(jnp.stack(norms)).all(), -1, state.step)
    return jnp.where(state.diverged_at < 0, diverged, state.diverged_at)


def averaged_gradient(tree: PyTree, axis_name: str | None) -> PyTree:
    """The mean of every array over the devices of an axis; the tree itself for a single device."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
