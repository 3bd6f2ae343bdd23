"""Lists a step's communication between devices, and forecasts its time on many of them.

python -m benchmarks.scaling --config=configs/imagenet.py --local_batch=256

Compiles the training step for simulated devices on the CPU, lists the collectives of the optimised
program, and evaluates the formula of docs/scaling.md. Needs no accelerator. Without --local_batch,
the devices share the configuration's global batch.
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
from cassle_jax.checks import ConfigError
from cassle_jax.config import FLAG_OPTIONS, base_config, imagenet
from cassle_jax.parallel import device_mesh
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step

IMAGES = 1_281_167  # in ImageNet-1k's training split
MEASURED_SECONDS = 0.0677  # `calibration_config` on one H100, by benchmarks/step.py
DECODED_PER_CPU = 1585 / 16  # images/s per CPU: 500-pixel JPEGs on a host with 16 CPUs

GRADIENTS = "gradients"
BATCH_NORM = "BatchNorm statistics"
BATCH_NORM_GRADIENTS = "gradients of BatchNorm statistics"
EMBEDDINGS = "embeddings"
METRICS = "metrics"

# Purpose of a collective by the function of the source that contains it.
PURPOSES = {
    "_moments": BATCH_NORM,
    "pair_similarities": METRICS,
    "averaged_gradient": GRADIENTS,
}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
LOWERED_BYTES = {"i1": 1, "i8": 1, "ui8": 1, "bf16": 2, "f16": 2, "i32": 4, "ui32": 4, "f32": 4}


# Work and collectives of a step ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """An array that a collective exchanges.

    Attributes:
      dtype: type of the elements, in HLO's notation.
      shape: shape of the result on a device.
      purpose: purpose of the exchange, such as `GRADIENTS`.
    """

    dtype: str
    shape: tuple[int, ...]
    purpose: str

    @property
    def bytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between the devices, of one array or several combined.

    Attributes:
      kind: HLO's name, such as `all-reduce`.
      parts: the arrays.
      times: number of executions per step; above 1 inside a loop.
    """

    kind: str
    parts: tuple[Part, ...]
    times: int = 1

    @property
    def bytes(self) -> int:
        """Total size of the arrays."""
        return sum(part.bytes for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in a step.

    Attributes:
      flops: floating-point operations.
      bytes: memory traffic: operands and results of all convolutions and matrix products, plus one
        read and one write of the state.
    """

    flops: float
    bytes: float


def trace_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Traced:
    """Traces the training step of a configuration for a mesh."""
    run = build_run(config, mesh, IMAGES)
    canvas = config.data.canvas
    batch = {
        "image": jax.ShapeDtypeStruct((run.batch_size, canvas, canvas, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((run.batch_size, 2), jnp.int32),
    }
    return make_train_step(run, mesh).trace(jax.eval_shape(run.initial_state), batch)


def work(step: jax.stages.Traced) -> Work:
    """Counts the work per device of a step, as an accelerator computes it.

    CPUs compute bfloat16 in float32, and some convolutions, augmentations and sums by other
    operations. Bytes are those of convolutions and matrix products in the unoptimised program, as
    XLA can fuse the rest.
    """
    lowered = step.lower(lowering_platforms=("tpu",))
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


def optimised(step: jax.stages.Traced) -> str:
    """The optimised program of a step for CPUs, with unoptimised machine code that never runs."""
    # Otherwise a cached program would have the function names of an earlier version of the source.
    setting = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, setting)
    jax.config.update(setting, True)
    try:
        options = {"xla_backend_optimization_level": 0}
        return step.lower().compile(compiler_options=options).as_text()
    finally:
        jax.config.update(setting, before)


def collectives_in(hlo: str) -> list[Collective]:
    """The collectives of an optimised program, in program order.

    Args:
      hlo: text of the program, with XLA's table of stack frames.
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
        if match and "replica_groups={{0}" not in line:  # skips groups of a single device
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
    """Maps instructions to the functions of the source that contain them."""

    def __init__(self, hlo: str):
        def table(heading, pattern):
            body = re.search(rf"^{heading}\n(.*?)\n\n", hlo, re.MULTILINE | re.DOTALL)
            return dict(re.findall(pattern, body[1], re.MULTILINE)) if body else {}

        self.functions = table("FunctionNames", r'^(\d+) "(.*)"$')
        self.locations = table("FileLocations", r"^(\d+) \{.*function_name_id=(\d+)")
        frames = r"^(\d+) \{(file_location_id=\d+(?: parent_frame_id=\d+)?)"
        self.frames = table("StackFrames", frames)

    def purpose(self, metadata: str, shape: str) -> str:
        """The purpose of an array in a collective, from its metadata and shape."""
        frame = re.search(r"stack_frame_id=(\d+)", metadata)
        callers = set(self._callers(frame[1])) if frame else set()
        purpose = next((PURPOSES[name] for name in PURPOSES if name in callers), EMBEDDINGS)
        if purpose == BATCH_NORM and "transpose(" in metadata:
            return BATCH_NORM_GRADIENTS
        # The update averages the scalar losses together with the gradients.
        return METRICS if purpose == GRADIENTS and not shape else purpose

    def _callers(self, frame: str) -> Iterator[str]:
        seen = set()
        while frame not in seen:  # the outermost frame is its own parent
            seen.add(frame)
            location, *parent = re.findall(r"\d+", self.frames[frame])
            yield self.functions[self.locations[location]]
            frame = parent[0] if parent else frame


# Machines ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices of one kind; docs/scaling.md lists the sources of all figures.

    Attributes:
      name: name of the device.
      peak: dense bfloat16 FLOP/s per device.
      memory_bandwidth: bytes/s per device.
    """

    name: str
    peak: float
    memory_bandwidth: float

    largest = math.inf

    def bandwidth(self, devices: int) -> float:
        """Bytes/s that a device can send to the others."""
        raise NotImplementedError

    def latency(self, devices: int, *, there_and_back: bool) -> float:
        """Seconds of an empty exchange."""
        raise NotImplementedError

    def roofline_seconds(self, work: Work) -> float:
        """Lower bound of the seconds for a device's work."""
        return max(work.flops / self.peak, work.bytes / self.memory_bandwidth)

    def exchange_seconds(self, collective: Collective, devices: int) -> float:
        """Seconds of a collective: its latency, and its bytes around a ring."""
        if devices == 1:
            return 0.0
        both = collective.kind == "all-reduce"  # a reduce-scatter and an all-gather
        # The result of a reduce-scatter is a device's share of the bytes on the ring.
        whole = collective.bytes * (devices if collective.kind == "reduce-scatter" else 1)
        around = (2 if both else 1) * (devices - 1) / devices * whole
        once = self.latency(devices, there_and_back=both) + around / self.bandwidth(devices)
        return collective.times * once


@dataclasses.dataclass(frozen=True)
class GPUHosts(Machine):
    """GPU hosts with an internal switch and one network card per GPU.

    Attributes:
      per_host: number of GPUs per host.
      switch_bandwidth: measured bytes/s of a GPU within its host, in one direction.
      network_bandwidth: bytes/s of a network card, in one direction.
      start: seconds before the first byte leaves.
      switch_latency: seconds per hop between GPUs of a host.
      network_latency: seconds per hop between hosts.
    """

    per_host: int
    switch_bandwidth: float
    network_bandwidth: float
    start: float
    switch_latency: float
    network_latency: float

    def bandwidth(self, devices):
        """Bandwidth of a ring through all GPUs; between hosts it uses all cards of a host."""
        if devices <= self.per_host:
            return self.switch_bandwidth
        return min(self.switch_bandwidth, self.per_host * self.network_bandwidth)

    def latency(self, devices, *, there_and_back):
        """NCCL's model of a tree: a chain within a host, and a binary tree of hosts."""
        hosts = math.ceil(devices / self.per_host)
        chain = (min(devices, self.per_host) - 1) * self.switch_latency
        tree = math.floor(math.log2(hosts)) * self.network_latency
        return self.start + (2 if there_and_back else 1) * (chain + tree)


@dataclasses.dataclass(frozen=True)
class TPUPod(Machine):
    """A slice of a TPU pod: a square of chips, or a rectangle of ratio 2; a full axis is a ring.

    Attributes:
      side: number of chips along an axis of the full pod.
      link_bandwidth: bytes/s of one link, in one direction.
      hop_latency: seconds per hop between neighbours.
    """

    side: int
    link_bandwidth: float
    hop_latency: float

    @property
    def largest(self) -> int:
        """Number of chips in a pod."""
        return self.side**2

    def axes(self, devices: int) -> tuple[int, int]:
        """Number of chips along both axes of the slice."""
        short = 2 ** (int(math.log2(devices)) // 2)
        return short, math.ceil(devices / short)

    def bandwidth(self, devices):
        """Sum over axes: two links on a ring, one at the end of a line."""
        links = sum(2 if size == self.side else 1 for size in self.axes(devices) if size > 1)
        return links * self.link_bandwidth

    def latency(self, devices, *, there_and_back):
        """Hops along one axis and then the other; a ring has half the hops of a line."""
        hops = sum(size // 2 if size == self.side else size - 1 for size in self.axes(devices))
        return (2 if there_and_back else 1) * hops * self.hop_latency


H100 = GPUHosts(
    "H100 SXM, 8 per host, 400 Gb/s InfiniBand per GPU",
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
    """The measured step: MoCo-v2 with CASSLE, ResNet-50, 224 pixels, batch 256, bfloat16."""
    config = imagenet(base_config(), classes="imagenet100")
    config.encoder.name = "resnet50"
    config.dtype = "bfloat16"
    return config


def achieved_fraction() -> float:
    """The fraction of its roofline that the measured device achieves."""
    measured = work(trace_step(calibration_config(), device_mesh(jax.devices()[:1])))
    return H100.roofline_seconds(measured) / MEASURED_SECONDS


# Forecasts ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The forecast of a step.

    Attributes:
      devices: number of devices.
      batch_size: global batch size.
      compute: seconds of local work.
      batch_norm: seconds of the exchanges of BatchNorm's statistics and their gradients.
      exchange: seconds of all other exchanges.
    """

    devices: int
    batch_size: int
    compute: float
    batch_norm: float
    exchange: float

    @property
    def seconds(self) -> float:
        """Seconds of a step without overlap."""
        return self.compute + self.batch_norm + self.exchange

    @property
    def images_per_second(self) -> float:
        """Images/s of all devices together."""
        return self.batch_size / self.seconds

    def days(self, epochs: float) -> float:
        """Days of training on ImageNet-1k."""
        return epochs * (IMAGES // self.batch_size) * self.seconds / 86_400


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled for a number of devices."""

    devices: int
    batch_size: int
    work: Work
    collectives: list[Collective]

    def on(self, machine: Machine, achieved: float) -> Forecast:
        """Forecasts the step on a machine.

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
    """Compiles the step of a configuration for simulated devices on the CPU.

    Args:
      config: configuration as from `base_config`.
      devices: number of devices.
      local_batch: images per device; 0 to share the configuration's batch.
      programs: folder for the optimised program; "" for none.
    """
    config = config.copy_and_resolve_references()
    config.batch_size = local_batch * devices or config.batch_size
    if config.dtype == "auto":
        config.dtype = "bfloat16"  # as on the forecast's accelerators
    step = trace_step(config, device_mesh(jax.devices()[:devices]))
    hlo = optimised(step)
    if programs:
        path = Path(programs, f"step_{devices}_devices.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(hlo)
    return Compiled(devices, config.batch_size, work(step), collectives_in(hlo))


def print_step(step: Compiled) -> None:
    """Prints a step's work, and its collectives by purpose."""
    rows = collections.defaultdict(list)
    for collective in step.collectives:
        for part in collective.parts:
            rows[part.purpose, collective.kind, part.dtype] += collective.times * [part.bytes]
    exchanges = sum(collective.times for collective in step.collectives)
    print(
        f"\n{step.devices} devices, batch {step.batch_size}; per device: "
        f"{step.work.flops / 1e12:.3f} TFLOP, {step.work.bytes / 1e9:.2f} GB, {exchanges} exchanges"
    )
    for (purpose, kind, dtype), sizes in sorted(rows.items()):
        print(f"  {purpose:36}{kind:16}{dtype:6}{len(sizes):6} arrays{sum(sizes):>16,} bytes")


def print_forecasts(machine: Machine, forecasts: list[Forecast], epochs: float) -> None:
    """Prints a Markdown table of forecasts for a machine."""
    print(f"\n{machine.name}\n")
    print(
        "| devices | batch | compute, ms | BatchNorm, ms | other exchanges, ms | step, ms "
        "| images/s | efficiency | CPUs to decode, per device | days |"
    )
    print("|---:" * 10 + "|")
    reference = forecasts[0].images_per_second / forecasts[0].devices
    for step in forecasts:
        rate = step.images_per_second / step.devices
        print(
            f"| {step.devices} | {step.batch_size} | {1e3 * step.compute:.1f} "
            f"| {1e3 * step.batch_norm:.1f} | {1e3 * step.exchange:.1f} | {1e3 * step.seconds:.1f} "
            f"| {step.images_per_second:,.0f} | {rate / reference:.0%} "
            f"| {rate / DECODED_PER_CPU:.0f} | {step.days(epochs):.2g} |"
        )


def forecast(
    config: ConfigDict, devices: Sequence[int], local_batch: int = 0, programs: str = ""
) -> None:
    """Prints a configuration's forecasts on all machines, per number of devices.

    Raises:
      ConfigError: a number of devices below 1, or a negative local batch.
    """
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
        f"224 px, batch 256, bfloat16): {achieved:.1%} of its roofline, here assumed for all "
        "machines."
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
    config_flag = config_flags.DEFINE_config_file(
        "config", None, "The configuration.", **FLAG_OPTIONS
    )
    devices_flag = flags.DEFINE_multi_integer(
        "devices", [1, 8, 64, 256], "Number of devices; repeatable."
    )
    local_flag = flags.DEFINE_integer(
        "local_batch", 0, "Images per device; 0: batch_size / devices."
    )
    hlo_flag = flags.DEFINE_string("hlo", "", "Folder for the optimised programs.")
    flags.mark_flags_as_required(["config"])
    command.run(
        lambda: forecast(config_flag.value, devices_flag.value, local_flag.value, hlo_flag.value)
    )
