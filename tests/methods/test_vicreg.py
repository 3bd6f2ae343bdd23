"""VICReg against its paper's equations, on one device and on eight, and in a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.methods import VICReg, losses
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from tests.methods.one_device import compiled, random_views, training

BATCH, WIDTH, DEVICES = 16, 5, 8
WEIGHTS = {"variance_weight": 3.0, "invariance_weight": 5.0, "covariance_weight": 2.0}


@pytest.fixture(scope="module")
def embeddings():
    """Some units spread more than 1, some less, and neighbours covary."""
    draw = np.random.default_rng(0).normal(size=(2, BATCH, WIDTH))
    draw *= np.linspace(0.2, 1.5, WIDTH)
    draw[..., 1:] += 0.5 * draw[..., :-1]
    return tuple(jnp.asarray(each + 3, jnp.float32) for each in draw)


def papers_terms(first, second):
    """Variance, invariance and covariance as eqs. 1 to 5 have them, in double precision."""
    first, second = np.float64(first), np.float64(second)
    count, width = first.shape
    variance, covariance = 0.0, 0.0
    for view in (first, second):
        mean = sum(view) / count
        c = sum(np.outer(row - mean, row - mean) for row in view) / (count - 1)
        deviations = np.sqrt(np.diag(c) + 1e-4)
        variance += np.maximum(0, 1 - deviations).sum() / width
        covariance += sum(c[i, j] ** 2 for i in range(width) for j in range(width) if i != j)
    # The paper takes sums over views and over a difference's units, the authors' code means.
    return variance / 2, ((first - second) ** 2).mean(), covariance / width


def papers_gradients(*views, step=1e-6):
    """The gradients of the sum of the terms, by central differences."""
    gradients = np.zeros((2, *views[0].shape))
    for place in np.ndindex(gradients.shape):
        change = np.zeros_like(gradients)
        change[place] = step
        above, below = papers_terms(*(views + change)), papers_terms(*(views - change))
        gradients[place] = (sum(above) - sum(below)) / (2 * step)
    return gradients


def pytorchs_terms_and_gradients(first, second):
    """The same by PyTorch's statistics and its automatic differentiation."""
    import torch

    views = [torch.tensor(np.float64(each), requires_grad=True) for each in (first, second)]
    hinges, off_diagonals = [], []
    for view in views:
        deviation = torch.sqrt(torch.var(view, dim=0, correction=1) + 1e-4)
        hinges.append(torch.clamp(1 - deviation, min=0).mean())
        covariance = torch.cov(view.T)
        off_diagonals.append(sum(c**2 for c in (covariance - covariance.diag().diag()).flatten()))
    terms = (
        sum(hinges) / 2,
        torch.nn.functional.mse_loss(*views),
        sum(off_diagonals) / WIDTH,
    )
    sum(terms).backward()
    return [term.item() for term in terms], [view.grad.numpy() for view in views]


def terms_and_gradients(first, second):
    def total(first, second):
        terms = losses.variance_invariance_covariance(first, second, None)
        return sum(terms), terms

    differentiate = compiled(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, terms), gradients = differentiate(first, second)
    return terms, gradients


def test_the_terms_are_the_papers_with_their_gradient(embeddings):
    terms, gradients = terms_and_gradients(*embeddings)
    expected = papers_terms(*embeddings)
    assert min(expected) > 0.05
    np.testing.assert_allclose(terms, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients, papers_gradients(*embeddings), rtol=1e-4, atol=1e-6)


@pytest.mark.pytorch
def test_the_terms_are_pytorchs_with_their_gradient(embeddings):
    expected, expected_gradients = pytorchs_terms_and_gradients(*embeddings)
    terms, gradients = terms_and_gradients(*embeddings)
    np.testing.assert_allclose(terms, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_eight_devices_are_one(embeddings):
    """The gradient as a training step takes it: of weights that all devices have alike."""

    def value_and_gradient(weights, first, second, axis_name=None):
        def loss(weights):
            terms = losses.variance_invariance_covariance(
                first @ weights, second @ weights, axis_name
            )
            return sum(terms), terms

        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        result = terms, gradient
        return result if axis_name is None else jax.lax.pmean(result, axis_name)

    weights = jnp.eye(WIDTH) + 0.1
    split = parallel(
        lambda *arrays: value_and_gradient(*arrays, axis_name=AXIS),
        device_mesh(jax.devices()[:DEVICES]),
        inputs=(REPLICATED, SHARDED, SHARDED),
        outputs=REPLICATED,
    )(weights, *embeddings)
    whole = compiled(value_and_gradient)(weights, *embeddings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), split, whole)


def test_a_collapsed_batch_costs_all_of_the_variance_and_nothing_else():
    same = jnp.tile(jnp.array([[1.0, -2.0, 3.0]]), (4, 1))
    variance, invariance, covariance = losses.variance_invariance_covariance(same, same, None)
    np.testing.assert_allclose(variance, 1 - np.sqrt(1e-4), rtol=1e-6)
    assert invariance == 0 and covariance == 0


@pytest.mark.exhaustive
def test_the_weighted_terms_are_logged_and_add_up_to_the_loss():
    method = VICReg(projector_hidden=8, projector_out=WIDTH, **WEIGHTS)
    _, state, update, embed = training(method)
    views = random_views(1)
    _, metrics = update(state, views)
    embed = compiled(embed)
    first, second = (
        embed(state.params, state.batch_stats, view)[0].projection for view in views.views
    )
    variance, invariance, covariance = papers_terms(first, second)
    np.testing.assert_allclose(metrics["loss_variance"], 3 * variance, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_invariance"], 5 * invariance, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_covariance"], 2 * covariance, rtol=1e-4)
    terms = [value for name, value in metrics.items() if name.startswith("loss_")]
    assert len(terms) == 3
    np.testing.assert_allclose(metrics["loss"], sum(terms), rtol=1e-6)


def test_the_expander_is_the_papers():
    shape = VICReg().projector(2048)
    assert (shape.hidden, shape.out, shape.depth, shape.last_bn) == (8192, 8192, 3, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"invariance_weight": -1.0}, r"^method\.invariance_weight=-1\.0 must be at least 0$"),
        ({"variance_weight": float("nan")}, r"^method\.variance_weight=nan must be at least 0$"),
        ({"covariance_weight": -0.1}, r"^method\.covariance_weight=-0\.1 must be at least 0$"),
        ({"projector_depth": 0}, r"^method\.projector_depth=0 must be at least 1$"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        VICReg(**settings)
