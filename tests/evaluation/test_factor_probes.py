import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from cassle_jax.evaluation.factor_probes import probe_factors

KINDS = {"shape": "class", "size": "value", "hue": "angle"}


def scenes(rows: int, seed: int, width: int = 32):
    """Features that are linear in shape, size and hue, among noise."""
    generator = np.random.default_rng(seed)
    factors = {
        "shape": generator.integers(4, size=rows),
        "size": generator.uniform(3, 9, size=rows),
        "hue": generator.uniform(0, 2 * np.pi, size=rows),
    }
    mixing = np.random.default_rng(0).normal(size=(7, width))
    known = np.column_stack(
        [
            np.eye(4)[factors["shape"]],
            factors["size"],
            np.sin(factors["hue"]),
            np.cos(factors["hue"]),
        ]
    )
    return (known @ mixing).astype(np.float32), factors


def noise_of(features: np.ndarray) -> np.ndarray:
    return np.random.default_rng(7).normal(size=features.shape).astype(np.float32)


def test_a_factor_in_the_features_scores_one_and_an_absent_one_zero():
    (train, train_factors), (test, test_factors) = scenes(800, seed=1), scenes(400, seed=2)
    read = probe_factors(train, train_factors, test, test_factors, KINDS)
    assert list(read) == list(KINDS)
    assert all(score > 0.99 for score in read.values()), read
    absent = probe_factors(noise_of(train), train_factors, noise_of(test), test_factors, KINDS)
    assert all(-0.15 < score < 0.15 for score in absent.values()), absent


def test_a_value_is_scored_by_r2():
    (train, train_factors), (test, test_factors) = scenes(300, seed=1), scenes(200, seed=2)
    train, test = train + 6 * noise_of(train), test + 6 * noise_of(test)
    score = probe_factors(train, train_factors, test, test_factors, {"size": "value"})["size"]
    scaler = StandardScaler().fit(train)
    fits = [
        Ridge(alpha=penalty * 300).fit(scaler.transform(train), train_factors["size"])
        for penalty in np.logspace(-5, 2, 8)
    ]
    witnesses = [
        r2_score(test_factors["size"], fit.predict(scaler.transform(test))) for fit in fits
    ]
    assert min(abs(score - witness) for witness in witnesses) < 1e-4
    assert 0.1 < score < 0.9


def test_values_far_from_zero_are_scored_by_what_they_differ_in():
    (train, train_factors), (test, test_factors) = scenes(300, seed=1), scenes(200, seed=2)
    scores = [
        probe_factors(
            train,
            {"size": train_factors["size"] + shift},
            test,
            {"size": test_factors["size"] + shift},
            {"size": "value"},
        )["size"]
        for shift in (0, 1e9)
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


def test_a_class_is_scored_above_the_most_frequent_one():
    generator = np.random.default_rng(0)
    labels = {"shape": np.array(["disc", "disc", "disc", "square"] * 50)}
    features = generator.normal(size=(200, 3)).astype(np.float32)
    # A probe that can only answer "disc" is right three times in four and has learnt nothing.
    flat = probe_factors(features * 0, labels, features * 0, labels, {"shape": "class"})
    assert flat["shape"] == pytest.approx(0)


def test_a_class_of_few_rows_is_probed_wherever_they_are():
    features = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    for row in range(20):
        labels = {"shape": np.where(np.arange(20) == row, "square", "disc")}
        read = probe_factors(features, labels, features, labels, {"shape": "class"})
        assert read["shape"] == pytest.approx(round(read["shape"]))


def test_what_little_features_differ_in_is_read():
    generator = np.random.default_rng(0)
    details = generator.normal(size=(1500, 256))
    features = (generator.normal(size=(1500, 1)) + 3e-3 * details).astype(np.float32)
    factor = details[:, :5].sum(axis=1)
    fitted, tested = slice(0, 1000), slice(1000, None)
    score = probe_factors(
        features[fitted],
        {"size": factor[fitted]},
        features[tested],
        {"size": factor[tested]},
        {"size": "value"},
    )["size"]
    scaled = StandardScaler().fit(features[fitted].astype(np.float64)).transform(features)
    ridge = Ridge(alpha=1e-5 * 1000, solver="svd").fit(scaled[fitted], factor[fitted])
    assert score == pytest.approx(r2_score(factor[tested], ridge.predict(scaled[tested])), abs=1e-4)


def test_an_angle_knows_no_seam():
    (train, train_factors), (test, test_factors) = scenes(500, seed=1), scenes(300, seed=2)
    turned = {"hue": test_factors["hue"] + 2 * np.pi}
    kinds = {"hue": "angle"}
    assert probe_factors(train, train_factors, test, turned, kinds)["hue"] == pytest.approx(
        probe_factors(train, train_factors, test, test_factors, kinds)["hue"], abs=1e-5
    )


def test_the_answer_does_not_depend_on_chance():
    (train, train_factors), (test, test_factors) = scenes(300, seed=1), scenes(200, seed=2)
    train = train + 3 * noise_of(train)
    first, second = (
        probe_factors(train, train_factors, test, test_factors, KINDS) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda factors: {}, r"train_factors has no 'size'"),
        (
            lambda factors: {"size": factors["size"][:5]},
            r"train_factors\['size'\] has shape \(5,\)",
        ),
        (lambda factors: {"size": factors["size"] * 0 + 2}, r"\['size'\] is 2.0 in every row"),
        (lambda factors: {"size": factors["size"] * np.inf}, "values that are not finite"),
    ],
)
def test_bad_factors_are_named(change, message):
    train, factors = scenes(100, seed=1)
    with pytest.raises(ValueError, match=message):
        probe_factors(train, change(factors), train, factors, {"size": "value"})


def test_bad_features_are_named():
    train, factors = scenes(100, seed=1)
    with pytest.raises(ValueError, match="test_features holds values that are not finite"):
        probe_factors(train, factors, train * np.float32(np.nan), factors, KINDS)
    few = {name: values[:9] for name, values in factors.items()}
    with pytest.raises(
        ValueError, match="9 training rows are too few for a probe; use at least 10"
    ):
        probe_factors(train[:9], few, train, factors, KINDS)


def test_small_fits_start_no_threads_whose_waiting_takes_longer_than_they_do(monkeypatch):
    fit, threads = LogisticRegression.fit, set()

    def watched(probe, *rows):
        threads.update(each["num_threads"] for each in threadpool_info())
        return fit(probe, *rows)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    (train, train_factors), (test, test_factors) = scenes(40, seed=1), scenes(40, seed=2)
    with threadpool_limits(2):
        probe_factors(train, train_factors, test, test_factors, {"shape": "class"})
    assert threads == {1}
