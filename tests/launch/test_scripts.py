"""The launch scripts: what --dry-run prints, what is refused, and when they start a run again."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])
RUN = ["--config=configs/cifar10.py:method=simclr,conditioning=none", "--workdir=runs/it's here"]
POD = ["--name=pod", "--zone=us-west4-a"]


def run(script, *arguments, **settings):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    kept.pop("CUDA_VISIBLE_DEVICES", None)
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=ROOT,
        env=kept | settings,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def printed(script, *arguments, **settings):
    """The commands a dry run prints, as words; nothing may be said besides."""
    ended = run(script, *arguments, "--dry-run", **settings)
    assert (ended.returncode, ended.stderr) == (0, "")
    return shlex.split(ended.stdout, comments=True), ended.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_and_bash_find_nothing(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    for command in (["bash", "-n"], [shellcheck, "-x", "-P", str(ROOT)]):
        checked = subprocess.run(
            [*command, str(script)], capture_output=True, text=True, timeout=600
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_gpu_host_has_one_process_for_all_gpus():
    words, text = printed("gpu_host.sh", *RUN, JAX_PLATFORMS="")
    assert f"jax[cuda13]==VERSION {'python -P -m cassle_jax.pretrain'}" in " ".join(words)
    assert words.count("cassle_jax.pretrain") == 1 and RUN[1] in words
    assert "JAX_NUM_PROCESSES" not in text


def test_or_as_many_as_requested_each_with_its_share():
    words, _ = printed(
        "gpu_host.sh", *RUN, "--processes=2", JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES="4,5,6,7"
    )
    starts = [index for index, word in enumerate(words) if word == "cassle_jax.pretrain"]
    assert len(starts) == 2
    for number, (start, gpus) in enumerate(zip(starts, ("4,5", "6,7"), strict=True)):
        assert words[start - 7 : start] == [
            "JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT",
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={number}",
            f"CUDA_VISIBLE_DEVICES={gpus}",
            "python",
            "-P",
            "-m",
        ]


@pytest.mark.parametrize("own", ["", "glibc.malloc.check=0"])
def test_commands_get_large_pages_unless_the_user_has_tuned_glibc(tmp_path, own):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".cassle_jax_requirements")
    tuned = subprocess.run(
        ["bash", "-c", ". launch/environment.sh && printenv GLIBC_TUNABLES"],
        cwd=ROOT,
        env=os.environ | {"VIRTUAL_ENV": str(tmp_path), "GLIBC_TUNABLES": own},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert tuned[-1] == (own or "glibc.malloc.hugetlb=1")


def test_without_gpus_nothing_is_installed_for_them():
    _, text = printed("gpu_host.sh", *RUN, JAX_PLATFORMS="cpu")
    assert "pip" not in text


def test_a_slurm_job_starts_its_tasks_and_requeues_itself():
    words, _ = printed("slurm.sbatch", *RUN, JAX_PLATFORMS="cpu", SLURM_CPUS_PER_TASK="12")
    start = words.index("srun")
    assert words[start : start + 7] == [
        "srun",
        "--kill-on-bad-exit=0",
        "--cpus-per-task=12",
        "python",
        "-P",
        "-m",
        "cassle_jax.pretrain",
    ]
    assert words[-3:] == ["scontrol", "requeue", "JOB"]


@pytest.mark.parametrize("workdir", [RUN[1:2], RUN[1].split("=")])
def test_a_task_of_an_array_has_a_seed_and_a_workdir_of_its_own(workdir):
    run = [RUN[0], *workdir, *RUN[2:]]
    words, _ = printed("slurm.sbatch", *run, JAX_PLATFORMS="cpu", SLURM_ARRAY_TASK_ID="2")
    own = [f"{RUN[1]}/seed2", "--config.seed=2"]
    start = words.index("cassle_jax.pretrain") + 1  # a flag that is given twice is refused
    assert words[start : start + len(RUN) + 1] == [RUN[0], *RUN[2:], *own]


def test_a_pod_is_made_installed_run_and_followed_through_gcloud():
    words, text = printed("tpu_pod.sh", "all", *POD, "--type=v5litepod-16", "--spot", *RUN)
    made = "queued-resources create pod --zone=us-west4-a --node-id=pod"
    assert f"{made} --accelerator-type=v5litepod-16" in text
    assert "--runtime-version=v2-alpha-tpuv5-lite --spot" in text
    assert words.count("--worker=all") == 3  # copy, install, run
    commands = [word for word in words if word.startswith("--command=")]
    assert len(commands) == 3 and "tail" in commands[2]
    started = next(line for line in commands[1].splitlines() if "nohup" in line)
    assert [word for word in shlex.split(started) if word in RUN] == RUN


@pytest.mark.parametrize(
    ("verb", "says"), [("stop", "kill"), ("log", "tail"), ("delete", "--force")]
)
def test_the_other_verbs_of_a_pod(verb, says):
    _, text = printed("tpu_pod.sh", verb, *POD, "--project=mine")
    assert says in text and "--zone=us-west4-a --project=mine" in text


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gpu_host.sh", [], "--config is missing"),
        ("gpu_host.sh", RUN[:1], "--workdir is missing"),
        ("gpu_host.sh", [*RUN, "--processes=0"], "--processes=0 is not a number of processes"),
        ("gpu_host.sh", [*RUN, "--processes"], "--processes needs a value"),
        ("gpu_host.sh", [*RUN, "--restarts=-1"], "--restarts=-1 is not a number"),
        ("slurm.sbatch", RUN[:1], "--workdir is missing"),
        ("slurm.sbatch", RUN, "use sbatch launch/slurm.sbatch"),
        ("tpu_pod.sh", [], "'' is not a verb"),
        ("tpu_pod.sh", ["creat", *POD], "'creat' is not a verb"),
        ("tpu_pod.sh", ["create", *POD, "--dry-run"], "--type is missing"),
        ("tpu_pod.sh", ["create", *POD, "--type=v9-8", "--dry-run"], "--type=v9-8 has no known"),
        ("tpu_pod.sh", ["run", *POD, "--dry-run"], "--config is missing"),
        ("tpu_pod.sh", ["log", POD[0]], "--zone is missing"),
        ("tpu_pod.sh", ["log", *POD, "--follow"], "--follow is not an option of log"),
    ],
)
def test_wrong_arguments_end_with_one_line(script, arguments, message):
    ended = run(script, *arguments, JAX_PLATFORMS="cpu")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert message in ended.stderr


def test_gpus_that_cannot_be_shared_equally_are_refused():
    ended = run(
        "gpu_host.sh", *RUN, "--processes=2", JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES="0,1,2"
    )
    assert ended.returncode == 2 and "--processes=2 does not divide the 3 GPUs" in ended.stderr


def test_an_array_is_not_given_a_seed():
    ended = run("slurm.sbatch", *RUN, "--config.seed=1", "--dry-run", SLURM_ARRAY_TASK_ID="2")
    assert ended.returncode == 2 and "--config.seed cannot be given to an array" in ended.stderr


@pytest.fixture
def stub(tmp_path):
    """An environment whose pretraining command is a shell script, and what the scripts call."""
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", folder / ".cassle_jax_requirements")

    def make(body, **commands):
        for name, text in {"pretrain": body, **commands}.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        python = folder / "bin" / "python"
        python.write_text(
            f'#!/usr/bin/env bash\ncase "$*" in *cassle_jax.pretrain*)\n'
            f'echo start >>{tmp_path}/starts; exec {folder}/bin/pretrain "$@" ;; esac\n'
            f'exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        return {
            "VIRTUAL_ENV": str(folder),
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
            "CASSLE_RESTART_SECONDS": "0",
        }

    make.starts = lambda: (tmp_path / "starts").read_text().count("start")
    return make


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("codes", "starts", "ends_with"),
    [
        ([0], 1, 0),
        ([75, 1, 0], 3, 0),
        ([2], 1, 2),
        ([75, 3], 2, 3),
        ([1, 1, 1], 3, 1),
        ([137, 75, 75], 3, 75),
        ([69, 69, 0], 3, 0),
        ([74], 1, 74),
    ],
)
def test_a_gpu_host_starts_again_what_saved_or_crashed(stub, tmp_path, codes, starts, ends_with):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    body = f"code=$(head -n 1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes; exit $code"
    ended = run("gpu_host.sh", *RUN, "--restarts=2", **stub(body))
    assert (ended.returncode, stub.starts()) == (ends_with, starts), ended.stderr


def test_the_pause_before_a_restart_may_be_a_fraction_and_must_be_a_number(stub):
    """Bash counts in whole numbers: the script ended at the first outage."""
    environment = stub("exit 69") | {"CASSLE_RESTART_SECONDS": "0.01"}
    ended = run("gpu_host.sh", *RUN, "--restarts=2", **environment)
    assert (ended.returncode, stub.starts()) == (69, 3), ended.stderr
    assert "starting again in 0.02 s" in ended.stdout
    ended = run("gpu_host.sh", *RUN, JAX_PLATFORMS="cpu", CASSLE_RESTART_SECONDS="soon")
    assert (ended.returncode, ended.stdout) == (2, "")
    said = "error: CASSLE_RESTART_SECONDS='soon' is not a number of seconds; use 10"
    assert ended.stderr.strip() == said


def test_a_restart_after_an_outage_waits_and_a_signal_ends_the_wait(stub, tmp_path):
    environment = os.environ | stub("exit 69") | {"CASSLE_RESTART_SECONDS": "900"}
    process = subprocess.Popen(
        ["bash", "launch/gpu_host.sh", *RUN],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "starting again in 900 s" in line:
            process.send_signal(signal.SIGTERM)
    assert (process.wait(600), stub.starts()) == (69, 1)


def test_of_several_processes_the_worst_end_counts(stub):
    ended = run(
        "gpu_host.sh",
        *RUN,
        "--processes=2",
        "--restarts=0",
        **stub("[ $JAX_PROCESS_ID = 0 ] && exit 75; exit 3"),
    )
    assert (ended.returncode, stub.starts()) == (3, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_saves_and_ends_the_run(stub, tmp_path, number):
    body = f"trap 'kill $!; exit 75' TERM; sleep 900 & touch {tmp_path}/ready; wait"
    environment = os.environ | stub(body)
    process = subprocess.Popen(
        ["bash", "launch/gpu_host.sh", *RUN],
        cwd=ROOT,
        env=environment,
    )
    end = time.monotonic() + 600
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    assert (process.wait(600), stub.starts()) == (75, 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        *((each, "", True) for each in (75, 69, 137)),
        *((each, "", False) for each in (0, 2, 3, 74)),
        *((each, "19", True) for each in (69, 137)),
        *((each, "20", False) for each in (69, 137)),
        *((75, "98", True), (75, "99", False)),
    ],
)
def test_a_slurm_job_requeues_itself_where_the_same_command_continues(
    stub, tmp_path, code, restarts, requeued
):
    environment = stub(
        f"exit {code}",
        srun='shift; exec "$@"',
        scontrol=f'echo "$@" >{tmp_path}/asked',
    )
    ended = run("slurm.sbatch", *RUN, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts, **environment)
    assert (ended.returncode, stub.starts()) == (code, 1), ended.stderr
    given_up = f"restarted {restarts} times" in ended.stdout + ended.stderr
    assert given_up == bool(restarts and not requeued)
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("states", "verbs"),
    [
        (["ACTIVE"], ["describe", "describe"]),
        (["", "ACTIVE"], ["describe", "create", "describe"]),
        (["SUSPENDED", "ACTIVE"], ["describe", "delete", "create", "describe"]),
        (["FAILED", "FAILED"], ["describe", "delete", "create", "describe"]),
    ],
)
def test_a_pod_that_is_there_is_used_again(stub, tmp_path, states, verbs):
    states += states[-1:]
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    environment = stub(
        "",
        gcloud=f'echo "$4" >>{tmp_path}/verbs\n[ "$4" = describe ] || exit 0\n'
        f"head -n 1 {tmp_path}/states; sed -i 1d {tmp_path}/states",
    )
    ended = run("tpu_pod.sh", "create", *POD, "--type=v4-8", **environment)
    assert (tmp_path / "verbs").read_text().split() == verbs
    assert ended.returncode == (2 if "FAILED" in states else 0), ended.stderr


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ([], ["-m", "not exhaustive"]),
        (["-k", "knn"], ["-m", "not exhaustive", "-k", "knn"]),
        (["--all"], []),
        (["--all", "-n", "3"], ["-n", "3"]),
    ],
)
def test_exhaustive_repetitions_are_left_out_unless_all_tests_are_requested(
    stub, tmp_path, arguments, passed
):
    environment = stub("")
    python = tmp_path / "environment" / "bin" / "python"
    python.write_text(
        '#!/usr/bin/env bash\n[ "$2" = pytest ] || exec '
        f'{sys.executable} "$@"\nprintf \'%s\\n\' "$@" >{tmp_path}/words\n'
    )
    ended = run("test.sh", *arguments, **environment)
    assert ended.returncode == 0, ended.stderr
    words = (tmp_path / "words").read_text().splitlines()
    assert words == ["-m", "pytest", "-n", "2", "--dist", "worksteal", *passed]
