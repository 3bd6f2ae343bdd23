"""Sweeps values of a configuration, here or on SLURM, and compares the runs on one page.

python -m cassle_jax.sweep --config=configs/cifar10.py --grid='seed=0,1,2;conditioning=none,cassle'

A name is a setting, such as seed or optimizer.weight_decay, or an argument of the configuration,
such as method or conditioning. --grid forms all combinations, --zip pairs the first values of all
names, then the second, …, and --random draws --draws times. Used together, they multiply:

  --grid='seed=0,1,2;augment.crop_area=(0.08,1.0),(0.2,1.0)'
  --zip='method=simclr,byol;epochs=100,200'
  --random='optimizer.base_learning_rate=log(1e-3,1e-1);batch_size=128,256' --draws=20

Quotes keep the commas and semicolons of a value: --grid='data.path="/data/a,b",/data/c'.
--config.name=value applies to all runs. The folder of a sweep (--to) holds runs.jsonl, with state,
result and configuration per run, and report.html, which compares the finished runs as means over
seeds. The same command executes missing and failed runs again; new values add runs.
"""

import re
import shlex
import signal
import sys

from absl import flags
from ml_collections import config_flags

from cassle_jax import command
from cassle_jax.checks import ConfigError
from cassle_jax.config import FLAG_OPTIONS
from cassle_jax.data.requested import datasets_in
from cassle_jax.sweep.jobs import import_in_processes
from cassle_jax.sweep.space import SweepRequest
from cassle_jax.sweep.sweep import EvaluationOptions, dry_run, sweep


def config_arguments(arguments: list[str]) -> tuple[str, tuple[str, ...]]:
    """The --config, and all overrides as --config.name=value.

    A value may be a separate word, and --config.name and --noconfig.name are True and False.
    """
    config, overrides, words = "", [], iter(arguments)
    for word in words:
        match = re.fullmatch(r"--?(no)?(config(?:\..+?)?)(?:=(.*))?", word, re.DOTALL)
        if not match:
            continue
        no, name, value = match.groups()
        if value is None:
            value = str(not no) if flags.FLAGS[name].boolean else next(words, "")
        if name == "config":
            config = value
        else:
            overrides.append(f"--{name}={value}")
    return config, tuple(overrides)


def _words(flag: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"{flag}={text} has a quote without its end") from error


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The configuration file.", **FLAG_OPTIONS)
    grid_flag = flags.DEFINE_string("grid", "", "name=value,value;name=…: all combinations.")
    zip_flag = flags.DEFINE_string(
        "zip", "", "name=value,value;name=…: the first values together, then the second, …."
    )
    random_flag = flags.DEFINE_string(
        "random", "", "Values to draw from; also name=uniform(low,high) and name=log(low,high)."
    )
    draws_flag = flags.DEFINE_integer("draws", 0, "Number of draws for --random.")
    draw_seed_flag = flags.DEFINE_integer("draw_seed", 0, "Seed of the draws.")
    to_flag = flags.DEFINE_string("to", "runs/sweep", "Folder of the sweep.")
    where_flag = flags.DEFINE_string("where", "local", "local, or slurm.")
    parallel_flag = flags.DEFINE_integer(
        "parallel", 0, "Number of runs at a time; 0: one here, with all GPUs; 256 on SLURM."
    )
    slurm_flag = flags.DEFINE_string(
        "slurm",
        "",
        "sbatch options, as submitit names them: partition=…,gpus_per_node=8,time=1440.",
    )
    datasets_flag = flags.DEFINE_string(
        "datasets", "", "Evaluation datasets; no evaluation if empty."
    )
    tasks_flag = flags.DEFINE_list("tasks", [], "Evaluation tasks; the default ones if empty.")
    evaluation_flag = flags.DEFINE_string(
        "evaluation", "", "Further options of python -m cassle_jax.evaluate, as one word."
    )
    dry_flag = flags.DEFINE_boolean("dry_run", False, "Only print the runs and their states.")
    flags.mark_flag_as_required("config")

    def main() -> None:
        """Runs the sweep of the flags."""
        config, overrides = config_arguments(sys.argv[1:])
        request = SweepRequest(
            config,
            overrides,
            grid=grid_flag.value,
            zipped=zip_flag.value,
            random=random_flag.value,
            draws=draws_flag.value,
            draw_seed=draw_seed_flag.value,
        )
        if dry_flag.value:
            command.say(dry_run(request, to_flag.value, where_flag.value))
            return
        import_in_processes()
        # A script's background command ignores SIGINT, and so would its jobs, which it must stop.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sweep(
            request,
            to_flag.value,
            where=where_flag.value,
            parallel=parallel_flag.value or {"slurm": 256}.get(where_flag.value, 1),
            slurm=slurm_flag.value,
            evaluation=EvaluationOptions(
                datasets_in(datasets_flag.value),
                tuple(tasks_flag.value),
                _words("evaluation", evaluation_flag.value),
            ),
        )

    command.run(main)
