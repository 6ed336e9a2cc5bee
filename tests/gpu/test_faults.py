"""What the emulator of PTX refuses: faults of kernels, and what it does not know."""

import re

import numpy as np
import pytest

from tests.gpu.emulator.parser import EmulationError
from tests.gpu.texts import emulate, fill, listed, of_each_thread, store

F32, U32 = np.float32, np.uint32
rng = np.random.default_rng(0)


# A statement or a few, and what is said of it. Operand 0 has 256 bytes, and the output
# as many.
REFUSED = {
    "unknown opcode": ("sqrt.rn.f32 %r9, %r0;", "unknown opcode sqrt.rn.f32"),
    "unknown modifier": ("add.sat.s32 %r9, %r0, %r0;", "unknown opcode add.sat.s32"),
    "unknown directive": (".local .b8 a[4];", "unknown directive: .local"),
    "unknown operand": ("mov.u32 %r9, %laneid;", "unknown operand: .*laneid"),
    "width": ("mov.b32 %rs9, %r0;", "does not hold"),
    "unwritten register": ("add.s32 %r9, %r0, %r8;", "%r8 is read before it is writ"),
    "threads end apart": (
        "setp.lt.s32 %p1, %r0, 3; @%p1 bra END; ret; END: ret;",
        "the threads of a program part",
    ),
    "threads part again": (
        "AGAIN: setp.lt.s32 %p1, %r0, 3; @%p1 bra END; @%p1 bra AGAIN; END: ret;",
        "the threads of a program part",
    ),
    "a barrier of some": (
        "setp.lt.s32 %p1, %r0, 32; @%p1 bra END; bar.sync 0; END: ret;",
        "a guard on what is done by a warp as one",
    ),
    "beyond an array": (
        "mad.lo.s64 %rd7, %rd8, 8, %rd0; ld.global.b32 %r9, [%rd7+12];",
        "bytes 12 to 520 of parameter 0, which has 256",
    ),
    "before an array": (
        "ld.global.b8 %rs9, [%rd1+-1];",
        "bytes -1 to 0 of parameter 1",
    ),
    "alignment": ("ld.global.v2.b32 {%r8, %r9}, [%rd0+4];", "no multiple of 8"),
    "no array": ("mov.b64 %rd7, 64; ld.global.b32 %r9, [%rd7];", "parameter 0, which"),
    "operand": ("st.global.b32 [%rd0], %r0;", "an operand is written to"),
    "output": ("ld.global.b32 %r9, [%rd1];", "an output is read before it is written"),
    "one place": ("st.global.b32 [%rd1], %r0;", "different values are stored in one"),
    "one place later": (
        "mov.b32 %r8, 7; st.global.b32 [%rd1], %r8; st.global.b32 [%rd1], %r1;",
        "different values are stored in one place",
    ),
    "beyond shared memory": ("ld.shared.b32 %r9, [%rd9+16384];", "which has 16384"),
    "shared alignment": ("ld.shared.b32 %r9, [%rd9+2];", "no multiple of 4"),
    "one place of shared memory": ("st.shared.b32 [%rd9], %r0;", "in one place of sh"),
    "no barrier after writing": (
        "st.shared.b32 [%rd4], %r0; ld.shared.b32 %r9, [%rd5];",
        "read, without a barrier after its writing",
    ),
    "no barrier after reading": (
        "st.shared.b32 [%rd4], %r0; bar.sync 0; ld.shared.b32 %r9, [%rd5]; "
        "st.shared.b32 [%rd4], %r0;",
        "overwritten, with no barrier after a reading",
    ),
    "two writers": (
        "st.shared.b32 [%rd4], %r0; st.shared.b32 [%rd5], %r0;",
        "written by two warps without a barrier",
    ),
    "no wait": (
        "cp.async.ca.shared.global [%rd4], [%rd0], 0x4; cp.async.commit_group; "
        "bar.sync 0; ld.shared.b32 %r9, [%rd4];",
        "a copy is still on its way",
    ),
    "no barrier after a wait": (
        "cp.async.ca.shared.global [%rd4], [%rd0], 0x4; cp.async.commit_group; "
        "cp.async.wait_group 0; ld.shared.b32 %r9, [%rd5];",
        "read, without a barrier after its writing",
    ),
    "a part of a copy": (
        "mov.b32 %r9, 2; cp.async.ca.shared.global [%rd4], [%rd0], 0x4, %r9;",
        "of a part of its size",
    ),
    "a copy over what is read": (
        "st.shared.b32 [%rd4], %r0; bar.sync 0; ld.shared.b32 %r9, [%rd5]; "
        "cp.async.ca.shared.global [%rd4], [%rd0], 0x4;",
        "overwritten, with no barrier after a reading",
    ),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(body, message):
    # Two places of each of 64 threads: its own, and that of the other warp's.
    places = """
      mad.lo.s64 %rd4, %rd8, 4, %rd9;
      xor.b64 %rd5, %rd8, 32; mad.lo.s64 %rd5, %rd5, 4, %rd9;
    """
    operand, out = np.zeros(64, F32), np.empty(64, F32)
    with pytest.raises(EmulationError) as caught:
        emulate(places + body, operand, out=out, threads=64)
    assert re.search(message, str(caught.value))


def test_a_fault_shows_its_statement():
    with pytest.raises(EmulationError, match=r": ld.shared.b32 %r9, \[%rd9\+16384\]"):
        of_each_thread("ld.shared.b32 $0, [%rd9+16384];")


def test_wgmma_needs_a_proxy_fence():
    d = listed(100, 4)
    product = f"""
      mov.b64 %rd10, {(1024 + 1024 >> 4) | 8 << 32 | 3 << 62};
      mov.pred %p1, 0;
      wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {d}, {{%r1, %r1, %r1, %r1}}, %rd10, %p1, 1, 1, 0;
      wgmma.commit_group.sync.aligned;
      wgmma.wait_group.sync.aligned 0;
      {store(100, 4, 1)}
    """
    data, out = np.zeros(1024, F32), np.empty((128, 4), F32)
    written = fill(0, data.nbytes, 128)
    assert not emulate(written + product, data, out=out, threads=128).any()
    unfenced = written.replace("fence.proxy.async.shared::cta;", "")
    with pytest.raises(EmulationError, match="without a proxy fence after it"):
        emulate(unfenced + product, data, out=out, threads=128)


@pytest.mark.parametrize(
    ("last", "sets"),
    [
        ("%p1", "setp.eq.s32 %p1, %r0, 5;"),
        ("%r9", "setp.eq.s32 %p1, %r0, 5; selp.b32 %r9, 0, 4, %p1;"),
    ],
    ids=["predicate", "size"],
)
def test_copies_arrive_when_waited_for(last, sets):
    # Three groups, the last two of them still under way at the first load.
    body = "mad.lo.s64 %rd10, %rd8, 4, %rd0; mad.lo.s64 %rd11, %rd8, 4, %rd9;"
    for i in range(3):
        body += f"""
          cp.async.ca.shared.global [%rd11+{128 * i}], [%rd10+{128 * i}], 0x4, {last};
          cp.async.commit_group;
        """
    body = sets + body
    load_first = "ld.shared.b32 %r10, [%rd11];"
    load_second = "ld.shared.b32 %r11, [%rd11+128];"
    data = rng.integers(0, 2**32, 96, dtype=U32)
    out = np.empty((32, 2), U32)
    ends = f"cp.async.wait_group 1; {load_first} {load_second} {store(10, 2, 1)}"
    found = emulate(body + ends, data, out=out)
    expected = data.reshape(3, 32)[:2].T.copy()
    expected[5] = 0  # its source is ignored
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(EmulationError, match="still on its way"):
        emulate(body + ends.replace("group 1", "group 2"), data, out=out)


def test_programs_go_their_own_ways():
    # Each adds its number so many times, after as many passes as it has threads over.
    body = """
      mov.b32 %r10, 0; mov.b32 %r11, 0;
    AGAIN:
      setp.ge.s32 %p1, %r11, %r1;
      @%p1 bra DONE;
      add.s32 %r10, %r10, %r1; add.s32 %r11, %r11, 1;
      bra.uni AGAIN;
    DONE:
      mad.lo.s32 %r12, %r1, 32, %r0;
      mul.wide.s32 %rd10, %r12, 4; add.s64 %rd10, %rd10, %rd0;
      st.global.b32 [%rd10], %r10;
    """
    found = emulate(body, out=np.empty((5, 32), U32), programs=5)
    np.testing.assert_array_equal(
        found, np.repeat(np.arange(5) ** 2, 32).reshape(5, 32)
    )


def test_what_is_not_written_is_nan():
    body = f"setp.lt.s32 %p1, %r0, 3; {store(0, 1, 0).replace('st.', '@%p1 st.')}"
    found = emulate(body, out=np.empty(32, F32))
    np.testing.assert_array_equal(np.isnan(found), np.arange(32) >= 3)
