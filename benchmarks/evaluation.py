"""Measures how evaluation grows with the number of images: time and memory, and their law.

python -m benchmarks.evaluation --rows=1000,2000,4000 --classes=100 --protocols=knn,linear

Every row of the table is a process of its own. Memory is the host's (Linux), above the features.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks.contest import one_line
from benchmarks.isolated import run_isolated
from benchmarks.linear_evaluation import synthetic_features, timed
from benchmarks.scaling import IMAGES
from benchmarks.workload import numbers_in
from cassle_jax import command
from cassle_jax.checks import check_at_least, check_one_of
from cassle_jax.evaluation.few_shot import few_shot
from cassle_jax.evaluation.knn import knn_evaluation
from cassle_jax.evaluation.linear import PENALTIES
from cassle_jax.evaluation.spectrum import spectrum
from cassle_jax.solvers.logistic import fit_logistic

QUERIES = 1000  # images that k-NN classifies

Call = Callable[[np.ndarray, np.ndarray], object]

# Per protocol, its work on features and labels of `rows` images.
PROTOCOLS: dict[str, Call] = {
    "knn": lambda x, y: knn_evaluation((x, y), (x[:QUERIES], y[:QUERIES])),
    "linear": lambda x, y: fit_logistic(x, y, int(y.max()) + 1, PENALTIES),
    "spectrum": lambda x, _: spectrum(x),
    "few_shot": lambda x, y: few_shot(x, y, shots=1, queries=5, episodes=500),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a protocol takes.

    Attributes:
      rows: number of images.
      seconds: time of the second call, so without compilation.
      gib: most memory of the host in use during both calls, above what was in use before, GiB.
    """

    rows: int
    seconds: float
    gib: float


def cost(protocol: str, rows: int, features: int, classes: int) -> Cost:
    """Measures a protocol; leaves memory behind, so it needs a separate process."""
    x, y = synthetic_features(rows, features, classes)
    call = PROTOCOLS[protocol]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _gib("VmRSS")
    call(x, y)
    seconds, _ = timed(lambda: jax.block_until_ready(call(x, y)))
    return Cost(rows, seconds, _gib("VmHWM") - before)


def _gib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 2**20


def law(costs: Sequence[Cost]) -> str:
    """How time and memory grow from the last but one to the last, and what ImageNet would take."""
    if len(costs) < 2:
        return "one size shows no growth"
    less, more = costs[-2:]
    exponent = np.log(more.seconds / less.seconds) / np.log(more.rows / less.rows)
    per_row = (more.gib - less.gib) / (more.rows - less.rows)
    seconds = more.seconds * (IMAGES / more.rows) ** exponent
    gib = more.gib + per_row * (IMAGES - more.rows)
    return (
        f"time grows with images^{exponent:.2f}, memory by {1e6 * per_row:.2f} GiB per million; "
        f"{IMAGES} images would take {seconds:.3g} s and {max(gib, 0):.3g} GiB"
    )


def main() -> None:
    """Prints a Markdown table of the costs, and the law of every protocol."""
    sizes = numbers_in("rows", ROWS.value)
    check_at_least("features", FEATURES.value, 2)
    check_at_least("classes", CLASSES.value, 2, most=FEATURES.value)
    for name in ONLY.value:
        check_one_of("protocols", name, PROTOCOLS)
    print(f"| {FEATURES.value} features, {CLASSES.value} classes | images | s | GiB |")
    print("|---|--:|--:|--:|")
    laws = {}
    for name in ONLY.value:
        found = []
        for rows in sizes:
            arguments = name, rows, FEATURES.value, CLASSES.value
            try:
                found.append(run_isolated(cost, *arguments, seconds=SECONDS.value))
            except RuntimeError as error:
                print(f"| {name} | {rows} | {one_line(error)} | |", flush=True)
                break
            print(
                f"| {name} | {rows} | {found[-1].seconds:.3g} | {found[-1].gib:.3g} |", flush=True
            )
        laws[name] = law(found)
    for name, line in laws.items():
        print(f"\n{name}: {line}")


if __name__ == "__main__":
    ROWS = flags.DEFINE_list("rows", ["1000", "2000", "4000"], "Numbers of images, ascending.")
    FEATURES = flags.DEFINE_integer("features", 2048, "Features per image.")
    CLASSES = flags.DEFINE_integer("classes", 100, "Number of classes.")
    ONLY = flags.DEFINE_list("protocols", [*PROTOCOLS], "Protocols to measure.")
    SECONDS = flags.DEFINE_float("seconds", 1800.0, "Time limit per measurement.")
    command.run(main)
