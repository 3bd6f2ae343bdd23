"""Asynchronous Orbax checkpoints: everything a run needs to continue as if never interrupted."""

from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from cassle_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, in `<workdir>/checkpoints/<step>`.

    A checkpoint holds the training state, its keys, and where the data iterator stood. It appears
    under its final name only when it is complete, so a run killed at any moment finds the last
    complete one.

    Args:
      workdir: of the run.
      keep: how many of the newest stay.
      keep_every_steps: every checkpoint at a multiple of this stays as well; 0 for none.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int, keep_every_steps: int = 0):
        policies = [checkpoint_managers.LatestN(keep)]
        if keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(keep_every_steps))
        self._manager = ocp.CheckpointManager(
            epath.Path(workdir).resolve() / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Saves in the background; the state may be donated as soon as this returns."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
            ),
            force=True,
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint's state and data state; `None` if there is no checkpoint.

        Args:
          like: a state of the same run, for shapes and placement.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.close()
