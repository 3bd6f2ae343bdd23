"""Reports the metrics that a run logged, for a page beside the results of its evaluation."""

from etils import epath
from ml_collections import ConfigDict

from cassle_jax.data.families import FAMILIES
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.storage import path_of
from cassle_jax.training.metrics import read_metrics

TASK = "pretraining"
# Names of the logged metrics on the page, and whether higher is better.
_METRICS = {
    "knn_accuracy": ("k-NN accuracy", True),
    "rank_me": ("RankMe", None),
    "loss": ("loss", None),  # not comparable across methods and conditionings
}


def pretraining_findings(config: ConfigDict, workdir: epath.PathLike) -> list[Finding]:
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
    """The builder of tfds, the family of drawn images, or the folder of others."""
    data = config.data
    names = {"tfds": data.name} | dict.fromkeys(FAMILIES, data.source)
    return names.get(data.source) or path_of(data.path).name or data.source
