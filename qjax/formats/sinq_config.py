"""What SINQ says of a checkpoint, in config.json and in a file for each module's codes.

``quantization_config`` has what was asked for. The file
``model.safetensors.index.json.meta.json`` has, by the path of each module, an object
"meta" of what that module got.

Source: huawei-csl/SINQ, sinq/patch_model.py and sinq/quantizer.py, package sinq 0.2.0;
huggingface/transformers, src/transformers/utils/quantization_config.py, release 5.23.0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.bits import whole
from qjax.formats.checks import check_choice, check_method, check_object

SIDECAR = "model.safetensors.index.json.meta.json"
# Names of packings, which a width has.
PACKINGS = {
    8: "8bit_u8",
    6: "6bit_32",
    5: "5bit_32",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}
_DTYPES = ("torch.float16", "torch.bfloat16", "torch.float32")
# Those whose codes stand for other numbers, and those of one zero in all.
_DECLINED = ("nf4", "nf3", "noz")
_FIELDS = {"nbits", "group_size", "shape", "axis", "packing", "method", "awq_scale"}
_FIELDS |= {"compute_dtype", "unpack_view_dtype", "view_as_float"}
_FIELDS |= {"scale.shape", "zero.shape"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What SINQ says about one module.

    Attributes:
      nbits: 8, 6, 5, 4, 3, 2, 1.58 (codes 0 to 2, packed in two bits) or 1.
      shape: torch's ``(N, K)``.
      compute_dtype: Name of the dtype that the weight is computed in.
      modules: What the file beside the weights says, by the paths of modules; others
        are dense.
    """

    nbits: int | float = 4
    shape: tuple[int, int] = (0, 0)
    compute_dtype: str = "bfloat16"
    modules: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads the ``quantization_config``, and the file beside the weights.

        Args:
          entry: The parsed JSON object, with that of the file under its name.

        Returns:
          The configuration of all modules.

        Raises:
          ValueError: If a field has a wrong type or value, or asks for a kind of
            weight that is not read.
        """
        check_method(entry, "sinq")
        check_choice("tiling_mode", entry.get("tiling_mode", "1D"), ("1D",))
        return cls(modules=check_object(SIDECAR, entry.get(SIDECAR)))

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".

        Raises:
          ValueError: As `from_json`.
        """
        if module not in self.modules:
            return None
        said = check_object(f"{SIDECAR}: {module}", self.modules[module])
        meta = check_object(f"{module}: meta", said.get("meta"))
        if unknown := sorted(meta.keys() - _FIELDS):
            raise ValueError(f"meta has {unknown}; known: {sorted(_FIELDS)}.")
        nbits: Any = meta.get("nbits")
        method = meta.get("method")
        check_choice("nbits", nbits if _is_number(nbits) else str(nbits), PACKINGS)
        check_choice("packing", meta.get("packing"), (PACKINGS[nbits],))
        for name, wanted in (("axis", 1), ("view_as_float", False)):
            check_choice(name, meta.get(name, wanted), (wanted,))
        check_choice("awq_scale", meta.get("awq_scale"), (None,))
        check_choice("compute_dtype", meta.get("compute_dtype"), _DTYPES)
        if not isinstance(method, str) or any(x in method.lower() for x in _DECLINED):
            raise ValueError(
                f"method={method!r} is not read: it must not have any of {_DECLINED}; "
                "quantize with the codes and zeros of 'sinq' or 'asinq'."
            )
        shape = meta.get("shape")
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(0 < (whole(size) or 0) < 2**31 for size in shape)
        ):
            raise ValueError(f"shape={shape!r} must be [N, K].")
        dtype = meta["compute_dtype"].removeprefix("torch.")
        return Config(nbits=nbits, shape=(shape[0], shape[1]), compute_dtype=dtype)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 2 if self.nbits == 1.58 else int(self.nbits)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
