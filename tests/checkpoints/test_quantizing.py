"""Dense directories quantized: what is in them, what resumes, what is refused."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qjax
from qjax import checkpoints
from qjax.quantizers import calibrated, clip, gptq, gram, hqq
from tests.checkpoints import tiny
from tests.checkpoints.writes import Writes

REAL = Path(__file__).parents[1] / "data/llama_bf16"
Q, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj"))
LINEAR = [name.replace(".0.", f".{i}.") for i in (0, 1) for name in (Q, DOWN)]
ROUNDED = qjax.Spec(group_size=32, symmetric=True, scale_dtype=jnp.float16)
ROUNDED_AWQ = qjax.Spec(group_size=32, scale_dtype=jnp.float16)
DTYPE = ("scale_dtype",)
OPTIONS = {"format": "gptq", "rules": ROUNDED}


def dense(dtype=ml_dtypes.bfloat16) -> tiny.Checkpoint:
    """Four linear layers, and what stays as it is."""
    rng = np.random.default_rng(0)
    shapes = {f"{name}.weight": (32, 64) for name in LINEAR}
    shapes |= {
        "model.embed_tokens.weight": (24, 64),
        "transformer.wte.weight": (8, 32),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.table": (32, 32),
        f"{Q}.bias": (32,),
        "lm_head.weight": (32, 64),
    }
    tensors = {
        n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()
    }
    return tiny.Checkpoint(tensors=tensors, config={"model_type": "llama"})


@pytest.fixture
def source(tmp_path):
    dense().write(tmp_path / "source")
    (tmp_path / "source/tokenizer.json").write_text("{}")
    return tmp_path / "source"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def weight_of(source: Path, module: str) -> jax.Array:
    stored = checkpoints.shards.scan(source)[f"{module}.weight"]
    return jnp.asarray(stored.read().T)


def numbers(qt: qjax.QTensor) -> tuple:
    """Codes, scales and zeros, whatever the layout; implied zeros as they are."""
    zero = 2 ** (qt.segments[0].bits - 1) if qt.zero is None else qt.zero
    zero = np.broadcast_to(np.asarray(zero, np.float32), qt.scale.shape)
    return np.asarray(qjax.codes(qt)), np.asarray(qt.scale), zero


def assert_quantized(source: Path, target: Path, modules, spec) -> None:
    """Those modules hold what a spec, or one for each, makes; all else what it was."""
    assert checkpoints.verify(target) == []
    before = checkpoints.load(source)
    after = checkpoints.load(target, prepare=False)
    packed = {name for name, w in after.items() if isinstance(w, qjax.QTensor)}
    assert packed == set(modules)
    for name, w in after.items():
        if name in packed:
            one = spec[name] if isinstance(spec, dict) else spec
            wanted = one.quantize(weight_of(source, name))
            chex.assert_trees_all_equal(numbers(w), numbers(wanted))
        else:
            assert w.dtype == before[name].dtype
            assert np.asarray(w).tobytes() == np.asarray(before[name]).tobytes()
    dense = before.keys() - {f"{name}.weight" for name in packed}
    assert after.keys() == packed | dense


def entry_of(path: Path) -> dict:
    return checkpoints.read_config(path)["quantization_config"]


def test_a_trained_model(tmp_path):
    spec = qjax.Spec(symmetric=True, scale_dtype=jnp.float16)
    checkpoints.quantize(REAL, tmp_path / "x", format="gptq", rules=spec)
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    names += ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    modules = [f"model.layers.{i}.{name}" for i in range(3) for name in names]
    assert_quantized(REAL, tmp_path / "x", modules, spec)
    config = checkpoints.read_config(tmp_path / "x")
    entry = config.pop("quantization_config")
    assert config == checkpoints.read_config(REAL)
    assert entry == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["qjax"]},
    }


CASES = {
    # format, spec, dtype of the scales in the file
    "gptq_v2": ("gptq_v2", {"scale_dtype": jnp.float16}, np.float16),
    "gptq_p": ("gptq_p", {"bits": 5, "scale_dtype": jnp.float16}, np.float16),
    "awq": ("awq", {"scale_dtype": jnp.float16}, np.float16),
    "symmetric": ("compressed-tensors", {"symmetric": True}, ml_dtypes.bfloat16),
    "asymmetric": ("compressed-tensors", {"bits": 3}, ml_dtypes.bfloat16),
    "columns": ("compressed-tensors", {"group_size": None}, ml_dtypes.bfloat16),
    "rounded hqq": ("hqq", {"symmetric": True, "bits": 3}, ml_dtypes.bfloat16),
    "columns hqq": ("hqq", {"group_size": None}, ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_formats(tmp_path, source, case):
    format_, arguments, dtype = CASES[case]
    spec = qjax.Spec(**{"group_size": 32} | arguments)
    checkpoints.quantize(source, tmp_path / "x", format=format_, rules=spec)
    assert_quantized(source, tmp_path / "x", LINEAR, spec)
    assert checkpoints.load(tmp_path / "x", prepare=False)[Q].scale.dtype == dtype
    assert (tmp_path / "x/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("format_", "quantize"), [("hqq", hqq.quantize), ("gptq_v2", clip.quantize)]
)
def test_quantizers(tmp_path, source, format_, quantize):
    spec = qjax.Spec(bits=4, group_size=32, quantizer=quantize)
    seen = {}

    def watch(name, w, packed):
        seen[name] = float(qjax.quantizers.output_error(w, packed))

    options = {"format": format_, "rules": spec, "watch": watch}
    checkpoints.quantize(source, tmp_path / "x", **options)
    assert_quantized(source, tmp_path / "x", LINEAR, spec)
    assert seen.keys() == set(LINEAR)
    assert all(0.01 < error < 0.2 for error in seen.values())


def test_scales_of_the_weights_dtype(tmp_path):
    source = dense(np.float32).write(tmp_path / "source")
    spec = qjax.Spec(group_size=32, symmetric=True)
    options = {"format": "compressed-tensors", "rules": spec}
    checkpoints.quantize(source, tmp_path / "x", **options)
    assert_quantized(source, tmp_path / "x", LINEAR, spec)
    assert checkpoints.load(tmp_path / "x", prepare=False)[Q].scale.dtype == np.float32


EIGHT = dataclasses.replace(ROUNDED, bits=8)
RULES = {
    "the first decides": (
        [(DOWN, None), (r".*\.mlp\..*", EIGHT), (".*", ROUNDED)],
        {LINEAR[0]: ROUNDED, LINEAR[2]: ROUNDED, LINEAR[3]: EIGHT},
    ),
    "what none matches stays dense": (
        {".*q_proj": EIGHT, ".*down_proj.bias|lm_head": None},
        {LINEAR[0]: EIGHT, LINEAR[2]: EIGHT},
    ),
    "a rest that others leave empty": (
        [(".*_proj", EIGHT), (".*", ROUNDED)],
        dict.fromkeys(LINEAR, EIGHT),
    ),
    "exceptions that leave nothing": (
        [*((re.escape(name), EIGHT) for name in LINEAR), (".*_proj", ROUNDED)],
        dict.fromkeys(LINEAR, EIGHT),
    ),
    "names of tensors": (
        [(r".*\.0\..*\.weight", EIGHT), (r".*\.1\.mlp\..*", ROUNDED)],
        {LINEAR[0]: EIGHT, LINEAR[1]: EIGHT, LINEAR[3]: ROUNDED},
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(tmp_path, source, case):
    rules, specs = RULES[case]
    checkpoints.quantize(source, tmp_path / "x", format="gptq", rules=rules)
    assert_quantized(source, tmp_path / "x", specs, specs)


def test_skip_goes_before_rules(tmp_path, source):
    options = {"rules": [(".*q_proj", EIGHT), (".*", ROUNDED)], "skip": [Q]}
    checkpoints.quantize(source, tmp_path / "x", format="gptq", **options)
    specs = dict(zip(LINEAR[1:], (ROUNDED, EIGHT, ROUNDED), strict=True))
    assert_quantized(source, tmp_path / "x", specs, specs)


def grams_of(modules, seed):
    inputs = jax.random.normal(jax.random.key(seed), (len(modules), 96, 64))
    return {name: gram(x) for name, x in zip(modules, inputs, strict=True)}


def test_grams(tmp_path, source, monkeypatch, refuses):
    """Each weight meets its own; another gram is another request."""
    first, other = (calibrated(ROUNDED, grams_of(LINEAR[:3], s)) for s in (0, 1))
    stopped(monkeypatch, 8, source, tmp_path / "x", format="gptq", rules=first)
    for rules in (other, first):
        options = {"format": "gptq", "rules": rules, "overwrite": True}
        checkpoints.quantize(source, tmp_path / "x", **options)
        specs = dict(zip(LINEAR, [spec for _, spec in rules], strict=True))
        assert_quantized(source, tmp_path / "x", LINEAR, specs)
    bad = calibrated(ROUNDED, {Q: jnp.full((64, 64), jnp.nan)})
    with refuses(f"{Q}.weight: gram with damp=0.01 of its mean diagonal is not"):
        checkpoints.quantize(source, tmp_path / "y", format="gptq", rules=bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "x"]


@pytest.mark.parametrize(
    ("skip", "head", "modules"),
    [
        ([], True, [*LINEAR, "lm_head"]),
        ([r".*\.1\..*"], False, LINEAR[:2]),
        (["model.layers.0.mlp", ".*self_attn.*", Q], False, LINEAR[1::2]),
        (["lm_head"], True, LINEAR),
    ],
)
def test_what_is_quantized(tmp_path, source, skip, head, modules, refuses):
    options = {"skip": skip, "head": head, **OPTIONS}
    if "model.layers.0.mlp" in skip:
        with refuses("skip='model.layers.0.mlp' matches the whole path of no linear"):
            checkpoints.quantize(source, tmp_path / "x", **options)
        options["skip"] = skip[1:]
    checkpoints.quantize(source, tmp_path / "x", **options)
    assert_quantized(source, tmp_path / "x", modules, ROUNDED)
    assert entry_of(tmp_path / "x")["lm_head"] == ("lm_head" in modules)
    rules = entry_of(tmp_path / "x").get("dynamic", {})
    assert len(rules) == 4 - sum(name in LINEAR for name in modules)


@pytest.mark.parametrize(
    ("format_", "entry"),
    [
        ("gptq", "dynamic"),
        ("awq", "modules_to_not_convert"),
        ("compressed-tensors", "ignore"),
    ],
)
def test_routers_and_embeddings_stay_dense(tmp_path, format_, entry):
    layer = "model.layers.2"
    routers = [f"{layer}.block_sparse_moe.gate", f"{layer}.mlp.router.classifier"]
    routers += [f"{layer}.mlp.shared_expert_gate"]
    others = ["shared", "emb", "model.embeddings", f"{layer}.relative_attention_bias"]
    made = dense()
    for name in (*routers, *others, f"{layer}.mlp.gate_proj"):
        made.tensors[f"{name}.weight"] = np.ones((32, 64), np.float16)
    source = made.write(tmp_path / "source")
    spec = ROUNDED if format_ != "awq" else ROUNDED_AWQ
    options = {"format": format_, "rules": spec, "skip": [r".*block.*\.gate"]}
    checkpoints.quantize(source, tmp_path / "x", **options)
    modules = [*LINEAR, f"{layer}.mlp.gate_proj"]
    assert_quantized(source, tmp_path / "x", modules, spec)
    # Loaders have to know of linear layers alone.
    said = [name.replace("\\", "") for name in entry_of(tmp_path / "x")[entry]]
    assert [name for name in routers if not any(name in one for one in said)] == []
    assert not any(one.endswith(name) for name in others for one in said)


def test_stacks_of_matrices_stay_dense_and_are_told_of(tmp_path):
    made = dense()
    size = sum(x.nbytes for x in made.tensors.values())
    for i in range(4):
        name = f"model.layers.{i}.mlp.experts.gate_up_proj"
        made.tensors[name] = np.ones((2, 32, 64), np.float16)
    source = made.write(tmp_path / "source")
    with pytest.warns(UserWarning, match="three or more axes stay dense") as caught:
        checkpoints.quantize(source, tmp_path / "x", **OPTIONS)
    (said,) = [str(warning.message) for warning in caught]
    stacked = 4 * 2 * 32 * 64 * 2
    assert f"4 of 14 with {stacked} of {size + stacked} bytes: model.layers.0" in said
    assert said.endswith("model.layers.2.mlp.experts.gate_up_proj and others.")
    assert_quantized(source, tmp_path / "x", LINEAR, ROUNDED)


def test_zeros_that_happen_to_be_the_middle_code(tmp_path):
    """They are written, as the plan had it, which does not look at values."""
    made = dense()
    # From -8 to 7 in each group of each row: scales of 1 and zeros of 8.
    made.tensors[f"{Q}.weight"][:] = np.tile(np.arange(-8, 8), 4)
    source = made.write(tmp_path / "source")
    spec = qjax.Spec(group_size=32)
    options = {"format": "compressed-tensors", "rules": spec}
    checkpoints.quantize(source, tmp_path / "x", **options)
    assert_quantized(source, tmp_path / "x", LINEAR, spec)
    loaded = checkpoints.load(tmp_path / "x", prepare=False)[Q]
    assert (loaded.zero == 8).all()


def test_in_its_own_place(tmp_path, source):
    checkpoints.quantize(source, tmp_path / "whole", **OPTIONS)
    with pytest.raises(FileExistsError, match="already there"):
        checkpoints.quantize(source, source, **OPTIONS)
    checkpoints.quantize(source, source, overwrite=True, **OPTIONS)
    assert contents(source) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "whole"]


CALLS = []


def noted(w, *codes, scale=1, **options):
    """Notes each call with values, not those with nothing but a shape."""
    if not isinstance(w, jax.core.Tracer):
        CALLS.append(w)
    return qjax.quantize(w * scale, *codes, **options)


def by(quantizer):
    return dataclasses.replace(ROUNDED, quantizer=quantizer)


@pytest.fixture
def calls():
    CALLS.clear()
    return CALLS


def stopped(monkeypatch, at, *arguments, **options):
    """Leaves a call that has written ``at`` weights."""
    with monkeypatch.context() as patched:
        Writes(patched).fail(at, OSError("disk full"))
        with pytest.raises(OSError, match="disk full"):
            checkpoints.quantize(*arguments, **options)


def test_resumes(tmp_path, source, monkeypatch, calls):
    options = {"format": "gptq", "rules": by(noted), "shard_bytes": 3000}
    checkpoints.quantize(source, tmp_path / "whole", **options)
    assert len(calls) == 4
    stopped(monkeypatch, 6, source, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
    calls.clear()
    checkpoints.quantize(source, tmp_path / "x", **options)
    # What was finished is not quantized again.
    assert 0 < len(calls) < 4
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "whole", "x"]


OTHERS = {
    # The same shapes, other values.
    "argument": by(functools.partial(noted, scale=0.5)),
    "array": by(functools.partial(noted, scale=np.array(0.5, "bfloat16"))),
    "function": by(clip.quantize),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_quantizer_is_not_gone_on_with(tmp_path, source, monkeypatch, other):
    options = {"format": "gptq", "rules": by(noted)}
    stopped(monkeypatch, 7, source, tmp_path / "x", **options)
    options["rules"] = OTHERS[other]
    checkpoints.quantize(source, tmp_path / "x", **options)
    assert_quantized(source, tmp_path / "x", LINEAR, OTHERS[other])


def test_arrays_are_told_apart(tmp_path, source, monkeypatch):
    of = functools.partial(functools.partial, noted)
    first, second = (by(of(scale=np.array(x, "bfloat16"))) for x in (0.5, 0.25))
    stopped(monkeypatch, 7, source, tmp_path / "x", format="gptq", rules=first)
    checkpoints.quantize(source, tmp_path / "x", format="gptq", rules=second)
    assert_quantized(source, tmp_path / "x", LINEAR, second)


def test_a_quantizer_may_have_no_file(tmp_path, source, monkeypatch):
    made = {"__name__": "typed", "rounded": qjax.quantize}
    exec("def quantize(w, *a, **b): return rounded(w, *a, **b)", made)
    options = {"format": "gptq", "rules": by(made["quantize"])}
    stopped(monkeypatch, 7, source, tmp_path / "x", **options)
    checkpoints.quantize(source, tmp_path / "x", **options)
    assert_quantized(source, tmp_path / "x", LINEAR, ROUNDED)


def test_compiled_quantizers_have_the_names_of_their_functions(tmp_path, source):
    compiled = jax.jit(qjax.quantize, static_argnums=(1, 2, 3), static_argnames=DTYPE)
    options = {"format": "gptq", "rules": by(compiled)}
    checkpoints.quantize(source, tmp_path / "x", **options)
    assert_quantized(source, tmp_path / "x", LINEAR, ROUNDED)


def test_all_that_cannot_be_quantized_is_listed(tmp_path, source, calls):
    def ragged(tensors):
        tensors["a.up.weight"] = np.ones((32, 40), np.float16)  # k is no multiple
        tensors["a.odd.weight"] = np.ones((33, 64), np.float16)  # of GPTQ's words

    made = dense()
    ragged(made.tensors)
    made.write(source)
    options = {"format": "gptq", "rules": by(noted)}
    with pytest.raises(ValueError, match="2 of 6 matrices cannot be writ") as caught:
        checkpoints.quantize(source, tmp_path / "x", **options)
    _, *reasons, advice = str(caught.value).splitlines()
    assert "a.up: w.shape[-2]=40 must be a multiple of group_size=32" in str(reasons)
    assert "a.odd: GPTQ (gptq) cannot hold" in str(reasons)
    assert "n=33 does not fill whole words" in str(reasons)
    assert advice == (
        "Choose another group size or width, or another format, or leave these modules "
        "dense (skip)."
    )
    assert calls == []
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    checkpoints.quantize(source, tmp_path / "x", skip=["a.(up|odd)"], **options)
    assert_quantized(source, tmp_path / "x", LINEAR, ROUNDED)


def test_modules_with_one_reason_share_a_line(tmp_path):
    made = dense()
    names = [f"a.{i}.up" for i in range(4)]
    for name in (*names, "b"):
        made.tensors[f"{name}.weight"] = np.ones((32, 40), np.float16)
    made.tensors["c.weight"] = np.ones((32, 48), np.float16)
    source = made.write(tmp_path / "source")
    with pytest.raises(ValueError, match="6 of 10 matrices cannot be") as caught:
        checkpoints.quantize(source, tmp_path / "x", **OPTIONS)
    _, first, second, _ = str(caught.value).splitlines()
    assert first.startswith("  5 modules such as a.0.up: w.shape[-2]=40 must be a mul")
    assert second.startswith("  c: w.shape[-2]=48 must be a multiple")
    options = {"skip": ["b", r"a\.[12]\.up", "c"], **OPTIONS}
    with pytest.raises(ValueError, match="2 of 6 matrices cannot be") as caught:
        checkpoints.quantize(source, tmp_path / "x", **options)
    assert "\n  a.0.up, a.3.up: w.shape" in str(caught.value)


def halved(w, *codes, **options):
    return qjax.quantize(w[:, :16], *codes, **options)


def left(w, *codes, **options):
    return w


REFUSALS = {
    "v1 with zeros": (
        {"rules": qjax.Spec(group_size=32)},
        "GPTQ v1 cannot store those of 0; 'gptq_v2' holds all of them, and symmetric",
    ),
    "exl2": ({"format": "exl2"}, "its scales are plain numbers"),
    "width": (
        {"format": "awq", "rules": dataclasses.replace(ROUNDED_AWQ, bits=3)},
        "(4,)",
    ),
    "shape": (
        {"rules": by(halved)},
        "quantizer returned QTensor(64x16",
    ),
    "gram": (
        {"rules": calibrated(ROUNDED, {Q: jnp.eye(32)})},
        f"{Q}: gram is float32(32, 32) and must be float(64, 64)",
    ),
    "groups": (
        {
            "format": "awq",
            "rules": [(Q, qjax.Spec(group_size=64)), (".*", ROUNDED_AWQ)],
        },
        f"{Q}: AWQ has one group size for all, here 32, and it has 64",
    ),
    "tags of widths": (
        {"format": "hqq", "rules": [(Q, EIGHT), (".*", ROUNDED)]},
        "HQQ tells modules apart by tags, and most of 'self_attn.q_proj' have",
    ),
    "rule": (
        {"rules": [("q_proj", None), (".*", ROUNDED)]},
        "rules has the pattern 'q_proj', which matches the whole path of no linear",
    ),
    "rule for the head": (
        {"rules": [("lm_head", EIGHT), (".*", ROUNDED)]},
        "and lm_head does without head=True",
    ),
    "rule behind others": (
        {"rules": [(".*q_proj", EIGHT), (r".*\.0\..*q_proj", ROUNDED), (".*", EIGHT)]},
        r"has the pattern '.*\\.0\\..*q_proj', which decides nothing: others before it "
        f"match all that it does, such as {Q}; put it before them",
    ),
    "rule that leaves behind others": (
        {"rules": [(".*", ROUNDED), (".*q_proj", None)]},
        "has the pattern '.*q_proj', which decides nothing",
    ),
    "all but the last": (
        {"rules": [(".*_proj", ROUNDED), (".*", EIGHT), (".*", None)]},
        "has the pattern '.*', which decides nothing",
    ),
    "bytes": ({"rules": [(b".*", ROUNDED)]}, "rules has the pattern b'.*'"),
    "no rule": ({"rules": []}, "no linear layer is left to quantize, of 5"),
    "tags": (
        {"format": "hqq", "skip": [r".*\.1\.mlp.*"]},
        "HQQ leaves modules dense by tags, and 'mlp.down_proj', the tag of model",
    ),
    "no format": ({"format": "gguf"}, "format='gguf' must be one of ['gptq'"),
    "no pattern": ({"skip": ["*.up"]}, "skip='*.up' is not a regular expression"),
    "skip of bytes": ({"skip": [b".*"]}, "skip=b'.*' is not a regular expression"),
    "all": ({"skip": [".*"]}, "no linear layer is left to quantize, of 5"),
    "shards": ({"shard_bytes": 0}, "shard_bytes=0 must be positive"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path, source, case, refuses):
    options, message = REFUSALS[case]
    with refuses(message):
        checkpoints.quantize(source, tmp_path / "x", **OPTIONS | options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


QUANTIZERS = {
    "lambda": (
        lambda w, *codes, **_: qjax.quantize(w, *codes),
        "must be a function with a name in a module",
    ),
    "method": ("".format, "must be a function with a name in a module"),
    "argument": (
        functools.partial(noted, scale=[4]),
        "quantizer has the argument [4], which must be None, a number",
    ),
    "class": (functools.partial(noted, scale=Path), "has the argument <class"),
    "dense": (left, "must be a QTensor"),
    "gram": (gptq.quantize, "argument: 'gram'"),
}


def test_what_a_quantizer_lacks_is_said_with_the_weight(tmp_path, source):
    options = {"format": "gptq", "rules": [(DOWN, by(gptq.quantize))]}
    with pytest.raises(TypeError) as caught:
        checkpoints.quantize(source, tmp_path / "x", **options)
    assert caught.value.__notes__[-1] == f"It was raised for the shape of {DOWN}."


def test_one_pattern_is_no_sequence(tmp_path, source, refuses):
    with refuses("skip='.*' must be a sequence of patterns; pass ['.*']", TypeError):
        checkpoints.quantize(source, tmp_path / "x", skip=".*", **OPTIONS)


@pytest.mark.parametrize("case", QUANTIZERS)
def test_no_quantizers(tmp_path, source, case, refuses):
    quantizer, message = QUANTIZERS[case]
    with refuses(message, TypeError):
        options = {"format": "gptq", "rules": by(quantizer)}
        checkpoints.quantize(source, tmp_path / "x", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tied_head_cannot_be_quantized(tmp_path, source, refuses):
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    with refuses("has no lm_head.weight; a head that is tied to the embeddings stays"):
        checkpoints.quantize(source, tmp_path / "x", head=True, **OPTIONS)
    checkpoints.quantize(source, tmp_path / "x", skip=["lm_head"], **OPTIONS)
    assert_quantized(source, tmp_path / "x", LINEAR, ROUNDED)


def test_a_tied_head_that_is_stored_cannot_be_quantized(tmp_path, refuses):
    made = dense()
    made.config["tie_word_embeddings"] = True
    source = made.write(tmp_path / "source")
    with refuses(
        "ties lm_head to the embeddings (tie_word_embeddings), which stay den"
    ):
        checkpoints.quantize(source, tmp_path / "x", head=True, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    options = {"head": True, "skip": ["lm_head"], **OPTIONS}
    checkpoints.quantize(source, tmp_path / "x", **options)
    assert_quantized(source, tmp_path / "x", LINEAR, ROUNDED)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2"},
        {"model_type": "openai-gpt"},
        {"model_type": "encoder-decoder", "decoder": {"model_type": "gpt2"}},
    ],
)
def test_weights_that_are_stored_transposed(tmp_path, config, refuses):
    made = dense()
    attention = "h.0.attn.c_attn"
    made.tensors[f"{attention}.weight"] = np.ones((64, 96), np.float16)
    source = tiny.Checkpoint(tensors=made.tensors, config=config)
    source = source.write(tmp_path / "source")
    with refuses(f"stores the weights of {attention} and others [k, n] (Conv1D)"):
        checkpoints.quantize(source, tmp_path / "x", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    checkpoints.quantize(source, tmp_path / "x", skip=[attention], **OPTIONS)
    assert_quantized(source, tmp_path / "x", LINEAR, ROUNDED)


def test_linear_layers_with_the_names_of_gpt2(tmp_path):
    made = dense()
    up = "h.0.mlp.c_fc"  # as in GPT-Neo
    made.tensors[f"{up}.weight"] = np.ones((96, 64), np.float16)
    source = tiny.Checkpoint(tensors=made.tensors, config={"model_type": "gpt_neo"})
    checkpoints.quantize(source.write(tmp_path / "a"), tmp_path / "x", **OPTIONS)
    assert_quantized(tmp_path / "a", tmp_path / "x", [*LINEAR, up], ROUNDED)


def test_a_module_with_the_name_of_a_tensor(tmp_path, refuses):
    made = dense()
    made.tensors[Q] = np.ones(3, np.float16)
    source = made.write(tmp_path / "source")
    with refuses(f"{Q} is a tensor, and with {Q}.weight quantized also the name of"):
        checkpoints.quantize(source, tmp_path / "x", **OPTIONS)
    checkpoints.quantize(source, tmp_path / "x", skip=[Q], **OPTIONS)
    assert checkpoints.load(tmp_path / "x")[Q].shape == (3,)


def test_what_is_quantized_already_is_refused(tmp_path, refuses):
    source = tiny.checkpoint().write(tmp_path / "source")
    with refuses(f"is quantized already: {tiny.MODULE} is gptq. `qjax convert`"):
        checkpoints.quantize(source, tmp_path / "x", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


UNFIT = " is not finite: it holds NaN or infinity and cannot be quantized"


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float16", UNFIT),
        (np.nan, "bfloat16", UNFIT),
        (-np.inf, "float32", UNFIT),
        (
            1e9,
            "float32",
            ": a scale of what it became is not finite; a wider scale_dty",
        ),
    ],
)
def test_weights_that_no_scale_can_hold(tmp_path, value, dtype, message, refuses):
    made = dense(dtype)
    made.tensors[f"{DOWN}.weight"][3, 5] = value
    source = made.write(tmp_path / "source")
    with refuses(f"{DOWN}.weight{message}"):
        checkpoints.quantize(source, tmp_path / "x", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def blind(w, *codes, **options):
    """Makes finite scales of whatever it is given."""
    return qjax.quantize(jnp.nan_to_num(w), *codes, **options)


def test_weights_that_are_not_finite_though_their_scales_are(tmp_path, refuses):
    made = dense()
    made.tensors[f"{DOWN}.weight"][3, 5] = np.nan
    source = made.write(tmp_path / "source")
    with refuses(f"{DOWN}.weight{UNFIT}"):
        options = {"format": "gptq", "rules": by(blind)}
        checkpoints.quantize(source, tmp_path / "x", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_files_are_copied_and_other_weights_are_not(tmp_path, source):
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    (source / "generation_config.json").write_text(json.dumps({"top_k": 1}))
    shutil.copytree(source, source / "original")
    with pytest.warns(UserWarning, match=r"the directories \['original'\] are not cop"):
        checkpoints.quantize(source, tmp_path / "x", **OPTIONS)
    assert contents(tmp_path / "x").keys() == {
        *("config.json", "generation_config.json", "model.safetensors"),
        "tokenizer.json",
    }
