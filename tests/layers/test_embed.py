"""`linen.Embed` and `nnx.Embed`: lookups read their own rows only, and attend."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import qjax
from qjax import tensor
from qjax.formats.awq import Gemm
from qjax.formats.gptq import Stream
from qjax.formats.tiles import Tiles
from qjax.layers import embedding, linen
from qjax.layers.linen import to_params, to_variables
from qjax.layers.nnx import Embed, Quantized, Scale
from qjax.tensor import Affine, Grouping, QTensor, Segment
from tests.layers import cases
from tests.layers.cases import GROUP, K, N

KEY = jax.random.key(0)
# A table of N rows and K features is the kernel [K, N].
ROWS = jnp.array([[3, 0, 39], [7, 3, 3]])


def across_rows(grouping: Grouping, group_size: int | None) -> QTensor:
    """A table whose groups do not end with a row; two scales are never equal."""
    groups = -(-K * N // group_size) if group_size else 1
    draw = cases.rng(7)
    return tensor.build(
        [Stream().pack(jnp.asarray(draw.integers(0, 16, (K, N))), 4)],
        jnp.asarray(draw.uniform(0.5, 2, (groups, 1)), jnp.float32),
        jnp.asarray(draw.normal(size=(groups, 1)), jnp.float32),
        layout=Stream(),
        segments=[Segment(4, group_size)],
        affine=Affine.OFFSET,
        grouping=grouping,
    )


def shared_scales(columns: int) -> QTensor:
    """A table where neighbouring rows share their scales."""
    draw = cases.rng(8)
    return tensor.build(
        [Stream().pack(jnp.asarray(draw.integers(0, 8, (K, N))), 3)],
        jnp.asarray(draw.uniform(0.5, 2, (K // GROUP, columns)), jnp.float32),
        layout=Stream(),
        segments=[Segment(3, GROUP)],
        affine=Affine.CENTERED,
    )


def table(name: str) -> QTensor:
    made = {
        "flat": lambda: across_rows(Grouping.FLAT, 64),
        "flat-ragged": lambda: across_rows(Grouping.FLAT, 56),
        "flat-one": lambda: across_rows(Grouping.FLAT, None),
        "strided": lambda: across_rows(Grouping.STRIDED, 64),
        "one-scale": lambda: shared_scales(1),
        "shared-scales": lambda: shared_scales(N // 4),
    }
    return made[name]() if name in made else cases.kernel(name)


TABLES = (
    *("3bit", "act-order", "ragged-act-order", "mixed", "codebook", "float-zero"),
    "planar",
    *("flat", "flat-ragged", "flat-one", "strided", "one-scale", "shared-scales"),
)


@nnx.jit
def run(module, index):
    return module(index)


@nnx.jit
def attend(module, query):
    return module.attend(query)


@pytest.mark.parametrize("name", TABLES)
def test_twins_look_up_rows_of_the_dequantized_table(name):
    w = table(name)
    linen_layer = linen.Embed(N, K)
    made = to_variables({"embedding": w})
    found = jax.jit(linen_layer.apply)(made, ROWS)
    chex.assert_trees_all_equal(found, run(Embed.from_qtensor(w), ROWS))
    wanted = np.asarray(qjax.dequantize(w, jnp.float32), np.float64).T[ROWS]
    assert found.shape == (2, 3, K)
    # One rounding of a product and a sum, which a compiler may leave out.
    assert cases.error(found, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_rows_are_rounded_as_dequantize_does(dtype):
    w = cases.kernel("4bit", "float16")
    found = run(Embed.from_qtensor(w, dtype=dtype), ROWS)
    weight = qjax.dequantize(w, None if dtype is None else jnp.dtype(dtype))
    chex.assert_trees_all_equal(found, weight.T[ROWS])
    made = to_variables({"embedding": w})
    twin = linen.Embed(N, K, dtype=dtype)
    chex.assert_trees_all_equal(jax.jit(twin.apply)(made, ROWS), found)


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_columns_of_tiles(bits):
    # 300 and 40 fill no unit; neither do 5 columns.
    stored = jnp.asarray(cases.rng().integers(0, 2**bits, (300, 40)), jnp.uint8)
    layouts = [Tiles()] + [Tiles(nibbles=True)] * (bits == 4)
    index = jnp.array([39, 0, 17, 8, 17])
    for layout in layouts:
        words = layout.pack(stored, bits)
        padded, _ = layout.extents(words.shape, bits)
        w = tensor.build(
            [words],
            jnp.ones((1, 40)),
            layout=layout,
            segments=[Segment(bits, None, padded - 300)],
            affine=Affine.CENTERED,
            padding=8,
        )
        found = embedding.columns(w, index)
        assert found.words[0].shape == (*words.shape[:2], 1, 256)
        chex.assert_trees_all_equal(qjax.codes(found), stored[:, index])
        rows = jax.jit(lambda w: embedding.lookup(w, index, None))(w)
        chex.assert_trees_all_equal(rows, qjax.dequantize(w)[:, index].T)


def _largest(text: str) -> int:
    """Elements of the largest array of a printed program."""
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return max(int(np.prod([int(d) for d in shape.split(",")])) for shape in shapes)


def test_a_lookup_holds_no_array_of_the_whole_table():
    count, features = 4096, 128
    w = qjax.quantize(cases.dense(features, count), 4, 32)
    rows = jnp.array([1, 2, 4095])
    made = to_variables({"embedding": w})
    layer = linen.Embed(count, features)

    def forward(params):
        return layer.apply({**made, "params": params}, rows)

    def backward(params):
        return jax.grad(lambda params: jnp.sin(forward(params)).sum())(params)

    def dense(params):
        (part,) = jax.tree.leaves(params)
        return jnp.sin(qjax.dequantize(w).T)[rows] + part[0, 0]

    tiles = qjax.relayout(w, Tiles())
    programs = [
        (forward, made["params"]),
        (backward, made["params"]),
        (lambda tiles: embedding.lookup(tiles, rows, None), tiles),
    ]
    # The words are the largest array: each holds eight codes, in Tiles four.
    limit = count * features // 4
    for program, operand in programs:
        assert _largest(str(jax.make_jaxpr(program)(operand))) <= limit
        compiled = jax.jit(program).lower(operand).compile()
        assert _largest(compiled.as_text()) <= limit
        dense_bytes = count * features * 4
        assert compiled.memory_analysis().temp_size_in_bytes < dense_bytes / 8
    # The measure sees a whole table where there is one.
    whole = str(jax.make_jaxpr(dense)(made["params"]))
    assert _largest(whole) == count * features


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int8", "uint32"])
def test_indices_out_of_range_are_those_of_flax(dtype):
    limits = jnp.iinfo(dtype)
    numbers = [-41, -40, -1, 0, 39, 40, 41, limits.min, limits.max]
    index = jnp.array([i for i in numbers if limits.min <= i <= limits.max], dtype)
    theirs = nnx.Embed(N, K, rngs=nnx.Rngs(0))
    theirs.embedding[...] = qjax.dequantize(cases.kernel("4bit")).T
    found = run(Embed.from_qtensor(cases.kernel("4bit")), index)
    chex.assert_trees_all_equal(found, run(theirs, index))
    assert jnp.isnan(found).any()


def test_a_table_of_one_row_gives_that_row():
    w = qjax.quantize(cases.dense(K, 1), 4, GROUP)
    found = Embed.from_qtensor(w)(jnp.array([[0, 5], [-7, 1]]))
    chex.assert_trees_all_equal(
        found, jnp.broadcast_to(qjax.dequantize(w).T, (2, 2, K))
    )


def test_no_rows_and_one_row():
    layer = Embed.from_qtensor(cases.kernel("mixed"))
    assert layer(jnp.zeros((0, 3), jnp.int32)).shape == (0, 3, K)
    chex.assert_trees_all_equal(layer(jnp.int32(3)), layer(ROWS)[0, 0])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mixed", "float32"), ("mixed", "bfloat16"), ("codebook", "float16")],
)
def test_attend_is_the_product_with_the_transposed_table(name, dtype):
    w, query = cases.kernel(name, dtype), cases.inputs(dtype)
    found = attend(Embed.from_qtensor(w), query)
    made = to_variables({"embedding": w})
    run_linen = jax.jit(lambda v, x: linen.Embed(N, K).apply(v, x, method="attend"))
    chex.assert_trees_all_equal(run_linen(made, query), found)
    theirs = nnx.Embed(N, K, param_dtype=dtype, rngs=nnx.Rngs(0))
    theirs.embedding[...] = qjax.dequantize(w, jnp.dtype(dtype)).T
    wanted = cases.product(query, w)
    assert found.dtype == dtype
    # float32: summation order only. 16 bits: ours rounds no weight, Flax's rounds each.
    exact = dtype == "float32"
    limit = 1e-5 if exact else 1.5 * cases.error(theirs.attend(query), wanted)
    assert cases.error(found, wanted) <= limit


def _output(layer, x, method):
    run = lambda x: layer.init_with_output(KEY, x, method=method)[0]  # noqa: E731
    return jax.eval_shape(run, x)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_dtypes_are_those_of_flax(dtype, param_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype}
    ours = linen.Embed(N, K, group_size=GROUP, **options)
    theirs = nn.Embed(N, K, **options)
    twin = Embed(N, K, group_size=GROUP, **options)
    operands = [("__call__", "int32"), *(("attend", x) for x in cases.FLOATS)]
    for method, x in operands:
        struct = jax.ShapeDtypeStruct((2, K), x)
        with jax.numpy_dtype_promotion("standard"):
            output = functools.partial(_output, x=struct, method=method)
            wanted = output(theirs)
            assert output(ours) == wanted
            assert jax.eval_shape(getattr(twin, method), struct) == wanted


@pytest.mark.parametrize("name", ["mixed", "codebook", "flat"])
@pytest.mark.filterwarnings("ignore:Grouping 'flat' makes matmul form the dense")
def test_gradients(name):
    w, query = table(name), cases.inputs()
    made = to_variables({"embedding": w})
    layer = linen.Embed(N, K)

    def found(params, query):
        variables = {**made, "params": params}
        rows = layer.apply(variables, ROWS)  # 3 is there three times
        logits = layer.apply(variables, query, method="attend")
        return jnp.sin(rows).sum() + jnp.sin(logits).sum()

    def wanted(w, query):
        weight = qjax.dequantize(w, jnp.float32)
        logits = jnp.matmul(query, weight, precision="highest")
        return jnp.sin(weight.T[ROWS]).sum() + jnp.sin(logits).sum()

    params, dquery = jax.jit(jax.grad(found, argnums=(0, 1)))(made["params"], query)
    oracle = jax.jit(jax.grad(wanted, argnums=(0, 1), allow_int=True))
    dw, dquery_wanted = oracle(w, query)
    assert cases.error(dquery, dquery_wanted) < 1e-5
    for leaf, value in params["embedding"].items():
        assert cases.error(value, getattr(dw, leaf)) < 1e-4, leaf


def test_gradients_of_nnx_are_those_of_scales():
    layer = Embed.from_qtensor(cases.kernel("codebook"))

    @nnx.jit
    def gradient(layer):
        loss = lambda layer: jnp.sin(layer(ROWS)).sum()  # noqa: E731
        return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(layer)

    state = gradient(layer)["packed"]
    assert set(state) == {"scale", "codebook", "input_scale"}
    used = np.unique(ROWS)
    unused = np.setdiff1d(np.arange(N), used)
    assert (state["scale"][...][:, used] != 0).all()
    assert (state["scale"][...][:, unused] == 0).all()


def test_new_layers_round_the_samples_of_flax():
    init = {"embedding_init": nn.initializers.normal(), "param_dtype": jnp.float16}
    theirs = nn.Embed(N, K, **init).init(KEY, ROWS)["params"]["embedding"]
    ours = linen.Embed(N, K, group_size=GROUP, **init).init(KEY, ROWS)
    expected = qjax.quantize(theirs.T, 4, GROUP)
    chex.assert_trees_all_equal(to_params(ours)["embedding"], qjax.prepare(expected))
    twin = Embed(N, K, group_size=GROUP, rngs=nnx.Rngs(3), **init)
    theirs = nnx.Embed(N, K, rngs=nnx.Rngs(3), **init).embedding[...]
    expected = qjax.prepare(qjax.quantize(theirs.T, 4, GROUP))
    chex.assert_trees_all_equal(twin.embedding, expected)
    empty = linen.Embed(N, K, group_size=GROUP, param_dtype=jnp.float16)
    abstract = jax.eval_shape(empty.init, KEY, ROWS)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, ours)
    made = jax.make_jaxpr(lambda: nnx.state(Embed(N, K, group_size=GROUP)))()
    assert f"[{K},{N}]" not in str(made)


def test_variables_state_and_bytes():
    made = to_variables({"tokens": {"embedding": cases.kernel("codebook", "float16")}})
    assert set(made["params"]["tokens"]["embedding"]) == {
        "scale",
        "codebook",
        "input_scale",
    }
    blank = jax.tree.map(jnp.zeros_like, made)
    restored = serialization.from_bytes(blank, serialization.to_bytes(made))
    chex.assert_trees_all_equal(restored, made)
    layer = Embed.from_qtensor(cases.kernel("mixed"))
    graphdef, floats, words = nnx.split(layer, Scale, Quantized)
    assert set(floats["packed"]) == {"scale"}
    whole = jax.jit(lambda *state: nnx.merge(graphdef, *state)(ROWS))
    chex.assert_trees_all_equal(whole(floats, words), run(layer, ROWS))
    assert "embedding=QTensor(96x40, 4.333 bits" in repr(layer)


def test_load_and_vmap():
    layer = nnx.eval_shape(lambda: Embed(N, K, group_size=GROUP))
    layer.load(cases.kernel("mixed"))
    expected = run(Embed.from_qtensor(cases.kernel("mixed")), ROWS)
    chex.assert_trees_all_equal(run(layer, ROWS), expected)
    stack = qjax.quantize(jnp.stack([cases.dense(), -cases.dense()]), 4, GROUP)
    wanted = qjax.dequantize(stack).transpose(0, 2, 1)[:, ROWS]
    each = nnx.jit(nnx.vmap(lambda m: m(ROWS)))(Embed.from_qtensor(stack))
    chex.assert_trees_all_close(each, wanted, atol=1e-6)
    axes = {"variable_axes": {"params": 0, "quantized": 0}, "split_rngs": {}}
    mapped = nn.vmap(linen.Embed, in_axes=None, axis_size=2, **axes)(N, K)
    found = jax.jit(mapped.apply)(to_variables({"embedding": stack}), ROWS)
    chex.assert_trees_all_equal(found, each)
    with pytest.raises(ValueError, match="is a stack"):
        Embed.from_qtensor(stack)(ROWS)


@pytest.mark.on_cpu
def test_words_of_several_rows_are_declined():
    # Seven rows of codes fill no word along k, so that `prepare` leaves them there.
    w = tensor.build(
        [Gemm().pack(jnp.zeros((7, 16), jnp.uint8), 4)],
        jnp.ones((1, 16)),
        layout=Gemm(),
        segments=[Segment(4, None)],
        affine=Affine.CENTERED,
    )
    layer = Embed.from_qtensor(w)
    with pytest.raises(NotImplementedError, match=r"layout Gemm\(\).*features=7"):
        layer(jnp.array([1]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Embed(N, K), "features=96 must be a multiple of group_size=128"),
        (
            lambda: Embed(N, 100, group_size=None),
            "features=100 must be a multiple of 8",
        ),
        (
            lambda: Embed(N, K, embedding_init=cases.kernel("4bit").scale.astype),
            "rngs=None, but embedding_init takes a key",
        ),
        (
            lambda: Embed(K, N, embedding_init=cases.kernel("4bit")),
            r"embedding.shape=\(96, 40\) must be \(40, 96\).*\[features, num_embedd",
        ),
        (
            lambda: Embed.from_qtensor(cases.kernel("4bit")).load(
                qjax.quantize(jnp.ones((64, N)), 4, 64)
            ),
            r"embedding.shape=\(64, 40\) must be \(96, 40\)",
        ),
        (
            lambda: linen.Embed(41, K).apply(
                to_variables({"embedding": cases.kernel("4bit")}), ROWS
            ),
            r"embedding.shape=\(96, 40\) must be \(96, 41\)",
        ),
        (
            lambda: linen.Embed(N, K).apply({"params": {}}, ROWS),
            "params/embedding is missing",
        ),
        (
            lambda: Embed.from_qtensor(cases.kernel("4bit")).attend(jnp.ones((2, N))),
            r"x.shape=\(2, 40\) must end in k=96",
        ),
        (
            lambda: linen.Embed(
                N,
                K,
                group_size=GROUP,
                embedding_init=lambda key, shape, dtype: jnp.zeros(shape[::-1]),
            ).init(KEY, ROWS),
            r"embedding_init gave .* of shape \(96, 40\); .* shape \(40, 96\)",
        ),
    ],
)
def test_invalid_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_indices_than_integers_are_refused(refuses):
    made = to_variables({"embedding": cases.kernel("4bit")})
    with refuses("inputs.dtype=float32 must be an integer dtype"):
        Embed.from_qtensor(cases.kernel("4bit"))(jnp.ones(3))
    with refuses("inputs.dtype=bool must be an integer dtype"):
        linen.Embed(N, K).apply(made, jnp.array([True]))
