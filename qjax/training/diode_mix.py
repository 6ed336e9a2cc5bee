"""DiodeMix of bitorch-engine: the optimizer of integer weights, for optax.

With ``g`` the (shadow) gradient at step ``t``, from 1,

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g g
    a = learning_rate sqrt(1 - b2^t) / (1 - b1^t)
    step = -a m / (sqrt(v) + eps)

which is Adam with ``eps`` outside the bias correction. The transformation knows nothing
of integers: its gradients and steps are float trees like any other's, so that
`optax.MultiSteps`, `optax.masked` and the rest of optax apply. The integers are moved
by `qjax.training.apply_updates`.

Source: GreenBitAI/bitorch-engine, bitorch_engine/optim/diode_beta.py, commit
0009b1f8178e86df6433383879c0005a49c0cc92.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float, Int32

from qjax.decode import rounded
from qjax.training.low_rank import Basis, GaLore

# Steps after which bitorch-engine moves the zeros.
ZERO_STEPS = 5


class DiodeMixState(NamedTuple):
    """What DiodeMix remembers: nothing for packed words, two moments for a gradient.

    Attributes:
      count: Steps taken.
      mu: First moments, in the space of low rank if there is one.
      nu: Second moments, likewise.
      basis: The `Basis` of each gradient that is projected, else None.
    """

    # The name that optax has for it, though tuples have a method of that name.
    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any
    basis: Any

    @property
    def moves_zeros(self) -> Array:
        """Whether bitorch-engine moves zeros at the step just taken: each fifth."""
        return (self.count % ZERO_STEPS == 0) & (self.count > 0)


def diode_mix(
    learning_rate: optax.ScalarOrSchedule = 1e-4,
    b1: float = 0.99,
    b2: float = 0.9999,
    eps: float = 1e-6,
    *,
    correct_bias: bool = True,
    state_dtype: DTypeLike = jnp.float32,
    galore: GaLore | None = None,
) -> optax.GradientTransformation:
    """DiodeMix, for shadow gradients and for those of float parameters.

    Args:
      learning_rate: Size of a step, or a schedule of the steps taken.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the square root of the second moment.
      correct_bias: Whether ``a`` above has more than the learning rate.
      state_dtype: Dtype of the moments, in which they are computed. In float16 the
        second one underflows, and the first steps are very large, as upstream's are.
      galore: Projects the gradients of matrices, stacked or not; None does not.

    Returns:
      The transformation. ``init`` takes float arrays of the gradients' shapes, such as
      `shadow.zeros` makes (abstract ones will do), not QTensors; the updates are
      float32.

    Raises:
      ValueError: If an argument is out of range; from ``init``, if it is given
        integers, or a matrix has no room for GaLore's rank.

    Example:
      One step of a layer's codes.

      >>> from qjax import training
      >>> w = qjax.quantize(jnp.eye(64, 32), bits=4, group_size=32)
      >>> x, y = jnp.ones((4, 64)), jnp.zeros((4, 32))
      >>> optimizer = diode_mix(0.1)
      >>> state = optimizer.init(training.shadow.zeros(w))
      >>> def loss(shadow, w):
      ...     return ((training.shadow.matmul(x, w, shadow) - y) ** 2).mean()
      >>> gradient = jax.grad(loss)(training.shadow.zeros(w), w)
      >>> updates, state = optimizer.update(gradient, state)
      >>> stepped = training.apply_updates(w, updates, move_zeros=state.moves_zeros)
      >>> float(loss(training.shadow.zeros(w), stepped)) < float(loss(gradient, w))
      True
    """
    _check_numbers(learning_rate, b1, b2, eps)
    dtype = jnp.dtype(state_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"state_dtype={dtype} must be a float dtype.")
    rule = _Rule(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        correct_bias=correct_bias,
        dtype=dtype,
        galore=galore,
    )
    return optax.GradientTransformation(rule.init, rule.update)


def _check_numbers(
    learning_rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float
) -> None:
    for name, value in {"b1": b1, "b2": b2}.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be at least 0 and less than 1.")
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative.")
    if not callable(learning_rate) and learning_rate < 0:
        raise ValueError(f"learning_rate={learning_rate} must not be negative.")


class _Leaf(NamedTuple):
    step: Array
    mu: Array
    nu: Array
    basis: Basis | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Rule:
    """The two functions of the transformation; the fields are those of `diode_mix`."""

    learning_rate: optax.ScalarOrSchedule
    b1: float
    b2: float
    eps: float
    correct_bias: bool
    dtype: jnp.dtype
    galore: GaLore | None

    def init(self, params: optax.Params) -> DiodeMixState:
        jax.tree.map(_check_param, params)
        basis = jax.tree.map(lambda p: _start(p.shape, self.galore), params)
        moments = jax.tree.map(
            lambda p: _zeros(p.shape, self.galore, self.dtype), params
        )
        # Two trees of arrays, not one twice: a step may be given both to write over.
        return DiodeMixState(
            count=jnp.zeros((), jnp.int32),
            mu=moments,
            nu=jax.tree.map(jnp.zeros_like, moments),
            basis=basis,
        )

    def update(
        self, updates: optax.Updates, state: Any, params: Any = None
    ) -> tuple[optax.Updates, DiodeMixState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        step = functools.partial(
            self._step, self._size(state.count, count), state.count
        )
        leaves = jax.tree.map(step, updates, state.mu, state.nu, state.basis)
        steps, mu, nu, basis = (
            jax.tree.map(
                lambda leaf, i=i: leaf[i],
                leaves,
                is_leaf=lambda leaf: isinstance(leaf, _Leaf),
            )
            for i in range(4)
        )
        return steps, DiodeMixState(count, mu, nu, basis)

    def _size(self, taken: Array, count: Array) -> Float[Array, ""]:
        """``a`` of the step ``count``, before which ``taken`` were taken."""
        rate = self.learning_rate
        size = jnp.asarray(rate(taken) if callable(rate) else rate, jnp.float32)
        if self.correct_bias:
            size = size * jnp.sqrt(_one_less_power(self.b2, count))
            size = size / _one_less_power(self.b1, count)
        return size

    def _step(
        self,
        size: Array,
        taken: Array,
        g: Array,
        mu: Array,
        nu: Array,
        basis: Basis | None,
    ) -> _Leaf:
        """Moves one parameter; the arrays after ``taken`` are its own."""
        galore = self.galore
        if galore is not None and basis is not None:
            basis = galore.refresh(basis, g, taken)
            g = galore.project(g.astype(self.dtype), basis)
        mu, nu = _moments(g, mu, nu, self.b1, self.b2)
        step = _normalized(mu, nu, self.eps)
        if galore is not None and basis is not None:
            step = galore.back(step, basis)
        return _Leaf(-size * step.astype(jnp.float32), mu, nu, basis)


def _check_param(param: Any) -> None:
    dtype = getattr(param, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"params has a leaf of dtype {dtype}; diode_mix takes float arrays of the "
            "gradients' shapes: for QTensors those of qjax.training.shadow.zeros."
        )


def _start(shape: tuple[int, ...], galore: GaLore | None) -> Basis | None:
    """The basis of a gradient, where there is GaLore and it is a matrix's."""
    return galore.init(shape) if galore and len(shape) >= 2 else None


def _zeros(
    shape: tuple[int, ...], galore: GaLore | None, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """A moment of a gradient, in the space of low rank if there is one."""
    basis = _start(shape, galore)
    if galore is None or basis is None:
        return jnp.zeros(shape, dtype)
    gradient = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jnp.zeros(jax.eval_shape(galore.project, gradient, basis).shape, dtype)


def _one_less_power(decay: float, count: Int32[Array, ""]) -> Float[Array, ""]:
    """``1 - decay**count``, of which float32 would lose most digits near 0."""
    if decay == 0:
        return jnp.ones((), jnp.float32)
    return -jnp.expm1(count.astype(jnp.float32) * math.log(decay))


def _moments(
    g: Array, mu: Array, nu: Array, b1: float, b2: float
) -> tuple[Array, Array]:
    """The new moments; each operation rounds to their dtype, as upstream's do."""
    dtype, g = mu.dtype, g.astype(jnp.float32)

    def decayed(moment: Array, decay: float, term: Array) -> Array:
        kept = rounded(moment.astype(jnp.float32) * decay, dtype)
        return (kept + (1 - decay) * term).astype(dtype)

    return decayed(mu, b1, g), decayed(nu, b2, g * g)


def _normalized(mu: Array, nu: Array, eps: float) -> Array:
    root = rounded(jnp.sqrt(nu.astype(jnp.float32)), mu.dtype)
    below = rounded(root + eps, mu.dtype)
    return (mu.astype(jnp.float32) / below).astype(mu.dtype)
