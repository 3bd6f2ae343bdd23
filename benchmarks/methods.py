"""Trains every method for a few hundred steps on CIFAR-10 and checks for collapse.

python -m benchmarks.methods --data=/data/cifar10 --workdir=runs/methods

The images come from a folder <data>/<split>/<class>/<file>. Every method trains a slim ResNet-18
with the same recipe, and is evaluated by RankMe and k-NN accuracy on test images. A method below an
untrained encoder in either metric has collapsed; the exit code is then 1.
"""

import sys
import time

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from cassle_jax import command
from cassle_jax.config import base_config, narrow_heads
from cassle_jax.data import open_source
from cassle_jax.methods import METHODS
from cassle_jax.parallel import device_mesh, on_every_device
from cassle_jax.pretrain import pretrain_command
from cassle_jax.training.metrics import read_metrics
from cassle_jax.training.probe import OnlineProbe
from cassle_jax.training.run import build_run

DATA = flags.DEFINE_string("data", None, "Folder of the images.")
WORKDIR = flags.DEFINE_string("workdir", "runs/methods", "Folder of the runs.")
CHOSEN = flags.DEFINE_list("methods", sorted(METHODS), "Methods to train.")
CONDITIONING = flags.DEFINE_string("conditioning", "cassle", "As in a configuration.")
STEPS = flags.DEFINE_integer("steps", 300, "Number of steps per run.")
flags.mark_flags_as_required(["data"])


def small_config(method: str, conditioning: str, data: str, steps: int) -> ConfigDict:
    """A configuration for CIFAR-10 that two CPU cores train in one or two minutes."""
    config = base_config(f"method={method},conditioning={conditioning}")
    config.steps = steps
    config.batch_size = 64
    config.encoder.width = 8
    config.encoder.small_images = True
    config.conditioning.depth = 2
    config.conditioning.width = 8
    narrow_heads(config, 256)
    if method == "moco_v2":
        config.method.queue_size = 4096
        config.method.momentum = 0.99
    if method == "swav":
        config.method.queue_size = 0
        config.method.freeze_prototypes_steps = 20
    config.optimizer.name = "adamw"
    config.optimizer.base_learning_rate = 0.004
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 0.1
    config.optimizer.final_fraction = 0.0
    config.data.source = "folder"
    config.data.path = data
    config.probe.every_epochs = 1
    config.probe.train_images = 5_000
    config.log.every_steps = 50
    return config


def untrained(config: ConfigDict) -> dict[str, float]:
    """RankMe and k-NN accuracy of the encoder before its first step."""
    mesh = device_mesh()
    run = build_run(config, mesh, len(open_source(config.data, config.data.train_split)))
    return OnlineProbe(config, run, mesh)(on_every_device(run.initial_state, mesh))


def row(name: str, *cells: str) -> None:
    """Prints a row of the table."""
    print(f"{name:14}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def main() -> None:
    """Trains the methods one after the other, and prints one row per method."""
    collapsed = []
    row("method", "loss", "RankMe", "k-NN accuracy", "seconds")
    for method in CHOSEN.value:
        config = small_config(method, CONDITIONING.value, DATA.value, STEPS.value)
        if method == CHOSEN.value[0]:
            before = untrained(config)
            row("untrained", "", f"{before['rank_me']:.1f}", f"{before['knn_accuracy']:.3f}", "")
        workdir = epath.Path(WORKDIR.value, method)
        start = time.perf_counter()
        pretrain_command(config, workdir)
        seconds = time.perf_counter() - start
        metrics = read_metrics(workdir)
        rank, accuracy = metrics["rank_me"][-1][1], metrics["knn_accuracy"][-1][1]
        first, last = metrics["loss"][0][1], metrics["loss"][-1][1]
        row(method, f"{first:.3f} → {last:.3f}", f"{rank:.1f}", f"{accuracy:.3f}", f"{seconds:.0f}")
        if rank <= before["rank_me"] or accuracy <= before["knn_accuracy"]:
            collapsed.append(method)
    if collapsed:
        sys.exit(f"collapsed below the untrained encoder: {', '.join(collapsed)}")


if __name__ == "__main__":
    command.run(main)
