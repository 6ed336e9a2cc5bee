"""Names that differ in numbers alone, written as one: layers, and experts of layers."""

import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
# Numbers of a name of which ranges are made.
_MOST = 8


def boxes(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Writes names in few, each with ranges in the place of numbers.

    A number is a whole part of a path. The names of ranges are all that there are in
    them.

    Args:
      names: Paths, with dots between their parts.

    Yields:
      A name, and those that it stands for.

    Example:
      >>> names = [f"layers.{i}.experts.{j}.up" for i in (0, 1, 2, 4) for j in (0, 1)]
      >>> [name for name, _ in boxes([*names, "layers.3.up", "head"])]
      ['layers.{0-2,4}.experts.{0,1}.up', 'layers.3.up', 'head']
    """
    forms = collections.defaultdict(dict)
    for name in names:
        parts = name.split(".")
        is_number = [_NUMBER.fullmatch(part) is not None for part in parts]
        if sum(is_number) > _MOST:
            is_number = [False] * len(parts)
        form = tuple(
            None if number else part
            for part, number in zip(parts, is_number, strict=True)
        )
        numbers = tuple(int(part) for part in itertools.compress(parts, is_number))
        forms[form][numbers] = name
    for form, known in forms.items():
        for sides in _products(list(known)):
            ranges = map(_ranges, sides)
            parts = [next(ranges) if part is None else part for part in form]
            yield ".".join(parts), [known[one] for one in itertools.product(*sides)]


def _products(numbers: Sequence[tuple[int, ...]]) -> list[tuple[list[int], ...]]:
    """Few products of sets that are these tuples, each set in order."""
    if not numbers[0]:
        return [()]
    rests = collections.defaultdict(list)
    for first, *rest in numbers:
        rests[first].append(tuple(rest))
    firsts = collections.defaultdict(list)
    for first, found in sorted(rests.items()):
        firsts[tuple(sorted(found))].append(first)
    return [
        (found, *sides) for rest, found in firsts.items() for sides in _products(rest)
    ]


def _ranges(side: Sequence[int]) -> str:
    if len(side) == 1:
        return str(side[0])
    runs = []
    for _, run in itertools.groupby(enumerate(side), lambda pair: pair[1] - pair[0]):
        first, *_, last = [number for _, number in run] * 2
        between = "-" if last > first + 1 else ","
        runs.append(str(first) if first == last else f"{first}{between}{last}")
    return "{" + ",".join(runs) + "}"
