"""Programs that XLA is known to miscompile for CPUs are right where cassle_jax is imported."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

IMPORTS = "import cassle_jax, jax, jax.numpy as jnp"

# jaxlib 0.10.2 gives 1071645696 for the first, and dies of the second, as 0.11.0 of others like it.
KNOWN = """
rows = jnp.zeros((32_769, 3)).at[:, 0].set(jnp.arange(32_769))
squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
assert squares[-1] == 32_768**2, squares[-1]
ones = jnp.ones((3, 1, 2, 2, 8, 8, 8))
assert (jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(ones, ones) == 2).all()
"""


def run(program, **environment):
    """Runs it with XLA's own optimisations, most of which the suite does without."""
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.exhaustive
def test_known_miscompilations_are_avoided():
    done = run(f"{IMPORTS}{KNOWN}")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_import_after_the_first_use_of_the_cpu_warns_how_to_be_safe():
    done = run("import jax; jax.devices(); import cassle_jax")
    assert "import cassle_jax first, or set XLA_FLAGS=--xla_cpu_experimental_ynn" in done.stderr
    assert done.returncode == 0


def test_flags_of_the_user_stay_and_another_jaxlib_gets_none_that_would_end_it(monkeypatch):
    from cassle_jax import cpu_fusions

    for release, flags, expected in (
        ("0.10.2", "--a=1", "--a=1 --xla_cpu_experimental_ynn_fusion_type="),
        ("0.12.0", "", "--xla_cpu_experimental_ynn_fusion_type="),
        ("0.13.0", "--a=1", "--a=1"),
        ("0.9.2", "", ""),
        ("0.11.1", f"{cpu_fusions._FLAG}=-reduce", f"{cpu_fusions._FLAG}=-reduce"),
    ):
        monkeypatch.setattr(cpu_fusions.metadata, "version", lambda _, release=release: release)
        monkeypatch.setattr(cpu_fusions, "_computes_on_cpus", lambda: False)
        monkeypatch.setenv("XLA_FLAGS", flags)
        cpu_fusions.switch_off_ynnpack()
        assert os.environ["XLA_FLAGS"] == expected


def test_flags_in_a_file_are_flags_too(monkeypatch, tmp_path):
    """XLA takes XLA_FLAGS for a file's name where it begins with no hyphen, and dies without it."""
    from cassle_jax import cpu_fusions

    (tmp_path / "flags").write_text("--a=1\n--b=2\n")
    monkeypatch.setattr(cpu_fusions.metadata, "version", lambda _: "0.10.2")
    monkeypatch.setattr(cpu_fusions, "_computes_on_cpus", lambda: False)
    for flags, expected in (("flags", "--a=1\n--b=2\n --xla"), ("none", f"{tmp_path}/none")):
        monkeypatch.setenv("XLA_FLAGS", f"{tmp_path}/{flags}")
        cpu_fusions.switch_off_ynnpack()
        assert os.environ["XLA_FLAGS"].startswith(expected)


# Optimised, and without most optimisations: one traced step is compiled twice.
STEP_AND_FITS = """
import json
import jax, numpy as np
from cassle_jax.data import DamagedLog, open_source, training_batches
from cassle_jax.evaluation.linear import PENALTIES
from cassle_jax.solvers.logistic import fit_logistic
from cassle_jax.models import ENCODERS
from cassle_jax.parallel import device_mesh, shard_batch
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step
from tests.states import filled_state
from tests.tiny import TinyEncoder, tiny_config

ENCODERS["tiny"] = TinyEncoder
config, mesh = tiny_config("method=moco_v2"), device_mesh()
source = open_source(config.data, "train")
run = build_run(config, mesh, len(source))
read = training_batches(
    source, batch=16, canvas=config.data.canvas, seed=0, damaged=DamagedLog(len(source), 0.0)
)
batches = [{name: next(read)[name] for name in ("image", "size")} for _ in range(2)]
first = shard_batch(batches[0], mesh)
lowered = make_train_step(run, mesh).lower(filled_state(run, mesh), first)
draw = np.random.default_rng(0)
labels = draw.integers(0, 3, 60)
features = (draw.normal(size=(60, 5)) + labels[:, None]).astype(np.float32)
results = []
for plain in (False, True):
    jax.config.update("jax_disable_most_optimizations", plain)
    jax.clear_caches()  # of the fits
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    step, state, found = lowered.compile(options if plain else None), filled_state(run, mesh), []
    for batch in batches:
        state, metrics = step(state, shard_batch(batch, mesh))
        found += [float(metrics[name]) for name in ("loss", "gradient_norm", "positive_similarity")]
    results.append(found + fit_logistic(features, labels, 3, PENALTIES).objectives.tolist())
print(json.dumps(results))
"""


@pytest.mark.exhaustive
def test_optimisations_change_neither_the_step_nor_linear_evaluation():
    done = run(STEP_AND_FITS, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results[0]) == len(results[1]) == 6 + 45
    np.testing.assert_allclose(*results, rtol=2e-5)
