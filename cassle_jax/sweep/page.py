"""Writes the page of a sweep: metrics and evaluation results, one column per setting."""

from collections.abc import Mapping
from pathlib import Path

from cassle_jax.config import flat_settings
from cassle_jax.evaluation.findings import Finding
from cassle_jax.report.evaluation_page import JSON, read_report, write_report
from cassle_jax.sweep.space import RunSpec
from cassle_jax.training.findings import pretraining_findings


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
