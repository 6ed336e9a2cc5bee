"""Weights cut over devices while they are read: equal to those that are cut later."""

import contextlib
import functools
import io
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import checkpoints
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.shards import Stored
from qjax.formats import awq, bnb, fp8, mlx, modelopt, quark
from qjax.formats.gptq import Stream
from qjax.formats.tiles import Tiles
from tests import goldens
from tests.checkpoints import assembled, tiny

TESTS = pathlib.Path(__file__).parents[1]
PATHS = {
    "act-order": TESTS.parent / "examples/llm/checkpoint",
    "gptq": TESTS / "data/llama_gptq3_g64",
    "awq": TESTS / "data/llama_awq4_g128",
    "nf4": TESTS / "data/llama_nf4_dq",
}
# One of each shape: the files have three layers of them.
MODULES = [f"model.layers.0.{name}" for name in ("self_attn.k_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def mesh():
    axes = (AxisType.Auto, AxisType.Auto)
    devices = jax.devices("cpu")
    return jax.make_mesh((2, 4), ("data", "model"), axes, devices=devices)


@pytest.fixture
def counted(monkeypatch):
    """Counts the bytes that are read of the weights, file by file."""
    total, open_path = {}, pathlib.Path.open

    class Counted(io.FileIO):
        def readinto(self, buffer):
            size = super().readinto(buffer)
            total[self.name] = total.get(self.name, 0) + size
            return size

    def counting(self, mode="r", buffering=-1, **options):
        if buffering == 0:
            return Counted(str(self), mode)
        return open_path(self, mode, buffering, **options)

    monkeypatch.setattr(pathlib.Path, "open", counting)
    return total


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    chex.assert_trees_all_equal(found, wanted)


def cut_later(w, mesh, spec):
    """`qjax.shard`; of a `Stream` where the words of this device are not cut so."""
    with contextlib.suppress(ValueError):
        return qjax.shard(w, mesh, spec)
    return qjax.shard(qjax.prepare(w, layout=Stream()), mesh, spec)


def first_layer(path, sharding=None):
    weights = checkpoints.lazy(path, sharding=sharding)
    return {name: weights[name] for name in weights if name in MODULES}


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("act-order", P(None, "model")),
        ("act-order", P(None, ("data", "model"))),
        ("gptq", P("data", "model")),
        ("gptq", P("data")),
        ("awq", P(None, "data")),
        ("nf4", P(None, "model")),
    ],
    ids=str,
)
def test_equals_shard_of_load(kind, spec, mesh):
    whole = first_layer(PATHS[kind])
    place = lambda name: NamedSharding(mesh, spec if name in whole else P())  # noqa: E731
    found = first_layer(PATHS[kind], sharding=place)
    assert set(found) == set(MODULES)
    for name, w in whole.items():
        assert_same(found[name], cut_later(w, mesh, spec))


def write(directory, **tensors):
    """A checkpoint of one matrix that is no more than its tensors."""
    built = tiny.checkpoint()
    built.tensors = {f"{tiny.MODULE}.{name}": a for name, a in tensors.items()}
    built.config["quantization_config"]["group_size"] = 16
    return built.write(directory)


def test_rows_of_act_order_are_those_after_sorting(tmp_path, mesh):
    tensors = tiny.matrix(k=64)
    tensors["g_idx"] = np.random.default_rng(0).permutation(tensors["g_idx"])
    path, spec = write(tmp_path, **tensors), P("data", "model")
    where = NamedSharding(mesh, spec)
    found = checkpoints.load(path, sharding=lambda _: where)[tiny.MODULE]
    assert found.order is not None
    assert_same(found, cut_later(checkpoints.load(path)[tiny.MODULE], mesh, spec))


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=str)
def test_gemv_of_awq(tmp_path, mesh, spec):
    # Twelve groups, which the file pads to sixteen, as it would six to eight.
    dense = np.random.default_rng(0).normal(size=(1536, 64)).astype(np.float32)
    w = qjax.quantize(jnp.asarray(dense), 4, 128, scale_dtype="float16")
    built = tiny.checkpoint()
    built.tensors = {
        f"{tiny.MODULE}.{name}": np.asarray(array)
        for name, array in awq.to_tensors(w, "gemv").items()
    }
    entry = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}
    built.config["quantization_config"] = entry
    path, where = built.write(tmp_path), NamedSharding(mesh, spec)
    found = checkpoints.load(path, sharding=lambda _: where)[tiny.MODULE]
    assert_same(found, cut_later(checkpoints.load(path)[tiny.MODULE], mesh, spec))


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=str)
# Cut evenly, too small to be cut, and blocks that are cut short.
@pytest.mark.parametrize(("n", "k"), [(256, 64), (128, 64), (112, 96)])
def test_blocks_of_fp8(tmp_path, mesh, counted, n, k, spec):
    spec = P(None, "data") if k == 96 else spec
    dense = np.random.default_rng(0).normal(size=(k, n)).astype(np.float32)
    w = fp8.quantize(jnp.asarray(dense), group_size=32)
    built = tiny.checkpoint()
    built.tensors = {
        f"{tiny.MODULE}.{name}": np.asarray(array)
        for name, array in fp8.to_tensors(w).items()
    }
    built.config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [32, 32],
    }
    path, where = built.write(tmp_path), NamedSharding(mesh, spec)
    whole = cut_later(checkpoints.load(path)[tiny.MODULE], mesh, spec)
    counted.clear()
    found = checkpoints.load(path, sharding=lambda _: where)[tiny.MODULE]
    assert_same(found, whole)
    if n == 256:
        # What the devices of this process hold, which is all of it, once.
        assert sum(counted.values()) == n * k + 4 * (n * k // 32**2)


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize("method", ["fp8", "modelopt"])
def test_blocks_of_fp8_that_shapes_tell(tmp_path, mesh, counted, method, spec):
    # A piece of one block is one of a matrix of blocks, whatever its shape would say.
    n, k = 512, 256
    dense = np.random.default_rng(0).normal(size=(k, n)).astype(np.float32)
    w = fp8.quantize(jnp.asarray(dense))
    format_ = {"fp8": fp8, "modelopt": modelopt}[method]
    built = tiny.checkpoint()
    built.tensors = {
        f"{tiny.MODULE}.{name}": np.asarray(array)
        for name, array in format_.to_tensors(w).items()
    }
    entry = {"quant_method": method, "quant_algo": "FP8_PB_WO"}
    built.config["quantization_config"] = entry
    path, where = built.write(tmp_path), NamedSharding(mesh, spec)
    whole = cut_later(checkpoints.load(path)[tiny.MODULE], mesh, spec)
    counted.clear()
    found = checkpoints.load(path, sharding=lambda _: where)[tiny.MODULE]
    assert_same(found, whole)
    assert sum(counted.values()) == n * k + 4 * (n * k // 128**2)


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize("name", ["nvfp4__32x96__s1104", "mxfp8__32x96__s1103"])
def test_modelopt(tmp_path, mesh, counted, name, spec):
    made = assembled.modelopt(name)
    path, where = made.checkpoint.write(tmp_path), NamedSharding(mesh, spec)
    if "mxfp8" in name and spec[0]:  # three groups, which two devices do not share
        spec = P(None, "model")
        where = NamedSharding(mesh, spec)
    load = lambda **options: checkpoints.lazy(path, **options)[tiny.MODULE]  # noqa: E731
    whole = cut_later(load(), mesh, spec)
    counted.clear()
    assert_same(load(sharding=lambda _: where), whole)
    held = assembled.state(assembled.golden(f"modelopt/modelopt_{name}"))
    # Scales of all, and of activations, are read with each piece.
    pieces = 8 if spec[0] else 4
    size = sum(held[key].nbytes * (1 if held[key].ndim else pieces) for key in held)
    assert sum(counted.values()) == size


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize(
    ("bits", "size", "symmetric"), [(4, 16, False), (8, 32, True), (8, None, True)]
)
def test_quark(tmp_path, mesh, counted, bits, size, symmetric, spec):
    dense = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    w = qjax.quantize(jnp.asarray(dense), bits, size, symmetric)
    checkpoints.save(tmp_path / "x", {tiny.MODULE: w}, {}, format="quark")
    load = functools.partial(checkpoints.load, tmp_path / "x", prepare=False)
    whole = cut_later(load()[tiny.MODULE], mesh, spec)
    held = sum(np.asarray(array).nbytes for array in quark.to_tensors(w).values())
    counted.clear()
    found = load(sharding=lambda _: NamedSharding(mesh, spec))[tiny.MODULE]
    assert_same(found, whole)
    # Those of columns are read with each piece that has them.
    assert size is None or sum(counted.values()) == held


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=str)
def test_llm_int8(tmp_path, mesh, counted, spec):
    dense = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    w = bnb.quantize(jnp.asarray(dense), bits=8)
    checkpoints.save(tmp_path / "x", {tiny.MODULE: w}, {}, format="bitsandbytes")
    load = functools.partial(checkpoints.load, tmp_path / "x")
    whole = cut_later(load()[tiny.MODULE], mesh, spec)
    counted.clear()
    found = load(sharding=lambda _: NamedSharding(mesh, spec))[tiny.MODULE]
    assert_same(found, whole)
    # Magnitudes of columns are read with each piece that has them, and formats.
    assert 64 * 128 < sum(counted.values()) < 64 * 128 + 8 * 4 * 128


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_quanto(tmp_path, mesh, counted, bits, spec):
    dense = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    w = qjax.quantize(jnp.asarray(dense), bits, None, symmetric=True)
    checkpoints.save(tmp_path / "x", {tiny.MODULE: w}, {}, format="quanto")
    load = functools.partial(checkpoints.load, tmp_path / "x")
    whole = cut_later(load()[tiny.MODULE], mesh, spec)
    counted.clear()
    found = load(sharding=lambda _: NamedSharding(mesh, spec))[tiny.MODULE]
    assert_same(found, whole)
    # Slabs are not cut, and read whole.
    assert bits == 4 or sum(counted.values()) < 64 * 128 + 8 * 4 * 128


@pytest.mark.parametrize("name", ["int4_channel", "mxfp6_e2m3", "nvfp4"])
def test_what_quark_wrote(tmp_path, mesh, name):
    (name,) = (n for n in goldens.names("quark") if n.startswith(f"quark_{name}__"))
    made = assembled.quark(name.removeprefix("quark_"))
    path, spec = made.checkpoint.write(tmp_path), P("data", "model")
    where = NamedSharding(mesh, spec)
    whole = cut_later(checkpoints.lazy(path)[tiny.MODULE], mesh, spec)
    assert_same(checkpoints.lazy(path, sharding=lambda _: where)[tiny.MODULE], whole)


@pytest.mark.parametrize("spec", [P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize("kind", [(4, 32), (3, 32), "nvfp4"], ids=str)
@pytest.mark.parametrize("stacked", [False, True])
def test_mlx(tmp_path, mesh, counted, kind, spec, stacked):
    shape = (2, 128, 64) if stacked else (128, 64)
    dense = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if kind == "nvfp4":
        held = {
            "weight": dense[..., ::8, :].swapaxes(-1, -2).view(np.uint32) & 0x77777777,
            "scales": np.full((*shape[:-2], 64, 8), 60, np.uint8),
        }
        entry = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    else:
        w = mlx.quantize(jnp.asarray(dense), *kind)
        held = {name: np.asarray(array) for name, array in mlx.to_tensors(w).items()}
        entry = {"group_size": kind[1], "bits": kind[0]}
    built = tiny.Checkpoint(
        {f"{tiny.MODULE}.{k}": np.ascontiguousarray(a) for k, a in held.items()},
        {"quantization": entry},
    )
    path, spec = built.write(tmp_path), P(*[None] * stacked, *spec)
    # Prepared: scales in two levels are not cut.
    load = functools.partial(checkpoints.load, path)
    whole = cut_later(load()[tiny.MODULE], mesh, spec)
    counted.clear()
    found = load(sharding=lambda _: NamedSharding(mesh, spec))[tiny.MODULE]
    assert_same(found, whole)
    assert sum(counted.values()) == sum(array.nbytes for array in held.values())


def stack_of_experts(directory, kind):
    """A checkpoint of one stack of eight matrices of 128 x 64."""
    rng = np.random.default_rng(0)
    if kind == "mxfp4":
        held = {
            "_blocks": rng.integers(0, 256, (8, 64, 4, 16), dtype=np.uint8),
            "_scales": rng.integers(120, 130, (8, 64, 4), dtype=np.uint8),
        }
        config = {"quantization_config": {"quant_method": "mxfp4"}}
    else:
        w = mlx.quantize(jnp.asarray(rng.normal(size=(8, 128, 64)), jnp.float32), 3, 32)
        held = {f".{name}": np.asarray(a) for name, a in mlx.to_tensors(w).items()}
        config = {"quantization": {"group_size": 32, "bits": 3}}
    tensors = {f"{tiny.MODULE}{name}": array for name, array in held.items()}
    return tiny.Checkpoint(tensors, config).write(directory)


@pytest.mark.parametrize(
    ("spec", "pieces"),
    [
        (P("model"), 4),
        (P(("data", "model")), 8),
        (P("model", "data"), 8),
        (P("model", None, "data"), 8),
        (P(None, "data", "model"), 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["mxfp4", "mlx"])
def test_stacks_of_experts(tmp_path, mesh, counted, monkeypatch, kind, spec, pieces):
    """Each share of the matrices, and of what is cut of them, is read by itself."""
    path = stack_of_experts(tmp_path, kind)
    whole = cut_later(checkpoints.load(path)[tiny.MODULE], mesh, spec)
    readings, read = [], Matrix.read
    monkeypatch.setattr(
        Matrix, "read", lambda one: readings.append(one.nbytes) or read(one)
    )
    counted.clear()
    where = NamedSharding(mesh, spec)
    assert_same(checkpoints.load(path, sharding=lambda _: where)[tiny.MODULE], whole)
    # No byte of it twice, and none beside it.
    total = sum(counted.values())
    assert readings == [total // pieces] * pieces
    assert total == 8 * 64 * 128 * (4.25 if kind == "mxfp4" else 3 + 64 / 32) / 8


@pytest.mark.parametrize("kind", ["mxfp4", "mlx"])
def test_stacks_that_are_not_prepared(tmp_path, mesh, kind):
    """Scales of MXFP4 are an encoding, of which every device has all."""
    path, spec = stack_of_experts(tmp_path, kind), P("model")
    whole = checkpoints.load(path, prepare=False)[tiny.MODULE]
    found = checkpoints.load(
        path, prepare=False, sharding=lambda _: NamedSharding(mesh, spec)
    )
    assert_same(found[tiny.MODULE], qjax.shard(whole, mesh, spec))


def test_stacks_that_devices_cannot_share(tmp_path, refuses):
    path = stack_of_experts(tmp_path, "mlx")
    mesh = jax.make_mesh((3,), ("model",), devices=jax.devices("cpu")[:3])
    where = [NamedSharding(mesh, spec) for spec in (P("model"), P())]
    with refuses("has 8 matrices there, which 3 devices cannot share evenly"):
        checkpoints.load(path, sharding=lambda _: where[0])
    found = checkpoints.load(path, sharding=lambda _: where)[tiny.MODULE]
    assert found.scale.sharding.is_fully_replicated


@pytest.mark.parametrize("prepare", [True, False])
def test_unprepared(tmp_path, mesh, prepare):
    path, spec = write(tmp_path, **tiny.matrix()), P(None, "model")
    where = NamedSharding(mesh, spec)
    load = lambda **options: checkpoints.load(path, prepare=prepare, **options)  # noqa: E731
    found = load(sharding=lambda _: where)[tiny.MODULE]
    assert_same(found, cut_later(load()[tiny.MODULE], mesh, spec))


def test_one_group_a_column(tmp_path, mesh):
    built = tiny.checkpoint()
    built.tensors = {
        f"{tiny.MODULE}.{name}": array
        for name, array in tiny.matrix(group=tiny.K).items()
    }
    built.config["quantization_config"]["group_size"] = -1
    path, spec = built.write(tmp_path), P("data", "model")
    where = NamedSharding(mesh, spec)
    found = checkpoints.load(path, sharding=lambda _: where)[tiny.MODULE]
    assert_same(found, cut_later(checkpoints.load(path)[tiny.MODULE], mesh, spec))


def test_first_sharding_that_fits(tmp_path, mesh):
    path = tiny.checkpoint().write(tmp_path)
    # Two groups, which two devices share and four do not; eight tokens.
    specs = [P("model"), P("data", "model"), P()]
    where = [NamedSharding(mesh, spec) for spec in specs]
    found = checkpoints.load(
        path, sharding=lambda name: where[: 3 if "." in name else 1]
    )
    held = found[tiny.MODULE]
    fits = P() if held.layout == Tiles() else P("data", "model")
    assert held.scale.sharding.is_equivalent_to(NamedSharding(mesh, fits), 2)
    assert found["lm_head.weight"].sharding.spec == P("model")


class TestOnAGPU:
    """Words of `Tiles` are cut in pieces of 128 rows and 16 columns."""

    @pytest.mark.parametrize(
        ("k", "n", "specs", "layout", "taken"),
        [
            (256, 64, [P("data", "model")], Tiles(), 0),
            (128, 64, [P("data", "model")], Stream(), 0),
            (256, 48, [P("data", "model")], Stream(), 0),
            (256, 40, [P(None, "model")], Stream(), 0),
            # What the kernels read goes first.
            (128, 64, [P("data"), P(None, "model")], Tiles(), 1),
            (256, 48, [P(None, "model"), P()], Tiles(), 1),
        ],
        ids=str,
    )
    def test_what_is_cut_more_finely_is_a_stream(
        self, tmp_path, mesh, as_on_gpu, k, n, specs, layout, taken
    ):
        path = write(tmp_path, **tiny.matrix(k=k, n=n))
        where = [NamedSharding(mesh, spec) for spec in specs]
        found = checkpoints.load(path, sharding=lambda _: where)[tiny.MODULE]
        assert found.layout == layout
        whole = qjax.prepare(checkpoints.load(path)[tiny.MODULE], layout=layout)
        assert_same(found, qjax.shard(whole, mesh, specs[taken]))

    def test_what_no_layout_shares_is_refused(self, tmp_path, mesh, as_on_gpu, refuses):
        path = write(tmp_path, **tiny.matrix(k=48, n=40))
        specs = P("data"), P(None, ("data", "model"))
        where = [NamedSharding(mesh, spec) for spec in specs]
        with refuses("k of QTensor(48x40, 4 bits, group 16, Stream(), "):
            checkpoints.load(path, sharding=lambda _: where[0])
        assert checkpoints.load(path, sharding=lambda _: where[1])[tiny.MODULE].n == 40


def test_refuses_with_the_name_of_the_weight(tmp_path, mesh, refuses):
    path = tiny.checkpoint().write(tmp_path)
    by_row = NamedSharding(mesh, P("model"))
    with refuses(f"{tiny.MODULE}: spec={P('model')}: k of QTensor(32x64, 4 bits, "):
        checkpoints.load(path, sharding=lambda _: by_row)
    by_column = NamedSharding(mesh, P(None, "model"))
    with refuses(f"model.norm.weight: spec={P(None, 'model')} has more axes than (64"):
        checkpoints.load(path, sharding=lambda _: by_column)
    three = NamedSharding(
        jax.make_mesh((3,), ("three",), devices=jax.devices("cpu")[:3]), P("three")
    )
    with refuses("model.norm.weight: "):
        checkpoints.load(path, sharding=lambda _: three)


def test_devices_that_hold_the_same_share_one_reading(tmp_path, mesh, counted):
    path = write(tmp_path, **tiny.matrix())
    where = NamedSharding(mesh, P(None, "data"))
    checkpoints.load(path, sharding=lambda _: where)
    tensors = tiny.matrix()
    # The groups are read for the structure, and with each of two pieces.
    total = sum(array.nbytes for array in tensors.values())
    assert counted == {
        str(path / "model.safetensors"): total + 2 * tensors["g_idx"].nbytes
    }


@pytest.mark.parametrize(
    "ranges",
    [
        (slice(None), slice(None), slice(None)),
        (slice(1, 3), slice(None), slice(None)),
        (slice(None), slice(2, 4), slice(None)),
        (slice(1, 2), slice(None), slice(3, 5)),
        (slice(0, 0), slice(None), slice(1, 2)),
    ],
    ids=str,
)
def test_a_part_of_a_tensor(tmp_path, counted, ranges):
    array = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    file = tmp_path / "tensor"
    file.write_bytes(b"head" + array.tobytes())
    whole = Stored(
        file=file, offset=4, name="t", shape=array.shape, dtype=jnp.dtype(np.int16)
    )
    part = whole.piece(ranges)
    chex.assert_trees_all_equal(part.read(), array[ranges])
    assert counted.get(str(file), 0) == part.nbytes == array[ranges].nbytes
    if part.nbytes:
        # A part of a part.
        again = part.piece([slice(1, None), *[slice(None)] * 2])
        chex.assert_trees_all_equal(again.read(), array[ranges][1:])


@pytest.mark.parametrize(
    "wanted",
    [None, P(), P(None, "model"), SingleDeviceSharding(jax.devices()[0]), [], "model"],
    ids=str,
)
def test_what_is_no_sharding_is_refused_by_name(wanted, refuses):
    message = f"sharding('model.embed_tokens.weight') returned {wanted!r}, and must"
    with refuses(message):
        checkpoints.load(PATHS["act-order"], sharding=lambda name: wanted)
