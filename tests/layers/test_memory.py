"""`qjax.memory_report`: bytes of buffers, wherever they are."""

import jax
import jax.numpy as jnp
from flax import nnx

import qjax
from tests.layers.foreign import x


def test_replicas_count_on_every_device_and_shards_once():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    w = qjax.quantize(x(256, 64), 4, 32)
    replicated = jax.device_put(w, jax.NamedSharding(mesh, jax.P()))
    sharded = jax.device_put(w, jax.NamedSharding(mesh, jax.P(None, "model")))
    report = qjax.memory_report({"replicated": replicated, "sharded": sharded})
    assert [entry.nbytes for entry in report.entries] == [8 * w.nbytes, w.nbytes]
    assert [entry.dense_nbytes for entry in report.entries] == [256 * 64 * 2] * 2
    assert report.nbytes == 9 * w.nbytes


def test_what_is_shared_counts_once():
    w = qjax.quantize(x(256, 64), 4, 32)
    report = qjax.memory_report([w, w])
    assert [entry.nbytes for entry in report.entries] == [w.nbytes, 0]
    assert report.dense_nbytes == 2 * 256 * 64 * 2


def test_abstract_and_other_arrays_are_told():
    w = jax.eval_shape(lambda: qjax.quantize(jnp.ones((256, 64)), 3, None))
    tree = {"w": w, "step": jnp.zeros((), jnp.int32), "key": jax.random.key(0), "no": 1}
    entries = {entry.path: entry for entry in qjax.memory_report(tree).entries}
    assert entries["w"].nbytes == 256 * 64 * 3 // 8 + 64 * 5
    assert entries["w"].format == "group column, Stream, float32 scale"
    assert (entries["step"].nbytes, entries["step"].dense_nbytes) == (4, 4)
    assert entries["key"].nbytes == 8
    assert set(entries) == {"w", "step", "key"}


def test_the_text_is_a_table_with_sums():
    layer = qjax.layers.nnx.Linear(256, 64, bits=3, group_size=32)
    layout = type(layer.kernel.layout).__name__
    text = str(qjax.memory_report(nnx.List([layer])))
    lines = [line.replace(" ", "") for line in text.splitlines()]
    assert lines[0] == "8.75KiB;32.12KiBinbfloat16"
    assert any(f"0/kernel│256x64│3│group32,{layout}" in line for line in lines)
    assert any("0/bias│64││float32│256B│128B" in line for line in lines)
