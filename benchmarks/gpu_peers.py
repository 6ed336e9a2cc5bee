"""The PyTorch libraries that `gpu_matmul.py` times: each packs by its own code.

A call is captured in a CUDA graph over all copies of the weight, and the graph is timed
by device events. What cannot be captured is timed call by call, and says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpu_weights import CHECKED, GROUP, Bound, Codes, Times, Weight, Weights, sampled

CACHE = 256 * 2**20  # copies of a weight exceed this many bytes together
LASTS = 0.02  # seconds of a measurement, at least
BANDWIDTH, ARITHMETIC, CALL = 4e12, 6e14, 4e-6

Call = Callable[[Any, Any], Any]  # of x and a copy


def _on_gpu(array: np.ndarray, dtype: Any = None) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array)).to("cuda", dtype)


def _bind(
    call: Call,
    copies: Sequence[Any],
    nbytes: int,
    bits: float,
    columns: np.ndarray,
    dtype: Any,
) -> Weight:
    def bind(x: np.ndarray) -> Bound:
        operand = _on_gpu(x, dtype)

        def result() -> np.ndarray:
            y = call(operand, copies[0])
            y = y[: CHECKED[0], torch.from_numpy(sampled(y.shape[1])).cuda()]
            return y.double().cpu().numpy()

        def time(repeats: int) -> Times:
            operations = 2 * x.size * call(operand, copies[0]).shape[1]
            once = max(nbytes / BANDWIDTH, operations / ARITHMETIC, CALL)
            rounds = int(LASTS / (once * len(copies))) + 1
            run, how = _captured(call, operand, copies)
            seconds = [_seconds(run, rounds) for _ in range(repeats + 1)][1:]
            return Times([s / (rounds * len(copies)) for s in seconds], how)

        return Bound(result, time)

    return Weight(bits, nbytes, columns, bind)


def _captured(call: Call, x: Any, copies: Sequence[Any]) -> tuple[Any, str]:
    def loop() -> None:
        for copy in copies:
            call(x, copy)

    # Before the capture: just-in-time compilation, autotuning, workspaces.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loop()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loop()
    except RuntimeError:
        torch.cuda.synchronize()
        return loop, "call by call"
    return graph.replay, "CUDA graph"


def _seconds(run: Callable[[], Any], rounds: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _tensors(
    call: Call, tensors: Sequence[Any], bits: float, columns: np.ndarray, dtype: Any
) -> Weight:
    """A weight of some tensors, of which copies are made."""
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    count = max(2, -(-CACHE // nbytes))
    copies = [[t.clone() for t in tensors] for _ in range(count)]
    return _bind(call, copies, nbytes, bits, columns, dtype)


def _layers(
    make: Callable[[], Any], bits: float, columns: np.ndarray, dtype: Any
) -> Weight:
    """A weight that a module packs, which is made anew for every copy."""
    first = make()
    tensors = [*first.parameters(), *first.buffers()]
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    count = max(2, -(-CACHE // nbytes))
    copies = [first, *(make() for _ in range(count - 1))]
    return _bind(lambda x, layer: layer(x), copies, nbytes, bits, columns, dtype)


def _dense(codes: Codes, dtype: Any) -> Any:
    """The weight ``[k, n]``, formed on the device."""
    q, scale, zero = map(_on_gpu, codes)
    groups = q.float().view(len(scale), GROUP, -1) - zero[:, None].float()
    return (groups * scale[:, None].float()).view(q.shape).to(dtype)


def torch_weights(k: int, n: int) -> Weights:
    """cuBLAS, and the tinygemm kernel in PyTorch itself."""

    def dense() -> Weight:
        codes = Codes.random(k, n, 4)
        weight = _dense(codes, torch.bfloat16)
        call = lambda x, w: torch.mm(x, w[0])  # noqa: E731
        return _tensors(call, [weight], 16, codes.columns, torch.bfloat16)

    def tinygemm() -> Weight:
        codes = Codes.random(k, n, 4)
        q = _on_gpu(codes.q.T)
        pairs = q[:, ::2] << 4 | q[:, 1::2]
        words = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        scale = _on_gpu(codes.scale, torch.float32)
        zero = (8 - _on_gpu(codes.zero, torch.float32)) * scale
        parameters = torch.stack([scale, zero], -1).bfloat16().contiguous()

        def call(x: Any, w: Any) -> Any:
            return torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1])

        tensors = [words, parameters]
        return _tensors(call, tensors, 4, codes.columns, torch.bfloat16)

    return {"dense bf16, cuBLAS": dense, "torch int4pack (tinygemm)": tinygemm}


def gemlite_weights(k: int, n: int) -> Weights:
    from gemlite.helper import A16Wn_HQQ_INT

    def make(bits: int) -> Weight:
        codes = Codes.random(k, n, bits)
        packer = A16Wn_HQQ_INT(device="cuda:0", dtype=torch.float16, W_nbits=bits)
        q = _on_gpu(codes.q.T)
        scale = _on_gpu(codes.scale.T, torch.float16)
        zero = _on_gpu(codes.zero.T, torch.float16)

        def layer() -> Any:
            return packer.from_weights(q.clone(), scale.clone(), zero.clone())

        return _layers(layer, bits, codes.columns, torch.float16)

    return {f"GemLite, {bits} bits": _later(make, bits) for bits in (4, 2, 8)}


def _later(make: Callable[[Any], Weight], argument: Any) -> Callable[[], Weight]:
    return lambda: make(argument)


def gptq_tensors(codes: Codes, bits: int) -> dict[str, Any]:
    """The tensors of a GPTQ checkpoint of format v2: zeros as they are."""
    k, n = codes.q.shape
    tensors = {
        "qweight": _bit_stream(codes.q, bits),
        "qzeros": _bit_stream(codes.zero.T, bits).T,
        "scales": codes.scale,
        "g_idx": (np.arange(k) // GROUP).astype(np.int32),
    }
    assert tensors["qweight"].shape == (k * bits // 32, n)
    return {
        name: torch.from_numpy(np.ascontiguousarray(array))
        for name, array in tensors.items()
    }


def _bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs fields along the first axis, little end first, into int32."""
    block = np.lcm(bits, 32) // bits
    fields = codes.reshape(-1, block, codes.shape[1])
    words = np.zeros((len(fields), block * bits // 32, codes.shape[1]), np.uint32)
    for i in range(block):
        word, shift = divmod(i * bits, 32)
        field = fields[:, i].astype(np.uint32)
        words[:, word] |= field << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= field >> np.uint32(32 - shift)
    return words.reshape(-1, codes.shape[1]).view(np.int32)


def humming_weights(k: int, n: int) -> Weights:
    from humming.layer import HummingLayer

    def make(bits: int) -> Weight:
        codes = Codes.random(k, n, bits, symmetric=True)
        tensors = gptq_tensors(codes, bits)

        def layer() -> Any:
            config = {
                "quant_method": "gptq",
                "bits": bits,
                "group_size": GROUP,
                "desc_act": False,
                "sym": True,
            }
            module = HummingLayer(
                shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16
            ).cuda()
            module.load_from_tensors(tensors)
            module.transform()
            return module

        return _layers(layer, bits, codes.columns, torch.float16)

    return {f"Humming, {bits} bits": _later(make, bits) for bits in (4, 2, 3, 8)}


def bitsandbytes_weights(k: int, n: int) -> Weights:
    import bitsandbytes
    from bitsandbytes import functional

    def nf4() -> Weight:
        codes = Codes.random(k, n, 4)
        dense = _dense(codes, torch.bfloat16).T.contiguous()
        packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
        # Rounded to other codes: what it multiplies by is what it dequantizes to.
        back = functional.dequantize_4bit(packed, state).T[
            :, torch.from_numpy(sampled(n))
        ]

        def call(x: Any, w: Any) -> Any:
            return bitsandbytes.matmul_4bit(x, w[0].t(), quant_state=state)

        columns = back.double().cpu().numpy()
        weight = _tensors(call, [packed], 4, columns, torch.bfloat16)
        # The scales, one float32 a block, are shared by all copies.
        return Weight(4, weight.nbytes + state.absmax.nbytes, columns, weight.bind)

    return {"bitsandbytes NF4": nf4}


def gptqmodel_weights(k: int, n: int) -> Weights:
    from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
    from gptqmodel.utils.exllamav2 import ScratchSpace

    codes = Codes.random(k, n, 4, symmetric=True)
    tensors = gptq_tensors(codes, 4)
    shape = {
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "in_features": k,
        "out_features": n,
    }

    def marlin() -> Any:
        layer = MarlinLinear(sym=True, register_buffers=True, **shape)
        layer.load_state_dict(tensors, strict=False)
        layer = layer.cuda()
        layer.post_init()
        return layer.eval()

    def exllama() -> Any:
        layer = ExllamaV2Linear(sym=True, register_buffers=True, **shape)
        layer.load_state_dict(tensors, strict=False)
        layer = layer.cuda()
        layer.post_init(ScratchSpace(layer.temp_dq_size(), 0))
        return layer.eval()

    layers = {"Marlin (GPTQModel)": marlin, "ExLlamaV2 (GPTQModel)": exllama}

    def make(layer: Callable[[], Any]) -> Weight:
        return _layers(layer, 4, codes.columns, torch.float16)

    return {name: _later(make, layer) for name, layer in layers.items()}


def on_cuda(weights: Callable[[int, int], Weights]) -> Callable[[int, int], Weights]:
    """Refuses at once where there is no GPU, and leaves gradients out."""

    def checked(k: int, n: int) -> Weights:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
        torch.set_grad_enabled(False)
        return weights(k, n)

    return checked


LIBRARIES: dict[str, Callable[[int, int], Weights]] = {
    "torch": on_cuda(torch_weights),
    "gemlite": on_cuda(gemlite_weights),
    "humming": on_cuda(humming_weights),
    "bitsandbytes": on_cuda(bitsandbytes_weights),
    "gptqmodel": on_cuda(gptqmodel_weights),
}
