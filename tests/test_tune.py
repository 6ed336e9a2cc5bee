"""Measured tables, their look-up, and the search that fills them."""

import dataclasses
import functools
import importlib.metadata
import io
import itertools
import json
import math
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import qjax
from qjax import cli, dispatch, pallas, tune
from qjax.formats.tiles import Tiles
from qjax.pallas import configs, gpu, lang, tables
from qjax.pallas.operands import Config
from qjax.tune import gauge, timing
from qjax.tune.search import climb
from tests.test_cli import DATA, SHIPPED, exl2_directory
from tests.test_progress import Terminal

DEVICE = "NVIDIA H200"
TILE = Config(16, 64, 256, 7, 2, 5)
# An RTX 4090.
GEFORCE = gpu.Gpu(128, 99 << 10, major=8)


@pytest.fixture(autouse=True)
def own_tables(tmp_path, monkeypatch):
    """No test reads or writes the tables of whoever runs it."""
    monkeypatch.setenv("QJAX_TABLES", str(tmp_path / "tables"))
    tables.forget()
    yield tmp_path / "tables"
    tables.forget()


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(tables, "device_kind", lambda: DEVICE)


@functools.cache
def weight(k=512, n=256, bits=4, group_size=128):
    return tune.uniform(k, n, bits, group_size)


def entry(config=TILE, us=10.0, dense_us=None):
    return tables.Entry(config, us, dense_us)


def table(*pairs):
    return tables.Table(device=DEVICE, entries=dict(pairs), versions={"jax": "0.12"})


def at(m, op="matmul", **shape):
    return tables.Key.of(op, m, weight(**shape))


class TestFiles:
    def test_what_is_written_is_read(self, own_tables):
        mixed = tables.Key("matmul", 640, 40, (5, 4), "counts", 32, 8)
        one = (at(8), entry(dense_us=12.5))
        written = table(one, (mixed, entry(Config(8))), (at(1, "dequantize"), entry()))
        tables.write(own_tables / "nvidia-h200.json", written)
        assert tables.read(own_tables / "nvidia-h200.json") == written
        assert tables.of_device(DEVICE).entries == written.entries
        assert [file.name for file in own_tables.iterdir()] == ["nvidia-h200.json"]

    def test_an_entry_is_a_line(self, own_tables):
        file = own_tables / "x.json"
        tables.write(
            file, table((at(64), entry()), (at(8), entry()), (at(16), entry()))
        )
        lines = file.read_text().splitlines()
        assert [json.loads(line.strip(" ,"))["m"] for line in lines[1:-1]] == [
            8,
            16,
            64,
        ]

    def test_where_users_keep_them(self, own_tables, tmp_path, monkeypatch):
        assert tables.user_directory() == own_tables
        monkeypatch.delenv("QJAX_TABLES")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert tables.user_directory() == tmp_path / "qjax" / "tables"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tables.user_directory() == tmp_path / ".cache" / "qjax" / "tables"

    @pytest.mark.parametrize(
        ("device", "name"),
        [
            ("NVIDIA H200", "nvidia-h200.json"),
            ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb.json"),
            ("../../etc/passwd", "etc-passwd.json"),
        ],
    )
    def test_file_of_a_device(self, device, name):
        assert tables.file_name(device) == name

    def test_the_tables_of_qjax_itself_are_sound(self):
        for file in tables.Path(tables.__file__).parent.glob("*.json"):
            assert tables.file_name(tables.read(file).device) == file.name


WRONG = {
    "an unknown operation": ({"op": "gemm"}, "op='gemm' must be one of"),
    "no rows": ({"k": 0}, "k=0 must be a positive integer"),
    "rows that are true": ({"k": True}, "k=True must be a positive integer"),
    "a float": ({"n": 256.0}, "n=256.0 must be a positive integer"),
    "nine bits": ({"bits": [9]}, "bits=[9] must be a list of integers from 1 to 8"),
    "no bits": ({"bits": []}, "bits=[] must be a list"),
    "bits alone": ({"bits": 4}, "bits=4 must be a list"),
    "a group of none": ({"group": 0}, "group=0 must be a positive integer or null"),
    "codes": ({"codes": True}, "codes=True must be one of ('counts', 'codebook', 'fl"),
    "ragged rows": ({"m": 9}, "m=9 must be a power of two from 8 to 4096"),
    "rows without use": ({"op": "dequantize"}, "m=16 must be null for dequantize"),
    "another dtype": ({"dtype": "float8"}, "dtype='float8' must be 'float16'"),
    "a ragged block": ({"block_m": 24}, "block_m=24 must be a power of two from 8"),
    "a large block": ({"block_n": 4096}, "block_n=4096 must be a power of two"),
    "a small block": ({"block_k": 32}, "block_k=32 must be a power of two from 64"),
    "no splits": ({"splits": 0}, "splits=0 must be an integer from 1 to 1024"),
    "three warps": ({"warps": 3}, "warps=3 must be a power of two from 1 to 16"),
    "no stages": ({"stages": 0}, "stages=0 must be an integer from 1 to 8"),
    "no time": ({"us": 0}, "us=0 must be a positive number"),
    "NaN": ({"us": math.nan}, "us=nan must be a positive number"),
    "a time in words": ({"dense_us": "3"}, "dense_us='3' must be a positive number"),
    "a field too many": ({"cluster": 2}, "must have the fields"),
}


class TestBrokenFiles:
    def written(self, directory, edit):
        file = directory / "nvidia-h200.json"
        tables.write(file, table((at(8), entry()), (at(16), entry())))
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))
        return file

    @pytest.mark.parametrize("case", WRONG)
    def test_entries(self, case, own_tables):
        change, message = WRONG[case]
        file = self.written(own_tables, lambda c: c["entries"][1].update(change))
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            tables.read(file)
        assert str(caught.value).startswith(f"{file}: entries[1]: ")
        assert message in str(caught.value)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda c: c["entries"].__setitem__(1, 5), "entries[1]: must have the fie"),
            (lambda c: c["entries"][1].pop("us"), "entries[1]: must have the fields"),
            (lambda c: c["entries"][1].update(m=8), "entries[1]: a second entry of"),
            (lambda c: c.update(format=1), "format=1 must be 2"),
            (lambda c: c.pop("device"), "must be an object of format, device"),
            (lambda c: c.update(versions={"jax": 1}), "must be an object of format"),
        ],
    )
    def test_files(self, edit, message, own_tables):
        file = self.written(own_tables, edit)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            tables.read(file)
        assert str(caught.value).startswith(f"{file}: ")
        assert message in str(caught.value)

    @pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udce9"])
    def test_what_is_no_json(self, text, tmp_path):
        file = tmp_path / "x.json"
        file.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match="not JSON"):
            tables.read(file)

    def test_matmul_names_file_and_entry(self, own_tables, on_a_gpu):
        file = self.written(own_tables, lambda c: c["entries"][0].update(warps=3))
        x = jax.ShapeDtypeStruct((8, 512), jnp.float32)
        with pytest.raises(ValueError, match=r"entries\[0\]: warps=3") as caught:
            jax.eval_shape(pallas.fused, x, weight())
        assert str(file) in str(caught.value)

    def test_a_file_of_another_device(self, own_tables, on_a_gpu):
        self.written(own_tables, lambda c: c.update(device="NVIDIA L4"))
        with pytest.raises(ValueError, match="device='NVIDIA L4' must be 'NVIDIA H200"):
            configs.for_matmul(8, weight())


class TestLookup:
    def put(self, directory, *pairs):
        tables.write(directory / "nvidia-h200.json", table(*pairs))
        tables.forget()

    def test_without_a_gpu_the_heuristic(self, own_tables):
        self.put(own_tables, (at(8), entry()))
        assert tables.device_kind() is None
        assert configs.for_matmul(8, weight()) == Config(8, 128, 128, warps=2)

    def test_as_measured(self, own_tables, on_a_gpu):
        keys = {
            configs.for_matmul: at(8),
            configs.for_matmul_t: at(8, "matmul_t"),
            configs.for_scale_grad: at(8, "scale_grad"),
        }
        tiles = [dataclasses.replace(TILE, stages=i) for i in (1, 2, 3)]
        pairs = [(key, entry(t)) for key, t in zip(keys.values(), tiles, strict=True)]
        self.put(own_tables, *pairs, (at(1, "dequantize"), entry(Config(8, stages=4))))
        for m in (1, 5, 8):
            assert [configure(m, weight()) for configure in keys] == tiles
        assert configs.for_dequantize(weight()) == Config(8, stages=4)

    @pytest.mark.parametrize("m", [9, 16])
    def test_a_bucket_that_was_not_measured(self, m, own_tables, on_a_gpu):
        self.put(own_tables, (at(8), entry()), (at(32), entry()))
        heuristic = configs.heuristic("matmul", m, weight())
        assert configs.for_matmul(m, weight()) == heuristic

    def test_more_rows_than_measured(self, own_tables, on_a_gpu):
        # What was measured of one row would read the weight once for every row.
        of_one = at(1, "matvec"), entry(Config(8, slices=8))
        self.put(own_tables, (at(32), entry()), of_one)
        assert configs.for_matvec(1, weight()) == Config(8, slices=8)
        assert configs.for_matvec(16, weight()).slices == 1
        heuristic = configs.heuristic("matmul", 1000, weight())
        assert configs.for_matmul(1000, weight()) == heuristic

    def test_another_shape_takes_the_nearest_tile(self, own_tables, on_a_gpu):
        wide = dataclasses.replace(TILE, block_n=128)
        self.put(own_tables, (at(8), entry()), (at(8, k=4096, n=4096), entry(wide)))
        for k, n, tile in ((512, 128, TILE), (8192, 8192, wide)):
            w = weight(k, n)
            found = configs.for_matmul(8, w)
            # Not the splits of another shape, but the heuristic's for the tile.
            words = tile.block_n * 4 // 8
            # What is loaded ahead, and a KiB of each program.
            ahead = tile.stages - 1
            shared = 1024 + ahead * tile.block_k * (words + 2 * tile.block_m)
            programs = 132 * min(16 // tile.warps, (228 << 10) // shared)
            splits = min(programs // (n // tile.block_n), k // tile.block_k // 4)
            splits = max(1, splits)
            assert found == dataclasses.replace(tile, splits=splits)

    def test_a_tile_that_the_gpu_cannot_hold(self, own_tables, on_a_gpu, monkeypatch):
        # 132 KiB: measured where k allowed no iterations of 512 rows.
        self.put(own_tables, (at(16, k=640), entry(Config(16, 128, 512, stages=4))))
        assert configs.for_matmul(16, weight(1024)).stages == 4
        monkeypatch.setattr(gpu, "at_hand", lambda: GEFORCE)
        heuristic = configs.heuristic("matmul", 16, weight(1024))
        assert configs.for_matmul(16, weight(1024)) == heuristic
        assert configs.for_matmul(16, weight(640)).stages == 4

    @pytest.mark.parametrize("other", [{"bits": 3}, {"group_size": 64}])
    def test_other_widths_and_groups(self, other, own_tables, on_a_gpu):
        self.put(own_tables, (at(8), entry()))
        w = weight(**other)
        assert configs.for_matmul(8, w) == configs.heuristic("matmul", 8, w)

    def test_users_entries_come_before_those_of_qjax(
        self, own_tables, on_a_gpu, tmp_path, monkeypatch
    ):
        own = tmp_path / "qjax" / "nvidia-h200.json"
        tables.write(own, table((at(8), entry(Config(8))), (at(16), entry(Config(16)))))
        monkeypatch.setattr(tables, "__file__", str(own))
        self.put(own_tables, (at(8), entry()))
        assert configs.for_matmul(8, weight()) == TILE
        assert configs.for_matmul(16, weight()) == Config(16)

    def test_files_are_read_once(self, own_tables, on_a_gpu):
        self.put(own_tables, (at(8), entry()))
        configs.for_matmul(8, weight())
        (own_tables / "nvidia-h200.json").unlink()
        assert configs.for_matmul(8, weight()) == TILE

    @pytest.mark.parametrize(
        ("dense_us", "rows"),
        [((20, 20, 20), 513), ((20, 9, 9), 17), ((20, 20, 9), 33), ((9, 9, 9), 17)],
    )
    def test_rows_for_the_dense_weight(self, dense_us, rows, own_tables, on_a_gpu):
        pairs = zip((16, 32, 64), dense_us, strict=True)
        self.put(own_tables, *((at(m), entry(dense_us=us)) for m, us in pairs))
        assert configs.dense_rows("matmul", weight()) == rows

    def test_rows_for_the_dense_weight_of_what_was_not_measured(self, on_a_gpu):
        assert configs.dense_rows("matmul", weight()) == 513
        assert configs.dense_rows("matmul_t", weight()) == 257


class TestGpu:
    @pytest.mark.parametrize(
        ("capability", "shared", "asynchronous"),
        [
            ("8.9", 99, False),
            ("9.0", 227, True),
            ("10.0", 227, True),
            ("12.0", 99, False),
        ],
    )
    def test_of_a_device(self, capability, shared, asynchronous, monkeypatch):
        device = types.SimpleNamespace(
            compute_capability=capability,
            core_count=128,
            shared_memory_per_block_optin=shared << 10,
        )
        monkeypatch.setattr(jax, "devices", lambda platform: [device])
        # Past the cache.
        found = gpu.at_hand.__wrapped__()
        assert found[:2] == (128, shared << 10)
        assert found.is_asynchronous == asynchronous
        # JAX may not tell all of it.
        del device.core_count, device.shared_memory_per_block_optin
        assert gpu.at_hand.__wrapped__() == (132, shared << 10, found.major)

    def test_without_one_an_h100(self):
        assert gpu.at_hand() == gpu.H100

    def test_a_smaller_one_holds_fewer_programs(self, monkeypatch):
        w = weight(4096, 14336)
        large = configs.heuristic("matvec", 8, w)
        monkeypatch.setattr(gpu, "at_hand", lambda: GEFORCE)
        small = configs.heuristic("matvec", 8, w)
        assert small == dataclasses.replace(large, splits=small.splits)
        # 112 programs without splits. 21 KiB each: four to a multiprocessor, not eight.
        assert (large.splits, small.splits) == (8, 4)

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_the_heuristic_asks_for_no_more_than_the_smallest_has(
        self, bits, monkeypatch
    ):
        monkeypatch.setattr(gpu, "at_hand", lambda: GEFORCE)
        for op, group_size in itertools.product(tables.OPS, (16, 32, 64, 128, None)):
            w = weight(4096, 4096, bits, group_size)
            for m in (1, 2, 4, 8, 16) if op == "matvec" else (8, 16, 32, 64, 128):
                config = configs.heuristic(op, m, w)
                assert configs.shared_memory(config, w) <= GEFORCE.shared


class TestJobs:
    def test_each_entry_once_and_dequantize_first(self):
        found = tune.jobs([weight(), weight(), weight(k=1024)], rows=(1, 7, 8, 17))
        assert found[0].op == "dequantize"
        assert [str(job) for job in found[1:4]] == [
            "dequantize 1024x256, 4 bits",
            "matvec 512x256, 4 bits, 1 row",
            "matvec 512x256, 4 bits, 8 rows",
        ]
        # Not what matvec takes.
        assert [str(job) for job in found[6:8]] == [
            "matmul 512x256, 4 bits, 32 rows",
            "matmul 1024x256, 4 bits, 32 rows",
        ]
        assert len(found) == 2 + 4 + 2 + 2 * 4
        assert len({job.key for job in found}) == len(found)

    def test_of_a_checkpoint(self):
        weights = tune.of_checkpoint(SHIPPED)
        assert {w.layout for w in weights} == {Tiles()}
        leaves = jax.tree.leaves(weights)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
        # Matrices that differ only in their values are one.
        assert len({w.shape for w in weights}) == len(weights)

    def test_of_a_mixed_checkpoint(self, tmp_path):
        (mixed,) = tune.of_checkpoint(exl2_directory(tmp_path))
        assert len(mixed.segments) > 1
        assert {job.op for job in tune.jobs([mixed])} == {"matvec", "matmul"}
        key = tables.Key.of("matmul", 1, mixed)
        assert key.bits == tuple(segment.bits for segment in mixed.segments)

    def test_of_a_checkpoint_with_codebooks(self):
        weights = tune.of_checkpoint(DATA / "llama_nf4_dq")
        assert all(job.key.codes == "codebook" for job in tune.jobs(weights, rows=(1,)))

    def test_of_a_dense_checkpoint(self):
        with pytest.raises(ValueError, match="no matrix that the GPU kernels read"):
            tune.of_checkpoint(DATA / "llama_bf16")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [((576, 256, 4, 128), "group_size=128"), ((512, 256, 4, 8), "group_size=8")],
    )
    def test_what_cannot_be_measured(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            tune.uniform(*arguments)


def bowl(best, seconds=1e-5):
    """Times with a single minimum, and every configuration asked for."""
    asked = []

    def measure(job, config):
        if config is None:
            return 2 * seconds
        asked.append(config)
        fields = zip(
            dataclasses.astuple(config), dataclasses.astuple(best), strict=True
        )
        return seconds * (1 + sum(abs(math.log2(a / b)) for a, b in fields))

    return measure, asked


class TestSearch:
    @pytest.mark.parametrize("op", tables.OPS)
    def test_finds_the_minimum(self, op):
        w, m = weight(8192, 8192), 4 if op == "matvec" else 64
        job = tune.Job(op, m, w)
        first = configs.heuristic(op, m, w)
        # Of the four rows of matvec, as many as there are slices.
        still = {
            "dequantize": {"block_m": 8, "splits": 1},
            "matvec": {"block_m": 8, "slices": 2},
        }.get(op, {})
        best = dataclasses.replace(
            Config(16, 256, 256, 2 * first.splits, 8, 2), **still
        )
        measure, asked = bowl(best)
        assert tune.search(job, measure) == (best, pytest.approx(1e-5))
        assert asked[0] == first
        assert len(asked) == len(set(asked)) < 60

    @pytest.mark.parametrize(
        ("op", "m"),
        [(op, 24) for op in tables.OPS[1:]] + [("matvec", m) for m in (1, 2, 4, 8, 16)],
    )
    def test_candidates_are_entries_of_a_table(self, op, m, own_tables):
        job = tune.Job(op, m, weight())
        config = configs.heuristic(op, m, weight())
        found = [
            candidate
            for field, up in itertools.product(tables.LIMITS, (True, False))
            for candidate in climb(job, config, field, up=up)
        ]
        assert config not in found
        assert all(c.block_m <= 32 or op == "matvec" for c in found)
        if op == "matvec":
            assert {c.block_m // c.slices for c in found} == {m}
        if op == "matmul_t":
            assert all(c.block_m >= 16 for c in found)
        if op == "dequantize":
            assert {(c.block_m, c.splits) for c in found} == {(8, 1)}
        assert all(configs.fits(c, job.w) for c in found)
        for candidate in found:
            tables.write(own_tables / "x.json", table((job.key, entry(candidate))))
            tables.read(own_tables / "x.json")

    def test_candidates_leave_shared_memory_for_scales(self, monkeypatch):
        job = tune.Job("matmul", 64, weight(4096, 4096))
        start = Config(64, 128, 128)
        ahead = lambda: [c.stages for c in climb(job, start, "stages", up=True)]  # noqa: E731
        # 24 KiB a stage.
        assert ahead() == [4, 5, 6, 7, 8]
        monkeypatch.setattr(gpu, "at_hand", lambda: GEFORCE)
        assert ahead() == [4]

    @pytest.mark.parametrize("error", [NotImplementedError, jax.errors.JaxRuntimeError])
    def test_what_does_not_compile_is_passed_over(self, error):
        measure, _ = bowl(Config(8, 256, 512, 1, 8, 3))

        def partly(job, config):
            if config.block_n > 128:
                raise error("too much shared memory")
            return measure(job, config)

        best, _ = tune.search(tune.Job("matmul", 8, weight()), partly)
        assert best == Config(8, 128, 512, 1, 8, 3)

    def test_what_computes_something_else_is_passed_over_loudly(self):
        measure, _ = bowl(Config(8, 256, 256, 1, 4, 3))

        def partly(job, config):
            if config.block_n > 128:
                raise gauge.WrongResultError("block_n=256 computes something else")
            return measure(job, config)

        with pytest.warns(UserWarning, match="computes something else"):
            best, _ = tune.search(tune.Job("matmul", 8, weight()), partly)
        assert best == Config(8, 128, 256, 1, 4, 3)

    def test_a_heuristic_that_does_not_compile_is_an_error(self):
        def never(job, config):
            raise jax.errors.JaxRuntimeError("no")

        with pytest.raises(jax.errors.JaxRuntimeError):
            tune.search(tune.Job("matmul", 8, weight()), never)

    def test_noise_moves_nothing(self):
        noise = np.random.default_rng(0)
        best, _ = tune.search(
            tune.Job("matmul", 8, weight()), lambda *_: noise.uniform(0.995, 1)
        )
        assert best == configs.heuristic("matmul", 8, weight())


class TestFill:
    def test_resumes(self, own_tables):
        file = own_tables / "nvidia-h200.json"
        todo = tune.jobs([weight()], ("matmul", "dequantize"), (8, 16))
        measure, asked = bowl(Config(8))
        seen = []

        def interrupted(job, config):
            if job.m == 16:
                raise KeyboardInterrupt
            return measure(job, config)

        known = tune.known(DEVICE, file)
        with pytest.raises(KeyboardInterrupt):
            tune.fill(known, todo, interrupted, save=tune.saver(file))
        done = tune.known(DEVICE, file)
        assert [key.m for key in done.entries] == [None, 8]
        count = len(asked)
        whole = tune.fill(done, todo, measure, save=tune.saver(file), begin=seen.append)
        assert seen == todo
        again = asked[count:]
        assert again
        assert again[0] == configs.heuristic("matmul", 16, weight())
        assert tune.known(DEVICE, file).entries == whole.entries
        assert set(done.entries.items()) < set(whole.entries.items())

        def never(*_):
            pytest.fail("nothing is left to measure")

        assert tune.fill(whole, todo, never, save=never) is whole

    def test_times(self, own_tables):
        measure, _ = bowl(configs.heuristic("matmul", 8, weight()), 1.23456e-5)
        kinds = ("matmul", "scale_grad", "dequantize")
        todo = tune.jobs([weight()], kinds, rows=(8,))
        filled = tune.fill(table(), todo, measure, save=lambda table: None)
        found = filled.entries[at(8)]
        assert (found.us, found.dense_us) == (12.35, 24.69)
        for op in ("scale_grad", "dequantize"):
            assert filled.entries[at(8, op)].dense_us is None

    def test_stops_when_time_is_over(self):
        todo = tune.jobs([weight()], ("matmul",), (8, 16, 32))
        measure, asked = bowl(Config(8))
        first = tune.fill(table(), todo[:1], measure, save=lambda table: None)
        count = len(asked)
        # A second for each measurement, and one for the dense product; half the next.
        ticks = itertools.count()
        limited = tune.within(measure, 1.5 * count, clock=lambda: next(ticks))
        saved = []
        filled = tune.fill(table(), todo, limited, save=saved.append)
        assert filled.entries == saved[-1].entries == first.entries
        assert count < len(asked) - count < 1.5 * count

    def test_versions_of_a_checkout_that_is_not_installed(
        self, own_tables, monkeypatch
    ):
        installed = importlib.metadata.version

        def version(name):
            if name == "qjax":
                raise importlib.metadata.PackageNotFoundError(name)
            return installed(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        tune.saver(own_tables / "x.json")(table())
        written = tables.read(own_tables / "x.json").versions
        assert written == {"jax": jax.__version__}

    def test_a_table_of_another_device(self, own_tables):
        tables.write(own_tables / "x.json", table())
        with pytest.raises(ValueError, match="device='NVIDIA H200' is not 'NVIDIA L4'"):
            tune.known("NVIDIA L4", own_tables / "x.json")


class TestGauge:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        """Interpreted kernels, timed once."""
        launch = lang.launch

        def interpreted(*operands, interpret, **options):
            return launch(*operands, interpret=True, **options)

        monkeypatch.setattr(lang, "launch", interpreted)
        monkeypatch.setattr(timing, "_LASTS", 1e-9)
        monkeypatch.setattr(gauge, "_REPEATS", 1)

    @pytest.mark.parametrize("op", tables.OPS)
    def test_times_and_compares(self, op):
        measure = tune.Gauge(nbytes=1)
        job = tune.Job(op, 8, weight(128, 32, group_size=64))
        assert measure(job, configs.heuristic(op, 8, job.w)) > 0
        if op == "matmul":  # The product through the dense weight gives the same.
            assert measure(job, None) > 0

    def test_rows_are_those_of_models(self, monkeypatch):
        given, taken = {}, {}

        def kernel(x, dy, w, config):
            given.update(matmul=x.dtype, matmul_t=dy.dtype)
            return x.astype(jnp.float32)

        job = tune.Job("matmul", 8, weight(128, 96, group_size=64))
        tune.Gauge({"matmul": kernel}, nbytes=1)(job, Config(8))

        def recording(op, kernel, rows, *operands, **rounded):
            taken[op] = rows.dtype
            return kernel(rows, *operands, **rounded)

        for op in ("matmul", "matmul_t"):
            kernels = dispatch.IMPLEMENTATIONS[op]
            kernel = functools.partial(recording, op, kernels["pallas"])
            monkeypatch.setitem(kernels, "pallas", kernel)
        x = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16)
        jax.eval_shape(jax.grad(lambda x, w: qjax.matmul(x, w).sum()), x, job.w)
        assert given == taken == {"matmul": jnp.bfloat16, "matmul_t": jnp.float32}

    @pytest.mark.parametrize("factor", [1.01, math.nan])
    def test_refuses_what_computes_something_else(self, factor):
        def kernel(x, dy, w, config):
            return (1 if config.warps == 4 else factor) * jnp.ones((8, 32))

        measure = tune.Gauge({"matmul": kernel}, nbytes=1)
        job = tune.Job("matmul", 8, weight(128, 32, group_size=64))
        assert measure(job, Config(8, warps=4)) > 0
        with pytest.raises(gauge.WrongResultError, match="does not give what the"):
            measure(job, Config(8, warps=8))

    def test_needs_a_gpu(self):
        with pytest.raises(ValueError, match="NVIDIA GPU, and JAX finds none"):
            tune.gpu()

    @pytest.mark.parametrize(
        ("capability", "fits"), [("7.5", False), ("8.0", True), ("12.0", True)]
    )
    def test_needs_a_recent_gpu(self, capability, fits, monkeypatch):
        @dataclasses.dataclass
        class Device:
            device_kind: str = DEVICE
            compute_capability: str = capability

        monkeypatch.setattr(jax, "devices", lambda platform: [Device()])
        if fits:
            assert tune.gpu() == DEVICE
        else:
            with pytest.raises(ValueError, match=r"capability 7\.5; the kernels"):
                tune.gpu()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_bar(stream, monkeypatch):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    todo = tune.jobs([weight()], ("matmul",), (8, 16))
    with tune.bar(len(todo)) as begin:
        for job in todo:
            begin(job)
    assert bool(stderr.getvalue()) == stderr.isatty()
    if stderr.isatty():
        assert "matmul 512x256, 4 bits, 16 rows" in stderr.getvalue()
        assert "1/2" in stderr.getvalue()


class TestTiming:
    def test_copies_exceed_the_cache_and_differ(self):
        w = weight(128, 32, group_size=64)
        found = timing.copies(w, 10 * timing.nbytes_of(w) - 1)
        assert len(found) == 10
        assert len({np.asarray(copy.words[0]).tobytes() for copy in found}) == 10
        assert (found[0].zero < 16).all()
        assert len(timing.copies(w, 1)) == 2

    def test_signed_zeros(self):
        w = weight(128, 32, group_size=64)
        w = dataclasses.replace(w, zero=w.zero.update(dtype=jnp.int32))
        zero = timing.copies(w, 1)[0].zero
        assert zero.dtype == jnp.int32
        assert ((zero >= 0) & (zero < 16)).all()

    def test_every_call_is_made(self):
        calls = []

        def op(x, w):
            jax.debug.callback(lambda w: calls.append(int(w[0])), w, ordered=True)
            return jnp.dot(x, w.astype(jnp.float32))[None]

        program = timing.chained(op, 3)
        weights = [jnp.full(4, i, jnp.int32) for i in range(2)]
        token = program([jnp.ones(4)], weights)
        jax.effects_barrier()
        assert calls == [0, 1] * 3
        # The scalar depends on every call: 0 and 4, three times.
        assert float(token) == 12

    @pytest.mark.parametrize(
        ("nbytes", "operations", "expected"),
        [(1, 1, 715), (30_000_000, 1, 381), (1, 7 * 10**10, 25)],
    )
    def test_rounds_last(self, nbytes, operations, expected):
        assert timing.rounds(nbytes, operations, calls=7) == expected


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(cli.app, ["tune", *map(str, arguments)])

    @pytest.fixture
    def pretended(self, monkeypatch):
        """A GPU that interprets, and times that are no times."""
        measure, asked = bowl(Config(8))
        monkeypatch.setattr(tune, "gpu", lambda: DEVICE)
        monkeypatch.setattr(tune, "Gauge", lambda: measure)
        return asked

    def test_writes_and_resumes(self, pretended, own_tables):
        arguments = ("--shape", "512x256", "--bits", "4", "--bits", "3", "--rows", "32")
        first = self.run(*arguments, "--rows", "1")
        assert first.exit_code == 0, first.stderr
        file = own_tables / "nvidia-h200.json"
        assert first.stdout == f"{file}: 6 measured, 0 were known\n"
        keys = {key[:5] for key in tables.read(file).entries}
        assert {key[0] for key in keys} == {"matvec", "matmul", "dequantize"}
        assert {key[3] for key in keys} == {(4,), (3,)}
        assert tables.read(file).versions["jax"] == jax.__version__
        second = self.run(*arguments, "--rows", "16", "--op", "matmul")
        assert second.stdout == f"{file}: 2 measured, 2 were known\n"

    def test_of_a_checkpoint(self, pretended, own_tables):
        result = self.run(SHIPPED, "--rows", 1, "--op", "matmul_t")
        assert result.exit_code == 0, result.stderr
        found = tables.read(own_tables / "nvidia-h200.json").entries
        assert {(key.op, key.m) for key in found} == {("matmul_t", 8)}

    def test_stops_after_seconds_and_goes_on(self, pretended, own_tables):
        arguments = ("--shape", "512x256", "--rows", "8", "--op", "matmul")
        file = own_tables / "nvidia-h200.json"
        first = self.run(*arguments, "--seconds", "0")
        assert first.exit_code == 0, first.stderr
        assert first.stdout == (
            f"{file}: 0 measured, 0 were known, 1 left: the same command goes on\n"
        )
        assert not pretended
        second = self.run(*arguments, "--seconds", "1000")
        assert second.stdout == f"{file}: 1 measured, 0 were known\n"

    def test_says_what_every_configuration_takes(self, pretended):
        result = self.run("--shape", "512x256", "--rows", "32", "--verbose")
        lines = result.stderr.splitlines()
        # Those of both operations, and the dense product.
        assert len(lines) == len(pretended) + 1
        said = "matmul 512x256, 4 bits, 32 rows: block_m=32 block_n="
        assert any(line.startswith(said) and line.endswith(" us") for line in lines)
        assert "matmul 512x256, 4 bits, 32 rows: dense: 20.0 us" in lines

    def test_says_why_a_configuration_is_none(self):
        def declines(job, config):
            raise NotImplementedError("too many registers\nand more")

        lines = []
        job = tune.Job("matmul", 8, weight())
        with pytest.raises(NotImplementedError):
            tune.told(declines, lines.append)(job, None)
        assert lines == [f"{job}: dense: NotImplementedError: too many registers"]

    def test_an_interruption(self, own_tables, monkeypatch):
        def interrupted(job, config):
            raise KeyboardInterrupt

        monkeypatch.setattr(tune, "gpu", lambda: DEVICE)
        monkeypatch.setattr(tune, "Gauge", lambda: interrupted)
        result = self.run("--shape", "512x256")
        assert result.exit_code == 130
        assert "the same command goes on from here" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "nothing to tune for: name a checkpoint, or a --shape KxN."),
            (("--shape", "512"), "--shape=512 must be KxN, such as 4096x14336."),
            (("--shape", "0x5"), "--shape=0x5 must be KxN"),
            (("--shape", "512x256"), "JAX finds none"),
        ],
    )
    def test_refusals(self, arguments, message):
        result = self.run(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("qjax: ")
        assert message in result.stderr

    @pytest.mark.parametrize(
        ("command", "platforms"), [("tune", []), ("verify", ["cpu"])]
    )
    def test_leaves_the_gpu_to_others_but_to_tune(
        self, command, platforms, monkeypatch
    ):
        chosen = []
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
        monkeypatch.setattr("sys.argv", ["qjax", command])
        monkeypatch.setattr(jax.config, "update", lambda name, to: chosen.append(to))
        monkeypatch.setattr(cli, "app", lambda: None)
        cli.main()
        assert chosen == platforms

    def test_the_matrix_has_to_fit(self, pretended):
        result = self.run("--shape", "100x256")
        assert result.exit_code == 1
        assert "w.shape[-2]=100 must be a multiple" in result.stderr


def test_a_description_is_what_prepare_gives():
    w = qjax.quantize(jnp.ones((512, 256), jnp.float16), 4)
    prepared = qjax.prepare(w, layout=Tiles())
    chex.assert_trees_all_equal_shapes_and_dtypes(prepared, weight())
