r"""Compares how the variants of the methods transfer, within a time budget: the paper's claim.

python -m cassle_jax.transfer --to=FOLDER --minutes=600 --data=/data/tiny_imagenet \
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet20=/data/tiny_imagenet

Runs the table `transfer` with a time budget; `cassle_jax.tables` describes the folder's files.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath

from cassle_jax import command
from cassle_jax.checks import LONGEST, check_at_least, check_one_of, check_positive
from cassle_jax.data.requested import datasets_in
from cassle_jax.methods import METHODS
from cassle_jax.sweep.experiment import run_table
from cassle_jax.sweep.table import find_table


def transfer(
    to: epath.PathLike,
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
    """Pretrains and evaluates the missing runs, and writes the page of the finished ones.

    Args:
      to: folder of all results; may hold those of an earlier call.
      minutes: time budget of all runs together. In a new folder it sets the number of steps, at
        most the configuration's epochs.
      datasets: evaluation datasets, as in the evaluation command; empty for the table's.
      data: folder of the pretraining images; "" for those that `overrides` select.
      call_minutes: time after which this call saves and ends; 0 for no limit.
      methods: names of methods; empty for the table's.
      seeds: number of runs per variant.
      tasks: evaluation tasks; empty for the table's.
      overrides: settings of all runs, as `name=value`.
      keep_weights: whether checkpoints stay after the evaluation.
      limit: largest number of evaluation images per split; 0 for all.
      parallel: number of runs at a time.

    Returns:
      The path of the page.

    Raises:
      ConfigError, DataError: invalid settings or missing data.
      Stop: the call's time is over (75; the same call resumes), or some runs failed (1).
    """
    check_positive("minutes", minutes)
    check_at_least("seeds", seeds, 1, LONGEST)
    for method in methods:
        check_one_of("methods", method, METHODS)
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
    to_flag = flags.DEFINE_string("to", "runs/transfer", "Folder of all results.")
    minutes_flag = flags.DEFINE_float(
        "minutes", None, "Time budget of all runs; sets their number of steps."
    )
    call_flag = flags.DEFINE_float(
        "call_minutes", 0, "Time after which this call saves and ends; 0: no limit."
    )
    parallel_flag = flags.DEFINE_integer("parallel", 1, "Number of runs at a time.")
    data_flag = flags.DEFINE_string("data", None, "Folder of Tiny-ImageNet, for pretraining.")
    datasets_flag = flags.DEFINE_string(
        "datasets", "", "Evaluation datasets, as name=folder; the table's if empty."
    )
    tasks_flag = flags.DEFINE_list("tasks", [], "Evaluation tasks; the table's if empty.")
    methods_flag = flags.DEFINE_list("methods", [], "Methods to compare; the table's if empty.")
    seeds_flag = flags.DEFINE_integer("seeds", 3, "Number of runs per variant.")
    set_flag = flags.DEFINE_multi_string(
        "set", [], "Setting of all runs, as name=value; repeatable."
    )
    weights_flag = flags.DEFINE_boolean(
        "keep_weights", True, "Keep the checkpoints after the evaluation."
    )
    limit_flag = flags.DEFINE_integer(
        "limit", 0, "Largest number of evaluation images per split; 0: all."
    )
    flags.mark_flags_as_required(["minutes", "data"])
    command.run(
        lambda: transfer(
            to_flag.value,
            minutes=minutes_flag.value,
            datasets=datasets_in(datasets_flag.value),
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
