"""How launches are cut up: as measured on the GPU at hand, or by a heuristic.

`qjax.pallas.tables` holds what `qjax tune` measured. A shape that was not measured
takes the tile of the nearest one that was, with splits by the heuristic; what has other
rows, widths or groups, or another device, and programs compiled without a GPU, take the
heuristic alone.
"""

import dataclasses

from qjax.formats import tiles
from qjax.pallas import gpu, tables
from qjax.pallas.operands import EXACT_ROWS, Config
from qjax.tensor import QTensor

# Of every multiprocessor: registers, and shared memory that a program takes besides.
_REGISTERS, _RESERVED = 1 << 16, 1 << 10
# Shared memory of a program beyond what is loaded ahead of an iteration, at most:
# scales on their way to the threads that need them, sums of slices.
SCRATCH = 9 << 10
# Iterations of a program below which its pipeline of loads does not pay.
_ITERATIONS = 4
_BLOCK_N = 128
# Rows up to which a product takes `matvec`: beyond, tensor cores have no time to spare.
FEW_ROWS = 16
# Programs that keep a large GPU's memory busy, of two warps and three stages each.
_BUSY = 256
# Rows from which forming the weight is faster. Writing it takes as long as a dense
# product of some 230 rows, and unpacking it leaves tensor cores idle for a third of the
# time or more. So says a model of the H200 (benchmarks/README.md): not yet measured.
_DENSE_ROWS = {"matmul": 513, "matmul_t": 257}


def for_matmul(m: int, w: QTensor) -> Config:
    """Configures ``x @ W``."""
    return _resolve("matmul", m, w)


def for_matvec(m: int, w: QTensor) -> Config:
    """Configures ``x @ W`` of at most `FEW_ROWS` rows, in one launch."""
    return _resolve("matvec", m, w)


def for_exact(m: int, w: QTensor) -> Config:
    """Configures ``x @ W`` without rounding weights, whatever the rows of x."""
    return _split("matmul", m, w, for_matmul(min(m, EXACT_ROWS), w))


def for_blocks(op: str, blocks: int, m: int, w: QTensor) -> Config:
    """Configures ``x @ W`` of blocks of ``m`` rows, each by a matrix of its own.

    Args:
      op: "matvec" or "matmul".
      blocks: How many there are.
      m: Rows of each.
      w: The matrices.
    """
    config = _resolve(op, m, w)
    if op == "matmul":
        block_m = min(config.block_m, _power_of_two(m, 8, 128))
        config = dataclasses.replace(config, block_m=block_m)
    return _split(op, blocks * m, w, config)


def for_matmul_t(m: int, w: QTensor) -> Config:
    """Configures ``dy @ W.T``: its programs own rows of the weight and walk along n."""
    return _resolve("matmul_t", m, w)


def for_scale_grad(m: int, w: QTensor) -> Config:
    """Configures the gradients of scales: programs write every step that they visit."""
    return _resolve("scale_grad", m, w)


def for_dequantize(w: QTensor) -> Config:
    """Configures `dequantize`."""
    return _resolve("dequantize", 1, w)


def dense_rows(op: str, w: QTensor) -> int:
    """Rows from which a product goes through the dense weight.

    Args:
      op: "matmul" or "matmul_t".
      w: The weight. Unless its very shape and widths were measured, of so many rows, it
        is what a model of the H200 says.

    Returns:
      The number; of "matmul" more than `FEW_ROWS`, whose packed weight is a fifth of
      what forming it moves.
    """
    device, rows = tables.device_kind(), _DENSE_ROWS[op]
    if device is not None:
        key = tables.Key.of(op, 1, w)
        rows = tables.of_device(device).dense_rows(key, rows)
    return max(rows, FEW_ROWS + 1) if op == "matmul" else rows


def heuristic(op: str, m: int, w: QTensor) -> Config:
    """Configures an operation of `tables.OPS` without any measurement.

    The fewest rows that hold m, up to where registers end.
    """
    if op == "dequantize":
        # One iteration a program, nothing to pipeline. What three tables of a codebook
        # hold takes the registers of half of the columns.
        return Config(8, _BLOCK_N if w.codebook is None else _BLOCK_N // 2, stages=1)
    if op == "matmul":
        config = _heuristic_matmul(m, w)
    elif op == "matvec":
        config = _heuristic_matvec(m, w)
    elif op == "matmul_t":
        # Two warps have the registers for all rows of a block, of odd widths for fewer
        # columns; of 64 rows of dy, four.
        block_m = _power_of_two(m, 16, 64)
        if block_m == 64:
            config = Config(block_m, 64, 128)
        else:
            columns = 32 if any(s.bits in (3, 5, 7) for s in w.segments) else 64
            config = Config(block_m, columns, 128, warps=2)
    else:
        config = Config(_power_of_two(m, 8, 32), _BLOCK_N, 128)
    return _split(op, m, w, config)


def fits(config: Config, w: QTensor) -> bool:
    """Whether programs find the shared memory they need, whatever scales ``w`` has."""
    return shared_memory(config, w) + SCRATCH <= gpu.at_hand().shared


def shared_memory(config: Config, w: QTensor) -> int:
    """Bytes of shared memory of a program: words and x, loaded ahead."""
    words = config.block_n * max(s.bits for s in w.segments) // 8
    ahead = max(1, config.stages - 1)
    # x stays for an iteration more where the product may not be over.
    waits = config.block_m >= 16 and config.warps >= 4
    waits &= gpu.at_hand().is_asynchronous
    of_row = ahead * words + (ahead + waits) * 2 * config.block_m
    return _iteration(config, w) * of_row


def _heuristic_matmul(m: int, w: QTensor) -> Config:
    block_m = _power_of_two(m, 8, 128)
    long = _has_long_blocks(w)
    if block_m > EXACT_ROWS:
        # Two programs to a multiprocessor: one unpacks while the other multiplies. The
        # shared memory of a third stage is that of the second program.
        warps, block_k = (8, 64) if block_m == 128 else (4, 128)
        return Config(block_m, _BLOCK_N, block_k, warps=warps, stages=2 if long else 3)
    # With few rows two warps have the registers for all columns: what is done for an
    # iteration costs half as much a weight. Long iterations leave room for fewer
    # programs, of more warps.
    warps = 2 if block_m <= 16 and not long else 4
    # What starts the third stage of each segment leaves too few registers to 32 rows.
    crowded = block_m == EXACT_ROWS and long and len(w.segments) > 1
    return Config(block_m, _BLOCK_N, 128, warps=warps, stages=2 if crowded else 3)


def _heuristic_matvec(m: int, w: QTensor) -> Config:
    rows = _power_of_two(m, 1, FEW_ROWS)
    # As many slices as tensor cores have columns; twice as many, for twice as many
    # programs, cost half an instruction a weight. Eight rows can be split instead.
    programs = _ceil(w.n, _BLOCK_N * rows // 8)
    twice = 1 < rows < 8 and programs < _BUSY
    block_m = 16 if twice or rows > 8 else 8
    groups, block_n = _groups_of_iteration(w), _BLOCK_N
    # Scales of sixteen groups, loaded ahead, leave no registers for a third stage.
    stages = 2 if groups >= 16 else 3
    if groups >= 8 and block_m == 16:
        # Those of eight leave two warps registers for half of the columns. Four warps
        # would take tensor cores that read x from shared memory (Hopper), for a tenth
        # more instructions, or weights from a memory of their own (B200), for up to
        # twice as many.
        block_n, stages = _BLOCK_N // 2, 2
        # Sixteen columns a slice are the fewest.
        block_m = min(block_m, rows * block_n // tables.LEAST_COLUMNS)
    slices = block_m // rows
    return Config(block_m, block_n, 128, warps=2, stages=stages, slices=slices)


def _resolve(op: str, m: int, w: QTensor) -> Config:
    device = tables.device_kind()
    key = tables.Key.of(op, m, w)
    found = None if device is None else tables.of_device(device).nearest(key)
    if found is None:
        return heuristic(op, m, w)
    measured, entry = found
    if not fits(entry.config, w):
        # What was measured had shorter iterations.
        return heuristic(op, m, w)
    if (measured.k, measured.n) == (w.k, w.n):
        return entry.config
    return _split(op, m, w, entry.config)


def _split(op: str, m: int, w: QTensor, config: Config) -> Config:
    """Splits the axis that programs walk along until they keep a GPU busy."""
    if config.slices > 1:
        return dataclasses.replace(config, splits=1)
    along_k, along_n = (w.k, _iteration(config, w)), (w.n, config.block_n)
    walked, owned = (along_n, along_k) if op == "matmul_t" else (along_k, along_n)
    programs = _ceil(m, config.block_m) * _ceil(*owned)
    iterations = walked[0] // walked[1]
    most = iterations // _ITERATIONS
    if op != "scale_grad":
        # Sums of splits, four bytes each, are written and read again: at most twice the
        # bytes of the codes.
        most = min(most, int(walked[0] * w.bits) // (32 * m))
    # Not more than run at once: a few that are left over would take as long as all.
    splits = max(1, min(_at_once(op, config, w) // programs, most))
    return dataclasses.replace(config, splits=splits)


def _iteration(config: Config, w: QTensor) -> int:
    """Rows of the longest iteration: at least those of a block of the storage."""
    return max(
        config.fitting(segment.bits, rows + segment.padding).block_k
        for segment, rows in zip(w.segments, w.rows, strict=True)
    )


def _at_once(op: str, config: Config, w: QTensor) -> int:
    """Programs that the GPU holds, as far as registers and shared memory go."""
    registers = 32 * config.warps * _registers(op, config, w)
    device, shared = gpu.at_hand(), shared_memory(config, w) + _RESERVED
    by_shared = (device.shared + _RESERVED) // shared
    return device.multiprocessors * max(1, min(_REGISTERS // registers, by_shared))


def _registers(op: str, config: Config, w: QTensor) -> int:
    """What a thread holds at most, as kernels are compiled for an H100."""
    if op not in ("matmul", "matvec") or config.block_m > 64:
        return 128
    if config.block_m >= 32:
        return 208
    return 255 if _has_long_blocks(w) else 128


def _has_long_blocks(w: QTensor) -> bool:
    """Whether iterations, which take at least a block, have more than 128 rows."""
    return any(tiles.rows_of_block(s.bits) > 128 for s in w.segments)


def _groups_of_iteration(w: QTensor) -> int:
    """How many groups an iteration of 128 rows or a block can have."""
    return max(
        max(128, rows) // (segment.group_size or rows)
        for segment in w.segments
        for rows in [tiles.rows_of_block(segment.bits)]
    )


def _power_of_two(m: int, least: int, most: int) -> int:
    """The smallest power of two, from ``least`` to ``most``, that holds m."""
    return min(most, max(least, 1 << (m - 1).bit_length()))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
