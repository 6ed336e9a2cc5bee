"""A tiny GPTQ checkpoint in memory, to be bent out of shape and written down.

Also a reader of safetensors files that shares nothing with qjax.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

K, N, BITS, GROUP = 32, 64, 4, 16
MODULE = "model.layers.0.q_proj"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DTYPES = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I32": np.int32,
}


@dataclasses.dataclass
class Checkpoint:
    """What a directory will hold.

    Attributes:
      tensors: By full name.
      config: For config.json.
      shards: Names of the tensors in each shard; None writes one file.
      files: Other JSON files, by name.
      metadata: For the header of each safetensors file.
      after: What to do with the directory once it is written.
    """

    tensors: dict[str, np.ndarray]
    config: dict
    shards: dict[str, list[str]] | None = None
    files: dict[str, dict] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] | None = None
    after: list[Callable[[Path], object]] = dataclasses.field(default_factory=list)

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for file, entry in {"config.json": self.config, **self.files}.items():
            (directory / file).write_text(json.dumps(entry))
        if self.shards is None:
            save_file(self.tensors, directory / "model.safetensors", self.metadata)
        else:
            for file, names in self.shards.items():
                held = {name: self.tensors[name] for name in names}
                save_file(held, directory / file, self.metadata)
            weight_map = {n: file for file, names in self.shards.items() for n in names}
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        for action in self.after:
            action(directory)
        return directory

    def shard(self) -> None:
        """Deals the tensors out to two files; no module is whole in one."""
        names = sorted(self.tensors)
        self.shards = {file: names[i::2] for i, file in enumerate(SHARDS)}


def matrix(seed: int = 0, k: int = K, n: int = N, bits: int = BITS, group: int = GROUP):
    """Random GPTQ tensors of one module; zeros never have all bits set."""
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    return {
        "qweight": rng.integers(-(2**31), 2**31, (k * bits // 32, n), dtype=np.int32),
        "qzeros": np.full((groups, n * bits // 32), 0x77777777, np.int32),
        "scales": rng.uniform(0.5, 1, (groups, n)).astype(np.float16),
        "g_idx": np.arange(k, dtype=np.int32) // group,
    }


def checkpoint() -> Checkpoint:
    """One quantized module with a bias, among dense tensors of three dtypes."""
    rng = np.random.default_rng(1)
    tensors = {f"{MODULE}.{name}": array for name, array in matrix().items()}
    tensors[f"{MODULE}.bias"] = rng.standard_normal(N).astype(np.float16)
    tensors["lm_head.weight"] = rng.standard_normal((8, N)).astype(ml_dtypes.bfloat16)
    tensors["model.norm.weight"] = rng.standard_normal(N).astype(np.float32)
    quantization = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP}
    return Checkpoint(
        tensors=tensors,
        config={"model_type": "llama", "quantization_config": quantization},
    )


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory's safetensors files."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        data = file.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
                start = begin + entry["data_offsets"][0]
                flat = np.frombuffer(data, dtype, math.prod(shape), start)
                tensors[name] = flat.reshape(shape)
    return tensors
