"""Weights cut over eight devices: what is computed, and what is communicated."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import sharding, tensor
from qjax.formats.awq import Gemm, Gemv
from qjax.formats.awq_v2 import Interleaved
from qjax.formats.compressed_tensors import Dense
from qjax.formats.gptq import Stream
from qjax.formats.tiles import Tiles
from qjax.formats.tinygemm import TensorCoreTiled
from qjax.formats.torchao import Bytes
from tests import oracle
from tests.oracle import relative_error

K, N, M = 512, 128, 16
# Sums in float32 of up to 65536 products, over eight devices; float64 in the oracle.
TOLERANCE = 1e-5

KINDS = {
    "4 bits": {"bits": 4, "group_size": 32},
    "3 bits a column": {"bits": 3, "group_size": None, "affine": "CENTERED"},
    "float zeros": {"bits": 2, "group_size": 64, "affine": "OFFSET"},
    "codebook": {"bits": 4, "group_size": 64, "affine": "CODEBOOK"},
    "order": {"bits": 4, "group_size": 32, "order": True, "input_scale": True},
    "act-order": {"bits": 8, "group_size": 32, "row_group": True},
    "mixed": {
        "parts": [(6, 128, 32), (4, 256, 32), (2, 128, None)],
        "affine": "CENTERED",
        "order": True,
    },
    "mixed without order": {
        "parts": [(8, 128, 32), (4, 384, 32)],
        "affine": "OFFSET",
        "input_scale": True,
    },
}
# Layouts that can be cut between words, as files have them.
PACKINGS = [Stream(), Gemm(), Gemv(), Interleaved(), Dense(), TensorCoreTiled(2)]
# Of the weight and of x.
CUTS = {
    "columns": (P(None, "model"), P("data")),
    "rows": (P("model", None), P("data", "model")),
    "rows of whole inputs": (P("model"), P()),
    "both": (P("model", "data"), P()),
    "FSDP": (P(None, "data"), P("data")),
    "inputs alone": (P(), P(("data", "model"))),
}


def mesh_of(kind=AxisType.Auto):
    devices = jax.devices("cpu")
    return jax.make_mesh((2, 4), ("data", "model"), (kind, kind), devices=devices)


MESH, EXPLICIT = mesh_of(), mesh_of(AxisType.Explicit)


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def place(array, spec, mesh=MESH):
    return jax.device_put(array, NamedSharding(mesh, spec))


def step(x, dy, w):
    """A product and its gradients, with respect to x and all leaves of w."""

    def loss(x, w):
        y = qjax.matmul(x, w)
        return (y * dy).sum(), y

    (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True)(
        x, w
    )
    return y, *gradients


def check(matrix, found, x, dy):
    y, dx, dw = found
    assert relative_error(y, matrix.matmul(x)) < TOLERANCE
    expected = matrix.gradients(x, dy)
    assert relative_error(dx, expected["x"]) < TOLERANCE
    for name in ("scale", "zero", "codebook", "input_scale"):
        leaf = jax.tree.map(np.asarray, getattr(dw, name))
        leaf = leaf.decode() if isinstance(leaf, tensor.Encoded) else leaf
        if leaf is not None and leaf.dtype != jax.dtypes.float0:
            assert relative_error(leaf, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_under_jit(kind, cut, as_qtensor):
    matrix = oracle.random(0, K, N, **KINDS[kind])
    x, dy = draw((M, K), 1), draw((M, N), 2)
    of_w, of_x = CUTS[cut]
    w = qjax.shard(as_qtensor(matrix), MESH, of_w)
    check(matrix, jax.jit(step)(place(x, of_x), dy, w), x, dy)


@pytest.mark.parametrize("kind", ["4 bits", "order"])
@pytest.mark.parametrize("cut", ["uncut", "columns", "rows"])
def test_a_mesh_that_only_the_program_knows(kind, cut, as_qtensor):
    matrix = oracle.random(0, K, N, **KINDS[kind])
    w, x, dy = as_qtensor(matrix), draw((M, K), 1), draw((M, N), 2)
    specs = qjax.partition_specs(w, MESH, CUTS.get(cut, (P(),))[0])

    def constrained(x, dy, w):
        return step(x, dy, jax.lax.with_sharding_constraint(w, specs))

    with jax.set_mesh(MESH):
        found = jax.jit(constrained)(x, dy, w)
        moved = communicated(lambda x, w: constrained(x, dy, w)[0], x, w)
    check(matrix, found, x, dy)
    # A device computes its own columns, or a summand of all.
    assert found[0].sharding.is_fully_replicated == (cut != "columns")
    assert moved == ({"all-reduce": 4 * M * N} if cut == "rows" else {})


@pytest.mark.parametrize("kind", ["4 bits", "order", "mixed"])
@pytest.mark.parametrize("cut", ["columns", "rows", "FSDP"])
def test_explicit_axes(kind, cut, as_qtensor):
    matrix = oracle.random(0, K, N, **KINDS[kind])
    x, dy = draw((2, M // 2, K), 1), draw((2, M // 2, N), 2)
    of_w, of_x = CUTS[cut]
    of_x = P(of_x[0], None, *of_x[1:])
    with jax.set_mesh(EXPLICIT):
        w = qjax.shard(as_qtensor(matrix), EXPLICIT, of_w)
        placed = place(x, of_x, EXPLICIT)
        of_y = jax.typeof(qjax.matmul(placed, w)).sharding.spec
        dy_placed = place(dy, of_y, EXPLICIT)
        found = jax.jit(step)(placed, dy_placed, w)
        assert jax.typeof(found[1]) == jax.typeof(placed)
        for leaf, gradient in zip(
            jax.tree.leaves(w.scale), jax.tree.leaves(found[2].scale), strict=True
        ):
            assert jax.typeof(leaf) == jax.typeof(gradient)
    assert of_y[2] == {"columns": "model", "rows": None, "FSDP": "data"}[cut]
    flat = [np.asarray(a).reshape(-1, a.shape[-1]) for a in (*found[:2], x, dy)]
    check(matrix, (flat[0], flat[1], found[2]), *flat[2:])


class TestTypes:
    """Explicit axes, in places where types do not follow by themselves."""

    IN_CONTEXT = pytest.mark.parametrize(
        "context",
        [lambda: jax.set_mesh(EXPLICIT), contextlib.nullcontext],
        ids=["set_mesh", "by operands"],
    )

    @pytest.mark.parametrize(
        ("kind", "spec"),
        [
            ("4 bits", P(None, "model")),
            ("3 bits a column", P("model")),
            ("order", P("model", "data")),
            ("mixed", P("model")),
        ],
        ids=str,
    )
    @IN_CONTEXT
    def test_one_matrix(self, context, kind, spec, as_qtensor):
        matrix = oracle.random(0, K, N, **KINDS[kind])
        whole = as_qtensor(matrix)
        w = qjax.shard(whole, EXPLICIT, spec)
        x, dy = draw((M, K), 1), draw((M, N), 2)
        with context():
            check(matrix, jax.jit(step)(place(x, P("data"), EXPLICIT), dy, w), x, dy)
            dense, moved = qjax.dequantize(w), qjax.relayout(w, Tiles())
        assert (dense == qjax.dequantize(whole)).all()
        by_k = spec[0] if whole.order is None else None
        assert jax.typeof(dense).sharding.spec == P(by_k, *(spec[1:] or (None,)))
        for found, expected in zip(
            moved.words, qjax.relayout(whole, Tiles()).words, strict=True
        ):
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("spec", [P(None, "model"), P("model")])
    def test_inputs_from_outside_of_the_mesh(self, spec):
        w, x = qjax.shard(packed(), EXPLICIT, spec), draw((M, K), 1)
        with jax.set_mesh(EXPLICIT):
            dx = jax.grad(lambda x: qjax.matmul(x, w).sum())(x)
        expected = np.broadcast_to(qjax.dequantize(packed()).sum(1), (M, K))
        assert relative_error(dx, expected) < TOLERANCE

    @IN_CONTEXT
    def test_rows_and_input_scale_along_one_axis(self, context):
        whole = dataclasses.replace(packed(), input_scale=draw(K, 3))
        w, x = qjax.shard(whole, EXPLICIT, P("data")), draw((M, K), 1)
        with context():
            y = qjax.matmul(place(x, P("data"), EXPLICIT), w)
        assert relative_error(y, x @ qjax.dequantize(whole)) < TOLERANCE

    @pytest.mark.parametrize(
        ("kind", "spec"),
        [("4 bits", P("model")), ("order", P("data", "model"))],
        ids=str,
    )
    @IN_CONTEXT
    def test_stacks(self, context, kind, spec, as_qtensor):
        matrices = [oracle.random(i, K, N, **KINDS[kind]) for i in range(4)]
        whole = stacked(map(as_qtensor, matrices))
        w, dense = qjax.shard(whole, EXPLICIT, spec), qjax.dequantize(whole)
        x, sizes = draw((M, K), 1), jnp.array([8, 0, 3, 5])
        with context():
            of_tokens = jax.jit(
                jax.grad(lambda x: qjax.ragged_matmul(x, w, sizes).sum())
            )
            assert (qjax.dequantize(w) == dense).all()
            # A gradient of the scales, too, which are cut.
            of_scales = jax.jit(
                jax.grad(lambda w: qjax.dequantize(w).sum(), allow_int=True)
            )
            assert jax.typeof(of_scales(w).scale) == jax.typeof(w.scale)
            moved = qjax.relayout(w, Tiles()).words[0]
            y = jax.vmap(lambda w: qjax.matmul(x, w))(w)
            dx = of_tokens(place(x, P("data"), EXPLICIT))
        np.testing.assert_array_equal(moved, qjax.relayout(whole, Tiles()).words[0])
        assert relative_error(y, x @ np.asarray(dense)) < TOLERANCE
        assert relative_error(dx, np.repeat(dense.sum(-1), sizes, 0)) < TOLERANCE

    @pytest.mark.parametrize(
        "spec", [P(None, "model"), P("data"), P("data", "model")], ids=str
    )
    @pytest.mark.parametrize("bits", [3, 4])
    @IN_CONTEXT
    def test_codes_of_tiles(self, context, bits, spec):
        whole = qjax.relayout(packed(bits=bits), Tiles())
        w = qjax.shard(whole, EXPLICIT, spec)
        with context():
            codes = qjax.codes(w)
            tensors = qjax.formats.gptq.to_tensors(w, "gptq_v2")
        assert jax.typeof(codes).sharding.spec == P(*spec, *[None] * (2 - len(spec)))
        assert (np.asarray(codes) == whole.numpy()).all()
        assert communicated(qjax.codes, w) == {}
        expected = qjax.formats.gptq.to_tensors(whole, "gptq_v2")
        for name, tensor_ in expected.items():
            np.testing.assert_array_equal(tensors[name], tensor_)

    @pytest.mark.parametrize("spec", [P("model"), P("data", "model")], ids=str)
    def test_codes_of_stacks_and_segments(self, spec, as_qtensor):
        tiles = functools.partial(qjax.relayout, layout=Tiles())
        stack = tiles(stacked([packed(seed) for seed in range(4)]))
        mixed = {"parts": [(6, 512, 32), (4, 512, None)], "affine": "CENTERED"}
        matrix = tiles(as_qtensor(oracle.random(0, 1024, N, **mixed)))
        for whole in (stack, matrix):
            found = qjax.codes(qjax.shard(whole, EXPLICIT, spec))
            np.testing.assert_array_equal(found, qjax.codes(whole))


@pytest.mark.parametrize("kind", ["4 bits", "order", "mixed", "mixed without order"])
@pytest.mark.parametrize("cut", ["columns", "rows of whole inputs"])
def test_shard_map(kind, cut, as_qtensor):
    matrix = oracle.random(0, K, N, **KINDS[kind])
    x, dy = draw((M, K), 1), draw((M, N), 2)
    w = sharding.by_segment(as_qtensor(matrix))
    specs = qjax.partition_specs(w, MESH, CUTS[cut][0])
    by_rows = cut != "columns"
    # Ordered rows of a device belong to inputs anywhere: each takes all of x.
    of_x = P(None, "model") if by_rows and w.order is None else P()

    @jax.shard_map(
        mesh=MESH,
        in_specs=(of_x, specs),
        out_specs=P() if by_rows else P(None, "model"),
    )
    def product(x, w):
        y = qjax.matmul(x, w)
        return jax.lax.psum(y, "model") if by_rows else y

    assert relative_error(jax.jit(product)(x, w), matrix.matmul(x)) < TOLERANCE
    dx = jax.jit(jax.grad(lambda x: (product(x, w) * dy).sum()))(x)
    assert relative_error(dx, matrix.gradients(x, dy)["x"]) < TOLERANCE


def communicated(f, *operands, out=None):
    """Bytes of what a compiled program gathers and sums, by operation."""
    text = jax.jit(f, out_shardings=out).lower(*operands).compile().as_text()
    size = {"f32": 4, "u32": 4, "s32": 4, "u16": 2, "bf16": 2, "u8": 1, "pred": 1}
    total = collections.Counter()
    pattern = r"= (.+?) (all-\w+|collective-\w+|reduce-scatter)\("
    for result, operation in re.findall(pattern, text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
            count = np.prod([int(n) for n in shape.split(",") if n], dtype=int)
            total[operation] += size[dtype] * int(count)
    return dict(total)


def packed(seed=0, bits=4, group_size=32):
    weight = draw((K, N), seed)
    return qjax.quantize(weight, bits, group_size)


def stacked(matrices):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices)


class TestCommunication:
    """What has to be moved between devices, and not a byte more."""

    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("kind", ["4 bits", "order", "act-order", "mixed"])
    def test_packed_words_stay(self, kind, cut, as_qtensor):
        of_w, of_x = CUTS[cut]
        w = qjax.shard(as_qtensor(oracle.random(0, K, N, **KINDS[kind])), MESH, of_w)
        # Left to itself, XLA may want the result back as the inputs were.
        out = NamedSharding(MESH, P(None, "data")) if cut == "FSDP" else None
        x = place(draw((M, K), 1), of_x)
        found = communicated(qjax.matmul, x, w, out=out)
        rows = M // 2  # of one device, where inputs are cut
        # An order asks for the inputs of other devices: they are gathered once.
        ordered = kind in ("order", "mixed")
        moved = {"all-gather": 4 * rows * K} if ordered else {}
        expected = {
            "columns": {},
            "rows": {"all-reduce": 4 * rows * N} | moved,
            "rows of whole inputs": {"all-reduce": 4 * M * N},
            "both": {"all-reduce": 4 * M * N // 2},
            # Inputs are smaller here than the weight.
            "FSDP": {"all-gather": 4 * M * K},
            "inputs alone": {},
        }
        assert found == expected[cut]

    def test_training_gathers_packed_words_and_no_more(self):
        # FSDP: rows and words are cut along the same axis, and words are smaller.
        x, dy = (
            place(draw((2048, K), 1), P("data")),
            place(draw((2048, N), 2), P("data")),
        )
        w = qjax.shard(packed(), MESH, P(None, "data"))
        found = communicated(qjax.matmul, x, w)
        assert found == {"all-gather": w.nbytes}
        # Once more in the backward pass; the gradient of the scales is summed.
        gradients = communicated(lambda *a: step(*a)[1:], x, dy, w)
        assert gradients["all-gather"] <= 2 * w.nbytes
        assert gradients["all-reduce"] == 4 * w.scale.size

    def test_gradients(self):
        x, dy = place(draw((M, K), 1), P("data")), place(draw((M, N), 2), P("data"))
        w = qjax.shard(packed(), MESH, P(None, "model"))
        scale, shard = 4 * w.scale.size, 4
        # The cotangent of x over the columns, the gradient of scales over the batch.
        assert communicated(lambda *a: step(*a)[1:], x, dy, w) == {
            "all-reduce": 4 * (M // 2) * K + scale // shard
        }
        w = qjax.shard(packed(), MESH, P("model", None))
        assert communicated(lambda *a: step(*a)[1:], x, dy, w) == {
            "all-reduce": scale // shard
        }

    @pytest.mark.parametrize("mesh", [MESH, EXPLICIT], ids=["automatic", "explicit"])
    def test_experts(self, mesh):
        # The stack is cut: each device multiplies by its own experts.
        stack = stacked(map(packed, range(4)))
        stack = qjax.shard(stack, mesh, P("model"))
        x = place(draw((4, M, K), 1), P("model"), mesh)
        assert communicated(jax.vmap(qjax.matmul), x, stack) == {}
        y = jax.jit(jax.vmap(qjax.matmul))(x, stack)
        expected = np.asarray(x) @ np.asarray(qjax.dequantize(stack, jnp.float32))
        assert relative_error(y, expected) < TOLERANCE

    @pytest.mark.parametrize(
        ("spec", "moved"),
        [(P(None, None, "model"), {}), (P(None, "model"), {"all-reduce": 4 * M * N})],
        ids=["columns", "rows"],
    )
    def test_ragged(self, spec, moved):
        stack = stacked(map(packed, range(2)))
        dense = np.asarray(qjax.dequantize(stack, jnp.float32))
        x, sizes = draw((M, K), 1), jnp.array([8, 8])
        stack, x = qjax.shard(stack, MESH, spec), place(x, P())
        assert communicated(qjax.ragged_matmul, x, stack, sizes) == moved
        y = jax.jit(qjax.ragged_matmul)(x, stack, sizes)
        by_expert = np.asarray(x).reshape(2, 8, K) @ dense
        assert relative_error(y, by_expert.reshape(M, N)) < TOLERANCE
        dx = jax.jit(jax.grad(lambda x: qjax.ragged_matmul(x, stack, sizes).sum()))(x)
        expected = np.repeat(dense.sum(-1), 8, axis=0)
        assert relative_error(dx, expected) < TOLERANCE

    def test_layers_by_index(self):
        stack = stacked(map(packed, range(3)))
        stack = qjax.shard(stack, MESH, P(None, None, "model"))
        x = place(draw((M, K), 1), P("data"))

        def one(x, stack, i):
            return qjax.matmul(x, stack, index=i)

        assert communicated(one, x, stack, 2) == {}
        expected = np.asarray(x) @ np.asarray(qjax.dequantize(packed(2), jnp.float32))
        assert relative_error(jax.jit(one)(x, stack, 2), expected) < TOLERANCE

    @pytest.mark.parametrize("mesh", [MESH, EXPLICIT], ids=["automatic", "explicit"])
    @pytest.mark.parametrize("layout", [Stream(), Tiles()], ids=str)
    def test_gradient_of_a_layer(self, layout, mesh):
        whole = qjax.relayout(stacked(map(packed, range(3))), layout)
        stack = qjax.shard(whole, mesh, P(None, None, "model"))
        x, dy = draw((M, K), 1), draw((M, N), 2)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1), allow_int=True)
        def gradients(x, w):
            return (qjax.matmul(x, w, index=2) * dy).sum()

        dx, dw = gradients(x, stack)
        dx_alone, dw_alone = gradients(x, whole)
        assert relative_error(dx, dx_alone) < TOLERANCE
        assert relative_error(dw.scale, dw_alone.scale) < TOLERANCE

    def test_sequences(self):
        # Batch and sequence are cut along one axis each.
        x = place(draw((2, 8, K), 1), P("data", "model"))
        w = qjax.shard(packed(), MESH, P())
        assert communicated(qjax.matmul, x, w) == {}

    @pytest.mark.parametrize("spec", [P("model", None), P(None, "model")], ids=str)
    def test_dequantize(self, spec):
        w = qjax.shard(packed(), MESH, spec)
        assert communicated(qjax.dequantize, w) == {}
        assert (jax.jit(qjax.dequantize)(w) == qjax.dequantize(packed())).all()

    @pytest.mark.parametrize("spec", [P(None, "model"), P("model"), P("data", "model")])
    @pytest.mark.parametrize(
        ("source", "target"), [*itertools.pairwise([*PACKINGS, PACKINGS[0]])], ids=str
    )
    @pytest.mark.filterwarnings("ignore:.* is moved to Stream")
    def test_other_packings(self, source, target, spec):
        whole = qjax.relayout(packed(), source)
        w = qjax.shard(whole, MESH, spec)
        move = functools.partial(qjax.relayout, layout=target)
        assert communicated(move, w) == {}
        moved = move(w)
        expected = qjax.shard(moved, MESH, spec).words[0].sharding
        assert moved.words[0].sharding.is_equivalent_to(expected, moved.words[0].ndim)
        np.testing.assert_array_equal(moved.words[0], move(whole).words[0])
        x = draw((M, K), 1)
        assert relative_error(qjax.matmul(x, w), x @ qjax.dequantize(whole)) < TOLERANCE

    def test_no_device_holds_the_dense_weight(self):
        w = qjax.shard(packed(), MESH, P(None, "model"))
        x = place(draw((1, K), 1), P())
        plan = jax.jit(qjax.matmul).lower(x, w).compile().memory_analysis()
        assert plan.temp_size_in_bytes < 4 * K * N // 4
        assert plan.argument_size_in_bytes == w.nbytes // 4 + x.nbytes


def assert_close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if a.dtype != jax.dtypes.float0:
            assert relative_error(a, b) < TOLERANCE


class TestPartOfAnAxis:
    """Pieces that fewer devices share than an axis has, which is halved."""

    MESHES = pytest.mark.parametrize(
        "mesh",
        [
            jax.make_mesh(
                (4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4]
            ),
            # Here, two devices along the other axis could share them.
            MESH,
        ],
        ids=["4", "2x4"],
    )

    @MESHES
    def test_gradients(self, mesh):
        # Six groups of rows, and hidden features that are cut over four devices.
        up = qjax.quantize(draw((64, 192), 0), bits=4, group_size=32)
        down = qjax.quantize(draw((192, 64), 1), bits=4, group_size=32)
        x = draw((M, 64), 2)

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), allow_int=True)
        def train(x, up, down):
            hidden = jax.nn.relu(qjax.matmul(x, up))
            return (qjax.matmul(hidden, down) ** 2).mean()

        cut = qjax.shard(up, mesh, P(None, "model")), qjax.shard(down, mesh, P())
        assert_close(train(place(x, P(), mesh), *cut), train(x, up, down))

    @MESHES
    def test_gradients_of_cut_inputs(self, mesh):
        w = qjax.quantize(draw((192, 64), 1), bits=4, group_size=32)
        x, dy = draw((M, 192), 2), draw((M, 64), 3)
        cut = place(x, P(None, "model"), mesh), dy, qjax.shard(w, mesh, P())
        assert_close(jax.jit(step)(*cut), jax.jit(step)(x, dy, w))

    @MESHES
    def test_relayout(self, mesh):
        # Two steps of 128 rows, of words that are cut over four devices.
        w = qjax.quantize(draw((256, 64), 0), bits=4, group_size=32)
        moved = qjax.relayout(qjax.shard(w, mesh, P("model")), Tiles())
        np.testing.assert_array_equal(
            moved.words[0], qjax.relayout(w, Tiles()).words[0]
        )
        assert moved.words[0].sharding.is_fully_replicated

    def test_an_axis_that_shares_them_still_does(self):
        w = qjax.quantize(draw((256, 64), 0), bits=4, group_size=32)
        move = functools.partial(qjax.relayout, layout=Tiles())
        w = qjax.shard(w, MESH, P("data"))
        assert communicated(move, w) == {}
        assert move(w).words[0].sharding.spec == P("data")


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("mesh", [MESH, EXPLICIT], ids=["auto", "explicit"])
class TestPrepare:
    """What is cut stays cut: no device gets more words than it had."""

    @pytest.mark.parametrize("bits", [3, 4])
    @pytest.mark.parametrize("spec", [P(None, "model"), P("data"), P("data", "model")])
    def test_moves_what_can_be_cut_the_same_way(self, mesh, bits, spec):
        whole = packed(bits=bits)
        moved = qjax.prepare(qjax.shard(whole, mesh, spec))
        expected = qjax.shard(qjax.prepare(whole), mesh, spec)
        assert moved.layout == Tiles()
        chex.assert_trees_all_equal(moved.words, expected.words)
        assert moved.words[0].sharding.is_equivalent_to(expected.words[0].sharding, 4)

    @pytest.mark.parametrize(
        ("bits", "k", "spec"),
        [(3, K, P("model")), (3, 768, P("data", "model")), (4, 1152, P("data"))],
    )
    def test_leaves_what_cannot(self, mesh, bits, k, spec):
        whole = qjax.quantize(draw((k, 64), 0), bits=bits, group_size=32)
        w = qjax.shard(whole, mesh, spec)
        for kept in (qjax.prepare(w), qjax.prepare(w, layout=Tiles())):
            chex.assert_trees_all_equal_structs(kept, w)
            for leaf, like in zip(
                jax.tree.leaves(kept), jax.tree.leaves(w), strict=True
            ):
                assert leaf.sharding == like.sharding
        layer = qjax.layers.nnx.Linear.from_qtensor(w)
        assert layer.kernel.layout == Stream()
        x = draw((M, k), 1)
        assert relative_error(layer(x), x @ qjax.dequantize(whole)) < TOLERANCE
        # Not cut, it moves.
        assert qjax.prepare(qjax.shard(whole, mesh, P())).layout == Tiles()

    def test_moves_to_what_is_read_elsewhere(self, mesh):
        whole = packed(bits=4)
        w = qjax.shard(qjax.relayout(whole, Gemm()), mesh, P("model", "data"))
        assert qjax.prepare(w).layout == Tiles()
        w = qjax.shard(qjax.relayout(whole, Gemm()), mesh, P(("data", "model")))
        moved = qjax.prepare(w)
        assert moved.layout == Stream()
        assert moved.words[0].sharding.shard_shape((64, N)) == (8, N)
        np.testing.assert_array_equal(moved.words[0], whole.words[0])


class TestSpecs:
    def test_of_the_leaves(self):
        w = packed()
        specs = qjax.partition_specs(w, MESH, P("model", "data"))
        assert jax.tree.structure(specs) == jax.tree.structure(w)
        assert set(jax.tree.leaves(specs)) == {P("model", "data")}
        # One group a column has no axis to cut along k.
        column = qjax.partition_specs(packed(group_size=None), MESH, P("model"))
        assert (column.words[0], column.scale) == (P("model", None), P(None, None))

    def test_of_tiles(self):
        w = qjax.relayout(packed(bits=3), Tiles())
        specs = qjax.partition_specs(w, MESH, P(None, "model"))
        assert specs.words == (P(None, None, "model", None),)
        # Steps of 256 rows, of which there are two.
        specs = qjax.partition_specs(w, MESH, P("data"))
        assert specs.words == (P("data", None, None, None),)
        with pytest.raises(ValueError, match=r"k of QTensor.* has 2 pieces"):
            qjax.partition_specs(w, MESH, P("model"))

    def test_of_stacks(self):
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), packed())
        specs = qjax.partition_specs(stack, MESH, P("model", None, "data"))
        assert specs.scale == P("model", None, "data")

    def test_of_what_lies_along_k(self, as_qtensor):
        w = as_qtensor(oracle.random(0, K, N, **KINDS["order"]))
        specs = qjax.partition_specs(w, MESH, P("model"))
        assert (specs.order, specs.input_scale) == (P("model"), P(None))
        w = as_qtensor(oracle.random(0, K, N, **KINDS["act-order"]))
        specs = qjax.partition_specs(w, MESH, P("model"))
        # Rows of any group lie on any device.
        assert (specs.row_group, specs.scale) == (P("model"), P(None, None))

    def test_of_abstract_leaves(self):
        specs = qjax.partition_specs(
            jax.eval_shape(packed), AbstractMesh((4,), ("model",)), P(None, "model")
        )
        assert specs.words == (P(None, "model"),)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (P("model", None, None), "has more axes than w.shape=(512, 128)"),
            (P("expert"), "The mesh has axes ('data', 'model'), and no 'expert'"),
            (
                P(("data", "model")),
                "k of QTensor(512x128, 4 bits, group 128, Stream(), (q - z) * s, "
                "float32 scale, 34.5 KiB) has 4 pieces of 128 rows in Stream(), "
                "each of whole groups and words, which 8 devices cannot share evenly; "
                "choose another axis, or leave it",
            ),
        ],
    )
    def test_refuses(self, spec, message, refuses):
        with refuses(message):
            qjax.partition_specs(packed(group_size=128), MESH, spec)

    @pytest.mark.parametrize(
        ("shape", "bits", "spec", "message"),
        [
            (
                (768, 64),
                3,
                P("data"),
                "float32 scale, 21.75 KiB) has 3 pieces of 256 rows in Tiles(), each "
                "of whole groups and words, which 2 devices cannot share evenly; "
                "qjax.prepare(w, layout=qjax.formats.gptq.Stream()) can be cut into "
                "pieces of 64 rows.",
            ),
            (
                (2112, 64),
                3,
                P("data"),
                "is not cut, as 2112 rows are no whole pieces of 256 rows in Tiles(), "
                "each of whole groups and words; choose another axis, or leave it "
                "whole.",
            ),
            (
                (256, 16),
                3,
                P("data"),
                "has 1 piece of 256 rows in Tiles(), each of whole groups",
            ),
            (
                (256, 40),
                4,
                P(None, "model"),
                "n of QTensor(256x40, 4 bits, group 64, Tiles(), (q - z) * s, float32 "
                "scale, 6.781 KiB) is not cut, as 40 columns are no whole pieces of 16 "
                "columns in Tiles(), each of whole groups and words; qjax.prepare(w, "
                "layout=qjax.formats.gptq.Stream()) can be cut into pieces of 1 "
                "column.",
            ),
            (
                (3, 64, 32),
                4,
                P("data"),
                "has 3 matrices there, which 2 devices cannot share evenly",
            ),
        ],
    )
    def test_refuses_steps_of_tiles(self, shape, bits, spec, message, refuses):
        w = qjax.quantize(jnp.ones(shape), bits, group_size=64)
        with refuses(message):
            qjax.shard(qjax.prepare(w, layout=Tiles()), MESH, spec)
        if "Stream()" in message:
            again = qjax.prepare(qjax.prepare(w, layout=Tiles()), layout=Stream())
            qjax.shard(again, MESH, spec)

    @pytest.mark.parametrize("spec", [P("data"), P(None, "model")], ids=str)
    def test_refuses_groups_that_are_no_runs_of_rows(self, spec, refuses):
        w = qjax.quantize(jnp.ones((64, 32)), bits=4, group_size=32)
        flat = dataclasses.replace(w, grouping=tensor.Grouping.FLAT)
        with refuses("is not cut, as no piece of it has whole groups and words;"):
            qjax.shard(flat, MESH, spec)

    def test_refuses_with_a_way_out(self, as_qtensor, refuses):
        mixed = as_qtensor(oracle.random(0, K, N, **KINDS["mixed"]))
        with refuses("the 6-bit rows of QTensor(512x128, 4 bits, group 32,column"):
            qjax.partition_specs(mixed, MESH, P("model"))
        with refuses("qjax.sharding.by_segment, lets mixed widths be cut"):
            qjax.partition_specs(mixed, MESH, P("model"))
        foreign = qjax.relayout(packed(), Bytes())
        with refuses("Bytes() is never cut, but what qjax.prepare makes of it is"):
            qjax.shard(foreign, MESH, P(None, "model"))


class TestMixed:
    def test_every_device_has_its_share_of_every_segment(self, as_qtensor):
        w = as_qtensor(oracle.random(0, K, N, **KINDS["mixed"]))
        sharded = qjax.shard(w, MESH, P("model"))
        for leaves in (sharded.words, sharded.scale.parts[:2], sharded.order.parts):
            for leaf in leaves:
                assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // 4
        assert repr(sharded) == repr(w)

    def test_all_else_joins_it_again(self, as_qtensor):
        w = as_qtensor(oracle.random(0, K, N, **KINDS["mixed"]))
        sharded = qjax.shard(w, MESH, P("model"))
        assert (qjax.dequantize(sharded) == qjax.dequantize(w)).all()
        assert isinstance(qjax.prepare(sharded).scale, sharding.Segmented)
        arrays, metadata = qjax.flatten(sharded)
        back = qjax.unflatten(arrays, metadata)
        assert (qjax.dequantize(back) == qjax.dequantize(w)).all()
        assert arrays.keys() == qjax.flatten(w)[0].keys()

    def test_row_groups_of_several_segments_are_refused(self, refuses):
        part = packed()
        double = dataclasses.replace(
            part,
            words=part.words * 2,
            segments=part.segments * 2,
            row_group=jnp.zeros(2 * K, jnp.int32),
        )
        with refuses("w has a row_group (act-order) and several segments"):
            sharding.by_segment(double)
