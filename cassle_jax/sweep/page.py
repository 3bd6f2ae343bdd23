"""Writes the page of a sweep: metrics and evaluation results, one column per setting."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cassle_jax.config import ARGUMENTS, flat_settings
from cassle_jax.evaluation.findings import Finding
from cassle_jax.report.files import JSON, read_report, write_report
from cassle_jax.report.overview import Pairing
from cassle_jax.sweep.space import RunSpec, Values
from cassle_jax.training.findings import pretraining_findings

# Arguments that decide how a run uses ω; a plain run has "none" for each.
_VARIANT = tuple(name for name in ARGUMENTS if name not in ("method", "follow"))


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
    return write_report(
        folder, subjects, title="Sweep", provenance=facts, pairing=_pairing(list(workdirs))
    )


def _pairing(runs: Sequence[RunSpec]) -> Pairing:
    """Pairs each run with its baseline: the run without ω whose other values are the same."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.subject, []).append(run.config.seed)
    named = {_others(run.values): run.subject for run in runs}
    plain = {run.subject: named.get(_others(_plain(run.values)), "") for run in runs}
    return Pairing(seeds, {name: other for name, other in plain.items() if other not in ("", name)})


def _plain(values: Values) -> Values:
    return values | {name: "none" for name in _VARIANT if name in values}


def _others(values: Values) -> frozenset[tuple[str, str]]:
    """The values without the seed."""
    return frozenset((name, value) for name, value in values.items() if name != "seed")
