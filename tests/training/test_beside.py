"""Shadows and adapters beside packed weights that other people's code multiplies by."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import training
from qjax.layers.tracing import interpreter
from qjax.layers.tracing.views import Form
from qjax.training.beside import Adapters, Shadow
from tests.layers import cases
from tests.layers.cases import K, N

EXPERTS, ROWS, RANK, ALPHA = 3, 6, 2, 5
X = cases.inputs(rows=ROWS)
PART = jnp.array([2, 0, 2])
OUTSIDE = jnp.array([1, 0, 7])
TOKENS = jnp.array([[0, 3], [-1, 39]])
WIDE = jnp.asarray(cases.rng(6).normal(size=(ROWS, N)), jnp.float32)


class Case(NamedTuple):
    """A function of a dense weight, by which it multiplies or which it indexes."""

    form: Form
    function: Callable[[jax.Array], jax.Array]
    weight: str = "4bit"
    warns: bool = False


MATRIX = Form((K, N), (0,), (1,))
TABLE = Form((N, K), (1,), (0,))
STACK = Form((EXPERTS, K, N), (1,), (2,))


def product(equation: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *operands, precision="highest")


def scanned(w):
    step = lambda y, w: (y + jnp.tanh(product("tk,kn->tn", X, w)), None)  # noqa: E731
    return jax.lax.scan(step, WIDE, w)[0]


def chosen(w):
    branches = [lambda w, by=by: product("tk,kn->tn", by * X, w) for by in (2, 3)]
    return jax.lax.switch(jnp.int32(1), branches, w)


CASES = {
    "rows": Case(MATRIX, lambda w: product("tk,kn->tn", X, w)),
    "input-scale": Case(MATRIX, lambda w: product("tk,kn->tn", X, w), "mixed"),
    "columns": Case(MATRIX, lambda w: product("tn,kn->tk", WIDE, w)),
    "columns-input-scale": Case(
        MATRIX, lambda w: product("tn,kn->tk", WIDE, w), "mixed"
    ),
    "weight-first": Case(MATRIX, lambda w: product("kn,tk->nt", w, X)),
    "axes": Case(
        Form((8, 5, 12, 8), (0, 2), (1, 3)),
        lambda w: product("abc,adce->bde", X.reshape(8, ROWS, 12), w),
    ),
    "stack": Case(STACK, lambda w: product("etk,ekn->etn", X.reshape(3, 2, K), w)),
    "shared-rows": Case(STACK, lambda w: product("tk,ekn->ten", X, w)),
    "stack-by-columns": Case(
        STACK, lambda w: product("etn,ekn->tek", WIDE.reshape(3, 2, N), w)
    ),
    "ragged": Case(
        STACK, lambda w: jax.lax.ragged_dot(X, w, PART, precision="highest")
    ),
    "taken": Case(STACK, lambda w: product("ek,ekn->en", X[:3], w[PART])),
    "not-there": Case(
        STACK,
        lambda w: product(
            "ek,ekn->en", X[:3], jnp.take(w, OUTSIDE, axis=0, fill_value=0)
        ),
    ),
    "lookup": Case(TABLE, lambda w: w[TOKENS]),
    "tied": Case(TABLE, lambda w: product("tk,nk->tn", w[TOKENS[0]], w)),
    "part-of-columns": Case(MATRIX, lambda w: product("tk,kn->tn", X, w[:, 8:24])),
    "part-of-axis": Case(
        Form((K, 5, 8), (0,), (1, 2)), lambda w: product("tk,khd->thd", X, w[:, :, :4])
    ),
    "scan": Case(STACK, scanned),
    "remat": Case(MATRIX, jax.checkpoint(lambda w: product("tk,kn->tn", X, w))),
    "cond": Case(MATRIX, chosen),
    "dense": Case(MATRIX, lambda w: product("tk,kn->tn", X, 2 * w), "mixed", True),
}
case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def weight_of(case: Case) -> qjax.QTensor:
    one = qjax.prepare(cases.kernel(case.weight))
    if not case.form.stack:
        return one
    each = [
        jax.tree.map(lambda a, i=i: jnp.roll(a, i, -1), one) for i in range(EXPERTS)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def on_packed(case: Case, weight: qjax.QTensor, *beside) -> jax.Array:
    held = interpreter.hold(weight, case.form, jnp.dtype("float32"), "w", beside)
    return interpreter.call(case.function, {"w": held})


def on_dense(case: Case, matrix: jax.Array) -> jax.Array:
    """Of the matrices, without anything packed: the form's axes put back."""
    form = case.form
    order = (*form.stack, *form.rows, *form.columns)
    shape = [form.shape[axis] for axis in order]
    return case.function(matrix.reshape(shape).transpose(np.argsort(order)))


@pytest.fixture
def expects_dense(case):
    """Lets the test run where a warning is due, if one is."""
    warned = pytest.warns(UserWarning, match="w is made dense")
    with warned if case.warns else contextlib.nullcontext():
        yield


@case
@pytest.mark.usefixtures("expects_dense")
def test_shadows_have_the_gradient_of_the_dense_weight(case):
    weight = weight_of(case)
    matrix = qjax.dequantize(weight, jnp.float32)
    y = on_packed(case, weight)
    of_y = jnp.asarray(cases.rng(5).normal(size=y.shape), jnp.float32)

    def loss(zeros):
        return (on_packed(case, weight, Shadow(zeros=zeros)) * of_y).sum()

    found = jax.jit(jax.grad(loss))(training.shadow.zeros(weight))
    wanted = jax.grad(lambda w: (on_dense(case, w) * of_y).sum())(matrix)
    if weight.input_scale is not None:
        wanted = wanted * weight.input_scale[..., None]
    # Sums of products in float32.
    assert cases.error(found, wanted) < 1e-5


@case
@pytest.mark.usefixtures("expects_dense")
def test_adapters_count_as_a_part_of_the_dense_weight(case):
    weight = weight_of(case)
    *stack, k, n = weight.shape
    draw = lambda *shape: jnp.asarray(cases.rng(7).normal(size=shape), jnp.float32)  # noqa: E731
    a, b = draw(*stack, k, RANK), draw(*stack, RANK, n) / 20
    matrix = qjax.dequantize(weight, jnp.float32)

    def adapted(a, b):
        return on_packed(case, weight, Adapters(a=a, b=b, alpha=ALPHA))

    def dense(a, b):
        low = jnp.matmul(a, b, precision="highest")
        return on_dense(case, matrix + ALPHA / RANK * low)

    y, pull = jax.vjp(adapted, a, b)
    wanted, pull_dense = jax.vjp(dense, a, b)
    assert cases.error(y, wanted) < 1e-5
    assert cases.error(y, on_dense(case, matrix)) > 1e-2
    of_y = jnp.asarray(cases.rng(5).normal(size=y.shape), jnp.float32)
    for found, exact in zip(pull(of_y), pull_dense(of_y), strict=True):
        assert cases.error(found, exact) < 1e-5


def test_in_sixteen_bits():
    case = CASES["axes"]
    weight = weight_of(case)
    x = X.astype(jnp.bfloat16).reshape(8, ROWS, 12)
    function = lambda w: jnp.einsum("abc,adce->bde", x, w.astype(x.dtype))  # noqa: E731
    narrow = case._replace(function=function)
    zeros = training.shadow.zeros(weight)

    def loss(zeros):
        y = on_packed(narrow, weight, Shadow(zeros=zeros))
        assert y.dtype == jnp.bfloat16
        return y.astype(jnp.float32).sum()

    rows = np.asarray(x, np.float64).transpose(1, 0, 2).reshape(ROWS, K)
    wanted = np.broadcast_to(rows.sum(0)[:, None], (K, N))
    # Inputs are in 16 bits on both sides, and sums in 32.
    assert cases.error(jax.grad(loss)(zeros), wanted) < 1e-5
