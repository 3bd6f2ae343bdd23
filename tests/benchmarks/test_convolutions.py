"""The profile of convolutions: which layers, what is timed, and the table."""

import pytest

from benchmarks import convolutions
from benchmarks.convolutions import KINDS, STEM, Layer

SMALL = Layer(STEM, 2, 8, 3, 4, 3, 2)


def test_the_layers_are_those_of_a_resnet_18():
    # torchvision: 1.814e9 multiply-adds per image, 0.0005e9 of them in the classifier.
    flops = sum(layer.number * layer.flops(1) for layer in convolutions.layers(224))
    assert flops / 2 == pytest.approx(1.8135e9, rel=1e-3)
    assert sum(layer.number for layer in convolutions.layers(224)) == 20


def test_every_kind_of_call_is_timed(monkeypatch):
    monkeypatch.setattr(convolutions, "layers", lambda size: [SMALL])
    monkeypatch.setattr(convolutions, "SECONDS_PER_CALL", 1e-9)
    times = convolutions.ours(8, 2)
    assert set(times) == {(STEM, kind) for kind in KINDS} and min(times.values()) > 0


def test_the_table_counts_layers_and_leaves_out_the_images_gradient(monkeypatch):
    other = Layer("other", 3, 4, 4, 4, 1, 1)
    monkeypatch.setattr(convolutions, "layers", lambda size: [SMALL, other])
    rounds = [
        {(layer.name, kind): seconds for layer in (SMALL, other) for kind in KINDS}
        for seconds in (0.001, 0.002, 0.004)
    ]
    _, _, stem, _, total = convolutions.table(8, 1, {"ours": rounds, "PyTorch": rounds[:1]})
    assert stem == "| stem, × 2 | 4.0 (0) | 2.0 (0) |  |  | 4.0 (0) | 2.0 (0) |"
    assert total == "| all | 10.0 | 5.0 | 6.0 | 3.0 | 10.0 | 5.0 |"
