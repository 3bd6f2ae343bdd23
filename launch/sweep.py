"""Pretrains one configuration with many values, here or on SLURM, and shows them side by side.

python launch/sweep.py --config=configs/cifar10.py --grid='seed=0,1,2;conditioning=none,cassle'

A name is a setting, such as seed or optimizer.weight_decay, or an argument of the configuration:
method, conditioning, augself, follow. --grid makes every combination, --zip pairs the first values
of all names, the second, …, and --random draws --draws times; given together, they multiply:

  --grid='seed=0,1,2;augment.crop_area=(0.08,1.0),(0.2,1.0)'
  --zip='method=simclr,byol;epochs=100,200'
  --random='optimizer.base_learning_rate=log(1e-3,1e-1);batch_size=128,256' --draws=20

--config.name=value is for all runs. A sweep is a folder (--to): runs.jsonl has a line for each run
with its state, result and configuration, and report.html shows those that finished side by side,
the seeds of a setting as one. The same command runs what is missing or failed, and a larger one
what is new.
"""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Jobs are processes of their own, and need the project, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
)

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from cassle_jax import command  # noqa: E402
from cassle_jax.sweep.space import Asked  # noqa: E402
from cassle_jax.sweep.sweep import Evaluation, sweep  # noqa: E402


def given(arguments: list[str]) -> tuple[str, tuple[str, ...]]:
    """The last --config, and all --config.name=value; a value may be a word of its own."""
    config, overrides, words = "", [], iter(arguments)
    for word in words:
        name, separator, value = word.removeprefix("-").removeprefix("-").partition("=")
        if not word.startswith("-") or name.partition(".")[0] != "config":
            continue
        value = value if separator else next(words, "")
        if name == "config":
            config = value
        else:
            overrides.append(f"--{name}={value}")
    return config, tuple(overrides)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "What to run.", lock_config=True)
    grid_flag = flags.DEFINE_string("grid", "", "name=value,value;name=…: every combination.")
    zip_flag = flags.DEFINE_string("zip", "", "The same: the first values, the second, ….")
    random_flag = flags.DEFINE_string(
        "random", "", "The same: drawn; also name=uniform(low,high) and name=log(low,high)."
    )
    draws_flag = flags.DEFINE_integer("draws", 0, "How many are drawn of --random.")
    draw_seed_flag = flags.DEFINE_integer("draw_seed", 0, "Of the draws.")
    to_flag = flags.DEFINE_string("to", "runs/sweep", "Folder of the sweep.")
    where_flag = flags.DEFINE_string("where", "local", "local, or slurm.")
    parallel_flag = flags.DEFINE_integer(
        "parallel", 0, "How many runs at a time; 0: one here, which has all GPUs; 256 on SLURM."
    )
    slurm_flag = flags.DEFINE_string(
        "slurm", "", "Of sbatch, in submitit's names: partition=…,gpus_per_node=8,time=1440."
    )
    datasets_flag = flags.DEFINE_list("datasets", [], "What the runs are evaluated on; or none.")
    tasks_flag = flags.DEFINE_list("tasks", [], "Of the evaluation; the usual ones.")
    evaluation_flag = flags.DEFINE_string(
        "evaluation", "", "Further options of python -m cassle_jax.evaluate, as one word."
    )
    flags.mark_flag_as_required("config")

    def main() -> None:
        """Runs the sweep that the flags ask for."""
        config, overrides = given(sys.argv[1:])
        sweep(
            Asked(
                config,
                overrides,
                grid=grid_flag.value,
                zipped=zip_flag.value,
                random=random_flag.value,
                draws=draws_flag.value,
                draw_seed=draw_seed_flag.value,
            ),
            Path(to_flag.value),
            where=where_flag.value,
            parallel=parallel_flag.value or {"slurm": 256}.get(where_flag.value, 1),
            slurm=slurm_flag.value,
            evaluation=Evaluation(
                tuple(datasets_flag.value),
                tuple(tasks_flag.value),
                tuple(shlex.split(evaluation_flag.value)),
            ),
        )

    command.run(main)
