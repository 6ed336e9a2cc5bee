"""`linen.Einsum` and `nnx.Einsum`: equations, twins, stacks of experts."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.layers import contraction, linen
from qjax.layers.linen import to_params, to_variables
from qjax.layers.nnx import Einsum
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

KEY = jax.random.key(0)

# Equation, shape of the inputs, shape of the kernel, shape of its matrix.
EQUATIONS = [
    ("BTD,DNH->BTNH", (2, 3, 32), (32, 4, 5), (32, 20)),
    ("BTNH,NHD->BTD", (2, 3, 4, 8), (4, 8, 5), (32, 5)),
    ("BSD,CKDH->CBSKH", (2, 3, 32), (2, 4, 32, 5), (32, 40)),
    ("DB,FD->FB", (32, 3), (5, 32), (32, 5)),
    ("...d,df->...f", (32,), (32, 5), (32, 5)),
    ("... d, df -> ... f", (2, 3, 32), (32, 5), (32, 5)),
    ("d...,df->f...", (32, 2, 3), (32, 5), (32, 5)),
    ("BTD,D->BT", (2, 3, 32), (32,), (32, 1)),
    ("EBD,EDF->EBF", (4, 3, 32), (4, 32, 5), (4, 32, 5)),
    ("BED,EFD->BFE", (3, 4, 32), (4, 5, 32), (4, 32, 5)),
    ("AEBD,EADF->BAEF", (2, 4, 3, 32), (4, 2, 32, 5), (4, 2, 32, 5)),
]


def two_values(shape: tuple[int, ...]) -> jnp.ndarray:
    """A kernel that 4 bits hold exactly, whatever the groups: zeros and fifteens."""
    return jnp.asarray(cases.rng(5).integers(0, 2, shape) * 15, jnp.float32)


def normal(shape: tuple[int, ...], seed: int = 1) -> jnp.ndarray:
    return jnp.asarray(cases.rng(seed).normal(size=shape), jnp.float32)


@nnx.jit
def run(module, x):
    return module(x)


@pytest.mark.parametrize(
    ("einsum_str", "shape", "kernel_shape", "matrix_shape"), EQUATIONS, ids=str
)
def test_twins_agree_with_each_other_and_with_numpy(
    einsum_str, shape, kernel_shape, matrix_shape
):
    x, kernel = normal(shape), two_values(kernel_shape)
    flax = nn.Einsum(kernel_shape, einsum_str, kernel_init=nn.initializers.zeros)
    bias = normal(jax.eval_shape(flax.init, KEY, x)["params"]["bias"].shape, seed=2)
    ours = Einsum.from_kernel(einsum_str, kernel, bias, group_size=16)
    assert ours.kernel.shape == matrix_shape
    made = to_variables({"kernel": ours.kernel, "bias": bias})
    found = jax.jit(linen.Einsum(kernel_shape, einsum_str).apply)(made, x)
    chex.assert_trees_all_equal(found, run(ours, x))
    wide = [np.asarray(array, np.float64) for array in (x, kernel)]
    product = np.einsum(einsum_str.replace(" ", ""), *wide)
    # The axes of the bias are the kernel's, in the order of the output.
    _, kernel_term, output = einsum_str.replace("->", ",").replace(" ", "").split(",")
    before, _, after = output.partition("...")
    others = "." * (product.ndim - len(before) - len(after))
    sizes = dict(zip(kernel_term, kernel_shape, strict=True))
    axes = [sizes.get(c, 1) for c in before + others + after]
    wanted = product + np.asarray(bias, np.float64).reshape(axes)
    assert found.shape == wanted.shape
    assert cases.error(found, wanted) <= 1e-5


# test_general.py has the rest.
@pytest.mark.parametrize("name", ["act-order", "mixed", "codebook"])
def test_every_kernel_goes_through_heads(name):
    x = cases.inputs().reshape(5, 8, 12)
    shape, kernel = (8, 12, 4, 10), cases.kernel(name)
    einsum_str = "TNH,NHCD->CTD"
    made = to_variables({"kernel": kernel})
    layer = linen.Einsum(shape, einsum_str, use_bias=False)
    found = jax.jit(layer.apply)(made, x)
    twin = Einsum.from_qtensor(einsum_str, shape, kernel)
    chex.assert_trees_all_equal(found, run(twin, x))
    wanted = cases.product(cases.inputs(), kernel).reshape(5, 4, 10).transpose(1, 0, 2)
    assert cases.error(found, wanted) <= 1e-5


@pytest.mark.parametrize(
    ("einsum_str", "shape", "axes"),
    [
        ("BNH,NHD->BD", (4, 8, 5), (0, 1, 2)),  # a group of 16 is two heads
        ("BNH,HND->BD", (8, 4, 5), (0, 1, 2)),
        ("BD,NDH->BHN", (4, 32, 5), (1, 0, 2)),
        ("BED,FED->BEF", (5, 4, 32), (1, 2, 0)),
    ],
)
def test_rows_and_columns_are_in_the_order_of_the_kernel(einsum_str, shape, axes):
    kernel = normal(shape)
    made = Einsum.from_kernel(einsum_str, kernel, group_size=16).kernel
    matrix = kernel.transpose(axes).reshape(made.shape)
    expected = qjax.prepare(qjax.quantize(matrix, 4, 16))
    chex.assert_trees_all_equal(made, expected)


@pytest.mark.parametrize("param_dtype", cases.FLOATS)
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_output_dtype_is_that_of_flax(dtype, param_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype}
    shapes = ("BTD,DNH->BTNH", (32, 4, 5), (4, 5))
    ours = Einsum(*shapes, group_size=32, **options)
    theirs = nnx.Einsum(*shapes, rngs=nnx.Rngs(0), **options)
    twin = linen.Einsum((32, 4, 5), "BTD,DNH->BTNH", group_size=32, **options)
    for x in (*cases.FLOATS, "int32"):
        struct = jax.ShapeDtypeStruct((2, 3, 32), x)
        with jax.numpy_dtype_promotion("standard"):
            wanted = jax.eval_shape(theirs, struct)
            assert jax.eval_shape(ours, struct) == wanted, x
            made, _ = jax.eval_shape(lambda x: twin.init_with_output(KEY, x), struct)
        assert made == wanted, x


def test_new_layers_round_the_samples_of_flax():
    einsum_str, shape, x = "NTD,NDH->NTH", (4, 32, 5), normal((4, 3, 32))
    # Samples that no fusion of the draw with what follows can round otherwise.
    draw = lambda key, shape, dtype: jax.random.randint(key, shape, -8, 8).astype(dtype)  # noqa: E731
    init = {"kernel_init": draw, "param_dtype": jnp.float16, "dtype": jnp.float32}
    equation = contraction.parse(einsum_str, shape)
    theirs = jax.jit(nn.Einsum(shape, einsum_str, **init).init)(KEY, x)
    ours = jax.jit(linen.Einsum(shape, einsum_str, group_size=16, **init).init)(KEY, x)
    expected = qjax.quantize(equation.matrix(theirs["params"]["kernel"]), 4, 16)
    chex.assert_trees_all_equal(to_params(ours)["kernel"], qjax.prepare(expected))
    twin = Einsum(einsum_str, shape, group_size=16, rngs=nnx.Rngs(3), **init)
    theirs = nnx.Einsum(einsum_str, shape, rngs=nnx.Rngs(3), **init)
    expected = qjax.quantize(equation.matrix(theirs.kernel[...]), 4, 16)
    chex.assert_trees_all_equal(twin.kernel, qjax.prepare(expected))
    init["kernel_init"] = None
    empty = linen.Einsum(shape, einsum_str, group_size=16, **init)
    abstract = jax.eval_shape(empty.init, KEY, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, ours)


@pytest.mark.parametrize("name", ["mixed", "codebook"])
def test_gradients_of_stacked_experts(name):
    # Two experts of one format: the same words, other scales.
    one = cases.kernel(name)
    other = dataclasses.replace(one, scale=-2 * one.scale)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    x = normal((2, 5, K))
    made = to_variables({"kernel": stack})
    layer = linen.Einsum((2, K, N), "EBD,EDF->EBF", use_bias=False)

    def found(params, x):
        return jnp.sin(layer.apply({**made, "params": params}, x)).sum()

    def wanted(kernel, x):
        weight = qjax.dequantize(kernel, jnp.float32)
        return jnp.sin(jnp.einsum("EBD,EDF->EBF", x, weight, precision="highest")).sum()

    params, dx = jax.jit(jax.grad(found, argnums=(0, 1)))(made["params"], x)
    oracle = jax.jit(jax.grad(wanted, argnums=(0, 1), allow_int=True))
    dkernel, dx_wanted = oracle(stack, x)
    assert cases.error(dx, dx_wanted) < 1e-5
    for leaf, value in params["kernel"].items():
        assert cases.error(value, getattr(dkernel, leaf)) < 1e-4, leaf


def test_load_and_vmap():
    empty = Einsum("BD,DF->BF", (K, N), (N,), group_size=GROUP)
    empty.load(cases.kernel("codebook"), cases.bias())
    x = cases.inputs()
    wanted = cases.product(x, cases.kernel("codebook"), cases.bias())
    assert cases.error(run(empty, x), wanted) <= 1e-5
    stack = qjax.quantize(jnp.stack([cases.dense(), -cases.dense()]), 4, GROUP)
    biases = jnp.stack([cases.bias()] * 2)
    with pytest.raises(ValueError, match=r"bias.shape=\(2, 40\) must be \(40,\)"):
        empty.load(cases.kernel("codebook"), biases)
    stacked = Einsum("BD,DF->BF", (K, N), kernel_init=stack)
    each = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(0, None)))(stacked, x)
    single = Einsum("BD,DF->BF", (K, N), kernel_init=cases.kernel("4bit"))
    chex.assert_trees_all_close(each[0], run(single, x), atol=1e-5)


@pytest.mark.parametrize(
    ("einsum_str", "shape"),
    [
        ("BD,DF->BDF", (K, N)),  # nothing summed
        ("BTD,DF->BF", (K, N)),  # inputs summed without the kernel
        ("BD,DFG->BF", (K, N, 2)),  # the kernel summed without inputs
        ("BDD,DF->BF", (K, N)),  # a diagonal
        ("BD,...DF->B...F", (K, N)),
        ("...D,DF->F", (K, N)),
    ],
)
def test_other_equations_are_declined(einsum_str, shape):
    for make in (
        lambda: Einsum(einsum_str, shape, group_size=GROUP),
        lambda: linen.Einsum(shape, einsum_str).init(KEY, jnp.ones((2, K))),
    ):
        with pytest.raises(NotImplementedError, match="supported is one product") as e:
            make()
        assert repr(einsum_str) in str(e.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Einsum("BD,DF", (K, N)), "'inputs,kernel->output'"),
        (lambda: Einsum("BD->B", (K, N)), "two operands"),
        (lambda: Einsum("BD,DF->BG", (K, N)), "every letter of the output"),
        (lambda: Einsum("B1,1F->BF", (K, N)), "must consist of letters"),
        (lambda: Einsum("BD,DNH->BNH", (K, N)), r"kernel_shape=\(96, 40\) must have"),
        (
            lambda: Einsum("BD,DNH->BNH", (K, 5, 8), (40,), group_size=GROUP),
            r"bias_shape=\(40,\) must be \(5, 8\)",
        ),
        (lambda: Einsum("BD,DF->BF", (K, N)), "in_features=96 must be a multiple of"),
        (
            lambda: Einsum.from_qtensor("BD,DF->BF", (N, K), cases.kernel("4bit")),
            r"kernel.shape=\(96, 40\) must be \(40, 96\)",
        ),
        (
            lambda: Einsum.from_qtensor(
                "EBD,EDF->EBF", (2, K, N), cases.kernel("4bit")
            ),
            r"kernel.shape=\(96, 40\) must be \(2, 96, 40\)",
        ),
        (
            lambda: Einsum.from_qtensor(
                "BD,DF->BF", (K, N), cases.kernel("4bit"), jnp.zeros(K)
            ),
            r"bias.shape=\(96,\) must be \(40,\)",
        ),
        (
            lambda: Einsum.from_qtensor("BD,DF->BF", (K, N), cases.kernel("4bit")).load(
                cases.kernel("4bit"), cases.bias()
            ),
            "bias_shape=None",
        ),
        # The product of the axes would fit.
        (
            lambda: Einsum("BNH,NHD->BD", (8, 12, N), kernel_init=cases.kernel("4bit"))(
                jnp.ones((2, 12, 8))
            ),
            r"inputs.shape=\(2, 12, 8\) must have N=8",
        ),
        (
            lambda: Einsum("BD,DF->BF", (K, N), group_size=GROUP)(jnp.ones((1, 2, K))),
            r"inputs.shape=\(1, 2, 96\) must have the axes 'BD'",
        ),
        (
            lambda: Einsum("B...D,DF->B...F", (K, N), group_size=GROUP)(jnp.ones(K)),
            r"inputs.shape=\(96,\) must have the axes",
        ),
        (
            lambda: contraction.parse("BD,DF->BF", (K, N)).matrix(cases.dense().T),
            r"kernel.shape=\(40, 96\) must be \(96, 40\)",
        ),
        (
            lambda: linen.Einsum(
                (K, N),
                "BD,DF->BF",
                group_size=GROUP,
                kernel_init=lambda key, shape, dtype: jnp.zeros(N),
            ).init(KEY, cases.inputs()),
            r"kernel_init gave .* of shape \(40,\); .* shape \(96, 40\)",
        ),
    ],
)
def test_invalid_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()
