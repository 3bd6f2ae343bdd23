"""Groups rows by their label."""

import numpy as np
from jaxtyping import Int


def rows_by_label(labels: Int[np.ndarray, " rows"]) -> dict[int, Int[np.ndarray, " _"]]:
    """The rows of every label that occurs, both ascending.

    One sort finds them, whatever the number of labels.
    """
    order = np.argsort(labels, kind="stable")
    present, first = np.unique(labels[order], return_index=True)
    return dict(zip(present.tolist(), np.split(order, first[1:]), strict=True))
