"""What MLX says that it quantized, and what transformers says of "metal".

mlx-lm reads the object "quantization" of config.json, and writes it a second time as
``quantization_config``, without a ``quant_method``. Beside its three numbers stand the
paths of modules that differ, each with an object, true or false.

Source: ml-explore/mlx-lm, mlx_lm/utils.py, release 0.32.2; ml-explore/mlx,
python/mlx/nn/layers/quantized.py, release 0.32.4; huggingface/transformers,
src/transformers/utils/quantization_config.py (``MetalConfig``), release 5.23.0.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from qjax.formats.checks import check_choice, check_positive
from qjax.formats.patterns import ends_any, left_dense

Method = Literal["mlx", "metal"]
Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
METHODS: tuple[Method, ...] = get_args(Method)


class Kinds(NamedTuple):
    """What sizes of groups and widths of codes a mode has, its defaults first."""

    group_sizes: tuple[int, ...]
    widths: tuple[int, ...]


MODES: Mapping[Mode, Kinds] = types.MappingProxyType(
    {
        "affine": Kinds((64, 32, 128), (4, 2, 3, 5, 6, 8)),
        "mxfp4": Kinds((32,), (4,)),
        "mxfp8": Kinds((32,), (8,)),
        "nvfp4": Kinds((16,), (4,)),
    }
)
# Of transformers; it takes groups of any size.
METAL_WIDTHS = (2, 4, 8)
FIELDS = ("group_size", "bits", "mode")
# Whether activations are quantized, too, changes nothing here.
_READ_OVER = ("quant_method", "quantize_input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What MLX or transformers says about a matrix, or about all of a checkpoint.

    Attributes:
      group_size: Inputs that share a scale.
      bits: Width of a code.
      mode: "affine", or the kind of small floats.
      method: "mlx"; or "metal", where offsets have another name.
      modules: Configurations by the paths of modules that differ; None for those that
        stay dense.
      ignored: Patterns of paths that stay dense, of "metal".
    """

    group_size: int = 64
    bits: int = 4
    mode: Mode = "affine"
    method: Method = "mlx"
    modules: Mapping[str, "Config | None"] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def offsets(self) -> str:
        """Name of the tensor that is added."""
        return "biases" if self.method == "mlx" else "qbiases"

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the "quantization" of MLX, or the ``quantization_config`` of "metal".

        Args:
          entry: The parsed JSON object.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value.
          NotImplementedError: If it has a mode, or a field, that is not known.
        """
        method = entry.get("quant_method", "mlx")
        check_choice("quant_method", method, METHODS)
        if method == "metal":
            return _metal(entry)
        fields = {key: entry[key] for key in FIELDS if key in entry}
        for name in ("group_size", "bits"):
            if fields.get(name) is None:
                raise ValueError(f"quantization.{name} is missing.")
        whole = _one("quantization", fields)
        modules: dict[str, Config | None] = {}
        for path, said in entry.items():
            where = f"quantization[{path!r}]"
            if path in (*FIELDS, *_READ_OVER):
                continue
            if isinstance(said, Mapping):
                modules[path] = _one(where, said)
            elif said is False:
                modules[path] = None
            elif said is not True:
                raise NotImplementedError(
                    f"{where}={said!r} is not known: what stands beside {FIELDS} must "
                    "be the path of a module, with an object, true or false."
                )
        return dataclasses.replace(whole, modules=modules)

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".

        Raises:
          ValueError: If a pattern may fit the path in too many ways to be tried.
        """
        if ends_any(self.ignored, module):
            return None
        return self.modules.get(module, self)

    def to_json(self) -> dict[str, Any]:
        """What the configuration of MLX says of a matrix."""
        return {name: getattr(self, name) for name in FIELDS}


def _one(where: str, said: Mapping[str, Any]) -> Config:
    """Reads the three numbers of a module, or of all."""
    for name in said.keys() - {*FIELDS, *_READ_OVER}:
        raise NotImplementedError(f"{where}.{name}={said[name]!r} is not known.")
    mode: Any = said.get("mode", "affine")
    if mode not in tuple(MODES):  # which may be asked for what has no hash
        raise NotImplementedError(
            f"{where}.mode={mode!r} is not read; those are: {[*MODES]}."
        )
    kinds, found = MODES[mode], dict(said)
    for name, known in zip(FIELDS, kinds, strict=False):
        if found.get(name) is None:
            found[name] = known[0]
        value = found[name]
        if type(value) is not int or value not in known:
            raise ValueError(
                f"{where}.{name}={value!r} must be one of {tuple(sorted(known))} with "
                f"mode={mode!r}."
            )
    return Config(group_size=found["group_size"], bits=found["bits"], mode=mode)


def _metal(entry: Mapping[str, Any]) -> Config:
    bits, size = entry.get("bits", 4), entry.get("group_size", 64)
    if type(bits) is not int or bits not in METAL_WIDTHS:
        raise ValueError(f"bits={bits!r} must be one of {METAL_WIDTHS}.")
    check_positive("group_size", size)
    return Config(group_size=size, bits=bits, method="metal", ignored=left_dense(entry))
