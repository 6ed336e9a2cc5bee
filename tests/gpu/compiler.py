"""Compiles for NVIDIA GPUs on a machine without one, by XLA's own compiler.

The CUDA plugin of JAX has compile-only devices: all that it would do for the named GPU
but run. XLA dumps the PTX of every kernel; `ptxas`, pinned to the release that the
plugin carries within it, makes of it the machine code that XLA's executable holds
(compared once, instruction by instruction), and `nvdisasm` prints that.

No autotuning happens without a device, so dense products that XLA compiles itself get
default tilings.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from tests.gpu import sass

TOOLS = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin")
TRITON = "__gpu$xla.gpu.triton"
# Axes of the devices that sharded programs are compiled for.
MESH = {"data": 2, "model": 4}


@dataclasses.dataclass(frozen=True)
class Device:
    """The figures of a GPU that the compiler asks for."""

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int
    bandwidth: int
    l2: int
    clock: float
    shared_per_core: int
    ptxas_arch: str


DEVICES = {
    "sm_80": Device(
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        memory=80 << 30,
        bandwidth=2039 * 10**9,
        l2=40 << 20,
        clock=1.41,
        shared_per_core=164 << 10,
        ptxas_arch="sm_80",
    ),
    "sm_89": Device(
        "NVIDIA GeForce RTX 4090",
        capability=(8, 9),
        cores=128,
        memory=24 << 30,
        bandwidth=1008 * 10**9,
        l2=72 << 20,
        clock=2.52,
        shared_per_core=100 << 10,
        ptxas_arch="sm_89",
    ),
    "sm_90": Device(
        "NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        cores=132,
        memory=80 << 30,
        bandwidth=3352 * 10**9,
        l2=50 << 20,
        clock=1.98,
        shared_per_core=228 << 10,
        ptxas_arch="sm_90a",
    ),
    "sm_100": Device(
        "NVIDIA B200",
        capability=(10, 0),
        cores=148,
        memory=180 << 30,
        bandwidth=8000 * 10**9,
        l2=126 << 20,
        clock=1.96,
        shared_per_core=228 << 10,
        ptxas_arch="sm_100a",
    ),
    "sm_120": Device(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        capability=(12, 0),
        cores=188,
        memory=96 << 30,
        bandwidth=1792 * 10**9,
        l2=128 << 20,
        clock=2.6,
        shared_per_core=100 << 10,
        ptxas_arch="sm_120a",
    ),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel as compiled; assembled and disassembled only if one asks.

    Attributes:
      name: As given to the launch.
      ptx: What XLA's Triton made of it.
      arch: For which ptxas assembles it.
    """

    name: str
    ptx: str
    arch: str

    @property
    def registers(self) -> int:
        """Those of a thread."""
        return int(re.search(r"Used (\d+) registers", self._assembled[0])[1])

    @property
    def spills(self) -> int:
        """Bytes of registers that a thread stores to local memory."""
        return int(re.search(r"(\d+) bytes spill stores", self._assembled[0])[1])

    @functools.cached_property
    def instructions(self) -> sass.Loop:
        """The whole kernel."""
        return sass.kernels(self._disassembly)[self.name]

    @functools.cached_property
    def loops(self) -> list[sass.Loop]:
        """Its innermost loops."""
        return sass.loops(self._disassembly)[self.name]

    @property
    def hot(self) -> sass.Loop:
        """The loop with the most tensor-core instructions, else the longest."""
        return max(self.loops, key=lambda loop: (loop.matrix, len(loop)))

    @functools.cached_property
    def _assembled(self) -> tuple[str, bytes]:
        """What ptxas says, and the machine code."""
        with tempfile.TemporaryDirectory() as folder:
            path, code = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            path.write_text(self.ptx)
            # The flags with which XLA calls it.
            flags = ("-v", f"-arch={self.arch}", "--warn-on-spills")
            return _run("ptxas", *flags, path, "-o", code), code.read_bytes()

    @functools.cached_property
    def _disassembly(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as code:
            code.write(self._assembled[1])
            code.flush()
            # No branch here goes by a stack, which -ndf leaves unanalyzed.
            return _run("nvdisasm", "-c", "-ndf", code.name)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A step of the compiled program that the device executes.

    Attributes:
      kind: XLA's name of the thunk: kCustomKernel, kGemm, kCopy, ...
      name: Of the kernel, or of the HLO instruction.
      grid: Of a kernel.
      threads: Of a kernel's program.
      shared: Bytes of shared memory of a kernel's program.
      captured: Whether it is recorded into a CUDA graph.
    """

    kind: str
    name: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    captured: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function.

    Attributes:
      hlo: The optimized and scheduled HLO.
      temporaries: Bytes of device memory beside arguments and results.
      launches: In order of execution.
      kernels: The Pallas kernels.
    """

    hlo: str
    temporaries: int
    launches: list[Launch]
    kernels: list[Kernel]

    @property
    def kernel(self) -> Kernel:
        """The only Pallas kernel that reads a weight."""
        (kernel,) = (k for k in self.kernels if not k.name.startswith("rows_"))
        return kernel

    @property
    def kernel_launch(self) -> Launch:
        """The launch of `kernel`."""
        (launch,) = (i for i in self.launches if i.name == self.kernel.name)
        return launch


def compile_for(
    f: Callable[..., Any], *avals: Any, arch: str, specs: tuple[Any, ...] | None = None
) -> Program:
    """Compiles ``jit(f)``.

    Args:
      f: Function of arrays and pytrees of them.
      *avals: Its arguments as `jax.ShapeDtypeStruct`.
      arch: One of `DEVICES`.
      specs: How the arguments are cut over eight devices, whose axes are `MESH`. None
        compiles for one device.

    Returns:
      What became of it.
    """
    # XLA looks ptxas up on PATH too, and writes PTX that it understands.
    os.environ["PATH"] = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    device = _devices(arch, 1)[0]
    if specs is None:
        placed = out = jax.sharding.SingleDeviceSharding(device)
    else:
        mesh = jax.sharding.Mesh(
            np.reshape(_devices(arch, 8), tuple(MESH.values())), tuple(MESH)
        )
        out = None
        placed = jax.tree.map(
            functools.partial(jax.sharding.NamedSharding, mesh), specs
        )
        placed = jax.tree.map(lambda _, s: s, avals, placed)
    avals = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        avals,
        jax.tree.map(lambda _: placed, avals) if specs is None else placed,
    )
    target = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=None, platform="gpu"
    )
    abstract = jax.sharding.AbstractMesh((), (), abstract_device=target)
    with tempfile.TemporaryDirectory() as folder:
        # Only PTX: the log of the Triton passes takes ten times as long as compiling.
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        # What is cut over devices is lowered again while it is compiled.
        with jax.sharding.use_abstract_mesh(abstract):
            lowered = jax.jit(f, out_shardings=out).trace(*avals).lower()
            compiled = lowered.compile(compiler_options=options)
        hlo = compiled.as_text()
        # Written again, under a longer name, by passes that change the sequence.
        thunks = max(Path(folder).glob("*.thunk_sequence*.txt"))
        launches = list(read_launches(thunks.read_text()))
        texts = [path.read_text() for path in Path(folder).glob("*.ptx")]
        names = _pallas_names(hlo)
        kernels = [
            Kernel(name, ptx, DEVICES[arch].ptxas_arch)
            for ptx in texts
            for name in re.findall(r"\.entry (\w+)\(", ptx)
            # Another launch of the same name gets a number.
            if re.sub(r"__\d+$", "", name) in names
        ]
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Program(hlo, temporaries, launches, kernels)


@functools.cache
def _devices(arch: str, count: int) -> Any:
    device = DEVICES[arch]
    major, minor = device.capability
    target = f"""
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        core_count: {device.cores}
        fpus_per_core: {64 if arch == "sm_80" else 128}
        clock_rate_ghz: {device.clock}
        device_memory_size: {device.memory}
        memory_bandwidth: {device.bandwidth}
        l2_cache_size: {device.l2}
        shared_memory_per_core: {device.shared_per_core}
        shared_memory_per_block_optin: {device.shared_per_core - 1024}
        shared_memory_per_block: {48 << 10}
        registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        threads_per_warp: 32
        threads_per_block_limit: 1024
        threads_per_core_limit: 2048
        block_dim_limit_x: {2**31 - 1}
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 12 }}
      device_description_str: "{device.name}"
    """
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x1x{count}"
    )
    return topology.devices


def read_launches(thunks: str) -> Iterator[Launch]:
    """Reads a dump of XLA's thunks, one a line and indented within a sequence."""
    graph = None  # indentation of the command buffer that encloses the line
    line = re.compile(
        r"( *)\d+: (k\w+) \[[^\]]*\] ?(?:kernel=)?([^\s,]*)"
        # JAX 0.10 says it otherwise, and no bytes of shared memory.
        r"(?:,.*=blocks: \{([\d, ]+)\}, threads/block: \{([\d, ]+)\}"
        r"| grid: \[([\d, ]+)\] threads: \[([\d, ]+)\])?"
        r"(?:  shared_memory: (\d+) bytes)?"
    )
    for indent, kind, name, *numbers, shared in line.findall(thunks):
        if graph is not None and len(indent) <= graph:
            graph = None
        if kind == "kCommandBuffer":
            graph = len(indent)
            continue
        grid, threads = (
            tuple(map(int, s.split(", "))) if (s := a or b) else ()
            for a, b in zip(numbers[:2], numbers[2:], strict=True)
        )
        sizes = sum(threads[:1]), int(shared or 0)
        yield Launch(kind, name, grid, *sizes, graph is not None)


def calls(hlo: str) -> Iterator[tuple[str, str]]:
    """Yields the name of every Pallas kernel that is called, and the instruction."""
    for line in hlo.splitlines():
        if f'custom_call_target="{TRITON}"' in line:
            (name,) = re.findall(r'name = "(\w+)", num_stages', line)
            yield name, line


def _pallas_names(hlo: str) -> set[str]:
    return {name for name, _ in calls(hlo)}


def _run(tool: str, *arguments: Any) -> str:
    done = subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr}")
    return done.stdout + done.stderr


def versions() -> dict[str, str]:
    """What a count depends on."""
    release = re.search(r"V([\d.]+)", _run("ptxas", "--version"))[1]
    return {"jax": jax.__version__, "ptxas": release}
