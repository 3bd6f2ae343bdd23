"""Evaluates encoders: python -m cassle_jax.evaluate --run=WORKDIR --datasets=… --to=FOLDER."""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags

from cassle_jax import command
from cassle_jax.augment import AugmentSpec
from cassle_jax.checks import ConfigError, check_at_least, check_one_of, check_seed
from cassle_jax.data import DataError, Source
from cassle_jax.data.datasets import DATASETS, OWN_FOLDER, EvaluationData, open_dataset
from cassle_jax.data.decode import MAX_PIXELS, allow_pixels
from cassle_jax.data.families import FAMILIES, SPLITS, open_drawn
from cassle_jax.distributed import agree, all_processes
from cassle_jax.evaluation.feature_cache import CACHE_GIB
from cassle_jax.evaluation.findings import Failure, Finding
from cassle_jax.evaluation.store import FeatureStore
from cassle_jax.evaluation.subject import Subject
from cassle_jax.evaluation.tasks import TASKS, Bench, Settings
from cassle_jax.faults import Outage, retried
from cassle_jax.parallel import device_mesh, in_all_processes
from cassle_jax.report.growing_report import GrowingReport
from cassle_jax.storage import path_of
from cassle_jax.subjects import open_subject

LOG = logging.getLogger("cassle_jax.evaluate")  # also where this is the main module

DRAWN, DRAWN_PIXELS = 5000, 64


def evaluate_command(
    *,
    runs: Sequence[str],
    datasets: Sequence[str],
    to: str,
    tasks: Sequence[str] = (),
    network: str = "online",
    data_dir: str = "",
    cache: str = "",
    cache_gib: float = CACHE_GIB,
    batch: int = 256,
    limit: int = 0,
    settings: Settings | None = None,
) -> Path:
    """Evaluates as the command does, and returns the path of the page.

    Everything is opened and checked before the first image is read. A task that cannot run on a
    dataset, or fails, is a red line on the page, and the other tasks still run. The page grows as
    results come in. The same call continues where an earlier one ended, and retries failed tasks.
    Several processes share the images and gather the features. Each computes all results from them,
    and the first writes the page.

    Args:
      runs: workdirs of runs or files of weights, each as `path` or `name=path`; paths of the same
        name are seeds of one subject.
      datasets: names in `DATASETS`, `motifs`, `scenes`, `folder:<path>`, or `name=<path of its
        folder>`.
      to: folder of the report; its page says so if the evaluation ended early.
      tasks: names in `TASKS`; empty for the usual ones that suit each dataset.
      network: the network of a run to evaluate: `online` or `momentum`.
      data_dir: data_dir of tensorflow-datasets.
      cache: folder that keeps features; empty for none.
      cache_gib: bound of that folder's size, GiB; the least recently read features go first.
      batch: images per step, all devices together.
      limit: largest number of images per part; 0 for all.
      settings: settings of the protocols.

    Raises:
      ConfigError, DataError: a setting cannot work, or, at the end, a task failed; in one line.
    """
    for name in tasks:
        check_one_of("tasks", name, TASKS)
    if not runs or not datasets:
        raise ConfigError("evaluate needs --run=WORKDIR and --datasets=…; see --help")
    mesh = device_mesh()
    if batch < 2 or batch % mesh.size:
        raise ConfigError(
            f"batch={batch} cannot be split over {mesh.size} devices; use a multiple of them"
        )
    try:
        check_settings(settings or Settings(), limit=limit, network=network)
        check_at_least("cache_gib", cache_gib, 0)
    except ValueError as error:
        raise ConfigError(str(error).removeprefix("augment.")) from error
    opened = [retried(each, partial(open_evaluated, each, data_dir)) for each in datasets]
    names = [data.name for data in opened]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"dataset {name!r} is asked for twice; the report tells by name")
    subjects = _open_subjects(runs, network, settings or Settings())
    agree(_shared_facts(opened, subjects, tasks, batch, limit, settings))
    chosen = settings or Settings()
    plan = {data.name: tasks_for(data, tasks) for data in opened}
    if not any(plan.values()):
        raise ConfigError(f"tasks={','.join(tasks)} suit none of {', '.join(datasets)}")
    unmet = _check_needs(opened, plan, chosen, limit, mesh.size)
    if not os.fspath(to):
        raise ConfigError("to='' names no folder; give one, as in --to=runs/evaluation")
    folder = Path(path_of(to))
    _check_writable(folder)
    report = GrowingReport(
        folder,
        f"{_summary(opened, limit)} {_of_settings(chosen)}",
        {name: _facts(seeds) for name, seeds in subjects.items()},
        writes=jax.process_index() == 0,
    )
    kept_in = Path(path_of(cache)) if cache else None
    complete = False
    try:
        for subject in (each for seeds in subjects.values() for each in seeds):
            report.begin(subject.name)
            store = FeatureStore(
                subject, mesh, batch=batch, folder=kept_in, cache_gib=cache_gib, limit=limit
            )
            for data in opened:
                bench = Bench(subject, data, store, mesh, chosen)
                _evaluate(bench, plan[data.name], unmet[data.name], report, (batch, limit))
        complete = True
    finally:
        page = _written(report, complete=complete)
    if jax.process_index() == 0:
        LOG.info("the page is %s", page)
    if report.failures:
        raise DataError(_failure_line(report.failures, page))
    return page


def _evaluate(
    bench: Bench,
    tasks: Sequence[str],
    unmet: Mapping[str, str],
    report: GrowingReport,
    how: tuple[int, int],
) -> None:
    """Runs tasks on a bench, except those that an earlier call ran or the dataset rules out."""
    identity = bench.identity(*how)
    for name in tasks:
        key = hashlib.blake2b(f"{name}{identity}".encode(), digest_size=16).hexdigest()
        kept = report.kept(key)
        if name in unmet:
            report.add([Failure(name, bench.data.name, unmet[name])])
        elif in_all_processes(kept is not None):
            LOG.info("%s of %s on %s: done before", name, bench.subject.name, bench.data.name)
            report.add(kept, key)
        else:
            findings = _run(name, bench, report)
            failed = any(isinstance(each, Failure) for each in findings)
            report.add(findings, "" if failed else key)


def unmet_needs(
    data: EvaluationData, tasks: Sequence[str], settings: Settings, limit: int = 0, devices: int = 1
) -> dict[str, str]:
    """The tasks that a dataset rules out, each with the reason in one line."""
    needs = {name: TASKS[name].needs(settings, devices) for name in tasks}
    reasons = {
        name: each.unmet(data, limit=limit, analysed=settings.analysed)
        for name, each in needs.items()
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _check_needs(
    opened: Sequence[EvaluationData],
    plan: Mapping[str, Sequence[str]],
    settings: Settings,
    limit: int,
    devices: int,
) -> dict[str, dict[str, str]]:
    """Logs and returns, by dataset and task, the reasons why tasks cannot run.

    Raises:
      DataError: no task can run on any dataset.
    """
    unmet = {
        data.name: unmet_needs(data, plan[data.name], settings, limit, devices) for data in opened
    }
    lines = [
        f"{task} on {data}: {why}" for data, each in unmet.items() for task, why in each.items()
    ]
    if len(lines) == sum(map(len, plan.values())):
        raise DataError("nothing can be evaluated; " + "; ".join(lines))
    for line in lines:
        LOG.warning("%s; the rest is done", line)
    return unmet


def _written(report: GrowingReport, *, complete: bool) -> Path:
    try:
        return report.write(complete=complete)
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error.strerror or error}") from error


def _failure_line(failures: Sequence[tuple[str, Failure]], page: Path) -> str:
    name, first = failures[0]
    what = "1 task" if len(failures) == 1 else f"{len(failures)} tasks"
    why = f"{first.task} of {name} on {first.dataset}: {first.reason}"
    return f"{what} failed, the rest is in {page}; {why}"


def _shared_facts(
    opened: Sequence[EvaluationData],
    subjects: Mapping[str, Sequence[Subject]],
    tasks: Sequence[str],
    batch: int,
    limit: int,
    settings: Settings | None,
) -> dict[str, object]:
    """Facts that must be equal in all processes."""
    return {
        "tasks": list(tasks),
        "batch": batch,
        "limit": limit,
        "settings": repr(settings),
        "datasets": [data.name for data in opened],
        "the datasets' sizes": _summary(opened),
        "the weights": {name: [s.fingerprint() for s in seeds] for name, seeds in subjects.items()},
    }


def check_names(datasets: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuses unknown names of datasets and tasks, without opening anything.

    Raises:
      ConfigError: a name is unknown; the message has the closest known one.
    """
    for task in tasks:
        check_one_of("tasks", task, TASKS)
    for dataset in datasets:
        if not dataset.startswith(OWN_FOLDER):
            check_one_of("datasets", dataset.partition("=")[0], (*DATASETS, *FAMILIES))


def open_evaluated(described: str, data_dir: str) -> EvaluationData:
    """Opens a dataset by its name in the table, a drawn one, `folder:<path>`, or `name=<path>`.

    Raises:
      DataError: the dataset is missing or incomplete.
    """
    if described in FAMILIES:
        parts = (open_drawn(described, DRAWN, DRAWN_PIXELS, split) for split in SPLITS)
        train, val, test = parts
        classes = len(test.class_names)
        return EvaluationData(described, train, val, test, classes, "accuracy", "classification")
    if described.startswith(OWN_FOLDER):
        return open_dataset(described)
    name, _, path = described.partition("=")
    return open_dataset(name, path=path, data_dir=data_dir)


def datasets_in(text: str) -> tuple[str, ...]:
    """The datasets in a comma-separated list; a comma without a dataset after it is a path's."""
    found: list[str] = []
    for piece in text.split(",") if text else []:
        name = piece.strip().partition("=")[0]
        begins = name in DATASETS or name in FAMILIES or piece.strip().startswith(OWN_FOLDER)
        if found and not begins and (":" in found[-1] or "=" in found[-1]):
            found[-1] += f",{piece}"
        else:
            found.append(piece.lstrip() if "=" in piece or ":" in piece else piece.strip())
    return tuple(found)


def named_path(described: str) -> tuple[str, str]:
    """Name and path of `name=path`; the name is empty where the whole is an existing path."""
    name, separator, path = described.partition("=")
    if not separator or path_of(described).exists():
        return "", described
    return name, path


def _open_subjects(
    runs: Sequence[str], network: str, settings: Settings
) -> dict[str, list[Subject]]:
    subjects: dict[str, list[Subject]] = {}
    for described in runs:
        name, path = named_path(described)
        subject = open_subject(path, name=name, network=network)
        try:
            subject = subject.with_images(**_preparation(settings))
        except ValueError as error:
            raise ConfigError(f"{subject.name}: {str(error).removeprefix('augment.')}") from error
        if not name and subject.name in subjects:
            raise ConfigError(
                f"run={path} would be a seed of another run called {subject.name!r}; "
                "give each a name, as in --run=name=path (one name for seeds)"
            )
        subjects.setdefault(subject.name, []).append(subject)
    return subjects


def tasks_for(data: EvaluationData, chosen: Sequence[str]) -> list[str]:
    """The tasks to run, in the table's order; logs the requested ones that do not suit."""
    suiting = [
        name
        for name, task in TASKS.items()
        if (not chosen or name in chosen) and task.suits(data, asked_for=bool(chosen))
    ]
    for name in set(chosen) - set(suiting):
        LOG.warning("%s is left out: not for %s", name, data.name)
    return suiting


def _run(name: str, bench: Bench, report: GrowingReport) -> list[Finding]:
    """The findings of a task, or its failure; with several processes, some errors end them all."""
    start = time.monotonic()
    try:
        findings = TASKS[name].run(bench)
        report.check(findings)
    except Outage:  # the tasks after it would each wait for the same storage
        raise
    except Exception as error:
        if jax.process_count() > 1 and (
            isinstance(error, DataError) or not isinstance(error, ValueError)
        ):
            raise
        if not isinstance(error, ValueError):
            LOG.exception("%s of %s on %s", name, bench.subject.name, bench.data.name)
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        LOG.error("%s of %s on %s failed: %s", name, bench.subject.name, bench.data.name, reason)
        return [Failure(name, bench.data.name, reason)]
    seconds = time.monotonic() - start
    LOG.info("%s of %s on %s: %.1f s", name, bench.subject.name, bench.data.name, seconds)
    return findings


def _facts(seeds: Sequence[Subject]) -> Mapping[str, object]:
    """Facts of a subject: the fingerprints of all seeds, and other facts of the first seed."""
    facts = {"fingerprint": ", ".join(seed.fingerprint() for seed in seeds)}
    known = ("encoder", "method", "network", "step", "dataset", "devices", "versions", "config")
    return facts | {name: seeds[0].facts[name] for name in known if name in seeds[0].facts}


def check_settings(
    settings: Settings, *, limit: int = 0, network: str = "online", batch: int = 2
) -> None:
    """Refuses at the start what a run or a protocol would only refuse at its turn.

    Raises:
      ValueError: names the setting, its value, and what would work.
    """
    check_one_of("network", network, ("online", "momentum"))
    check_at_least("batch", batch, 2)
    check_at_least("limit", limit, 0)
    check_at_least("analysed", settings.analysed, 0)
    check_seed("seed", settings.seed)
    check_at_least("fine_tune_epochs", settings.fine_tune_epochs, 0)
    check_at_least("episodes", settings.episodes, 1)
    check_at_least("neighbours", settings.neighbours, 1)
    check_at_least("probe_epochs", settings.probe_epochs, 1)
    check_at_least("ways", settings.ways, 2)
    for shots in settings.shots:
        check_at_least("shots", shots, 1)
    for fraction in settings.fractions:
        if not 0 < fraction <= 1:
            raise ConfigError(f"fractions={fraction:g} is not in (0, 1]")
    AugmentSpec(**{"size": 1, "blur": 0, **_preparation(settings)})
    for name in ("shots", "fractions"):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}={','.join(map(str, values))} has a value twice")


def _preparation(settings: Settings) -> dict[str, Any]:
    """The settings of image preparation that the user has set."""
    return {name: v for name in ("size", "mean", "std") if (v := getattr(settings, name))}


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"to={folder} cannot be written: {error.strerror}") from error


def _of_settings(settings: Settings) -> str:
    values = ", ".join(f"{name} {value}" for name, value in vars(settings).items())
    return f"Settings: {values}."


def _summary(opened: Sequence[EvaluationData], limit: int = 0) -> str:
    def size(part: Source) -> str:
        count = len(part)
        return f"{limit} of {count}" if 0 < limit < count else str(count)

    sizes = "; ".join(
        f"{data.name}: "
        + "/".join(size(part) for part in (data.train, data.val, data.test) if part is not None)
        for data in opened
    )
    return f"Images for training, validation and test: {sizes}."


if __name__ == "__main__":
    run_flag = flags.DEFINE_multi_string(
        "run", [], "Workdir of a run or file of weights, as path or name=path; may be repeated."
    )
    datasets_flag = flags.DEFINE_string(
        "datasets",
        "",
        "Names in the table, motifs, scenes, folder:<path>, or name=<path of its folder>.",
    )
    to_flag = flags.DEFINE_string("to", "runs/evaluation", "Folder of the report.")
    tasks_flag = flags.DEFINE_list(
        "tasks", [], f"Tasks to run; default: the usual ones. One or more of {', '.join(TASKS)}."
    )
    network_flag = flags.DEFINE_string(
        "network", "online", "Network of a run to evaluate: online or momentum."
    )
    data_dir_flag = flags.DEFINE_string("data_dir", "", "data_dir of tensorflow-datasets.")
    cache_flag = flags.DEFINE_string(
        "cache", "~/.cache/cassle_jax/features", "Folder that keeps features; empty for none."
    )
    cache_gib_flag = flags.DEFINE_float(
        "cache_gib",
        CACHE_GIB,
        "Bound of the cache's size, GiB; the least recently read features go first.",
    )
    batch_flag = flags.DEFINE_integer("batch", 256, "Images per step, all devices together.")
    limit_flag = flags.DEFINE_integer("limit", 0, "Largest number of images per part; 0: all.")
    max_pixels_flag = flags.DEFINE_integer(
        "max_pixels", MAX_PIXELS, "Most pixels of an image; one with more counts as damaged."
    )
    analysed_flag = flags.DEFINE_integer(
        "analysed", 2000, "Images for invariance, matching, leak and augmentation probes; 0: all."
    )
    shots_flag = flags.DEFINE_list("shots", ["1", "5"], "Few-shot: images per class to fit.")
    ways_flag = flags.DEFINE_integer("ways", 5, "Few-shot: classes per episode.")
    episodes_flag = flags.DEFINE_integer("episodes", 2000, "Few-shot: number of episodes.")
    neighbours_flag = flags.DEFINE_integer("neighbours", 1, "k-NN: number of neighbours, k.")
    fractions_flag = flags.DEFINE_list(
        "fractions", ["0.01", "0.1", "1"], "Fine-tuning: shares of the labels, each in (0, 1]."
    )
    probe_epochs_flag = flags.DEFINE_integer("probe_epochs", 100, "SGD probe: epochs.")
    fine_tune_epochs_flag = flags.DEFINE_integer(
        "fine_tune_epochs", 0, "Fine-tuning: epochs; 0: its default."
    )
    seed_flag = flags.DEFINE_integer("seed", 0, "Seed of all random draws.")
    size_flag = flags.DEFINE_integer("size", 0, "Side of an image in pixels; 0: as in training.")
    mean_flag = flags.DEFINE_list("mean", [], "Mean per channel, in [0, 1]; default: training's.")
    std_flag = flags.DEFINE_list("std", [], "Standard deviation per channel; default: training's.")

    def chosen_settings() -> Settings:
        """The protocols' settings from the flags."""
        try:
            return Settings(
                analysed=analysed_flag.value,
                shots=tuple(map(int, shots_flag.value)),
                ways=ways_flag.value,
                episodes=episodes_flag.value,
                neighbours=neighbours_flag.value,
                fractions=tuple(map(float, fractions_flag.value)),
                probe_epochs=probe_epochs_flag.value,
                fine_tune_epochs=fine_tune_epochs_flag.value,
                seed=seed_flag.value,
                size=size_flag.value,
                mean=tuple(map(float, mean_flag.value)),
                std=tuple(map(float, std_flag.value)),
            )
        except ValueError as error:
            raise ConfigError(
                f"shots, fractions, mean and std are lists of numbers: {error}"
            ) from error

    def evaluate() -> None:
        """Evaluates as the flags say, together with the other processes where there are any."""
        with all_processes():
            allow_pixels(max_pixels_flag.value)
            evaluate_command(
                runs=run_flag.value,
                datasets=datasets_in(datasets_flag.value),
                to=to_flag.value,
                tasks=tasks_flag.value,
                network=network_flag.value,
                data_dir=data_dir_flag.value,
                cache=cache_flag.value,
                cache_gib=cache_gib_flag.value,
                batch=batch_flag.value,
                limit=limit_flag.value,
                settings=chosen_settings(),
            )

    command.run(evaluate)
