"""Arrays from JAX to PyTorch and back, bit for bit, and weights to compare."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

import qjax


def to_torch(array: Any) -> torch.Tensor:
    """A copy of an array as a tensor of the same dtype; uint32 as int32."""
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.name.startswith("float8"):
        dtype = getattr(torch, array.dtype.name)
        return torch.from_numpy(array.view(np.uint8)).view(dtype)
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)


def state(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What `to_tensors` returned, as a state dict."""
    return {name: to_torch(array) for name, array in tensors.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The array of a tensor, of the same dtype."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def random(seed: int, k: int, n: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (k, n), jnp.float32).astype(dtype)


def same_weight(theirs: torch.Tensor, qt: qjax.QTensor) -> None:
    """Their weight ``[n, k]`` is ours in its own dtype, 0.0 and -0.0 being equal."""
    ours, found = np.asarray(qjax.dequantize(qt)).T, to_numpy(theirs)
    assert (found.shape, found.dtype) == (ours.shape, ours.dtype)
    np.testing.assert_array_equal(found, ours)
