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
