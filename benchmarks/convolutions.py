"""Compares the convolutions of a ResNet-18's step with PyTorch's, layer by layer.

python -m benchmarks.convolutions

Ours and PyTorch's have processes of their own, since PyTorch's threads would disturb ours; the
processes alternate in rounds. Maps are channels-last, and float32. PyTorch's convolutions on CPUs
are oneDNN's.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.isolated import run_isolated
from cassle_jax import command
from cassle_jax.checks import ConfigError, check_at_least
from cassle_jax.models.convolve import convolve

CALLS = 7
SECONDS_PER_CALL = 0.05
KINDS = ("forward", "input's gradient", "kernel's gradient")
STEM = "stem"  # its input is the image, which needs no gradient


class Layer(NamedTuple):
    """A kind of convolution: maps, kernel, and how many of them the network has."""

    name: str
    number: int
    side: int
    channels: int
    features: int
    kernel: int
    stride: int

    def flops(self, batch: int) -> float:
        """Floating-point operations of a direct pass over a batch, with the padding."""
        places = (self.side // self.stride) ** 2
        return 2.0 * batch * places * self.features * self.channels * self.kernel**2

    def arrays(self, batch: int) -> tuple[np.ndarray, ...]:
        """Random maps, kernel, and gradient of the result; float32."""
        side, random = self.side // self.stride, np.random.default_rng(0)
        shapes = (
            (batch, self.side, self.side, self.channels),
            (self.kernel, self.kernel, self.channels, self.features),
            (batch, side, side, self.features),
        )
        return tuple(random.standard_normal(shape, np.float32) for shape in shapes)


Times = Mapping[tuple[str, str], float]
"""Seconds by layer's name and kind of call."""


def layers(size: int) -> list[Layer]:
    """The convolutions of a ResNet-18 for images of `size` pixels, a multiple of 32."""
    found = [Layer(STEM, 1, size, 3, 64, 7, 2), Layer("stage 1", 4, size // 4, 64, 64, 3, 1)]
    for stage in (2, 3, 4):
        side, width = size // 2**stage, 64 * 2 ** (stage - 1)
        found += [
            Layer(f"stage {stage}, with stride", 1, side, width // 2, width, 3, 2),
            Layer(f"stage {stage}", 3, side // 2, width, width, 3, 1),
            Layer(f"stage {stage}, shortcut", 1, side, width // 2, width, 1, 2),
        ]
    return found


def ours(size: int, batch: int) -> Times:
    """Times the convolutions as this project computes them, on the default device."""

    def calls(layer: Layer, *arrays: np.ndarray) -> list[Callable[[], object]]:
        padding = (layer.kernel // 2,) * 2
        convolution = partial(
            convolve,
            window_strides=(layer.stride,) * 2,
            padding=(padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x, kernel, gradient = map(jnp.asarray, arrays)
        programs = (
            (jax.jit(convolution), (x, kernel)),
            (jax.jit(lambda x, k, g: jax.vjp(convolution, x, k)[1](g)[0]), (x, kernel, gradient)),
            (jax.jit(lambda x, k, g: jax.vjp(convolution, x, k)[1](g)[1]), (x, kernel, gradient)),
        )
        return [partial(_finished, *each) for each in programs]

    return _times(size, batch, calls)


def theirs(size: int, batch: int) -> Times:
    """Times PyTorch's convolutions, channels-last, on CPUs."""
    import torch

    def calls(layer: Layer, *arrays: np.ndarray) -> list[Callable[[], object]]:
        x, kernel, gradient = map(torch.from_numpy, arrays)
        x, gradient = x.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
        kernel = kernel.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        how = ([layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1], False, [0, 0], 1)
        backward = partial(torch.ops.aten.convolution_backward, gradient, x, kernel, None, *how)
        return [
            lambda: torch.nn.functional.conv2d(x, kernel, None, *how[:2]),
            partial(backward, [True, False, False]),
            partial(backward, [False, True, False]),
        ]

    return _times(size, batch, calls)


def _finished(program: Callable, arguments: tuple) -> object:
    return jax.block_until_ready(program(*arguments))


def _times(size: int, batch: int, calls: Callable[..., list[Callable[[], object]]]) -> Times:
    times = {}
    for layer in layers(size):
        for kind, call in zip(KINDS, calls(layer, *layer.arrays(batch)), strict=True):
            call()
            count = max(1, round(SECONDS_PER_CALL / _seconds(call, 1)))
            seconds = [_seconds(call, count) for _ in range(CALLS)]
            times[layer.name, kind] = statistics.median(seconds)
    return times


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def table(size: int, batch: int, found: Mapping[str, list[Times]]) -> list[str]:
    """The lines of a Markdown table: ms by layer and in all, medians over rounds.

    Args:
      size: side of the images, pixels.
      batch: number of images.
      found: by contender, its times in every round.
    """

    def total(times: Times, layer: Layer | None, kind: str) -> float:
        counted = layers(size) if layer is None else [layer]
        return sum(
            each.number * times[each.name, kind]
            for each in counted
            if (each.name, kind) != (STEM, KINDS[1])
        )

    def cell(rounds: list[Times], layer: Layer | None, kind: str) -> str:
        if layer and (layer.name, kind) == (STEM, KINDS[1]):
            return ""
        seconds = statistics.median(total(times, layer, kind) for times in rounds)
        rate = f" ({layer.number * layer.flops(batch) / seconds / 1e9:.0f})" if layer else ""
        return f"{1000 * seconds:.1f}{rate}"

    heads = [f"{name}, {kind}" for kind in KINDS for name in found]
    lines = ["| ms (GFLOP/s) | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for layer in [*layers(size), None]:
        name = f"{layer.name}, × {layer.number}" if layer else "all"
        cells = [cell(rounds, layer, kind) for kind in KINDS for rounds in found.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Prints the table; without PyTorch, the table of ours."""
    for name, flag, least in (("size", SIZE, 32), ("batch", BATCH, 1), ("rounds", ROUNDS, 1)):
        check_at_least(name, flag.value, least)
    if SIZE.value % 32:
        raise ConfigError(f"size={SIZE.value} must be a multiple of 32, such as 64")
    found: dict[str, list[Times]] = {"ours": [], "PyTorch": []}
    for _ in range(ROUNDS.value):
        for name, measure in (("ours", ours), ("PyTorch", theirs)):
            if name in found:
                try:
                    found[name].append(run_isolated(measure, SIZE.value, BATCH.value))
                except RuntimeError as error:
                    del found[name]
                    command.say(f"{name} cannot be measured: {error}")
    for line in table(SIZE.value, BATCH.value, found):
        command.say(line)


if __name__ == "__main__":
    SIZE = flags.DEFINE_integer("size", 64, "Side of the images, pixels.")
    BATCH = flags.DEFINE_integer("batch", 64, "Number of images.")
    ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds.")
    command.run(main)
