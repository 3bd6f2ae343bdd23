"""What a step says to other devices, and how long it should take on many of them; needs none.

python -m benchmarks.scaling --config=configs/imagenet.py --local_batch=256

Compiles the training step for pretend devices on the CPU, lists the collectives of the optimised
program, and puts its figures into the formula of docs/scaling.md. Without --local_batch the
configuration's global batch is split over the devices.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from cassle_jax import command
from cassle_jax.config import ConfigError, base_config, imagenet
from cassle_jax.parallel import device_mesh
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step

IMAGES = 1_281_167  # in ImageNet-1k's training split
MEASURED_SECONDS = 0.0677  # `calibration_config` on one H100, by benchmarks/step.py
DECODED_PER_CPU = 1585 / 16  # images/s of a CPU: 500-pixel JPEGs on a host of 16

GRADIENTS = "gradients"
BATCH_NORM = "BatchNorm statistics"
BATCH_NORM_GRADIENTS = "gradients of BatchNorm statistics"
EMBEDDINGS = "embeddings"
METRICS = "metrics"

# The function in the source that asks for a collective: what it is for.
PURPOSES = {
    "_moments": BATCH_NORM,
    "pair_similarities": METRICS,
    "averaged_gradient": GRADIENTS,
}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
LOWERED_BYTES = {"i1": 1, "i8": 1, "ui8": 1, "bf16": 2, "f16": 2, "i32": 4, "ui32": 4, "f32": 4}


# What the step is made of ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """An array that a collective exchanges.

    Attributes:
      dtype: of its elements, as HLO has it.
      shape: of the result that each device gets.
      purpose: what it is for.
    """

    dtype: str
    shape: tuple[int, ...]
    purpose: str

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between the devices, of one array or of several combined.

    Attributes:
      kind: as HLO names it.
      parts: the arrays.
      times: in a step; more than 1 inside a loop.
    """

    kind: str
    parts: tuple[Part, ...]
    times: int = 1

    @property
    def bytes(self) -> int:
        """Of all its arrays."""
        return sum(part.bytes for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device has to do in a step.

    Attributes:
      flops: floating-point operations.
      bytes: to and from its memory: operands and results of all convolutions and matrix products,
        and the state once in and once out.
    """

    flops: float
    bytes: float


def lower_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The training step of a configuration for a mesh, before XLA optimises it."""
    run = build_run(config, mesh, IMAGES)
    canvas = config.data.canvas
    batch = {
        "image": jax.ShapeDtypeStruct((run.batch_size, canvas, canvas, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((run.batch_size, 2), jnp.int32),
    }
    return make_train_step(run, mesh).lower(jax.eval_shape(run.initial_state), batch)


def work(lowered: jax.stages.Lowered) -> Work:
    """What a lowered step has to do on each device.

    Bytes are counted before optimisation, where types are the accelerator's (a CPU computes
    bfloat16 in float32), and of convolutions and products alone: what lies between can be fused.
    """
    moved = 0
    for line in lowered.as_text().splitlines():
        if re.search(r"stablehlo\.(convolution|dot_general)\b", line):
            arrays = re.findall(r"tensor<([^>]*)>", line.rpartition(" : ")[2])
            moved += sum(_lowered_bytes(array) for array in arrays)
    state = lowered.in_avals[0][0]
    moved += 2 * sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state))
    return Work(lowered.cost_analysis()["flops"], moved)


def _lowered_bytes(array: str) -> int:
    *shape, dtype = array.split("x")
    return math.prod(map(int, shape)) * LOWERED_BYTES[dtype]


def optimised(lowered: jax.stages.Lowered) -> str:
    """The optimised program of a lowered step; its machine code, which is never run, is not."""
    # Or a program of the cache would name its functions as they were named when it was compiled.
    setting = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, setting)
    jax.config.update(setting, True)
    try:
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    finally:
        jax.config.update(setting, before)


def collectives_in(hlo: str) -> list[Collective]:
    """The collectives of an optimised program, in its order.

    Args:
      hlo: its text, with XLA's table of stack frames, which says what line asked for each.
    """
    purpose_of = _Origins(hlo).purpose
    loops = dict(re.findall(r"body=%([\w.-]+),.*?known_trip_count\D+(\d+)", hlo))
    elements = {
        (name, int(index)): metadata
        for name, index, metadata in re.findall(
            r"get-tuple-element\(%([\w.-]+)\), index=(\d+)(.*)", hlo
        )
    }
    found, computation = [], ""
    for line in hlo.splitlines():
        if line.endswith("{"):
            computation = line.removeprefix("ENTRY ").split(" ")[0].removeprefix("%")
        match = re.match(rf"\s+(?:ROOT )?%([\w.-]+) = (.*?) ({KINDS})\((.*)", line)
        if match and "replica_groups={{0}" not in line:  # which would be each device with itself
            name, result, kind, metadata = match.groups()
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
            parts = tuple(
                Part(dtype, _shape(shape), purpose_of(elements.get((name, i), metadata), shape))
                for i, (dtype, shape) in enumerate(arrays)
            )
            found.append(Collective(kind, parts, int(loops.get(computation, 1))))
    return found


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


class _Origins:
    """Which functions of the source an instruction comes from."""

    def __init__(self, hlo: str):
        def table(heading, pattern):
            body = re.search(rf"^{heading}\n(.*?)\n\n", hlo, re.MULTILINE | re.DOTALL)
            return dict(re.findall(pattern, body[1], re.MULTILINE)) if body else {}

        self.functions = table("FunctionNames", r'^(\d+) "(.*)"$')
        self.locations = table("FileLocations", r"^(\d+) \{.*function_name_id=(\d+)")
        frames = r"^(\d+) \{(file_location_id=\d+(?: parent_frame_id=\d+)?)"
        self.frames = table("StackFrames", frames)

    def purpose(self, metadata: str, shape: str) -> str:
        """What a collective with such metadata exchanges an array of that shape for."""
        frame = re.search(r"stack_frame_id=(\d+)", metadata)
        callers = set(self._callers(frame[1])) if frame else set()
        purpose = next((PURPOSES[name] for name in PURPOSES if name in callers), EMBEDDINGS)
        if purpose == BATCH_NORM and "transpose(" in metadata:
            return BATCH_NORM_GRADIENTS
        # Losses are averaged together with the gradients.
        return METRICS if purpose == GRADIENTS and not shape else purpose

    def _callers(self, frame: str) -> Iterator[str]:
        seen = set()
        while frame not in seen:  # the outermost frame is its own parent
            seen.add(frame)
            location, *parent = re.findall(r"\d+", self.frames[frame])
            yield self.functions[self.locations[location]]
            frame = parent[0] if parent else frame


# What it is to run on ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of one kind; the sources of all figures are in docs/scaling.md.

    Attributes:
      name: of the device.
      peak: bfloat16 FLOP/s of a device, dense.
      memory_bandwidth: of a device, bytes/s.
    """

    name: str
    peak: float
    memory_bandwidth: float

    largest = math.inf

    def bandwidth(self, devices: int) -> float:
        """Bytes/s that each of so many devices can send to the others."""
        raise NotImplementedError

    def latency(self, devices: int, *, there_and_back: bool) -> float:
        """Seconds that an exchange of nothing takes."""
        raise NotImplementedError

    def roofline_seconds(self, work: Work) -> float:
        """What one device's work takes at the least."""
        return max(work.flops / self.peak, work.bytes / self.memory_bandwidth)

    def exchange_seconds(self, collective: Collective, devices: int) -> float:
        """What a collective takes: its latency, and its bytes around a ring."""
        if devices == 1:
            return 0.0
        both = collective.kind == "all-reduce"  # a reduce-scatter and an all-gather
        # A reduce-scatter leaves each device its share of what goes around.
        whole = collective.bytes * (devices if collective.kind == "reduce-scatter" else 1)
        around = (2 if both else 1) * (devices - 1) / devices * whole
        once = self.latency(devices, there_and_back=both) + around / self.bandwidth(devices)
        return collective.times * once


@dataclasses.dataclass(frozen=True)
class GPUHosts(Machine):
    """Hosts of GPUs behind one switch, each GPU with a network card of its own.

    Attributes:
      per_host: GPUs.
      switch_bandwidth: of a GPU within its host, bytes/s in one direction, as measured.
      network_bandwidth: of a GPU's network card, bytes/s in one direction.
      start: seconds before the first byte leaves.
      switch_latency: of a step from GPU to GPU, seconds.
      network_latency: of a step from host to host, seconds.
    """

    per_host: int
    switch_bandwidth: float
    network_bandwidth: float
    start: float
    switch_latency: float
    network_latency: float

    def bandwidth(self, devices):
        """A ring through all GPUs crosses to the next host by all cards of a host at once."""
        if devices <= self.per_host:
            return self.switch_bandwidth
        return min(self.switch_bandwidth, self.per_host * self.network_bandwidth)

    def latency(self, devices, *, there_and_back):
        """NCCL's own model of a tree: a chain within each host, a binary tree of hosts."""
        hosts = math.ceil(devices / self.per_host)
        chain = (min(devices, self.per_host) - 1) * self.switch_latency
        tree = math.floor(math.log2(hosts)) * self.network_latency
        return self.start + (2 if there_and_back else 1) * (chain + tree)


@dataclasses.dataclass(frozen=True)
class TPUPod(Machine):
    """A slice of a pod whose chips are a square or twice as wide as high; a full axis is a ring.

    Attributes:
      side: chips along an axis of the full pod.
      link_bandwidth: of one link, bytes/s in one direction.
      hop_latency: from a chip to its neighbour, seconds.
    """

    side: int
    link_bandwidth: float
    hop_latency: float

    @property
    def largest(self) -> int:
        """Chips in a pod."""
        return self.side**2

    def axes(self, devices: int) -> tuple[int, int]:
        """The slice's chips along either axis."""
        short = 2 ** (int(math.log2(devices)) // 2)
        return short, math.ceil(devices / short)

    def bandwidth(self, devices):
        """Along an axis both ways on a ring, else one way at its ends; both axes at once."""
        links = sum(2 if size == self.side else 1 for size in self.axes(devices) if size > 1)
        return links * self.link_bandwidth

    def latency(self, devices, *, there_and_back):
        """Along one axis and then the other; a ring is half as long as a line."""
        hops = sum(size // 2 if size == self.side else size - 1 for size in self.axes(devices))
        return (2 if there_and_back else 1) * hops * self.hop_latency


H100 = GPUHosts(
    "H100 SXM, 8 a host, 400 Gb/s InfiniBand a GPU",
    peak=989e12,
    memory_bandwidth=3.35e12,
    per_host=8,
    switch_bandwidth=370e9,
    network_bandwidth=50e9,
    start=6.8e-6,
    switch_latency=0.6e-6,
    network_latency=5.0e-6,
)
V5E = TPUPod(
    "TPU v5e",
    peak=197e12,
    memory_bandwidth=819e9,
    side=16,
    link_bandwidth=45e9,
    hop_latency=1e-6,
)
V6E = TPUPod(
    "TPU v6e",
    peak=918e12,
    memory_bandwidth=1640e9,
    side=16,
    link_bandwidth=90e9,
    hop_latency=1e-6,
)
MACHINES = (H100, V5E, V6E)


def calibration_config() -> ConfigDict:
    """What was measured: MoCo-v2 with CASSLE, ResNet-50, 224 pixels, batch 256, bfloat16."""
    config = imagenet(base_config(), classes="imagenet100")
    config.encoder.name = "resnet50"
    config.dtype = "bfloat16"
    return config


def achieved_fraction() -> float:
    """How much of its roofline the one measured device achieved."""
    measured = work(lower_step(calibration_config(), device_mesh(jax.devices()[:1])))
    return H100.roofline_seconds(measured) / MEASURED_SECONDS


# What follows ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A step on so many devices of a machine.

    Attributes:
      devices: how many.
      batch_size: of all of them.
      compute: seconds of a device's own work.
      batch_norm: seconds of exchanging BatchNorm's statistics and their gradients.
      exchange: seconds of all other exchanges.
    """

    devices: int
    batch_size: int
    compute: float
    batch_norm: float
    exchange: float

    @property
    def seconds(self) -> float:
        """Of a step in which nothing overlaps."""
        return self.compute + self.batch_norm + self.exchange

    @property
    def images_per_second(self) -> float:
        """Of all devices."""
        return self.batch_size / self.seconds

    def days(self, epochs: float) -> float:
        """Of ImageNet-1k."""
        return epochs * (IMAGES // self.batch_size) * self.seconds / 86_400


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled for so many devices."""

    devices: int
    batch_size: int
    work: Work
    collectives: list[Collective]

    def on(self, machine: Machine, achieved: float) -> Forecast:
        """How long it should take.

        Args:
          machine: the devices.
          achieved: fraction of its roofline that a device achieves.
        """
        seconds = {True: 0.0, False: 0.0}
        for collective in self.collectives:
            norm = {part.purpose for part in collective.parts} <= {BATCH_NORM, BATCH_NORM_GRADIENTS}
            seconds[norm] += machine.exchange_seconds(collective, self.devices)
        compute = machine.roofline_seconds(self.work) / achieved
        return Forecast(self.devices, self.batch_size, compute, seconds[True], seconds[False])


def compile_for(config: ConfigDict, devices: int, local_batch: int, programs: str) -> Compiled:
    """The step of a configuration for so many of the CPU's pretend devices.

    Args:
      config: as from `base_config`.
      devices: of the pretended ones.
      local_batch: images of each; 0 for the configuration's batch, split.
      programs: folder the optimised program is written to; "" for none.
    """
    config = config.copy_and_resolve_references()
    config.batch_size = local_batch * devices or config.batch_size
    if config.dtype == "auto":
        config.dtype = "bfloat16"  # as on the accelerators asked about
    lowered = lower_step(config, device_mesh(jax.devices()[:devices]))
    hlo = optimised(lowered)
    if programs:
        path = Path(programs, f"step_{devices}_devices.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(hlo)
    return Compiled(devices, config.batch_size, work(lowered), collectives_in(hlo))


def print_step(step: Compiled) -> None:
    """A step's work and the collectives in it, by what they are for."""
    rows = collections.defaultdict(list)
    for collective in step.collectives:
        for part in collective.parts:
            rows[part.purpose, collective.kind, part.dtype] += collective.times * [part.bytes]
    exchanges = sum(collective.times for collective in step.collectives)
    print(
        f"\n{step.devices} devices, batch {step.batch_size}: each "
        f"{step.work.flops / 1e12:.3f} TFLOP, {step.work.bytes / 1e9:.2f} GB, {exchanges} exchanges"
    )
    for (purpose, kind, dtype), sizes in sorted(rows.items()):
        print(f"  {purpose:36}{kind:16}{dtype:6}{len(sizes):6} arrays{sum(sizes):>16,} bytes")


def print_forecasts(machine: Machine, forecasts: list[Forecast], epochs: float) -> None:
    """A table of steps on a machine, in Markdown."""
    print(f"\n{machine.name}\n")
    print(
        "| devices | batch | compute, ms | BatchNorm, ms | other exchanges, ms | step, ms "
        "| images/s | efficiency | CPUs to decode, a device | days |"
    )
    print("|---:" * 10 + "|")
    alone = forecasts[0].images_per_second / forecasts[0].devices
    for step in forecasts:
        each = step.images_per_second / step.devices
        print(
            f"| {step.devices} | {step.batch_size} | {1e3 * step.compute:.1f} "
            f"| {1e3 * step.batch_norm:.1f} | {1e3 * step.exchange:.1f} | {1e3 * step.seconds:.1f} "
            f"| {step.images_per_second:,.0f} | {each / alone:.0%} | {each / DECODED_PER_CPU:.0f} "
            f"| {step.days(epochs):.2g} |"
        )


def forecast(
    config: ConfigDict, devices: Sequence[int], local_batch: int = 0, programs: str = ""
) -> None:
    """Prints a configuration's steps on the machines, for so many devices each."""
    counts = sorted(devices)
    if counts[0] < 1:
        raise ConfigError(f"devices={counts[0]} is too few; use at least 1")
    if local_batch < 0:
        raise ConfigError(f"local_batch={local_batch} is negative; use 0 or more")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", counts[-1])
    achieved = achieved_fraction()
    print(
        f"One H100 took {1e3 * MEASURED_SECONDS} ms for a step of MoCo-v2 with CASSLE (ResNet-50, "
        f"224 px, batch 256, bfloat16): {achieved:.1%} of its roofline, here assumed of all."
    )
    steps = []
    for count in counts:
        steps.append(compile_for(config, count, local_batch, programs))
        print_step(steps[-1])
    result = {}
    for machine in MACHINES:
        forecasts = [
            step.on(machine, achieved) for step in steps if step.devices <= machine.largest
        ]
        if forecasts:
            print_forecasts(machine, forecasts, config.epochs)
        result[machine.name] = [dataclasses.asdict(forecast) for forecast in forecasts]
    print(json.dumps(result))


if __name__ == "__main__":
    config_flag = config_flags.DEFINE_config_file("config", None, "Of the step.", lock_config=True)
    devices_flag = flags.DEFINE_multi_integer("devices", [1, 8, 64, 256], "For how many devices.")
    local_flag = flags.DEFINE_integer("local_batch", 0, "Images a device; 0: batch_size / devices.")
    hlo_flag = flags.DEFINE_string("hlo", "", "Folder to write the optimised programs to.")
    flags.mark_flags_as_required(["config"])
    command.run(
        lambda: forecast(config_flag.value, devices_flag.value, local_flag.value, hlo_flag.value)
    )
