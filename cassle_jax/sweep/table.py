"""Named experiments: what a table of runs is, where it is found, and which runs it has."""

import dataclasses
import difflib
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cassle_jax.config import ConfigError, flat_settings
from cassle_jax.sweep.space import Run, Values, run_of

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "configs" / "tables"

# Any run at a size that takes seconds; of these settings a run takes those that it has.
TOY = {
    "steps": "4",
    "optimizer.warmup_epochs": "0",
    "batch_size": "16",
    "chunk_size": "0",
    "encoder.name": "resnet18",
    "encoder.width": "8",
    "encoder.small_images": "True",
    "conditioning.width": "8",
    "augself.hidden": "16",
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
    "shots=1",
    "ways=2",
    "analysed=32",
    "episodes=20",
    "probe_epochs=1",
    "fine_tune_epochs=1",
)

# A run of fewer steps than that saves so many times; a longer one as often as its configuration
# says.
_SHORT_RUN, _SAVES, _LOGS = 20_000, 5, 50


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      subject: what it is called, as in `SimCLR, CASSLE`; what comes before the last comma is its
        group.
      config: a configuration file with its arguments, as `configs/cifar10.py:method=simclr`; a
        relative path is looked for in the project.
      overrides: `name=value` each, of settings and of the file's arguments.
      against: subject of the row that it is compared with; "" for the first of its group.
    """

    subject: str
    config: str
    overrides: tuple[str, ...] = ()
    against: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A named experiment: rows, each run with every seed and evaluated alike.

    A file in `configs/tables/` has a function `get_table` that returns one.

    Attributes:
      title: the heading.
      question: what it answers, and what would be success.
      rows: the lines.
      seeds: of every row.
      datasets: to evaluate on, as the evaluation command takes them; none for no evaluation.
      tasks: of the evaluation; empty for the usual ones.
      evaluation: further options of it, `name=value` each, such as `episodes=600` and `limit=1000`.
      export: formats that the weights of every run are written in, such as `detectron2`.
      overrides: of all rows, `name=value` each.
      toy: the same, of a run at toy size.
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
        """The subject that a row is compared with; "" where that is the row itself.

        Raises:
          ConfigError: it names a row that is not there.
        """
        group = row.subject.rpartition(",")[0]
        first = next(each for each in self.rows if each.subject.rpartition(",")[0] == group)
        chosen = row.against or first.subject
        if chosen not in [each.subject for each in self.rows]:
            raise ConfigError(
                f"against={chosen!r} of row {row.subject!r} is no row of this table; use one of "
                f"{', '.join(repr(each.subject) for each in self.rows)}"
            )
        return "" if chosen == row.subject else chosen


def find_table(name: str, **arguments: object) -> Table:
    """The table of a name in `configs/tables/`, or of a file.

    Args:
      name: of it.
      arguments: of its function `get_table`.

    Raises:
      ConfigError: there is none, with the closest names; or it cannot be.
    """
    path = Path(name).expanduser()
    if path.suffix != ".py":
        known = sorted(each.stem for each in TABLES.glob("*.py"))
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"table={name!r} is unknown; use one of {', '.join(known)}, or the path of a "
                f"file{hint}"
            )
        path = TABLES / f"{name}.py"
    try:
        known = runpy.run_path(str(path))
    except OSError as error:
        raise ConfigError(f"table={name} cannot be read: {error.strerror}") from error
    if "get_table" not in known:
        raise ConfigError(f"table={name} has no function get_table")
    table = known["get_table"](**arguments)
    _check(table)
    return table


def _check(table: Table) -> None:
    """Raises ConfigError where rows cannot be told apart or a row is compared with none."""
    folders: dict[str, str] = {}
    for row in table.rows:
        if not row.subject or "=" in row.subject:
            raise ConfigError(f"row {row.subject!r}: a subject is a name without '='")
        other = folders.setdefault(_slug(row.subject), row.subject)
        if other != row.subject or [each.subject for each in table.rows].count(other) > 1:
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
) -> list[Run]:
    """The runs of a table, all rows of a seed before the next seed, with their settings checked.

    Args:
      table: the experiment.
      rows: parts of subjects: those rows alone; empty for all.
      seeds: instead of the table's.
      overrides: of all runs, `name=value` each; they come last.
      toy: whether at toy size.

    Raises:
      ConfigError: a setting that cannot be, or no row of these names.
    """
    chosen = [row for row in table.rows if _is_chosen(row, rows)]
    if not chosen:
        subjects = ", ".join(row.subject for row in table.rows)
        raise ConfigError(f"rows={','.join(rows)} match none of {subjects}")
    shared = pairs(table.overrides)
    last = {**(pairs(table.toy) if toy else {}), **pairs(overrides)}
    runs = []
    for seed in seeds or table.seeds:
        for row in chosen:
            try:
                own = {"seed": str(seed), **shared, **pairs(row.overrides)}
                if toy:
                    own |= _known_of(TOY, _run(row, seed, own).config)
                runs.append(_run(row, seed, {**own, **last}))
            except ConfigError as error:
                raise ConfigError(f"row {row.subject!r}: {error}") from error
    return runs


def planned(run: Run, images: int) -> Run:
    """A run with what a short one needs, in all that its own values leave open.

    It knows its number of steps, probes nothing on the way, saves a few times, and has a warm-up
    that ends within it.

    Args:
      run: of a table.
      images: how many it has for training.
    """
    config = run.config
    an_epoch = max(1, images // config.batch_size)
    steps = config.steps or config.epochs * an_epoch
    warmup = min(float(config.optimizer.warmup_epochs), 0.1 * steps / an_epoch)
    wanted = {"steps": steps, "probe.every_epochs": 0, "checkpoint.keep": 1}
    if steps < _SHORT_RUN:
        wanted["checkpoint.every_steps"] = max(1, steps // _SAVES)
        wanted["log.every_steps"] = max(1, steps // _LOGS)
    if warmup < config.optimizer.warmup_epochs:
        wanted["optimizer.warmup_epochs"] = warmup
    return changed(run, {name: value for name, value in wanted.items() if name not in run.values})


def changed(run: Run, settings: Mapping[str, object]) -> Run:
    """A run with further settings."""
    file = run.arguments[0].removeprefix("--config=")
    values = run.values | {name: str(value) for name, value in settings.items()}
    return run_of(file, values, name=run.name, subject=run.subject)


def folder_of(subject: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{_slug(subject)}-{seed}"


def pairs(texts: Iterable[str]) -> Values:
    """Of `name=value` each, the values by name; of equal names the last.

    Raises:
      ConfigError: one has no value.
    """
    values = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{text!r} is not name=value")
        values[name.strip()] = value
    return values


def _run(row: Row, seed: int, values: Values) -> Run:
    config = row.config
    if not Path(config).is_absolute() and (ROOT / config.partition(":")[0]).exists():
        config = str(ROOT / config)
    return run_of(config, values, name=folder_of(row.subject, seed), subject=row.subject)


def _is_chosen(row: Row, parts: Sequence[str]) -> bool:
    names = (row.subject.casefold(), _slug(row.subject))
    return not parts or any(part.casefold() in name for part in parts for name in names)


def _known_of(settings: Mapping[str, str], config: ConfigDict) -> Values:
    known = flat_settings(config)
    return {name: value for name, value in settings.items() if name in known}


def _slug(subject: str) -> str:
    return re.sub(r"[^\w.+]+", "-", subject.lower()).strip("-")
