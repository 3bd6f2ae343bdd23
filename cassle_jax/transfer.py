r"""Compares how the variants of the methods transfer, within a time budget: the paper's claim.

python -m cassle_jax.transfer --to=FOLDER --minutes=600 --data=/data/tiny_imagenet \
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet20=/data/tiny_imagenet

Runs the table `transfer` as `python -m cassle_jax.tables` does, with a time budget that is required
and weights that are kept unless `--nokeep_weights` is given.
"""

import dataclasses

from absl import flags

from cassle_jax import command
from cassle_jax.checks import LONGEST, check_at_least, check_one_of, check_positive
from cassle_jax.data.requested import datasets_in
from cassle_jax.methods import METHODS
from cassle_jax.sweep.experiment import run_table
from cassle_jax.sweep.table import find_table

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

    def main() -> None:
        """Runs the table of the flags; methods and tasks replace the table's."""
        check_positive("minutes", minutes_flag.value)
        check_at_least("seeds", seeds_flag.value, 1, LONGEST)
        for method in methods_flag.value:
            check_one_of("methods", method, METHODS)
        path = [f"data.path={data_flag.value}"] if data_flag.value else []
        methods = {"methods": tuple(methods_flag.value)} if methods_flag.value else {}
        table = find_table("transfer", **methods)
        run_table(
            dataclasses.replace(table, tasks=tuple(tasks_flag.value) or table.tasks),
            to_flag.value,
            seeds=range(seeds_flag.value),
            overrides=(*path, *set_flag.value),
            datasets=datasets_in(datasets_flag.value),
            evaluation=(f"limit={limit_flag.value}",) if limit_flag.value else (),
            parallel=parallel_flag.value,
            minutes=minutes_flag.value,
            call_minutes=call_flag.value,
            keep_weights=weights_flag.value,
        )

    command.run(main)
