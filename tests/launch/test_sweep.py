"""A sweep: which runs it has, what it refuses, what it runs again, and how it ends."""

import contextlib
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_NOT_SAVED, EXIT_OUTAGE, EXIT_PREEMPTED, Stop
from cassle_jax.evaluation.findings import Score
from cassle_jax.faults import Outage
from cassle_jax.models import ENCODERS
from cassle_jax.report.files import read_report, write_report
from cassle_jax.sweep import jobs
from cassle_jax.sweep import sweep as sweep_module
from cassle_jax.sweep.jobs import OUTCOME, Command, Local, Slurm, outcome_of
from cassle_jax.sweep.page import write_page
from cassle_jax.sweep.restarts import pause_before_restart
from cassle_jax.sweep.space import SweepRequest, runs_of
from cassle_jax.sweep.sweep import EvaluationOptions
from cassle_jax.training.saved_config import write_config
from tests.commands import run_command
from tests.tiny import TinyEncoder, on_one_device

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.py")
TINY = "tests/launch/tiny_run.py"


def values(**options):
    return [run.values for run in runs_of(SweepRequest(CONFIG, **options))]


def test_a_grid_has_all_combinations():
    assert values(grid="seed=0,1,2;conditioning=none,cassle") == [
        {"seed": seed, "conditioning": conditioning}
        for seed in "012"
        for conditioning in ("none", "cassle")
    ]


def test_zipped_values_stay_together_and_multiply_with_the_grid():
    assert values(grid="seed=0,1", zipped="epochs=1,2;method=simclr,byol") == [
        {"epochs": epochs, "method": method, "seed": seed}
        for epochs, method in (("1", "simclr"), ("2", "byol"))
        for seed in "01"
    ]


def test_draws_lie_in_their_range_and_do_not_depend_on_their_number():
    random = (
        "optimizer.base_learning_rate=log(1e-3,1e-1);batch_size=uniform(8,10);method=byol,simclr"
    )
    drawn = values(random=random, draws=40)
    assert drawn[:10] == values(random=random, draws=10)
    assert drawn != values(random=random, draws=40, draw_seed=1)
    rates = [float(each["optimizer.base_learning_rate"]) for each in drawn]
    assert min(rates) >= 1e-3 and max(rates) <= 1e-1
    assert 10 <= sum(rate < 1e-2 for rate in rates) <= 30  # half, where they are log-uniform
    assert {each["batch_size"] for each in drawn} == {"8", "9", "10"}
    assert {each["method"] for each in drawn} == {"byol", "simclr"}


def test_values_reach_the_configuration_whatever_their_type():
    (run,) = runs_of(
        SweepRequest(
            f"{CONFIG}:method=simclr",
            ("--config.epochs=7",),
            grid="augment.crop_area=(0.2,1.0);deterministic=True;augself=main;seed=3",
        )
    )
    assert run.config.augment.crop_area == (0.2, 1.0)
    assert (run.config.deterministic, run.config.seed, run.config.epochs) == (True, 3, 7)
    assert (run.config.method.name, run.config.augself.crop) == ("simclr", 0.5)


def test_seeds_share_a_subject_and_every_run_has_a_folder_of_its_own():
    runs = runs_of(
        SweepRequest(CONFIG, grid="seed=0,1;weights.path=/a/b,/a_b;optimizer.momentum=0.5")
    )
    assert len({run.name for run in runs}) == 4
    assert not any("/" in run.name for run in runs)
    assert {run.subject for run in runs} == {
        "path /a/b, momentum 0.5",
        "path /a_b, momentum 0.5",
    }


def test_quotes_keep_the_commas_of_a_value_and_are_no_part_of_it():
    grid = """data.path='/a,b;c',"/it's",/d=e;conditioning.descriptors=('crop','blur')"""
    runs = runs_of(SweepRequest(CONFIG, grid=grid))
    assert [run.config.data.path for run in runs] == ["/a,b;c", "/it's", "/d=e"]
    assert {run.config.conditioning.descriptors for run in runs} == {("crop", "blur")}


def test_names_are_as_long_as_distinction_needs():
    (run,) = runs_of(SweepRequest(CONFIG, grid="data.path=/x;weights.path=/y"))
    assert run.subject == "data.path /x, weights.path /y"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "sed=0,1"}, r"^sed is not a setting .* did you mean seed\?$"),
        ({"grid": "condition=none"}, r"did you mean conditioning\?$"),
        ({"grid": "weight_decay=0"}, r"did you mean optimizer\.weight_decay\?$"),
        (
            {"grid": "method=simclr,byoll"},
            r"^run method=byoll: method='byoll' .* did you mean 'byol'\?$",
        ),
        (
            {"grid": "method=moco_v2,simclr;method.queue_size=4096"},
            r"^run method=simclr, method\.queue_size=4096: method\.queue_size is not a se",
        ),
        (
            {"grid": "conditioning=none,solarize"},
            r"^run conditioning=solarize: augment\.solarize=0 never draws what conditioning\.desc",
        ),
        (
            {"grid": "seed=0;log.to=('wandbb',)"},
            r"^run .*: log\.to='wandbb' is unknown; use one",
        ),
        (
            {"grid": "optimizer.settings.nestrov=False,True"},
            r"^run .*: optimizer\.settings\.nestrov=False is not an argument of adamw; use b1, b2",
        ),
        (
            {"grid": "steps=0;epochs=4,400;optimizer.warmup_epochs=10"},
            r"^run steps=0, epochs=4, .*warmup_epochs=10\.0 does not end within the run's 4 epochs",
        ),
        ({"grid": "weights.networks=head"}, r"^run .*: weights\.networks='head' is unknown; use"),
        ({"grid": "seed=0,x"}, r"^run seed=x: .*config\.seed=x"),
        ({"grid": "seed=0,0"}, "same one twice"),
        ({"grid": "seed=0,-1;epochs=1,2"}, "^run seed=-1, epochs=1: seed=-1 is not a seed"),
        ({"grid": "seed=0,,1"}, "empty value"),
        ({"grid": "seed"}, "is not name=value"),
        ({"grid": "augment.crop_area=(0.1,1"}, r"^grid: .* does not close its \)"),
        ({"grid": "seed=0", "zipped": "seed=1"}, "seed is given values twice"),
        ({"grid": "seed=0;seed=1"}, "^grid: seed is given values twice"),
        ({"zipped": "seed=0,1;epochs=1,2,3"}, "seed has 2, epochs has 3"),
        ({"random": "seed=0,1"}, "draws=0 does not go with"),
        ({"random": "epochs=uniform(3,1)", "draws": 2}, r"epochs=uniform\(3,1\) is not a range"),
        ({"random": "optimizer.momentum=log(0,1)", "draws": 2}, "is not a range"),
        (
            {"random": "epochs=uniform(few,9)", "draws": 2},
            r"epochs=uniform\(few,9\) is not a range",
        ),
        (
            {"random": "method=byol;optimizer.momentum=uniform(-3,-1.5)", "draws": 2},
            r"^run method=byol, optimizer\.momentum=(-[123]\.\d+): optimizer\.momentum=\1 is not",
        ),
        (
            {"random": "epochs=uniform(1.25,1.75)", "draws": 2},
            r"^run epochs=1\.\d+: .*config\.epochs=1\.",
        ),
        ({"random": "epochs=uniform(1,9)", "draws": 2**40}, r"^draws=\d+ .* use at most 1024$"),
        ({"random": f"epochs=uniform(1,{2**70})", "draws": 2}, "[Oo]ut of range|epochs="),
        ({}, "needs --grid, --zip or --random"),
    ],
)
def test_an_invalid_request_is_refused_in_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as refused:
        runs_of(SweepRequest(CONFIG, **options))
    assert "\n" not in str(refused.value)


def test_a_missing_cluster_and_indivisible_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match="parallel=2 cannot share the 3 GPUs"):
        Local(tmp_path, 2)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="where=slurm needs sbatch"):
        Slurm(tmp_path, 1, "")


@pytest.mark.parametrize(
    ("parallel", "options", "message"),
    [
        (0, "", r"^parallel=0 must be at least 1$"),
        (1, "partition", r"^slurm=partition: 'partition' is not name=value$"),
        (
            1,
            "partition=long,gpus=8,nonsense=1",
            r"^slurm=partition=long,gpus=8,nonsense=1: .*nonsense",
        ),
    ],
)
def test_options_of_slurm_that_cannot_be_are_refused(
    tmp_path, monkeypatch, parallel, options, message
):
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        program(tmp_path, monkeypatch, name, "true")
    with pytest.raises(ConfigError, match=message) as refused:
        Slurm(tmp_path / "jobs", parallel, options)
    assert "\n" not in str(refused.value)
    Slurm(tmp_path / "jobs", 1, "partition=long, time=60,gpus_per_node=8")


@pytest.mark.parametrize(("body", "found"), [("echo 0; echo 1", ["0", "1"]), ("exit 9", [])])
def test_gpus_are_those_that_the_driver_lists(tmp_path, monkeypatch, body, found):
    program(tmp_path, monkeypatch, "nvidia-smi", body)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert jobs.visible_gpus() == found
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert jobs.visible_gpus() == []


def interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_reaches_the_jobs(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    local, command = Local(tmp_path / "jobs", 1), Command("nothing", [], tmp_path)
    job = Waiting("1")
    job.cancel = lambda: sent.append("job")
    monkeypatch.setattr(local._executor, "submit", lambda _: job)
    with monkeypatch.context() as patch:
        patch.setattr(jobs.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            local.run([command], lambda _: None)
    assert sent == ["job"]


@pytest.mark.parametrize("early", [False, True])
def test_ctrl_c_that_comes_twice_reaches_the_command_once(tmp_path, monkeypatch, early):
    """At a terminal it comes from there and from submitit, at any moment."""
    sent, command = [], Command("nothing", [], tmp_path)

    def send_signal(number):
        signal.raise_signal(signal.SIGINT)
        sent.append(number)

    def start(*_, **__):
        if early:
            signal.raise_signal(signal.SIGINT)
        return SimpleNamespace(send_signal=send_signal, poll=lambda: 75, returncode=75)

    def wait():
        signal.raise_signal(signal.SIGINT)
        return 75

    monkeypatch.setattr(jobs.subprocess, "Popen", start)
    monkeypatch.setattr(command, "_wait", wait)
    with (tmp_path / "lock").open("w") as file, pytest.raises(KeyboardInterrupt):
        command._run(file, file)
    assert sent == [signal.SIGINT]


def test_a_second_ctrl_c_ends_a_command_that_does_not_save(tmp_path, monkeypatch):
    sent, command, before = [], Command("nothing", [], tmp_path), signal.getsignal(signal.SIGINT)
    started = SimpleNamespace(send_signal=sent.append, returncode=75)
    monkeypatch.setattr(jobs, "_SAME_CTRL_C_SECONDS", -1.0)
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda *_, **__: started)
    monkeypatch.setattr(
        command, "_wait", lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    )
    with (tmp_path / "lock").open("w") as file, pytest.raises(KeyboardInterrupt):
        command._run(file, file)
    assert sent == [signal.SIGINT] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_the_tracebacks_of_submitits_own_processes_go_to_a_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    local = Local(tmp_path / "jobs", 1)

    def submit(_):
        subprocess.run(["/bin/sh", "-c", "echo KeyboardInterrupt >&2"], check=True)
        return Done("1")

    monkeypatch.setattr(local._executor, "submit", submit)
    local.run([Command("a", [], tmp_path)], lambda _: None)
    assert capfd.readouterr().err == ""
    assert (tmp_path / "jobs" / "submitit.log").read_text() == "KeyboardInterrupt\n"
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"


def test_a_closed_terminal_leaves_the_processes_that_stop_a_command(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    local = Local(tmp_path / "jobs", 1)

    def submit(_):  # the kernel sends the signal to all processes of the terminal
        subprocess.run(["/bin/sh", "-c", "kill -HUP $$"], check=True)
        return Done("1")

    monkeypatch.setattr(local._executor, "submit", submit)
    local.run([Command("a", [], tmp_path)], lambda _: None)
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_error_makes_the_other_commands_save_and_end(tmp_path, monkeypatch):
    cancelled, jobs_of = [], {"a": Waiting("1"), "b": Done("2")}
    jobs_of["a"].cancel = lambda: cancelled.append("a")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    local = Local(tmp_path / "jobs", 2)
    monkeypatch.setattr(local._executor, "submit", lambda command: jobs_of[command.module])

    def on_end(command):
        raise Outage(f"{command.module} ended, and runs.jsonl cannot be written")

    with pytest.raises(Outage, match="b ended"):
        local.run([Command(name, [], tmp_path) for name in jobs_of], on_end)
    assert cancelled == ["a"]


@pytest.mark.parametrize("where", ["local", "slurm"])
def test_submitting_waits_for_room(tmp_path, monkeypatch, where):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("sbatch", "srun", "scontrol", "squeue"):
        program(tmp_path, monkeypatch, name, "true")
    folder, tries, ended = tmp_path / "jobs", [], []
    cluster = Local(folder, 1) if where == "local" else Slurm(folder, 1, "")
    monkeypatch.setattr(cluster._executor, "batch", contextlib.nullcontext)

    def submit(command):
        tries.append(command)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "1.pkl"))
        return Done("1")

    monkeypatch.setattr(cluster._executor, "submit", submit)
    cluster.run([command := Command("a", [], tmp_path)], ended.append)
    assert (tries, ended) == ([command] * 3, [command])


def test_what_sbatch_refuses_is_one_line_and_a_busy_controller_is_waited_for(
    tmp_path, monkeypatch, caplog
):
    for name in ("srun", "scontrol", "squeue"):
        program(tmp_path, monkeypatch, name, "true")
    busy = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    refused = "sbatch: error: Batch job submission failed: Invalid partition name specified"
    program(
        tmp_path,
        monkeypatch,
        "sbatch",
        f"""[ -e {tmp_path}/tried ] && said="{refused}" || said="{busy}"
touch {tmp_path}/tried; echo "sbatch: error: see the log
$said" >&2; exit 1""",
    )
    cluster = Slurm(tmp_path / "jobs", 1, "partition=long")
    with pytest.raises(ConfigError, match=f"^slurm=partition=long: {refused}$"):
        cluster.run([Command("a", [], tmp_path)], lambda _: None)
    assert f"{busy}; it is tried again" in caplog.text


def test_a_sweep_that_ctrl_c_stops_says_how_it_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(Local, "run", interrupt)
    with pytest.raises(Stop, match="stopped; rerun the same sweep to resume") as stop:
        sweep_module.sweep(SweepRequest(CONFIG, grid="seed=0"), tmp_path)
    assert stop.value.code == EXIT_PREEMPTED


def test_an_evaluation_that_failed_ends_the_sweep_with_its_reason(tmp_path, monkeypatch):
    def failing(self, commands, on_end):
        (command,) = commands
        jobs.write_outcome(command.folder, EXIT_NOT_SAVED, "error: the disk is full")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(Local, "run", failing)
    (run,), folder = runs_of(SweepRequest(CONFIG, grid="seed=0")), tmp_path / "run"
    folder.mkdir()
    jobs.write_outcome(folder, 0, "")
    options, local = EvaluationOptions(("scenes",), ("knn",)), Local(tmp_path / "jobs", 1)
    said = r"^the evaluation failed: the disk is full \(see "
    with pytest.raises(Stop, match=said) as stop:
        sweep_module._evaluate(options, {run: folder}, tmp_path / "evaluation", local)
    assert stop.value.code == EXIT_NOT_SAVED


def test_the_signal_of_a_time_limit_stops_the_command_and_submits_its_job_again(tmp_path):
    sent, command = [], Command("nothing", ["--x"], tmp_path)
    command._process = SimpleNamespace(send_signal=sent.append, poll=lambda: 75, returncode=75)
    again = command.checkpoint()
    assert sent == [signal.SIGINT] and again.function is command
    assert pickle.loads(pickle.dumps(command)).arguments == ("--x",)  # it holds no process


@pytest.mark.exhaustive
def test_a_command_resumes_after_the_signal_of_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "run"
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=1, signal_delay_s=45)  # it comes after 15 seconds
    job = executor.submit(Command("tests.launch.saves_once", [str(folder)], folder))
    wait_for(folder / OUTCOME)
    assert (folder / "saved").exists()
    assert outcome_of(folder) == {"exit_code": 0, "last_line": ""}
    assert job.result() == 0


@pytest.fixture
def on_slurm(tmp_path, monkeypatch):
    """A SLURM job whose command saves and ends with 75, as after a signal."""
    program(tmp_path, monkeypatch, "scontrol", f'echo "$@" >>{tmp_path}/calls')
    job = SimpleNamespace(cluster="slurm", global_rank=0)
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: job)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return job, Command("tests.launch.saves_once", [str(tmp_path), "75"], tmp_path)


def program(folder, monkeypatch, name, body):
    """Puts a shell script on the PATH."""
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("rank", "state", "expected"),
    [
        (0, "RUNNING", "requeue 7\n"),
        (0, "COMPLETING", ""),  # cancelled, or requeued by SLURM
        (1, "RUNNING", ""),
    ],
)
def test_slurm_requeues_a_run_that_saved(on_slurm, tmp_path, monkeypatch, rank, state, expected):
    job, command = on_slurm
    job.global_rank = rank
    calls = tmp_path / "calls"
    calls.touch()
    program(tmp_path, monkeypatch, "squeue", f'[ "$2" = --jobs=7 ] && echo {state}')
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 75 and outcome_of(tmp_path) is None
    assert calls.read_text() == expected


def test_a_damaged_outcome_counts_as_missing(tmp_path):
    assert outcome_of(tmp_path) is None
    for damaged in (b"", b'{"exit_code": ', b"\0\0"):
        (tmp_path / OUTCOME).write_bytes(damaged)
        assert outcome_of(tmp_path) is None


def test_a_run_without_progress_is_not_restarted_forever(on_slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "99")
    assert on_slurm[1]() == 75
    assert outcome_of(tmp_path)["exit_code"] == 75 and not (tmp_path / "calls").exists()


def test_an_outage_is_followed_by_longer_and_longer_pauses_and_then_by_an_end(monkeypatch):
    monkeypatch.setenv("CASSLE_RESTART_SECONDS", "10")
    pauses = [pause_before_restart(EXIT_OUTAGE, starts) for starts in range(1, 21)]
    assert pauses[:6] == [10, 20, 40, 80, 160, 300] and pauses[18:] == [300, None]
    assert pause_before_restart(EXIT_PREEMPTED, 99) == 0
    for code in (0, 1, 2, 3, EXIT_NOT_SAVED):
        assert pause_before_restart(code, 1) is None


@pytest.mark.parametrize("code", [EXIT_OUTAGE, EXIT_PREEMPTED])
def test_a_local_job_restarts_a_bounded_number_of_times(tmp_path, monkeypatch, code):
    pauses = []
    monkeypatch.setattr(
        submitit, "JobEnvironment", lambda: SimpleNamespace(cluster="local", global_rank=0)
    )
    monkeypatch.setattr(jobs.time, "sleep", pauses.append)
    command = Command("nothing", [], tmp_path)
    monkeypatch.setattr(command, "_run", lambda lock, log: code)
    assert command() == code and outcome_of(tmp_path)["exit_code"] == code
    assert len(pauses) == (19 if code == EXIT_OUTAGE else 99)
    assert sum(pauses) == (4510 if code == EXIT_OUTAGE else 0)


class Waiting(submitit.Job):
    """A job that leaves no result."""

    job_id = ""

    def __init__(self, job_id):
        self.job_id = job_id

    def __del__(self):
        pass

    def done(self):
        return False


def test_jobs_unknown_to_slurm_in_two_checks_have_ended(tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        program(folder, monkeypatch, name, "true")
    # Job 8_1 is missing once, 8_2 from the second check on; a failed check does not count.
    program(
        folder,
        monkeypatch,
        "squeue",
        f"""echo >>{tmp_path}/looks; looks=$(wc -l <{tmp_path}/looks)
[ $looks = 4 ] && exit 1
echo 8_0
[ $looks = 1 ] || [ $looks -ge 6 ] || echo 8_1
[ $looks = 1 ] && echo 8_2
[ $looks -lt 9 ] || exit 1""",
    )
    monkeypatch.setattr(jobs, "_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.0)
    cluster = Slurm(tmp_path / "jobs", 2, "")
    waiting = iter([Waiting("8_0"), Waiting("8_1"), Waiting("8_2")])
    monkeypatch.setattr(cluster._executor, "batch", contextlib.nullcontext)
    monkeypatch.setattr(cluster._executor, "submit", lambda command: next(waiting))
    commands, ended = [Command(name, [], tmp_path) for name in "abc"], []

    def note(command):
        ended.append((command, len((tmp_path / "looks").read_text().splitlines())))
        if len(ended) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster.run(commands, note)
    assert ended == [(commands[2], 3), (commands[1], 7)]


def wait_for(path, seconds=600):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} is missing"
        time.sleep(0.1)


def sweep(folder, *arguments, command=("-m", "cassle_jax.sweep"), cwd=ROOT):
    return subprocess.run(
        [sys.executable, *command, f"--config={TINY}", f"--to={folder}", *arguments],
        cwd=cwd,
        env=on_one_device(os.environ),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def lines(folder):
    return {
        line["run"]: line
        for line in map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
    }


class Done(Waiting):
    """A job that has ended when it is submitted."""

    def done(self):
        return True


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep of two seeds by two variants, all in this process."""

    def run_here(self, lock, log):
        return run_command(self.module.removeprefix("cassle_jax."), *self.arguments)

    def submit_here(self, command):
        assert command() == 0
        return Done(command.folder.name)

    folder, grid = tmp_path_factory.mktemp("sweep"), "seed=0,1;conditioning=none,cassle"
    environment = SimpleNamespace(cluster="local", global_rank=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setitem(ENCODERS, "tiny", TinyEncoder)  # which the configuration file sets for good
        patch.setattr(Command, "_run", run_here)
        patch.setattr(submitit, "JobEnvironment", lambda: environment)
        patch.setattr(submitit.LocalExecutor, "submit", submit_here)
        patch.setattr(jobs, "_POLL_SECONDS", 0.0)
        sweep_module.sweep(SweepRequest(TINY, grid=grid), folder)
    return folder, f"--grid={grid}"


@pytest.mark.exhaustive
def test_a_sweep_writes_one_line_per_run(swept):
    folder, _ = swept
    found = lines(folder)
    assert len(found) == 4
    for name, line in found.items():
        assert (line["state"], line["result"]["steps"]) == ("finished", 3)
        assert line["config"]["seed"] == int(line["values"]["seed"])
        assert bool(line["config"]["conditioning.descriptors"]) == (
            line["values"]["conditioning"] == "cassle"
        )
        assert (folder / "runs" / name / "checkpoints" / "3").is_dir()


def test_the_page_merges_seeds(swept):
    folder, _ = swept
    subjects, _ = read_report(folder / "report.json")
    assert {name: len(runs) for name, runs in subjects.items()} == {
        "conditioning none": 2,
        "conditioning cassle": 2,
    }
    expected = lines(folder)["seed=1,conditioning=cassle"]["result"]["loss"]
    scores = [each for each in subjects["conditioning cassle"][1] if hasattr(each, "metric")]
    assert [each.value for each in scores if each.metric == "loss"] == [expected]
    assert "±" in (folder / "report.html").read_text()


def test_the_page_has_every_run_beside_its_evaluation(tmp_path):
    runs = runs_of(SweepRequest(CONFIG, grid="seed=0,1"))
    workdirs = {run: tmp_path / run.name for run in runs}
    scores = [[Score("knn", "motifs", "accuracy", value)] for value in (0.25, 0.75)]
    write_report(tmp_path / "evaluated", {runs[0].subject: scores}, provenance={})
    for loss, (run, workdir) in enumerate(workdirs.items()):
        workdir.mkdir()
        write_config(run.config, workdir)
        (workdir / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": float(loss)}))
    write_page(tmp_path, workdirs, tmp_path / "evaluated")
    subjects, _ = read_report(tmp_path / "report.json")
    found = [
        [each.value for each in run if isinstance(each, Score)] for run in subjects[runs[0].subject]
    ]
    assert found == [[0.0, 0.25], [1.0, 0.75]]


@pytest.mark.exhaustive
def test_a_repeated_sweep_runs_only_what_failed(swept):
    folder, grid = swept
    starts = {path: path.stat().st_mtime for path in folder.glob("runs/*/" + OUTCOME)}
    spoilt = folder / "runs" / "seed=1,conditioning=none" / OUTCOME
    spoilt.write_text(json.dumps({"exit_code": 1, "last_line": "killed"}))
    ended = sweep(folder, grid)
    assert ended.returncode == 0, ended.stderr
    assert "4 runs, 3 of them finished" in ended.stderr
    changed = [path for path, time in starts.items() if path.stat().st_mtime != time]
    assert changed == [spoilt] and outcome_of(spoilt.parent)["exit_code"] == 0


def sweep_here(folder, *arguments):
    """The exit code of the command, in this process; `--to` may replace the folder."""
    to = () if any(each.startswith("--to=") for each in arguments) else (f"--to={folder}",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "tiny", TinyEncoder)  # which the configuration file sets for good
        return run_command("sweep", f"--config={TINY}", *to, *arguments)


def test_a_dry_run_lists_the_runs_and_writes_nothing(swept, tmp_path, capsys):
    folder, grid = swept
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert sweep_here(folder, grid.replace("0,1", "1,2"), "--dry_run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "seed=1,conditioning=none: finished",
        "seed=1,conditioning=cassle: finished",
        "seed=2,conditioning=none: missing",
        "seed=2,conditioning=cassle: missing",
        "4 runs, 2 of them finished",
    ]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert sweep_here(tmp_path / "none", "--grid=seed=0", "--dry_run") == 0
    assert not (tmp_path / "none").exists()


def test_a_sweep_in_the_background_of_a_script_can_stop_its_jobs(tmp_path, monkeypatch):
    handlers = []

    def note(*_, **__):
        handlers.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(sweep_module, "sweep", note)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's shell leaves it
    try:
        sweep_here(tmp_path, "--grid=seed=0")
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.default_int_handler]


def test_every_spelling_of_a_setting_reaches_the_runs(tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr(sweep_module, "sweep", lambda request, *_, **__: requests.append(request))
    spelled = ("--config.deterministic", "--noconfig.augment.crop", "-config.data.path", "/a=b")
    assert sweep_here(tmp_path, *spelled, "--grid=seed=0") == 0
    (run,) = runs_of(requests[0])
    assert (run.config.deterministic, run.config.augment.crop) == (True, False)
    assert run.config.data.path == "/a=b"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--datasets=folder:/none", "dataset 'folder:/none': path='/none' is not a folder"),
        ("--evaluation=--run=other", "evaluation: --run is not a further option; leave it out\n"),
        ("--evaluation=--to=/tmp", "evaluation: --to is not a further option; leave it out\n"),
        ("--evaluation=--datasets=motifs", "evaluation: --datasets is not a further option; leave"),
        ("--evaluation=--tasks=", "evaluation: --tasks is not a further option; leave it out, or"),
        ("--to=gs:/bucket", "to=gs:/bucket has a scheme that is unknown"),
    ],
)
def test_what_would_fail_after_all_runs_is_refused_before_the_first(tmp_path, capsys, option, said):
    datasets = () if option.startswith("--datasets=") else ("--datasets=scenes",)
    assert sweep_here(tmp_path, "--grid=seed=0", *datasets, option) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert not list(tmp_path.iterdir())


def test_the_images_of_an_evaluation_elsewhere_need_not_be_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ("--datasets=folder:/none", "--where=slurm", "--slurm=partition=long")
    assert sweep_here(tmp_path / "to", "--grid=seed=0", *options) == 2
    assert "where=slurm needs sbatch" in capsys.readouterr().err


def test_options_of_slurm_without_slurm_are_reported(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Local, "run", interrupt)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(Stop):
        sweep_module.sweep(SweepRequest(CONFIG, grid="seed=0"), tmp_path, slurm="time=60")
    assert "slurm=time=60 has no effect with where=local" in caplog.text


@pytest.mark.parametrize(
    ("evaluation", "lines"),
    [
        (((), ("knn",), ("--limit=9",)), {"tasks=knn", "evaluation=--limit=9"}),
        ((("scenes",), ("knn",), ("--limit=9", "--episodes=3")), {"episodes=3"}),
    ],
)
def test_options_of_the_evaluation_without_effect_are_reported_before_the_first_run(
    tmp_path, caplog, monkeypatch, evaluation, lines
):
    monkeypatch.setattr(Local, "run", interrupt)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = EvaluationOptions(*evaluation)
    with pytest.raises(Stop):
        sweep_module.sweep(SweepRequest(CONFIG, grid="seed=0"), tmp_path, evaluation=options)
    idle = [each for each in caplog.messages if "has no effect" in each]
    assert {each.partition(" ")[0] for each in idle} == lines


def test_a_quote_without_its_end_is_reported_in_one_line(tmp_path, capsys):
    code = sweep_here(tmp_path / "none", "--grid=seed=0", "--evaluation=--limit='3")
    said = "error: evaluation=--limit='3 has a quote without its end\n"
    assert (code, capsys.readouterr().err) == (2, said)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [("5%an", (), "%a"), ("5%jn", (), "%j"), ("5%", ("--where=slurm", "--dry_run"), "%")],
)
def test_a_folder_that_submitit_would_rename_is_refused(tmp_path, capsys, name, options, part):
    assert sweep_here(tmp_path / name, "--grid=seed=0", *options) == 2
    said = f"error: to={tmp_path / name} has {part}, which submitit and SLURM replace by numbers"
    assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / name).exists()


def test_any_other_percent_sign_is_a_part_of_a_name(tmp_path, capsys):
    folder = tmp_path / "50%"
    assert sweep_here(folder, "--grid=seed=0", "--dry_run") == 0
    executor = submitit.LocalExecutor(folder / "jobs")
    executor.update_parameters(timeout_min=1)
    assert executor.submit(str.upper, "a").result() == "A"


@pytest.mark.parametrize("path", ["lost.safetensors", "https://host/weights.pth"])
def test_weights_that_are_not_there_are_refused_unless_a_run_has_taken_them(tmp_path, capsys, path):
    grid = f"--grid=seed=0;weights.path={path}"
    for option in ("--dry_run", "--nodry_run"):
        assert sweep_here(tmp_path / "new", grid, option) == 2
        assert f"error: weights.path='{path}' is not a local file" in capsys.readouterr().err
    assert not list((tmp_path / "new").glob("runs"))
    (run,) = runs_of(SweepRequest(TINY, grid=grid.removeprefix("--grid=")))
    workdir = tmp_path / "begun" / "runs" / run.name
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    (workdir / "config.json").touch()
    assert sweep_here(tmp_path / "begun", grid, "--dry_run") == 0


def test_a_typo_fails_before_anything_is_submitted(tmp_path, capsys):
    code = sweep_here(tmp_path / "none", "--grid=seed=0,1;conditionin=none")
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert said.err.count("\n") == 1 and "did you mean conditioning?" in said.err
    assert not (tmp_path / "none").exists()


@pytest.mark.exhaustive
def test_the_former_spelling_says_where_the_command_is(tmp_path):
    ended = sweep(
        tmp_path / "none", "--grid=sed=0", command=[ROOT / "launch" / "sweep.py"], cwd=tmp_path
    )
    note, mistake = ended.stderr.splitlines()
    assert ended.returncode == 2 and "did you mean seed?" in mistake
    assert note.endswith("python launch/sweep.py is now python -m cassle_jax.sweep")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ("knn", "lineer")}, r"^tasks='lineer' is unknown; .*did you mean 'linear'\?$"),
        ({"datasets": ("cifar",)}, r"^datasets='cifar' is unknown; "),
    ],
)
def test_a_misspelt_name_is_refused_before_anything_is_submitted(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        sweep_module.sweep(
            SweepRequest(CONFIG, grid="seed=0"), tmp_path, evaluation=EvaluationOptions(**wrong)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--neighbors=3", r"^evaluation: Unknown .*neighbors.*neighbours"),
        ("--neighbours=0", r"^neighbours=0 must be at least 1$"),
        ("--limit=many", r"^limit='many' is invalid; use a whole number$"),
        ("--cache_gib=much", r"^evaluation: .*cache_gib"),
        ("--cache_gib=-1", r"^evaluation: .*cache_gib=-1: .* non-negative"),
        ("--max_pixels=0", r"^evaluation: .*max_pixels=0: .* positive"),
        ("--limit=3 --limit=4", r"^evaluation: --limit is given 2 times; give it once$"),
        ("limit=3", r"^evaluation: 'limit=3' is not an option; options begin with --$"),
    ],
)
def test_options_of_the_evaluation_are_checked_before_anything_is_submitted(
    tmp_path, option, message
):
    evaluation = EvaluationOptions(("scenes",), ("knn",), tuple(option.split()))
    with pytest.raises(ConfigError, match=message) as refused:
        sweep_module.sweep(
            SweepRequest(CONFIG, grid="seed=0"), tmp_path / "none", evaluation=evaluation
        )
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "none").exists()


def test_a_finished_run_with_other_settings_is_refused(swept, capsys):
    folder, grid = swept
    assert sweep_here(folder, grid, "--config.steps=4") == 2
    assert "steps=4 was 3" in capsys.readouterr().err


def test_a_failed_run_is_reported_with_its_reason(tmp_path):
    ended = sweep(tmp_path, "--grid=batch_size=1024")  # more than there are images
    assert ended.returncode == 1
    assert "batch_size=1024" in ended.stderr and "log.txt" in ended.stderr
    (line,) = lines(tmp_path).values()
    assert (line["state"], line["result"]["exit_code"]) == ("failed", 2)
