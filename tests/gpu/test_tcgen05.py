"""What the emulator makes of Blackwell's tensor cores, and what of them it refuses."""

import ml_dtypes
import numpy as np
import pytest

from tests.gpu.emulator.parser import EmulationError
from tests.gpu.texts import (
    d_places,
    emulate,
    fill,
    in_shared,
    in_tensor_memory,
    listed,
    load,
    store,
)

F16, BF16, F32, U32 = np.float16, ml_dtypes.bfloat16, np.float32, np.uint32
rng = np.random.default_rng(0)
ST, LD = "tcgen05.st.sync.aligned.32x32b", "tcgen05.ld.sync.aligned.32x32b"
WAIT = "tcgen05.wait::st.sync.aligned;"
INITIALIZE = "@%p9 mbarrier.init.shared::cta.b64 [%rd9+16376], 1; bar.sync 0;"
COMMIT = (
    "@%p9 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 "
    "[%rd9+16376];"
)
# Of the first phase.
AWAIT = """
  { .reg .pred complete; again:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%rd9+16376], 0;
    @!complete bra.uni again; }
"""


def place(shape, lane, register):
    """Lane and column of a word, as the pictures of the PTX ISA have it."""
    g, t = divmod(lane, 4)
    if shape == "16x128b":
        return g + 8 * (register % 2), t + 4 * (register // 2)
    if shape == "16x256b":
        return d_places(lane, 64)[register]
    if shape == "16x32bx2":
        return lane % 16, register + (0 if lane < 16 else 32)
    return lane, register


@pytest.mark.parametrize(
    ("shape", "times", "count", "half"),
    [
        ("32x32b", 16, 16, 0),
        *(("16x32bx2", 8, 8, half) for half in (0, 16)),
        *(("16x128b", 4, 8, half) for half in (0, 16)),
        *(("16x256b", 4, 16, half) for half in (0, 16)),
    ],
)
def test_moves(shape, times, count, half):
    # Words of four warps: stored so, all of it loaded by lanes, and loaded so.
    words = rng.integers(0, 2**32, (128, count), dtype=U32)
    name = f"sync.aligned.{shape}.x{times}.b32"
    split = "32, " if shape == "16x32bx2" else ""
    last = ", 32" if split else ""
    nothing = "{" + ", ".join(["0"] * 64) + "}"
    body = f"""
      {load(10, count, 0)}
      tcgen05.st.sync.aligned.32x32b.x64.b32 [%r801], {nothing}; {WAIT}
      add.s32 %r803, %r801, {half << 16};
      tcgen05.st.{name} [%r803], {split}{listed(10, count)}; {WAIT}
      tcgen05.ld.sync.aligned.32x32b.x64.b32 {listed(100, 64)}, [%r801];
      tcgen05.ld.{name} {listed(200, count)}, [%r803]{last};
      tcgen05.wait::ld.sync.aligned;
    """
    whole = in_tensor_memory(body + store(100, 64, 1))
    memory = emulate(whole, words, out=np.empty((128, 64), U32), threads=128)
    expected = np.zeros((4, 32, 64), U32)
    for thread in range(128):
        for register in range(count):
            row, column = place(shape, thread % 32, register)
            expected[thread // 32, half + row, column] = words[thread, register]
    np.testing.assert_array_equal(memory, expected.reshape(128, 64))
    back = in_tensor_memory(body + store(200, count, 1))
    back = emulate(back, words, out=np.empty((128, count), U32), threads=128)
    np.testing.assert_array_equal(back, words)


def instruction(m, n, dtype=F16, signs=(1, 1), transposed=(False, False)):
    """An instruction descriptor, of float32 sums."""
    kind, negative = int(dtype == BF16), [int(sign < 0) for sign in signs]
    return (
        1 << 4
        | kind << 7
        | kind << 10
        | negative[0] << 13
        | negative[1] << 14
        | int(transposed[0]) << 15
        | int(transposed[1]) << 16
        | n >> 3 << 17
        | m >> 4 << 24
    )


def rows_to_lanes(matrix, first):
    """Rows where a product has them: 16 or 32 to a quarter of the lanes."""
    lanes = np.zeros((128, *matrix.shape[1:]), matrix.dtype)
    each = len(matrix) // 4
    for i, row in enumerate(matrix):
        lanes[i // each * 32 + first + i % each] = row
    return lanes


def product(n, a="[%r800+64]", first=0, keep=("%p1", "%p2")):
    """Two products on one accumulator, the first not over what it holds, and a wait."""
    lines = [
        f"@%p9 tcgen05.mma.cta_group::1.kind::f16 [%r800+{first << 16}], "
        f"{a}, %rd10, %r804, {predicate};"
        for predicate in keep
    ]
    return f"""
      mov.pred %p1, 0; mov.pred %p2, 1;
      {" ".join(lines)} {COMMIT} {AWAIT}
      tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {listed(100, n)}, [%r801];
      tcgen05.wait::ld.sync.aligned; {store(100, n, 2)}
    """


def described(bits, *descriptors):
    """What the registers of `product` hold; descriptors are those of version 1."""
    lines = [f"mov.b32 %r804, {bits};"]
    for i, descriptor in enumerate(descriptors):
        lines.append(f"mov.b64 %rd{10 + i}, {descriptor | 1 << 46};")
    return " ".join(lines)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("mode", "span"), [(1, 128), (2, 64), (3, 32), (0, 16)])
@pytest.mark.parametrize(("m", "first"), [(128, 0), (64, 0), (64, 16)])
def test_products_of_tensor_memory(m, first, mode, span, transposed):
    n = 64
    a = rng.integers(-8, 9, (m, 16)).astype(F16)
    b = rng.integers(-8, 9, (16, n)).astype(F16)
    shared, descriptor = in_shared(b if transposed else b.T, mode, span, transposed)
    words = rows_to_lanes(a.view(U32), first)
    bits = instruction(m, n, transposed=(False, transposed))
    body = f"""
      {INITIALIZE} {load(10, 8, 0)} {fill(1, shared.nbytes, 128)}
      {described(bits, descriptor)}
      tcgen05.st.sync.aligned.32x32b.x64.b32 [%r801],
        {{{", ".join(["0"] * 64)}}};
      tcgen05.st.sync.aligned.32x32b.x8.b32 [%r801+64], {listed(10, 8)};
      {WAIT} bar.sync 0;
      {product(n, f"[%r800+{64 | first << 16}]", first)}
    """
    out = np.empty((128, n), F32)
    found = emulate(in_tensor_memory(body), words, shared, out=out, threads=128)
    expected = rows_to_lanes(2 * a.astype(F32) @ b.astype(F32), first)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m", [64, 128])
def test_products_of_shared_memory_alone(m, transposed):
    n = 16
    a = rng.integers(-8, 9, (m, 16)).astype(BF16)
    b = rng.integers(-8, 9, (16, n)).astype(BF16)
    rows, swizzle = (a.T, (1, 128)) if transposed else (a, (3, 32))
    left = in_shared(rows, *swizzle, transposed)
    right = in_shared(b.T, 3, 32, transposed=False, start=8192 + 1024)
    bits = instruction(m, n, BF16, (1, -1), (transposed, False))
    nothing = "{" + ", ".join(["0"] * n) + "}"
    body = f"""
      {INITIALIZE} {fill(0, left[0].nbytes, 128)}
      add.s64 %rd9, %rd9, 8192;
      {fill(1, right[0].nbytes, 128)}
      add.s64 %rd9, %rd9, -8192;
      {described(bits, right[1], left[1])}
      tcgen05.st.sync.aligned.32x32b.x{n}.b32 [%r801], {nothing}; {WAIT} bar.sync 0;
      {product(n, "%rd11")}
    """
    out = np.empty((128, n), F32)
    found = emulate(
        in_tensor_memory(body), left[0], right[0].reshape(-1), out=out, threads=128
    )
    expected = -2 * a.astype(F32) @ b.astype(F32)
    np.testing.assert_array_equal(found, rows_to_lanes(expected, 0))


STORE = f"{ST}.x1.b32 [%r801], {{%r0}};"
LOAD = f"{LD}.x1.b32 {{%r9}}, [%r801];"
OVER_A = f"{ST}.x1.b32 [%r801+64], {{%r0}};"
MMA = "@%p9 tcgen05.mma.cta_group::1.kind::f16 [%r800], [%r800+64], %rd10, %r804, %p1;"
# Zeros in shared memory for B, and in tensor memory for A and D.
ZEROS = f"""
  {INITIALIZE} st.shared.b32 [%rd4], %r2; fence.proxy.async.shared::cta; bar.sync 0;
  {ST}.x8.b32 [%r801+64], {{{", ".join(["%r2"] * 8)}}};
  {ST}.x16.b32 [%r801], {{{", ".join(["%r2"] * 16)}}};
"""
READY = f"{ZEROS} {WAIT} bar.sync 0;"
FREE = "@%p8 tcgen05.dealloc.cta_group::1.sync.aligned.b32"
# Statements while tensor memory is allocated, and what is said of them.
REFUSED = {
    "not written": (LOAD, "read before it is written"),
    "beyond": (f"{LD}.x1.b32 {{%r9}}, [%r801+128];", "columns 512 to 512 of tensor"),
    "no address": (
        f"sub.s32 %r9, %r801, %r800; {LD}.x1.b32 {{%r9}}, [%r9];",
        "columns 0 to 0 of tensor memory, of which 384 to 511 are allocated",
    ),
    "another quarter": (f"{LD}.x1.b32 {{%r9}}, [%r800];", "lanes of another quarter"),
    "odd lanes": (f"{LD}.x1.b32 {{%r9}}, [%r801+524288];", "lanes that begin at anoth"),
    "registers": (f"{LD}.x2.b32 {{%r9}}, [%r801];", "1 registers for 32x32b, 2 of"),
    "addresses": (f"{LD}.x1.b32 {{%r9}}, [%r0];", "a warp disagree on an address"),
    "no wait": (STORE + LOAD, "a store is still on its way to"),
    "loading": (STORE + WAIT + LOAD + STORE, "a load or a store is still on its way"),
    "a part of a warp": (
        f"setp.lt.u32 %p1, %r0, 16; @%p1 {STORE}",
        "a guard on what is done by a warp as one",
    ),
    "two allocations": (
        "@%p8 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%rd9], 32;",
        "a second allocation",
    ),
    "freed otherwise": (f"{FREE} %r800, 64;", "other tensor memory is freed"),
    "freed too early": (f"{READY} {MMA} {FREE} %r800, 128;", "a product under way"),
    "used after": (f"{FREE} %r800, 128; {LOAD}", "tensor memory is not allocated"),
    "A stored": (ZEROS + MMA, "a store is still on its way"),
    "A by others": (ZEROS + WAIT + MMA, "without a barrier after its writing"),
    "D not written": (
        READY + MMA.replace("[%r800]", "[%r800+32]").replace("%p1", "%p2"),
        "read before it is written",
    ),
    "no commit": (READY + MMA + AWAIT, "that nothing will arrive at"),
    "no await": (READY + MMA + COMMIT + LOAD, "a product under way writes"),
    "over D": (READY + MMA + COMMIT + STORE, "a product under way writes"),
    "over A": (READY + MMA + COMMIT + OVER_A, "that a product under way reads"),
    "over B": (
        READY + MMA + COMMIT + "bar.sync 0; st.shared.b32 [%rd4], %r2;",
        "shared memory is overwritten that a product under way reads",
    ),
    "committed later": (
        READY + MMA + COMMIT + MMA + AWAIT + LOAD,
        "a product under way writes",
    ),
    "two commits": (READY + MMA + COMMIT + COMMIT, "committed to before it was wait"),
    "a commit that some may miss": (
        READY + MMA + COMMIT + AWAIT + MMA + COMMIT,
        "overwritten, with no barrier after a reading",
    ),
    "given up": (
        READY + MMA + COMMIT + "@%p9 mbarrier.inval.shared::cta.b64 [%rd9+16376];",
        "that nobody has waited for",
    ),
    "no mbarrier": (
        READY + MMA + COMMIT.replace("16376", "16360"),
        "no mbarrier is there",
    ),
    "several arrivals": (
        "@%p9 mbarrier.init.shared::cta.b64 [%rd9+16376], 2;",
        "several arrivals",
    ),
    "no proxy fence": (
        READY + "st.shared.b32 [%rd4], %r2; bar.sync 0;" + MMA,
        "without a proxy fence",
    ),
    "another shape": (
        f"{READY} {MMA} mov.b32 %r804, {instruction(128, 8 + 8 + 16)}; {MMA}",
        "a product under way writes",
    ),
    "instruction": (f"{READY} mov.b32 %r804, 0; {MMA}", "unknown instruction descr"),
    "descriptor": (f"{READY} mov.b64 %rd10, 64; {MMA}", "a descriptor of another ver"),
    "transposed": (
        f"{READY} mov.b32 %r804, {instruction(128, 16, transposed=(True, False))}; "
        + MMA,
        "A is transposed",
    ),
    "begun at a lane": (
        READY + MMA.replace("[%r800]", "[%r800+1048576]"),
        "a product that begins at lane 16",
    ),
    "begun by many": (READY + MMA.replace("@%p9", ""), "several threads do what one"),
    "committed by many": (READY + COMMIT.replace("@%p9", ""), "several threads do wha"),
    "committed by another": (
        READY + MMA + "setp.eq.s32 %p9, %r0, 3;" + COMMIT,
        "products of another thread are not committed",
    ),
}


def refused(body, threads=128):
    """What is said of it; B has 16 columns, all zeros."""
    b = in_shared(np.zeros((16, 16), F16), 0, 16, transposed=False)[1]
    body = f"""
      {described(instruction(128, 16), b)}
      mov.pred %p1, 0; mov.pred %p2, 1; mov.b32 %r2, 0;
      mad.lo.s64 %rd4, %rd8, 4, %rd9;
      {body}
    """
    with pytest.raises(EmulationError) as caught:
        emulate(body, out=np.empty(64, F32), threads=threads)
    return str(caught.value)


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(body, message):
    assert message in refused(in_tensor_memory(body))


@pytest.mark.parametrize(
    ("before", "then", "message"),
    [
        ("", LOAD, "read, without a barrier after its writing"),
        ("", STORE, "written by two warps without a barrier"),
        (f"bar.sync 0; @%p1 {LOAD}", STORE, "with no barrier after a reading"),
    ],
    ids=["read", "written", "overwritten"],
)
def test_two_warps_of_a_quarter(before, then, message):
    body = f"""
      setp.lt.u32 %p1, %r0, 128; setp.ge.u32 %p2, %r0, 128;
      @%p1 {STORE} {WAIT} {before} tcgen05.wait::ld.sync.aligned;
      @%p2 {then}
    """
    assert message in refused(in_tensor_memory(body), threads=256)


def test_all_is_freed_at_the_end():
    body, _ = in_tensor_memory("").split("@%p8 tcgen05.dealloc")
    assert "tensor memory is not freed" in refused(body)
