"""qjax's engines of `packing.py`: one matrix in every format."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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

import qjax
from qjax import formats

LAYOUTS = {
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
_four = functools.partial(functools.partial, bits=4)
# Functions that take codes [n, k] as torch's weights and the peers', in a view of them.
BY_ROWS = {
    "AWQ GEMVFast": (formats.awq_v2.pack_v2, formats.awq_v2.unpack_v2, (N, K)),
    "quanto, 4 bits": (
        _four(formats.quanto.pack_weights),
        _four(formats.quanto.unpack_weights),
        (-1, GROUP),
    ),
    "HQQ, 4 bits": (
        _four(formats.hqq.pack_slabs),
        _four(formats.hqq.unpack_slabs),
        (-1, GROUP),
    ),
}
STREAM = "GPTQ, 4 bits"


def rows() -> Rows:
    return {**_packings(), **_relayouts(), **_quantizations()}


def _packings() -> Rows:
    rows: Rows = {}
    for name, layout in LAYOUTS.items():
        rows["pack", name] = {"qjax": functools.partial(_pack, *layout)}
        rows["unpack", name] = {"qjax": functools.partial(_unpack, *layout)}
    for name, (pack, unpack, view) in BY_ROWS.items():
        at_rows = functools.partial(_pack_rows, pack, view)
        rows["pack", name]["qjax, from [n, k]"] = at_rows
        at_rows = functools.partial(_unpack_rows, pack, unpack, view)
        rows["unpack", name]["qjax, from [n, k]"] = at_rows
    return rows


def _relayouts() -> Rows:
    """Every layout of four bits to the stream and back, and quanto's own way."""
    others = [
        name for name, (_, bits) in LAYOUTS.items() if bits == 4 and name != STREAM
    ]
    routes = [(name, STREAM) for name in others] + [(STREAM, name) for name in others]
    routes.append(("quanto, 4 bits", "AWQ GEMM"))
    return {
        ("relayout", f"{source} to {target}"): {
            "qjax": functools.partial(_move, LAYOUTS[source][0], LAYOUTS[target][0])
        }
        for source, target in routes
    }


def _quantizations() -> Rows:
    return {("quantize", "4 bits, groups of 128"): {"qjax": _quantize}}


def _pack(layout: Any, bits: int) -> Engine:
    q = jnp.asarray(codes(bits))
    return lambda: jax.block_until_ready(layout.pack(q, bits)), digest


def _unpack(layout: Any, bits: int) -> Engine:
    words = jax.block_until_ready(layout.pack(jnp.asarray(codes(bits)), bits))
    check = functools.partial(wrong, codes(bits))
    return lambda: jax.block_until_ready(layout.unpack(words, bits)[:K, :N]), check


def _pack_rows(pack: Callable[[Any], Any], view: tuple[int, ...]) -> Engine:
    q = jnp.asarray(codes(4).T.reshape(view))
    return lambda: jax.block_until_ready(pack(q)), digest


def _unpack_rows(pack: Any, unpack: Any, view: tuple[int, ...]) -> Engine:
    words = jax.block_until_ready(pack(jnp.asarray(codes(4).T.reshape(view))))
    check = functools.partial(wrong, codes(4).T)
    return lambda: jax.block_until_ready(unpack(words)), check


def _move(source: Any, target: Any) -> Engine:
    qt = qjax.tensor.build(
        (source.pack(jnp.asarray(codes(4)), 4),),
        jnp.ones((K // GROUP, N)),
        layout=source,
        segments=(qjax.tensor.Segment(4, GROUP),),
        affine=qjax.tensor.Affine.CENTERED,
    )
    run = functools.partial(qjax.relayout, qt, target)
    return lambda: jax.block_until_ready(run()), lambda qt: digest(qt.words[0])


def _quantize() -> Engine:
    w = jnp.asarray(weight())
    run = functools.partial(qjax.quantize, w, bits=4, group_size=GROUP)
    return lambda: jax.block_until_ready(run()), lambda qt: distance(
        qjax.dequantize(qt).T
    )
