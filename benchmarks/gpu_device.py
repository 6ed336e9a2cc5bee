"""What `gpu_matmul.py` measures beside products: the device's rates, moves of codes."""

import functools
from collections.abc import Callable
from typing import Any

from gpu_ours import packed
from gpu_weights import Codes


def rates(*, small: bool) -> dict[str, float]:
    """What this device reaches: bytes copied and bfloat16 operations a second.

    The roofs of the figures; measured as everything else is.
    """
    import jax
    import jax.numpy as jnp

    from qjax.tune import timing

    words, side = (2**20, 512) if small else (2**27, 8192)

    def seconds(op: Callable[..., Any], operands: list[Any], weights: list[Any]) -> Any:
        rounds = 1 if small else 4
        program = timing.chained(op, rounds)
        runs = timing.timed(lambda: program(operands, weights), 5)
        return min(runs) / (rounds * len(weights))

    # Not zeros, which a GPU moves and multiplies faster.
    arrays = [jax.random.bits(jax.random.key(i), words) for i in range(2)]
    copy = seconds(lambda w: w + jnp.uint32(1), [], arrays)
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = seconds(jnp.dot, [x], [x, x + 1])
    return {"bytes": 2 * 4 * words / copy, "operations": 2 * side**3 / product}


def layout_moves(k: int, n: int, *, small: bool) -> dict[str, Callable[[], Any]]:
    """Moves of 4-bit codes between layouts, and to the dense weight.

    Returns:
      For each, by name, what gives its seconds and bytes.
    """
    import jax
    import jax.numpy as jnp

    import qjax
    from qjax.formats import awq, gptq, tiles, tinygemm
    from qjax.pallas import configs
    from qjax.pallas.dequantize import dequantize as kernel
    from qjax.tune import timing

    layouts = {
        "GPTQ": gptq.Stream(),
        "AWQ": awq.Gemm(),
        "tinygemm": tinygemm.TensorCoreTiled(),
        "Tiles": tiles.Tiles(),
    }
    stream = packed(Codes.random(k, n, 4), 4)
    codes, dense = stream.words[0].nbytes, 2 * k * n
    to_dense = functools.partial(qjax.dequantize, dtype=jnp.bfloat16)

    def launched(w: Any) -> Any:
        return kernel(w, jnp.bfloat16, configs.for_dequantize(w))

    def move(source: Any, op: Callable[..., Any], written: int) -> dict[str, Any]:
        w = qjax.relayout(stream, source)
        count = 2 if small else timing.copies_beyond(w.nbytes)
        copies = [jax.tree.map(jnp.copy, w) for _ in range(count)]
        rounds = 1 if small else timing.rounds(codes + written, 0, count)
        program = timing.chained(op, rounds)
        seconds = timing.timed(lambda: program([], copies), 5)
        return {
            "seconds": [s / (rounds * count) for s in seconds],
            "bytes": codes + written,
        }

    moves: dict[str, Callable[[], Any]] = {}
    for name, source in layouts.items():
        for other, target in layouts.items():
            if other != name:
                words = functools.partial(_relaid, layout=target)
                moves[f"{name} to {other}"] = functools.partial(
                    move, source, words, codes
                )
        moves[f"{name} to dense bf16"] = functools.partial(
            move, source, to_dense, dense
        )
    if not small:
        moves["Tiles to dense bf16, kernel"] = functools.partial(
            move, layouts["Tiles"], launched, dense
        )
    return moves


def _relaid(w: Any, layout: Any) -> Any:
    import qjax

    return qjax.relayout(w, layout).words
