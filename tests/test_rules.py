"""Rules: patterns, specs, and those of people who come from qwix."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import rules

SPEC = qjax.Spec(bits=3, group_size=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationRule:
    """The fields of qwix's own, version 0.1.8; `make test-models` reads real ones."""

    module_path: str = ".*"
    op_names: tuple = ()
    weight_qtype: object = None
    act_qtype: object = None
    tile_size: int | float | None = None
    act_static_scale: bool | None = None
    weight_calibration_method: str = "absmax"
    act_calibration_method: str | None = None
    act_batch_axes: tuple = (0,)


def test_a_pattern_matches_all_of_a_path_or_of_its_module():
    (rule,) = rules.read([("layers/0/.*_proj", SPEC)])
    assert rule.matches("layers/0/q_proj/w")
    assert rule.matches("layers/0/up_proj")
    assert not rule.matches("model/layers/0/q_proj/w")
    assert not rule.matches("layers/0/q_proj/inner/w")
    assert rule.spec is SPEC
    (rule,) = rules.read([(r"layers\.0\..*_proj", SPEC)])
    assert rule.matches("layers.0.q_proj.weight", ".")
    assert not rule.matches("layers.0.q_proj.weight")


def test_a_spec_alone_and_a_mapping_are_rules():
    assert rules.read(SPEC)[0].matches("anything")
    mapped = rules.read({"a": None, "b": SPEC})
    assert [rule.spec for rule in mapped] == [None, SPEC]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([("(", SPEC)], ValueError, "has the pattern '(', which is no regular"),
        ([(3, SPEC)], ValueError, "has the pattern 3"),
        ([(b"a", SPEC)], ValueError, "rules has the pattern b'a', which is no regular"),
        ([(re.compile(b"a"), SPEC)], ValueError, "rules has the pattern re.compile(b"),
        ([("a", 4)], TypeError, "rules has 4 for 'a'; pass qjax.Spec"),
        ([("a",)], TypeError, "rules has ('a',), which is no (pattern, Spec or None)"),
        ("a", TypeError, "rules='a' must be a Spec, or a sequence"),
        (4, TypeError, "rules=4 must be a Spec"),
    ],
)
def test_what_is_no_rule_is_refused(given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        rules.read(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1 must be an integer from 2 to 8"),
        ({"bits": 9}, "bits=9 must be an integer from 2 to 8"),
        ({"bits": 4.0}, "bits=4.0 must be an integer"),
        ({"bits": True}, "bits=True must be an integer"),
        ({"group_size": 0}, "group_size=0 must be a positive integer or None"),
        ({"group_size": 32.0}, "group_size=32.0 must be a positive integer"),
        ({"group_size": "32"}, "group_size='32' must be a positive integer"),
        ({"group_size": True}, "group_size=True must be a positive integer"),
        ({"scale_dtype": "int8"}, "scale_dtype=int8 must be bfloat16, float16"),
    ],
)
def test_what_no_weight_can_have_is_refused_at_once(options, message, refuses):
    with refuses(message):
        qjax.Spec(**options)


def test_a_spec_of_integers_of_numpy_is_that_of_integers():
    spec = qjax.Spec(bits=np.int64(4), group_size=np.int32(32))
    assert repr(spec) == repr(qjax.Spec(bits=4, group_size=32))
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    assert qjax.quantize_model(model, spec).kernel.segments[0].bits == 4


@pytest.mark.parametrize(
    ("pattern", "is_for_all"),
    [
        (".*", True),
        ("(?!head).*", True),
        ("layers/.*", False),
        (".*/kernel", False),
        ("kernel", False),
    ],
)
def test_a_rule_for_all_names_no_weight(pattern, is_for_all):
    (rule,) = rules.read([(pattern, qjax.Spec())])
    assert rule.is_for_all == is_for_all
    assert rules.read(qjax.Spec())[0].is_for_all


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({"weight_qtype": "int4"}, qjax.Spec(group_size=None, symmetric=True)),
        (
            {"weight_qtype": jnp.int4, "tile_size": 32},
            qjax.Spec(group_size=32, symmetric=True),
        ),
        (
            {"weight_qtype": jnp.int8, "weight_calibration_method": "minmax"},
            qjax.Spec(bits=8, group_size=None),
        ),
        ({}, None),
    ],
)
def test_rules_of_qwix_are_specs(options, spec):
    (rule,) = rules.read([QuantizationRule(module_path="a/b", **options)])
    assert rule.spec == spec
    assert rule.matches("a/b/kernel")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"act_qtype": "int8"}, "act_qtype='int8'"),
        ({"weight_qtype": "nf4"}, "weight_qtype='nf4'"),
        ({"weight_qtype": jnp.float8_e4m3fn}, "weight_qtype='float8_e4m3fn'"),
        ({"tile_size": 0.25}, "tile_size=0.25"),
        ({"op_names": ("einsum",)}, "op_names=('einsum',)"),
        ({"weight_calibration_method": "rms,2"}, "weight_calibration_method='rms,2'"),
    ],
)
def test_what_rules_of_qwix_cannot_mean_here_names_the_field(options, field):
    options = {"weight_qtype": "int4", **options}
    with pytest.raises(NotImplementedError, match=re.escape(f"rules has {field}")):
        rules.read([QuantizationRule(**options)])


def test_patterns_that_match_nothing_are_refused(refuses):
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    message = (
        "rules has the patterns ['kernels'], and none of them matches all of a path of "
        "the model, such as ['bias', 'kernel']"
    )
    with refuses(message):
        qjax.quantize_model(layer, [("kernels", qjax.Spec(group_size=32))])
    # Rules that only leave weights alone may leave all of them.
    qjax.quantize_model(layer, [("kernels", None)])
