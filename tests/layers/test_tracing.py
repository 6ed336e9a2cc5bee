"""`layers.tracing`: what foreign code does with a weight, against the dense weight."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import qjax
from qjax.formats.tiles import Tiles
from qjax.layers.tracing import interpreter, uses
from qjax.layers.tracing.held import dense
from qjax.layers.tracing.views import Atom, Form, View
from qjax.training.beside import Adapters
from tests.layers.foreign import FLOAT32, same, x


class Case(NamedTuple):
    """A function of a weight, and which of its axes are rows and columns."""

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    function: Callable


def embed(w):
    return jnp.take(w, jnp.array([[3, -1, 5], [0, 39, 2]]), axis=0)


def scanned(body):
    return lambda w: jax.lax.scan(body, x(5, 32), w)


def behind_a_barrier(*arrays):
    return jax.lax.optimization_barrier(arrays)


def convolved(shape: tuple, strides: tuple, padding="VALID", layout="NHWC", **options):
    """Of images, by a kernel of height, width, inputs, outputs."""
    numbers = (layout, "HWIO", layout)
    return lambda w: jax.lax.conv_general_dilated(
        x(*shape), w, strides, padding, dimension_numbers=numbers, **options
    )


CASES = {
    "heads": Case(
        (32, 4, 8), (0,), (1, 2), lambda w: jnp.einsum("btd,dnh->btnh", x(2, 3, 32), w)
    ),
    "output": Case(
        (4, 8, 24),
        (0, 1),
        (2,),
        lambda w: jnp.einsum("btnh,nhd->btd", x(2, 3, 4, 8), w),
    ),
    "permuted": Case(
        (4, 8, 24), (0, 1), (2,), lambda w: jnp.einsum("hbn,nhd->db", x(8, 3, 4), w)
    ),
    "reshaped": Case((4, 8, 24), (0, 1), (2,), lambda w: x(3, 32) @ w.reshape(32, 24)),
    "weight-first": Case(
        (24, 4, 8), (1, 2), (0,), lambda w: jnp.einsum("dnh,nhb->db", w, x(4, 8, 3))
    ),
    "transposed": Case(
        (4, 8, 24), (0, 1), (2,), lambda w: jnp.einsum("btd,nhd->bthn", x(2, 3, 24), w)
    ),
    "tied": Case((40, 32), (1,), (0,), lambda w: embed(w) @ w.T),
    "named": Case(
        (32, 24), (0,), (1,), lambda w: x(3, 32) @ checkpoint_name(w, "weight")
    ),
    "row": Case((40, 32), (1,), (0,), lambda w: w[3] + w[jnp.array(4)]),
    "dynamic-row": Case(
        (40, 32), (1,), (0,), lambda w: jax.lax.dynamic_index_in_dim(w, 5, axis=0)
    ),
    "experts": Case(
        (3, 32, 8), (1,), (2,), lambda w: jnp.einsum("ebd,edf->bef", x(3, 2, 32), w)
    ),
    "all-experts": Case(
        (3, 32, 8), (1,), (2,), lambda w: jnp.einsum("bd,edf->bfe", x(2, 32), w)
    ),
    "stack-in-the-middle": Case(
        (32, 3, 8), (0,), (2,), lambda w: jnp.einsum("bed,def->ebf", x(2, 3, 32), w)
    ),
    "one-expert": Case((2, 32, 8), (1,), (2,), lambda w: x(5, 32) @ w[1]),
    "an-expert-each": Case(
        (3, 32, 8),
        (1,),
        (2,),
        lambda w: jnp.einsum("td,tdf->tf", x(3, 32), w[jnp.array([0, 2, 1])]),
    ),
    "two-experts-each": Case(
        (3, 32, 8),
        (1,),
        (2,),
        lambda w: jnp.einsum("td,tkdf->tkf", x(2, 32), w[jnp.array([[0, 2], [1, 1]])]),
    ),
    "tokens-by-expert": Case(
        (3, 32, 8),
        (1,),
        (2,),
        lambda w: jax.lax.ragged_dot(x(6, 32), w, jnp.array([2, 0, 3])),
    ),
    "tokens-by-transposed-expert": Case(
        (3, 8, 32),
        (2,),
        (1,),
        lambda w: jax.lax.ragged_dot(x(6, 32), w.mT, jnp.array([2, 0, 3])),
    ),
    "half-of-the-columns": Case((32, 16), (0,), (1,), lambda w: x(5, 32) @ w[:, 8:]),
    "some-heads": Case(
        (32, 2, 8), (0,), (1, 2), lambda w: x(5, 32) @ w[:, 1, 2:4].reshape(32, 2)
    ),
    "split": Case(
        (32, 24),
        (0,),
        (1,),
        lambda w: [x(5, 32) @ part for part in jnp.split(w, [4, 16], axis=1)],
    ),
    "split-stack": Case(
        (4, 32, 8),
        (1,),
        (2,),
        lambda w: [
            jnp.einsum("ebd,edf->bef", x(2, 3, 32), part) for part in jnp.split(w, 2)
        ],
    ),
    "behind-a-barrier": Case(
        (32, 24), (0,), (1,), lambda w: jnp.matmul(*behind_a_barrier(x(5, 32), w))
    ),
    "scanned-behind-barriers": Case(
        (3, 32, 32),
        (1,),
        (2,),
        scanned(lambda c, w: (jnp.matmul(*behind_a_barrier(c, w)), None)),
    ),
    "frozen": Case((32, 24), (0,), (1,), lambda w: x(5, 32) @ jax.lax.stop_gradient(w)),
    "pixels": Case((1, 1, 32, 8), (2,), (3,), convolved((2, 3, 4, 32), (2, 2), "SAME")),
    "patches": Case(
        (2, 4, 4, 24), (0, 1, 2), (3,), convolved((2, 6, 8, 4), (2, 4), "SAME")
    ),
    "patches-apart": Case(
        (2, 4, 4, 24), (0, 1, 2), (3,), convolved((2, 6, 9, 4), (3, 5))
    ),
    "padded-patches": Case(
        (2, 4, 4, 24),
        (0, 1, 2),
        (3,),
        convolved((3, 4, 5, 6), (2, 4), ((1, 0), (-1, 2)), "NCHW", lhs_dilation=(2, 1)),
    ),
    "one-window": Case(
        (2, 4, 4, 24),
        (0, 1, 2),
        (3,),
        convolved((3, 2, 4, 4), (1, 1), rhs_dilation=(1, 1)),
    ),
    "moved": Case(
        (32, 24),
        (0,),
        (1,),
        lambda w: x(5, 32) @ jax.device_put(jax.device_put(w), jax.memory.Space.Device),
    ),
    "scanned-from-memory": Case(
        (3, 32, 32),
        (1,),
        (2,),
        scanned(lambda c, w: (c @ jax.device_put(w, jax.memory.Space.Device), None)),
    ),
    "times-a-number": Case(
        (32, 24), (0,), (1,), lambda w: x(5, 32) @ (w * jnp.exp(x(1)[0]) * 2 / 3)
    ),
    "a-number-times-rows": Case(
        (40, 32), (1,), (0,), lambda w: (0.5 * w)[jnp.array([39, 40, 3])]
    ),
    "experts-times-a-number": Case(
        (3, 32, 8),
        (1,),
        (2,),
        lambda w: jax.lax.ragged_dot(x(6, 32), w / 2, jnp.array([2, 0, 3])),
    ),
    "scanned-times-a-number": Case(
        (3, 32, 32),
        (1,),
        (2,),
        lambda w: jax.lax.scan(
            jax.checkpoint(lambda c, w: (c @ w, None)), x(5, 32), w / 2
        ),
    ),
    "ones": Case(
        (1, 32, 1, 8),
        (1,),
        (2, 3),
        lambda w: jnp.einsum("ebd,ednh->benh", x(1, 2, 32), w),
    ),
    "scanned": Case(
        (3, 32, 32), (1,), (2,), scanned(lambda c, w: (c @ w, c.sum(axis=1)))
    ),
    "scanned-twice": Case(
        (2, 3, 32, 32),
        (2,),
        (3,),
        scanned(lambda c, w: jax.lax.scan(lambda c, w: (c @ w, None), c, w)),
    ),
    "scanned-both-ways": Case(
        (3, 32, 32), (1,), (2,), scanned(lambda c, w: (c @ w @ w.T, w[:, 5]))
    ),
    "scanned-once": Case((1, 32, 32), (1,), (2,), scanned(lambda c, w: (c @ w, None))),
    "rematerialized": Case(
        (3, 32, 32),
        (1,),
        (2,),
        scanned(lambda c, w: (jax.checkpoint(jnp.matmul)(c, w), None)),
    ),
    "shared-by-a-scan": Case(
        (32, 32),
        (0,),
        (1,),
        lambda w: jax.lax.scan(lambda c, _: (c @ w, None), x(5, 32), length=3)[0],
    ),
    "shared-by-a-loop": Case(
        (32, 32),
        (0,),
        (1,),
        lambda w: jax.lax.fori_loop(0, 3, lambda _, c: c @ w, x(5, 32)),
    ),
    "in-a-branch": Case(
        (32, 32),
        (0,),
        (1,),
        lambda w: jax.lax.cond(
            x(1)[0] > 9, lambda c: c @ w, lambda c: c @ w.T, x(5, 32)
        ),
    ),
}


@functools.cache
def packed(case: Case) -> tuple[qjax.QTensor, Form]:
    form = Form(case.shape, case.rows, case.columns)
    size = math.prod(case.shape)
    weight = jnp.sin(jnp.arange(size, dtype=jnp.float32) ** 1.5).reshape(case.shape)
    return qjax.prepare(qjax.quantize(form.matrix(weight), 4, 32)), form


def hold(weight: qjax.QTensor, form: Form) -> interpreter.Held:
    return interpreter.hold(weight, form, jnp.dtype(jnp.float32), "layer/w")


def on_packed(function: Callable, held: interpreter.Held):
    return interpreter.call(function, {"w": held})


def on_dense(function: Callable, held: interpreter.Held):
    return function(dense(held))


@pytest.mark.parametrize("name", CASES)
def test_a_use_is_a_product_with_the_packed_weight(name):
    weight, form = packed(CASES[name])
    function = CASES[name].function
    held = hold(weight, form)
    jax.tree.map(same, on_packed(function, held), on_dense(function, held))


# Where the program alone does not tell the axes that the case packs: it sums the others
# (in its first branch), or does not show that an axis is a stack.
OTHERWISE = {
    "transposed": ((2,), (0, 1)),
    "in-a-branch": ((1,), (0,)),
    "all-experts": ((1,), (0, 2)),
    "some-heads": ((0,), (2,)),
    "ones": ((1,), (0, 2, 3)),
    "pixels": ((2,), (0, 1, 3)),
    "scanned-once": ((1,), (0, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_uses_say_how_a_weight_is_packed(name):
    case = CASES[name]
    shape = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    found = uses.find(lambda weights: case.function(weights["w"]), {"w": shape})
    assert found["w"] == Form(
        case.shape, *OTHERWISE.get(name, (case.rows, case.columns))
    )


REASONS = {
    "mul": ((32, 8), lambda w: x(32, 8) * w),
    "conv_general_dilated": (
        (5, 4, 8),
        lambda w: jax.lax.conv(x(1, 4, 9), w, (1,), "SAME"),
    ),
    "not used": ((32, 8), lambda w: x(3)),
    "dot_general": ((32, 8), lambda w: x(5, 16) @ w[:16]),
    "div": ((32, 8), lambda w: 2 / w),
}


@pytest.mark.parametrize("reason", REASONS)
def test_uses_say_why_a_weight_is_not_packed(reason):
    shape, function = REASONS[reason]
    shape = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = uses.find(lambda weights: function(weights["w"]), {"w": shape})
    assert reason in found["w"]


# One of each kind of use, as far as it has a gradient in JAX.
DIFFERENTIABLE = (
    *("output", "transposed", "tied", "experts", "an-expert-each", "some-heads"),
    "tokens-by-expert",
    *(
        "scanned",
        "scanned-twice",
        "scanned-both-ways",
        "rematerialized",
        "shared-by-a-scan",
        "in-a-branch",
        "split",
        "scanned-behind-barriers",
        "patches",
        "times-a-number",
        "scanned-times-a-number",
    ),
)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_scales_are_those_through_the_dense_weight(name):
    weight, form = packed(CASES[name])

    def loss(scale, use):
        held = hold(dataclasses.replace(weight, scale=scale), form)
        leaves = jax.tree.leaves(use(CASES[name].function, held))
        return sum((leaf**2).mean() for leaf in leaves)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    found = gradient(weight.scale, on_packed)
    same(found, gradient(weight.scale, on_dense))


def test_a_frozen_weight_has_no_gradient_and_what_is_beside_it_has():
    weight, form = packed(CASES["frozen"])
    a, b = x(32, 2), x(2, 24)

    def loss(scale, a, b):
        beside = (Adapters(a=a, b=b, alpha=None),)
        w = dataclasses.replace(weight, scale=scale)
        held = interpreter.hold(w, form, jnp.dtype(jnp.float32), "layer/w", beside)
        return on_packed(CASES["frozen"].function, held).sum()

    of_scale, of_a, of_b = jax.grad(loss, (0, 1, 2))(weight.scale, a, b)
    assert not of_scale.any()
    same(of_b, (x(5, 32) @ a).T @ jnp.ones((5, 24)))
    assert of_a.any()


def test_a_number_that_is_frozen_with_a_weight_has_no_gradient():
    weight, form = packed(CASES["frozen"])
    held = interpreter.hold(weight, form, jnp.dtype(jnp.float32), "layer/w")

    def loss(number, freeze):
        use = lambda w: x(5, 32) @ (number * freeze(number * w))  # noqa: E731
        return on_packed(use, held).sum()

    whole = loss(jnp.float32(1), lambda w: w)
    same(jax.grad(loss)(jnp.float32(1), lambda w: w), 2 * whole)
    same(jax.grad(loss)(jnp.float32(1), jax.lax.stop_gradient), whole)


# What a step does with its matrix, by qjax's own operations.
STEPS = {
    "product": (lambda c, w: c @ w, qjax.matmul),
    "rematerialized": (jax.checkpoint(jnp.matmul), jax.checkpoint(qjax.matmul)),
    "in-a-branch": (
        lambda c, w: jax.lax.cond(c[0, 0] > 0, jnp.matmul, lambda c, _: c, c, w),
        lambda c, w: jax.lax.cond(c[0, 0] > 0, qjax.matmul, lambda c, _: c, c, w),
    ),
}


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}], ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_a_scan_gives_the_bits_of_one_over_packed_weights(step, options):
    weight, form = packed(CASES["scanned"])
    foreign_step, own_step = STEPS[step]

    def run(step, x, w):
        body = lambda c, w: (jnp.tanh(step(c, w)), c.sum())  # noqa: E731
        return jax.lax.scan(body, x, w, **options)

    def on_scanned(x, scale):
        held = hold(dataclasses.replace(weight, scale=scale), form)
        return on_packed(functools.partial(run, foreign_step, x), held)

    def on_slices(x, scale):
        return run(own_step, x, dataclasses.replace(weight, scale=scale))

    @functools.partial(jax.jit, static_argnums=0)
    def results(function, x, scale):
        loss = lambda *args: sum((y**2).sum() for y in function(*args))  # noqa: E731
        return function(x, scale), jax.grad(loss, (0, 1))(x, scale)

    found = results(on_scanned, x(5, 32), weight.scale)
    jax.tree.map(
        functools.partial(same, tolerance=0),
        found,
        results(on_slices, x(5, 32), weight.scale),
    )


def test_a_scan_has_second_derivatives():
    weight, form = packed(CASES["scanned"])

    def norm(scale, use):
        def loss(x, scale):
            held = hold(dataclasses.replace(weight, scale=scale), form)
            step = lambda c, w: (jnp.tanh(c @ w), None)  # noqa: E731
            return (use(lambda w: jax.lax.scan(step, x, w)[0], held) ** 2).sum()

        return (jax.grad(loss)(x(5, 32), scale) ** 2).sum()

    second = jax.jit(jax.grad(norm), static_argnums=1)
    same(second(weight.scale, on_packed), second(weight.scale, on_dense), 1e-4)


# Of 40 slices, by indices that do not all exist.
OUTSIDE = jnp.array([3, 39, 40, 45, -1, -40, -41])
GATHERS = {
    "plain": lambda w, i: w[i],
    "take": lambda w, i: jnp.take(w, i, axis=0),
    "fill": lambda w, i: w.at[i].get(mode="fill", fill_value=0),
    "clip": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "wrap": lambda w, i: jnp.take(w, i, axis=0, mode="wrap"),
    "promise": lambda w, i: w.at[i].get(mode="promise_in_bounds"),
    "column": lambda w, i: jnp.take(w.T, i, axis=1).T,
    "raw": lambda w, i: jax.lax.gather(
        w,
        i[:, None],
        jax.lax.GatherDimensionNumbers((1,), (0,), (0,)),
        (1, *w.shape[1:]),
    ),
}


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8"])
@pytest.mark.parametrize("name", GATHERS)
def test_rows_that_do_not_exist_are_as_of_the_dense_table(name, dtype):
    weight, form = packed(Case((40, 32), (1,), (0,), GATHERS[name]))
    held, index = hold(weight, form), OUTSIDE.astype(dtype)
    found = on_packed(lambda w: GATHERS[name](w, index), held)
    np.testing.assert_allclose(found, GATHERS[name](dense(held), index), rtol=1e-6)


def test_rows_are_filled_with_any_number():
    weight, form = packed(Case((40, 32), (1,), (0,), embed))

    def rows(w):
        w = w.astype(jnp.bfloat16).reshape(40, 4, 8)
        return jnp.take(w, OUTSIDE.reshape(7, 1), axis=0, mode="fill", fill_value=5)

    held = hold(weight, form)
    same(on_packed(rows, held), on_dense(rows, held))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["plain", "take", "fill", "clip", "wrap", "promise"])
def test_matrices_that_do_not_exist_are_as_of_the_dense_stack(name, symmetric):
    form = Form((40, 32, 8), (1,), (2,))
    stack = form.matrix(jnp.sin(jnp.arange(40 * 32 * 8.0)).reshape(form.shape))
    held = hold(qjax.prepare(qjax.quantize(stack, 4, 32, symmetric)), form)

    def each(w):
        return jnp.einsum("td,tdf->tf", x(7, 32), GATHERS[name](w, OUTSIDE))

    def two(w):
        w = GATHERS[name](w, OUTSIDE[:6].reshape(3, 2))
        return jnp.einsum("td,tkdf->tkf", x(3, 32), w), x(5, 32) @ GATHERS[name](w, 1)

    for function in (each, two):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            on_packed(function, held),
            on_dense(function, held),
        )


def test_matrices_are_filled_with_other_numbers_densely():
    weight, form = packed(CASES["an-expert-each"])

    def each(w):
        w = jnp.take(w, jnp.array([0, 3, 1]), axis=0, mode="fill", fill_value=5)
        return jnp.einsum("td,tdf->tf", x(3, 32), w)

    held = hold(weight, form)
    with pytest.warns(UserWarning, match="layer/w is made dense for 'gather'"):
        found = on_packed(each, held)
    same(found, on_dense(each, held))


DENSE = {
    "abs": lambda w: x(5, 32) @ jnp.abs(w),
    "slice": lambda w: x(5, 16) @ w[:16],
    "ragged_dot_general": lambda w: jax.lax.ragged_dot(
        x(6, 4), w.reshape(8, 4, 8), jnp.array([1, 0, 2, 0, 0, 1, 0, 2])
    ),
    "return": lambda w: w.T,
    "custom_jvp_call": lambda w: x(5, 32) @ jax.nn.relu(w),
    "scan": lambda w: jax.lax.scan(lambda c, _: (c + w, None), w, length=2)[0],
    "device_put": lambda w: x(5, 32) @ jax.device_put(w, jax.devices()[0]),
}


@pytest.mark.parametrize("operation", DENSE)
def test_what_has_no_packed_form_is_done_densely_with_a_warning(operation):
    weight, form = packed(Case((32, 8), (0,), (1,), DENSE[operation]))
    held = hold(weight, form)
    expected = DENSE[operation](dense(held))
    with pytest.warns(UserWarning, match=f"layer/w is made dense for '.*{operation}"):
        found = interpreter.call(DENSE[operation], {"w": held})
    same(found, expected)


def test_columns_that_fill_no_unit_of_tiles_stay_packed():
    weight, form = packed(Case((32, 5, 8), (0,), (1, 2), lambda w: w))
    held = hold(qjax.relayout(weight, Tiles()), form)

    def some(w):
        return jnp.einsum("td,dnh->tnh", x(3, 32), w[:, :, :3])

    same(on_packed(some, held), on_dense(some, held))


def test_a_product_of_two_weights_multiplies_one_of_them_packed():
    weight, form = packed(CASES["shared-by-a-scan"])
    held = hold(weight, form)
    with pytest.warns(UserWarning, match="layer/w is made dense for 'dot_general'"):
        found = interpreter.call(lambda w: w @ w, {"w": held})
    same(found, dense(held) @ dense(held))


@pytest.mark.parametrize("wanted", [None, jnp.float32])
def test_a_product_has_the_dtype_that_it_was_asked_for(wanted):
    weight, form = packed(CASES["shared-by-a-scan"])

    def product(w):
        w = w.astype(jnp.bfloat16)
        return jnp.matmul(
            x(5, 32, dtype=jnp.bfloat16), w, preferred_element_type=wanted
        )

    found = interpreter.call(product, {"w": hold(weight, form)})
    assert found.dtype == (wanted or jnp.bfloat16)
    # The dense weight is rounded to bfloat16, half a unit of 2^-8 a term; ours is not.
    exact = x(5, 32, dtype=jnp.bfloat16).astype(jnp.float32) @ dense(hold(weight, form))
    same(found.astype(jnp.float32), exact, FLOAT32 if wanted else 2**-8)


def test_integers_and_arrays_of_others_pass_through():
    weight, form = packed(CASES["one-expert"])
    held = hold(weight, form)
    found = interpreter.call(
        lambda w: {"k": w.shape[1], "b": None, "x": x(2)}, {"w": held}
    )
    assert (found["k"], found["b"]) == (32, None)
    same(found["x"], x(2))


@pytest.mark.on_cpu
def test_the_dense_weight_is_in_no_program():
    """Above 4 MiB in float32, where `qjax.matmul` does not form a weight either."""
    form = Form((16, 128, 1024), (0, 1), (2,))
    shape = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)
    weight = jax.eval_shape(lambda w: qjax.prepare(qjax.quantize(w, 4, 128)), shape)

    def product(weight, rows):
        held = hold(weight, form)
        return interpreter.call(
            lambda w: jnp.einsum("tnh,nhd->td", rows, w), {"w": held}
        )

    rows = jax.ShapeDtypeStruct((8, 16, 128), jnp.float32)
    memory = jax.jit(product).lower(weight, rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 1024 * 4 / 4


def test_an_uneven_reshape_has_no_view():
    view = View(((Atom("row", 1, 6),), (Atom("column", 1, 4),)), jnp.dtype("float32"))
    assert view.reshape((4, 6)) is None
    assert view.reshape((2, 3, 1, 4)).shape == (2, 3, 1, 4)
