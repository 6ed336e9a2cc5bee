"""Makes the vectors beside this file: random blocks, and what gguf makes of them.

Run by hand: ``pip install gguf==0.19.0 && python tests/golden/gguf/make_vectors.py``.
Of the types that are points of a grid, there are as many blocks as all points need.

The package cannot read Q1_0 and Q2_0. ggml can: with the source distribution of
llama-cpp-python 0.3.36 unpacked, in vendor/llama.cpp/ggml/src, ``gcc -O2 -shared -fPIC
-I../include -I. ggml-quants.c -Wl,--unresolved-symbols=ignore-all -lm -o
libquants.so``, and its path is an argument of this script, which then makes these two.
"""

import ctypes
import importlib.metadata
import json
import os
import sys
from pathlib import Path

import gguf
import numpy as np

FOLDER = Path(__file__).parent
# Where in a block its float16 numbers begin.
FLOATS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
    "NVFP4": (),
}
N, K = 3, 512
# The same of grids, with how many rows of K weights there are.
GRIDS = {
    "IQ1_S": (0, 40),
    "IQ1_M": (None, 40),
    "IQ2_XXS": (0, 3),
    "IQ2_XS": (0, 10),
    "IQ2_S": (0, 20),
    "IQ3_XXS": (0, 3),
    "IQ3_S": (0, 5),
    "TQ1_0": (52, 3),
    "TQ2_0": (64, 3),
}
# Weights and bytes of a block.
OF_GGML = {"Q1_0": (128, 18), "Q2_0": (64, 18)}


def put(raw: np.ndarray, begin: int | None, values: np.ndarray) -> None:
    """Writes float16 numbers into blocks."""
    if begin is not None:
        raw[..., begin : begin + 2] = values[..., None].view(np.uint8)
        return
    # IQ1_M has a nibble in each of four words.
    words = np.ascontiguousarray(raw[..., 48:]).view(np.uint16)
    nibbles = values[..., None].view(np.uint16) >> np.arange(0, 16, 4, dtype=np.uint16)
    raw[..., 48:] = (words & 0x0FFF | nibbles << 12).view(np.uint8)


def cover(raw: np.ndarray, name: str, rng: np.random.Generator) -> None:
    """Has every point of a grid in some block, in an order of their own."""
    count = raw.shape[0] * raw.shape[1] * (64 if name.startswith("IQ3") else 32)
    points = {"IQ1": 2048, "IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024}
    points |= {"IQ3_XXS": 256, "IQ3_S": 512}
    most = points["IQ1" if name.startswith("IQ1") else name]
    index = rng.permutation(np.resize(np.arange(most), max(count, most)))[:count]
    index = index.reshape(*raw.shape[:2], -1)
    if name == "IQ2_XXS":
        groups = raw[..., 2:].reshape(*raw.shape[:2], 8, 8)
        groups[..., :4] = index.reshape(*raw.shape[:2], 8, 4)
        raw[..., 2:] = groups.reshape(*raw.shape[:2], -1)
        return
    if name == "IQ2_XS":
        words = np.ascontiguousarray(raw[..., 2:66]).view(np.uint16)
        raw[..., 2:66] = (words & 0xFE00 | index.astype(np.uint16)).view(np.uint8)
        return
    low = 0 if name == "IQ1_M" else 2
    raw[..., low : low + index.shape[-1]] = index & 255
    high = (index >> 8).astype(np.uint16)
    if name == "IQ1_S":
        words = np.ascontiguousarray(raw[..., 34:]).view(np.uint16)
        shifts = np.arange(0, 12, 3, dtype=np.uint16)
        fields = (high.reshape(*high.shape[:2], 8, 4) << shifts).sum(
            -1, dtype=np.uint16
        )
        raw[..., 34:] = (words & 0xF000 | fields).view(np.uint8)
    elif name == "IQ1_M":
        nibbles = (high.reshape(*high.shape[:2], 16, 2) << np.array([0, 4])).sum(-1)
        raw[..., 32:48] = raw[..., 32:48] & 0x88 | nibbles
    elif name == "IQ2_S":
        fours = high.reshape(*high.shape[:2], 8, 4) << np.arange(0, 8, 2)
        raw[..., 66:74] = fours.sum(-1)
    elif name == "IQ3_S":
        raw[..., 66:74] = (high.reshape(*high.shape[:2], 8, 8) << np.arange(8)).sum(-1)


def make(number: int, name: str, begins: tuple[int | None, ...], n: int) -> None:
    """Writes the file of one type: all bytes random, all numbers finite."""
    rng = np.random.default_rng(number)
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (n, K // block, size), dtype=np.uint8)
    if name.startswith("IQ") and name in GRIDS:
        cover(raw, name, rng)
    for begin in begins:
        values = rng.standard_normal(raw.shape[:2]).astype(np.float16)
        values[0, 0] = 2.0**-24  # the smallest, subnormal in float16
        values[0, -1] = 0
        values[1, 0] = -65504
        put(raw, begin, values)
    if name == "MXFP4":  # 255 is no number; float32 holds all others but the largest
        raw[..., 0] = rng.integers(100, 140, raw.shape[:2])
        raw[0, :4, 0] = 0, 1, 2, 252
    if name == "NVFP4":  # without a sign, and 127 is no number
        raw[..., :4] = rng.integers(0, 127, (*raw.shape[:2], 4))
        raw[0, 0, :4] = 0, 1, 7, 126
    version = importlib.metadata.version("gguf")
    meta = {
        "source": f"gguf {version} (ggml-org/llama.cpp, gguf-py/gguf/quants.py), "
        "dequantize",
        "type": name,
        "gguf": version,
        "numpy": np.__version__,
    }
    np.savez_compressed(
        FOLDER / f"gguf__{name.lower()}__{n}x{K}__s{number}.npz",
        raw=raw,
        out_dequant=gguf.dequantize(raw.reshape(n, -1), kind),
        meta=json.dumps(meta),
    )


def make_by_ggml(number: int, name: str, library: ctypes.CDLL) -> None:
    """Writes the file of a type that the package does not read."""
    rng = np.random.default_rng(number)
    block, size = OF_GGML[name]
    raw = rng.integers(0, 256, (N, K // block, size), dtype=np.uint8)
    values = rng.standard_normal(raw.shape[:2]).astype(np.float16)
    values[0, :3] = 2.0**-24, 0, -32752
    put(raw, 0, values)
    out = np.empty((N, K), np.float32)
    read = getattr(library, f"dequantize_row_{name.lower()}")
    pointer = ctypes.c_void_p
    read(pointer(raw.ctypes.data), pointer(out.ctypes.data), ctypes.c_int64(out.size))
    meta = {
        "source": f"llama-cpp-python 0.3.36 (ggml-org/llama.cpp, ggml/src/"
        f"ggml-quants.c), dequantize_row_{name.lower()}",
        "type": name,
        "numpy": np.__version__,
    }
    np.savez_compressed(
        FOLDER / f"gguf__{name.lower()}__{N}x{K}__s{number}.npz",
        raw=raw,
        out_dequant=out,
        meta=json.dumps(meta),
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        library = ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)
        for number, name in enumerate(OF_GGML):
            make_by_ggml(1030 + number, name, library)
        sys.exit()
    for number, name in enumerate(FLOATS):
        make(1000 + number, name, FLOATS[name], N)
    for number, (name, (begin, n)) in enumerate(GRIDS.items()):
        make(1020 + number, name, (begin,), n)
