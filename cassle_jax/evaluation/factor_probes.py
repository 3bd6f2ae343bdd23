"""Predicts known factors of the images from frozen features, with linear probes."""

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

from cassle_jax.checks import check_finite
from cassle_jax.data import Drawn
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Chart, Finding, Score
from cassle_jax.evaluation.needs import Needs
from cassle_jax.evaluation.protocol import DRAWN, Protocol
from cassle_jax.evaluation.settings import Settings
from cassle_jax.evaluation.store import Features

FactorKind = Literal["class", "value", "angle"]

_VALIDATION_SHARE = 0.2


def probe_factors(
    train_features: Float[Array | np.ndarray, "train features"],
    train_factors: Mapping[str, np.ndarray],
    test_features: Float[Array | np.ndarray, "test features"],
    test_factors: Mapping[str, np.ndarray],
    kinds: Mapping[str, FactorKind],
) -> dict[str, float]:
    """Scores linear probes that predict each factor from the features of unseen images.

    A score is 1 − error / error of the best constant answer, on the test rows: 1 is perfect, 0 is
    as good as the constant answer, below 0 is worse.

    ======= ======================= ============================ ===========================
    kind    factor                  probe                        error
    ======= ======================= ============================ ===========================
    class   integers or names       multinomial logistic         share of wrong answers
    value   numbers                 ridge                        squared error (R²)
    angle   radians, period 2π      ridge on (sin, cos)          squared distance (joint R²)
    ======= ======================= ============================ ===========================

    The best constant answers are the most frequent class and the mean of the test rows. Features
    are standardised with the training rows' mean and deviation. The penalty, in units of the mean
    loss, is the power of ten (1 to 1e-3 for a class, 100 to 1e-5 otherwise) that does best on a
    fifth of the training rows, drawn with a fixed seed; the probe is then fitted to all of them.

    Args:
      train_features: Frozen features, one row per image.
      train_factors: The value for every training row, by factor.
      test_features: Features of other images.
      test_factors: The value for every test row, by factor.
      kinds: The kinds of the factors to probe, by name; the scores keep this order.

    Returns:
      The scores by factor.

    Raises:
      ValueError: If a factor is missing, has another length than the features, is not finite, or is
        the same in all training or all test rows; if a feature is not finite; or if there are fewer
        than ten training rows.
    """
    train, test = _standardised(train_features, test_features)
    # A fixed seed: the split is the same for every factor and every call.
    order = np.random.default_rng(0).permutation(len(train))
    validation, fit = np.split(order, [int(_VALIDATION_SHARE * len(train))])
    probes = {kind: _Logistic if kind == "class" else _Ridge for kind in kinds.values()}
    on_fit = {probe: probe(train[fit]) for probe in set(probes.values())}
    on_all = {probe: probe(train) for probe in set(probes.values())}

    def probe_factor(name, kind):
        target = _target(train_factors, name, kind, len(train), "train")
        test_target = _target(test_factors, name, kind, len(test), "test")
        probe = probes[kind]
        answers = on_fit[probe].predict(target[fit], probe.penalties, train[validation])
        validated = [_score(kind, answer, target[validation]) for answer in answers]
        # Penalties go from strong to weak: ties go to the stronger one.
        chosen = probe.penalties[int(np.argmax(validated))]
        (answer,) = on_all[probe].predict(target, [chosen], test)
        return _score(kind, answer, test_target)

    # On busy cores the threads of these small fits spend far longer waiting than working: those of
    # OpenMP, and those of BLAS, which SciPy's L-BFGS starts at each of its steps.
    with threadpool_limits(1):
        return {name: probe_factor(name, kind) for name, kind in kinds.items()}


def group_means(scores: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """The mean score per group of factors.

    Args:
      scores: The score per factor.
      groups: The group per factor.

    Returns:
      The means by group, in the order in which the groups first occur.
    """
    members: dict[str, list[float]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(scores[name])
    return {group: float(np.mean(each)) for group, each in members.items()}


def _standardised(train_features, test_features) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.preprocessing import StandardScaler  # commands start faster without scikit-learn

    train, test = (
        np.asarray(jax.device_get(features), np.float32)
        for features in (train_features, test_features)
    )
    if len(train) < 10:
        raise ValueError(f"{len(train)} training rows are too few for a probe; use at least 10")
    for name, features in (("train_features", train), ("test_features", test)):
        check_finite(name, features)
    scaler = StandardScaler().fit(train)
    return scaler.transform(train), scaler.transform(test)


def _target(
    factors: Mapping[str, np.ndarray], name: str, kind: FactorKind, rows: int, split: str
) -> np.ndarray:
    """A factor as the probe's target: labels [rows], values [rows, 1] or (sin, cos) [rows, 2]."""
    if name not in factors:
        raise ValueError(f"{split}_factors has no {name!r}; it has {', '.join(factors)}")
    factor = np.asarray(factors[name])
    if factor.shape != (rows,):
        raise ValueError(f"{split}_factors[{name!r}] has shape {factor.shape} for {rows} features")
    if kind != "class":
        check_finite(f"{split}_factors[{name!r}]", factor)
    if (factor == factor[0]).all():
        raise ValueError(f"{split}_factors[{name!r}] is {factor[0]} in every row")
    if kind == "class":
        return factor
    if kind == "value":
        return factor[:, None].astype(np.float64)
    return np.stack([np.sin(factor), np.cos(factor)], axis=1).astype(np.float64)


class _Logistic:
    """Multinomial logistic regressions of one set of rows, each started from the previous one."""

    penalties = (1.0, 1e-1, 1e-2, 1e-3)

    def __init__(self, features: np.ndarray):
        self._features = features

    def predict(
        self, labels: np.ndarray, penalties: Sequence[float], rows: np.ndarray
    ) -> list[np.ndarray]:
        from sklearn.linear_model import LogisticRegression

        if (labels == labels[0]).all():  # the validation rows hold all others
            return [np.full(len(rows), labels[0])] * len(penalties)
        # A gradient component below 1e-3 changes hardly any answer; this is ten times as quick.
        probe = LogisticRegression(warm_start=True, tol=1e-3, max_iter=1000)
        answers = []
        for penalty in penalties:
            probe.set_params(C=1 / (penalty * len(self._features)))
            answers.append(probe.fit(self._features, labels).predict(rows))
        return answers


class _Ridge:
    """Ridge regressions of one set of rows, whose decomposition serves all factors."""

    penalties = tuple(np.logspace(2, -5, 8))

    def __init__(self, features: np.ndarray):
        self._mean = features.mean(axis=0)
        centred = (features - self._mean).astype(np.float64)
        self._values, self._basis = np.linalg.eigh(centred.T @ centred)
        self._rotated = centred @ self._basis

    def predict(
        self, targets: np.ndarray, penalties: Sequence[float], rows: np.ndarray
    ) -> list[np.ndarray]:
        mean = targets.mean(axis=0)
        products = self._rotated.T @ (targets - mean)
        rotated = (rows - self._mean) @ self._basis
        shifted = [self._values + penalty * len(self._rotated) for penalty in penalties]
        return [mean + rotated @ (products / values[:, None]) for values in shifted]


def _score(kind: FactorKind, predicted: np.ndarray, factor: np.ndarray) -> float:
    """1 − error / error of the best constant answer."""
    if kind == "class":
        error = np.mean(predicted != factor)
        constant_error = 1 - np.unique(factor, return_counts=True)[1].max() / len(factor)
    else:
        error = np.sum((predicted.reshape(factor.shape) - factor) ** 2, dtype=np.float64)
        constant_error = np.sum((factor - factor.mean(axis=0)) ** 2, dtype=np.float64)
    # Only a small validation split can hold a single value.
    return float(1 - error / constant_error) if constant_error else float(-error)


def factor_findings(
    dataset: str, scores: Mapping[str, float], groups: Mapping[str, str]
) -> list[Finding]:
    """The scores of `probe_factors` as a table, each group's mean above its factors, and as bars.

    Args:
      dataset: Name of the dataset.
      scores: The score per factor.
      groups: The group per factor.
    """
    findings: list[Finding] = []
    for group, mean in group_means(scores, groups).items():
        findings.append(Score(PROTOCOL.name, dataset, f"mean, {group}", mean))
        findings.extend(
            Score(PROTOCOL.name, dataset, name, score)
            for name, score in scores.items()
            if groups[name] == group
        )
    bars = Chart(
        PROTOCOL.name,
        dataset,
        "How well a linear probe reads each factor (1 perfect, 0 a constant answer)",
        "factor",
        "score",
        {"features": tuple(scores.items())},
    )
    return [*findings, bars]


def _run(bench: Bench, _: Settings) -> list[Finding]:
    def factors(part: Features, source: Drawn) -> dict[str, np.ndarray]:
        return {name: values[part.places] for name, values in source.factors.items()}

    known = bench.data.test.FACTORS
    # The probes split off the validation rows they need.
    scores = probe_factors(
        bench.train.features,
        factors(bench.train, bench.data.train),
        bench.test.features,
        factors(bench.test, bench.data.test),
        {name: factor.kind for name, factor in known.items()},
    )
    groups = {name: factor.group for name, factor in known.items()}
    return factor_findings(bench.data.name, scores, groups)


PROTOCOL = Protocol(
    "factors",
    title="Factor probes",
    takes=(DRAWN,),
    needs=Needs(train=10),
    run=_run,
)
