"""Lowering for an NVIDIA GPU, here on the CPU.

Interpret mode runs what Triton has no instruction for; lowering tells.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats import awq, awq_v2, bnb, gptq, mxfp4, tiles, tinygemm
from qjax.pallas import configs, gpu
from qjax.pallas.dequantize import dequantize
from qjax.pallas.matmul import matmul
from qjax.pallas.matmul_t import matmul_t
from qjax.pallas.matvec import matvec
from qjax.pallas.operands import Config
from qjax.pallas.scale_grad import scale_grad
from qjax.tensor import Affine, QTensor, Segment

# JAX's lowering is what they test.
pytestmark = pytest.mark.every_version

TARGET = "__gpu$xla.gpu.triton"
# Launches of a product: its rows are prepared first, unless they are few.
PRODUCT, FEW = 2, 1
CONVENTIONS = {
    "integer zero": (Affine.ZERO, jnp.uint8),
    "float zero": (Affine.ZERO, jnp.float16),
    "offset": (Affine.OFFSET, jnp.float16),
    "centered": (Affine.CENTERED, jnp.float16),
    "symmetric": (Affine.CENTERED, None),
    "codebook": (Affine.CODEBOOK, None),
    "float": (Affine.FLOAT, None),
}
struct = jax.ShapeDtypeStruct


def weight(bits, group_size, convention="integer zero", k=512, n=256):
    """A matrix in Tiles, of structs."""
    affine, zero = CONVENTIONS[convention]
    groups = (1 if group_size is None else -(-k // group_size), n)
    padding = -k % max(128, tiles.rows_of_block(bits))
    columns = -(-n // tiles.SIDE)
    blocks = (k + padding) // tiles.rows_of_block(bits)
    words = (blocks, tiles.units_of_block(bits), columns, tiles.SLOTS)
    return QTensor(
        words=(struct(words, jnp.uint16),),
        scale=struct(groups, jnp.float16),
        zero=None if zero is None else struct(groups, zero),
        layout=tiles.Tiles(nibbles=affine is Affine.CODEBOOK),
        segments=(Segment(bits, group_size, padding),),
        affine=affine,
        codebook=struct((16,), jnp.float32) if affine is Affine.CODEBOOK else None,
        padding=columns * tiles.SIDE - n,
    )


def lower(f, *avals):
    """Lowers for CUDA, no matter what devices this machine has; returns the text."""
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(f).trace(*avals)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def launches(text):
    """How many kernels were lowered; no launch may have gone to another backend."""
    count = text.count(f"@{TARGET}") + text.count(f'"{TARGET}"')
    assert "mosaic" not in text
    return count


# Each value of a column with each of another column somewhere, not their product.
@pytest.mark.parametrize(
    ("bits", "block_m", "block_k", "group_size", "convention"),
    [
        (1, 8, 256, 256, "integer zero"),
        (1, 64, 256, 128, "offset"),
        (2, 16, 128, 64, "float zero"),
        (2, 32, 256, None, "symmetric"),
        (3, 8, 256, 32, "offset"),
        (3, 64, 256, None, "integer zero"),
        (4, 8, 128, 128, "integer zero"),
        (4, 16, 256, 32, "centered"),
        (4, 32, 128, 64, "offset"),
        (4, 64, 128, None, "float zero"),
        (4, 8, 256, 64, "codebook"),
        (4, 32, 128, 32, "codebook"),
        (4, 8, 128, 16, "float"),
        (8, 64, 128, 128, "float"),
        (5, 16, 256, 128, "symmetric"),
        (5, 32, 256, 256, "float zero"),
        (6, 8, 128, 64, "centered"),
        (6, 64, 256, 256, "symmetric"),
        (7, 16, 256, None, "offset"),
        (7, 32, 256, 128, "centered"),
        (8, 8, 128, None, "centered"),
        (8, 64, 128, 32, "symmetric"),
        (4, 128, 64, 128, "integer zero"),
        (5, 128, 256, 64, "float zero"),
    ],
)
def test_matmul(bits, block_m, block_k, group_size, convention):
    x, w = struct((block_m, 512), jnp.float32), weight(bits, group_size, convention)
    config = Config(block_m, block_k=block_k, splits=2)
    assert launches(lower(functools.partial(matmul, config=config), x, w)) == PRODUCT


@pytest.mark.parametrize(
    ("bits", "m", "group_size", "convention", "dtype"),
    [
        (1, 1, 128, "offset", jnp.bfloat16),
        (2, 2, 64, "float zero", jnp.float16),
        (3, 3, 32, "integer zero", jnp.bfloat16),
        (4, 1, 128, "integer zero", jnp.bfloat16),
        (4, 4, 64, "centered", jnp.float16),
        (5, 8, None, "symmetric", jnp.bfloat16),
        (6, 16, 256, "offset", jnp.float16),
        (7, 1, 128, "integer zero", jnp.bfloat16),
        (8, 1, None, "float zero", jnp.float16),
    ],
)
def test_matvec(bits, m, group_size, convention, dtype):
    x, w = struct((m, 512), dtype), weight(bits, group_size, convention)
    config = configs.for_matvec(m, w)
    assert launches(lower(functools.partial(matvec, config=config), x, w)) == FEW


# Triton tiles have sides that are powers of two: everything else is padded or masked.
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 300, 20), (5, 129, 200), (130, 640, 48)])
def test_ragged(bits, m, k, n):
    x, w = struct((m, k), jnp.float32), weight(bits, 64, k=k, n=n)
    config = configs.for_matmul(m, w)
    assert launches(lower(functools.partial(matmul, config=config), x, w)) == PRODUCT
    few, config = struct((min(m, 16), k), jnp.bfloat16), configs.for_matvec(m, w)
    assert launches(lower(functools.partial(matvec, config=config), few, w)) == FEW


@pytest.mark.parametrize(
    ("bits", "group_size", "convention", "dtype"),
    [
        (1, 128, "symmetric", jnp.float16),
        (2, 64, "integer zero", jnp.bfloat16),
        (3, 128, "offset", jnp.float32),
        (4, 32, "float zero", jnp.bfloat16),
        (4, 128, "integer zero", jnp.float16),
        (5, 256, "centered", jnp.bfloat16),
        (6, None, "integer zero", jnp.float32),
        (7, 128, "offset", jnp.float16),
        (8, None, "centered", jnp.bfloat16),
    ],
)
def test_backward_and_dequantize(bits, group_size, convention, dtype):
    w = weight(bits, group_size, convention)
    x, dy = struct((16, 512), jnp.float32), struct((16, 256), jnp.float32)
    for f, config, operands in (
        (matmul_t, configs.for_matmul_t(16, w), (dy, w)),
        (scale_grad, configs.for_scale_grad(16, w), (x, dy, w)),
        (functools.partial(dequantize, dtype=dtype), configs.for_dequantize(w), (w,)),
    ):
        assert launches(lower(functools.partial(f, config=config), *operands)) == 1


def test_an_open_number_of_rows():
    (m,), w = jax.export.symbolic_shape("m"), weight(4, 128)
    x = struct((m, 512), jnp.bfloat16)

    def kernels(f):
        return re.findall(r'name = "(\w+)"', lower(f, x, w))

    gradients = jax.grad(lambda x, w: qjax.matmul(x, w).sum(), (0, 1), allow_int=True)
    # The weight is formed, forward and backward; gradients of scales are XLA's.
    assert kernels(qjax.matmul) == ["dequantize_4bit"]
    assert {*kernels(gradients)} == {"dequantize_4bit", "relayout_4bit"}


@pytest.mark.parametrize(("m", "count"), [(16, FEW), (17, PRODUCT)])
@pytest.mark.parametrize("name", ["pallas", "pallas_bf16"])
def test_named(name, m, count):
    x, w = struct((m, 512), jnp.bfloat16), weight(4, 128)
    f = functools.partial(qjax.matmul, implementation=name)
    assert launches(lower(f, x, w)) == count


@pytest.mark.parametrize(("name", "count"), [("pallas", PRODUCT), ("pallas_bf16", FEW)])
def test_few_rows_that_matvec_declines(name, count):
    # Scaled in float32 first, they are prepared in float16.
    x, w = struct((4, 512), jnp.bfloat16), weight(4, 128)
    w = dataclasses.replace(w, input_scale=struct((512,), jnp.float32))
    f = functools.partial(qjax.matmul, implementation=name)
    assert launches(lower(f, x, w)) == count


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dispatch(dtype):
    # The platform decides when the program is lowered, wherever it was traced.
    x, w = struct((4, 512), dtype), weight(4, 128)
    assert launches(lower(qjax.matmul, x, w)) == FEW
    on_cpu = jax.jit(qjax.matmul).trace(x, w).lower(lowering_platforms=("cpu",))
    assert launches(on_cpu.as_text()) == 0


@pytest.mark.parametrize(("t", "experts"), [(3, 8), (8, 64), (256, 16), (4096, 8)])
@pytest.mark.parametrize("convention", ["integer zero", "codebook"])
def test_ragged_matmul_reads_the_stack_where_it_lies(t, experts, convention):
    add = lambda leaf: struct((experts, *leaf.shape), leaf.dtype)  # noqa: E731
    w = jax.tree.map(add, weight(4, 128, convention))
    x, sizes = struct((t, 512), jnp.bfloat16), struct((experts,), jnp.int32)
    text = lower(qjax.ragged_matmul, x, w, sizes)
    few = t <= 256  # rows of an expert's block
    assert launches(text) == (FEW if few else PRODUCT)
    # One launch takes all blocks.
    assert "stablehlo.while" not in text
    if convention == "codebook":
        return

    @functools.partial(jax.grad, argnums=(0, 1), allow_int=True)
    def gradients(x, w, sizes):
        return qjax.ragged_matmul(x, w, sizes).astype(jnp.float32).sum()

    # matmul_t and scale_grad, in a loop each.
    assert launches(lower(gradients, x, w, sizes)) == 2


def test_gradient():
    x, w = struct((4, 512), jnp.bfloat16), weight(4, 128)

    def gradients(x, w):
        def loss(x, scale):
            y = qjax.matmul(x, dataclasses.replace(w, scale=scale))
            return y.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(x, w.scale)

    # matmul_t and scale_grad; the product itself is not needed.
    assert launches(lower(gradients, x, w)) == 2


def test_gradient_of_a_codebook():
    # What the entries are worth is left to XLA, which reads another layout; x goes
    # through the kernel.
    x, w = struct((4, 512), jnp.bfloat16), weight(4, 64, "codebook")

    def loss(x, w):
        return qjax.matmul(x, w).astype(jnp.float32).sum()

    assert launches(lower(jax.grad(loss), x, w)) == 1
    by_codebook = lambda x, w, c: loss(x, dataclasses.replace(w, codebook=c))  # noqa: E731
    text = lower(jax.grad(by_codebook, 2), x, w, w.codebook)
    assert launches(text) == text.count('name = "relayout_4bit"') == 1


def stacked(w, count=3):
    return jax.tree.map(lambda leaf: struct((count, *leaf.shape), leaf.dtype), w)


@pytest.mark.parametrize("convention", ["integer zero", "codebook"])
@pytest.mark.parametrize(("m", "count"), [(4, FEW), (200, PRODUCT), (600, 1)])
def test_a_stack_by_index(convention, m, count):
    x, w = struct((m, 512), jnp.bfloat16), stacked(weight(4, 64, convention))
    index = struct((), jnp.int32)
    text = lower(lambda x, w, i: qjax.matmul(x, w, index=i), x, w, index)
    assert launches(text) == count
    # Nothing but the kernel takes words: none is sliced off.
    taken = [line for line in text.splitlines() if "x256xui16>" in line]
    others = ("func.func", "call @", "return", "stablehlo.reshape", TARGET)
    assert all(any(word in line for word in others) for line in taken)


def test_layers_of_a_scan():
    x, w = struct((4, 512), jnp.bfloat16), stacked(weight(4, 64, k=512, n=512), 8)

    def forward(x, w):
        def layer(x, i):
            return qjax.matmul(x, w, index=i), None

        return jax.lax.scan(layer, x, jnp.arange(8))[0]

    assert launches(lower(forward, x, w)) == FEW


@pytest.mark.parametrize("by_index", [False, True])
def test_vmap(by_index):
    # Experts: one product for all of them.
    x, w = struct((3, 4, 512), jnp.bfloat16), stacked(weight(4, 64))

    def experts(x, w):
        if not by_index:
            return jax.vmap(qjax.matmul)(x, w)
        each = lambda x, i: qjax.matmul(x, w, index=i)  # noqa: E731
        return jax.vmap(each)(x, jnp.arange(3)[::-1])

    assert launches(lower(experts, x, w)) == FEW


@pytest.mark.parametrize(
    ("capability", "stages"),
    [("8.0", 3), ("9.0", 3), ("10.0", 1), ("10.3", 1), ("12.0", 3), (None, 3)],
)
def test_matmul_t_where_products_would_race(capability, stages, monkeypatch):
    devices = {"cuda": [SimpleNamespace(compute_capability=capability)]}
    if capability:
        monkeypatch.setattr(jax, "devices", devices.get)
    monkeypatch.setattr(gpu, "at_hand", gpu.at_hand.__wrapped__)
    call = functools.partial(matmul_t, config=Config(64, 64, 128, stages=3))
    lowered = lower(call, struct((64, 256), jnp.float32), weight(4, 128))
    assert set(re.findall(r"num_stages = (\d)", lowered)) == {str(stages)}


def test_long_rows_are_prepared_by_xla():
    x, w = struct((17, 65536), jnp.bfloat16), weight(4, 128, k=65536)
    assert launches(lower(qjax.matmul, x, w)) == 1


def sharded(f, in_specs, out_specs, *avals):
    """Lowers ``f`` on four devices, each with its shard, for CUDA."""
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh(
        (4,), ("d",), (jax.sharding.AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        local = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        traced = jax.jit(local).trace(*avals)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


BY_COLUMN = (P(None, None, "d", None), P(None, "d"))
BY_ROW = (P("d", None, None, None), P("d", None))


@pytest.mark.parametrize(
    ("words", "rest", "x", "y"),
    [(*BY_COLUMN, P(), P(None, "d")), (*BY_ROW, P(None, "d"), P())],
    ids=["columns", "rows"],
)
def test_shard_map(words, rest, x, y):
    w = weight(4, 64, k=512, n=512)
    specs = jax.tree.map(lambda leaf: words if leaf.ndim == 4 else rest, w)

    def product(x, w):
        out = qjax.matmul(x, w)
        return jax.lax.psum(out, "d") if y == P() else out

    text = sharded(product, (x, specs), y, struct((4, 512), jnp.bfloat16), w)
    assert launches(text) == FEW
    # One sum by rows, nothing by columns: words never move.
    assert text.count("stablehlo.all_reduce") == (y == P())
    assert "all_gather" not in text


def test_gradient_in_shard_map():
    w = weight(4, 64, k=512, n=512)
    specs = jax.tree.map(
        lambda leaf: BY_COLUMN[0] if leaf.ndim == 4 else BY_COLUMN[1], w
    )

    def gradients(x, w):
        def loss(x, scale):
            y = qjax.matmul(x, dataclasses.replace(w, scale=scale))
            return y.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1))(x, w.scale)

    avals = struct((4, 512), jnp.bfloat16), w
    text = sharded(gradients, (P(), specs), (P(), BY_COLUMN[1]), *avals)
    assert launches(text) == 2
    # The cotangent of x, which every device has a share of.
    assert text.count("stablehlo.all_reduce") == 1


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("convention", ["integer zero", "codebook"])
def test_dense_weight(convention, dtype):
    w = weight(4, 64, convention)
    assert launches(lower(lambda w: qjax.dequantize(w, dtype), w)) == 1
    # A kernel might round the product of a float32 scale, and jnp would not.
    wide = dataclasses.replace(
        weight(4, 64, "offset"), scale=struct((8, 256), jnp.float32)
    )
    assert launches(lower(lambda w: qjax.dequantize(w, dtype), wide)) == 0


OTHERS = [
    gptq.Stream(),
    awq.Gemm(),
    awq.Gemv(),
    awq_v2.Interleaved(),
    bnb.Flat(512),
    mxfp4.Blocks(),
    tinygemm.TensorCoreTiled(),
]


@pytest.mark.parametrize("target", OTHERS, ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_relayout(target, batch):
    w = weight(4, 64)
    stacks = jax.tree.map(lambda leaf: struct((*batch, *leaf.shape), leaf.dtype), w)
    there = functools.partial(qjax.relayout, layout=target)
    back = functools.partial(qjax.relayout, layout=w.layout)
    assert launches(lower(there, stacks)) == 1
    assert launches(lower(back, jax.eval_shape(there, stacks))) == 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_relayout_of_codes_that_are_permuted(bits):
    move = functools.partial(qjax.relayout, layout=gptq.Stream())
    assert launches(lower(move, weight(bits, 64))) == (bits in (1, 2, 4, 8))


def test_relayout_of_ragged_segments():
    # Of 96 rows, where a tile of the kernel has 128.
    w = weight(4, 32, k=96, n=40)
    move = functools.partial(qjax.relayout, layout=gptq.Stream())
    assert launches(lower(move, w)) == 1


@pytest.mark.parametrize("layout", [tiles.Tiles(), gptq.Stream()], ids=str)
def test_gradient_of_the_dense_weight(layout):
    # The kernels have no derivative: it is that of the formula.
    w = jax.eval_shape(lambda w: qjax.relayout(w, layout), weight(4, 64))

    def loss(scale, w):
        return qjax.dequantize(dataclasses.replace(w, scale=scale)).sum()

    both = jax.value_and_grad(loss)
    text = lower(both, w.scale, w)
    assert launches(text) == (1 if layout == tiles.Tiles() else 2)
    packed = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), w)
    gradient = both(packed.scale, packed)[1]
    plain = dataclasses.replace(packed, scale=packed.scale * 2)
    # Linear in the scale.
    expected = (qjax.dequantize(plain) - qjax.dequantize(packed)).reshape(8, 64, 256)
    assert jnp.array_equal(gradient, expected.sum(1))
