"""A user's mistake ends a command with exit code 2 and one line that says what to mend."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from cassle_jax import command
from cassle_jax.checks import ConfigError
from cassle_jax.config import FLAG_OPTIONS
from cassle_jax.data import DataError
from cassle_jax.pretrain import pretrain_command
from cassle_jax.progress import ProgressBar
from cassle_jax.sweep.space import SweepRequest, runs_of
from cassle_jax.training.loop import Diverged, Preempted
from tests.commands import run_command
from tests.everyday import everyday
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]
FILE = str(ROOT / "configs" / "cifar10.py")
SIMCLR_FILE = f"{FILE}:method=simclr"
SIMCLR = f"--config={SIMCLR_FILE}"
QUICKSTART = "--config=quickstart:method=simclr"


@pytest.fixture
def run(monkeypatch):
    """`run(*arguments)`: what a command given them would have made of its flags.

    absl's own set-up of the process, which happens once, is left out.
    """

    def absl_run(main, flags_parser):
        main(flags_parser(sys.argv))

    def make(*arguments, main=lambda config: None):
        known = flags.FlagValues()
        config = config_flags.DEFINE_config_file("config", None, "", known, **FLAG_OPTIONS)
        monkeypatch.setattr(flags, "FLAGS", known)
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        results = []
        command.run(lambda: results.append(main(config.value) or config.value))
        return results[0]

    monkeypatch.setattr(command.app, "run", absl_run)
    monkeypatch.setattr(command, "set_up_logging", lambda: None)
    return make


@pytest.fixture
def refusal(run, capsys):
    """`refusal(*arguments)`: the one line on standard error that a command ends with."""

    def make(*arguments, **settings):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments, **settings)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert not captured.out
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err.removeprefix("error: ").rstrip("\n")

    return make


def test_ctrl_c_is_one_line_and_the_code_of_what_continues(run, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run(SIMCLR, main=interrupted)
    assert stopped.value.code == command.EXIT_PREEMPTED
    assert capsys.readouterr().err == "error: stopped; the same command continues\n"


@pytest.mark.parametrize(("nohup", "code"), [(False, command.EXIT_PREEMPTED), (True, 0)])
def test_a_closed_terminal_stops_a_command_except_under_nohup(run, capsys, nohup, code):
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    def closed(_):
        if signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:  # else it ends these tests
            signal.raise_signal(signal.SIGHUP)

    with contextlib.suppress(SystemExit):
        run(SIMCLR, main=closed)
    said = capsys.readouterr().err
    assert said == ("error: stopped; the same command continues\n" if code else "")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # it has nothing left to stop


def test_a_bar_outlives_its_terminal(monkeypatch):
    ours, shown = pty.openpty()
    terminal = os.fdopen(shown, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar("pretraining", 9, 0)
    assert bar.shown
    os.close(ours)
    bar.update(3, figures="loss 2")
    bar.close()
    with contextlib.suppress(OSError):
        terminal.close()


@pytest.mark.exhaustive
def test_sigterm_is_one_line_and_the_same_code(tmp_path):
    program = (
        "import time\nfrom cassle_jax import command\n"
        "def main():\n"
        "    try:\n        print('begun', flush=True)\n        time.sleep(300)\n"
        "    finally:\n        print('ending', flush=True)\n        time.sleep(1)\n"
        "        print('whole')\n"
        "command.run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    assert process.stdout.readline() == "ending\n"
    process.terminate()  # as SLURM does
    said = "error: stopped; the same command continues\n"
    assert process.communicate(timeout=60) == ("whole\n", said)
    assert process.returncode == command.EXIT_PREEMPTED


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nso far: much"),
    ],
)
def test_what_no_memory_holds_is_one_line(refusal, error):
    def main(config):
        raise error

    said = str(error).partition("\n")[0]
    assert refusal(SIMCLR, main=main).endswith(f"does not suffice: {said}; use smaller settings")


def test_a_line_that_quotes_such_an_error_is_not_said_again(refusal):
    line = "1 task failed; knn: RESOURCE_EXHAUSTED: Out of memory; use smaller settings"

    def main(config):
        raise DataError(line)

    assert refusal(SIMCLR, main=main) == line


def test_settings_reach_the_configuration(run):
    config = run(SIMCLR, "--config.method.negatives=local", "--config.optimizer.momentum=0.5")
    assert (config.method.name, config.method.negatives) == ("simclr", "local")
    assert config.optimizer.momentum == 0.5


def test_settings_of_an_optimiser_have_the_names_of_its_arguments(run):
    settings = run(
        SIMCLR,
        "--config.optimizer.settings.b2=0.95",
        "--config.optimizer.settings.nesterov=true",
        "--config.optimizer.settings.preconditioning=schatten",
    ).optimizer.settings
    assert settings.to_dict() == {"b2": 0.95, "nesterov": True, "preconditioning": "schatten"}


def test_flags_and_values_may_be_words_of_their_own(run):
    config = run("--config", SIMCLR_FILE, "--config.batch_size", "8")
    assert (config.method.name, config.batch_size) == ("simclr", 8)


def test_a_methods_settings_are_known_where_its_file_is_a_word_of_its_own(run):
    config = run("--config", SIMCLR_FILE, "--config.method.negatives", "local")
    assert config.method.negatives == "local"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch_sise=8", r"^config\.batch_sise is not a setting .* mean config\.batch_size\?$"),
        ("weight_decay=0", r"config\.weight_decay .* mean config\.optimizer\.weight_decay\?$"),
        ("optimizer.weigth_decay=0", r"mean config\.optimizer\.weight_decay\?$"),
        ("method.queue_size=64", r"^config\.method\.queue_size is not a setting"),
        ("method=moco_v2", r"^config\.method is not a setting"),
        ("nothing_like_it=1", r"^config\.nothing_like_it is not a setting of this configuration$"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_closest(refusal, setting, message):
    assert re.search(message, refusal(SIMCLR, f"--config.{setting}"))


def test_an_unknown_setting_that_is_to_be_false_is_answered_alike(refusal):
    said = r"^config\.augment\.cropp is not a setting .* did you mean config\.augment\.crop\?$"
    assert re.search(said, refusal(SIMCLR, "--noconfig.augment.cropp"))


@pytest.mark.parametrize(
    "setting", ["batch_size=many", "batch_size=3.5", "optimizer.momentum=high", "deterministic=2"]
)
def test_a_value_of_the_wrong_type_names_setting_and_value(refusal, setting):
    name, value = setting.split("=")
    message = refusal(SIMCLR, f"--config.{setting}")
    assert f"config.{name}" in message and value in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [f"--config={FILE}:methd=simclr"],
            r"^config argument 'methd=simclr' is unknown; use method=…",
        ),
        ([f"--config={FILE}:method=simcrl"], r"^method='simcrl' .* did you mean 'simclr'\?$"),
        (["--config=configs/none.py"], r"^config cannot be read: .*configs/none\.py"),
        (["--config=configs/none.py", SIMCLR], r"^--config is given 2 times; give it once$"),
        ([f"--config={ROOT}"], r"^config cannot be read: .*directory"),
        (["--config=/dev/null"], r"^config cannot be read: /dev/null: it is a pipe or a device"),
        ([SIMCLR, "--configuration=x"], r"^Unknown command line flag 'configuration'"),
    ],
)
def test_what_cannot_be_a_configuration_is_said_in_one_line(refusal, arguments, message):
    assert re.search(message, refusal(*arguments))


def test_a_setting_without_its_dashes_is_not_silently_left_out(refusal):
    assert "config.batch_size=8" in refusal(SIMCLR, "config.batch_size=8")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.batch_sise = 8", "batch_sise"),
        ("config.optimiser.momentum = 0", "optimiser"),
        ("config.batch_size = 'many'", "batch_size"),
        ("import none_such", "in its line 6: ModuleNotFoundError: No module named 'none_such'"),
        ("open('/none.csv')", "in its line 6: FileNotFoundError: "),
        ("config.epochs = 1 / 0", "fails in its line 6: ZeroDivisionError: division by zero"),
        ("config.epochs = (", "fails in its line 6: SyntaxError: '(' was never closed (own.py"),
        ("config = None", "lacks a get_config that returns a ConfigDict; configs/photos.py"),
    ],
)
def test_a_mistake_in_a_configuration_file_is_found(refusal, tmp_path, body, message):
    file = tmp_path / "own.py"
    file.write_text(
        "from cassle_jax.config import base_config\n\n\n"
        f"def get_config(arguments=''):\n    config = base_config(arguments)\n    {body}\n"
        "    return config\n"
    )
    assert message in refusal(f"--config={file}")


def test_a_configuration_file_needs_its_function(refusal, tmp_path):
    (tmp_path / "own.py").write_text("steps = 8\n")
    said = refusal(f"--config={tmp_path / 'own.py'}")
    assert "lacks a function get_config; configs/photos.py" in said


@pytest.mark.parametrize("overrides", [[], ["--config.batch_size=8"]])
def test_a_configuration_file_need_not_take_arguments(run, refusal, tmp_path, overrides):
    file = tmp_path / "own.py"
    file.write_text(
        "from cassle_jax.config import base_config\n\n\n"
        "def get_config():\n    return base_config()\n"
    )
    assert run(f"--config={file}", *overrides).batch_size == (8 if overrides else 256)
    said = f"config={file} fails: TypeError: get_config() takes 0 positional arguments but 1 was"
    assert refusal(f"--config={file}:method=simclr", *overrides).startswith(said)
    (swept,) = runs_of(SweepRequest(str(file), grid="batch_size=8"))
    assert swept.config.batch_size == 8


@pytest.mark.parametrize("error", [ConfigError, DataError])
def test_what_the_run_finds_wrong_ends_it_the_same_way(refusal, error):
    def main(config):
        raise error("data.path='' is not a folder; give one")

    assert refusal(SIMCLR, main=main) == "data.path='' is not a folder; give one"


def test_a_fault_of_the_program_keeps_its_traceback(run):
    def main(config):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(SIMCLR, main=main)


@pytest.mark.parametrize(("error", "code"), [(Diverged, 3), (Preempted, 75)])
def test_a_run_that_stops_early_says_why_by_its_exit_code(run, monkeypatch, capsys, error, code):
    def stop(config, workdir, *, accept_changes):
        raise error("after step 7")

    monkeypatch.setattr("cassle_jax.pretrain.pretrain", stop)
    with pytest.raises(SystemExit) as stopped:
        run(SIMCLR, main=lambda config: pretrain_command(tiny_config(), "nowhere"))
    assert stopped.value.code == code
    assert capsys.readouterr().err == "error: after step 7\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("main", "code"),
    [
        ("raise command.Stop('the images are gone', 69)", 69),
        ("raise command.UserError('seed=-1 is not a seed')", 2),
        ("command.logging.getLogger('cassle_jax').info('done')", 0),
    ],
)
def test_a_log_on_a_full_disk_leaves_the_exit_code(main, code):
    program = f"from cassle_jax import command\ndef main():\n    {main}\ncommand.run(main)"
    with Path("/dev/full").open("w") as log:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # what cannot be written waits
        start = [sys.executable, "-c", program]
        ended = subprocess.run(start, cwd=ROOT, env=buffered, stderr=log, check=False)
    assert ended.returncode == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "output",
    everyday(["| true", "> /dev/full", ">&-", "2>&-", ">&- 2>&- <&-"], "| true", ">&- 2>&- <&-"),
)
def test_output_that_nobody_takes_leaves_the_exit_code_and_the_files(tmp_path, output):
    main = "command.say('many words ' * 10000); command.say('the end'); open('kept', 'w').write(at)"
    program = (
        f"import os\nfrom cassle_jax import command\nat = os.getcwd()\ndef main():\n    {main}"
    )
    # What writes to the number of standard error must not reach a file that took its place.
    program += "\n    file = open('numbered', 'w')\n    assert file.fileno() > 2\ncommand.run(main)"
    line = f'{{ "$@" {output.replace("| true", "")}; echo $? > code; }} '
    line += "| true" if "|" in output else ""
    shell = ["bash", "-c", line, "bash", sys.executable, "-c", program]
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(shell, cwd=tmp_path, env=ours, capture_output=True, text=True)
    assert ended.stderr == ""
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "kept").read_text() == str(tmp_path)


def test_a_path_of_any_bytes_can_be_printed(capfdbinary):
    command.say("--config.data.path=/data/\udcff")
    assert capfdbinary.readouterr().out == b"--config.data.path=/data/\\udcff\n"


MISTAKES = {
    "config.batch_sise is not a setting": [SIMCLR, "--config.batch_sise=8"],
    "configs/none.py": ["--config=configs/none.py"],
    "log.to=1 is unknown": [QUICKSTART, "--config.log.to=(1,)"],
    "the unknown name '1'": [QUICKSTART, "--config.conditioning.descriptors=(1,)"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("message", MISTAKES)
def test_the_pretraining_command_ends_with_one_line(message, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "cassle_jax.pretrain", f"--workdir={tmp_path}", *MISTAKES[message]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1 and message in ended.stderr
    assert "Traceback" not in ended.stderr and not ended.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("ends", ["fail", "fail_after"])
def test_a_second_ctrl_c_ends_a_process_that_waits_for_the_others(ends):
    program = f"""
import signal, threading
from types import SimpleNamespace
from cassle_jax import distributed
group = object.__new__(distributed._ProcessGroup)
stopped_again = lambda *_: signal.raise_signal(signal.SIGINT)
group._client = SimpleNamespace(key_value_set=lambda *_: None, wait_at_barrier=stopped_again)
group._death_message = SimpleNamespace(cancel=lambda: None)
group._index, group._count, group._ending = 1, 2, threading.Lock()
try:
    group.fail("first", 1)
except KeyboardInterrupt as error:
    group.{ends}(*(("second", 75) if "{ends}" == "fail" else (error,)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr == "error: first\n"


@pytest.mark.parametrize("path", ["a b/c", b"a\xff", "a\nb"])
def test_an_error_of_the_file_system_begins_with_its_path(path):
    stop = command.stop_of(PermissionError(13, "Permission denied", path))
    assert str(stop) == f"{os.fsdecode(path)}: Permission denied"
    assert command.words_of(OSError(9, "Bad file descriptor", 7)) == str(
        OSError(9, "Bad file descriptor", 7)
    )
    moved = command.stop_of(PermissionError(13, "Permission denied", path, None, "there"))
    assert "there" in str(moved) and "Permission denied" in str(moved)


def test_a_warning_of_a_command_is_one_of_the_projects(tmp_path, capsys, caplog):
    """It is logged in the project's form, and by the first of several processes alone."""
    data = ("--config.data.source=folder", "--config.data.path=/none")
    words = (*data, "--config.augself.stage=3", f"--workdir={tmp_path / 'run'}")
    assert run_command("pretrain", QUICKSTART, *words) == 2
    assert "data.path='/none'" in capsys.readouterr().err
    ((logger, _, message),) = caplog.record_tuples
    assert logger == "cassle_jax.pretrain" and "augself.stage=3 has no effect" in message
