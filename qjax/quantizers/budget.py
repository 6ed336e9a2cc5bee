"""Which width each weight of a model should have, for a given size."""

import heapq
import itertools
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

Choice = TypeVar("Choice", bound=Hashable)


class Option(NamedTuple):
    """What a choice costs.

    Attributes:
      nbytes: Bytes of the weight.
      error: Any measure that adds up over the weights: squares of `output_error`, say,
        or the loss that the model has more with this weight quantized alone.
    """

    nbytes: int
    error: float


def allocate(
    options: Mapping[str, Mapping[Choice, Option]], nbytes: int
) -> dict[str, Choice]:
    """Chooses one option for every weight, so that the sum of errors is small.

    From the smallest options on, again and again the step up that saves most error a
    byte is taken, until none fits any more. Only options on the lower convex hull of a
    weight count. Up to the first step that did not fit, the sum of errors is the least
    that so many bytes allow; no choice within ``nbytes`` saves more than that step on
    top of it.

    Args:
      options: Of each weight, by its name, what there is to choose from: widths, or
        `qjax.Spec`, or whatever the caller calls them.
      nbytes: How many bytes all weights may have together.

    Returns:
      The choice for each name, in the order of ``options``.

    Raises:
      ValueError: If a weight has no options, an error is not finite, or the smallest
        ones are already too large.

    Example:
      >>> cheap, dear = (
      ...     {2: Option(2, 9.0), 4: Option(4, 8.0)},
      ...     {2: Option(2, 90.0), 4: Option(4, 8.0)},
      ... )
      >>> allocate({"a": cheap, "b": dear}, nbytes=7)
      {'a': 2, 'b': 4}
    """
    hulls = {name: _hull(name, choices) for name, choices in options.items()}
    left = nbytes - sum(hull[0][1].nbytes for hull in hulls.values())
    if left < 0:
        raise ValueError(
            f"nbytes={nbytes} must be at least {nbytes - left}, the size of the "
            "smallest options."
        )
    taken = dict.fromkeys(hulls, 0)
    # Ties are taken in the order of the names given.
    count = itertools.count()
    steps = [(-_gain(hull, 0), next(count), name) for name, hull in hulls.items()]
    heapq.heapify(steps)
    while steps:
        gain, _, name = heapq.heappop(steps)
        hull, at = hulls[name], taken[name]
        if gain == 0 or hull[at + 1][1].nbytes - hull[at][1].nbytes > left:
            continue
        left -= hull[at + 1][1].nbytes - hull[at][1].nbytes
        taken[name] = at + 1
        heapq.heappush(steps, (-_gain(hull, at + 1), next(count), name))
    return {name: hull[taken[name]][0] for name, hull in hulls.items()}


def _hull(name: str, choices: Mapping[Choice, Option]) -> list[tuple[Choice, Option]]:
    """The options that are best for some price of a byte, smallest first."""
    if not choices:
        raise ValueError(f"options[{name!r}] is empty.")
    for choice, option in choices.items():
        if not abs(option.error) < float("inf"):
            raise ValueError(
                f"options[{name!r}][{choice!r}].error={option.error} must be finite."
            )
    hull: list[tuple[Choice, Option]] = []
    for choice, option in sorted(choices.items(), key=lambda item: item[1]):
        if hull and option.error >= hull[-1][1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2][1], hull[-1][1]) <= _slope(
            hull[-1][1], option
        ):
            hull.pop()
        hull.append((choice, option))
    return hull


def _slope(small: Option, large: Option) -> float:
    """Error that is saved a byte."""
    return (small.error - large.error) / (large.nbytes - small.nbytes)


def _gain(hull: list[tuple[Choice, Option]], at: int) -> float:
    """What the next step saves a byte, 0 if there is none."""
    return _slope(hull[at][1], hull[at + 1][1]) if at + 1 < len(hull) else 0.0
