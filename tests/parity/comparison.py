"""The largest errors of a replayed file beside their bounds."""

from typing import NamedTuple

import numpy as np

from tests.parity.golden_file import GoldenError, GoldenFile


class Worst(NamedTuple):
    error: float
    bound: float
    where: str


class Comparison:
    """What replaying a file has shown so far.

    Attributes:
      worst: for each kind of figure the largest error, its bound and the entry it was found at.
      problems: what is wrong with the file besides.
    """

    def __init__(self):
        self.worst: dict[str, Worst] = {}
        self.problems: list[str] = []

    def within(self, what: str, error: float, bound: float, where: str) -> None:
        """Notes an error; one that is not a number counts as infinite."""
        error = float(np.nan_to_num(error, nan=np.inf))
        if what not in self.worst or error > self.worst[what].error:
            self.worst[what] = Worst(error, bound, where)

    def absolute(self, what: str, value, golden: GoldenFile, name: str, bound: float) -> None:
        """Bounds the largest difference of any element from the golden entry called `name`."""
        self.within(what, np.max(np.abs(difference(value, golden, name))), bound, name)

    def relative(self, what: str, value, golden: GoldenFile, name: str, bound: float) -> None:
        """Bounds ‖error‖/‖golden‖, which for a single number is the relative error."""
        error = np.linalg.norm(difference(value, golden, name))
        self.within(what, error / np.linalg.norm(golden[name]), bound, name)

    @property
    def failures(self) -> list[str]:
        """One line for everything that is not as it should be."""
        beyond = [
            f"{what}: {error:.2g}, more than {bound:g}, at {where}"
            for what, (error, bound, where) in self.worst.items()
            if error > bound
        ]
        return self.problems + beyond

    def __str__(self):
        figures = [
            f"{what} {error:.2g} of {bound:g}" for what, (error, bound, _) in self.worst.items()
        ]
        return "  ".join(figures) or "nothing compared"


def difference(value, golden: GoldenFile, name: str) -> np.ndarray:
    """Value minus golden entry in float64, of one shape: nothing is broadcast.

    Raises:
      GoldenError: the shapes differ.
    """
    value, expected = np.asarray(value), golden[name]
    if value.shape != expected.shape:
        raise GoldenError(
            f"{golden.path.name} has {name} of shape {expected.shape}, computed is {value.shape}"
        )
    return value.astype(np.float64) - expected
