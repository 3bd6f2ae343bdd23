import numpy as np
import pytest
from scipy.optimize import linprog
from sklearn.linear_model import LinearRegression, QuantileRegressor
from sklearn.metrics import r2_score
from sklearn.svm import LinearSVR

from cassle_jax.evaluation.regression import _r2_pooled, regression
from cassle_jax.solvers import absolute_error
from cassle_jax.solvers.absolute_error import fit_absolute


def landmarks(rows: int, seed: int, width: int = 8, targets: int = 3, noise: float = 0.05):
    """Targets near 0.5 that are linear in the features, but for noise with outliers."""
    mixing = np.random.default_rng(0).normal(size=(width, targets)) / width
    generator = np.random.default_rng(seed)
    features = np.maximum(generator.normal(size=(rows, width)) + 0.5, 0).astype(np.float32)
    values = features @ mixing + 0.5 + noise * generator.laplace(size=(rows, targets))
    return features, values.astype(np.float32)


def objective(theta: np.ndarray, features: np.ndarray, target: np.ndarray, penalty: float):
    left = target - features @ theta[:-1] - theta[-1]
    return np.sum(np.abs(left)) + penalty * np.sum(theta**2)


def optimum(features: np.ndarray, target: np.ndarray, penalty: float) -> np.ndarray:
    """θ by scikit-learn: liblinear's ½‖θ‖² + C·Σ |y − θᵀx|, the intercept penalised too."""
    machine = LinearSVR(epsilon=0, C=1 / (2 * penalty), tol=1e-8, max_iter=1_000_000)
    machine.fit(features.astype(float), target)
    return np.append(machine.coef_, machine.intercept_)


def test_fits_are_the_optima(monkeypatch):
    monkeypatch.setattr(absolute_error, "_TOGETHER", 4)
    features, targets = landmarks(40, seed=1, width=4, targets=2)
    # Out of order, and enough to be solved in lots of three.
    penalties = [1.0, 0.1, 30.0, 0.05, 5.0, 0.3]
    path = fit_absolute(features, targets, penalties)
    assert path.converged.all()
    for index, penalty in enumerate(penalties):
        for target in range(2):
            values = targets[:, target].astype(float)
            best = objective(optimum(features, values, penalty), features, values, penalty)
            theta = np.append(path.weights[index, target], path.biases[index, target])
            found = objective(theta.astype(float), features, values, penalty)
            assert best * (1 - 1e-7) <= found <= best * (1 + 1e-4)
            assert path.objectives[index, target] == pytest.approx(found, rel=1e-5)


def test_without_a_penalty_the_fit_is_the_median_regression():
    features, targets = landmarks(150, seed=1)
    path = fit_absolute(features, targets, [1e-6])
    for target in range(3):
        values = targets[:, target]
        median = QuantileRegressor(quantile=0.5, alpha=0).fit(features, values)
        best = np.abs(values - median.predict(features)).sum()
        assert best * (1 - 1e-5) <= path.objectives[0, target] <= best * (1 + 1e-4)


@pytest.mark.parametrize("penalty", [1e-6, 1e-2])
def test_where_the_targets_can_be_met_they_are_by_the_shortest_fit(penalty):
    features, targets = landmarks(20, seed=1, width=50)
    path = fit_absolute(features, targets, [penalty])
    assert path.converged.all()
    rows = np.pad(features.astype(float), ((0, 0), (0, 1)), constant_values=1)
    shortest = np.linalg.pinv(rows) @ targets
    found = np.column_stack([path.weights[0], path.biases[0]]).T
    np.testing.assert_allclose(found, shortest, atol=2e-3 * np.abs(shortest).max())
    np.testing.assert_allclose(path.predict(features)[0], targets, atol=1e-4)


@pytest.mark.parametrize(("feature_scale", "target_scale"), [(30, 1), (1e-2, 1), (1, 200)])
def test_scales_do_not_matter_to_how_well_a_fit_is_found(feature_scale, target_scale):
    features, targets = landmarks(60, seed=2, targets=1)
    features, targets = features * np.float32(feature_scale), targets * np.float32(target_scale)
    path = fit_absolute(features, targets, [1e-6, 1e-5])
    assert path.converged.all()
    count, width = features.shape
    rows = np.pad(features.astype(float), ((0, 0), (0, 1)), constant_values=1)
    # θ is free; the residuals' parts above and below zero are not negative.
    program = linprog(
        np.r_[np.zeros(width + 1), np.ones(2 * count)],
        A_eq=np.hstack([rows, np.eye(count), -np.eye(count)]),
        b_eq=targets[:, 0],
        bounds=[(None, None)] * (width + 1) + [(0, None)] * (2 * count),
    )
    theta = np.append(path.weights[0, 0], path.biases[0, 0]).astype(float)
    least = program.fun + 1e-6 * np.sum(program.x[: width + 1] ** 2)
    assert objective(theta, features, targets[:, 0], 1e-6) <= least * (1 + 1e-4)


@pytest.mark.exhaustive
def test_scores_are_those_of_scikit_learn():
    train, val, test = (landmarks(80, seed=seed, noise=0.1) for seed in (1, 2, 3))
    penalties = np.logspace(-2, 4, 7)
    result = regression(train, val, test, penalties=penalties)
    path = fit_absolute(*train, penalties)
    scores = [r2_score(val[1], predicted) for predicted in path.predict(val[0])]
    np.testing.assert_allclose(result.val_score, scores)
    best = int(np.argmax(scores))
    assert result.penalty == penalties[best]

    both = [np.concatenate(parts) for parts in zip(train, val, strict=True)]
    refit = fit_absolute(*both, [penalties[best]])
    np.testing.assert_allclose(result.weights, refit.weights[0])
    predicted = test[0] @ result.weights.T + result.biases
    assert result.test_r2 == pytest.approx(r2_score(test[1], predicted), abs=1e-6)
    line = LinearRegression().fit(predicted.reshape(-1, 1), test[1].ravel())
    pooled = line.score(predicted.reshape(-1, 1), test[1].ravel())
    assert result.test_r2_pooled == pytest.approx(pooled, abs=1e-6)
    assert 0.1 < result.test_r2 < result.test_r2_pooled < 1

    own, published, missed, curve = result.findings("300W")
    assert (own.value, published.value) == (result.test_r2, result.test_r2_pooled)
    assert (missed.metric, missed.value) == ("fits that did not converge", 0)
    assert curve.series["validation"][best] == (pytest.approx(best - 2), pytest.approx(max(scores)))


def test_the_published_score_chooses_where_it_is_requested():
    train, val, test = (landmarks(80, seed=seed, noise=0.1) for seed in (1, 2, 3))
    penalties = [1e5, 1e6, 1.0, 1e7, 1e8, 1e9, 1e10]
    result = regression(train, val, test, penalties=penalties, metric="r2_pooled")
    assert result.penalty == 1.0
    assert result.findings("LSP")[-1].y_label == "R² pooled"

    # Without a feature, and the same targets thrice, nothing is left to correlate.
    splits = [(part[0] * 0, np.repeat(part[1][:, :1], 3, axis=1)) for part in (train, val, test)]
    nothing = regression(*splits, penalties=penalties, metric="r2_pooled")
    assert nothing.test_r2_pooled == 0
    assert nothing.penalty == 1e5
    targets, apart = np.array([[1.0, -1.0, 1.0, -1.0]]), np.array([[1.0, 1.0, -1.0, -1.0]])
    assert _r2_pooled(targets, apart) == 0


def test_a_warning_names_the_penalties_that_did_not_converge():
    features, targets = landmarks(150, seed=1)
    with pytest.warns(UserWarning, match="did not converge for the penalties 1e-06; raise max_s"):
        path = fit_absolute(features, targets, [1e-6, 1e5], max_steps=40)
    assert path.converged.tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((8, 3), np.nan, np.float32)}, "features that are not finite"),
        ({"targets": np.full((8, 2), np.inf, np.float32)}, "targets that are not finite"),
        ({"features": np.zeros((0, 3), np.float32)}, r"features of shape \(0, 3\)"),
        ({"targets": np.zeros((7, 2), np.float32)}, r"targets of shape \(7, 2\) for 8 rows"),
        ({"penalties": [1.0, 0.0]}, "penalties=0.0 must be above 0"),
        ({"penalties": []}, r"penalties of shape \(0,\)"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    features, targets = landmarks(8, seed=1, width=3, targets=2)
    arguments = {"features": features, "targets": targets, "penalties": [1.0]}
    with pytest.raises(ValueError, match=message):
        fit_absolute(**arguments | change)


def test_bad_splits_are_named():
    train, test = landmarks(20, seed=1), landmarks(20, seed=2, targets=2)
    with pytest.raises(ValueError, match=r"test has features of shape \(20, 8\) and targets of"):
        regression(train, train, test)
    flat = (train[0], np.column_stack([train[1][:, :2], np.ones(20)]).astype(np.float32))
    with pytest.raises(ValueError, match="val has the same value of target 2 in every row"):
        regression(train, flat, train)
    with pytest.raises(ValueError, match="metric='mse' is unknown; use one of r2, r2_pooled"):
        regression(train, train, train, metric="mse")
