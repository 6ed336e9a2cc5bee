"""What the nnx layers share: a `QTensor` of Variables, and how it is replaced."""

from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import reprlib
from jax.nn.initializers import zeros
from jaxtyping import Array, DTypeLike, Float

from qjax import ops
from qjax.layers import dense, partitions
from qjax.tensor import QTensor, check_packed

# Names of the axes of a Variable, in its metadata.
SHARDING = "out_sharding"


class Quantized(nnx.Variable):
    """Integers of a quantized kernel: words, orders, integer zeros. Never trained."""


class Scale(nnx.Param):
    """Floats of a quantized kernel: scales, float zeros, codebooks, input scales.

    An `nnx.Param`, so that ``wrt=nnx.Param`` trains it; ``wrt=nnx.LoRAParam`` does not.
    """


class Packed(nnx.Module):
    """A module whose one weight is a `QTensor`.

    Attributes:
      packed: The `QTensor`, each array a Variable, `Quantized` or `Scale`.
    """

    _weight: ClassVar[str] = "kernel"  # what the layer calls it, and its two axes
    _axes: ClassVar[str] = dense.AXES
    packed: QTensor

    def _make(
        self,
        init: dense.Draw | QTensor | None,
        draw: Callable[[], Array],
        shape: tuple[int, ...],
        start: Callable[..., QTensor],
        **rounding: Any,
    ) -> None:
        """Makes the weight; ``rounding`` are the keywords of ``start``."""
        if init is not None and not callable(init):
            check_packed(init, f"{self._weight}_init")
        if isinstance(init, QTensor):
            weight = ops.prepare(init)
            shape = (*weight.shape[: max(0, weight.ndim - len(shape))], *shape)
            dense.check_shapes(weight, None, shape, name=self._weight, axes=self._axes)
        else:
            weight = start(init, draw(), shape, **rounding)
        self._fill(weight)

    def _fill(self, weight: QTensor) -> None:
        # One Variable an array: jax.grad over one that holds integers raises.
        cut = cut_of(self.packed) if hasattr(self, "packed") else None
        self.packed = nnx.data(variables(weight, cut))

    def __nnx_repr__(self) -> Generator[reprlib.Object | reprlib.Attr, None, None]:
        """Shows the weight as one line in place of its Variables."""
        for part in super().__nnx_repr__():
            if isinstance(part, reprlib.Attr) and part.key == "packed":
                yield reprlib.Attr(self._weight, nnx.as_pure(self.packed))
            else:
                yield part


def drawing(
    rngs: nnx.Rngs | None, **initializers: dense.Draw | QTensor | None
) -> Callable[[], Array]:
    """Returns a function that gives a key for every initializer that draws.

    Args:
      rngs: Random keys, or None where no initializer takes one.
      **initializers: The initializers of a layer, by name.

    Returns:
      The function.

    Raises:
      ValueError: If ``rngs`` is None and an initializer takes a key.
    """
    takes_key = [callable(init) and init is not zeros for init in initializers.values()]
    if rngs is None and any(takes_key):
        raise ValueError(
            f"rngs=None, but {' or '.join(initializers)} takes a key; pass "
            "rngs=nnx.Rngs(seed)."
        )
    # The zeros draw nothing from the key that stands in.
    return (lambda: jax.random.key(0)) if rngs is None else rngs.params


class Projection(Packed):
    """A product with a kernel, and a bias.

    Attributes:
      bias: The bias, an `nnx.Param`, or None.
    """

    bias: nnx.Param | None
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    implementation: str | None

    def _start(
        self,
        shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None,
        kernel_init: dense.Draw | QTensor | None,
        bias_init: dense.Draw,
        rngs: nnx.Rngs | None,
        **rounding: Any,
    ) -> None:
        """Makes kernel and bias; ``rounding`` are more keywords of `dense.start`."""
        draw = drawing(rngs, kernel_init=kernel_init, bias_init=bias_init)
        rounding["param_dtype"] = self.param_dtype
        self._make(kernel_init, draw, shape, dense.start, **rounding)
        if bias_shape is None:
            self.bias = nnx.data(None)
        else:
            stack = self.kernel.shape[: self.kernel.ndim - len(shape)]
            bias = bias_init(draw(), (*stack, *bias_shape), self.param_dtype)
            self.bias = nnx.Param(bias)

    def _replace_bias(self, bias: Array | None) -> None:
        """Replaces the bias that a constructor made, or does nothing without one."""
        if bias is not None:
            self._check(self.kernel, bias)
            self.bias = nnx.Param(jnp.asarray(bias))

    def _check(self, kernel: QTensor, bias: Array | None) -> None:
        wanted = None if self.bias is None else self.bias.shape
        if bias is not None and wanted is None:
            raise ValueError(
                "bias was given, but the layer has none: use_bias=False, or "
                "bias_shape=None."
            )
        dense.check_shapes(kernel, bias, self.kernel.shape, bias_shape=wanted)

    def _apply(self, apply: Callable[..., Array], inputs: Array, *rest: Any) -> Array:
        """Calls a product of inputs, kernel, bias and ``rest``, as the layer says."""
        return apply(
            inputs,
            self.kernel,
            None if self.bias is None else self.bias[...],
            *rest,
            dtype=self.dtype,
            implementation=self.implementation,
        )

    @property
    def kernel(self) -> QTensor:
        """The kernel, put together of the values of its Variables."""
        return nnx.as_pure(self.packed)

    def load(self, kernel: QTensor, bias: Float[Array, "..."] | None = None) -> None:
        """Replaces the kernel by another of the same shape, whatever its format.

        Args:
          kernel: The new kernel. It is prepared for this device once, here.
          bias: The new bias; None leaves the present one.

        Raises:
          TypeError: If the kernel is no `QTensor`.
          ValueError: If a shape differs, or there is a bias but the layer has none.
        """
        self._check(kernel, bias)
        self._fill(ops.prepare(kernel))
        self._replace_bias(bias)


class Cut(NamedTuple):
    """What the Variables of a weight say of how it is cut over devices.

    Attributes:
      axes: Names by axis of the matrix, as `Form.names` gives them.
      metadata: What else there is to names: a mesh, rules.
    """

    axes: partitions.Axes
    metadata: Mapping[str, Any]


def variables(weight: QTensor, cut: Cut | None = None) -> QTensor:
    """Makes each array of a weight a Variable, `Quantized` or `Scale`.

    Args:
      weight: The weight.
      cut: What they say of how it is cut over devices; None says nothing.
    """
    made = jax.tree.map(_variable, weight)
    if cut is None or not cut.axes:
        return made

    def named(variable: nnx.Variable, spec: jax.P) -> nnx.Variable:
        variable.set_metadata(out_sharding=tuple(spec), **cut.metadata)
        return variable

    specs = partitions.specs(weight, cut.axes)
    return jax.tree.map(named, made, specs, is_leaf=_is_variable)


def cut_of(packed: QTensor) -> Cut:
    """Reads what `variables` was told."""
    leaves = jax.tree.leaves(packed, is_leaf=_is_variable)
    named = [leaf.get_metadata(SHARDING, None) or () for leaf in leaves]
    axes = partitions.axes_in(nnx.as_pure(packed), named)
    return Cut(axes, with_names(leaves[0]))


def with_names(variable: nnx.Variable) -> dict[str, Any]:
    """The metadata of a Variable that goes with the names of its axes."""
    found = {
        key: variable.get_metadata(key, None) for key in ("mesh", "sharding_rules")
    }
    return {key: value for key, value in found.items() if value is not None}


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _variable(leaf: Array | jax.ShapeDtypeStruct) -> nnx.Variable:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return Scale(leaf) if floating else Quantized(leaf)
