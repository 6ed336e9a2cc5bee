"""compressed-tensors decompresses what qjax packed, and reads AutoAWQ's layout."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import (
    AutoAWQConverter,
    CompressedTensorsDequantizer,
    convert_checkpoint,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

import qjax
from qjax import checkpoints
from qjax.formats import compressed_tensors
from tests.peers import arrays

DATA = Path(__file__).parents[1] / "data"
# Those without an order of rows, which release 0.20 no longer reads.
SOURCES = ("llama_gptq3_g64", "llama_ct_w4a16_g128", "llama_awq4_g128")


def scheme(qt: qjax.QTensor) -> QuantizationScheme:
    (segment,) = qt.segments
    weights = QuantizationArgs(
        num_bits=segment.bits,
        type="int",
        symmetric=qt.zero is None,
        strategy="channel" if segment.group_size is None else "group",
        group_size=segment.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_decompresses_tensors(bits, group_size, symmetric, dtype):
    w = arrays.random(bits, 96, 32, dtype)
    qt = qjax.quantize(w, bits, group_size, symmetric)
    tensors = arrays.state(
        compressed_tensors.to_tensors(qt, compressed_tensors.Dense())
    )
    codec = BaseCompressor.get_value_from_registry("pack-quantized")
    arrays.same_weight(codec.decompress(tensors, scheme(qt))["weight"], qt)


@pytest.mark.parametrize("source", SOURCES)
def test_dequantizes_a_directory(source, tmp_path):
    checkpoints.convert(DATA / source, tmp_path / "packed", format="compressed-tensors")
    ours = checkpoints.load(tmp_path / "packed", prepare=False)
    dequantizer = CompressedTensorsDequantizer(tmp_path / "packed", dtype=torch.float32)
    convert_checkpoint(tmp_path / "packed", tmp_path / "dense", dequantizer)
    theirs = load_file(tmp_path / "dense" / "model.safetensors")
    matrices = [name for name, w in ours.items() if isinstance(w, qjax.QTensor)]
    assert matrices
    for name in matrices:
        # They round to the scale's dtype first.
        expected = np.asarray(qjax.dequantize(ours[name]).astype(jnp.float32)).T
        np.testing.assert_array_equal(theirs[f"{name}.weight"].numpy(), expected)


# transformers has no place for packed zero points: what compressed-tensors itself makes
# of the AWQ checkpoint fails to load, too.
@pytest.mark.parametrize("source", ["llama_gptq3_g64", "llama_ct_w4a16_g128"])
def test_transformers_runs_a_directory(source, tmp_path):
    checkpoints.convert(DATA / source, tmp_path / "packed", format="compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32
    )
    reference = np.load(DATA / source / "reference.npz")
    with torch.no_grad():
        ids = torch.from_numpy(reference["prompt_ids"].astype(np.int64))
        logits = model(ids).logits.numpy()
    expected = reference["prompt_logits"]
    # The reference did not round weights to float16; half a unit there is 5e-4.
    assert np.abs(logits - expected).max() <= 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("source", ["llama_awq4_g128", "llama_ct_w4a16_g128"])
def test_reads_an_awq_directory(source, tmp_path):
    checkpoints.convert(DATA / source, tmp_path / "awq", format="awq")
    ours = checkpoints.load(tmp_path / "awq", prepare=False)
    converter = AutoAWQConverter.from_pretrained(tmp_path / "awq")
    convert_checkpoint(tmp_path / "awq", tmp_path / "packed", converter)
    theirs = checkpoints.load(tmp_path / "packed", prepare=False)
    assert theirs.keys() == ours.keys()
    layouts = {type(w.layout) for w in theirs.values() if isinstance(w, qjax.QTensor)}
    assert layouts == {compressed_tensors.Dense}
    codec = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for name, qt in ours.items():
        if isinstance(qt, qjax.QTensor):
            tensors = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in stored.items()
                if key.startswith(f"{name}.weight")
            }
            arrays.same_weight(codec.decompress(tensors, scheme(qt))["weight"], qt)
