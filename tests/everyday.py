"""Which values of a parametrised test every run takes: the others are marked exhaustive."""

import pytest


def everyday(values, *chosen):
    """The values for `parametrize`, of which `launch/test.sh` without --all takes the chosen."""
    missing = set(chosen) - set(values)
    assert not missing, missing
    rare = pytest.mark.exhaustive
    return [each if each in chosen else pytest.param(each, marks=rare) for each in values]
