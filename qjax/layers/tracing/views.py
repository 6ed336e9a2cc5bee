"""A packed matrix as the dense array of many axes that foreign code sees.

Foreign code transposes, reshapes and casts its weight before a product. None of that
moves a code: it only says which axis of what the code sees is which part of the rows,
the columns or the stack of the packed matrix. A `View` keeps count of it.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROW, COLUMN = "row", "column"
# A side of a packed matrix: its rows, its columns, or one of the axes of its stack.
Side = str | int


class Atom(NamedTuple):
    """A run of indices of one side, of which a view's axes consist.

    Attributes:
      side: The side that is counted.
      stride: How far along that side one step goes.
      size: Number of steps.
    """

    side: Side
    stride: int
    size: int


@dataclasses.dataclass(frozen=True)
class Form:
    """Which axes of a dense weight are the rows of a matrix, and which its columns.

    The axes that are neither count the matrices of a stack. Axes in front of those of
    ``shape``, as `nnx.vmap` and `nn.scan` put them there, count matrices as well.

    Attributes:
      shape: Shape of the dense weight, as its own module declares it.
      rows: The axes that are the rows, flattened in this order.
      columns: The axes that are the columns, flattened in this order.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that count matrices."""
        axes = range(len(self.shape))
        return tuple(a for a in axes if a not in (*self.rows, *self.columns))

    @property
    def k(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.shape[axis] for axis in self.rows)

    @property
    def n(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.shape[axis] for axis in self.columns)

    def matrix(self, weight: Any) -> Any:
        """Turns a dense weight into the matrix, or the stack, that is packed.

        Args:
          weight: Array of the shape ``(*outer, *shape)``.

        Returns:
          ``[*outer, *stack, k, n]``.
        """
        outer = weight.ndim - len(self.shape)
        order = (*self.stack, *self.rows, *self.columns)
        axes = (*range(outer), *(outer + axis for axis in order))
        stack = tuple(self.shape[axis] for axis in self.stack)
        shape = (*weight.shape[:outer], *stack, self.k, self.n)
        return weight.transpose(axes).reshape(shape)

    def names(self, given: Sequence[Any], ndim: int) -> dict[str, Any]:
        """Names the axes of the matrix after those of the dense weight.

        Args:
          given: Names of its first axes, such as of a mesh; None where there is none.
          ndim: How many axes it has, with those in front of ``shape``.

        Returns:
          Those of "k", "n", and "b0", ... of the stack, that have one. Rows, or
          columns, that several axes became have that of the first of these: a part of
          another is no run of them.
        """
        outer = ndim - len(self.shape)
        given = (*given, *[None] * (ndim - len(given)))
        stack = (*range(outer), *(outer + axis for axis in self.stack))
        first = {f"b{i}": axis for i, axis in enumerate(stack)}
        for side, axes in (("k", self.rows), ("n", self.columns)):
            if long := [axis for axis in axes if self.shape[axis] > 1]:
                first[side] = outer + long[0]
        return {
            side: given[axis] for side, axis in first.items() if given[axis] is not None
        }

    def view(self, batch: tuple[int, ...], dtype: Any) -> "View":
        """Sees a packed matrix as the dense weight.

        Args:
          batch: Sizes of the leading axes of the packed matrix. `nnx.scan` and
            `nnx.vmap` hand out the matrices of a stack without its first axes.
          dtype: Dtype of the dense weight.

        Returns:
          The view, ``(*outer, *shape)``.
        """
        outer = len(batch) - len(self.stack)
        if outer < 0:
            return self._inside(self.stack[:-outer]).view(batch, dtype)
        places: dict[int, tuple[Side, int]] = {
            axis: (outer + i, 1) for i, axis in enumerate(self.stack)
        }
        for side, axes in ((ROW, self.rows), (COLUMN, self.columns)):
            stride = 1
            for axis in reversed(axes):
                places[axis] = (side, stride)
                stride *= self.shape[axis]
        atoms = [
            *(Atom(i, 1, size) for i, size in enumerate(batch[:outer])),
            *(Atom(*places[axis], size) for axis, size in enumerate(self.shape)),
        ]
        return View(tuple((atom,) if atom.size > 1 else () for atom in atoms), dtype)

    def _inside(self, gone: tuple[int, ...]) -> "Form":
        """The form of what is left without some axes of the stack."""
        left = [axis for axis in range(len(self.shape)) if axis not in gone]
        return Form(
            tuple(self.shape[axis] for axis in left),
            tuple(map(left.index, self.rows)),
            tuple(map(left.index, self.columns)),
        )


class View(NamedTuple):
    """An array whose every axis is known as a part of a packed matrix.

    Attributes:
      dims: The atoms of each axis, the slowest first; none for an axis of size 1, as
        no atom has the size 1.
      dtype: Dtype of the array.
    """

    dims: tuple[tuple[Atom, ...], ...]
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """The atoms of all axes."""
        return tuple(atom for dim in self.dims for atom in dim)

    def pick(self, axes: Iterable[int]) -> tuple[Atom, ...]:
        """Returns the atoms of some axes."""
        return tuple(atom for axis in axes for atom in self.dims[axis])

    def reshape(self, shape: Sequence[int]) -> "View | None":
        """Returns the reshaped view, or None where an atom would be cut unevenly."""
        left, dims = list(self.atoms), []
        for size in shape:
            dim: list[Atom] = []
            wanted = size
            while wanted > 1:
                atom = left.pop(0)
                if atom.size > wanted:
                    if atom.size % wanted:
                        return None
                    rest = atom.size // wanted
                    left.insert(0, atom._replace(size=rest))
                    atom = Atom(atom.side, atom.stride * rest, wanted)
                elif wanted % atom.size:
                    return None
                dim.append(atom)
                wanted //= atom.size
            dims.append(tuple(dim))
        return self._replace(dims=tuple(dims))


def in_order(atoms: Iterable[Atom], side: Side) -> list[Atom]:
    """The atoms of a side, from the one that steps furthest to the one that counts."""
    return sorted((a for a in atoms if a.side == side), key=lambda atom: -atom.stride)


def sizes(atoms: Iterable[Atom]) -> tuple[int, ...]:
    """The sizes of atoms."""
    return tuple(atom.size for atom in atoms)


def follow(primitive: str, params: dict[str, Any], view: View) -> View | None:
    """Follows a view through an operation that moves no element of the matrix.

    Args:
      primitive: Name of the operation.
      params: Its parameters.
      view: Its one operand.

    Returns:
      The view of its result, or None if the operation is of another kind.
    """
    if primitive == "transpose":
        return view._replace(dims=tuple(view.dims[i] for i in params["permutation"]))
    if primitive == "reshape":
        dims = params["dimensions"]
        return view.reshape(params["new_sizes"]) if dims is None else None
    if primitive == "squeeze":
        gone = params["dimensions"]
        kept = [dim for i, dim in enumerate(view.dims) if i not in gone]
        return view._replace(dims=tuple(kept))
    if primitive == "broadcast_in_dim":
        return _spread(view, params["shape"], params["broadcast_dimensions"])
    if primitive == "convert_element_type":
        dtype = params["new_dtype"]
        floating = jnp.issubdtype(dtype, jnp.floating)
        return view._replace(dtype=np.dtype(dtype)) if floating else None
    if primitive == "device_put":
        return view if is_memory(params["devices"]) else None
    # An annotation of the dense array has no meaning for the packed one.
    annotations = ("copy", "copy_p", "sharding_constraint", "reshard", "name", "pvary")
    return view if primitive in annotations else None


def is_memory(devices: Sequence[Any]) -> bool:
    """Whether an array goes to another memory at most, and to no other devices."""
    return all(to is None or isinstance(to, jax.memory.Space) for to in devices)


def _spread(view: View, shape: Sequence[int], where: Sequence[int]) -> View | None:
    """Follows a broadcast that only adds axes of size 1."""
    if math.prod(shape) != math.prod(view.shape):
        return None
    dims: list[tuple[Atom, ...]] = [()] * len(shape)
    for axis, dim in zip(where, view.dims, strict=True):
        dims[axis] = dim
    return view._replace(dims=tuple(dims))
