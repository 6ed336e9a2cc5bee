"""Where a model goes on many devices: what ``--mesh data,model`` means.

Sequences are cut over "data", matrices over "model". In attention and in the gated
layer, the first matrices are cut by columns, those of attention between heads, so that
what lies between needs no other device; the last (o_proj, down_proj) are cut by rows,
and their products are summed. A last matrix whose groups cannot be shared, or whose
rows have an order (act-order), is cut by columns, too, and its inputs are gathered.
Embedding and output matrix are cut by the vocabulary, if it can be; norms are
everywhere. Matrices of experts are cut likewise, so that the devices share the work on
every token; a stack of them that cannot be, along its experts. Those that a checkpoint
has one by one are then on all devices until they are a stack.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from gguf_file import read_config
from hf_config import Config
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import Cache
from tensors import EXPERT

# Also Mixtral's w1, w2, w3, gpt-oss's gate_up_proj, and what Phi has joined.
FIRST = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3")
FIRST += ("qkv_proj", "gate_up_proj")
LAST = "o_proj", "down_proj", "w2"
VOCABULARY = ("embed_tokens", "lm_head")

MeshOption = Annotated[
    str | None,
    typer.Option(
        help="Devices as DATA,MODEL, such as 2,4: sequences are cut over the first, "
        "matrices over the second. A CPU is made into as many virtual devices."
    ),
]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and what lies where on it.

    Attributes:
      mesh: Devices with the axes "data" and "model".
      act_order: Whether the rows of packed matrices have an order.
    """

    mesh: Mesh
    act_order: bool = False

    def weight(self, name: str) -> list[NamedSharding]:
        """Where a weight of the checkpoint goes: the first that cuts it evenly."""
        module, _, kind = name.rpartition(".")
        if name.endswith("_bias"):  # of gpt-oss's experts
            module, kind = name.removesuffix("_bias"), "bias"
        elif kind not in ("weight", "bias"):
            module, kind = name, "packed"
        by_column, by_row = P(None, "model"), P("model", None)
        if kind == "weight":  # [n, k]
            by_column, by_row = by_row, by_column
        path, _, layer = module.rpartition(".")
        specs = [P()]
        if layer in FIRST:
            specs = [P("model") if kind == "bias" else by_column]
        elif layer in VOCABULARY and kind != "bias":
            specs = [by_column, P()]
        elif layer in LAST and kind != "bias":
            ordered = self.act_order and kind == "packed"
            specs = [by_column] if ordered else [by_row, by_column]
        if path.endswith(".experts"):  # a stack, which may be cut along them instead
            specs = [P(None, *spec) for spec in specs]
            specs.append(P() if kind == "bias" else P("model"))
        elif EXPERT.fullmatch(module):  # one of those that will be a stack
            specs.append(P())
        return [NamedSharding(self.mesh, spec) for spec in specs]

    @property
    def everywhere(self) -> NamedSharding:
        """What all devices hold."""
        return NamedSharding(self.mesh, P())

    @property
    def cache(self) -> Cache:
        """Keys and values ``[b, s, kv_heads, head_dim]``: by sequences and heads."""
        by_head = NamedSharding(self.mesh, P("data", None, "model"))
        rows = NamedSharding(self.mesh, P("data"))
        return Cache(by_head, by_head, self.everywhere, rows)

    def rows(self, array: np.ndarray) -> Array:
        """Puts what every process has in memory on the devices, by its first axis."""
        where = NamedSharding(self.mesh, P("data"))
        return jax.make_array_from_callback(array.shape, where, array.__getitem__)


def rows_of(placement: Placement | None, batch: int) -> Callable[[np.ndarray], Array]:
    """What puts arrays of ``batch`` rows on the devices.

    Raises:
      ValueError: If devices cannot share the rows evenly.
    """
    if placement is None:
        return jnp.asarray
    shares = placement.mesh.shape["data"]
    if batch % shares:
        raise ValueError(
            f"batch={batch} must be a multiple of {shares}, the first of --mesh."
        )
    return placement.rows


def place(
    path: Path,
    mesh: str | None,
    coordinator: str | None = None,
    processes: int = 1,
    process: int = 0,
) -> Placement | None:
    """Says where the model of a directory or a GGUF file goes. No weight is read.

    Call it before anything asks JAX for a device: only then can a CPU be made into
    several, and processes be connected.

    Args:
      path: The directory, or the file.
      mesh: "data,model", or None for one device.
      coordinator: "host:port" of the first process, where there are several.
      processes: How many there are; all devices of all of them make the mesh.
      process: Which of them this is.

    Returns:
      The placement, or None without a mesh.

    Raises:
      ValueError: If there are not so many devices, or they cannot share the heads.
    """
    if mesh is None:
        if processes > 1:
            raise ValueError(f"--processes {processes} needs a --mesh to share.")
        return None
    sizes = _sizes(mesh)
    entry = read_config(path)
    config, shares = Config.from_json(entry), sizes[1]
    heads = {"q_proj": config.num_heads, "k_proj and v_proj": config.num_kv_heads}
    for matrix, count in heads.items():
        if count % shares:
            raise ValueError(
                f"--mesh {mesh}: {count} heads of self_attn.{matrix} cannot be shared "
                f"evenly by {shares} devices; choose a divisor."
            )
    quantization = entry.get("quantization_config") or {}
    devices = _devices(mesh, math.prod(sizes), coordinator, processes, process)
    axes = (AxisType.Auto, AxisType.Auto)
    made = jax.make_mesh(sizes, ("data", "model"), axes, devices=devices)
    return Placement(made, bool(quantization.get("desc_act")))


def _sizes(mesh: str) -> tuple[int, int]:
    sizes = mesh.split(",")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--mesh {mesh} must be two numbers, such as 2,4.")
    return int(sizes[0]), int(sizes[1])


def _devices(
    mesh: str, count: int, coordinator: str | None, processes: int, process: int
) -> list[jax.Device]:
    if count % processes:
        raise ValueError(
            f"--mesh {mesh}: {processes} processes cannot share it evenly."
        )
    # Too late where JAX has its devices already.
    with contextlib.suppress(RuntimeError):
        if jax.config.jax_num_cpu_devices < count // processes:
            jax.config.update("jax_num_cpu_devices", count // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, process)
    devices = jax.devices()
    if len(devices) < count or (processes > 1 and len(devices) > count):
        raise ValueError(f"--mesh {mesh} asks for {count} devices of {len(devices)}.")
    if devices[0].platform == "cpu" and count > 1:
        print(f"{count} virtual devices, made of the CPU", file=sys.stderr)
    return devices[:count]
