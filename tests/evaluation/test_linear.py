import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from cassle_jax.evaluation.linear import PENALTIES, linear_evaluation
from cassle_jax.solvers.logistic import _curvatures, _factorised, fit_logistic, widest_floats


def blobs(rows: int, seed: int, classes: int = 4, width: int = 6, noise: float = 1.0):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, width))
    labels = generator.permutation(np.arange(rows) % classes)
    features = 3 + centres[labels] + noise * generator.normal(size=(rows, width))
    return features.astype(np.float32), labels


class Witness:
    """The objective in float64, as it is written, and how far a point is from the optimum."""

    def __init__(self, features, labels, classes):
        self.rows = np.column_stack([features, np.ones(len(features))]).astype(np.float64)
        self.is_label = np.eye(classes, dtype=bool)[labels]

    def __call__(self, theta, penalty):
        theta = theta.reshape(self.is_label.shape[1], -1)
        logits = self.rows @ theta.T
        logits -= logits[self.is_label][:, None]
        odds = np.where(self.is_label, 0, np.exp(logits)).sum(axis=1)
        objective = np.log1p(odds).sum() + penalty * np.sum(theta**2)
        wrong = np.where(self.is_label, -odds[:, None], np.exp(logits)) / (1 + odds[:, None])
        return objective, (wrong.T @ self.rows + 2 * penalty * theta).ravel()

    def excess(self, path, index: int) -> float:
        """A bound on the objective above the optimum, relative: ‖gradient‖² / 4w.

        The objective is 2w-strongly convex.
        """
        theta = np.column_stack([path.weights[index], path.biases[index]]).astype(np.float64)
        objective, gradient = self(theta, path.penalties[index])
        assert path.objectives[index] == pytest.approx(objective, rel=1e-6)
        return gradient @ gradient / (4 * path.penalties[index]) / objective


@pytest.mark.exhaustive
@pytest.mark.parametrize("penalty", [1e-6, 1e-3, 1.0, 1e3])
def test_objectives_agree_with_scipy_in_float64(penalty):
    features, labels = blobs(300, seed=1)
    witness = Witness(features, labels, 4)
    found = minimize(
        witness,
        np.zeros(4 * 7),
        args=(penalty,),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 20000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-8},
    )
    path = fit_logistic(features, labels, 4, [penalty])
    assert path.objectives[0] == pytest.approx(found.fun, rel=1e-6)
    np.testing.assert_allclose(path.biases.sum(), 0, atol=1e-3)


@pytest.mark.parametrize("penalty", [0.05, 20.0])
def test_weights_agree_with_scikit_learn(penalty):
    features, labels = blobs(300, seed=1)
    # Its intercept is free of the penalty; a column of ones is not.
    rows = np.column_stack([features, np.ones(300)]).astype(np.float64)
    model = LogisticRegression(C=1 / (2 * penalty), fit_intercept=False, tol=1e-10, max_iter=10000)
    model.fit(rows, labels)
    path = fit_logistic(features, labels, 4, [penalty])
    np.testing.assert_allclose(path.weights[0], model.coef_[:, :-1], atol=1e-3)
    np.testing.assert_allclose(path.biases[0], model.coef_[:, -1], atol=1e-3)


@pytest.mark.exhaustive
def test_separable_digits_are_solved_at_the_smallest_penalties():
    # 61 axes of very different lengths, pixels up to 16: the objective at 1e-6 is about 2e-4.
    features, labels = (array[:900] for array in load_digits(return_X_y=True))
    path = fit_logistic(features.astype(np.float32), labels, 10, PENALTIES)
    assert path.converged.all()
    assert path.objectives[0] < 1e-3
    witness = Witness(features, labels, 10)
    assert max(witness.excess(path, index) for index in range(45)) < 1e-5


def kinds_of_features():
    """Features of many scales, conditions and separabilities, most of the same shape."""
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    noise = generator.normal(size=(60, 5))
    near = noise + 2 * generator.normal(size=(3, 5))[labels]
    outlier = np.where(np.arange(60)[:, None] == 0, 1e3, near)
    yield "small", near * 1e-4, labels
    yield "large", near * 1e4, labels
    yield "of unlike scales", near * np.logspace(-4, 4, 5), labels
    yield "far from zero", near + 1000, labels
    yield "of which one repeats", near[:, [0, 1, 2, 0, 1]], labels
    yield "noise", noise, labels
    yield "far apart", 1e3 * np.eye(5)[labels] + noise, labels
    yield "all but collinear", noise[:, :1] + 1e-4 * near, labels
    yield "with an outlier", outlier, labels
    yield "with a rare class", near, np.where(np.arange(60) < 1, 0, 1 + np.arange(60) % 2)
    yield "more than the rows", np.tile(near[:8], 4) * 1e-2, labels[:8]


@pytest.mark.parametrize(
    ("features", "labels"), [pytest.param(*each, id=name) for name, *each in kinds_of_features()]
)
def test_all_penalties_converge_whatever_the_features(features, labels):
    features = features.astype(np.float32)
    check_optima(fit_logistic(features, labels, 3, PENALTIES), features, labels)


@pytest.mark.parametrize(("seed", "distance"), [(3, 1.4209), (11, 0.4995), (14, 0.7348)])
def test_classes_that_are_all_but_separable_take_few_steps(seed, distance):
    generator, labels = np.random.default_rng(seed), np.arange(60) % 5
    rows = distance * generator.normal(size=(5, 12))[labels] + generator.normal(size=(60, 12))
    mixed = rows @ generator.normal(size=(12, 12)) / np.sqrt(12)
    features = np.maximum(mixed + 0.3, 0).astype(np.float32)
    check_optima(fit_logistic(features, labels, 5, PENALTIES, max_steps=15), features, labels)


def check_optima(path, features, labels):
    """Every fit says that it converged; a Newton step in float64 gains less than 1e-6."""
    assert path.converged.all()
    rows = np.column_stack([features, np.ones(len(features))]).astype(np.float64)
    for index, penalty in enumerate(path.penalties):
        theta = np.column_stack([path.weights[index], path.biases[index]])
        logits = rows @ theta.T
        loss = logsumexp(logits, axis=1) - logits[np.arange(len(rows)), labels]
        gradient, hessian = derivatives(rows, labels, theta, penalty)
        # Newton's step, in units in which the Hessian's diagonal is 1.
        units = np.sqrt(np.diag(hessian))
        step = np.linalg.solve(hessian / np.outer(units, units), gradient / units)
        assert path.objectives[index] == pytest.approx(
            loss.sum() + penalty * np.sum(theta**2), rel=1e-6, abs=1e-9
        )
        assert step @ (gradient / units) / 2 < 1e-6 * path.objectives[index]


def test_a_factorised_step_is_the_solution_and_impossible_or_finished_ones_are_zero():
    generator = np.random.default_rng(0)
    shape = axes, penalties, classes = 4, 3, 5
    centred = np.kron(np.eye(axes), np.eye(classes) - 1 / classes)
    roots = generator.normal(size=(penalties, 20, 20)) @ centred
    hessians = np.swapaxes(roots, 1, 2) @ roots + 1e-3 * np.eye(20)
    hessians[2] = np.nan
    gradient = generator.normal(size=shape)
    gradient -= gradient.mean(axis=-1, keepdims=True)

    def product(vector):
        rows = jnp.moveaxis(vector, 1, 0).reshape(penalties, 20)
        flat = jnp.einsum("pij,pj->pi", hessians, rows).reshape(penalties, axes, classes)
        return jnp.moveaxis(flat, 0, 1), jnp.zeros((7, *shape[1:]))

    with widest_floats():
        given = jnp.asarray(gradient), None, jnp.zeros((7, *shape[1:])), None
        active = jnp.array([True, False, True])
        direction, _, decrease = _factorised(product, *given, active)
    flat = gradient[:, 0].ravel()
    expected = -np.linalg.solve(hessians[0], flat)
    np.testing.assert_allclose(direction[:, 0].ravel(), expected, rtol=1e-6)
    assert decrease[0] == pytest.approx(-flat @ expected / 2)
    assert not np.any(direction[:, 1:]) and decrease[1:].tolist() == [0, np.inf]


def derivatives(rows, labels, theta, penalty):
    """The gradient and all second derivatives of the objective, straight from its formula."""
    probabilities = softmax(rows @ theta.T, axis=1)
    wrong = probabilities - np.eye(len(theta))[labels]
    gradient = wrong.T @ rows + 2 * penalty * theta
    spread = probabilities[:, :, None] * (np.eye(len(theta)) - probabilities[:, None])
    hessian = np.einsum("nab,ni,nj->aibj", spread, rows, rows).reshape(theta.size, theta.size)
    return gradient.ravel(), hessian + 2 * penalty * np.eye(theta.size)


def test_more_rows_than_a_block_are_preconditioned_as_at_once(monkeypatch):
    rows, spread = np.random.default_rng(0).random((103, 5)), np.ones((103, 2, 3))
    spread *= np.arange(103)[:, None, None]
    monkeypatch.setattr("cassle_jax.solvers.logistic._CURVATURE_ROWS", 10)
    found = _curvatures(jnp.asarray(rows), jnp.asarray(spread))
    np.testing.assert_allclose(found, np.einsum("nd,npk->dpk", rows**2, spread), rtol=1e-5)


def test_more_features_than_rows():
    features, labels = blobs(20, seed=1, width=50)
    path = fit_logistic(features, labels, 4, [1e-5, 1e-1, 10.0])
    witness = Witness(features, labels, 4)
    assert max(witness.excess(path, index) for index in range(3)) < 1e-5


@pytest.mark.exhaustive
def test_solutions_do_not_depend_on_lots_order_or_start():
    features, labels = blobs(300, seed=1)
    penalties = [1e-3, 10.0, 0.1, 1.0, 1e-2]
    path = fit_logistic(features, labels, 4, penalties, together=2)
    alone = [fit_logistic(features, labels, 4, [penalty]) for penalty in penalties]
    started = fit_logistic(
        features, labels, 4, penalties, start=(path.weights[3], path.biases[3]), together=5
    )
    for objectives in ([each.objectives[0] for each in alone], started.objectives):
        np.testing.assert_allclose(path.objectives, objectives, rtol=2e-6)
    np.testing.assert_allclose(path.weights, started.weights, rtol=1e-2, atol=1e-2)


@pytest.mark.exhaustive
def test_heavy_penalties_end_at_the_optimum_and_stay_there():
    """Their optimum is one step away: then all slopes are rounding, and must not lead astray."""
    heavy = PENALTIES[PENALTIES > 1]
    for seed in range(6):
        features, labels = blobs(120, seed=seed, classes=2, width=3)
        witness = Witness(features, labels, 2)
        path = fit_logistic(features, labels, 2, heavy)
        for index, penalty in enumerate(heavy):
            start = path.weights[index], path.biases[index]
            again = fit_logistic(features, labels, 2, [penalty], start=start)
            assert path.converged[index] and again.converged[0]
            assert witness.excess(path, index) < 1e-6
            assert witness.excess(again, 0) < 1e-6


@pytest.mark.exhaustive
def test_metrics_are_those_of_scikit_learn_and_the_smallest_of_equals_is_taken():
    generator = np.random.default_rng(3)
    splits = []
    for seed in (1, 2, 3):
        features, labels = blobs(300, seed=seed, noise=1.5)
        # Two classes are rare, so that the two metrics differ.
        kept = (labels < 2) | (generator.random(300) < 0.2)
        splits.append((features[kept], labels[kept]))
    train, val, test = splits
    penalties = [1e-2, 1e-2, 1e3]
    result = linear_evaluation(
        train, val, test, classes=4, penalties=penalties, metric="mean_per_class"
    )
    path = fit_logistic(*train, 4, penalties)
    scores = [balanced_accuracy_score(val[1], labels) for labels in path.predict(val[0])]
    np.testing.assert_allclose(result.val_accuracy, scores)
    assert result.penalty == penalties[int(np.argmax(scores))]

    predicted = np.argmax(test[0] @ result.weights.T + result.biases, axis=1)
    assert result.test_accuracy == pytest.approx(accuracy_score(test[1], predicted))
    assert result.test_class_average == pytest.approx(balanced_accuracy_score(test[1], predicted))
    assert result.test_accuracy != pytest.approx(result.test_class_average, abs=1e-3)


def test_a_warning_names_the_penalties_that_did_not_converge():
    features, labels = blobs(120, seed=1)
    with pytest.warns(UserWarning, match=r"did not converge for the penalties 1e-06; raise"):
        path = fit_logistic(features, labels, 4, [1e-6, 1e5], together=1, max_steps=2)
    assert path.converged.tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((8, 3), np.nan, np.float32)}, "features that are not finite"),
        ({"features": np.zeros((0, 3), np.float32)}, r"features of shape \(0, 3\)"),
        ({"labels": np.zeros(7, int)}, r"labels of shape \(7,\) for 8 rows"),
        ({"labels": np.arange(8)}, "labels from 0 to 7; classes=3 takes 0 to 2"),
        ({"labels": np.arange(8) % 3 - 1}, "labels from -1 to 1"),
        ({"labels": np.ones(8, int)}, "labels are 1 in every row"),
        ({"classes": 1}, "classes=1 must be at least 2"),
        ({"penalties": [1.0, 0.0]}, "penalties=0.0 must be above 0"),
        ({"penalties": []}, r"penalties of shape \(0,\)"),
        ({"together": 0}, "together=0 must be at least 1"),
        ({"start": (np.zeros((3, 4)), np.zeros(3))}, r"start has weights of shape \(3, 4\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "features": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32),
        "labels": np.arange(8) % 3,
        "classes": 3,
        "penalties": [1.0],
    }
    with pytest.raises(ValueError, match=message):
        fit_logistic(**arguments | change)


def test_bad_splits_are_named():
    train, test = blobs(20, seed=1), blobs(20, seed=2, width=5)
    with pytest.raises(ValueError, match="test has 5 features; train has 6"):
        linear_evaluation(train, train, test, classes=4)
    with pytest.raises(ValueError, match="val has labels from 0 to 3; classes=3 takes 0 to 2"):
        linear_evaluation((train[0], train[1] % 3), train, train, classes=3)
    with pytest.raises(ValueError, match="metric='top5' is unknown"):
        linear_evaluation(train, train, train, classes=4, metric="top5")
