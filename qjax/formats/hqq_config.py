"""HQQ's ``quantization_config``, and the tensors of a layer that repeat it.

Source: mobiusml/hqq, hqq/core/quantize.py and hqq/models/base.py, commit
e0b1d00e095653359da9de1d7dbb35a994aa6b96.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from qjax.formats.checks import check_choice, check_object, check_strings

# Fields of a word, by the width of a code.
FIELDS = {1: 8, 2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}
_WIDTHS = {8: 8, 6: 6, 5: 5, 4: 4, 3: 3, 2: 2, 1.58: 2, 1: 1}
_FLAGS = ("view_as_float", "channel_wise", "optimize", "round_zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What an HQQ ``quantization_config`` says about one module.

    Attributes:
      nbits: 8, 6, 5, 4, 3, 2, 1.58 (codes 0 to 2, packed in two bits) or 1.
      group_size: Elements that share a scale; None for no grouping, one scale a row
        (axis 1) or column (axis 0) of the ``[n, k]`` weight.
      axis: 1 where groups are runs of the flattened weight, 0 where they are strided.
      view_as_float: Whether the words are saved as if they were floats.
      channel_wise: Written back as it is; False would be one scale a matrix.
      optimize: How the codes were found; written back as it is.
      round_zero: Likewise.
      offload_meta: Likewise.
      skip_modules: Tags or paths of modules that stay dense. A tag is a path without
        "model", "layers" and numbers, such as "self_attn.q_proj".
      tagged: The configurations by tag, where modules differ; others stay dense.
    """

    nbits: int | float = 4
    group_size: int | None = 64
    axis: int = 1
    view_as_float: bool = False
    channel_wise: bool = True
    optimize: bool = True
    round_zero: bool = False
    offload_meta: bool = False
    skip_modules: tuple[str, ...] = ()
    tagged: tuple[tuple[str, "Config"], ...] = ()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config`` of config.json.

        Args:
          entry: The parsed JSON object, with ``quant_config`` (one for all modules, or
            one a tag) and ``skip_modules``.

        Returns:
          The configuration; `of` gives that of one module.

        Raises:
          ValueError: If a field is missing, has a wrong type or value, or asks for
            quantized scales or zeros.
        """
        skip = check_strings("skip_modules", entry.get("skip_modules") or [])
        quant = entry.get("quant_config")
        if not isinstance(quant, Mapping) or not quant:
            raise ValueError(f"quant_config={quant!r} must be an object.")
        if "weight_quant_params" in quant:
            return cls(**_parameters(quant), skip_modules=skip)
        for tag, one in quant.items():
            if not isinstance(one, Mapping) or "weight_quant_params" not in one:
                raise ValueError(f"quant_config[{tag!r}] has no weight_quant_params.")
        tagged = tuple((tag, cls(**_parameters(one))) for tag, one in quant.items())
        return cls(skip_modules=skip, tagged=tagged)

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        tag = tag_of(module)
        if module in self.skip_modules or tag in self.skip_modules:
            return None
        return dict(self.tagged).get(tag) if self.tagged else self

    @property
    def bits(self) -> int:
        """Width of a packed code."""
        check_choice("nbits", self.nbits, _WIDTHS)
        return _WIDTHS[self.nbits]

    def to_json(self) -> dict[str, Any]:
        """Writes a ``quant_config``, of all modules or of those of one tag."""
        fields = ("nbits", "group_size", "axis", *_FLAGS)
        return {
            "weight_quant_params": {name: getattr(self, name) for name in fields},
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": self.offload_meta,
        }


def tag_of(module: str) -> str:
    """The name by which HQQ and transformers know a module, and others like it.

    Args:
      module: Its path, such as "model.layers.0.mlp.up_proj".

    Returns:
      The path without "model", "layers" and numbers, such as "mlp.up_proj".
    """
    parts = [part for part in module.split(".") if part not in ("model", "layers")]
    return ".".join(part for part in parts if not part.isnumeric())


def _parameters(quant: Mapping[str, Any]) -> dict[str, Any]:
    """Checks one ``quant_config`` and gives the arguments of `Config`."""
    for name in ("scale_quant_params", "zero_quant_params"):
        if quant.get(name) is not None:
            raise ValueError(
                f"{name}={quant[name]!r} must be null: quantized scales and zeros are "
                "not read; quantize with quant_scale=False and quant_zero=False."
            )
    weight = check_object("weight_quant_params", quant["weight_quant_params"])
    nbits, axis = weight.get("nbits"), weight.get("axis", 0)
    group_size = weight.get("group_size")
    if type(nbits) not in (int, float) or nbits not in _WIDTHS:
        raise ValueError(f"nbits={nbits!r} must be one of {tuple(_WIDTHS)}.")
    if type(axis) is not int or axis not in (0, 1):
        raise ValueError(f"axis={axis!r} must be 0 or 1.")
    positive = type(group_size) is int and 0 < group_size < 2**31  # int32 in files
    if not positive and group_size is not None:
        raise ValueError(f"group_size={group_size!r} must be positive or null.")
    if nbits == 3 and group_size is None:
        raise ValueError("group_size=null with nbits=3, which HQQ cannot unpack.")
    flags = {name: weight[name] for name in _FLAGS if name in weight}
    flags["offload_meta"] = quant.get("offload_meta", False)
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise ValueError(f"{name}={flag!r} must be true or false.")
    if not flags.get("channel_wise", True):
        raise ValueError("channel_wise=false, one scale a matrix, is not supported.")
    return {"nbits": nbits, "group_size": group_size, "axis": axis, **flags}


def metadata(
    config: Config, dtype: DTypeLike, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The tensors in which a saved layer repeats its configuration.

    Args:
      config: The layer's configuration.
      dtype: The dtype of its scales.
      shape: Shape of its torch weight, ``(n, k)``.

    Returns:
      Arrays by upstream name; texts as uint8.
    """
    container = "int32" if config.bits == 3 else "uint8"
    packing = "3bit_32" if config.bits == 3 else f"{8 // FIELDS[config.bits]}bit_u8"
    texts = {
        "packing": packing,
        "unpack_view_dtype": f"torch.{container}",
        "compute_dtype": f"torch.{jnp.dtype(dtype).name}",
    }
    flags = {name: getattr(config, name) for name in (*_FLAGS, "offload_meta")}
    flags |= {"quant_scale": False, "quant_zero": False}
    flags |= {"stores_quant_config": True, "encoded_state_dict": True}
    nbits = np.float32 if isinstance(config.nbits, float) else np.int32
    tensors = {
        "shape": np.array(shape, np.int64),
        "nbits": np.asarray(config.nbits, nbits),
        "axis": np.asarray(config.axis, np.int32),
        **{k: np.frombuffer(text.encode(), np.uint8) for k, text in texts.items()},
        **{k: np.asarray(flag, np.uint8) for k, flag in flags.items()},
    }
    if config.group_size is not None:
        tensors["group_size"] = np.asarray(config.group_size, np.int32)
    return tensors
