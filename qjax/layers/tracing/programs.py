"""Operations of JAX that run programs of their own, also on packed operands.

Each function takes the operation, its operands, and what runs a program on packed
weights. It returns the results, or None to decline.

A weight that a program returns as it is stays packed, as does one that every step of a
loop hands on to the next: Flax's transformations return all state of their modules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.extend.core import primitives
from jaxtyping import Array

from qjax.layers.tracing import held as packed
from qjax.layers.tracing.held import Held, dense_all
from qjax.layers.tracing.shards import Shards, shards

# An array, a literal of the program, or a `Held`.
Value = Any
# Takes a program, its constants and its arguments.
Run = Callable[[jex.Jaxpr, Sequence[Any], Sequence[Value]], list[Value]]
# Packed weights among the arguments or results of a program, by place.
_Kept = Mapping[int, Held]


def _inline(eqn: jex.JaxprEqn, values: list[Value], run: Run) -> list[Value]:
    closed = eqn.params["jaxpr"]
    return run(closed.jaxpr, closed.consts, values)


def _remat(eqn: jex.JaxprEqn, values: list[Value], run: Run) -> list[Value]:
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    jaxpr = eqn.params["jaxpr"]
    kept = _returned(values, _sources(jaxpr))

    def function(*leaves: Any) -> list[Any]:
        results = run(jaxpr, (), _filled(values, leaves))
        return dense_all(_without(kept, results), "checkpoint")

    return _with(kept, jax.checkpoint(function, **options)(*_leaves(values)))


def _cond(eqn: jex.JaxprEqn, values: list[Value], run: Run) -> list[Value] | None:
    index, *operands = values
    if isinstance(index, Held):
        return None
    branches = eqn.params["branches"]
    of_branches = zip(*(_sources(closed.jaxpr) for closed in branches), strict=True)
    agreed = [given[0] if len({*given}) == 1 else None for given in of_branches]
    kept = _returned(operands, agreed)

    def branch(closed: Any) -> Callable[..., list[Any]]:
        def function(*leaves: Any) -> list[Any]:
            results = run(closed.jaxpr, closed.consts, _filled(operands, leaves))
            return dense_all(_without(kept, results), "cond")

        return function

    chosen = jax.lax.switch(index, [*map(branch, branches)], *_leaves(operands))
    return _with(kept, chosen)


def _while(eqn: jex.JaxprEqn, values: list[Value], run: Run) -> list[Value] | None:
    params = eqn.params
    ends = (params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"])
    tests, consts, carry = values[: ends[0]], values[slice(*ends)], values[ends[1] :]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    kept = _handed_on(carry, _sources(body.jaxpr), len(consts))
    if kept is None:
        return None

    def goes_on(left: list[Any]) -> Any:
        (result,) = run(test.jaxpr, test.consts, [*tests, *_with(kept, left)])
        return result

    def step(left: list[Any]) -> list[Any]:
        results = run(body.jaxpr, body.consts, [*consts, *_with(kept, left)])
        return dense_all(_without(kept, results), "while")

    return _with(kept, jax.lax.while_loop(goes_on, step, _without(kept, carry)))


def _scan(eqn: jex.JaxprEqn, values: list[Value], run: Run) -> list[Value] | None:
    """A scan over stacks of packed weights, or with weights that all steps share."""
    closed = eqn.params["jaxpr"]
    # A step sees one axis less of what is scanned, and of what is stacked.
    end = len(values) - _scanned(eqn.invars, closed.in_avals)
    carried = len(eqn.outvars) - _scanned(eqn.outvars, closed.out_avals)
    consts, carry = values[: end - carried], values[end - carried : end]
    over = [packed.steps(x) if isinstance(x, Held) else x for x in values[end:]]
    sources = _sources(closed.jaxpr)
    handed_on = _handed_on(carry, sources[:carried], len(consts))
    if handed_on is None or any(x is None for x in over):
        return None
    # All steps together return what they were handed out.
    stacked = [None if i is None or i < end else i for i in sources[carried:]]
    kept = {**handed_on, **_returned(values, [*[None] * carried, *stacked])}
    first = _without(kept, carry)

    def step(left: list[Any], scanned: tuple[Array, list[Any]]) -> tuple[list, list]:
        index, slices = scanned
        now = [
            x.step(part, index) if isinstance(x, packed.Steps) else part
            for x, part in zip(over, slices, strict=True)
        ]
        given = [*consts, *_with(handed_on, left), *now]
        results = _without(kept, run(closed.jaxpr, closed.consts, given))
        results = dense_all(results, "scan")
        return results[: len(first)], results[len(first) :]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    index = jnp.arange(eqn.params["length"], dtype=jnp.int32)
    arrays = [x.arrays if isinstance(x, packed.Steps) else x for x in over]
    final, ys = jax.lax.scan(step, first, (index, arrays), **options)
    return _with(kept, [*final, *ys])


def _scanned(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    pairs = zip(outer, inner, strict=True)
    return sum(whole.aval.ndim != step.ndim for whole, step in pairs)


def _shard_map(
    eqn: jex.JaxprEqn, values: list[Value], run: Run
) -> Sequence[Array] | None:
    """A function of shards, of packed weights as well."""
    params = eqn.params
    mesh, specs = params["mesh"], params["in_specs"]
    cut = [
        shards(value, spec, mesh) if isinstance(value, Held) else spec
        for value, spec in zip(values, specs, strict=True)
    ]
    if any(one is None for one in cut):
        return None

    def function(*leaves: Any) -> tuple[Any, ...]:
        given = [
            one.on_device(leaf) if isinstance(one, Shards) else leaf
            for one, leaf in zip(cut, leaves, strict=True)
        ]
        return tuple(dense_all(run(params["jaxpr"], (), given), "shard_map"))

    # JAX 0.10 calls them otherwise.
    key = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(one.specs if isinstance(one, Shards) else one for one in cut),
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params[key]),
        check_vma=params["check_vma"],
    )
    return mapped(*(v.weight if isinstance(v, Held) else v for v in values))


def _leaves(values: Sequence[Value]) -> list[Any]:
    """Arrays, and the packed weights' own trees."""
    return [
        (value.arrays, value.origin) if isinstance(value, Held) else value
        for value in values
    ]


def _filled(values: Sequence[Value], leaves: Sequence[Any]) -> list[Value]:
    """The same values with other `_leaves`."""
    return [
        value.holding(*leaf) if isinstance(value, Held) else leaf
        for value, leaf in zip(values, leaves, strict=True)
    ]


def _sources(jaxpr: jex.Jaxpr) -> list[int | None]:
    """Which argument each result of a program is, if it is one as it is."""
    places = {variable: i for i, variable in enumerate(jaxpr.invars)}

    def place(variable: Any) -> int | None:
        return None if isinstance(variable, jex.Literal) else places.get(variable)

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", primitives.remat_p.name):
            inner = eqn.params["jaxpr"]
            sources = _sources(getattr(inner, "jaxpr", inner))
            for variable, source in zip(eqn.outvars, sources, strict=True):
                found = None if source is None else place(eqn.invars[source])
                if found is not None:
                    places[variable] = found
    return [place(variable) for variable in jaxpr.outvars]


def _returned(values: Sequence[Value], sources: Sequence[int | None]) -> _Kept:
    """The packed weights among the results, of which ``sources`` says what they are."""
    results = [None if source is None else values[source] for source in sources]
    return {i: value for i, value in enumerate(results) if isinstance(value, Held)}


def _handed_on(
    carry: Sequence[Value], sources: Sequence[int | None], first: int
) -> _Kept | None:
    """The packed weights that a loop carries; None if a step changes one.

    Args:
      carry: What the loop carries.
      sources: Which arguments of a step its results are.
      first: Which argument of a step is the first of the carry.
    """
    held = {i: value for i, value in enumerate(carry) if isinstance(value, Held)}
    return held if all(sources[i] == first + i for i in held) else None


def _without(kept: _Kept, values: Sequence[Value]) -> list[Value]:
    """The values in other places than those of ``kept``."""
    return [value for i, value in enumerate(values) if i not in kept]


def _with(kept: _Kept, values: Sequence[Value]) -> list[Value]:
    """What `_without` left, with ``kept`` again in its places."""
    rest = iter(values)
    return [
        kept[i] if i in kept else next(rest) for i in range(len(kept) + len(values))
    ]


# By the name of the operation.
PROGRAMS: Mapping[str, Callable[..., Sequence[Value] | None]] = {
    "jit": _inline,
    primitives.remat_p.name: _remat,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "shard_map": _shard_map,
}
