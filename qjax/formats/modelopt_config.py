"""What NVIDIA's ModelOpt says that it quantized, in config.json or beside it.

Newer directories have a ``quantization_config``; older ones ``hf_quant_config.json``,
whose object "quantization" says the same in other names.

Source: NVIDIA/Model-Optimizer, modelopt/torch/export/quant_utils.py
(``process_layer_quant_config``) and convert_hf_config.py, release 0.47.0;
vllm-project/vllm, vllm/model_executor/layers/quantization/modelopt.py, commit
00155cdecca722d98e34234c3d172725b7720b7d.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any, Literal, get_args

from qjax.formats.checks import check_choice, check_object, check_strings

Algorithm = Literal[
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "MXFP8",
    "NVFP4",
    "W4A16_NVFP4",
]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
# Each matrix has the algorithm that "quantized_layers" gives.
_MIXED = "MIXED_PRECISION"
# vLLM calls NVFP4 so, and takes either name for all algorithms.
_METHODS = ("modelopt", "modelopt_fp4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What ModelOpt says about the matrices of a checkpoint.

    Attributes:
      algorithm: What its ``quant_algo`` says, unless there are ``layers``.
      layers: Algorithms by the paths of modules, where they differ; other modules are
        then dense.
      ignored: Paths that stay dense, with the wildcards of `fnmatch`.
    """

    algorithm: Algorithm = "NVFP4"
    layers: Mapping[str, Algorithm] | None = None
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads a ``quantization_config``, or all of ``hf_quant_config.json``.

        How activations and the KV cache are quantized is read over, and so are
        ``config_groups``, which repeat what ``quant_algo`` says, and the size of
        groups, which is that of the tensors.

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value, or asks for an algorithm
            that is not read.
        """
        method = entry.get("quant_method", _METHODS[0])
        check_choice("quant_method", method, _METHODS)
        said = check_object("quantization", entry.get("quantization", entry))
        if said.get("nvfp4_embed"):
            raise ValueError(
                f"nvfp4_embed={said['nvfp4_embed']!r} quantizes embeddings, with other "
                "scales than those of matrices, and is not supported."
            )
        aliases = ("exclude_modules", "ignore")
        field = next((name for name in aliases if said.get(name)), aliases[0])
        ignored = check_strings(field, said.get(field) or [])
        algorithm = _algorithm("quant_algo", said.get("quant_algo"), _MIXED)
        if algorithm == _MIXED:
            return cls(layers=_layers(said.get("quantized_layers")), ignored=ignored)
        return cls(algorithm=algorithm, ignored=ignored)

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one matrix, or None where it is left dense.

        Args:
          module: Path of the matrix, such as "model.layers.0.mlp.down_proj". Where
            algorithms differ, that of a module is also that of all below it: experts.
        """
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in self.ignored):
            return None
        if self.layers is None:
            return dataclasses.replace(self, ignored=())
        path = module
        while path not in self.layers and path:
            path = path.rpartition(".")[0]
        return Config(algorithm=self.layers[path]) if path else None


def _algorithm(name: str, value: Any, *others: str) -> Any:
    """Reads the name of an algorithm, which some releases write in small letters."""
    found = value.upper() if isinstance(value, str) else value
    check_choice(name, found, (*ALGORITHMS, *others))
    return found


def _layers(value: Any) -> Mapping[str, Algorithm]:
    layers = check_object("quantized_layers", value)
    return {
        path: _algorithm(
            f"{where}.quant_algo", check_object(where, one).get("quant_algo")
        )
        for path, one in layers.items()
        if (where := f"quantized_layers[{path!r}]")
    }
