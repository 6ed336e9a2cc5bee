"""optimum-quanto's map of modules, and how many inputs each of them has.

``quanto_qmap.json`` says of each module as what weights and activations are quantized.
It does not say the shape of a weight, and neither do the tensors of one of 2 and 4
bits: the grouped weight ``[n * k / g, g]`` may be of one k or another. It follows from
the number of outputs, which a bias has, from ``config.json``, whose model gives its
modules names and sizes, and where g is none of the sizes that quanto cuts inputs into:
k is g then. What qjax writes says ``in_features``, which quanto does not look at.

Source: huggingface/optimum-quanto, optimum/quanto/quantize.py,
optimum/quanto/models/transformers_models.py and optimum/quanto/nn/qmodule.py, release
0.2.7; huggingface/transformers, src/transformers/models (names and sizes), release
5.23.0.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from qjax.bits import whole
from qjax.formats.checks import check_method, check_object, check_positive

# Of what is read, the bits of a code.
WIDTHS = {"qint2": 2, "qint4": 4, "qint8": 8, "qfloat8_e4m3fn": 8}
FLOAT8 = "qfloat8_e4m3fn"
# Other names of what is read, and what is not.
_ALIASES = {"qfloat8": FLOAT8}
_OTHERS = ("qfloat8_e4m3fnuz", "qfloat8_e5m2")
_FIELDS = ("weights", "activations", "in_features")
# In groups of these, the first that fits, quanto cuts the inputs of a wider weight.
_SIZES = (128, 96, 64, 32)
DATA, SCALE = "weight._data._data", "weight._scale"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What ``quanto_qmap.json`` and the model say, of all modules or of one.

    Attributes:
      weights: The type of codes, a key of `WIDTHS`; None where it is that of ``of``.
      k: Number of inputs, which 2 and 4 bits do not tell; None where it is not known.
      outputs: Number of outputs, where a bias says it.
      name: The path of the module.
      modules: The configuration of each module, by path.
      model: The parsed ``config.json``.
      biases: Lengths of biases by the paths of their modules.
    """

    weights: str | None = None
    k: int | None = None
    outputs: int | None = None
    name: str = ""
    modules: Mapping[str, "Config"] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return WIDTHS.get(self.weights or "", 0)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Config":
        """Reads ``quanto_qmap.json``.

        Args:
          entry: The parsed JSON object; ``quant_method`` may be a part of it.

        Returns:
          The configuration.

        Raises:
          ValueError: If it is no map of modules to objects, or a field has a wrong
            type or value.
          NotImplementedError: If weights are of a type that is not read.
        """
        check_method(entry, "quanto")
        paths = [path for path in entry if path != "quant_method"]
        # One that is dense may have its activations quantized, or say "none".
        modules = {path: _module(path, entry[path]) for path in paths}
        return cls(modules={path: one for path, one in modules.items() if one})

    def with_model(self, model: Mapping[str, Any], shapes: Mapping[str, Any]) -> Any:
        """Adds what the model says of its modules.

        Args:
          model: The parsed ``config.json``.
          shapes: All tensors of the checkpoint, by name.

        Returns:
          The configuration with it.
        """
        biases = {
            name.removesuffix(".bias"): array.shape[0]
            for name, array in shapes.items()
            if name.endswith(".bias") and len(array.shape) == 1
        }
        return dataclasses.replace(self, model=model, biases=biases)

    def of(self, module: str) -> "Config | None":
        """Returns the configuration of one module, or None where it is left dense.

        Args:
          module: The module's path, such as "model.layers.0.mlp.up_proj".
        """
        one = self.modules.get(module)
        if one is None:
            return None
        outputs = self.biases.get(module)
        return dataclasses.replace(one, name=module, outputs=outputs, model=self.model)

    def with_tensors(self, tensors: Mapping[str, Any]) -> "Config":
        """Finds the number of inputs of 2 and 4 bits.

        Args:
          tensors: Arrays or anything with ``shape``, by upstream name.

        Returns:
          The configuration of the module with ``k``.

        Raises:
          ValueError: If nothing says it, or what says it does not fit the tensors.
        """
        found = [
            tuple(tensors[name].shape) for name in (DATA, SCALE) if name in tensors
        ]
        if self.k is not None or self.bits == 8 or [len(s) for s in found] != [2, 2]:
            return self  # or `check` says what is wrong with them
        (_, size), (rows, _) = found
        k = self._inputs(rows, size)
        if k is None:
            raise ValueError(
                f"{rows} groups of {size} do not say how many inputs there are, and "
                "neither do a bias or the names and sizes of config.json; "
                f"quanto.from_tensors reads them with Config(weights={self.weights!r}, "
                "k=...)."
            )
        return dataclasses.replace(self, k=k)

    def _inputs(self, rows: int, size: int) -> int | None:
        elements = rows * size
        pairs = _extents(self.name, self.model)
        fits = {k for k, n in pairs if k * n == elements and group_size(k) == size}
        if len(fits) == 1:
            return fits.pop()
        if self.outputs and elements % self.outputs == 0:
            k = elements // self.outputs
            return k if group_size(k) == size else None
        return None if size in _SIZES else size


def group_size(k: int) -> int:
    """Returns how many inputs of a weight of 2 or 4 bits share a scale.

    Args:
      k: Number of inputs.

    Example:
      >>> group_size(64), group_size(640), group_size(160), group_size(200)
      (64, 128, 32, 200)
    """
    return next((size for size in _SIZES if k > _SIZES[0] and k % size == 0), k)


def _module(path: str, entry: Any) -> Config | None:
    """Reads what the map says of a module; None for a dense weight."""
    check_object(path, entry)
    for field in (field for field in entry if field not in _FIELDS):
        raise ValueError(f"{path}.{field} is not known; fields are {_FIELDS}.")
    known = ("none", *WIDTHS, *_ALIASES)
    for field in _FIELDS[:2]:
        value = entry.get(field)
        if not isinstance(value, str) or value not in (*known, *_OTHERS):
            raise ValueError(f"{path}.{field}={value!r} must be one of {known}.")
    weights, k = entry["weights"], entry.get("in_features")
    if weights in _OTHERS:
        raise NotImplementedError(
            f"{path}.weights={weights!r} is not read; those are {known}."
        )
    if k is not None:
        check_positive(f"{path}.in_features", k)
    return (
        Config(weights=_ALIASES.get(weights, weights), k=k)
        if weights != "none"
        else None
    )


def _extents(module: str, model: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Numbers of inputs and outputs that a module of a decoder may have.

    Args:
      module: Its path, as transformers names the linear layers of Llama, Mistral, Qwen,
        Gemma, Phi-3 and others.
      model: The parsed ``config.json``.
    """
    text = model.get("text_config")
    sizes = text if isinstance(text, Mapping) else model

    def size(*names: str) -> int:
        found = (whole(sizes.get(name)) for name in names)
        return next((one for one in found if one and one > 0), 0)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    of_head = size("head_dim") or (hidden // heads if heads else 0)
    queries = heads * of_head
    keys = (size("num_key_value_heads") or heads) * of_head
    inner = [
        size(name)
        for name in (
            "intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
        )
    ]
    pairs = {
        "q_proj": [(hidden, queries)],
        "k_proj": [(hidden, keys)],
        "v_proj": [(hidden, keys)],
        "qkv_proj": [(hidden, queries + 2 * keys)],
        "o_proj": [(queries, hidden)],
        "gate_proj": [(hidden, one) for one in inner],
        "up_proj": [(hidden, one) for one in inner],
        "gate_up_proj": [(hidden, 2 * one) for one in inner],
        "down_proj": [(one, hidden) for one in inner],
        "lm_head": [(hidden, size("vocab_size"))],
    }
    yield from ((k, n) for k, n in pairs.get(module.rpartition(".")[2], ()) if k * n)
