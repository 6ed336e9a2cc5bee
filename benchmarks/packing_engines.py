"""What `packing.py` times: one matrix in every format of qjax, and in its peers' code.

Peers are imported where they are used: a worker has one library.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

K, N, GROUP = 4096, 11008, 128
# A call without arguments, and a number that tells whether its result is right.
Engine = tuple[Callable[[], Any], Callable[[Any], float]]
# Rows of the table by (operation, format), each with engines by name. Engines are made
# when their row is reached, and let go after it.
Rows = dict[tuple[str, str], dict[str, Callable[[], Engine]]]


@functools.cache
def codes(bits: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**bits, (K, N), dtype=np.uint8)


@functools.cache
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((K, N), np.float32)


def digest(result: Any) -> int:
    """Checksum of packed words, the same for the same bytes."""
    return zlib.crc32(np.ascontiguousarray(np.asarray(result)).view(np.uint8).data)


def wrong(expected: np.ndarray, result: Any) -> int:
    """How many codes are not what they should be."""
    return int((np.asarray(result).reshape(-1) != expected.reshape(-1)).sum())


def distance(dequantized: Any) -> float:
    """How far a quantized weight is from the weight, relative."""
    found = np.asarray(dequantized).reshape(N, K).T
    return float(np.linalg.norm(found - weight()) / np.linalg.norm(weight()))


def qjax_rows() -> Rows:
    import jax
    import jax.numpy as jnp

    import qjax
    from qjax import formats

    layouts = {
        "GPTQ, 4 bits": (formats.gptq.Stream(), 4),
        "GPTQ, 3 bits": (formats.gptq.Stream(), 3),
        "gptq_p, 3 bits": (formats.gptq.Planar(), 3),
        "AWQ GEMM": (formats.awq.Gemm(), 4),
        "AWQ GEMV": (formats.awq.Gemv(), 4),
        "AWQ GEMVFast": (formats.awq_v2.Interleaved(), 4),
        "quanto, 4 bits": (formats.quanto.Slabs(K, GROUP), 4),
        "quanto, 2 bits": (formats.quanto.Slabs(K, GROUP), 2),
        "HQQ, 4 bits": (formats.hqq.Slabs(K, GROUP), 4),
        "HQQ, 3 bits": (formats.hqq.Slabs(K, GROUP), 3),
        "tinygemm": (formats.tinygemm.TensorCoreTiled(8), 4),
        "compressed-tensors, 4 bits": (formats.compressed_tensors.Dense(), 4),
        "compressed-tensors, 3 bits": (formats.compressed_tensors.Dense(), 3),
        "bitsandbytes": (formats.bnb.Flat(K), 4),
        "torchao int8": (formats.torchao.Bytes(), 8),
        "FlexGen": (formats.flexgen.Blocks(GROUP), 4),
    }
    ready = jax.block_until_ready

    def packing(layout: Any, bits: int) -> Engine:
        q = jnp.asarray(codes(bits))
        return lambda: ready(layout.pack(q, bits)), digest

    def unpacking(layout: Any, bits: int) -> Engine:
        words = ready(layout.pack(jnp.asarray(codes(bits)), bits))
        check = functools.partial(wrong, codes(bits))
        return lambda: ready(layout.unpack(words, bits)[:K, :N]), check

    def moving(source: Any, target: Any) -> Engine:
        qt = qjax.tensor.build(
            (source.pack(jnp.asarray(codes(4)), 4),),
            jnp.ones((K // GROUP, N)),
            layout=source,
            segments=(qjax.tensor.Segment(4, GROUP),),
            affine=qjax.tensor.Affine.CENTERED,
        )
        return lambda: ready(qjax.relayout(qt, target)), lambda qt: digest(qt.words[0])

    def quantizing() -> Engine:
        w = jnp.asarray(weight())
        run = lambda: ready(qjax.quantize(w, bits=4, group_size=GROUP))  # noqa: E731
        return run, lambda qt: distance(qjax.dequantize(qt).T)

    # The functions that take the torch weight's [n, k], as those of the peers.
    def from_rows(pack: Callable[[Any], Any], view: tuple[int, ...]) -> Engine:
        q = jnp.asarray(codes(4).T.reshape(view))
        return lambda: ready(pack(q)), digest

    def to_rows(pack: Any, unpack: Any, view: tuple[int, ...]) -> Engine:
        words = ready(pack(jnp.asarray(codes(4).T.reshape(view))))
        return lambda: ready(unpack(words)), functools.partial(wrong, codes(4).T)

    rows: Rows = {}
    for name, layout in layouts.items():
        rows["pack", name] = {"qjax": functools.partial(packing, *layout)}
        rows["unpack", name] = {"qjax": functools.partial(unpacking, *layout)}
    four = functools.partial(functools.partial, bits=4)
    by_row = {
        "AWQ GEMVFast": (formats.awq_v2.pack_v2, formats.awq_v2.unpack_v2, (N, K)),
        "quanto, 4 bits": (
            four(formats.quanto.pack_weights),
            four(formats.quanto.unpack_weights),
            (-1, GROUP),
        ),
        "HQQ, 4 bits": (
            four(formats.hqq.pack_slabs),
            four(formats.hqq.unpack_slabs),
            (-1, GROUP),
        ),
    }
    for name, (pack, unpack, view) in by_row.items():
        at_rows = functools.partial(from_rows, pack, view)
        rows["pack", name]["qjax, from [n, k]"] = at_rows
        at_rows = functools.partial(to_rows, pack, unpack, view)
        rows["unpack", name]["qjax, from [n, k]"] = at_rows
    stream = "GPTQ, 4 bits"
    others = [name for name, (_, bits) in layouts.items() if bits == 4]
    routes = [(name, stream) for name in others] + [(stream, name) for name in others]
    for a, b in [*routes, ("quanto, 4 bits", "AWQ GEMM")]:
        if a != b:
            make = functools.partial(moving, layouts[a][0], layouts[b][0])
            rows["relayout", f"{a} to {b}"] = {"qjax": make}
    rows["quantize", "4 bits, groups of 128"] = {"qjax": quantizing}
    return rows


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
