"""Pretrains plain and with CASSLE on the embedded scenes, and shows what either keeps of them."""

import logging
import time

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from cassle_jax import command
from cassle_jax.config import flat_settings
from cassle_jax.data import open_source
from cassle_jax.data.scenes import FACTORS
from cassle_jax.evaluation.factor_probes import probe_factors
from cassle_jax.methods import METHODS
from cassle_jax.parallel import device_mesh, on_every_device
from cassle_jax.pretrain import pretrain_command
from cassle_jax.report.figure import write_figure
from cassle_jax.report.page import write_page
from cassle_jax.report.table import Table, cell_text
from cassle_jax.training.metrics import read_metrics
from cassle_jax.training.probe import FeatureReader
from cassle_jax.training.run import build_run
from cassle_jax.training.sheet import first_views
from cassle_jax.training.state import TrainState
from configs.quickstart import get_config

LOG = logging.getLogger("cassle_jax.quickstart")  # its name as a command is __main__

RUNS = {"plain": "none", "CASSLE": "cassle"}
EXPLANATION = (
    "A linear probe reads each factor of the scenes off the frozen features. 1 is perfect, 0 is "
    "what a constant answer gets."
)


def quickstart(method: str, workdir: epath.PathLike) -> Table:
    """Pretrains, probes, and writes the figure and the page.

    Args:
      method: a name in `METHODS`.
      workdir: a folder for the runs and what is written.

    Returns:
      For each factor its score with either run's features and with an untrained encoder's.
    """
    workdir = epath.Path(workdir)
    configs = {
        name: get_config(f"method={method},conditioning={conditioning}")
        for name, conditioning in RUNS.items()
    }
    scores = {}
    for name, config in configs.items():
        LOG.info("pretraining %s, %s: %d steps", method, name, config.steps)
        scores[name] = factor_scores(config, pretrain_command(config, workdir / name))
    scores["untrained"] = factor_scores(configs["plain"], None)
    table = Table(
        ("factor", *scores),
        [(factor, *(each[factor] for each in scores.values())) for factor in FACTORS],
    )
    write_results(
        f"What {METHODS[method].__name__} keeps of the scenes, plain and with CASSLE",
        workdir,
        configs,
        table,
    )
    return table


def factor_scores(config: ConfigDict, state: TrainState | None) -> dict[str, float]:
    """How well each factor is read off the features; an untrained encoder's without a state."""
    mesh = device_mesh()
    train, test = (open_source(config.data, split) for split in ("train", "test"))
    run = build_run(config, mesh, len(train))
    if state is None:
        state = on_every_device(run.initial_state, mesh)
    read = FeatureReader(config, run, mesh)
    (train_features, _), (test_features, _) = read(state, train), read(state, test)
    return probe_factors(train_features, train.factors, test_features, test.factors, FACTORS)


def write_results(
    title: str, workdir: epath.Path, configs: dict[str, ConfigDict], table: Table
) -> None:
    """Writes `quickstart.png` and `quickstart.html`."""
    metrics = {name: read_metrics(workdir / name) for name in configs}
    curves = {
        label: {name: metrics[name][key] for name in configs}
        for label, key in (
            ("loss", "loss"),
            ("k-NN accuracy of the shape", "knn_accuracy"),
            ("RankMe", "rank_me"),
            ("similarity of positive pairs", "positive_similarity"),
            ("similarity of negative pairs", "negative_similarity"),
        )
    }
    config = configs["plain"]
    source = open_source(config.data, config.data.train_split)
    run = build_run(config, device_mesh(), len(source))
    images, (first, _), (second, _) = first_views(run, source, config.data)
    write_figure(
        workdir / "quickstart.png",
        title=title,
        loss=curves["loss"],
        table=table,
        images=images,
        view_1=first,
        view_2=second,
    )
    write_page(
        workdir / "quickstart.html",
        title=title,
        summary=f"{config.steps} steps of {config.batch_size} images each. {EXPLANATION}",
        curves=curves,
        table=table,
        figures={
            "Images, their two views, and what the projector is told": workdir
            / "CASSLE"
            / "views.png"
        },
        settings=flat_settings(configs["CASSLE"]),
    )


def main(method: str, workdir: epath.Path) -> None:
    """Runs the quickstart and prints its table and where the page is."""
    start = time.monotonic()
    table = quickstart(method, workdir)
    for row in [table.columns, *table.rows]:
        print(f"{row[0]:12}" + "".join(f"{cell_text(cell):>11}" for cell in row[1:]))
    print(f"\n{EXPLANATION}\n\n{workdir / 'quickstart.html'}\n{workdir / 'quickstart.png'}")
    LOG.info("took %.0f s", time.monotonic() - start)


if __name__ == "__main__":
    method_flag = flags.DEFINE_enum("method", "simclr", sorted(METHODS), "What is pretrained.")
    workdir_flag = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of runs and page.")
    command.run(lambda: main(method_flag.value, epath.Path(workdir_flag.value)))
