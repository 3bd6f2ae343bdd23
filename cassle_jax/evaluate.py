"""Evaluates encoders: python -m cassle_jax.evaluate --run=WORKDIR --datasets=… --to=FOLDER."""

import contextlib
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from cassle_jax import command
from cassle_jax.checks import ConfigError, check_at_least, first_line
from cassle_jax.data import DataError, Source
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.data.decode import MAX_PIXELS, allow_pixels
from cassle_jax.data.requested import check_datasets, datasets_in, open_datasets
from cassle_jax.distributed import agree, all_processes
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.extraction import Extraction
from cassle_jax.evaluation.feature_cache import CACHE_GIB
from cassle_jax.evaluation.findings import Failure, Finding
from cassle_jax.evaluation.plan import Planned, plan, warn_of_idle, warn_of_no_datasets
from cassle_jax.evaluation.protocols import (
    PROTOCOLS,
    all_settings,
    check_tasks,
    checked_settings,
    parsed_settings,
    protocols_with,
)
from cassle_jax.evaluation.store import FeatureStore
from cassle_jax.evaluation.subject import Subject
from cassle_jax.faults import Outage, retried
from cassle_jax.lock import folder_held
from cassle_jax.parallel import device_mesh, in_all_processes
from cassle_jax.report.growing_report import GrowingReport
from cassle_jax.storage import (
    cache_folder,
    check_writable,
    is_there,
    local_folder,
    on_object_store,
    path_of,
    written,
)
from cassle_jax.subjects import open_subject, other_settings

LOG = logging.getLogger("cassle_jax.evaluate")  # also where this is the main module


def evaluate_command(
    *,
    runs: Sequence[str],
    datasets: Sequence[str],
    to: str,
    tasks: Sequence[str] = (),
    data_dir: str = "",
    cache: str = "",
    cache_gib: float = CACHE_GIB,
    **settings: Any,
) -> Path:
    """Evaluates as the command does, and returns the path of the page.

    Everything is opened and checked before the first image is read. A protocol that cannot run on a
    dataset, or fails, is a red line on the page, and the others still run. The page grows as
    results come in. The same call continues where an earlier one ended, and retries failed
    protocols. Several processes share the images and gather the features. Each computes all results
    from them, and the first writes the page.

    Args:
      runs: workdirs of runs or files of weights, each as `path` or `name=path`; paths of the same
        name are seeds of one subject.
      datasets: names in `DATASETS`, `motifs`, `scenes`, `folder:<path>`, or `name=<path of its
        folder>`.
      to: folder of the report; its page says so if the evaluation ended early.
      tasks: names in `PROTOCOLS`; empty for the usual ones that suit each dataset.
      data_dir: data_dir of tensorflow-datasets.
      cache: folder that keeps features; empty for none.
      cache_gib: bound of that folder's size, GiB; the least recently read features go first.
      settings: settings by name, such as `limit` or `neighbours`; see `all_settings`.

    Raises:
      ConfigError, DataError: a setting cannot work, or, at the end, a protocol failed; in one line.
    """
    check_tasks(tasks)
    if not runs or not datasets:
        raise ConfigError("evaluate needs --run=WORKDIR and --datasets=…; see --help")
    kept_in = local_folder("cache", cache) if cache else None
    folder = local_folder("to", to)
    values = parsed_settings(settings)
    extraction, of_protocols = checked_settings(values)
    check_at_least("cache_gib", cache_gib, 0)
    mesh, limit = _mesh_for(extraction.batch), extraction.limit
    opened = open_datasets(datasets, data_dir)
    subjects = _open_subjects(runs, extraction)
    agree(_shared_facts(opened, subjects, tasks, values))
    planned = plan(opened, tasks, of_protocols, limit=limit, devices=mesh.size)
    warn_of_idle(values, planned)
    _warn_of_unmet(planned)
    stores = partial(
        FeatureStore,
        mesh=mesh,
        batch=extraction.batch,
        folder=kept_in,
        cache_gib=cache_gib,
        limit=limit,
    )
    with _held(folder):
        report = _begun_report(folder, opened, planned, extraction, subjects)
        page = _evaluate_all(subjects, planned, stores, report)
    if report.failures:
        raise DataError(_failure_line(report.failures, page))
    return page


def _evaluate_all(
    subjects: Mapping[str, Sequence[Subject]],
    planned: Sequence[Planned],
    stores: Callable[[Subject], FeatureStore],
    report: GrowingReport,
) -> Path:
    """Runs all protocols on all subjects, and writes the page even where that ends early."""
    complete = False
    try:
        for subject in chain.from_iterable(subjects.values()):
            report.begin(subject.name)
            store = stores(subject)
            for _, group in groupby(planned, key=lambda each: each.data.name):
                _evaluate(subject, list(group), store, report)
        complete = True
    finally:
        page = _written(report, complete=complete)
    if jax.process_index() == 0:
        LOG.info("the page is %s", page)
    return page


def _evaluate(
    subject: Subject, planned: Sequence[Planned], store: FeatureStore, report: GrowingReport
) -> None:
    """Runs protocols on a dataset, except those that an earlier call ran or the data rule out."""
    bench = Bench(subject, planned[0].data, store)
    identity = bench.identity()
    for each in planned:
        name, text = each.protocol.name, f"{each.protocol.name}{each.settings}{identity}"
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        kept = report.kept(key)
        if each.unmet:
            report.add([Failure(name, bench.data.name, each.unmet)])
        elif in_all_processes(kept is not None):
            LOG.info("%s of %s on %s: done before", name, subject.name, bench.data.name)
            report.add(kept, key)
        else:
            findings = _run(each, bench, report)
            failed = any(isinstance(finding, Failure) for finding in findings)
            report.add(findings, "" if failed else key)


def _warn_of_unmet(planned: Sequence[Planned]) -> None:
    """Logs why protocols cannot run; raises DataError where none can run on any dataset."""
    lines = [f"{each}: {each.unmet}" for each in planned if each.unmet]
    if len(lines) == len(planned):
        raise DataError("nothing can be evaluated; " + "; ".join(lines))
    for line in lines:
        LOG.warning("%s; the other tasks run", line)


def _held(folder: Path) -> contextlib.AbstractContextManager:
    """Holds the folder of the report in the first process: two at once would write one page."""
    check_writable("to", folder)
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    return folder_held(folder, setting="to", holder="evaluation")


def _begun_report(
    folder: Path,
    opened: Sequence[EvaluationData],
    planned: Sequence[Planned],
    extraction: Extraction,
    subjects: Mapping[str, Sequence[Subject]],
) -> GrowingReport:
    """The report in its folder, with what an earlier call left there."""
    chosen = {}
    for each in (*(each.settings for each in planned), extraction):
        chosen |= vars(each)
    values = ", ".join(f"{name} {value}" for name, value in chosen.items())
    report = GrowingReport(
        folder,
        f"{_summary(opened, extraction.limit)} Settings: {values}.",
        {name: _facts(runs) for name, runs in subjects.items()},
        seeds={name: seeds for name, runs in subjects.items() if (seeds := _seeds(runs))},
        writes=jax.process_index() == 0,
    )
    report.warn_of_replaced(
        {
            (name, each.data.name, each.protocol.name)
            for name in subjects
            for each in planned
            if not each.unmet
        }
    )
    return report


def _mesh_for(batch: int) -> Mesh:
    """All devices, which must be able to share a batch."""
    mesh = device_mesh()
    if batch % mesh.size:
        raise ConfigError(
            f"batch={batch} cannot be split over {mesh.size} devices; use a multiple of them"
        )
    return mesh


def _written(report: GrowingReport, *, complete: bool) -> Path:
    return written("to", report.folder, partial(report.write, complete=complete))


def _failure_line(failures: Sequence[tuple[str, Failure]], page: Path) -> str:
    name, first = failures[0]
    what = "1 task" if len(failures) == 1 else f"{len(failures)} tasks"
    why = f"{first.task} of {name} on {first.dataset}: {first.reason}"
    return f"{what} failed, the rest is in {page}; {why}"


def _shared_facts(
    opened: Sequence[EvaluationData],
    subjects: Mapping[str, Sequence[Subject]],
    tasks: Sequence[str],
    values: Mapping[str, Any],
) -> dict[str, object]:
    """Facts that must be equal in all processes."""
    return {
        "tasks": list(tasks),
        **values,
        "datasets": [data.name for data in opened],
        "the datasets' sizes": _summary(opened),
        "the weights": {name: [s.fingerprint() for s in seeds] for name, seeds in subjects.items()},
    }


def named_path(described: str) -> tuple[str, str]:
    """Name and path of `name=path`; the name is empty where the whole is an existing path."""
    name, separator, path = described.partition("=")
    if separator and on_object_store(path):
        return name, path
    if not separator or retried(described, lambda: is_there(path_of(described))):
        return "", described
    return name, path


def _open_subjects(runs: Sequence[str], extraction: Extraction) -> dict[str, list[Subject]]:
    subjects: dict[str, list[Subject]] = {}
    known: set[tuple[str, str]] = set()
    for described in runs:
        name, path = named_path(described)
        subject = open_subject(path, name=name, network=extraction.network)
        try:
            subject = subject.with_images(**extraction.prepared)
        except ValueError as error:
            raise ConfigError(f"{subject.name}: {str(error).removeprefix('augment.')}") from error
        if not name and subject.name in subjects:
            raise ConfigError(
                f"run={path} would be a seed of another run called {subject.name!r}; "
                "give each a name, as in --run=name=path (one name for seeds)"
            )
        seeds = subjects.setdefault(subject.name, [])
        weights = subject.name, subject.fingerprint()
        if weights in known:
            raise ConfigError(
                f"run={path} has the same weights as another run called {subject.name!r}, and "
                "would count twice in its mean; give each seed once"
            )
        if seeds and (other := other_settings(seeds[0], subject)):
            said = "%s: its mean is over runs of different settings: %s"
            LOG.warning(said, subject.name, "; ".join(other))
        seeds.append(subject)
        known.add(weights)
    return subjects


@contextlib.contextmanager
def _warnings_logged(of: str) -> Iterator[None]:
    """Logs what the libraries warn of; Python shows a warning once, and not of which subject."""
    with warnings.catch_warnings(record=True) as shown:
        try:
            yield
        finally:
            for each in shown:
                LOG.warning("%s: %s", of, each.message)


def _run(planned: Planned, bench: Bench, report: GrowingReport) -> list[Finding]:
    """The findings, or the failure; with several processes, some errors end them all."""
    name, start = planned.protocol.name, time.monotonic()
    try:
        with _warnings_logged(f"{name} of {bench.subject.name} on {bench.data.name}"):
            findings = planned.protocol.measure(bench, planned.settings)
        report.check(findings)
    except Outage:  # the tasks after it would each wait for the same storage
        raise
    except Exception as error:
        if jax.process_count() > 1 and (
            isinstance(error, DataError) or not isinstance(error, ValueError)
        ):
            raise
        stop = command.stop_of(error)
        if stop is None and not isinstance(error, ValueError):
            LOG.exception("%s of %s on %s", name, bench.subject.name, bench.data.name)
        reason = first_line(stop or error)
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


def _seeds(runs: Sequence[Subject]) -> list[int]:
    """The seeds of a subject's runs; empty where a file does not say how it was trained."""
    configs = [run.facts.get("config", {}) for run in runs]
    return [config["seed"] for config in configs] if all("seed" in c for c in configs) else []


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


def define_flags(into: flags.FlagValues) -> None:
    """Defines the command's flags: its own, and one for each of `all_settings`."""
    string = partial(flags.DEFINE_string, flag_values=into)
    runs = "Workdir of a run or file of weights, as path or name=path; may be repeated."
    flags.DEFINE_multi_string("run", [], runs, flag_values=into)
    string(
        "datasets",
        "",
        "Names in the table, motifs, scenes, folder:<path>, or name=<path of its folder>.",
    )
    string("to", "runs/evaluation", "Folder of the report.")
    titles = ", ".join(f"{name} ({each.title})" for name, each in PROTOCOLS.items())
    tasks = f"Protocols to run; default: the usual ones. One or more of {titles}."
    flags.DEFINE_list("tasks", [], tasks, flag_values=into)
    string("data_dir", "", "data_dir of tensorflow-datasets.")
    string(
        "cache",
        None,
        "Folder that keeps features; empty for none. Default: $XDG_CACHE_HOME/cassle_jax/features, "
        "in ~/.cache where the variable is not set.",
    )
    gib = "Bound of the cache's size, GiB; the least recently read features go first."
    flags.DEFINE_float("cache_gib", CACHE_GIB, gib, lower_bound=0, flag_values=into)
    pixels = "Most pixels of an image; one with more counts as damaged."
    flags.DEFINE_integer("max_pixels", MAX_PIXELS, pixels, lower_bound=1, flag_values=into)
    for name, each in all_settings().items():
        users = ", ".join(protocols_with(name))
        string(name, each.text, f"{users}: {each.help}" if users else each.help)


def check_requested(
    datasets: Sequence[str], tasks: Sequence[str], options: Sequence[str], *, opens: bool
) -> None:
    """Refuses what the command would refuse, before there are runs to evaluate.

    Args:
      datasets: as `evaluate_command` takes them.
      tasks: as `evaluate_command` takes them.
      options: further options of the command, such as `--limit=1000`.
      opens: whether to open the datasets, which only the machine of the evaluation may have.

    Raises:
      ConfigError: a name is unknown, an option is not a further one, or its value cannot work.
      DataError: a dataset is missing, or nothing can be evaluated on it.
    """
    values = flags.FlagValues()
    define_flags(values)
    try:
        rest = values(["evaluate", *options])[1:]
        command.check_given_once(values)
    except (flags.Error, ConfigError) as error:
        raise ConfigError(f"evaluation: {error}") from error
    if rest:
        raise ConfigError(f"evaluation: {rest[0]!r} is not an option; options begin with --")
    beside = ", or give it without --evaluation"
    for name, hint in {"run": "", "to": "", "datasets": beside, "tasks": beside}.items():
        if values[name].present:
            raise ConfigError(f"evaluation: --{name} is not a further option; leave it out{hint}")
    check_tasks(tasks)
    check_datasets(datasets)
    settings = _settings_in(values)
    extraction, of_protocols = checked_settings(settings)
    if not datasets:
        warn_of_no_datasets(tasks=tasks, evaluation=options)
    elif opens:
        opened = open_datasets(datasets, values.data_dir)
        planned = plan(opened, tasks, of_protocols, limit=extraction.limit)
        warn_of_idle(settings, planned)
        _warn_of_unmet(planned)


def _settings_in(values: flags.FlagValues) -> dict[str, Any]:
    return parsed_settings({name: values[name].value for name in all_settings()})


def _main() -> None:
    """Evaluates as the flags say, together with the other processes where there are any."""
    values = flags.FLAGS
    with all_processes():
        allow_pixels(values.max_pixels)
        evaluate_command(
            runs=values.run,
            datasets=datasets_in(values.datasets),
            to=values.to,
            tasks=values.tasks,
            data_dir=values.data_dir,
            cache=str(cache_folder() / "features") if values.cache is None else values.cache,
            cache_gib=values.cache_gib,
            **_settings_in(values),
        )


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    command.run(_main)
