"""The contrastive loss in NumPy, as its paper writes it."""

import numpy as np

from tests.methods.one_device import unit


def cosines(first, second):
    """The cosine of each row of one array with each row of the other."""
    return unit(np.float64(first)) @ unit(np.float64(second)).T


def naive_nt_xent(first, second, temperature):
    """SimCLR's equation 1, term by term: every embedding finds its partner among all but itself."""
    both = np.concatenate([first, second])
    similarity = np.exp(cosines(both, both) / temperature)
    n, terms = len(first), []
    for i in range(2 * n):
        others = sum(similarity[i, k] for k in range(2 * n) if k != i)
        terms.append(-np.log(similarity[i, (i + n) % (2 * n)] / others))
    return np.mean(terms)
