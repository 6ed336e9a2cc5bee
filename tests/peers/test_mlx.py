"""MLX dequantizes and multiplies by what qjax wrote, and reads its directories."""

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest

import qjax
from qjax import checkpoints
from qjax.formats import mlx, mxfp4


def to_mlx(array) -> mx.array:
    array = np.ascontiguousarray(array)
    if array.dtype == jnp.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_numpy(array: mx.array) -> np.ndarray:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(jnp.bfloat16)
    return np.array(array)


def random(shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(0), shape, dtype)


CASES = {
    "offsets": (lambda: mlx.quantize(random((128, 24)), 3, 32), 2),
    "symmetric": (
        lambda: qjax.quantize(random((128, 24)), 6, 64, symmetric=True),
        1,
    ),
    "mxfp4": (lambda: mxfp4.quantize(random((96, 24))), 2),
    "experts": (lambda: mlx.quantize(random((3, 64, 24), jnp.float16), 5, 64), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_dequantizes_and_multiplies(name):
    make, roundings = CASES[name]
    w = make()
    config = mlx.config_of(w)
    held = {key: to_mlx(array) for key, array in mlx.to_tensors(w).items()}
    arguments = (held["weight"], held["scales"], held.get("biases"))
    kinds = {"group_size": config.group_size, "bits": config.bits, "mode": config.mode}
    if roundings == 2:  # as MLX's own; others are rounded once, and there twice
        found = to_numpy(mx.dequantize(*arguments, **kinds))
        wanted = np.asarray(qjax.dequantize(w)).swapaxes(-1, -2)
        np.testing.assert_array_equal(found, wanted)
    wide = [
        a if a is None or a.dtype != mx.bfloat16 else a.astype(mx.float32)
        for a in arguments
    ]
    x = np.random.default_rng(1).standard_normal((*w.batch, 5, w.k)).astype(np.float32)
    found = np.array(mx.quantized_matmul(mx.array(x), *wide, transpose=True, **kinds))
    wanted = x @ np.asarray(qjax.dequantize(w, jnp.float32))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_reads_a_directory(tmp_path):
    tensors = {"a.x": mlx.quantize(random((64, 8))), "norm.weight": jnp.ones(4)}
    checkpoints.save(tmp_path / "x", tensors, {}, format="mlx")
    found = mx.load(str(tmp_path / "x/model.safetensors"))
    assert found.keys() == {"a.x.weight", "a.x.scales", "a.x.biases", "norm.weight"}
    assert found["a.x.weight"].dtype == mx.uint32
    dense = mx.dequantize(*(found[f"a.x.{k}"] for k in ("weight", "scales", "biases")))
    wanted = np.asarray(qjax.dequantize(tensors["a.x"])).T
    np.testing.assert_array_equal(to_numpy(dense), wanted)
