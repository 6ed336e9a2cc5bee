"""Rotary positions: how the queries and keys of a layer are turned."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Rope(NamedTuple):
    """What turns queries and keys by their positions.

    Attributes:
      frequencies: Angle per position of each pair of channels. If a head has more
        channels than these pairs, the rest stay as they are.
      scale: By which YaRN and LongRoPE make what is turned longer.
      long: LongRoPE's frequencies where there is room for more than ``length``
        positions; it depends on the room, not on how much of it is filled, as keys stay
        turned as they are.
      length: Positions that the model was first trained on.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long: tuple[float, ...] | None = None
    length: int = 0

    @classmethod
    def from_json(cls, config: Mapping[str, Any], head_dim: int) -> "Rope":
        """Reads what a config.json says, of layers without a window.

        Raises:
          ValueError: If that is not supported.
        """
        rope = rope_of(config)
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        # A fraction may be a little less than it says.
        dim = int(head_dim * (1.0 if partial is None else partial) + 1e-6)
        if "long_factor" not in rope:
            frequencies = tuple(rope_frequencies(config, dim).tolist())
            return cls(frequencies, rope_scale(config))
        inverse = plain_frequencies(config, dim)
        parts = {}
        for name in ("short_factor", "long_factor"):
            factors = np.array(rope[name], np.float64)
            if factors.shape != inverse.shape or not (factors > 0).all():
                raise ValueError(
                    f"{name}={rope[name]} must be {len(inverse)} numbers above 0."
                )
            parts[name] = tuple((inverse / factors).tolist())
        name = "original_max_position_embeddings"
        length = config.get(name) or rope[name]
        growth = rope.get("factor") or config["max_position_embeddings"] / length
        scale = rope.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(max(growth, 1)) / math.log(length))
        return cls(parts["short_factor"], float(scale), parts["long_factor"], length)

    def turned(self, x: Array, positions: Array, room: int) -> Array:
        """Turns channel pairs (i, i + half of them) by position.

        Args:
          x: ``[b, t, heads, dim]``.
          positions: ``[b, t]``.
          room: Positions that a sequence has room for.
        """
        long = self.long is not None and room > self.length
        frequencies = self.long if long else self.frequencies
        angle = positions[..., None].astype(jnp.float32) * jnp.array(frequencies)
        cos, sin = (self.scale * turn(angle)[:, :, None] for turn in (jnp.cos, jnp.sin))
        pairs = len(frequencies)
        a, b, rest = jnp.split(x.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
        parts = [a * cos - b * sin, b * cos + a * sin, rest]
        return jnp.concatenate(parts, -1).astype(x.dtype)


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of rotary positions, of layers without a window."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("full_attention", rope)


def base_of(config: Mapping[str, Any]) -> float:
    """The number whose powers are the wavelengths of channel pairs."""
    return rope_of(config).get("rope_theta", config.get("rope_theta", 10000.0))


def plain_frequencies(config: Mapping[str, Any], dim: int) -> np.ndarray:
    """Angle per position of each pair of channels, unscaled."""
    return 1 / base_of(config) ** (np.arange(0, dim, 2) / dim)


def rope_frequencies(config: Mapping[str, Any], dim: int) -> np.ndarray:
    """Angle per position of each pair of channels, ``[dim / 2]``."""
    rope = rope_of(config)
    inverse = plain_frequencies(config, dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return inverse
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"rope_type={kind!r} must be default, linear, llama3, yarn or longrope."
        )
    if not (rope["factor"] or 0) > 0:
        raise ValueError(f"factor={rope['factor']} of rope_type={kind!r} must be > 0.")
    if kind == "linear":
        return inverse / rope["factor"]
    if kind == "yarn":
        return _yarn_frequencies(inverse, base_of(config), rope)
    # Long wavelengths are stretched, short ones kept, those between are blended.
    turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * inverse + (1 - keep) * inverse / rope["factor"]


def _yarn_frequencies(
    inverse: np.ndarray, theta: float, rope: Mapping[str, Any]
) -> np.ndarray:
    """YaRN: as for Llama 3, but blended along the channels, not the wavelengths."""
    dim, length = 2 * len(inverse), rope["original_max_position_embeddings"]
    turns = [rope.get("beta_fast") or 32, rope.get("beta_slow") or 1]
    # The channels that turn so often over the length that the model was trained on.
    first, last = (
        dim * math.log(length / (2 * math.pi * count)) / (2 * math.log(theta))
        for count in turns
    )
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    stretch = (np.arange(len(inverse)) - first) / max(last - first, 1e-3)
    stretch = np.clip(stretch, 0, 1)
    return stretch * inverse / rope["factor"] + (1 - stretch) * inverse


def rope_scale(config: Mapping[str, Any]) -> float:
    """The factor of rotated queries and keys: YaRN's, and else 1."""
    rope = rope_of(config)
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return 1.0
    if (scale := rope.get("attention_factor")) is not None:
        return float(scale)
    growth = 0.1 * math.log(max(rope["factor"], 1))
    own, other = rope.get("mscale"), rope.get("mscale_all_dim")
    if own and other:
        return (own * growth + 1) / (other * growth + 1)
    return growth + 1
