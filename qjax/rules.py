"""Rules that say how the weights of a model are quantized: patterns and specs."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

from qjax import ops, rtn
from qjax.bits import block, whole
from qjax.tensor import QTensor, check_packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """How a weight is quantized.

    Example:
      >>> Spec(bits=3, group_size=64)
      Spec(bits=3, group_size=64, symmetric=False, scale_dtype=None, quantizer=None)

    Attributes:
      bits: Width of a code, 2 to 8 (default: 4).
      group_size: Rows of the matrix that share a scale; None for all of a column
        (default: 128).
      symmetric: Whether zero is the middle code, so that none is stored
        (default: False).
      scale_dtype: Dtype of the scales; None for that of the weight (default: None).
      quantizer: Is called as `qjax.quantize` is, with ``[*stack, k, n]`` weights:
        ``qjax.quantizers.hqq.quantize``, say; None rounds to nearest (default: None).

    Raises:
      TypeError: If ``quantizer`` cannot be called.
      ValueError: If there are no such codes, groups or scales.
    """

    bits: SupportsIndex = 4
    group_size: SupportsIndex | None = 128
    symmetric: bool = False
    scale_dtype: DTypeLike | None = None
    quantizer: Callable[..., QTensor] | None = None

    def __post_init__(self) -> None:
        """Refuses what no weight can have, before any is looked at."""
        bits, size = rtn.check_groups(self.bits, self.group_size)
        # Those of NumPy would be part of what layers and files say of a weight.
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "group_size", size)
        if self.scale_dtype is not None:
            self.check_dtype(self.scale_dtype)
        if self.quantizer is not None and not callable(self.quantizer):
            raise TypeError(
                f"quantizer={self.quantizer!r} must be a function that is called as "
                "qjax.quantize is, such as qjax.quantizers.hqq.quantize."
            )

    @staticmethod
    def check_dtype(dtype: DTypeLike) -> None:
        """Raises a ValueError if no scales have that dtype."""
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise ValueError(
                f"scale_dtype={jnp.dtype(dtype)} must be bfloat16, float16 or float32."
            )

    @property
    def by(self) -> str | None:
        """Name of the quantizer, such as "gptq.quantize"; None for rounding."""
        function = self.quantizer
        while isinstance(function, functools.partial):
            function = function.func
        if function is None:
            return None
        module = getattr(function, "__module__", "").rpartition(".")[2]
        name = getattr(function, "__name__", type(function).__name__)
        return f"{module}.{name}"

    def unfit(self, k: int) -> str | None:
        """Returns why a matrix of k rows cannot be quantized so, or None if it can."""
        codes = block(self.bits)[0]
        if k % codes:
            return f"k={k} is no multiple of {codes}: {self.bits}-bit codes fill words"
        if (rows := whole(self.group_size)) and k % rows:
            return f"k={k} is no multiple of group_size={self.group_size}"
        return None

    def quantize(self, matrix: Array, **known: Any) -> QTensor:
        """Quantizes ``[*stack, k, n]``.

        Args:
          matrix: The weight.
          **known: What else the quantizer takes: ``gram``, say.

        Returns:
          The same weight, packed.

        Raises:
          TypeError: If the quantizer makes something else of it.
          ValueError: If it makes another shape of it, or refuses it.

        Example:
          >>> Spec(bits=3, group_size=32).quantize(jnp.ones((32, 8))).bits
          3
        """
        quantize = self.quantizer or rtn.quantize
        packed = quantize(
            matrix,
            self.bits,
            self.group_size,
            self.symmetric,
            scale_dtype=self.scale_dtype,
            **known,
        )
        check_packed(packed, "what quantizer returned")
        if packed.shape != matrix.shape:
            raise ValueError(
                f"quantizer returned {packed!r} of a weight of shape {matrix.shape}, "
                "and must keep the shape."
            )
        return packed

    def pack(self, matrix: Array) -> QTensor:
        """Quantizes ``[*stack, k, n]`` and prepares it for this device."""
        return ops.prepare(self.quantize(matrix))


Rules = Spec | Mapping[str, Spec | None] | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern and what is done with the weights whose paths match it.

    Attributes:
      pattern: Matches the whole path of a weight or of the module that holds it.
      spec: How they are quantized; None leaves them as they are.
    """

    pattern: re.Pattern[str]
    spec: Spec | None

    @property
    def literal(self) -> str | None:
        """The one path of a weight that the pattern stands for, or None."""
        plain = self._plain
        return plain if self.is_exact and "/" in plain else None

    @property
    def is_exact(self) -> bool:
        """Whether the pattern matches a single path, as `re.escape` writes it."""
        return re.escape(self._plain) == self.pattern.pattern

    @property
    def is_for_all(self) -> bool:
        """Whether the pattern matches whatever a weight is called, as ".*" does."""
        # No module and no weight has such a name.
        return self.matches("\0/\0")

    @property
    def _plain(self) -> str:
        return re.sub(r"\\(.)", r"\1", self.pattern.pattern)

    def matches(self, path: str, joint: str = "/") -> bool:
        """Whether the rule is for the weight with a path such as "layers/0/up/w".

        Args:
          path: The path.
          joint: What stands between its names: "." in checkpoints.
        """
        module = path.rpartition(joint)[0]
        return any(map(self.pattern.fullmatch, (path, module)))


def read(rules: Any) -> tuple[Rule, ...]:
    """Checks rules, of which the first that matches a path decides.

    Args:
      rules: A `Spec` for all weights; ``(pattern, spec)`` pairs, or a mapping from
        patterns to specs; or rules of qwix (``QuantizationRule``). A pattern is a
        regular expression that must match all of the path of a weight
        ("layers/0/attn/q_proj/w"), or all of the path of its module
        ("layers/0/attn/q_proj"). The spec None leaves weights as they are.

    Returns:
      The rules.

    Raises:
      TypeError: If there is anything else.
      ValueError: If a pattern is no regular expression for text.
      NotImplementedError: If a rule of qwix asks for what weights alone cannot have.

    Example:
      >>> rules = read([(".*lm_head", None), (".*", Spec(bits=3))])
      >>> [rule.matches("model/lm_head/kernel") for rule in rules]
      [True, True]
    """
    if isinstance(rules, Spec):
        return (Rule(re.compile(".*", re.DOTALL), rules),)
    if isinstance(rules, Mapping):
        rules = list(rules.items())
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(
            f"rules={rules!r} must be a Spec, or a sequence of (pattern, Spec or None)."
        )
    return tuple(map(_rule, rules))


def compiled(pattern: Any) -> re.Pattern[str]:
    """Compiles a pattern of text.

    Args:
      pattern: A string, or what `re.compile` made of one.

    Returns:
      It, compiled.

    Raises:
      re.error: If it is no regular expression.
      TypeError: If it is no text.

    Example:
      >>> compiled("up|down").fullmatch("up").group()
      'up'
    """
    found = re.compile(pattern)
    found.match("")  # One of bytes would show only at the first path.
    return found


def _rule(rule: Any) -> Rule:
    if hasattr(rule, "module_path") and hasattr(rule, "weight_qtype"):
        return Rule(_pattern(rule.module_path), _of_qwix(rule))
    if not isinstance(rule, tuple | list) or len(rule) != 2:
        raise TypeError(f"rules has {rule!r}, which is no (pattern, Spec or None).")
    pattern, spec = rule
    if spec is not None and not isinstance(spec, Spec):
        raise TypeError(
            f"rules has {spec!r} for {pattern!r}; pass qjax.Spec(bits=..., "
            "group_size=...), or None to leave these weights as they are."
        )
    return Rule(_pattern(pattern), spec)


def _pattern(pattern: Any) -> re.Pattern[str]:
    try:
        return compiled(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"rules has the pattern {pattern!r}, which is no regular expression: "
            f"{error}."
        ) from error


# What the integer types of a rule of qwix are called.
_WIDTHS = {f"int{bits}": bits for bits in range(2, 9)}


def _of_qwix(rule: Any) -> Spec | None:
    """Reads a `QuantizationRule`; which fields there are is that of qwix 0.1.8."""
    calibration = getattr(rule, "weight_calibration_method", "absmax")
    refused = {
        "op_names": bool(getattr(rule, "op_names", ())),
        "act_qtype": getattr(rule, "act_qtype", None) is not None,
        "act_static_scale": bool(getattr(rule, "act_static_scale", None)),
        "tile_size": isinstance(rule.tile_size, float),
        "weight_calibration_method": calibration not in ("absmax", "minmax"),
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise NotImplementedError(
                f"rules has {field}={getattr(rule, field)!r} for "
                f"{rule.module_path!r}; qjax quantizes weights alone, with a scale for "
                "a whole number of rows, by absmax or minmax."
            )
    if rule.weight_qtype is None:
        return None
    kind = rule.weight_qtype
    name = kind if isinstance(kind, str) else jnp.dtype(kind).name
    if name not in _WIDTHS:
        raise NotImplementedError(
            f"rules has weight_qtype={name!r} for {rule.module_path!r}, which must be "
            f"one of {list(_WIDTHS)}."
        )
    return Spec(
        bits=_WIDTHS[name],
        group_size=rule.tile_size,
        symmetric=calibration == "absmax",
    )
