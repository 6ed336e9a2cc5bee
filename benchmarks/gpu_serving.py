"""What a process of `gpu_matmul.py` does: it packs, compares and times one library."""

from collections.abc import Callable
from typing import Any

import gpu_device
import gpu_engines
import gpu_weights
import harness
import numpy as np

Figures = dict[str, Any]


class Server:
    """Does what is asked of one library."""

    def __init__(self, library: str) -> None:
        self._library = library
        self._weights: dict[str, gpu_weights.Weight] = {}
        self._bound: dict[str, gpu_weights.Bound] = {}
        self._moves: dict[str, Callable[[], Figures]] = {}

    def answer(self, request: Figures) -> Any:
        match request:
            case {"shape": [k, n]}:
                return self._pack(k, n)
            case {"m": m}:
                return {name: attempt(self._bind, name, m) for name in self._weights}
            case {"time": name}:
                return attempt(lambda: self._bound[name].time(1)._asdict())
            case {"rates": small}:
                return gpu_device.rates(small=small)
            case {"layouts": [k, n], "small": small}:
                self._moves = gpu_device.layout_moves(k, n, small=small)
                return list(self._moves)
            case {"move": name}:
                return {"name": name} | attempt(self._moves[name])
            case _:
                return device()

    def _pack(self, k: int, n: int) -> Figures:
        # What was there before leaves memory first.
        self._weights, self._bound = {}, {}
        try:
            makers = self._makers()(k, n)
        except Exception as error:
            return {self._library: {"failed": harness.reason(error)}}
        return {name: attempt(self._make, name, make) for name, make in makers.items()}

    def _makers(self) -> Callable[[int, int], gpu_weights.Weights]:
        if self._library in gpu_engines.LIBRARIES:
            return gpu_engines.LIBRARIES[self._library]
        import gpu_peers

        return gpu_peers.LIBRARIES[self._library]

    def _make(self, name: str, make: Callable[[], gpu_weights.Weight]) -> Figures:
        weight = self._weights[name] = make()
        return {"bits": weight.bits, "weight_bytes": weight.nbytes}

    def _bind(self, name: str, m: int) -> Figures:
        self._bound.pop(name, None)
        weight = self._weights[name]
        x = gpu_weights.rows(m, len(weight.columns))
        bound = self._bound[name] = weight.bind(x)
        error = checked(bound.result(), x, weight)
        bound.time(1)  # compiles what is timed
        return {"error": error}


def attempt(act: Callable[..., Figures], *arguments: Any) -> Figures:
    """What a function returns, or the error that it raises."""
    try:
        return act(*arguments)
    except Exception as error:
        return {"failed": harness.reason(error)}


def checked(found: np.ndarray, x: np.ndarray, weight: gpu_weights.Weight) -> float:
    """Compares the sampled part of a product; returns its relative error."""
    expected = x[: gpu_weights.CHECKED[0]].astype(np.float64) @ weight.columns
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    # Not >: NaN is wrong, too.
    if not error <= weight.tolerance:
        raise ValueError(f"wrong result: relative error {error:.1e}")
    return error


def device() -> Figures:
    """The device that JAX computes on."""
    import jax

    first = jax.devices()[0]
    capability = getattr(first, "compute_capability", None)
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "capability": capability,
    }
