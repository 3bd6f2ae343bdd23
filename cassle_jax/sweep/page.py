"""Writes the page of a sweep: metrics and evaluation results, one column per setting."""

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from cassle_jax.config import flat_settings
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.report.evaluation_page import JSON, read_report, write_report
from cassle_jax.sweep.space import RunSpec
from cassle_jax.training.metrics import read_metrics

TASK = "pretraining"
# Names of the logged metrics on the page, and whether higher is better.
_METRICS = {
    "knn_accuracy": ("k-NN accuracy", True),
    "rank_me": ("RankMe", None),
    "loss": ("loss", None),  # not comparable across methods and conditionings
}


def write_page(folder: Path, workdirs: Mapping[RunSpec, Path], evaluation: Path | None) -> Path:
    """Writes `report.html`, `report.json` and `report.csv`, with one column per subject.

    Args:
      folder: the sweep's folder.
      workdirs: workdirs of the finished runs.
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
        evaluated, known = read_report(evaluation / JSON)
        for name, seeds in evaluated.items():
            for pretrained, scores in zip(subjects[name], seeds, strict=True):
                pretrained += scores
        facts |= known
    seeds = ", ".join(f"{name}: {len(runs)}" for name, runs in subjects.items())
    summary = f"Values are means over runs ± half the 95 % interval. Number of runs: {seeds}."
    return write_report(folder, subjects, title="Sweep", summary=summary, provenance=facts)


def pretraining_findings(config: ConfigDict, workdir: Path) -> list[Finding]:
    """The last value per metric, and its curve where the run logged several values."""
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
