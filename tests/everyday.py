"""Which values of a parametrised test every run takes: the others are marked exhaustive."""

import itertools

import pytest


def everyday(values, *chosen):
    """The values for `parametrize`, of which `launch/test.sh` without --all takes the chosen."""
    _check(values, chosen)
    rare = pytest.mark.exhaustive
    return [each if each in chosen else pytest.param(each, marks=rare) for each in values]


def everyday_pairs(first, second, *chosen):
    """All pairs of two lists, as values of two arguments; every run takes the chosen pairs."""
    pairs = list(itertools.product(first, second))
    _check(pairs, chosen)
    rare = pytest.mark.exhaustive
    return [each if each in chosen else pytest.param(*each, marks=rare) for each in pairs]


def _check(values, chosen):
    missing = set(chosen) - set(values)
    assert not missing, missing
