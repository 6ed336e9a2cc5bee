"""What the emulator of PTX computes, on texts made up for it."""

import ml_dtypes
import numpy as np
import pytest

from tests.gpu.emulator.memory import Lanes
from tests.gpu.emulator.parser import EmulationError
from tests.gpu.emulator.traffic import Count, Traffic
from tests.gpu.texts import (
    d_places,
    emulate,
    fill,
    in_shared,
    listed,
    load,
    of_each_thread,
    store,
)

F16, BF16, F32, U32 = np.float16, ml_dtypes.bfloat16, np.float32, np.uint32
rng = np.random.default_rng(0)


def words(count=32):
    return rng.integers(0, 2**32, count, dtype=U32)


class TestTraffic:
    """A warp's accesses, of four bytes a thread unless said otherwise."""

    who = Lanes(np.zeros(32, int), np.zeros(32, int))

    @pytest.mark.parametrize(
        ("stride", "size", "taken", "least"),
        [
            *((4, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (0, 4, 1, 1), (2, 2, 1, 1)),
            *((16, 16, 4, 4), (64, 16, 16, 4), (8, 8, 2, 2), (256, 8, 32, 2)),
        ],
    )
    def test_passes_over_the_banks(self, stride, size, taken, least):
        traffic = Traffic()
        addresses = np.arange(32, dtype=np.uint64) * np.uint64(stride)
        traffic.share("ld", self.who, addresses, size)
        assert traffic.shared["ld"] == Count(taken, least)

    @pytest.mark.parametrize(
        ("stride", "size", "taken", "least"),
        [(4, 4, 4, 4), (16, 16, 16, 16), (32, 4, 32, 4), (0, 4, 1, 1), (8, 1, 8, 1)],
    )
    def test_sectors(self, stride, size, taken, least):
        traffic = Traffic()
        addresses = np.arange(32, dtype=np.uint64) * np.uint64(stride)
        traffic.load(self.who, addresses + np.uint64(2 << 40), size)
        assert traffic.device == {2: Count(taken, least)}


class TestThreads:
    def test_lop3(self):
        a, b, c = words(), words(), words()
        found = of_each_thread("lop3.b32 $0, $1, $2, $3, 0x6A;", a, b, c)
        np.testing.assert_array_equal(found, c ^ (a & b))
        found = of_each_thread("lop3.b32 $0, $1, $2, $3, 0xE4;", a, b, c)
        np.testing.assert_array_equal(found, (a & c) | (b & ~c))

    def test_prmt(self):
        a, b = words(), words()
        found = of_each_thread("prmt.b32 $0, $1, $2, 0xD062;", a, b)
        a, b = (v.view(np.uint8).reshape(32, 4).astype(U32) for v in (a, b))
        sign = np.where(b[:, 1] >> 7, U32(255), U32(0))
        expected = a[:, 2] | b[:, 2] << 8 | a[:, 0] << 16 | sign << 24
        np.testing.assert_array_equal(found, expected)

    def test_funnel_shift(self):
        low, high, distance = words(), words(), words()
        found = of_each_thread("shf.l.wrap.b32 $0, $1, $2, $3;", low, high, distance)
        expected = [
            (int(h) << 32 | int(a)) << (int(d) & 31) >> 32 & 0xFFFFFFFF
            for a, h, d in zip(low, high, distance, strict=True)
        ]
        np.testing.assert_array_equal(found, np.array(expected, U32))

    @pytest.mark.parametrize("kind", ["u32", "s32"])
    def test_fields(self, kind):
        a, begin, count = words(), U32(rng.integers(0, 32, 32)), U32(np.arange(32) % 37)
        begin[:5], count[:5] = (0, 0, 31, 4, 1), (0, 32, 1, 255, 31)
        found = of_each_thread(f"bfe.{kind} $0, $1, $2, $3;", a, begin, count)

        def expected(bits, b, c):
            # Bits beyond the word are those of the field's last, or zeros.
            last = bits >> min(b + c - 1, 31) & 1 if kind == "s32" and c else 0
            taken = [
                bits >> b + i & 1 if i < c and b + i < 32 else last for i in range(32)
            ]
            return sum(bit << i for i, bit in enumerate(taken))

        np.testing.assert_array_equal(
            found, [expected(*map(int, v)) for v in zip(a, begin, count, strict=True)]
        )

    def test_registers_of_inline_assembly_are_its_own(self):
        block = "{ .reg .b32 t; not.b32 t, $1; add.u32 $0, t, 1; }"
        a = words()
        np.testing.assert_array_equal(of_each_thread(block, a), -a)
        with pytest.raises(EmulationError, match="t@2 is read before it is written"):
            of_each_thread(block + "{ .reg .b32 t; mov.b32 $0, t; }", a)

    def test_labels_of_inline_assembly_are_its_own(self):
        # Each block adds one until its own register is no longer below $1.
        block = """
          {
            .reg .pred p; .reg .b32 t; mov.b32 t, 0;
            again: add.s32 t, t, 1; add.s32 $0, $0, 1;
            setp.lt.s32 p, t, $1; @p bra.uni again;
          }
        """
        found = of_each_thread("mov.b32 $0, 0;" + 2 * block, np.full(32, 3, U32))
        assert (found == 6).all()

    @pytest.mark.parametrize(
        "jump",
        [
            "@%p1 bra AHEAD; add.s32 %r10, %r10, 7; AHEAD:",
            """
              mov.pred %p2, 0; bra.uni BELOW;
              BACK: @%p2 bra DONE;
              BELOW: mov.pred %p2, -1;
              @%p1 bra BACK; add.s32 %r10, %r10, 7; bra.uni BACK;
              DONE:
            """,
            """
              @!%p1 bra SUM; mov.b32 %r11, 1; bra.uni DONE;
              SUM: add.s32 %r10, %r10, 7;
              DONE:
            """,
            """
              @%p1 bra DONE; bra.uni SUM;
              SUM: add.s32 %r10, %r10, 7; bra.uni DONE;
              DONE:
            """,
        ],
        ids=["ahead", "back", "either", "next"],
    )
    def test_warps_that_jump_idle_until_the_others_come(self, jump):
        # The second warp passes by the sum.
        body = f"""
          setp.ge.s32 %p1, %r0, 32; mov.b32 %r10, %r0;
          {jump} {store(10, 1, 0)}
        """
        found = emulate(body, out=np.empty(64, U32), threads=64)
        expected = np.arange(64) + np.where(np.arange(64) < 32, 7, 0)
        np.testing.assert_array_equal(found, expected)

    def test_shuffles(self):
        a = words()
        found = of_each_thread("shfl.sync.bfly.b32 $0, $1, 5, 31, -1;", a)
        np.testing.assert_array_equal(found, a[np.arange(32) ^ 5])
        lane = rng.integers(0, 32, 32).astype(U32)
        found = of_each_thread("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", a, lane)
        np.testing.assert_array_equal(found, a[lane])

    def test_a_guard_leaves_the_other_threads(self):
        body = "mov.b32 $0, 7; setp.lt.s32 %p1, $1, 0; @!%p1 mov.b32 $0, $1;"
        a = words()
        expected = np.where(a.view(np.int32) < 0, U32(7), a)
        np.testing.assert_array_equal(of_each_thread(body, a), expected)

    def test_vectors_of_mov(self):
        body = "mov.b32 {%rs1, %rs2}, $1; mov.b32 $0, {%rs2, %rs1};"
        a = words()
        np.testing.assert_array_equal(of_each_thread(body, a), a << 16 | a >> 16)

    def test_integers(self):
        a, b = words(), words()
        s, t = a.view(np.int32).astype(np.int64), b.view(np.int32).astype(np.int64)
        found = of_each_thread("mul.hi.s32 $0, $1, $2;", a, b, dtype=np.int32)
        np.testing.assert_array_equal(found, s * t >> 32)
        found = of_each_thread("shr.s32 $0, $1, 5;", a, dtype=np.int32)
        np.testing.assert_array_equal(found, s >> 5)
        found = of_each_thread(
            "st.shared.b32 [%rd9], $1; ld.shared.s8 %rs1, [%rd9+3]; "
            "cvt.s32.s16 $0, %rs1;",
            np.full(32, a[0]),
            dtype=np.int32,
        )
        np.testing.assert_array_equal(found, np.full(32, s[0] >> 24))
        # Bytes have a sign, whatever lies above them.
        found = of_each_thread(
            "{ .reg .b16 t; cvt.s8.s32 t, $1; cvt.s32.s8 $0, t; }", a, dtype=np.int32
        )
        np.testing.assert_array_equal(found, a.view(np.int8)[::4])
        # A count beyond the width leaves zeros.
        assert not of_each_thread("shl.b32 $0, $1, 32;", a).any()


class TestFloats:
    def test_fma_rounds_once(self):
        # The product ends in a half of the last place of the sum, and 2**-70 decides.
        a = np.full(32, 1 + 2.0**-12, F32)
        c = np.resize(np.array([2.0**-70, -(2.0**-70)], F32), 32)
        found = of_each_thread("fma.rn.f32 $0, $1, $1, $2;", a, c, dtype=F32)
        exact = 1 + 2.0**-11
        expected = np.where(c > 0, F32(exact + 2.0**-23), F32(exact))
        np.testing.assert_array_equal(found, expected)

    def test_pairs_of_float16(self):
        a, b, c = (rng.standard_normal(64).astype(F16) for _ in range(3))
        found = of_each_thread("fma.rn.f16x2 $0, $1, $2, $3;", a, b, c)
        # Eleven bits by eleven and one more sum: exact in float64, for these exponents.
        wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        np.testing.assert_array_equal(found.view(F16), wide.astype(F16))

    def test_pairs_of_float32(self):
        a, b = (rng.standard_normal(32).astype(F32) for _ in range(2))
        body = """
          mov.b64 %rd10, {$1, $2}; mov.b64 %rd11, {$2, $2};
          add.rn.f32x2 %rd10, %rd10, %rd11; mov.b64 {_, %r8}, %rd10;
          mov.b64 {$0, _}, %rd10; sub.rn.f32 $0, $0, %r8;
        """
        found = of_each_thread(body, a, b, dtype=F32)
        np.testing.assert_array_equal(found, (a + b) - (b + b))

    @pytest.mark.parametrize(("name", "dtype"), [("f16", F16), ("bf16", BF16)])
    def test_sums_of_two_widths(self, name, dtype):
        a = rng.standard_normal(64).astype(dtype)
        b = rng.standard_normal(32).astype(F32)
        wide = a[::2].astype(F32)
        for last, expected in (
            (f"add.rn.f32.{name} $0, %rs1, $2", wide + b),
            (f"sub.rn.f32.{name} $0, %rs1, $2", wide - b),
            # Exact in float64, for these exponents, but for the last rounding.
            (f"fma.rn.f32.{name} $0, %rs1, %rs1, $2", np.float64(wide) ** 2 + b),
        ):
            body = f"mov.b32 {{%rs1, _}}, $1; {last};"
            found = of_each_thread(body, a, b, dtype=F32)
            np.testing.assert_array_equal(found, expected.astype(F32))

    def test_largest_of_a_warp(self):
        a = rng.standard_normal(64).astype(F32)
        a[3] = np.nan
        found = of_each_thread("redux.sync.max.f32 $0, $1, -1;", a, dtype=F32)
        np.testing.assert_array_equal(
            found, np.repeat(np.nanmax(a.reshape(2, 32), 1), 32)
        )

    def test_fma_of_bfloat16_rounds_once(self):
        # The product lies half-way between two of them, and 2**-60 decides.
        a, b = np.full(64, 1.5, BF16), np.full(64, 1 + 2.0**-7, BF16)
        c = np.resize(np.array([2.0**-60, -(2.0**-60)], BF16), 64)
        found = of_each_thread("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c)
        expected = np.where(c > 0, BF16(1 + 66 / 128), BF16(1 + 65 / 128))
        np.testing.assert_array_equal(found.view(BF16), expected)

    @pytest.mark.parametrize(("name", "dtype"), [("f16", F16), ("bf16", BF16)])
    def test_conversions_round_to_even_and_pack_the_first_high(self, name, dtype):
        step = float(ml_dtypes.finfo(dtype).eps)
        a = np.resize(np.array([1 + step / 2, 1 + 1.5 * step, 1 + step / 4], F32), 32)
        b = np.resize(np.array([-3.0, 0.5], F32), 32)
        found = of_each_thread(f"cvt.rn.{name}x2.f32 $0, $1, $2;", a, b)
        halves = found.view(dtype).reshape(32, 2)
        expected = np.resize(np.array([1, 1 + 2 * step, 1], dtype), 32)
        np.testing.assert_array_equal(halves[:, 1], expected)
        np.testing.assert_array_equal(halves[:, 0], b.astype(dtype))

    def test_to_integers_rounds_to_zero_and_saturates(self):
        a = np.resize(np.array([-1.5, 2.75, 1e20, np.nan], F32), 32)
        found = of_each_thread("cvt.rzi.u32.f32 $0, $1;", a)
        expected = np.resize(np.array([0, 2, 2**32 - 1, 0], U32), 32)
        np.testing.assert_array_equal(found, expected)

    def test_nan(self):
        a = np.resize(np.array([np.nan, 1], F32), 32)
        found = of_each_thread("max.f32 $0, $1, 0f40000000;", a, dtype=F32)
        assert (found == 2).all()
        found = of_each_thread("max.f32 $0, 0f3F800000, $1, 0f40000000;", a, dtype=F32)
        assert (found == 2).all()
        found = of_each_thread("max.NaN.f32 $0, $1, 0f40000000;", a, dtype=F32)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(a))
        for name, expected in (("ne", False), ("neu", True), ("leu", True)):
            body = f"setp.{name}.f32 %p1, $1, $1; selp.b32 $0, 1, 0, %p1;"
            assert of_each_thread(body, a)[0] == expected


def a_fragment(matrix, lane):
    """Elements of a thread of A, 16 by 16, as the PTX ISA lists them."""
    g, t = divmod(lane, 4)
    return [
        matrix[g + (8 if i % 4 >= 2 else 0), 2 * t + i % 2 + (8 if i >= 4 else 0)]
        for i in range(8)
    ]


def b_fragment(matrix, lane):
    """Elements of a thread of B, 16 by 8."""
    g, t = divmod(lane, 4)
    return [matrix[2 * t + i % 2 + (8 if i >= 2 else 0), g] for i in range(4)]


class TestMatrices:
    @pytest.mark.parametrize(("name", "dtype"), [("f16", F16), ("bf16", BF16)])
    def test_mma(self, name, dtype):
        a = rng.integers(-8, 9, (16, 16)).astype(dtype)
        b = rng.integers(-8, 9, (16, 8)).astype(dtype)
        c = rng.integers(-8, 9, (16, 8)).astype(F32)
        fragments = [
            np.array([a_fragment(a, i) for i in range(32)]),
            np.array([b_fragment(b, i) for i in range(32)]),
            np.array([[c[place] for place in d_places(i, 8)] for i in range(32)]),
        ]
        body = f"""
          {load(10, 4, 0)} {load(20, 2, 1)} {load(30, 4, 2)}
          mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32
            {listed(40, 4)}, {listed(10, 4)}, {listed(20, 2)}, {listed(30, 4)};
          {store(40, 4, 3)}
        """
        found = emulate(body, *fragments, out=np.empty((32, 4), F32))
        d = a.astype(F32) @ b.astype(F32) + c
        expected = [[d[place] for place in d_places(i, 8)] for i in range(32)]
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("trans", ["", ".trans"])
    def test_ldmatrix_and_stmatrix(self, trans):
        data = rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
        # Lane i says where row i % 8 of matrix i // 8 lies: the rows in their order.
        body = f"""
          {fill(0, data.nbytes, 32)}
          mad.lo.s64 %rd10, %rd8, 16, %rd9;
          ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {listed(10, 4)}, [%rd10];
          {store(10, 4, 1)}
        """
        found = emulate(body, data, out=np.empty((32, 4, 2), np.uint16))
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            for i, matrix in enumerate(data.swapaxes(1, 2) if trans else data):
                expected = matrix[row, column : column + 2]
                np.testing.assert_array_equal(found[lane, i], expected)
        # And back, to the next 512 bytes.
        body = f"""
          {load(10, 4, 0)}
          mad.lo.s64 %rd10, %rd8, 16, %rd9;
          stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%rd10+512], {listed(10, 4)};
          bar.sync 0;
          ld.shared.v4.b32 {listed(20, 4)}, [%rd10+512];
          {store(20, 4, 1)}
        """
        back = emulate(body, found, out=np.empty_like(data))
        np.testing.assert_array_equal(back, data)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize(("mode", "span"), [(1, 128), (2, 64), (3, 32), (0, 16)])
    def test_wgmma(self, mode, span, transposed):
        n = 64
        a = rng.integers(-8, 9, (64, 16)).astype(F16)
        b = rng.integers(-8, 9, (16, n)).astype(F16)
        shared, descriptor = in_shared(b if transposed else b.T, mode, span, transposed)
        fragments = [a_fragment(a[16 * (i // 32) :], i % 32) for i in range(128)]
        d, trans = listed(100, n // 2), int(transposed)
        name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16"
        # Twice, the first time over what the accumulators hold.
        body = f"""
          {load(10, 4, 0)} {fill(1, shared.nbytes, 128)}
          mov.b64 %rd10, {descriptor};
          mov.pred %p1, 0; mov.pred %p2, 1;
          wgmma.fence.sync.aligned;
          {name} {d}, {listed(10, 4)}, %rd10, %p1, 1, 1, {trans};
          {name} {d}, {listed(10, 4)}, %rd10, %p2, 1, 1, {trans};
          wgmma.commit_group.sync.aligned;
          wgmma.wait_group.sync.aligned 0;
          {store(100, n // 2, 2)}
        """
        out = np.empty((128, n // 2), F32)
        found = emulate(body, np.array(fragments), shared, out=out, threads=128)
        check_d(found, 2 * a.astype(F32) @ b.astype(F32))

    @pytest.mark.parametrize("transposed", [False, True])
    def test_wgmma_of_shared_memory_alone(self, transposed):
        a = rng.integers(-8, 9, (64, 16)).astype(BF16)
        b = rng.integers(-8, 9, (16, 8)).astype(BF16)
        left = in_shared(a.T if transposed else a, 1, 128, transposed)
        right = in_shared(b.T, 3, 32, transposed=False, start=8192 + 1024)
        body = f"""
          {fill(0, left[0].nbytes, 128)}
          add.s64 %rd9, %rd9, 8192;
          {fill(1, right[0].nbytes, 128)}
          mov.b64 %rd10, {left[1]}; mov.b64 %rd11, {right[1]}; mov.pred %p1, 0;
          wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
            {listed(100, 4)}, %rd10, %rd11, %p1, 1, 1, {int(transposed)}, 0;
          wgmma.commit_group.sync.aligned;
          wgmma.wait_group.sync.aligned 0;
          {store(100, 4, 2)}
        """
        right = np.resize(right[0].reshape(-1), 256)  # what all threads copy
        out = np.empty((128, 4), F32)
        found = emulate(body, left[0], right, out=out, threads=128)
        check_d(found, a.astype(F32) @ b.astype(F32))


def check_d(found, product):
    """Each warp of four has sixteen rows."""
    for i in range(128):
        rows = product[16 * (i // 32) :]
        expected = [rows[place] for place in d_places(i % 32, product.shape[1])]
        np.testing.assert_array_equal(found[i], expected)
