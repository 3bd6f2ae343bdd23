import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from cassle_jax.evaluation import few_shot as few_shot_module
from cassle_jax.evaluation.few_shot import FewShotResult, few_shot
from cassle_jax.report.comparison import rows_of
from cassle_jax.report.files import write_report
from cassle_jax.solvers.one_against_rest import fit_one_against_rest
from tests.evaluation.traced import peak_bytes


def clusters(rows: int, seed: int = 0, classes: int = 6, width: int = 40, scale: float = 1):
    """Features above zero, as after a ReLU, of classes that overlap."""
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    centres = generator.normal(size=(classes, width))
    features = scale * np.maximum(centres[labels] + 2 * generator.normal(size=(rows, width)), 0)
    return features.astype(np.float32), labels


def witness(support: np.ndarray, tolerance: float) -> OneVsRestClassifier:
    ways, shots, width = support.shape
    liblinear = LogisticRegression(solver="liblinear", tol=tolerance, max_iter=10_000)
    labels = np.repeat(np.arange(ways), shots)
    return OneVsRestClassifier(liblinear).fit(support.reshape(-1, width), labels)


@pytest.mark.parametrize(
    ("ways", "shots", "width", "scale"),
    [(5, 1, 40, 1), (5, 5, 40, 1), (3, 5, 4, 1), (5, 5, 40, 30), (5, 5, 40, 1e-2)],
)
def test_weights_are_those_of_liblinear(ways, shots, width, scale):
    features, labels = clusters(300, width=width, scale=scale)
    support = np.stack([features[labels == label][:shots] for label in range(ways)])
    fit = fit_one_against_rest(support[None])
    assert fit.converged.all()
    expected = witness(support, tolerance=1e-10)
    for way, estimator in enumerate(expected.estimators_):
        largest = np.abs(estimator.coef_).max()
        np.testing.assert_allclose(
            fit.weights[0, way], estimator.coef_[0], rtol=1e-4, atol=1e-4 * largest
        )
        np.testing.assert_allclose(
            fit.intercepts[0, way], estimator.intercept_[0], rtol=1e-4, atol=1e-4 * largest
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (2, 5), (6, 3)])
def test_accuracies_are_those_of_scikit_learn(ways, shots, monkeypatch):
    monkeypatch.setattr(few_shot_module, "_TOGETHER", 7)
    features, labels = clusters(240)
    result = few_shot(features, labels * 3 - 4, ways=ways, shots=shots, episodes=17, seed=3)
    rows_of = [np.flatnonzero(labels == label) for label in range(6)]
    drawn = few_shot_module._draw(rows_of, ways, shots + 16, 17, seed=3)
    right = []
    for episode in drawn:
        fit = witness(features[episode[:, :shots]], tolerance=1e-4)
        found = fit.predict(features[episode[:, shots:]].reshape(-1, features.shape[1]))
        right.append(np.mean(found == np.repeat(np.arange(ways), 16)))
    np.testing.assert_allclose(result.accuracies, right, atol=1e-12)
    assert 1 / ways < result.mean < 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mean", "scale"), [(100, 0.1), (300, 0.3), (0, 1e-6), (0, 1e5)], ids=str)
def test_accuracies_do_not_depend_on_the_features_mean_and_scale(mean, scale):
    features, labels = clusters(200, classes=5, width=256)
    features = (mean + scale * (features - features.mean())).astype(np.float32)
    result = few_shot(features, labels, episodes=6, shots=2)
    assert result.converged.all()
    drawn = few_shot_module._draw([np.flatnonzero(labels == k) for k in range(5)], 5, 18, 6, 0)
    # In float64, with the bias as the weight of a one.
    inputs = np.pad(features.astype(np.float64), ((0, 0), (0, 1)), constant_values=1)
    newton = LogisticRegression(
        solver="newton-cholesky", fit_intercept=False, tol=1e-13, max_iter=1000
    )
    right = []
    for episode in drawn:
        support, queries = (inputs[part.ravel()] for part in (episode[:, :2], episode[:, 2:]))
        fit = OneVsRestClassifier(newton).fit(support, np.repeat(np.arange(5), 2))
        scores = queries @ np.concatenate([each.coef_ for each in fit.estimators_]).T
        right.append(np.mean(scores.argmax(axis=1) == np.repeat(np.arange(5), 16)))
    np.testing.assert_allclose(result.accuracies, right, atol=1e-12)
    assert np.mean(right) > 0.3


def test_episodes_are_computed_together_as_the_memory_allows(monkeypatch):
    monkeypatch.setattr(few_shot_module, "_WORKING_BYTES", 4 << 20)
    features, labels = clusters(150, width=512)
    few_shot(features, labels, shots=5, episodes=15)  # compiles
    assert peak_bytes(lambda: few_shot(features, labels, shots=5, episodes=15)) < 4 << 20


def test_episodes_hold_different_classes_and_different_images():
    labels = np.arange(200) % 8
    rows_of = [np.flatnonzero(labels == label) for label in range(8)]
    drawn = few_shot_module._draw(rows_of, 5, 21, 100, seed=0)
    for episode in drawn:
        assert len(np.unique(episode)) == 5 * 21
        assert all(len(np.unique(labels[images])) == 1 for images in episode)
        assert len(np.unique(labels[episode[:, 0]])) == 5
    # All images take part, and the classes come up equally often.
    assert len(np.unique(drawn)) == 200
    assert np.bincount(labels[drawn[:, :, 0]].ravel()).min() > 40


def test_the_interval_and_the_finding():
    features, labels = clusters(150)
    first, same, other = (few_shot(features, labels, episodes=20, seed=seed) for seed in (1, 1, 2))
    assert first.accuracies.tolist() == same.accuracies.tolist() != other.accuracies.tolist()
    assert first.interval == pytest.approx(1.96 * np.std(first.accuracies) / np.sqrt(20))
    score, missed = first.findings("CUB-200")
    assert (score.task, score.dataset, score.metric) == (
        "few_shot",
        "CUB-200",
        "5-way 1-shot accuracy",
    )
    assert (score.value, score.interval) == (first.mean, first.interval)
    assert (missed.metric, missed.value) == ("5-way 1-shot fits that did not converge", 0)
    assert few_shot(features, labels, episodes=1).findings("CUB-200")[0].interval is None


def test_a_seed_whose_fits_all_converged_counts_in_the_mean_of_those_that_did_not():
    of_seeds = [
        FewShotResult(5, 1, 16, np.zeros(3), np.array(converged))
        for converged in (3 * [True], [True, False, False])
    ]
    subjects = {"run": [each.findings("CUB-200") for each in of_seeds]}
    *_, missed = rows_of(subjects, "few_shot")
    assert missed.metric.endswith("fits that did not converge")
    assert missed.estimates["run"].values == (0, 2) and missed.estimates["run"].mean == 1


def test_what_no_fit_can_solve_is_said_of_every_number_of_shots(tmp_path):
    features, labels = clusters(150, scale=1e8)
    findings = []
    for shots in (1, 5):
        with pytest.warns(UserWarning, match="of 4 episodes did not reach their optimum"):
            result = few_shot(features, labels, shots=shots, episodes=4)
        findings += result.findings("CUB-200")
    write_report(tmp_path, {"run": [findings]})
    missed = {score.metric: score.value for score in findings[1::2]}
    assert missed["5-way 1-shot fits that did not converge"] == 4
    assert missed["5-way 5-shot fits that did not converge"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((40, 3), np.nan, np.float32)}, "features holds values that are not"),
        ({"features": np.zeros((0, 3), np.float32)}, r"features of shape \(0, 3\)"),
        ({"labels": np.zeros(5, int)}, r"labels of shape \(5,\) do not fit 40 rows"),
        ({"labels": np.zeros(40, int)}, "ways=2 is more than the 1 classes"),
        ({"labels": np.arange(40) // 28}, r"class 1 has 12 images; an episode takes 17"),
        ({"ways": 1}, "ways=1 must be at least 2"),
        ({"shots": 0}, "shots=0 must be at least 1"),
        ({"episodes": 0}, "episodes=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "features": np.ones((40, 3), np.float32),
        "labels": np.arange(40) % 2,
        "ways": 2,
        "shots": 1,
    }
    with pytest.raises(ValueError, match=message):
        few_shot(**arguments | change)
