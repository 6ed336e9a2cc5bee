"""In the place of `lang.launch`: launches as a named GPU would run them."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.pallas import lang
from tests.gpu import compiler
from tests.gpu.emulator import machine, parser
from tests.gpu.emulator.operations import OPERATIONS
from tests.gpu.emulator.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Launched:
    """A launch that was emulated.

    Attributes:
      name: Of the kernel.
      emulated: Its outputs.
      interpreted: Those of the same body as jnp.
      traffic: What its accesses to memory cost.
      opcodes: Those of its text.
    """

    name: str
    emulated: list[np.ndarray]
    interpreted: list[np.ndarray]
    traffic: Traffic
    opcodes: frozenset[str]


@contextlib.contextmanager
def emulated(arch: str) -> Iterator[list[Launched]]:
    """Within it, every launch is compiled for a GPU, and emulated.

    Args:
      arch: One of `compiler.DEVICES`.

    Yields:
      The launches so far.
    """
    launch, launched = lang.launch, []

    def emulate(body: Any, *operands: Any, interpret: bool, **options: Any) -> Any:
        del interpret
        compiled = functools.partial(launch, body, interpret=False, **options)
        kernel = Kernel.compiled(compiled, operands, arch)
        out = options["out"]

        def run(operands: Any, interpreted: Any) -> Any:
            leaves = jax.tree.leaves(operands)
            found, traffic = kernel.run(leaves, jax.tree.leaves(out))
            wanted = [np.asarray(leaf) for leaf in jax.tree.leaves(interpreted)]
            opcodes = frozenset(one.opcode for one in kernel.ptx.statements)
            launched.append(Launched(options["name"], found, wanted, traffic, opcodes))
            return jax.tree.unflatten(jax.tree.structure(out), found)

        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(operands)):
            # Compiled now, and run when the operands are known.
            interpreted = launch(body, *operands, interpret=True, **options)
            return jax.pure_callback(run, out, operands, interpreted)
        # Every value that a body is made of shows all that it holds.
        key = repr((body, options))
        if key not in _INTERPRETATIONS:
            call = functools.partial(launch, body, interpret=True, **options)
            _INTERPRETATIONS[key] = jax.jit(call)
        interpreted = _INTERPRETATIONS[key](*operands)
        return jax.tree.map(jnp.asarray, run(operands, interpreted))

    lang.launch = emulate
    try:
        yield launched
    finally:
        lang.launch = launch


# Launches as jnp: compiled for the first GPU of a process, and there for the next.
_INTERPRETATIONS: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A launch that is ready to be emulated."""

    ptx: parser.Kernel
    grid: tuple[int, ...]
    shared: int

    @classmethod
    def compiled(cls, launch: Any, operands: Any, arch: str) -> "Kernel":
        """Compiles a launch of operands, of which only shapes and dtypes matter."""
        avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
        program = compiler.compile_for(launch, *avals, arch=arch)
        (kernel,) = program.kernels
        (launched,) = (i for i in program.launches if i.name == kernel.name)
        shared = launched.shared or compiler.DEVICES[arch].shared_per_core
        return cls(parser.parse(kernel.ptx), launched.grid, shared)

    def run(
        self, operands: list[Any], out: list[Any]
    ) -> tuple[list[np.ndarray], Traffic]:
        """Returns the outputs, whose shapes and dtypes ``out`` says, and the costs."""
        found, traffic = machine.run(
            self.ptx,
            OPERATIONS,
            [np.asarray(operand) for operand in operands],
            [one.size * one.dtype.itemsize for one in out],
            self.grid,
            self.shared,
        )
        shaped = [
            data.view(one.dtype).reshape(one.shape)
            for data, one in zip(found, out, strict=True)
        ]
        return shaped, traffic
