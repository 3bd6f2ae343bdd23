"""The page of a sweep: what pretraining measured, and what an evaluation found, side by side."""

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from cassle_jax.config import flat_settings
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.report.evaluation_page import JSON, read_report, write_report
from cassle_jax.sweep.space import Run
from cassle_jax.training.metrics import read_metrics

TASK = "pretraining"
# Of a metric as it is logged: what it is called, and whether higher is better.
_METRICS = {
    "knn_accuracy": ("k-NN accuracy", True),
    "rank_me": ("RankMe", None),
    "loss": ("loss", None),  # of other methods or conditionings it is another loss
}


def write_page(folder: Path, workdirs: Mapping[Run, Path], evaluation: Path | None) -> Path:
    """Writes `report.html`, `report.json` and `report.csv`; seeds of a subject are one column.

    Args:
      folder: of the sweep.
      workdirs: of the finished runs.
      evaluation: folder of the evaluation's report, which has the same subjects and seeds.

    Returns:
      The path of the page.
    """
    subjects: dict[str, list[list[Finding]]] = {}
    facts: dict[str, dict[str, object]] = {}
    for run, workdir in workdirs.items():
        subjects.setdefault(run.subject, []).append(pretraining_findings(run.config, workdir))
        facts.setdefault(run.subject, {"config": flat_settings(run.config)})
    if evaluation:
        found, known = read_report(evaluation / JSON)
        for name, seeds in found.items():
            for mine, its in zip(subjects[name], seeds, strict=True):
                mine += its
        facts |= known
    seeds = ", ".join(f"{name}: {len(runs)}" for name, runs in subjects.items())
    summary = f"Runs of each, over which a mean ± half its 95 % interval is given: {seeds}."
    return write_report(folder, subjects, title="Sweep", summary=summary, provenance=facts)


def pretraining_findings(config: ConfigDict, workdir: Path) -> list[Finding]:
    """The last value of each metric, and its course where there is one."""
    dataset, curves = _dataset(config), read_metrics(workdir)
    findings: list[Finding] = []
    for metric, (name, higher_is_better) in _METRICS.items():
        if metric not in curves:
            continue
        value = curves[metric][-1][1]
        findings.append(Score(TASK, dataset, name, value, higher_is_better=higher_is_better))
        if len(curves[metric]) > 1:
            findings.append(Chart(TASK, dataset, name, "step", name, {name: curves[metric]}))
    return findings


def _dataset(config: ConfigDict) -> str:
    return config.data.name or config.data.source
