"""PTX made up for the tests of the emulator."""

import numpy as np

from tests.gpu.emulator import machine, parser
from tests.gpu.emulator.operations import OPERATIONS

U32 = np.uint32
SHARED = 16384


def emulate(body, *operands, out, threads=32, programs=1):
    """Runs statements after some that every text starts with.

    ``%rd0`` upwards point to the operands and to the output; ``%rd9`` is shared memory,
    and ``%r0``, ``%r1`` and ``%rd8`` are the thread, the program, and the thread as 64
    bits.
    """
    count = len(operands) + 1
    parameters = ",".join(f".param .u64 .ptr .align 32 k_{i}" for i in range(count))
    loads = "".join(f"ld.param.b64 %rd{i}, [k_{i}];\n" for i in range(count))
    text = f"""
    .visible .entry k({parameters})
    .reqntid {threads}, 1, 1
    {{
      .reg .pred %p<9>; .reg .b16 %rs<99>; .reg .b32 %r<999>; .reg .b64 %rd<99>;
      {loads}
      mov.u32 %r0, %tid.x;  // the thread
      mov.u32 %r1, %ctaid.x;
      cvt.u64.u32 %rd8, %r0;
      mov.b64 %rd9, global_smem;
      {body}
      ret;
    }}
    """
    (found,), _ = machine.run(
        parser.parse(text),
        OPERATIONS,
        operands,
        [out.itemsize * out.size],
        (programs, 1, 1),
        SHARED,
    )
    return found.view(out.dtype).reshape(out.shape)


def listed(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def load(first, count, pointer, stride=None):
    """Loads so many words of each thread into registers."""
    stride = stride or 4 * count
    lines = [f"mad.lo.s64 %rd20, %rd8, {stride}, %rd{pointer};"]
    lines += [f"ld.global.b32 %r{first + i}, [%rd20+{4 * i}];" for i in range(count)]
    return "\n".join(lines)


def store(first, count, pointer):
    """Stores so many words of each thread."""
    lines = [f"mad.lo.s64 %rd21, %rd8, {4 * count}, %rd{pointer};"]
    lines += [f"st.global.b32 [%rd21+{4 * i}], %r{first + i};" for i in range(count)]
    return "\n".join(lines)


def fill(pointer, size, threads):
    """Copies an array to shared memory."""
    lines = [
        f"mad.lo.s64 %rd22, %rd8, 4, %rd{pointer};",
        "mad.lo.s64 %rd23, %rd8, 4, %rd9;",
    ]
    for i in range(0, size, 4 * threads):
        lines.append(f"ld.global.b32 %r900, [%rd22+{i}];")
        lines.append(f"st.shared.b32 [%rd23+{i}], %r900;")
    return "\n".join([*lines, "fence.proxy.async.shared::cta;", "bar.sync 0;"])


def of_each_thread(instruction, *operands, dtype=U32):
    """Text on words ``$1, $2, ...`` of each thread of some warps, to ``$0``."""
    operands = operands or (np.zeros(32, U32),)
    words = np.stack([np.ascontiguousarray(o).view(U32) for o in operands], -1)
    # Backwards: $1 is the beginning of $10.
    for i in reversed(range(len(operands) + 1)):
        instruction = instruction.replace(f"${i}", f"%r{9 + i}")
    body = f"""
      mad.lo.s32 %r2, %r1, 32, %r0;  // the threads of all programs
      cvt.u64.u32 %rd8, %r2;
      {load(10, len(operands), 0)}
      {instruction}
      {store(9, 1, 1)}
    """
    out = np.empty(len(words), dtype)
    return emulate(body, words, out=out, programs=len(words) // 32)


def in_tensor_memory(body, columns=128):
    """Allocates before some statements, and frees after them.

    ``%r800`` is the address, ``%r801`` that of the warp's own lanes, and ``%p9`` is
    true for one thread of the first warp. The last 16 bytes of shared memory are taken.
    """
    return f"""
      setp.lt.u32 %p8, %r0, 32;
      @%p8 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%rd9+16368],
        {columns};
      bar.sync 0;
      ld.shared.b32 %r800, [%rd9+16368];
      bar.sync 0;
      @%p8 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
      shl.b32 %r801, %r0, 16; and.b32 %r801, %r801, 6291456;
      add.s32 %r801, %r801, %r800;
      elect.sync %r802|%p7, -1;
      setp.lt.and.u32 %p9, %r0, 32, %p7;
      {body}
      bar.sync 0;
      @%p8 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r800, {columns};
    """


def d_places(lane, n):
    """Rows and columns of the elements of a thread of D, 16 by n."""
    g, t = divmod(lane, 4)
    return [
        (g + (8 if i % 4 >= 2 else 0), i // 4 * 8 + 2 * t + i % 2)
        for i in range(n // 2)
    ]


def in_shared(matrix, mode, span, transposed, start=1024):
    """A matrix as tensor cores read it: rows of ``span`` bytes by eights, swizzled.

    Rows are those of k where m or n runs along them (transposed), else those of m or n.
    Returns the elements and the descriptor, as for wgmma. Without a swizzle, the two
    offsets of a transposed matrix change places.
    """
    height, width = matrix.shape
    atoms = height // 8, max(1, 2 * width // span)
    data = np.zeros((*atoms, 8, span // 16, 8), matrix.dtype)
    for r in range(height):
        for c in range(width // 8):
            across, chunk = divmod(c, span // 16)
            flipped = chunk ^ (r % 8) * span // 128
            data[r // 8, across, r % 8, flipped] = matrix[r, 8 * c : 8 * c + 8]
    leading, stride = 8 * span, atoms[1] * 8 * span
    if not mode and transposed:
        leading, stride = stride, leading
    fields = (start, 0), (leading, 16), (stride, 32)
    return data, sum(field >> 4 << low for field, low in fields) | mode << 62
