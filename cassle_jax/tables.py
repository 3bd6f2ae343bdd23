r"""Runs a named experiment, a table of rows and seeds, and writes its results.

python -m cassle_jax.tables --table=small_images --to=runs/small_images --parallel=2 \
    --set=data.path=/data/cifar10 --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10

A table is a Python file in configs/tables/ or elsewhere. A call resumes the runs of an earlier call
with the same folder, also on another machine; `--call_minutes` limits the length of a call.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from cassle_jax import command
from cassle_jax.checks import ConfigError
from cassle_jax.data.requested import datasets_in
from cassle_jax.sweep.cost import RATE
from cassle_jax.sweep.evaluation import evaluation_of
from cassle_jax.sweep.experiment import dry_run, run_table
from cassle_jax.sweep.table import find_table, rows_in

__all__ = ["dry_run", "evaluation_of", "run_table"]


def _numbers(name: str, texts: Sequence[str]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise ConfigError(f"{name}={','.join(texts)} is not a list of integers") from error


if __name__ == "__main__":
    table_flag = flags.DEFINE_string(
        "table", None, "Name of a table in configs/tables/, or path of a Python file."
    )
    to_flag = flags.DEFINE_string("to", "", "Folder of all results; runs/<table> if empty.")
    seeds_flag = flags.DEFINE_list("seeds", [], "Seeds that replace the table's.")
    rows_flag = flags.DEFINE_string(
        "rows", "", "Subjects of rows, or parts of subjects that select rows; empty for all."
    )
    parallel_flag = flags.DEFINE_integer("parallel", 1, "Number of runs at a time.")
    minutes_flag = flags.DEFINE_float(
        "minutes", 0, "Time budget of all runs; sets their number of steps. 0: the table's steps."
    )
    call_flag = flags.DEFINE_float(
        "call_minutes", 0, "Time after which this call saves and ends; 0: no limit."
    )
    set_flag = flags.DEFINE_multi_string(
        "set", [], "Setting of all runs, as name=value; repeatable."
    )
    datasets_flag = flags.DEFINE_string(
        "datasets", "", "Evaluation datasets that replace the table's: name, or name=folder."
    )
    data_dir_flag = flags.DEFINE_string(
        "data_dir", "", "Folder of tensorflow-datasets, for the evaluation."
    )
    others_flag = flags.DEFINE_multi_string(
        "weights_of", [], "Folder of another table, to reuse weights of equal runs; repeatable."
    )
    evaluation_flag = flags.DEFINE_multi_string(
        "evaluation", [], "Evaluation option, as name=value, such as limit=1000; repeatable."
    )
    weights_flag = flags.DEFINE_boolean(
        "keep_weights", False, "Keep the checkpoints after the evaluation."
    )
    toy_flag = flags.DEFINE_boolean(
        "toy", False, "Run at toy size on rendered scenes; a run takes seconds."
    )
    dry_flag = flags.DEFINE_boolean("dry_run", False, "Only print runs, steps and GPU hours.")
    rate_flag = flags.DEFINE_float(
        "rate", RATE, "Images/s of a ResNet-50 at 224 px with MoCo-v2, for --dry_run."
    )
    flags.mark_flags_as_required(["table"])

    def main() -> None:
        """Runs the table of the flags, or prints its cost."""
        table = find_table(table_flag.value)
        selection = {
            "rows": rows_in(rows_flag.value, table),
            "seeds": _numbers("seeds", seeds_flag.value),
            "overrides": set_flag.value,
            "toy": toy_flag.value,
        }
        if dry_flag.value:
            command.say(dry_run(table, **selection, rate=rate_flag.value))
            return
        run_table(
            table,
            to_flag.value or f"runs/{Path(table_flag.value).stem}",
            **selection,
            datasets=datasets_in(datasets_flag.value),
            data_dir=data_dir_flag.value,
            evaluation=evaluation_flag.value,
            weights_of=others_flag.value,
            parallel=parallel_flag.value,
            minutes=minutes_flag.value,
            call_minutes=call_flag.value,
            keep_weights=weights_flag.value,
        )

    command.run(main)
