"""Kernels of many axes as matrices: what general linear and einsum layers share.

The axes of a kernel that a product sums, flattened in the order that the kernel has
them, are the rows of one matrix ``[k, n]``; those that the output keeps are its
columns; those that count matrices are a stack. So the groups of a quantized kernel run
over the flattened contraction: an output projection ``(heads, head_dim, model)`` is the
matrix ``[heads * head_dim, model]``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, zeros
from jaxtyping import Array, DTypeLike, Float, Num

from qjax.layers import dense
from qjax.tensor import QTensor

_SUPPORTED = (
    "supported is one product with the kernel, such as 'BTD,DNH->BTNH', "
    "'BTNH,NHD->BTD', '...d,df->...f' or, for a stack, 'EBD,EDF->EBF': at least one "
    "letter is summed, it is in the inputs and in the kernel, and every other letter "
    "is in the output"
)


class Plan(NamedTuple):
    """How inputs of a known rank become the rows of a product, and what comes of it.

    Attributes:
      stack: Axes of the inputs that count matrices of a stack.
      summed: Axes of the inputs that are summed, in the order of the kernel's rows.
      features: Sizes of the axes that the kernel's columns are.
      output: The output's axes among (stack, other axes of the inputs, features).
      bias: Shape in which a bias is added to the output.
    """

    stack: tuple[int, ...]
    summed: tuple[int, ...]
    features: tuple[int, ...]
    output: tuple[int, ...]
    bias: tuple[int, ...]


def apply(
    inputs: Num[Array, "..."],
    kernel: QTensor,
    bias: Array | None,
    plan: Plan,
    *,
    dtype: DTypeLike | None,
    implementation: str | None,
) -> Float[Array, "..."]:
    """Computes the product that a plan says, in the dtype that Flax's own layers take.

    Args:
      inputs: Any axes.
      kernel: ``[*stack, k, n]``.
      bias: What reshapes to ``plan.bias``, or None.
      plan: Where the axes go.
      dtype: As in `dense.apply`.
      implementation: As in `qjax.matmul`.

    Returns:
      The output, in that dtype.
    """
    dtype = dense.computed_in(inputs, kernel, bias, dtype)
    product = functools.partial(
        dense.apply, bias=None, dtype=dtype, implementation=implementation
    )
    for _ in plan.stack:
        product = jax.vmap(product)
    y = _arranged(inputs, plan, lambda rows: product(rows, kernel))
    return y if bias is None else y + jnp.asarray(bias, dtype).reshape(plan.bias)


def factored(
    a: Float[Array, "*stack k rank"],
    b: Float[Array, "*stack rank n"] | None,
    inputs: Num[Array, "..."],
    plan: Plan,
) -> Float[Array, "..."]:
    """Computes the product that a plan says, with ``a @ b`` for a kernel.

    Args:
      a: ``[*stack, k, rank]``.
      b: ``[*stack, rank, n]`` of the dtype of ``a``; None where the kernel is ``a``.
      inputs: As in `apply`.
      plan: As in `apply`.

    Returns:
      The output in the dtype of ``a``.
    """

    def product(rows: Array) -> Array:
        stack = rows.shape[: len(plan.stack)]
        return low_rank(rows.reshape(*stack, -1, rows.shape[-1]), a, b)

    return _arranged(jnp.asarray(inputs, a.dtype), plan, product)


def low_rank(
    x: Num[Array, "*batch k"],
    a: Float[Array, "*stack k rank"],
    b: Float[Array, "*stack rank n"] | None,
) -> Float[Array, "*batch n"]:
    """``x @ a @ b`` in the dtype of ``a``, left to right; without ``b``, ``x @ a``."""
    low = jnp.matmul(jnp.asarray(x, a.dtype), a, precision="highest")
    return low if b is None else jnp.matmul(low, b, precision="highest")


def _arranged(inputs: Array, plan: Plan, product: Callable[[Array], Array]) -> Array:
    """Makes rows of the inputs, and the output of what a product makes of them."""
    moved = (*plan.stack, *plan.summed)
    others = [axis for axis in range(inputs.ndim) if axis not in moved]
    x = jnp.transpose(inputs, (*plan.stack, *others, *plan.summed))
    held = x.shape[: x.ndim - len(plan.summed)]
    rows = x.reshape(*held, math.prod(x.shape[len(held) :]))
    return product(rows).reshape(*held, *plan.features).transpose(plan.output)


def plan_axes(
    axis: int | Iterable[int], features: tuple[int, ...], shape: tuple[int, ...]
) -> Plan:
    """Plans a product over some axes of the inputs; the features come last.

    Args:
      axis: The axes that are summed. They are sorted, as in Flax.
      features: Sizes of the output's new axes.
      shape: Shape of the inputs.

    Returns:
      The plan.

    Raises:
      ValueError: If the inputs lack an axis, or one is named twice.
    """
    given, ndim = as_tuple(axis), len(shape)
    summed = tuple(sorted(a % ndim if -ndim <= a < ndim else ndim for a in given))
    if ndim in summed or len(set(summed)) != len(summed) or not summed:
        raise ValueError(
            f"axis={axis} must name different axes of inputs.shape={shape}."
        )
    held = ndim - len(summed)
    rank = held + len(features)
    return Plan((), summed, features, tuple(range(rank)), (1,) * held + features)


def as_tuple(sizes: int | Iterable[int]) -> tuple[int, ...]:
    """Returns one size or axis, or several of them, as a tuple."""
    return tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)


def flat(bias_init: Initializer) -> dense.Draw:
    """Lets an initializer draw a bias of many axes as one vector, as Flax does.

    Args:
      bias_init: Any initializer; `zeros` is returned as it is.

    Returns:
      An initializer of any shape.
    """
    if bias_init is zeros:
        return bias_init
    return lambda key, shape, dtype: bias_init(key, (math.prod(shape),), dtype).reshape(
        shape
    )


@dataclasses.dataclass(frozen=True)
class Equation:
    """An einsum of inputs and a kernel that is one product with a matrix, or a stack.

    Made by `parse`.

    Attributes:
      inputs: Labels of the inputs' axes: letters, and ``...`` at most once.
      kernel: Labels of the kernel's axes.
      output: Labels of the output's axes.
      shape: Shape of the kernel.
    """

    inputs: tuple[str, ...]
    kernel: tuple[str, ...]
    output: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def stack(self) -> tuple[str, ...]:
        """Labels that count matrices: in all of inputs, kernel and output."""
        return tuple(c for c in self.kernel if c in self.inputs and c in self.output)

    @property
    def summed(self) -> tuple[str, ...]:
        """Labels of the rows."""
        return tuple(c for c in self.kernel if c not in self.output)

    @property
    def features(self) -> tuple[str, ...]:
        """Labels of the columns."""
        return tuple(c for c in self.kernel if c not in self.inputs)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(*stack, k, n)``: what the `QTensor` must have."""
        rows = math.prod(self._sizes(self.summed))
        return (*self._sizes(self.stack), rows, math.prod(self._sizes(self.features)))

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The kernel's axes that the output has, in the order of the output."""
        return self._sizes(c for c in self.output if c in self.kernel)

    def matrix(self, kernel: Array) -> Array:
        """Turns a dense kernel into the matrix that it stands for.

        Args:
          kernel: Array of the shape `shape`.

        Returns:
          ``[*stack, k, n]``, to be quantized.

        Raises:
          ValueError: If the kernel has another shape.
        """
        if kernel.shape != self.shape:
            raise ValueError(f"kernel.shape={kernel.shape} must be {self.shape}.")
        labels = (*self.stack, *self.summed, *self.features)
        axes = [self.kernel.index(c) for c in labels]
        return kernel.transpose(axes).reshape(self.matrix_shape)

    def drawing(self, kernel_init: Initializer | None) -> dense.Draw | None:
        """Returns an initializer of the matrix, out of one of the kernel."""
        if kernel_init is None:
            return None

        def draw(key: Array, _: tuple[int, ...], dtype: DTypeLike) -> Array:
            sample = kernel_init(key, self.shape, dtype)
            dense.check_sample("kernel_init", sample, self.shape)
            return self.matrix(sample)

        return draw

    def plan(self, shape: tuple[int, ...]) -> Plan:
        """Plans the product with inputs of a shape.

        Args:
          shape: Shape of the inputs.

        Returns:
          The plan.

        Raises:
          ValueError: If the inputs do not fit the equation.
        """
        count = len(shape) - len(self.inputs) + ("..." in self.inputs)
        if count < 0 or ("..." not in self.inputs and count):
            raise ValueError(
                f"inputs.shape={shape} must have the axes {''.join(self.inputs)!r}."
            )
        inputs, output = _spread(self.inputs, count), _spread(self.output, count)
        for c, size in zip(inputs, shape, strict=True):
            if c in self.kernel and self._sizes(c) != (size,):
                raise ValueError(
                    f"inputs.shape={shape} must have {c}={self._sizes(c)[0]} in "
                    f"{''.join(self.inputs)!r}, as kernel_shape={self.shape}."
                )
        held = [c for c in inputs if c not in self.kernel]
        made = (*self.stack, *held, *self.features)
        kept = [self._sizes(c)[0] if c in self.kernel else 1 for c in output]
        return Plan(
            stack=tuple(inputs.index(c) for c in self.stack),
            summed=tuple(inputs.index(c) for c in self.summed),
            features=self._sizes(self.features),
            output=tuple(made.index(c) for c in output),
            bias=tuple(kept),
        )

    def _sizes(self, labels: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.shape[self.kernel.index(c)] for c in labels)


def parse(einsum_str: str, kernel_shape: Sequence[int]) -> Equation:
    """Reads an einsum's equation.

    Args:
      einsum_str: ``"inputs,kernel->output"``; the inputs may have an ellipsis.
      kernel_shape: Shape of the kernel.

    Returns:
      The equation.

    Raises:
      ValueError: If it is no equation of two operands with an output, or the kernel has
        another number of axes.
      NotImplementedError: If it is more than one product with a matrix.

    Example:
      >>> equation = parse("BTNH,NHD->BTD", (4, 8, 64))
      >>> equation.summed, equation.matrix_shape
      (('N', 'H'), (32, 64))
    """
    sides = einsum_str.replace(" ", "").split("->")
    operands = sides[0].split(",")
    if len(sides) != 2 or len(operands) != 2:
        raise ValueError(
            f"einsum_str={einsum_str!r} must have two operands and an output: "
            "'inputs,kernel->output'."
        )
    terms = [_labels(einsum_str, term) for term in (*operands, sides[1])]
    equation = Equation(*terms, shape=tuple(kernel_shape))
    inputs, kernel, output = map(set, terms)
    if len(terms[1]) != len(kernel_shape) and "..." not in kernel:
        raise ValueError(
            f"kernel_shape={tuple(kernel_shape)} must have the {len(terms[1])} axes of "
            f"{operands[1]!r} in einsum_str={einsum_str!r}."
        )
    if not output <= inputs | kernel:
        raise ValueError(
            f"einsum_str={einsum_str!r}: every letter of the output must be in the "
            "inputs or in the kernel."
        )
    repeated = any(len(set(term)) != len(term) for term in terms)
    alone = (inputs ^ kernel) - output
    if repeated or alone or "..." in kernel or not equation.summed:
        raise NotImplementedError(f"einsum_str={einsum_str!r}: {_SUPPORTED}.")
    return equation


def _labels(einsum_str: str, term: str) -> tuple[str, ...]:
    """The letters of an operand, and "..." for its ellipsis."""
    before, dots, after = term.partition("...")
    if not (before + after).isalpha() and before + after:
        raise ValueError(
            f"einsum_str={einsum_str!r} must consist of letters and '...', unlike "
            f"{term!r}."
        )
    return (*before, *([dots] if dots else []), *after)


def _spread(labels: tuple[str, ...], count: int) -> list[str]:
    """Puts one label an axis in the place of an ellipsis."""
    axes = [f"...{i}" for i in range(count)]
    return [one for c in labels for one in (axes if c == "..." else [c])]
