"""Makes the vectors beside this file: random blocks, and what gguf makes of them.

Run by hand: ``pip install gguf==0.19.0 && python tests/golden/gguf/make_vectors.py``.
"""

import importlib.metadata
import json
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
}
N, K = 3, 512


def make(number: int, name: str) -> None:
    """Writes the file of one type: all bytes random, all numbers finite."""
    rng = np.random.default_rng(number)
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (N, K // block, size), dtype=np.uint8)
    for begin in FLOATS[name]:
        values = rng.standard_normal(raw.shape[:2]).astype(np.float16)
        values[0, 0] = 2.0**-24  # the smallest, subnormal in float16
        values[0, -1] = 0
        values[1, 0] = -65504
        raw[..., begin : begin + 2] = values[..., None].view(np.uint8)
    if name == "MXFP4":  # 255 is no number; float32 holds all others but the largest
        raw[..., 0] = rng.integers(100, 140, raw.shape[:2])
        raw[0, :4, 0] = 0, 1, 2, 252
    version = importlib.metadata.version("gguf")
    meta = {
        "source": f"gguf {version} (ggml-org/llama.cpp, gguf-py/gguf/quants.py), "
        "dequantize",
        "type": name,
        "gguf": version,
        "numpy": np.__version__,
    }
    np.savez_compressed(
        FOLDER / f"gguf__{name.lower()}__{N}x{K}__s{number}.npz",
        raw=raw,
        out_dequant=gguf.dequantize(raw.reshape(N, -1), kind),
        meta=json.dumps(meta),
    )


if __name__ == "__main__":
    for number, name in enumerate(FLOATS):
        make(1000 + number, name)
