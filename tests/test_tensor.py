"""`QTensor`'s life as a pytree, its printing, and what `build` refuses."""

import dataclasses
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from qjax import tensor
from qjax.formats import awq, awq_v2, bnb, compressed_tensors, gptq, tiles, tinygemm
from tests import oracle

PARTS = [(8, 8, 8), (6, 16, 8), (3, 32, 16), (2, 32, None)]


class TestPytree:
    """JAX takes it apart and puts it together again."""

    @pytest.fixture
    def w(self, as_qtensor) -> qjax.QTensor:
        return as_qtensor(oracle.random(0, 64, 48, order=True, input_scale=True))

    @pytest.fixture
    def stack(self) -> qjax.QTensor:
        weights = np.random.default_rng(0).normal(size=(8, 64, 48))
        return qjax.quantize(jnp.asarray(weights, jnp.float32), group_size=32)

    def test_jit(self, w):
        out = jax.jit(lambda w: w)(w)
        assert jax.tree.structure(out) == jax.tree.structure(w)
        chex.assert_trees_all_equal(out, w)
        assert repr(out) == repr(w)

    def test_metadata_is_static(self, w):
        traces = []

        @jax.jit
        def count(w):
            traces.append(w.segments)
            return w.scale

        count(w)
        count(dataclasses.replace(w, scale=w.scale * 2))
        assert len(traces) == 1
        count(dataclasses.replace(w, rounding=2))
        assert len(traces) == 2

    def test_stacks(self, stack):
        assert (stack.batch, stack.shape, stack.ndim) == ((8,), (8, 64, 48), 3)
        one_by_one = [
            qjax.dequantize(jax.tree.map(lambda leaf, i=i: leaf[i], stack))
            for i in range(8)
        ]
        chex.assert_trees_all_equal(qjax.dequantize(stack), jnp.stack(one_by_one))

    def test_stacks_of_stacks(self, stack):
        deep = jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), stack)
        assert deep.shape == (2, 4, 64, 48)
        flat = qjax.dequantize(stack).reshape(2, 4, 64, 48)
        chex.assert_trees_all_equal(qjax.dequantize(deep), flat)
        flat = qjax.codes(stack).reshape(2, 4, 64, 48)
        chex.assert_trees_all_equal(qjax.codes(deep), flat)

    def test_vmap(self, stack):
        shapes = []

        def one(w):
            shapes.append(w.shape)
            return qjax.dequantize(w)

        chex.assert_trees_all_equal(jax.vmap(one)(stack), qjax.dequantize(stack))
        assert set(shapes) == {(64, 48)}

    def test_scan(self, stack):
        def layer(x, w):
            assert w.shape == (64, 48)
            return x, x @ qjax.dequantize(w)

        x = jnp.ones((1, 64))
        _, found = jax.jit(lambda x, ws: jax.lax.scan(layer, x, ws))(x, stack)
        expected = jnp.einsum("mk,lkn->lmn", x, qjax.dequantize(stack))
        # The order of 64 additions.
        chex.assert_trees_all_close(
            found, expected, atol=1e-6 * jnp.abs(expected).max()
        )

    @pytest.mark.parametrize(
        ("spec", "local"),
        [(PartitionSpec(None, "d"), (64, 6)), (PartitionSpec("d", None), (32, 48))],
    )
    def test_shard_map(self, spec, local):
        # Two groups of 32 rows, 6 columns for each of eight devices.
        devices = jax.devices("cpu")[: 8 if local[1] == 6 else 2]
        w = qjax.quantize(jnp.eye(64, 48), group_size=32)
        shapes = []

        @jax.shard_map(mesh=Mesh(devices, ("d",)), in_specs=(spec,), out_specs=spec)
        def weight(w):
            shapes.append(w.shape)
            return qjax.dequantize(w)

        chex.assert_trees_all_equal(
            np.asarray(weight(w)), np.asarray(qjax.dequantize(w))
        )
        assert set(shapes) == {local}

    def test_pmap(self, stack):
        shapes = []

        def one(w):
            shapes.append(w.shape)
            return qjax.dequantize(w)

        weights = jax.pmap(one, devices=jax.devices("cpu"))(stack)
        chex.assert_trees_all_equal(
            np.asarray(weights), np.asarray(qjax.dequantize(stack))
        )
        assert set(shapes) == {(64, 48)}

    def test_eval_shape(self, w):
        out = jax.eval_shape(lambda w: w, w)
        assert isinstance(out, qjax.QTensor)
        assert (out.shape, out.dtype, out.bits) == (w.shape, w.dtype, w.bits)
        dense = jax.eval_shape(qjax.dequantize, out)
        assert (dense.shape, dense.dtype) == (w.shape, jnp.float32)

    @pytest.mark.parametrize(
        ("leaf", "text"),
        [
            (lambda _: "a", "QTensor(('a',), scale='a')"),
            (lambda _: None, "QTensor((None,), scale=None)"),
            (lambda _: PartitionSpec("d"), "scale=P"),
            (
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                "QTensor(64x48, 4 bits",
            ),
            (lambda leaf: leaf.shape, "QTensor(((8, 48),), scale=(2, 48))"),
            (lambda leaf: float(leaf.size), "QTensor((384.0,), scale=96.0)"),
            (lambda leaf: leaf.reshape(-1), "QTensor((Array("),
            (np.asarray, "QTensor(64x48, 4 bits"),
            (lambda leaf: leaf[:0], "QTensor("),
        ],
    )
    def test_leaves_that_are_no_arrays(self, leaf, text, w):
        out = jax.tree.map(leaf, w)
        assert isinstance(out, qjax.QTensor)
        assert text in repr(out)

    def test_no_rows_of_several_widths(self, as_qtensor):
        w = as_qtensor(oracle.random(0, 88, 40, parts=PARTS, affine="CENTERED"))
        assert repr(jax.tree.map(lambda leaf: leaf[:0], w)).startswith("QTensor(")

    def test_leaves_have_names(self, w):
        paths = [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(w)
        ]
        names = [".words[0]", ".scale", ".zero", ".order", ".input_scale"]
        assert paths == names

    def test_donation(self):
        w = qjax.quantize(jnp.eye(64, 48), group_size=32)
        expected = 2 * np.asarray(qjax.dequantize(w))

        @jax.jit
        def double(w):
            return dataclasses.replace(w, scale=w.scale * 2)

        doubled = jax.jit(double, donate_argnums=0)(w)
        assert w.words[0].is_deleted()
        assert w.scale.is_deleted()
        chex.assert_trees_all_equal(np.asarray(qjax.dequantize(doubled)), expected)

    def test_orbax_saves_and_restores(self, w, stack, tmp_path):
        state = {"a": w, "layers": stack, "step": jnp.int32(3)}
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            target = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, state))
            device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=device
                ),
                target,
            )
            restored = checkpointer.restore(tmp_path / "state", target)
        assert not [
            file for file in tmp_path.rglob("*") if "pickle" in file.name.lower()
        ]
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        chex.assert_trees_all_equal(restored, state)
        chex.assert_trees_all_equal_dtypes(restored, state)
        for name in ("a", "layers"):
            chex.assert_trees_all_equal(
                qjax.dequantize(restored[name]), qjax.dequantize(state[name])
            )


class TestPrinting:
    def test_plain(self):
        w = qjax.quantize(jnp.eye(64), bits=4, group_size=32)
        expected = "QTensor(64x64, 4 bits, group 32, Stream(), (q - z) * s, "
        assert repr(w) == expected + "float32 scale, 2.625 KiB)"

    def test_symmetric_columns(self):
        w = qjax.quantize(
            jnp.zeros((32, 8)), 8, None, symmetric=True, scale_dtype=jnp.bfloat16
        )
        expected = "QTensor(32x8, 8 bits, group column, Stream(), "
        expected += "(q - 2^(bits-1)) * s + z, bfloat16 scale, 272 B)"
        assert repr(w) == expected

    def test_act_order_in_planes(self, as_qtensor):
        m = oracle.random(0, 64, 32, bits=3, row_group=True, order=True)
        w = as_qtensor(m, gptq.Planar())
        expected = "QTensor(64x32, 3 bits, group 32, Planar(), (q - z) * s, order, "
        assert repr(w) == expected + "row_group, float32 scale, 1.562 KiB)"

    def test_mixed(self, as_qtensor):
        w = as_qtensor(oracle.random(0, 88, 40, parts=PARTS, affine="CENTERED"))
        assert w.bits == 320 / 88
        expected = "QTensor(88x40, 3.636 bits, group 8,16,column, Stream(), "
        expected += "(q - 2^(bits-1)) * s + z, float32 scale, 2.5 KiB)"
        assert repr(w) == expected

    def test_large_stacks(self):
        # Views of one element: nothing is allocated.
        w = tensor.QTensor(
            words=(np.broadcast_to(np.uint32(0), (16, 2048, 16384)),),
            scale=np.broadcast_to(np.float16(1), (16, 128, 16384)),
            layout=gptq.Stream(),
            segments=(tensor.Segment(4, 128),),
            affine=tensor.Affine.CENTERED,
        )
        expected = "QTensor(16x16384x16384, 4 bits, group 128, Stream(), "
        expected += "(q - 2^(bits-1)) * s + z, float16 scale, 2.062 GiB)"
        assert repr(w) == expected
        one = jax.tree.map(lambda leaf: leaf[0], w)
        assert repr(one).endswith("float16 scale, 132 MiB)")


# What quanto's tests pack: V1 with and without its order of eight, and V2.
PACKINGS = {
    "V1, reordered": awq.Gemm(),
    "V1": awq.Gemv(),
    "V2": awq_v2.Interleaved(),
}


def packed(codes: np.ndarray, layout: tensor.Layout) -> qjax.QTensor:
    """Four-bit codes with scales of one and zeros of eight."""
    k, n = codes.shape
    return tensor.build(
        [layout.pack(jnp.asarray(codes), 4)],
        jnp.ones((k // 64, n), jnp.float16),
        jnp.full((k // 64, n), 8, jnp.uint8),
        layout=layout,
        segments=[tensor.Segment(4, 64)],
    )


def counting(k: int, n: int) -> np.ndarray:
    """0 to 15 over and over, row by row of the transpose as torch holds it."""
    return (np.arange(k * n) % 16).astype(np.uint8).reshape(n, k).T


@pytest.mark.parametrize("packing", PACKINGS)
class TestPackedTensor:
    """What optimum-quanto's AWQPackedTensor promises.

    The assertions are those of its test/tensor/weights/optimized/
    test_awq_packed_tensor.py and of the class itself; there a tensor is unpacked when
    it leaves the GPU, here it stays packed wherever it goes.
    """

    @pytest.mark.parametrize("k", [128, 512])
    @pytest.mark.parametrize("n", [128, 1024])
    @pytest.mark.parametrize("random", [True, False])
    def test_packs(self, packing, k, n, random):
        layout, codes = PACKINGS[packing], counting(k, n)
        if random:
            codes = np.random.default_rng(0).integers(16, size=(k, n), dtype=np.uint8)
        w = packed(codes, layout)
        assert isinstance(w, qjax.QTensor)
        assert (w.layout, w.shape, w.bits) == (layout, (k, n), 4)
        assert w.words[0].nbytes == k * n // 2
        assert w.words[0].devices() == {jax.devices("cpu")[0]}
        chex.assert_trees_all_equal(np.asarray(qjax.codes(w)), codes)

    @pytest.mark.parametrize("device", range(8))
    def test_moves_to_a_device(self, packing, device):
        layout, codes = PACKINGS[packing], counting(256, 256)
        w, device = packed(codes, layout), jax.devices("cpu")[device]
        moved = jax.device_put(w, device)
        assert isinstance(moved, qjax.QTensor)
        assert jax.tree.structure(moved) == jax.tree.structure(w)
        assert moved.layout == layout
        assert {d for x in jax.tree.leaves(moved) for d in x.devices()} == {device}
        chex.assert_trees_all_equal(jax.device_get(moved), jax.device_get(w))
        assert qjax.codes(moved).devices() == {device}
        chex.assert_trees_all_equal(moved.numpy(), codes)
        back = jax.device_put(moved, jax.devices("cpu")[0])
        chex.assert_trees_all_equal(back, w)

    def test_spreads_over_devices(self, packing):
        codes = counting(512, 256)
        mesh = Mesh(jax.devices("cpu"), ("d",))
        w = packed(codes, PACKINGS[packing])
        spread = jax.device_put(w, NamedSharding(mesh, PartitionSpec("d")))
        assert isinstance(spread, qjax.QTensor)
        assert len(spread.words[0].devices()) == 8
        chex.assert_trees_all_equal(jax.device_get(spread), jax.device_get(w))
        chex.assert_trees_all_equal(spread.numpy(), codes)

    def test_goes_to_the_host_and_back(self, packing):
        w = packed(counting(128, 64), PACKINGS[packing])
        host = jax.device_get(w)
        assert isinstance(host, qjax.QTensor)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
        chex.assert_trees_all_equal(jax.device_put(host), w)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint8, "int8"])
    def test_is_not_cast(self, packing, dtype, refuses):
        w = packed(counting(128, 64), PACKINGS[packing])
        name = jnp.dtype(dtype).name
        with refuses(
            f"dtype={name}: a QTensor of float16 is packed and not cast; qjax"
        ):
            w.astype(dtype)
        with refuses("qjax.dequantize(w) gives the weight"):
            np.asarray(w, dtype)
        with refuses("qjax.codes(w) or w.numpy() the codes"):
            jnp.asarray(w, dtype)
        assert w.astype(jnp.float16) is w
        assert w.astype("float16") is w

    def test_is_no_array(self, packing, refuses):
        w = packed(counting(128, 64), PACKINGS[packing])
        for function in (np.asarray, np.array, jnp.asarray, jnp.array):
            with refuses("A QTensor is no array: qjax.dequantize(w) gives the weight"):
                function(w)
        for wrong in (lambda: w @ jnp.ones(64), lambda: w + 1, lambda: list(w)):
            with pytest.raises(TypeError, match="QTensor"):
                wrong()

    def test_numpy_and_indexing_give_codes(self, packing):
        codes = counting(128, 64)
        w = packed(codes, PACKINGS[packing])
        found = w.numpy()
        assert type(found) is np.ndarray
        assert (found.dtype, found.shape) == (np.uint8, (128, 64))
        chex.assert_trees_all_equal(found, codes)
        columns = (slice(None), np.array([1, 9]))
        for index in (3, -1, slice(4, 90, 7), (5, 6), (..., 0), columns):
            taken = w[index]
            assert taken.dtype == jnp.uint8
            chex.assert_trees_all_equal(np.asarray(taken), codes[index])
        # Flax reads a Variable so, and would take the codes for the weight.
        with pytest.raises(ValueError, match=r"w\[\.\.\.\] of a QTensor could mean"):
            w[...]
        at = jax.jit(lambda w, i: w[i, 2:4])(w, 7)
        chex.assert_trees_all_equal(np.asarray(at), codes[7, 2:4])


def test_codes_of_mixed_and_stacked_tensors_are_in_stored_order(as_qtensor):
    m = oracle.random(0, 88, 40, parts=PARTS, affine="CENTERED", order=True)
    w = as_qtensor(m)
    assert (np.asarray(w.order) != np.arange(88)).any()
    expected = np.concatenate(
        [
            oracle.unpack(words, part.bits)
            for words, part in zip(m.words, m.parts, strict=True)
        ]
    )
    chex.assert_trees_all_equal(w.numpy(), expected)
    chex.assert_trees_all_equal(np.asarray(w[10]), expected[10])
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    chex.assert_trees_all_equal(stack.numpy(), np.stack([expected, expected]))
    chex.assert_trees_all_equal(np.asarray(stack[1, 10:12]), expected[10:12])


ONE = (tensor.Segment(4, 32),)


def ones(shape, dtype=jnp.float32) -> jax.Array:
    """Those of NumPy: JAX would compile a program for each shape."""
    return jnp.asarray(np.ones(shape, dtype))


def zeros(shape, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.zeros(shape, dtype))


def leaves(**changes) -> dict[str, typing.Any]:
    """What `tensor.build` takes: 4 bits, k = 64, n = 16, two groups."""
    given = {
        "words": [zeros((8, 16), jnp.uint32)],
        "scale": ones((2, 16)),
        "zero": zeros((2, 16), jnp.uint8),
        "layout": gptq.Stream(),
        "segments": ONE,
    }
    return given | changes


CODEBOOK = {"affine": tensor.Affine.CODEBOOK, "zero": None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale": ones((2, 1))},
        {"scale": ones((2, 4)), "zero": zeros((2, 1), jnp.uint8)},
        {"zero": zeros((2, 16))},
        {"zero": None, "affine": tensor.Affine.CENTERED},
        {**CODEBOOK, "codebook": zeros(16)},
        {"row_group": zeros(64, jnp.int32), "order": zeros(64, jnp.int32)},
        {"input_scale": ones(64)},
        {
            "words": [zeros((3, 8, 16), jnp.uint32)],
            "scale": ones((3, 2, 16)),
            "zero": zeros((3, 2, 16), jnp.uint8),
            "order": zeros((3, 64), jnp.int32),
        },
    ],
)
def test_build_accepts(changes):
    w = tensor.build(**leaves(**changes))
    assert w.shape[-2:] == (64, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": []}, "words has 0 arrays for 1 segments; pass one"),
        ({"segments": ONE * 2}, "words has 1 arrays for 2 segments"),
        (
            {"segments": [tensor.Segment(9, 32)]},
            "bits=9 must be an integer from 1 to 8",
        ),
        (
            {"segments": [tensor.Segment(4, 0)]},
            "Segment(bits=4, group_size=0, padding=0): group_size must be a positive",
        ),
        ({"segments": [tensor.Segment(4, 32.0)]}, "must be a positive integer or"),
        (
            {"segments": [tensor.Segment(4, 32, padding=-8)]},
            "padding=-8): padding=-8 must be an integer, and not negative",
        ),
        ({"padding": -1}, "padding=-1 must be an integer, and not negative"),
        ({"padding": 1.0}, "padding=1.0 must be an integer, and not negative"),
        (
            {"words": [zeros((8, 16))]},
            "words.dtype=float32 must be int32 or uint32",
        ),
        (
            {"segments": [tensor.Segment(3, 32)]},
            "words.shape[0]=8 must be a multiple of 3",
        ),
        (
            {
                "words": [
                    zeros((4, 16), jnp.uint32),
                    zeros((4, 8), jnp.uint32),
                ],
                "segments": ONE * 2,
            },
            "n of words=8 must be 16",
        ),
        (
            {
                "words": [
                    zeros((4, 16), jnp.uint32),
                    zeros((1, 4, 16), jnp.uint32),
                ],
                "segments": ONE * 2,
            },
            "batch of words=(1,) must be ()",
        ),
        ({"scale": ones(16)}, "scale.shape=(16,) must be [*batch, groups, n]"),
        (
            {"scale": ones((2, 0))},
            "scale.shape[-1]=0 must be n=16 or a divisor of it",
        ),
        ({"scale": ones((2, 16), jnp.int32)}, "scale.dtype=int32 must be a float"),
        ({"scale": ones((3, 16))}, "scale.shape[:-1]=(3,) must be (2,)"),
        ({"scale": ones((1, 2, 16))}, "scale.shape[:-1]=(1, 2) must be (2,)"),
        ({"scale": ones((2, 5))}, "scale.shape[-1]=5 must be n=16 or a divisor"),
        ({"zero": zeros((1, 16), jnp.uint8)}, "zero.shape[:-1]=(1,) must be (2,)"),
        ({"zero": zeros((2, 3), jnp.uint8)}, "zero.shape[-1]=3 must be n=16"),
        ({"zero": None}, "zero is None, but (q - z) * s needs it"),
        (
            {"zero": None, "affine": tensor.Affine.OFFSET},
            "zero is None, but q * s + z needs it; symmetric codes are Affine.CENTERED",
        ),
        (
            {"affine": tensor.Affine.OFFSET},
            "zero.dtype=uint8 must be a float dtype for q * s + z",
        ),
        ({"affine": tensor.Affine.CENTERED}, "zero.dtype=uint8 must be a float dtype"),
        ({"order": zeros(63, jnp.int32)}, "order.shape=(63,) must be (64,)"),
        ({"order": zeros(64, jnp.uint8)}, "order.dtype=uint8 must be int32"),
        ({"row_group": zeros((1, 64), jnp.int32)}, "row_group.shape=(1, 64) must"),
        ({"row_group": zeros(64)}, "row_group.dtype=float32 must be int32"),
        ({"input_scale": ones(16)}, "input_scale.shape=(16,) must be (64,)"),
        (
            {"input_scale": ones(64, jnp.int32)},
            "input_scale.dtype=int32 must be a float dtype",
        ),
        (CODEBOOK, "codebook and affine=Affine.CODEBOOK must come together"),
        ({"codebook": zeros(16)}, "codebook and affine=Affine.ZERO must come"),
        (
            {"affine": tensor.Affine.CODEBOOK, "codebook": zeros(16)},
            "zero must be None with codebook",
        ),
        ({**CODEBOOK, "codebook": zeros(8)}, "codebook.shape=(8,) must be (16,)"),
        (
            {**CODEBOOK, "codebook": zeros(16, jnp.int32)},
            "codebook.dtype=int32 must be a float dtype",
        ),
        ({"rounding": 3}, "rounding=3 must be 1 or 2"),
    ],
)
def test_build_refuses(changes, message, refuses):
    with refuses(message):
        tensor.build(**leaves(**changes))


class TestConcatenate:
    """Matrices of the same inputs become one."""

    KINDS: typing.ClassVar = {
        "4 bits": {"bits": 4, "group_size": 32},
        "3 bits a column": {"bits": 3, "group_size": None, "affine": "CENTERED"},
        "codebook": {"bits": 4, "group_size": 64, "affine": "CODEBOOK"},
        "float zeros": {"bits": 2, "group_size": 64, "affine": "OFFSET"},
        "mixed": {"parts": [(6, 128, 32), (3, 64, 32)], "affine": "CENTERED"},
    }

    @staticmethod
    def check(weights):
        joined = qjax.concatenate(dict(enumerate(weights)).values())
        n = sum(w.n for w in weights)
        assert joined.shape == (*weights[0].shape[:-1], n)
        expected = jnp.concatenate([qjax.dequantize(w) for w in weights], -1)
        chex.assert_trees_all_equal(qjax.dequantize(joined), expected)
        return joined

    @pytest.mark.parametrize("kind", KINDS)
    def test_columns_stay_what_they_were(self, kind, as_qtensor):
        weights = [
            as_qtensor(oracle.random(i, 192, n, **self.KINDS[kind]))
            for i, n in enumerate((48, 16, 5))
        ]
        if kind == "codebook":
            book = weights[0].codebook
            weights = [dataclasses.replace(w, codebook=book) for w in weights]
        joined = self.check(weights)
        x = jnp.ones((2, 192))
        y = jnp.split(qjax.matmul(x, joined), [48, 64], axis=-1)
        for part, w in zip(y, weights, strict=True):
            chex.assert_trees_all_close(part, qjax.matmul(x, w), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "layout",
        [
            awq.Gemm(),
            awq.Gemv(),
            awq_v2.Interleaved(),
            compressed_tensors.Dense(),
            gptq.Planar(),
            tiles.Tiles(),
            tinygemm.TensorCoreTiled(2),
        ],
        ids=str,
    )
    def test_layouts(self, layout, as_qtensor):
        weights = [
            as_qtensor(oracle.random(i, 64, n, bits=4, group_size=32), layout)
            for i, n in enumerate((48, 16))
        ]
        assert self.check(weights).layout == layout

    def test_padding_at_the_end(self, refuses):
        weights = [qjax.quantize(jnp.ones((64, n)), group_size=32) for n in (16, 20)]
        padded = [qjax.relayout(w, tiles.Tiles()) for w in weights]
        assert self.check(padded).padding == 12
        with refuses("weights[0] has 12 padded columns in Tiles(), and another after"):
            qjax.concatenate(padded[::-1])

    def test_stacks_and_shared_scales(self):
        def shared(n):
            w = qjax.quantize(jnp.ones((3, 64, n)), group_size=32)
            first = {"scale": w.scale[..., :1], "zero": w.zero[..., :1]}
            return dataclasses.replace(w, **first)

        self.check([shared(8), shared(24)])

    def test_orders_that_are_equal(self, as_qtensor, refuses):
        w, other = (as_qtensor(oracle.random(i, 64, 8, order=True)) for i in (0, 1))
        self.check([w, dataclasses.replace(other, order=jnp.copy(w.order))])
        with refuses("weights[1].order has other values than that of weights[0]"):
            qjax.concatenate([w, other])
        with refuses("weights[1].order is traced and cannot be compared"):
            jax.jit(lambda *weights: qjax.concatenate(weights))(w, other)
        with refuses("weights[1].order.dtype=None must be int32, as of weights[0]"):
            qjax.concatenate([w, dataclasses.replace(other, order=None)])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bits": 3}, "weights[1].segments="),
            ({"group_size": 16}, "weights[1].segments="),
            ({"symmetric": True}, "weights[1].affine=Affine.CENTERED must be"),
        ],
        ids=str,
    )
    def test_refuses_what_differs(self, change, message, refuses):
        ones = jnp.ones((64, 8))
        w = qjax.quantize(ones, **{"bits": 4, "group_size": 32})
        other = qjax.quantize(ones, **({"bits": 4, "group_size": 32} | change))
        with refuses(message):
            qjax.concatenate([w, other])

    def test_refuses_what_cannot_be_joined(self, refuses):
        w = qjax.quantize(jnp.ones((64, 8)), group_size=32)
        with refuses("weights is empty"):
            qjax.concatenate([])
        longer = qjax.quantize(jnp.ones((96, 8)), group_size=32)
        with refuses("weights[1].shape[:-1]=(96,) must be (64,)"):
            qjax.concatenate([w, longer])
        flat = qjax.relayout(w, bnb.Flat(64))
        with refuses("Flat(k=64) has no axis of columns to join along"):
            qjax.concatenate([flat, flat])


class TestStack:
    """Matrices that are alike become the matrices of one tensor."""

    KINDS: typing.ClassVar = TestConcatenate.KINDS | {
        "order": {"bits": 4, "group_size": 32, "order": True},
        "input scale": {"bits": 8, "group_size": None, "input_scale": True},
    }

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_is_what_it_was(self, kind, as_qtensor):
        """Each with its own codebook, order of rows and input scale."""
        weights = [
            as_qtensor(oracle.random(i, 192, 24, **self.KINDS[kind])) for i in range(3)
        ]
        stacked = qjax.stack(weights)
        assert stacked.shape == (3, 192, 24)
        x = jnp.ones((2, 192))
        for i, w in enumerate(weights):
            chex.assert_trees_all_equal(jax.tree.map(lambda a, i=i: a[i], stacked), w)
            y = qjax.matmul(x, stacked, index=i)
            chex.assert_trees_all_close(y, qjax.matmul(x, w), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["order", "row_group"])
    def test_rows_that_are_in_their_own_order(self, name, as_qtensor):
        """Those of others are not: what GPTQ's act-order does to some experts."""
        plain, w = (
            as_qtensor(oracle.random(i, 64, 8, group_size=32, **option))
            for i, option in enumerate([{}, {name: True}])
        )
        assert getattr(w, name) is not None
        stacked = qjax.stack(iter([plain, w]))
        dense = jnp.stack([qjax.dequantize(plain), qjax.dequantize(w)])
        chex.assert_trees_all_equal(qjax.dequantize(stacked), dense)

    def test_groups_of_several_segments_are_counted_through(self, as_qtensor):
        plain = as_qtensor(oracle.random(0, 88, 8, parts=PARTS))
        groups = np.random.default_rng(0).integers(0, len(plain.scale), 88)
        w = dataclasses.replace(plain, row_group=jnp.asarray(groups, jnp.int32))
        stacked = qjax.stack([plain, w])
        dense = jnp.stack([qjax.dequantize(plain), qjax.dequantize(w)])
        chex.assert_trees_all_equal(qjax.dequantize(stacked), dense)

    def test_under_jit_and_of_stacks(self, as_qtensor):
        pair = [as_qtensor(oracle.random(i, 64, 8, bits=3)) for i in (0, 1)]
        traced = jax.jit(lambda *weights: qjax.stack(weights))(*pair)
        chex.assert_trees_all_equal(traced, qjax.stack(pair))
        assert qjax.stack([traced, traced]).shape == (2, 2, 64, 8)

    def test_pieces_stay_where_they_are(self):
        mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
        spec = PartitionSpec(None, "model")
        w = qjax.shard(qjax.quantize(jnp.ones((64, 8)), group_size=32), mesh, spec)
        for leaf in jax.tree.leaves(qjax.stack([w, w])):
            assert leaf.sharding.shard_shape(leaf.shape)[-1] == 4

    def test_refuses_what_is_not_alike(self, as_qtensor, refuses):
        w, other = (as_qtensor(oracle.random(i, 64, 8, order=True)) for i in (0, 1))
        qjax.stack([w, other])
        with refuses("weights[1].shape=(64, 16) must be (64, 8), as of weights[0]"):
            qjax.stack([w, as_qtensor(oracle.random(0, 64, 16, order=True))])
        first = dataclasses.replace(w, scale=w.scale[:, :1])
        with refuses("weights[1].scale.shape=(2, 1) must be (2, 8), as of weights[0]"):
            qjax.stack([w, first])
        with refuses("weights is empty"):
            qjax.stack([])
        with refuses("must be a sequence of QTensor", TypeError):
            qjax.stack(w)
        with refuses("weights[1]", TypeError):
            qjax.stack([w, jnp.ones((64, 8))])

    def test_refuses_other_encodings(self, refuses):
        scale = tensor.Nested(
            factor=jnp.ones((2, 8), jnp.int8), step=jnp.ones((1, 8), jnp.float16)
        )
        w = qjax.quantize(jnp.ones((64, 8)), group_size=32)
        with refuses("weights[1] has its scales or zeros encoded in another way"):
            qjax.stack([w, dataclasses.replace(w, scale=scale)])
