r"""The paper's claim as one sweep: plain, AugSelf and CASSLE of each method, and how they transfer.

python -m cassle_jax.transfer --to=FOLDER --minutes=600 --data=/data/tiny_imagenet \
    --datasets=flowers17=/data/flowers17,cifar10=/data/cifar10,tiny_imagenet=/data/tiny_imagenet

One process runs one after the other, all variants of a seed before the next seed. What a call
leaves in the folder is enough for the next one to go on, also on another machine.
"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from cassle_jax import command
from cassle_jax.checks import check_at_least, check_positive
from cassle_jax.config import ConfigError
from cassle_jax.data import open_source
from cassle_jax.evaluate import evaluate_command
from cassle_jax.pretrain import pretrain_command
from cassle_jax.report.evaluation_page import JSON, read_report, write_report
from cassle_jax.storage import write_whole
from cassle_jax.sweep.space import Asked, runs_of
from cassle_jax.training.metrics import read_metrics

LOG = logging.getLogger("cassle_jax.transfer")  # its name as a command is __main__

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny_imagenet.py"
METHODS = ("simclr", "moco_v2", "barlow_twins")
VARIANTS = {
    "plain": "conditioning=none,augself=none",
    "AugSelf": "conditioning=none,augself=main",
    "CASSLE": "conditioning=cassle,augself=none",
}
DATASETS = ("flowers17", "cifar10", "tiny_imagenet")
TASKS = ("linear", "knn", "few_shot", "spectrum", "invariance", "matching")

PLAN, RESULT = "plan.json", "evaluation"
_MEASURED_STEPS = 20
_FEWEST_STEPS = 10
_SAVES = 10  # of a run
# Of a budget, what is not planned: machines that start anew, compile again and repeat a few steps.
_RESERVE = 0.1


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """One of the runs: a variant of a method, with a seed."""

    subject: str
    folder: str
    config: ConfigDict = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long the runs are, so that all of them end within the budget.

    Attributes:
      minutes: the budget.
      steps: of every run.
      epochs: the same, in passes over the images.
      seconds: by method, of a step as measured.
      overhead: seconds a run takes for compiling and for its evaluation, as measured.
    """

    minutes: float
    steps: int
    epochs: float
    seconds: dict[str, float]
    overhead: float


def transfer(
    to: Path,
    *,
    minutes: float,
    datasets: Sequence[str],
    data: str = "",
    call_minutes: float = 0.0,
    methods: Sequence[str] = METHODS,
    seeds: int = 3,
    tasks: Sequence[str] = TASKS,
    overrides: Sequence[str] = (),
    keep_weights: bool = True,
    limit: int = 0,
) -> Path:
    """Pretrains and evaluates what is missing, and writes the page of all that is there.

    Args:
      to: folder of everything; with what an earlier call left in it.
      minutes: for all runs, from which their number of steps follows when the folder is new; at
        most the configuration's epochs.
      datasets: to evaluate on, as `evaluate_command` takes them.
      data: folder of the images to pretrain on; "" for what `overrides` name.
      call_minutes: after which this call saves and ends; 0 for never.
      methods: names of methods.
      seeds: how many runs each variant has.
      tasks: of the evaluation.
      overrides: of all runs, as `--config.name=value` each.
      keep_weights: whether checkpoints stay when a run is evaluated.
      limit: of the images of each part in evaluation; 0 for all.

    Returns:
      The path of the page.

    Raises:
      ConfigError, DataError: what cannot work.
      Stop: the call's time is over (75, the same call goes on), or a run diverged (3).
    """
    check_positive(minutes=minutes)
    check_at_least(1, seeds=seeds)
    check_at_least(0, call_minutes=call_minutes)
    to = to.expanduser().resolve()
    path = f"--config.data.path={data}"
    overrides = (*overrides, f"--config.compilation_cache={to / 'compiled'}", *[path] * bool(data))
    runs = _runs(methods, seeds, overrides)
    images = len(open_source(runs[0].config.data, runs[0].config.data.train_split))

    def evaluate(run: Pretraining, workdir: Path) -> None:
        evaluate_command(
            runs=[f"{run.subject}={workdir}"],
            datasets=datasets,
            to=str(workdir / RESULT),
            tasks=tasks,
            limit=limit,
        )

    with _Deadline(call_minutes):
        plan = _read_plan(to, minutes) or _make_plan(to, minutes, runs, images, evaluate)
        LOG.info("%d runs of %d steps (%.3g epochs) each", len(runs), plan.steps, plan.epochs)
        for number, run in enumerate(runs, 1):
            workdir = to / "runs" / run.folder
            if not (workdir / RESULT / JSON).exists():
                LOG.info("run %d of %d: %s", number, len(runs), run.folder)
                pretrain_command(_planned(run.config, plan, images), workdir)
                evaluate(run, workdir)
                _write_page(to, runs[:number], plan)
            if not keep_weights:
                shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
        page = _write_page(to, runs, plan)
    LOG.info("the page is %s", page)
    return page


def _runs(methods: Sequence[str], seeds: int, overrides: Sequence[str]) -> list[Pretraining]:
    """All variants of the first seed, then of the next."""
    runs = []
    for seed in range(seeds):
        for method in methods:
            for variant, arguments in VARIANTS.items():
                asked = Asked(
                    f"{CONFIG}:method={method},{arguments}", tuple(overrides), grid=f"seed={seed}"
                )
                config = runs_of(asked)[0].config.copy_and_resolve_references()
                folder = f"{method}-{variant.lower()}-{seed}"
                runs.append(Pretraining(f"{method}, {variant}", folder, config))
    return runs


def _planned(config: ConfigDict, plan: Plan, images: int) -> ConfigDict:
    """A run's settings with its length, and a warm-up that fits into it."""
    config = ConfigDict(config)
    config.steps = plan.steps
    epochs = plan.steps / (images // config.batch_size)
    config.optimizer.warmup_epochs = min(float(config.optimizer.warmup_epochs), 0.1 * epochs)
    config.probe.every_epochs = 0
    config.checkpoint.keep = 1
    config.checkpoint.every_steps = max(1, plan.steps // _SAVES)
    config.log.every_steps = max(1, plan.steps // 50)
    return config.lock()


def _read_plan(to: Path, minutes: float) -> Plan | None:
    path = to / PLAN
    if not path.exists():
        return None
    plan = Plan(**json.loads(path.read_text()))
    if plan.minutes != minutes:
        raise ConfigError(
            f"minutes={minutes:g} was {plan.minutes:g} when {to} was begun, and its runs are as "
            "long as that gives them; use the same, or another folder"
        )
    return plan


def _make_plan(
    to: Path,
    minutes: float,
    runs: Sequence[Pretraining],
    images: int,
    evaluate: Callable[[Pretraining, Path], None],
) -> Plan:
    """Measures a step of every method, and one evaluation, and keeps what follows from them."""
    begun, seconds, overheads = time.perf_counter(), {}, []
    # AugSelf's step is the longest of a method.
    measured = {run.config.method.name: run for run in runs if run.subject.endswith("AugSelf")}
    for method, run in measured.items():
        LOG.info("measuring %s", method)
        workdir = to / "measured" / method
        shutil.rmtree(workdir, ignore_errors=True)
        plan = Plan(minutes, 2 * _MEASURED_STEPS, 0.0, {}, 0.0)
        config = _planned(run.config, plan, images).unlock()
        config.log.every_steps = _MEASURED_STEPS
        start = time.perf_counter()
        pretrain_command(config.lock(), workdir)
        rate = read_metrics(workdir)["images_per_second"][-1][1]
        seconds[method] = config.batch_size / rate
        overheads.append(time.perf_counter() - start - plan.steps * seconds[method])
    start = time.perf_counter()
    evaluate(run, workdir)
    overhead = max(0.0, *overheads) + time.perf_counter() - start
    shutil.rmtree(to / "measured")

    left = (1 - _RESERVE) * 60 * minutes - (time.perf_counter() - begun) - len(runs) * overhead
    a_step_of_all = sum(seconds[run.config.method.name] for run in runs)
    steps = int(left / a_step_of_all)
    if steps < _FEWEST_STEPS:
        needed = (60 * minutes - left + _FEWEST_STEPS * a_step_of_all) / 60 / (1 - _RESERVE)
        raise ConfigError(
            f"minutes={minutes:g} is too short for {len(runs)} runs, of which each takes "
            f"{overhead:.0f} s to compile and evaluate; use {needed:.0f} or more"
        )
    an_epoch = images // runs[0].config.batch_size
    steps = min(steps, runs[0].config.epochs * an_epoch)
    plan = Plan(minutes, steps, steps / an_epoch, seconds, overhead)
    write_whole(to / PLAN, json.dumps(dataclasses.asdict(plan), indent=2).encode())
    return plan


def _write_page(to: Path, runs: Sequence[Pretraining], plan: Plan) -> Path:
    """The page of the runs that are evaluated; the seeds of a subject are one column."""
    subjects, facts = {}, {}
    for run in runs:
        found, known = read_report(to / "runs" / run.folder / RESULT / JSON)
        subjects.setdefault(run.subject, []).extend(found[run.subject])
        facts |= known
    counts = sorted({len(seeds) for seeds in subjects.values()})
    summary = (
        f"Each run is pretrained for {plan.steps} steps ({plan.epochs:.3g} epochs); "
        f"{' to '.join(map(str, counts))} seeds of each. Means ± half their 95 % intervals."
    )
    return write_report(to, subjects, title="Transfer", summary=summary, provenance=facts)


class _Deadline:
    """Ends a call after some minutes, or at SIGTERM: a run in pretraining saves first."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes

    def __enter__(self) -> "_Deadline":
        # Pretraining takes SIGTERM while it steps, and saves; at any other time it ends the call.
        handlers = {signal.SIGALRM: self._over, signal.SIGTERM: self._end}
        self._previous = {each: signal.signal(each, handlers[each]) for each in handlers}
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        return self

    def __exit__(self, *_) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def _over(self, *_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, *_) -> None:
        raise command.Stop("the call ends here; the same one goes on", command.EXIT_PREEMPTED)


if __name__ == "__main__":
    to_flag = flags.DEFINE_string("to", "runs/transfer", "Folder of everything.")
    minutes_flag = flags.DEFINE_float("minutes", None, "For all runs together; sets their length.")
    call_flag = flags.DEFINE_float(
        "call_minutes", 0, "After which this call saves and ends; 0: when all is done."
    )
    data_flag = flags.DEFINE_string("data", None, "Folder of Tiny-ImageNet, to pretrain on.")
    datasets_flag = flags.DEFINE_list("datasets", list(DATASETS), "To evaluate on: name=folder.")
    tasks_flag = flags.DEFINE_list("tasks", list(TASKS), "Of the evaluation.")
    methods_flag = flags.DEFINE_list("methods", list(METHODS), "To compare.")
    seeds_flag = flags.DEFINE_integer("seeds", 3, "Runs of each variant.")
    set_flag = flags.DEFINE_multi_string("set", [], "Of all runs: name=value; repeatable.")
    weights_flag = flags.DEFINE_boolean("keep_weights", True, "Keep the checkpoints.")
    limit_flag = flags.DEFINE_integer("limit", 0, "Evaluate on so many images of each part.")
    flags.mark_flags_as_required(["minutes", "data"])
    command.run(
        lambda: transfer(
            Path(to_flag.value),
            minutes=minutes_flag.value,
            datasets=datasets_flag.value,
            data=data_flag.value,
            call_minutes=call_flag.value,
            methods=methods_flag.value,
            seeds=seeds_flag.value,
            tasks=tasks_flag.value,
            overrides=[f"--config.{each}" for each in set_flag.value],
            keep_weights=weights_flag.value,
            limit=limit_flag.value,
        )
    )
