"""Patterns of module names, as configurations from elsewhere have them.

Python's matcher tries every way in which a pattern may fit a name, and a pattern such
as ``(a+)+b`` has more ways than anybody can wait for. Here the ways are counted before
anything is matched: a group that is repeated is refused, and so is a pattern whose
remaining repeats and alternatives may fit a name in too many ways.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from qjax.formats.checks import check_strings

# Tried in a tenth of a second. Patterns in use stay far below: four ".*" on a name of
# 60 letters are 635,376 ways.
_MOST_WAYS = 10**7
_FLAGS = re.compile(r"\(\?([aimsu]+)\)")
_REPEAT = r"(?:[*+?]|\{[0-9]*,?[0-9]*\})[+?]?"
_TOKEN = re.compile(
    r"""
    (?P<literal> \\. | \[\^?\]?(?:\\.|[^\]\\])*\] )  # an escape, a class of letters
    | (?P<look> \(\?<?[=!] )
    | (?P<open> \((?!\?) | \(\?[aimsu]*: | \(\?P<\w+> )
    | (?P<flags> \(\?[aimsu]+\) )
    | (?P<other> \(\?.? )
    | (?P<close> \) )
    | (?P<bar> \| )
    | (?P<repeat> """
    + _REPEAT
    + r""" )
    | (?P<any> . )""",
    re.VERBOSE | re.DOTALL,
)


class _Choices(NamedTuple):
    """How often the matcher can choose: how long a repeat is, and which alternative.

    A repeat in a look-ahead or look-behind sees letters that others see again.
    """

    repeats: int
    looking: int
    alternatives: int

    def ways(self, letters: int) -> int:
        """At most so many ways lead through a name."""
        along = math.comb(letters + self.repeats, self.repeats)
        return along * (letters + 1) ** self.looking * self.alternatives


def check_pattern(name: str, pattern: str) -> None:
    r"""Checks that a pattern of a configuration is one, and repeats no group.

    Args:
      name: Where it was found, for messages.
      pattern: A regular expression of Python.

    Raises:
      ValueError: If it is not, with the reason.

    Example:
      >>> check_pattern("dynamic", r".*\.mlp\.(?:up|down)_proj")
      >>> check_pattern("dynamic", "(a+)+b")
      Traceback (most recent call last):
      ValueError: dynamic: '(a+)+b' repeats a group, which may take forever to ...
    """
    try:
        _choices(pattern)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_patterns(name: str, value: Any) -> tuple[str, ...]:
    """Reads a list of patterns from a configuration.

    Args:
      name: Name of the field, for messages.
      value: What was found there.

    Returns:
      The patterns.

    Raises:
      ValueError: If it is no list of strings, or as `check_pattern`.
    """
    patterns = check_strings(name, value)
    for pattern in patterns:
        check_pattern(name, pattern)
    return patterns


def matches(pattern: str, name: str, *, whole: bool = False) -> bool:
    r"""Whether a name begins as a pattern says, as `re.match` has it.

    Args:
      pattern: A regular expression of Python.
      name: The path of a module.
      whole: Whether the pattern must fit all of ``name``, as `re.fullmatch` has it.

    Returns:
      Whether it does.

    Raises:
      ValueError: As `check_pattern`; or if the pattern may fit ``name`` in more ways
        than can be tried.

    Example:
      >>> matches(r".*\.18\..*gate", "model.layers.18.mlp.gate_proj")
      True
    """
    if _choices(pattern).ways(len(name)) > _MOST_WAYS:
        raise ValueError(
            f"{pattern!r} may fit a name of {len(name)} letters in more than "
            f"{_MOST_WAYS} ways; write it with fewer repeats and alternatives."
        )
    match = re.fullmatch if whole else re.match
    return match(pattern, name) is not None


def ends_path(pattern: str, path: str) -> bool:
    r"""Whether a module is one that transformers leaves alone by a pattern.

    Args:
      pattern: Fits from the beginning up to a dot or to the end; or is the path's end.
      path: The path of the module.

    Returns:
      Whether it is.

    Raises:
      ValueError: As `matches`.

    Example:
      >>> ends_path("lm_head", "lm_head"), ends_path("mlp", "layers.1.mlp.up_proj")
      (True, False)
    """
    start = rf"{grouped(pattern)}(?:(?<=\.)|(?=\.|$))"
    return path.endswith(pattern) or matches(start, path)


def left_dense(entry: Mapping[str, Any], *aliases: str) -> tuple[str, ...]:
    """Reads which modules a configuration of transformers leaves dense.

    Args:
      entry: The ``quantization_config``.
      *aliases: What else than ``modules_to_not_convert`` the field may be called.

    Returns:
      Patterns, as `ends_any` takes them.

    Raises:
      ValueError: As `check_patterns`.
    """
    names = ("modules_to_not_convert", *aliases)
    field = next((name for name in names if entry.get(name)), names[0])
    return check_patterns(field, entry.get(field) or [])


def ends_any(patterns: Iterable[str], path: str) -> bool:
    """Whether a module is one that transformers leaves alone by some patterns.

    Args:
      patterns: As that of `ends_path`.
      path: The path of the module.

    Returns:
      Whether it is.

    Raises:
      ValueError: As `matches`.
    """
    return any(ends_path(pattern, path) for pattern in patterns)


def grouped(pattern: str) -> str:
    r"""Makes one group of a pattern, to be part of another.

    Args:
      pattern: A regular expression of Python, which may begin with flags for all of it.

    Returns:
      The group, with these flags for what is in it.

    Example:
      >>> grouped(r"a|b"), grouped(r"(?i)a|b")
      ('(?:a|b)', '(?i:a|b)')
    """
    flags = _FLAGS.match(pattern)
    if flags is None:
        return f"(?:{pattern})"
    return f"(?{flags[1]}:{pattern[flags.end() :]})"


@functools.lru_cache(maxsize=4096)
def _choices(pattern: str) -> _Choices:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}.") from None
    found = [(token.lastgroup, token[0]) for token in _TOKEN.finditer(pattern)]
    repeats, looking, alternatives = 0, 0, 1
    bars, looks = [0], [False]  # of the groups that are open
    for (kind, text), (after, quantity) in itertools.pairwise([*found, ("end", "")]):
        if kind == "other":
            raise ValueError(f"{pattern!r} has {text!r}, which is not supported.")
        if kind in ("open", "look"):
            bars.append(0)
            looks.append(looks[-1] or kind == "look")
        elif kind == "close":
            alternatives *= bars.pop() + 1
            looks.pop()
            if after == "repeat" and not quantity.startswith("?"):
                raise ValueError(
                    f"{pattern!r} repeats a group, which may take forever to match; "
                    "repeat single letters, as in '.*', or list the cases."
                )
        elif kind == "bar":
            bars[-1] += 1
        elif kind == "repeat" and text.startswith("?"):
            alternatives *= 2
        elif kind == "repeat":
            repeats, looking = repeats + (not looks[-1]), looking + looks[-1]
    return _Choices(repeats, looking, alternatives * (bars[0] + 1))
