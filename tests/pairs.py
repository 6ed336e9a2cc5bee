"""Few test cases that still meet every pair of values."""

import itertools

import numpy as np


def pairwise(allowed, **axes) -> list[dict]:
    """Few cases in which every value of an axis meets every value of every other.

    ``allowed(case)`` says which values go together; it also takes parts of a case.
    """
    rng = np.random.default_rng(0)

    def pairs(case):
        return set(itertools.combinations(case.items(), 2))

    def random_case(start):
        while True:
            case = {
                name: start.get(name, values[rng.integers(len(values))])
                for name, values in axes.items()
            }
            if allowed(case):
                return case

    missing = set()
    for (a, xs), (b, ys) in itertools.combinations(axes.items(), 2):
        missing |= {((a, x), (b, y)) for x in xs for y in ys if allowed({a: x, b: y})}
    cases = []
    while missing:
        start = dict(min(missing, key=repr))
        tries = [random_case(start) for _ in range(20)]
        cases.append(max(tries, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(cases[-1])
    return cases
