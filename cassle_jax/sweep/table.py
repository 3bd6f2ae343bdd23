"""Named experiments: finds a table of rows and seeds, checks it, and expands it into runs."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from cassle_jax.checks import ConfigError
from cassle_jax.command import made_by
from cassle_jax.config import flat_settings
from cassle_jax.config_files import CONFIGS, TABLES, find_file
from cassle_jax.methods import AUXILIARIES
from cassle_jax.report.overview import group_of
from cassle_jax.sweep.space import RunSpec, Values, run_of
from cassle_jax.training.run import check_settings

# Settings of a toy-sized run, which takes seconds; a run ignores those that it does not have.
TOY = {
    "steps": "4",
    "optimizer.warmup_epochs": "0",
    "batch_size": "16",
    "chunk_size": "0",
    "encoder.name": "resnet18",
    "encoder.width": "8",
    "encoder.small_images": "True",
    "conditioning.width": "8",
    **{f"{name}.hidden": "16" for name in AUXILIARIES},
    "augment.size": "16",
    "data.source": "scenes",
    "data.name": "",
    "data.path": "",
    "data.classes": "",
    "data.train_split": "train",
    "data.scenes": "64",
    "data.canvas": "24",
    "data.threads": "2",
    "method.projector_hidden": "32",
    "method.projector_out": "32",
    "method.predictor_hidden": "32",
    "method.prototypes": "16",
    "method.queue_size": "64",
}
TOY_EVALUATION = (
    "limit=64",
    "batch=64",
    "shots=1",
    "ways=2",
    "analysed=32",
    "episodes=20",
    "probe_epochs=1",
    "fine_tune_epochs=1",
)

# A run with fewer than `_SHORT_RUN` steps saves `_SAVES` times and logs `_LOGS` times. A longer run
# follows its configuration.
_SHORT_RUN, _SAVES, _LOGS = 20_000, 5, 50


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      subject: name of the row, such as `SimCLR, CASSLE`; the part before the last comma is its
        group.
      config: a configuration file with its arguments, such as `configs/cifar10.py:method=simclr`;
        a relative path starts at this project's `configs/` if the file is there.
      overrides: settings and arguments of the file, as `name=value`.
      against: subject of the baseline row; "" for the first of the group.
    """

    subject: str
    config: str
    overrides: tuple[str, ...] = ()
    against: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A named experiment: all rows run with every seed and get the same evaluation.

    A file in `configs/tables/` defines one by a function `get_table` that returns it.

    Attributes:
      title: the heading.
      question: the question that the table answers, and the criterion of success.
      rows: the rows.
      seeds: seeds of every row.
      datasets: evaluation datasets, as in the evaluation command; empty for no evaluation.
      tasks: evaluation tasks; empty for the default tasks.
      evaluation: further evaluation options as `name=value`, such as `episodes=600`.
      export: formats to export the weights of every run to, such as `detectron2`.
      overrides: settings of all rows, as `name=value`.
      toy: further settings at toy size, as `name=value`.
    """

    title: str
    question: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    datasets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    export: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    toy: tuple[str, ...] = ()

    def against(self, row: Row) -> str:
        """The subject of a row's baseline; "" where the row is its own baseline.

        Raises:
          ConfigError: the table has no such row.
        """
        subjects = [other.subject for other in self.rows]
        first = next(each for each in subjects if group_of(each) == group_of(row.subject))
        chosen = row.against or first
        if chosen not in subjects:
            raise ConfigError(
                f"against={chosen!r} of row {row.subject!r} is not a row of this table; use one of "
                f"{', '.join(map(repr, subjects))}"
            )
        return "" if chosen == row.subject else chosen


def find_table(name: str, **arguments: object) -> Table:
    """Loads a table by its name in `configs/tables/`, or from a file.

    Args:
      name: name of the table, or path of a Python file.
      arguments: keyword arguments of the file's `get_table`.

    Raises:
      ConfigError: the name is unknown, with the closest known one; or the table is invalid.
    """
    table = made_by("table", find_file("table", name, TABLES), Table, **arguments)
    _check(table)
    return table


def _check(table: Table) -> None:
    """Raises ConfigError where two rows share a folder or a row's baseline is missing."""
    folders: dict[str, str] = {}
    subjects = [row.subject for row in table.rows]
    for row in table.rows:
        if not row.subject or "=" in row.subject:
            raise ConfigError(f"row {row.subject!r}: a subject is a name without '='")
        other = folders.setdefault(_slug(row.subject), row.subject)
        if other != row.subject or subjects.count(other) > 1:
            raise ConfigError(f"rows {other!r} and {row.subject!r} would have the same folder")
        table.against(row)
    if not table.rows:
        raise ConfigError(f"table {table.title!r} has no rows")


def runs_of_table(
    table: Table,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    toy: bool = False,
) -> list[RunSpec]:
    """Expands a table into runs with checked settings, all rows of a seed before the next seed.

    Args:
      table: the experiment.
      rows: subjects that select their row alone, or parts of subjects that select all rows with
        them; empty for all rows.
      seeds: seeds that replace the table's; empty for the table's.
      overrides: settings of all runs, as `name=value`; they take precedence.
      toy: whether the runs are toy-sized.

    Raises:
      ConfigError: an invalid setting, or one of `rows` selects no row.
    """
    chosen = _chosen(table, rows)
    shared = parse_settings(table.overrides)
    last = parse_settings(table.toy) if toy else {}
    last |= parse_settings(overrides, "set=")
    runs = []
    for seed, row in itertools.product(seeds or table.seeds, chosen):
        try:
            own = {"seed": str(seed), **shared, **parse_settings(row.overrides)}
            if toy:
                names = flat_settings(_run(row, seed, own).config)
                own |= {name: value for name, value in TOY.items() if name in names}
            runs.append(_run(row, seed, {**own, **last}))
            check_settings(runs[-1].config)
        except ConfigError as error:
            raise ConfigError(f"row {row.subject!r}: {error}") from error
    return runs


def planned(run: RunSpec, images: int) -> RunSpec:
    """Adapts a run's schedule to its length, where the run's own values leave it open.

    Sets the number of steps, turns periodic probes off, and limits the warm-up to a tenth of the
    run. A short run also saves and logs a fixed number of times.

    Args:
      run: a run of a table.
      images: number of training images.
    """
    config = run.config
    an_epoch = max(1, images // config.batch_size)
    steps = config.steps or config.epochs * an_epoch
    warmup = min(float(config.optimizer.warmup_epochs), 0.1 * steps / an_epoch)
    schedule = {"steps": steps, "probe.every_epochs": 0, "checkpoint.keep": 1}
    if steps < _SHORT_RUN:
        schedule["checkpoint.every_steps"] = max(1, steps // _SAVES)
        schedule["log.every_steps"] = max(1, steps // _LOGS)
    if warmup < config.optimizer.warmup_epochs:
        schedule["optimizer.warmup_epochs"] = warmup
    return with_settings(
        run, {name: value for name, value in schedule.items() if name not in run.values}
    )


def with_settings(run: RunSpec, settings: Mapping[str, object]) -> RunSpec:
    """A copy of a run with further settings."""
    file = run.arguments[0].removeprefix("--config=")
    values = run.values | {name: str(value) for name, value in settings.items()}
    return run_of(file, values, name=run.name, subject=run.subject)


def folder_of(subject: str, seed: int) -> str:
    """The name of the folder of a row's run."""
    return f"{_slug(subject)}-{seed}"


def parse_settings(texts: Iterable[str], flag: str = "") -> Values:
    """Parses texts `name=value` into values by name; the last value of a name counts.

    Args:
      texts: the texts.
      flag: prefix of the message that names the flag, such as `set=`.

    Raises:
      ConfigError: a text has no value.
    """
    values = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{flag}{text!r} is not name=value")
        values[name.strip()] = value
    return values


def _run(row: Row, seed: int, values: Values) -> RunSpec:
    config = row.config
    if (CONFIGS.parent / config.partition(":")[0]).exists():
        config = str(CONFIGS.parent / config)
    return run_of(config, values, name=folder_of(row.subject, seed), subject=row.subject)


def rows_in(text: str, table: Table) -> tuple[str, ...]:
    """The subjects, and parts of subjects, in a comma-separated list; subjects may have commas."""
    subjects = {row.subject.casefold() for row in table.rows}
    pieces, found = text.split(","), []
    while pieces:
        joined = [",".join(pieces[:count]).strip() for count in range(len(pieces), 0, -1)]
        found.append(next((each for each in joined if each.casefold() in subjects), joined[-1]))
        del pieces[: found[-1].count(",") + 1]
    return tuple(filter(None, found))


def _chosen(table: Table, parts: Sequence[str]) -> list[Row]:
    """The rows that any of the parts selects; all rows where there are no parts."""
    names = {row: (row.subject.casefold(), _slug(row.subject)) for row in table.rows}
    chosen: set[Row] = set() if parts else set(names)
    for part in map(str.casefold, parts):
        alone = [row for row in names if part in names[row]]
        found = alone or [row for row in names if any(part in name for name in names[row])]
        if not found:
            subjects = ", ".join(map(repr, (row.subject for row in table.rows)))
            raise ConfigError(f"rows={part} matches none of {subjects}")
        chosen.update(found)
    return [row for row in table.rows if row in chosen]


def _slug(subject: str) -> str:
    return re.sub(r"[^\w.+]+", "-", subject.lower()).strip("-")
