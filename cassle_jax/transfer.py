r"""The paper's claim as one table: variants of each method, and how they transfer.

python -m cassle_jax.transfer --to=FOLDER --minutes=600 --data=/data/tiny_imagenet \
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet=/data/tiny_imagenet

It is the table `transfer` with a budget of time; see `cassle_jax.tables` for what a call leaves.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from cassle_jax import command
from cassle_jax.checks import check_at_least, check_positive
from cassle_jax.config import knows
from cassle_jax.methods import METHODS
from cassle_jax.sweep.table import find_table
from cassle_jax.tables import run_table


def transfer(
    to: Path,
    *,
    minutes: float,
    datasets: Sequence[str] = (),
    data: str = "",
    call_minutes: float = 0.0,
    methods: Sequence[str] = (),
    seeds: int = 3,
    tasks: Sequence[str] = (),
    overrides: Sequence[str] = (),
    keep_weights: bool = True,
    limit: int = 0,
    parallel: int = 1,
) -> Path:
    """Pretrains and evaluates what is missing, and writes the page of all that is there.

    Args:
      to: folder of everything; with what an earlier call left in it.
      minutes: for all runs, from which their number of steps follows when the folder is new; at
        most the configuration's epochs.
      datasets: to evaluate on, as the evaluation command takes them; empty for the table's.
      data: folder of the images to pretrain on; "" for what `overrides` name.
      call_minutes: after which this call saves and ends; 0 for never.
      methods: names of methods; empty for the table's.
      seeds: how many runs each variant has.
      tasks: of the evaluation; empty for the table's.
      overrides: of all runs, `name=value` each.
      keep_weights: whether checkpoints stay when a run is evaluated.
      limit: of the images of each part in evaluation; 0 for all.
      parallel: how many runs at a time.

    Returns:
      The path of the page.

    Raises:
      ConfigError, DataError: what cannot work.
      Stop: the call's time is over (75, the same call goes on), or some runs failed (1).
    """
    check_positive(minutes=minutes)
    check_at_least(1, seeds=seeds)
    for method in methods:
        knows("methods", method, METHODS)
    table = find_table("transfer", **({"methods": tuple(methods)} if methods else {}))
    path = [f"data.path={data}"] if data else []
    return run_table(
        dataclasses.replace(table, tasks=tuple(tasks) or table.tasks),
        to,
        seeds=range(seeds),
        overrides=(*path, *overrides),
        datasets=datasets,
        evaluation=(f"limit={limit}",) if limit else (),
        parallel=parallel,
        minutes=minutes,
        call_minutes=call_minutes,
        keep_weights=keep_weights,
    )


if __name__ == "__main__":
    to_flag = flags.DEFINE_string("to", "runs/transfer", "Folder of everything.")
    minutes_flag = flags.DEFINE_float("minutes", None, "For all runs together; sets their length.")
    call_flag = flags.DEFINE_float(
        "call_minutes", 0, "After which this call saves and ends; 0: when all is done."
    )
    parallel_flag = flags.DEFINE_integer("parallel", 1, "How many runs at a time.")
    data_flag = flags.DEFINE_string("data", None, "Folder of Tiny-ImageNet, to pretrain on.")
    datasets_flag = flags.DEFINE_list("datasets", [], "To evaluate on: name=folder.")
    tasks_flag = flags.DEFINE_list("tasks", [], "Of the evaluation; the table's.")
    methods_flag = flags.DEFINE_list("methods", [], "To compare; the table's.")
    seeds_flag = flags.DEFINE_integer("seeds", 3, "Runs of each variant.")
    set_flag = flags.DEFINE_multi_string("set", [], "Of all runs: name=value; repeatable.")
    weights_flag = flags.DEFINE_boolean("keep_weights", True, "Keep the checkpoints.")
    limit_flag = flags.DEFINE_integer("limit", 0, "Evaluate on so many images of each part.")
    flags.mark_flags_as_required(["minutes", "data"])
    command.run(
        lambda: transfer(
            Path(to_flag.value),
            minutes=minutes_flag.value,
            datasets=datasets_flag.value,
            data=data_flag.value,
            call_minutes=call_flag.value,
            methods=methods_flag.value,
            seeds=seeds_flag.value,
            tasks=tasks_flag.value,
            overrides=set_flag.value,
            keep_weights=weights_flag.value,
            limit=limit_flag.value,
            parallel=parallel_flag.value,
        )
    )
