"""Pretrains plain and with CASSLE on drawn motifs, and shows which factors each keeps."""

import json
import logging
import runpy
import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from cassle_jax import command
from cassle_jax.config import flat_settings
from cassle_jax.config_files import CONFIGS
from cassle_jax.data import Motifs, open_source
from cassle_jax.data.splits import Part
from cassle_jax.evaluation.factor_probes import factor_findings, group_means, probe_factors
from cassle_jax.evaluation.findings import Finding, Gallery
from cassle_jax.methods import METHODS
from cassle_jax.parallel import device_mesh, on_every_device
from cassle_jax.pretrain import pretrain_command
from cassle_jax.report.figure import write_figure
from cassle_jax.report.files import HTML, write_report
from cassle_jax.report.table import Table, cell_text
from cassle_jax.storage import make_shared, write_whole
from cassle_jax.training.findings import TASK, pretraining_findings
from cassle_jax.training.metrics import read_metrics
from cassle_jax.training.probe import FeatureReader
from cassle_jax.training.run import build_run
from cassle_jax.training.sheet import first_views
from cassle_jax.training.state import TrainState
from cassle_jax.training.workdir import known_path, workdir_held, written

LOG = logging.getLogger("cassle_jax.quickstart")  # its name as a command is __main__

get_config = runpy.run_path(str(CONFIGS / "quickstart.py"))["get_config"]

RUNS = {"plain": "conditioning=none", "CASSLE": "conditioning=cassle"}
"""The arguments of the configuration, by run; the others are compared with the first."""

UNTRAINED = "untrained"
EXPLANATION = (
    "A linear probe predicts each factor of the images from the frozen features. 1 is perfect, 0 "
    "is the score of a constant answer. Two images differ in these factors only. Augmentations "
    "change all factors but the content."
)
_PROBED = 4000  # images to fit a probe to; more take longer and hardly improve it
_SHOWN = 4  # images on the page, with their views
_FACTORS = Motifs.FACTORS
_GROUPS = {name: factor.group for name, factor in _FACTORS.items()}
_ORDER = tuple(dict.fromkeys(_GROUPS.values()))

Scores = Mapping[str, Mapping[str, float]]
"""For each run, or the untrained encoder, the score per factor."""


def quickstart(method: str, workdir: epath.PathLike, seed: int = 0) -> Scores:
    """Pretrains, probes, and writes the figure, the page and the scores.

    Args:
      method: a name in `METHODS`.
      workdir: a folder for the runs and what is written.
      seed: seed of the runs' weights, order and augmentations. The images stay the same.

    Returns:
      The score per factor with every run's features and with an untrained encoder's.

    Raises:
      ConfigError: the workdir cannot be written, or another quickstart writes to it.
      Outage: storage did not come back in time.
      Stop: see `pretrain_command`.
    """
    workdir = known_path(workdir)
    with workdir_held(workdir, "quickstart"):
        return _quickstart(method, workdir, seed)


def _quickstart(method: str, workdir: epath.Path, seed: int) -> Scores:
    configs = {name: _config(method, arguments, seed) for name, arguments in RUNS.items()}
    scores = {}
    for name, config in configs.items():
        written(workdir, partial(make_shared, workdir / name))
        LOG.info("pretraining %s, %s: %d steps", method, name, config.steps)
        scores[name] = factor_scores(config, pretrain_command(config, workdir / name))
    scores[UNTRAINED] = factor_scores(next(iter(configs.values())), None)
    title = f"What {METHODS[method].__name__} keeps of the images, {' and with '.join(RUNS)}"

    def write() -> None:
        write_scores(workdir / "quickstart.json", method, seed, scores)
        write_results(title, workdir, configs, scores)

    written(workdir, write)
    return scores


def _config(method: str, arguments: str, seed: int) -> ConfigDict:
    config = get_config(f"method={method},{arguments}")
    config.seed = seed
    return config


def factor_scores(config: ConfigDict, state: TrainState | None) -> dict[str, float]:
    """The score per factor from the features of a run, or of an untrained encoder."""
    mesh = device_mesh()
    train, test = (open_source(config.data, split) for split in ("train", "test"))
    probed = np.arange(min(_PROBED, len(train)))
    run = build_run(config, mesh, len(train))
    if state is None:
        state = on_every_device(run.initial_state, mesh, run.seed_words)
    read = FeatureReader(config, run, mesh)
    train_features, _ = read(state, Part(train, probed, "probed"))
    test_features, _ = read(state, test)
    train_factors = {name: values[probed] for name, values in train.factors.items()}
    kinds = {name: factor.kind for name, factor in _FACTORS.items()}
    return probe_factors(train_features, train_factors, test_features, test.factors, kinds)


def group_table(scores: Scores, group: str) -> Table:
    """The scores of a group's factors by run, below their mean."""
    means = {run: group_means(each, _GROUPS) for run, each in scores.items()}
    names = [name for name, of in _GROUPS.items() if of == group]
    return Table(
        ("factor", *scores),
        [
            ("mean", *(each[group] for each in means.values())),
            *((name, *(each[name] for each in scores.values())) for name in names),
        ],
    )


def whole_table(scores: Scores) -> Table:
    """The tables of all groups, with the augmentations that change each factor."""
    rows = []
    for group in _ORDER:
        (_, *means), *factors = group_table(scores, group).rows
        rows.append((group, "", *means))
        rows.extend((f"  {name}", _FACTORS[name].changed_by, *row) for name, *row in factors)
    return Table(("factor", "changed by", *scores), rows)


def headline(scores: Scores) -> str:
    """A sentence per run on what it keeps more or less of than the first one."""
    first, *others = RUNS
    means = {run: group_means(scores[run], _GROUPS) for run in RUNS}

    def share(run: str, group: str) -> str:
        mine, other = means[run][group], means[first][group]
        word = "more" if mine > other else "less"
        return f"{word} {group} ({mine:.2f}; {first} {other:.2f})"

    return " ".join(
        f"Compared with {first}, {run} keeps {', '.join(share(run, group) for group in _ORDER)}."
        for run in others
    )


def write_scores(path: epath.Path, method: str, seed: int, scores: Scores) -> None:
    """Writes every score, the groups' means and what the factors are, as JSON."""
    report = {
        "method": method,
        "seed": seed,
        "scores": scores,
        "means": {run: group_means(each, _GROUPS) for run, each in scores.items()},
        "factors": {
            name: {"kind": factor.kind, "group": factor.group, "changed_by": factor.changed_by}
            for name, factor in _FACTORS.items()
        },
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text)


def write_results(
    title: str, workdir: epath.Path, configs: Mapping[str, ConfigDict], scores: Scores
) -> None:
    """Writes `quickstart.png`, and the page that every evaluation has."""
    config = next(iter(configs.values()))  # both runs begin with the same views
    source = open_source(config.data, config.data.train_split)
    run = build_run(config, device_mesh(), len(source))
    images, (first, _), (second, _) = first_views(run, source, config.data)
    write_figure(
        workdir / "quickstart.png",
        title=title,
        loss={name: read_metrics(workdir / name)["loss"] for name in configs},
        tables={group: group_table(scores, group) for group in _ORDER},
        images=images,
        view_1=first,
        view_2=second,
    )
    findings: dict[str, list[Finding]] = {
        name: factor_findings(Motifs.FAMILY, each, _GROUPS) for name, each in scores.items()
    }
    views = _gallery(images, first, second)
    for name, config in configs.items():
        findings[name] += [*pretraining_findings(config, workdir / name), views]
    length = f"{config.steps} steps of {config.batch_size} images each, seed {config.seed}."
    write_report(
        workdir,
        {name: [each] for name, each in findings.items()},
        title=title,
        summary=f"{headline(scores)}\n\n{length} {EXPLANATION}",
        provenance={name: {"config": flat_settings(config)} for name, config in configs.items()},
    )


def _gallery(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    view_1: Float[np.ndarray, "images height width 3"],
    view_2: Float[np.ndarray, "images height width 3"],
) -> Gallery:
    """The first images beside their two views."""

    def pixels(view: Float[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
        return np.rint(255 * np.clip(view, 0, 1)).astype(np.uint8)

    rows = [
        ((image, "image"), (pixels(first), "view 1"), (pixels(second), "view 2"))
        for image, first, second in zip(images[:_SHOWN], view_1, view_2, strict=False)
    ]
    return Gallery(TASK, Motifs.FAMILY, "The first images and their two views", rows)


def main(method: str, workdir: epath.Path, seed: int) -> None:
    """Runs the quickstart, prints its table, and where the page is."""
    start = time.monotonic()
    scores = quickstart(method, workdir, seed)
    table = whole_table(scores)
    for name, changed_by, *cells in [table.columns, *table.rows]:
        values = "".join(f"{cell_text(cell):>11}" for cell in cells)
        command.say(f"{name:31}{changed_by:26}{values}")
    command.say(f"\n{headline(scores)}\n{EXPLANATION}\n")
    for file in (HTML, "quickstart.png", "quickstart.json"):
        command.say(workdir / file)
    LOG.info("took %.0f s", time.monotonic() - start)


if __name__ == "__main__":
    method_flag = flags.DEFINE_enum("method", "simclr", sorted(METHODS), "Method to pretrain.")
    workdir_flag = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of runs and page.")
    seed_flag = flags.DEFINE_integer("seed", 0, "Seed of weights, order and augmentations.", 0)
    command.run(lambda: main(method_flag.value, known_path(workdir_flag.value), seed_flag.value))
