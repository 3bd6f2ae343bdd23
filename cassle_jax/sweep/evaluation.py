"""The evaluation that every run of a table gets, checked before any run starts."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cassle_jax.checks import ConfigError, check_one_of
from cassle_jax.data import DataError
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.data.requested import check_datasets, open_datasets
from cassle_jax.data.sources import digest_of
from cassle_jax.evaluation.plan import plan, warn_of_idle, warn_of_no_datasets
from cassle_jax.evaluation.protocols import (
    all_settings,
    check_tasks,
    checked_settings,
    parsed_settings,
)
from cassle_jax.interop.architecture import architecture_of
from cassle_jax.interop.formats import FORMATS
from cassle_jax.interop.pytorch import encoder_to_pytorch
from cassle_jax.sweep.table import TOY_EVALUATION, Table, parse_settings
from cassle_jax.training.run import networks_of

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation that every run of a table gets.

    Attributes:
      datasets: as in the evaluation command; empty for no evaluation.
      tasks: as in the evaluation command; empty for the default tasks.
      data_dir: folder of tensorflow-datasets.
      settings: settings that differ from their defaults, by name.
      images: numbers of images and a digest of the classes, by dataset.
    """

    datasets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data_dir: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    images: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)


def evaluation_of(
    table: Table,
    *,
    datasets: Sequence[str] = (),
    data_dir: str = "",
    options: Sequence[str] = (),
    toy: bool = False,
) -> Evaluation:
    """Builds the evaluation of a table's runs and opens its datasets.

    Args:
      table: the experiment.
      datasets: datasets that replace the table's; empty for the table's.
      data_dir: folder of tensorflow-datasets.
      options: further options, as `name=value`.
      toy: whether to evaluate on a few rendered scenes.

    Raises:
      ConfigError, DataError: an unknown name, an invalid value, or a missing dataset.
    """
    chosen = tuple(datasets) or table.datasets
    if toy and chosen:
        if datasets:
            LOG.warning("datasets=%s becomes scenes with toy=True", ",".join(datasets))
        chosen = ("scenes",)
    check_tasks(table.tasks)
    check_datasets(chosen)
    for format_name in table.export:
        check_one_of("export", format_name, FORMATS)
    texts = parse_settings((*table.evaluation, *(TOY_EVALUATION if toy else ())))
    given = parse_settings(options, "evaluation=")
    texts |= given
    for name in texts:
        check_one_of("evaluation", name, all_settings())
    try:
        values = parsed_settings(texts)
        extraction, of_protocols = checked_settings(values)
    except ConfigError as error:
        raise ConfigError(f"evaluation {error}") from error
    opened = open_datasets(chosen, data_dir)
    planned = plan(opened, table.tasks, of_protocols, limit=extraction.limit)
    if chosen:
        warn_of_idle({name: values[name] for name in given}, planned)
    else:
        warn_of_no_datasets(evaluation=options)
    for each in planned:
        if each.unmet:
            raise DataError(f"{each}: {each.unmet}")
    images = {data.name: _numbers_and_classes(data) for data in opened}
    return Evaluation(chosen, table.tasks, data_dir, settings=values, images=images)


def _numbers_and_classes(data: EvaluationData) -> str:
    """The numbers of a dataset's images per part, and a digest of the names of its classes."""
    parts = [part for part in (data.train, data.val, data.test) if part is not None]
    classes = digest_of("\0".join(data.test.class_names).encode(errors="surrogateescape"))
    return f"{'/'.join(str(len(part)) for part in parts)} of classes {classes}"


def check_formats(config: ConfigDict, formats: Sequence[str]) -> None:
    """Raises WeightsError for a format of weights that cannot hold a configuration's encoder."""
    if not formats:
        return
    encoder, size = networks_of(config).factories["encoder"](), config.augment.size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(partial(encoder.init, train=False), jax.random.key(0), image)
    # Zeros of any shape that take no memory.
    arrays = jax.tree.map(lambda each: np.broadcast_to(each.dtype.type(0), each.shape), shapes)
    architecture = architecture_of(encoder_to_pytorch(arrays), getattr(encoder, "heads", None))
    for name in formats:
        FORMATS[name].check(architecture)


def facts_of(evaluation: Evaluation) -> dict[str, object]:
    """The settings that affect the results of an evaluation, without the paths of its images."""
    names = [
        dataset if dataset.startswith("folder:") else dataset.partition("=")[0]
        for dataset in evaluation.datasets
    ]
    settings = {name: each.default for name, each in all_settings().items()} | evaluation.settings
    facts = {"datasets": names, "tasks": evaluation.tasks, "images": evaluation.images}
    return {**facts, **settings}
