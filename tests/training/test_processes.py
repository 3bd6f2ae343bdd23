"""Several processes compute what one computes, stop together, and never wait for a dead one."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from cassle_jax import distributed, launchers
from cassle_jax.checks import ConfigError
from cassle_jax.command import Stop
from cassle_jax.data.damaged import DamagedLog
from cassle_jax.launchers import runtime_arguments
from cassle_jax.parallel import in_all_processes
from cassle_jax.training.metrics import read_lines, read_metrics
from tests.everyday import everyday
from tests.training.processes import ROOT, assert_same, ends, free_port, start, steps_saved

REPEATS = int(os.environ.get("CASSLE_PROCESS_KILLS", "1"))
STEPS = "steps=60"
SELDOM = "checkpoint.every_steps=30"  # where nothing continues from one
NOWHERE = ["data.source='folder'", "data.path='/nowhere'"]
# Every step is a window of metrics of its own, wherever a run was interrupted.
LOGGED = (STEPS, "log.every_steps=1")
PROBED = (
    *LOGGED,
    "probe.every_epochs=5",
    "probe.train_images=32",
    "probe.test_images=32",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    codes, errors = ends(start(workdir, 1, *PROBED, SELDOM))
    assert codes == [0], errors
    return workdir


def wait_for(workdir, step, processes):
    until = time.monotonic() + 300
    while not any(saved >= step for saved in steps_saved(workdir)):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.1)


def assert_losses_equal(workdir, expected):
    found, expected = read_metrics(workdir), read_metrics(expected)
    for name in ("loss", "gradient_norm"):
        assert dict(found[name]) == pytest.approx(dict(expected[name]), rel=1e-5, abs=1e-5)
    return found, expected


@pytest.mark.parametrize("count", everyday([2, 4], 2))
def test_several_processes_are_one(alone, tmp_path, count):
    codes, errors = ends(start(tmp_path, count, *PROBED, SELDOM))
    assert codes == [0] * count, errors
    found, expected = assert_losses_equal(tmp_path, alone)
    assert dict(found["rank_me"]) == pytest.approx(dict(expected["rank_me"]), rel=1e-3)
    assert [step for step, _ in found["knn_accuracy"]] == [20, 40, 60]
    assert_same(tmp_path, alone)
    starts = read_lines(epath.Path(tmp_path, "starts.jsonl"))
    assert [each["processes"] for each in starts] == [count]
    assert not any("error" in error or "Traceback" in error for error in errors)


@pytest.mark.exhaustive
def test_sigterm_to_one_stops_all_after_the_same_step_and_one_alone_continues(alone, tmp_path):
    for repeat in range(REPEATS):
        workdir = tmp_path / str(repeat)
        processes = start(workdir, 2, *PROBED)
        wait_for(workdir, random.choice([5, 10]), processes)
        signalled = random.randrange(2)
        processes[signalled].send_signal(signal.SIGTERM)
        codes, errors = ends(processes)
        stopped = steps_saved(workdir)[-1]
        print(f"SIGTERM to {signalled}: codes {codes}, stopped at step {stopped}")
        assert codes == [75, 75], errors
        assert all(f"stopped after step {stopped}, which is saved" in each for each in errors)
        codes, errors = ends(start(workdir, 1, *PROBED))
        assert codes == [0], errors
        assert_losses_equal(workdir, alone)
        assert_same(workdir, alone)


@pytest.mark.exhaustive
def test_killing_one_ends_the_others_and_the_same_command_continues(alone, tmp_path):
    for repeat in range(REPEATS):
        workdir, victim = tmp_path / str(repeat), random.randrange(2)
        processes = start(workdir, 2, *LOGGED)
        wait_for(workdir, random.choice([5, 10, 15]), processes)
        time.sleep(random.uniform(0, 0.5))
        processes[victim].kill()
        began = time.monotonic()
        codes, errors = ends(processes)
        seconds = time.monotonic() - began
        print(f"kill -9 of {victim}: codes {codes} after {seconds:.1f} s, {steps_saved(workdir)}")
        assert seconds < 60
        assert codes[1 - victim] not in (0, 2, 3)
        last = errors[1 - victim].splitlines()[-1]
        assert last.startswith("error: process ") and "the same command continues" in last
        codes, errors = ends(start(workdir, 2, *LOGGED))
        assert codes == [0, 0], errors
        assert_losses_equal(workdir, alone)
        assert_same(workdir, alone)


@pytest.mark.exhaustive
def test_killing_all_loses_nothing_and_four_continue(alone, tmp_path):
    processes = start(tmp_path, 2, *PROBED)
    wait_for(tmp_path, 10, processes)
    for process in processes:
        process.kill()
    ends(processes)
    codes, errors = ends(start(tmp_path, 4, *PROBED))
    assert codes == [0] * 4, errors
    assert_same(tmp_path, alone)


@pytest.mark.exhaustive
def test_a_disk_that_fails_costs_one_checkpoint_and_at_the_end_ends_all(alone, tmp_path):
    codes, errors = ends(start(tmp_path, 2, *LOGGED, module="tests.training.run_unsaved"))
    assert codes == [69, 69], errors
    assert steps_saved(tmp_path)[-1] == 50
    for step in (10, 25, 55):
        assert f"checkpoint {step} is not saved" in errors[0], errors
        assert f"checkpoint {step} is not saved" not in errors[1]
    assert all(f"checkpoint {step} is saved" in errors[0] for step in (15, 30))
    for error in errors:
        assert "step 60 could not be saved" in error and "Input/output error" in error
        assert "Traceback" not in error
    codes, errors = ends(start(tmp_path, 1, *LOGGED))
    assert codes == [0], errors
    assert_losses_equal(tmp_path, alone)
    assert_same(tmp_path, alone)


@pytest.mark.exhaustive
def test_a_stop_while_the_images_are_gone_is_heard_at_once(tmp_path):
    root = tmp_path / "images"
    for index in range(64):
        file = root / "train" / "ab"[index % 2] / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (index, 0, 0)).save(file)
    settings = ("data.source='folder'", f"data.path='{root}'", "data.cache_gib=0.0")
    steps = ("steps=100000", "checkpoint.every_steps=5")
    run = tmp_path / "run"
    processes = start(run, 2, *steps, *settings, CASSLE_STORAGE_SECONDS="120")
    wait_for(run, 5, processes)
    root.rename(tmp_path / "away")
    before = None
    while before != (before := steps_saved(run)):  # what was read before is used up
        time.sleep(3)
    processes[1].send_signal(signal.SIGTERM)
    began = time.monotonic()
    codes, errors = ends(processes)
    assert codes == [69, 69] and time.monotonic() - began < 60, errors
    assert all("the same command continues" in each for each in errors)


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (
            lambda index: [f"log.every_steps={index + 1}"],
            "log.every_steps=2 in process 1 of 2 and 1 in process 0; start all processes with",
        ),
        (lambda index: NOWHERE if index == 0 else [], "data.path='/nowhere'"),
        pytest.param(
            lambda index: NOWHERE if index == 1 else [],
            "data.path='/nowhere'",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_mistake_of_one_process_ends_all_with_its_line(tmp_path, each, message):
    codes, errors = ends(start(tmp_path, 2, STEPS, each=each))
    assert codes == [2, 2], errors
    for error in errors:
        lines = [line for line in error.splitlines() if not line.startswith("[Gloo]")]
        assert len(lines) == 1 and message in lines[0], error


def test_a_process_whose_others_do_not_come_gives_up_with_one_line(tmp_path):
    processes = start(tmp_path, 2, STEPS, CASSLE_JOIN_SECONDS="4")
    processes.pop().kill()
    codes, errors = ends(processes)
    assert codes == [69]  # it may be started again
    assert errors[0].count("\n") == 1
    assert "process 0 did not meet the others at JAX_COORDINATOR_ADDRESS=127.0.0.1:" in errors[0]


VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        {**VARIABLES, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
    ids=["nothing", "one", "one-with-all", "sbatch", "salloc", "mpirun-1", "a-pod"],
)
def test_a_process_alone_joins_nothing(environment):
    assert runtime_arguments(environment) is None


def test_what_is_found():
    by_variables = {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    assert runtime_arguments(VARIABLES) == by_variables
    assert runtime_arguments({**TASK, **VARIABLES}) == by_variables
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}
    assert runtime_arguments(mpi) == {"cluster_detection_method": "ompi"}


@pytest.mark.parametrize(
    ("further", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, [0]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, [0, 1]),
        (
            {
                "CUDA_VISIBLE_DEVICES": "0,1,2,3",
                "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
                "SLURM_LOCALID": "0",
            },
            [0, 1, 2, 3],
        ),
    ],
    ids=["one-each", "two-each", "bound", "bound-two", "a-task-a-host"],
)
def test_a_task_of_slurm_takes_its_share_of_its_hosts_gpus(further, gpus):
    found = runtime_arguments({**TASK, **further})
    assert found["local_device_ids"] == gpus
    assert (found["num_processes"], found["process_id"]) == (4, 3)
    assert found["cluster_detection_method"] == "slurm"


@pytest.mark.parametrize(
    "further", [{}, {"JAX_LOCAL_DEVICE_IDS": "1", "CUDA_VISIBLE_DEVICES": "0"}]
)
def test_a_task_without_gpus_or_with_a_choice_leaves_it_to_jax(monkeypatch, further):
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert runtime_arguments({**TASK, **further})["local_device_ids"] is None


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "gketpu"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
        ({}, "gcetpu"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"TPU_VISIBLE_CHIPS": "0"}, None),
        ({"JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_hosts_of_a_tpu_pod_find_each_other_as_jax_finds_them(monkeypatch, environment, found):
    monkeypatch.setattr(Path, "glob", lambda _, name: iter([Path("/dev/accel0")]))
    monkeypatch.setattr(launchers, "find_spec", lambda name: name == "libtpu")
    expected = found and {"cluster_detection_method": found}
    assert runtime_arguments(environment) == expected


@pytest.fixture
def group(monkeypatch, capsys):
    """A process of two, which ends in this one with its code as it would in its own."""
    found = object.__new__(distributed._ProcessGroup)
    found._ending, found._index, found._count = threading.Lock(), 1, 2

    def end(message, code):
        raise SystemExit(f"{code}: {message}")

    monkeypatch.setattr(found, "fail", end)
    monkeypatch.setattr(distributed, "runtime_arguments", lambda _: {})
    monkeypatch.setattr(distributed, "_join", lambda *_: found)
    monkeypatch.setattr(distributed, "_FAILURE_SECONDS", 0)
    return found


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("by 0\nmore"), "1: ZeroDivisionError: by 0"),
        (ConfigError("seed=-1 is not a seed"), "2: seed=-1 is not a seed"),
        (
            RuntimeError("UNAVAILABLE: Connection reset by peer"),
            "69: process 1 of 2 probably lost another process (UNAVAILABLE: Connection reset by",
        ),
    ],
)
def test_an_error_of_one_process_ends_it_with_what_it_was(group, capsys, error, said):
    with pytest.raises(SystemExit) as ended, distributed.all_processes():
        raise error
    assert str(ended.value).startswith(said)
    assert ("Traceback" in capsys.readouterr().err) == (not isinstance(error, ConfigError))


@pytest.fixture
def _levels_restored():
    names = ["cassle_jax", *(f"cassle_jax.{each}" for each in distributed._SHARED_MATTERS)]
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_levels_restored")
def test_what_every_process_would_log_is_left_to_the_first(caplog):
    """Each of 64 processes logged the same warning that a setting has no effect."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        distributed._leave_shared_matters_to_the_first()
        shared = "pretrain", "evaluation.plan", "evaluation.bench", "data.tar"
        for module in (*shared, "storage", "faults"):
            logging.getLogger(f"cassle_jax.{module}").warning(module)
        logging.getLogger("cassle_jax.evaluate").error("linear of a on b failed")
        for module in ("cassle_jax.evaluation.linear", "flax"):
            warnings.warn_explicit(module, UserWarning, "linear.py", 1, module)
    assert caplog.messages == ["storage", "faults", "linear of a on b failed"]
    assert [str(each.message) for each in shown] == ["flax"]
    DamagedLog(4, 0.5).add("a.png", "it is cut off")
    assert caplog.messages[-1] == "damaged image: a.png (it is cut off)"


@pytest.mark.parametrize("alone", [False, True])
def test_a_stop_of_one_process_alone_ends_all_and_one_of_all_passes_through(group, alone):
    stop = Stop("the last step is not saved", 74, alone=alone)
    with pytest.raises(SystemExit if alone else Stop) as ended, distributed.all_processes():
        raise stop
    assert str(ended.value) == ("74: " if alone else "") + "the last step is not saved"


def test_a_signal_to_any_process_is_acted_upon(group):
    heard = threading.Event()
    group._client = SimpleNamespace(blocking_key_value_get=lambda *_: "stop")
    group._listeners = []
    group.when_stopped(heard.set)
    assert heard.wait(10)


def test_a_failure_is_reported_to_the_others(group, monkeypatch):
    sent = {}

    def end(message, code):
        raise SystemExit(f"{code}: {message}")

    monkeypatch.delattr(group, "fail")
    monkeypatch.setattr(distributed, "end_undisturbed", lambda: None)
    monkeypatch.setattr(group, "_end", end)
    group._client = SimpleNamespace(key_value_set=sent.__setitem__)
    with pytest.raises(SystemExit, match=r"^69: out of reach$"):
        group.fail("out of reach", 69)
    (said,) = sent.values()
    assert json.loads(said) == ["process 1 of 2", 69, "out of reach"]


def test_a_fact_of_one_process_is_a_fact_of_none(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.process_allgather", lambda here: np.array([here, True])
    )
    assert in_all_processes(True) is True and in_all_processes(False) is False


def test_no_thread_that_waits_for_the_others_outlives_the_end(group, monkeypatch):
    """Python aborts a finished run where such a thread comes back while the interpreter ends."""
    ended = threading.Event()

    class Client:
        def blocking_key_value_get(self, *_):
            ended.wait()
            time.sleep(0.3)
            raise jax.errors.JaxRuntimeError("CANCELLED: the runtime was shut down")

    group._client, group._listeners = Client(), []
    group._death_message = SimpleNamespace(cancel=lambda: None)
    monkeypatch.setattr(distributed, "_FAILURE_SECONDS", 5)
    monkeypatch.setattr(jax.distributed, "shutdown", ended.set)
    before = set(threading.enumerate())
    group._start(group._listen)
    group.when_stopped(lambda: None)
    assert len(set(threading.enumerate()) - before) == 2
    group._leave()
    assert not set(threading.enumerate()) - before


def test_a_runtime_that_does_not_answer_is_an_error_and_no_answer(group):
    def fails(*_):
        raise jax.errors.JaxRuntimeError(reason)

    group._client = SimpleNamespace(key_value_set=fails)
    reason = "ALREADY_EXISTS: key"
    assert not group.is_first_to("save")
    group._client.key_value_set = lambda *_: None
    assert group.is_first_to("save")
    group._client.key_value_set = fails
    reason = "UNAVAILABLE: no service"
    with pytest.raises(jax.errors.JaxRuntimeError, match="no service"):
        group.is_first_to("save")


def test_an_address_that_cannot_be_is_one_line(monkeypatch):
    def refuses(**_):
        raise ValueError("the address is wrong\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", refuses)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere:1")
    with pytest.raises(
        ConfigError, match=r"^process 1 did not .*=nowhere:1; .* \(the address is w"
    ):
        distributed._initialize({"process_id": 1})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "^JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES must be set"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "^JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set"),
        ({**VARIABLES, "JAX_PROCESS_ID": "4"}, "^JAX_PROCESS_ID=4 is not below .*; use 0 to 3$"),
        ({**VARIABLES, "JAX_PROCESS_ID": "-1"}, "^JAX_PROCESS_ID='-1' must be an integer"),
        ({**VARIABLES, "JAX_NUM_PROCESSES": "0"}, "^JAX_NUM_PROCESSES='0' must be .* least 1$"),
        (
            {**VARIABLES, "JAX_COORDINATOR_ADDRESS": "host"},
            "^JAX_COORDINATOR_ADDRESS='host' has no",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "^OMPI_COMM_WORLD_SIZE=2, but this Open MPI does not report",
        ),
    ],
)
def test_variables_that_cannot_work_are_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        runtime_arguments(environment)


@pytest.mark.exhaustive
@pytest.mark.parametrize("failing", [0, 1])
def test_images_that_one_process_cannot_read_lose_no_step(alone, tmp_path, failing):
    """The others wait in their next step; it saves alone, and another number continues."""
    settings = [*LOGGED, "checkpoint.every_steps=1000"]
    broken = lambda index: ["fails"] if index == failing else []  # noqa: E731
    module = "tests.training.run_unreadable"
    codes, errors = ends(start(tmp_path, 2, *settings, each=broken, module=module))
    assert codes == [69, 69], errors
    assert all("the same command continues" in each for each in errors)
    assert not any("Traceback" in each for each in errors), errors
    (step,) = steps_saved(tmp_path)
    assert 20 < step < 60
    codes, errors = ends(start(tmp_path, 1, *settings))
    assert codes == [0], errors
    assert_losses_equal(tmp_path, alone)
    assert_same(tmp_path, alone)


@pytest.mark.exhaustive
def test_a_process_that_compiles_longer_than_the_others_is_waited_for():
    codes, errors = ends(start(40, 2, module="tests.training.run_late"))
    assert codes == [0, 0], errors


def test_processes_of_unequal_devices_end_with_one_line():
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.run_late", "0"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={
                **os.environ,
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={1 + index}",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(2)
    ]  # fmt: skip
    codes, errors = ends(processes)
    assert codes == [2, 2], errors
    assert all("the processes have 1, 2 devices; give all the same" in each for each in errors)
    assert not any("Traceback" in each for each in errors), errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_ends_all_where_no_step_would_save(tmp_path, number):
    processes = start(tmp_path, 2, module="tests.training.run_waiting")
    until = time.monotonic() + 100
    while len(list(tmp_path.glob("joined*"))) < 2:
        assert time.monotonic() < until and all(each.poll() is None for each in processes)
        time.sleep(0.1)
    processes[1].send_signal(number)
    codes, errors = ends(processes)
    assert codes == [75, 75], errors
    said = "stopped; the same command continues\n"
    assert errors[1].endswith(f"error: {said}")
    assert errors[0].endswith(f"error: process 1 of 2 ended: {said}")
    assert not any("Traceback" in error for error in errors)
