"""Renames the findings in reports of earlier versions, so that they compare with today's."""

import dataclasses
import re

from cassle_jax.evaluation.findings import Finding, Score

_TASKS = {
    "few-shot": "few_shot",
    "factor probes": "factors",
    "augmentation probes": "augmentation_probes",
    "SGD probe": "sgd_probe",
    "linear, random splits": "linear_resampled",
    "k-NN (k = 1)": "knn",
}
# Names that contained a setting, which is now in the metric's name.
_WITH_SETTING = {r"k-NN \((k = \d+)\)": "knn", r"fine-tuning, (.*)": "fine_tune"}


def renamed(finding: Finding) -> Finding:
    """The finding under today's name of its protocol."""
    if finding.task in _TASKS:
        return dataclasses.replace(finding, task=_TASKS[finding.task])
    for pattern, name in _WITH_SETTING.items():
        found = re.fullmatch(pattern, finding.task)
        if found and isinstance(finding, Score):
            return dataclasses.replace(finding, task=name, metric=f"{finding.metric}, {found[1]}")
    return finding
