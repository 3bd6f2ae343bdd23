"""What is installed: the requirements of every command, and the files of configs/."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import cassle_jax
from cassle_jax import config_files
from cassle_jax.config import ConfigError
from cassle_jax.config_files import find_config, find_file
from cassle_jax.extras import EXTRA_OF

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
COMMANDS = sorted(
    path.parent.name if path.stem == "__main__" else path.stem
    for path in (ROOT / "cassle_jax").rglob("*.py")
    if '\nif __name__ == "__main__":' in path.read_text()
)
# What every extra is for, and the core.
MODULES = {
    "": ["augment", "models", "methods", "methods.losses", "methods.augself", "methods.build"],
    "sweep": ["sweep.sweep"],
}
for each in COMMANDS:
    MODULES.setdefault(EXTRA_OF[each], []).append(each)
OF_MODULE = packages_distributions()
# Imported only where torch's own files are written, and where metrics go to these services.
ON_DEMAND = {"torch", "wandb", "mlflow"}


def requirements(extra):
    """The requirements of the core with an extra, those of the extras in it included."""
    found = set(PROJECT["dependencies"])
    for each in EXTRAS.get(extra, ()):
        inner = re.fullmatch(r"cassle_jax\[(\w+)\]", each)
        found |= requirements(inner[1]) if inner else {each}
    return found


def distribution(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")


@cache
def imports(path):
    return list(_imports(path))


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached(module, seen):
    """The modules outside the project that one of it imports, through others of it, too."""
    path = ROOT / "cassle_jax" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if module in seen or not path.exists():
        return
    seen.add(module)
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "cassle_jax":
            parts = rest.split(".") if rest else []
            for end in range(1, len(parts) + 1):
                yield from reached(".".join(parts[:end]), seen)
        elif first not in sys.stdlib_module_names:
            yield first


@pytest.mark.exhaustive
@pytest.mark.parametrize("extra", MODULES)
def test_an_extra_declares_what_its_commands_import(extra):
    seen = set()
    names = {name for module in MODULES[extra] for name in reached(module, seen)} - ON_DEMAND
    needed = {distribution(OF_MODULE[name][0]) for name in names}
    declared = {distribution(each) for each in requirements(extra)}
    assert len(seen) > 10 and needed <= declared


def test_requirements_are_those_of_the_extra_for_tests():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    written = [line for line in lines if line and not line.startswith("#")]
    assert sorted(written) == sorted(requirements("test"))


def test_the_citation_names_the_version():
    cited = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", cited, re.MULTILINE) == [cassle_jax.__version__]


CORE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import jax
import jax.numpy as jnp
from cassle_jax.augment import CASSLE_DESCRIPTORS, AugmentSpec, augment, concatenate, describe
from cassle_jax.methods import METHODS
from cassle_jax.methods.losses import batch_info_nce
from cassle_jax.models import ConditionedProjector

spec = AugmentSpec(size=8)
projector = ConditionedProjector(hidden=4, out=4, depth=2)

def loss(key, image, features):
    view = augment(key, image, spec)
    omega = concatenate(describe(view, spec), CASSLE_DESCRIPTORS)[None]
    keys, _ = projector.init_with_output(key, features, omega, False)
    return omega, batch_info_nce(keys, keys, temperature=1.0, axis_name=None)

image = jnp.zeros((8, 8, 3), jnp.uint8)
omega, value = jax.eval_shape(loss, jax.random.key(0), image, jnp.ones((1, 4)))
print(omega.shape, value.shape, *METHODS)
"""


def brought_by(extra):
    """The modules of the packages that an extra adds to the core's."""
    brought = {distribution(each) for each in requirements(extra) - requirements("")}
    # Flax and Optax bring these.
    brought -= {"absl_py", "rich", "scipy"}
    return {
        module
        for module, owners in OF_MODULE.items()
        if any(distribution(owner) in brought for owner in owners)
    }


@pytest.mark.exhaustive
def test_the_core_works_without_what_the_extras_bring():
    absent = brought_by("test")
    assert {"orbax", "grain", "tensorflow_datasets", "matplotlib", "sklearn"} <= absent
    ended = subprocess.run(
        [sys.executable, "-c", CORE.replace("ABSENT", repr(absent))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("(1, 13) () barlow_twins byol moco_v2")


def started_without(absent, folder, *arguments):
    """The end of `python arguments…` where the modules in `absent` cannot be imported."""
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.modules |= dict.fromkeys({sorted(absent)})\n"
    )
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_its_extra_names_it(command, tmp_path):
    # absl comes with the core, but is what most commands import first, which makes this quick.
    absent = brought_by("test") | {"absl"}
    ended = started_without(absent, tmp_path, "-m", f"cassle_jax.{command}")
    extra = next(extra for extra, modules in MODULES.items() if command in modules)
    (package,) = re.findall(
        rf"^error: cassle_jax\.{command} needs the package (\w+); "
        rf"pip install 'cassle_jax\[{extra}\]'\n$",
        ended.stderr,
    )
    assert package in absent
    assert ended.returncode == 2 and not ended.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("command", "further"),
    [
        ("pretrain", {"matplotlib", "scipy", "submitit"}),
        ("evaluate", {"scipy", "submitit"}),
        ("tables", {"scipy"}),
    ],
)
def test_a_command_starts_without_what_it_needs_later_or_never(command, further, tmp_path):
    """Every start pays for what is imported: a run's 4.7 s of CPU had 1.1 of these."""
    later = {"sklearn", "tensorflow_datasets", "torch"} | further
    program = f"import sys, cassle_jax.{command}; print(*sys.modules)"
    imported = set(started_without((), tmp_path, "-c", program).stdout.split())
    assert f"cassle_jax.{command}" in imported and not later & imported


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_starts_is_one_line(command, tmp_path):
    (tmp_path / "absl.py").write_text("raise KeyboardInterrupt")  # what most import first
    ended = started_without((), tmp_path, "-m", f"cassle_jax.{command}")
    assert ended.stderr == "error: stopped; the same command continues\n"
    assert ended.returncode == 75 and not ended.stdout


def test_ctrl_c_in_another_program_keeps_its_traceback(tmp_path):
    (tmp_path / "absl.py").write_text("raise KeyboardInterrupt")
    ended = started_without((), tmp_path, "-c", "import cassle_jax.evaluate")
    assert ended.stderr.startswith("Traceback") and ended.returncode not in (0, 75)


def test_another_programs_missing_package_keeps_its_traceback(tmp_path):
    program = "import runpy, cassle_jax; import none_such"
    ended = started_without((), tmp_path, "-c", program)
    assert ended.stderr.startswith("Traceback") and ended.returncode == 1


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that is not the clone, as one in which an installed command is called."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("written", ["imagenet", "configs/imagenet.py", "./configs/imagenet.py"])
def test_a_configuration_is_found_from_any_folder(elsewhere, written):
    found = find_config(f"{written}:method=byol,augself=main")
    assert found == f"{ROOT}/configs/imagenet.py:method=byol,augself=main"


def test_a_file_that_is_here_comes_first(elsewhere):
    own = elsewhere / "configs" / "imagenet.py"
    own.parent.mkdir()
    own.touch()
    assert find_config("configs/imagenet.py") == "configs/imagenet.py"
    assert find_config(str(own)) == str(own)
    assert find_config("imagenet") == f"{ROOT}/configs/imagenet.py"


def test_what_is_found_nowhere_stays_as_it_is_written(elsewhere):
    assert find_config("configs/none.py:a=1") == "configs/none.py:a=1"
    assert find_file("table", "none.py", config_files.TABLES) == "none.py"


def test_an_unknown_name_is_answered_with_the_closest(elsewhere):
    with pytest.raises(
        ConfigError, match=r"^config='imagnet' is unknown; use one of cifar10, .*'imagenet'\?$"
    ):
        find_config("imagnet")
