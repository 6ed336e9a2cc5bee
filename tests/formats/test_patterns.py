"""Patterns are matched as Python does, or refused before they take forever."""

import re
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from qjax.formats import patterns

USUAL = [
    r".*\.18\..*gate.*",
    r".*\.mlp\..*experts\..*(?:gate|up)_proj.*",
    r"^model\.layers\.(?:1|2|30)\..*$",
    r"^(?!.*experts).*mlp",
    r"(?i).*LM_HEAD",
    r"model\.layers\.[0-9]+\.self_attn\.[qkv]_proj",
    r"model\.layers\.\d{1,2}\.(mlp|self_attn)\.(?P<name>\w+_proj)?",
    r"lm_head",
    r"layers.[^]x]*]?",
    "|".join(rf"model\.layers\.{i}\.mlp\.up_proj" for i in range(200)),
    "",
]
NAMES = [
    "model.layers.18.mlp.gate_proj",
    "model.layers.2.mlp.up_proj",
    "model.layers.30.mlp.experts.127.down_proj",
    "model.layers.199.mlp.up_proj",
    "model.layers.0.self_attn.q_proj",
    "layers.0]",
    "lm_head",
]


@pytest.mark.parametrize("pattern", USUAL, ids=lambda pattern: pattern[:30] or "empty")
def test_usual_patterns_match_as_in_python(pattern):
    patterns.check_pattern("dynamic", pattern)
    found = [patterns.matches(pattern, name) for name in NAMES]
    assert found == [bool(re.match(pattern, name)) for name in NAMES]
    whole = [patterns.matches(pattern, name, whole=True) for name in NAMES]
    assert whole == [bool(re.fullmatch(pattern, name)) for name in NAMES]


def test_flags_hold_for_a_pattern_that_is_a_part():
    assert patterns.ends_path("(?i)LM_HEAD", "lm_head")
    assert patterns.ends_path(r"(?is)model\.LAYERS\.2", "model.layers.2.mlp.up_proj")
    assert not patterns.ends_path("(?s)LM_HEAD", "lm_head")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+b", "(a|a)*b", "(?:a|aa)+b", "((a)*)*b", "(?=(a+)+b)", "(a*){9}b"),
        *("(a?){30}b", "(a|b|ab)*?c", "(?P<x>a+)*+b", "([^)]+)+b", r"(\)+)+b"),
    ],
)
def test_repeated_groups_are_refused(pattern):
    with pytest.raises(
        ValueError, match=r"dynamic: .* repeats a group, which may take forever"
    ):
        patterns.check_pattern("dynamic", pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "a*" * 30 + "b",
        "a?" * 30 + "b",
        "(a|a)" * 30 + "b",
        "(?:(a|a)(a|a))?" * 12 + "b",
        "(?=.*a.*a.*a.*a.*a.*b)",
        "a{0,40}" * 8 + "b",
        ".*a" * 9 + "b",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_too_many_ways_are_refused(pattern):
    patterns.check_pattern("dynamic", pattern)
    with pytest.raises(ValueError, match=r"may fit a name of 40 letters in more than"):
        patterns.matches(pattern, "a" * 40)


@pytest.mark.parametrize("pattern", ["(", "*a", "a{99999999999}", "(" * 9999, "[a"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match=r"^dynamic: .* is no pattern: "):
        patterns.check_pattern("dynamic", pattern)


@pytest.mark.parametrize("pattern", ["(?#x)a", "(a)(?(1)b|c)", "(?x: a)", "(?>a)"])
def test_what_is_not_counted_is_refused(pattern):
    with pytest.raises(ValueError, match=r"^dynamic: .* which is not supported"):
        patterns.check_pattern("dynamic", pattern)


pieces = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", r"\w", "a*", ".*", "b+", "a?", "a{1,3}"]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4).map("".join)
        | st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format)
        | inner.map("({})?".format)
        | inner.map("(?={})".format)
        | inner.map("(?!{})".format)
        | inner.map("({})+".format)
    ),
    max_leaves=12,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(pieces, st.text("ab", max_size=24))
def test_any_pattern_matches_in_time_or_is_refused(pattern, name):
    start = time.monotonic()
    try:
        found = patterns.matches(pattern, name)
    except ValueError:
        found = None
    # The most ways there may be take less than a second or two here.
    assert time.monotonic() - start < 10
    if found is not None:
        assert found == bool(re.match(pattern, name))
