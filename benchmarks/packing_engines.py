"""What `packing.py` times: one matrix in every format of qjax, and in its peers' code.

All are imported where they are used: a worker has one library.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from packing_matrix import (
    GROUP,
    Engine,
    K,
    N,
    Rows,
    codes,
    digest,
    distance,
    weight,
    wrong,
)


def qjax_rows() -> Rows:
    import packing_qjax

    return packing_qjax.rows()


def by_torch(
    pack: Callable[[Any], Any],
    unpack: Callable[[Any], Any],
    bits: int,
    view: tuple[int, ...],
    rows_first: bool = True,
) -> dict[str, Callable[[], Engine]]:
    """Makers of the engines of a peer's pack and unpack on one view of the codes."""
    import torch

    oriented = codes(bits).T if rows_first else codes(bits)
    expected = np.ascontiguousarray(oriented).reshape(view)

    def packing() -> Engine:
        q = torch.from_numpy(expected)
        return lambda: pack(q), digest

    def unpacking() -> Engine:
        words = pack(torch.from_numpy(expected))
        # hqq's words of three bits unpack to rows beyond the last.
        check = lambda q: wrong(expected, q[: len(expected)])  # noqa: E731
        return lambda: unpack(words), check

    return {"pack": packing, "unpack": unpacking}


def quanto_rows() -> Rows:
    import torch
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight
    from optimum.quanto.tensor.packed import pack_weights
    from optimum.quanto.tensor.weights.awq import packed as awq

    unpack = torch.ops.quanto.unpack  # a C++ extension, compiled on the first call

    def moving() -> Engine:
        words = pack_weights(torch.from_numpy(codes(4).T.reshape(-1, GROUP)), 4)

        def run() -> Any:
            rows = unpack(words, 4).reshape(N, K)
            return awq.pack(rows.T.contiguous(), reorder=True)

        return run, digest

    def quantizing() -> Engine:
        w = torch.from_numpy(np.ascontiguousarray(weight().T))

        def run() -> Any:
            scale, shift = MaxOptimizer()(w, qint4, 0, GROUP)
            return quantize_weight(w, qint4, 0, scale, shift, GROUP)

        return run, lambda qt: distance(qt.dequantize())

    makers = {
        "AWQ GEMM": by_torch(
            functools.partial(awq.pack, reorder=True),
            functools.partial(awq.unpack, reorder=True),
            4,
            (K, N),
            rows_first=False,
        ),
        "AWQ GEMVFast": by_torch(awq.pack_v2, awq.unpack_v2, 4, (N, K)),
    }
    for bits in (4, 2):
        makers[f"quanto, {bits} bits"] = by_torch(
            functools.partial(pack_weights, bits=bits),
            functools.partial(unpack, bits=bits),
            bits,
            (-1, GROUP),
        )
    rows = _rows("optimum-quanto", makers)
    rows["relayout", "quanto, 4 bits to AWQ GEMM"] = {"optimum-quanto": moving}
    rows["quantize", "4 bits, groups of 128"] = {"optimum-quanto": quantizing}
    return rows


def hqq_rows() -> Rows:
    import torch
    from hqq.core.bitpack import BitPack
    from hqq.core.quantize import Quantizer

    def quantizing(optimize: bool) -> Engine:
        w = torch.from_numpy(np.ascontiguousarray(weight().T))
        run = functools.partial(
            Quantizer.quantize,
            w,
            nbits=4,
            group_size=GROUP,
            axis=1,
            optimize=optimize,
            device="cpu",
            compute_dtype=torch.float32,
        )
        return run, lambda result: distance(Quantizer.dequantize(*result))

    view = (-1, GROUP)
    makers = {
        "HQQ, 4 bits": by_torch(BitPack.pack_4bit_u8, BitPack.unpack_4bit_u8, 4, view),
        "HQQ, 3 bits": by_torch(BitPack.pack_3bit_32, BitPack.unpack_3bit_32, 3, view),
    }
    rows = _rows("hqq", makers)
    rows["quantize", "4 bits, groups of 128"] = {
        "hqq": functools.partial(quantizing, False),
        "hqq, optimized": functools.partial(quantizing, True),
    }
    return rows


def torchao_rows() -> Rows:
    import torch
    from torchao.prototype.dtypes.uintx import bitpacking
    from torchao.quantization import quant_primitives as affine

    aten = torch.ops.aten
    block, limits = (1, GROUP), (torch.uint8, 0, 15)

    def pairs(q: Any) -> Any:
        return q[:, 1::2] | q[:, ::2] << 4

    def quantizing() -> Engine:
        w = torch.from_numpy(np.ascontiguousarray(weight().T))

        def run() -> Any:
            scale, zero = affine.choose_qparams_affine(
                w, affine.MappingType.ASYMMETRIC, block, *limits
            )
            q = affine.quantize_affine(w, block, scale, zero, *limits)
            return q, scale, zero

        return run, lambda r: distance(
            affine.dequantize_affine(r[0], block, *r[1:], *limits)
        )

    makers = {
        "tinygemm": by_torch(
            lambda q: aten._convert_weight_to_int4pack(pairs(q), 8),
            # Named when it is called: this release may not have it.
            lambda words: torch.ops.torchao.unpack_tensor_core_tiled_layout(words, 8),
            4,
            (N, K),
        ),
        "torchao uintx, 4 bits": by_torch(
            lambda q: bitpacking.pack(q, 4, dim=-1)[0],
            lambda words: bitpacking.unpack([words], 4, dim=-1),
            4,
            (N, K),
        ),
    }
    rows = _rows("torchao", makers)
    rows["quantize", "4 bits, groups of 128"] = {"torchao, codes unpacked": quantizing}
    return rows


def _rows(library: str, makers: dict[str, dict[str, Callable[[], Engine]]]) -> Rows:
    return {
        (op, name): {library: make}
        for name, ops in makers.items()
        for op, make in ops.items()
    }


LIBRARIES: dict[str, Callable[[], Rows]] = {
    "qjax": qjax_rows,
    "optimum-quanto": quanto_rows,
    "hqq": hqq_rows,
    "torchao": torchao_rows,
}
