"""What a program does with its weights: which axes it sums, indexes or scans.

That decides which axes of a weight are the rows of a packed matrix. Only the program is
read: no array exists.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax.extend.core import primitives

from qjax.layers.tracing.convolutions import is_product
from qjax.layers.tracing.shards import Counts, counts_of, cut
from qjax.layers.tracing.views import Atom, Form, Side, View, follow

# The operation that gives an array a name, and nothing else.
NAMING = "name"


# What is to be done about a model that cannot be traced.
_UNTRACED = (
    "quantize_model traces a call of the model with the inputs, as jax.jit does. For a "
    "model that cannot be traced, leave the inputs out, or name a method that can be."
)


class Use(NamedTuple):
    """One use of a weight, by the axes that it has as a whole.

    Attributes:
      operation: Name of JAX's operation.
      summed: The axes that a product sums, or None if the operation is no product, or
        sums only a part of an axis.
      stack: The axes that count matrices, as each is multiplied by rows of its own.
      indexed: The axes of which a part was taken before.
      names: What `jax.ad_checkpoint.checkpoint_name` called it before.
    """

    operation: str
    summed: frozenset[Side] | None
    stack: frozenset[Side]
    indexed: frozenset[Side]
    names: frozenset[str]


class _Seen(NamedTuple):
    """A weight in the middle of a program; its atoms name the axes of the whole one.

    Inside `jax.shard_map`, it is a shard: ``counts`` says how many there are by axis.
    """

    name: str
    view: View
    stack: frozenset[Side]
    indexed: frozenset[Side]
    names: frozenset[str]
    counts: Mapping[Side, int] = types.MappingProxyType({})

    def used(self, operation: str, summed: frozenset[Side] | None = None) -> Use:
        """A use of the weight as it is here."""
        return Use(operation, summed, self.stack, self.indexed, self.names)


def find(
    function: Callable[..., Any],
    weights: Mapping[str, jax.ShapeDtypeStruct],
    *others: Any,
) -> dict[str, Form | str]:
    """Finds how the weights of a function are packed so that it multiplies by them.

    Args:
      function: Takes a dictionary of the weights, and the other arguments.
      weights: Shapes of the weights, by path.
      *others: The other arguments, which may be abstract.

    Returns:
      The form of each weight, or the reason why there is none.
    """
    found = collect(function, weights, *others)
    return {name: form(weights[name].shape, found[name]) for name in weights}


def collect(
    function: Callable[..., Any],
    weights: Mapping[str, jax.ShapeDtypeStruct],
    *others: Any,
) -> dict[str, list[Use]]:
    """Collects the uses that a function has for its weights, with those of their names.

    Args:
      function: As in `find`.
      weights: As in `find`.
      *others: As in `find`.

    Returns:
      The uses of each weight, in the order of the program.
    """
    try:
        closed = jax.make_jaxpr(lambda *args: _arrays(function(*args)))(
            weights, *others
        )
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        error.add_note(_UNTRACED)
        raise
    uses: dict[str, list[Use]] = {name: [] for name in weights}
    seen: list[_Seen | None] = [None] * len(closed.jaxpr.invars)
    for i, name in enumerate(sorted(weights)):
        sizes = enumerate(weights[name].shape)
        dims = tuple((Atom(axis, 1, n),) if n > 1 else () for axis, n in sizes)
        view = View(dims, weights[name].dtype)
        seen[i] = _Seen(name, view, frozenset(), frozenset(), frozenset())
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, use in _walk(closed.jaxpr, seen, shapes):
        uses[name].append(use)
    return uses


class Arguments(NamedTuple):
    """What a model is called with, but for its arrays.

    Attributes:
      tree: The tree of inputs and keywords.
      is_array: Which of its leaves are arrays.
      others: Those that are none.
    """

    tree: Any
    is_array: tuple[bool, ...]
    others: tuple[Any, ...]

    def __call__(self, arrays: Iterable[Any]) -> tuple[tuple, dict[str, Any]]:
        """Returns inputs and keywords with these arrays."""
        rest, others = iter(arrays), iter(self.others)
        leaves = [next(rest if is_one else others) for is_one in self.is_array]
        return jax.tree.unflatten(self.tree, leaves)


def arrays_of(
    inputs: tuple, keywords: Mapping[str, Any]
) -> tuple[list[Any], Arguments]:
    """Takes the arrays out of what a model is called with: they alone are traced.

    Args:
      inputs: The inputs, whose arrays may be abstract.
      keywords: More of them.

    Returns:
      The arrays, and a function that puts others in their place.
    """
    given, tree = jax.tree.flatten((inputs, dict(keywords)))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in given]
    pairs = list(zip(is_array, given, strict=True))
    others = tuple(leaf for is_one, leaf in pairs if not is_one)
    arrays = [leaf for is_one, leaf in pairs if is_one]
    return arrays, Arguments(tree, tuple(is_array), others)


def _arrays(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def is_used(uses: Sequence[Use]) -> bool:
    """Returns whether anything is done with a weight but that it is named."""
    return any(use.operation != NAMING for use in uses)


def form(shape: tuple[int, ...], uses: Sequence[Use]) -> Form | str:
    """Decides on the form; a product with all of the weight counts more than others.

    Args:
      shape: Shape of the weight.
      uses: Its uses, as `collect` returns them.

    Returns:
      The form, or the reason why there is none.
    """
    if not is_used(uses):
        return "it is not used in the call that was traced"
    uses = [use for use in uses if use.operation != NAMING]
    axes = range(len(shape))
    for use in sorted(uses, key=lambda use: len(use.indexed)):
        summed = use.summed or frozenset()
        # Matrices that are taken out of a weight one by one are a stack.
        stack = use.stack | (use.indexed - summed)
        rows = tuple(axis for axis in axes if axis in summed)
        columns = tuple(axis for axis in axes if axis not in stack | summed)
        if rows and columns:
            return Form(shape, rows, columns)
    for use in uses:
        if use.operation == "gather" and len(use.indexed) == 1:
            rest = [axis for axis in axes if axis not in use.indexed | use.stack]
            return Form(shape, tuple(rest), tuple(a for a in axes if a in use.indexed))
    names = ", ".join(dict.fromkeys(use.operation for use in uses))
    return f"its uses ({names}) are no products with whole axes of it"


def _walk(
    jaxpr: jex.Jaxpr, seen: Sequence[_Seen | None], shapes: Mapping[str, tuple]
) -> Iterator[tuple[str, Use]]:
    """Goes through a program; returns what its outputs are of the weights."""
    known = dict(zip(jaxpr.invars, seen, strict=True))

    def read(variable: Any) -> _Seen | None:
        return None if isinstance(variable, jex.Literal) else known.get(variable)

    for eqn in jaxpr.eqns:
        operands = [read(variable) for variable in eqn.invars]
        if any(operands):
            results = yield from _through(eqn, operands, shapes)
            known.update(zip(eqn.outvars, results, strict=False))
    return [read(variable) for variable in jaxpr.outvars]


def _through(
    eqn: jex.JaxprEqn, operands: list[_Seen | None], shapes: Mapping[str, tuple]
) -> Iterator[Any]:
    """One operation: its uses of weights, and what its results are of them."""
    name = eqn.primitive.name
    if name in _PROGRAMS:
        return (yield from _PROGRAMS[name](eqn, operands, shapes))
    if name == "dot_general":
        # Rows of a table may be multiplied by another weight.
        for place, seen in enumerate(operands):
            if seen:
                summed, batch = (p[place] for p in eqn.params["dimension_numbers"])
                yield seen.name, _product(name, seen, summed, batch, shapes[seen.name])
        return []
    if name == "conv_general_dilated" and (seen := operands[1]) and not operands[0]:
        x, w = (_aval(variable).shape for variable in eqn.invars)
        if is_product(eqn.params, x, w):
            axes = eqn.params["dimension_numbers"].rhs_spec[1:]
            yield seen.name, _product(name, seen, axes, (), shapes[seen.name])
            return []
    if name == "ragged_dot_general" and operands[1]:
        yield operands[1].name, _ragged_product(eqn, operands[1])
        return []
    if (seen := _scaled(eqn, operands)) is not None:
        return [seen]
    one = operands[0]
    if name in ("gather", "slice", "dynamic_slice", "split") and one:
        parts = [_part(eqn, one, _aval(out).shape) for out in eqn.outvars]
        for part in parts:
            # Several neighbours are still a matrix.
            if part is None or part.indexed != one.indexed:
                use = one.used("gather" if part else name)
                yield one.name, use._replace(indexed=(part or one).indexed)
        return parts
    if name == NAMING and one:
        named = one._replace(names=one.names | {eqn.params["name"]})
        yield one.name, named.used(name)
        return [named]
    view = follow(name, eqn.params, one.view) if one and len(operands) == 1 else None
    if one and view is not None:
        return [one._replace(view=view)]
    for seen in filter(None, operands):
        yield seen.name, seen.used(name)
    return []


def _product(
    operation: str,
    seen: _Seen,
    summed: Sequence[int],
    batch: Sequence[int],
    shape: tuple[int, ...],
) -> Use:
    """The use of a weight in a product that sums some axes, and shares others."""
    extents: dict[Any, int] = {}
    for atom in seen.view.pick(summed):
        extents[atom.side] = extents.get(atom.side, 1) * atom.size
    counts = seen.counts
    whole = all(shape[a] == size * counts.get(a, 1) for a, size in extents.items())
    alone = frozenset(atom.side for atom in seen.view.pick(batch))
    axes = frozenset(extents) if whole and extents else None
    return seen._replace(stack=seen.stack | alone).used(operation, axes)


def _scaled(eqn: jex.JaxprEqn, operands: list[_Seen | None]) -> _Seen | None:
    """A weight of which all is multiplied, or divided, by a number; or None."""
    name = eqn.primitive.name
    if name not in ("mul", "div") or all(operands):
        return None
    place = 0 if operands[0] else 1
    is_number = _aval(eqn.invars[1 - place]).shape == ()
    return operands[place] if is_number and (name, place) != ("div", 1) else None


def _ragged_product(eqn: jex.JaxprEqn, seen: _Seen) -> Use:
    """The use of a stack of weights, each for a run of rows."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    pick = lambda axes: frozenset(atom.side for atom in seen.view.pick(axes))  # noqa: E731
    summed = pick(numbers.dot_dimension_numbers[0][1])
    stack = seen.stack | pick(numbers.rhs_group_dimensions)
    return seen._replace(stack=stack).used(eqn.primitive.name, summed or None)


def _part(eqn: jex.JaxprEqn, seen: _Seen, shape: tuple[int, ...]) -> _Seen | None:
    """What is left of a weight of which a part of that shape is taken."""
    view, params = seen.view, eqn.params
    if eqn.primitive.name == "gather":
        numbers = params["dimension_numbers"]
        axes = numbers.start_index_map
        if len(axes) != 1 or numbers.collapsed_slice_dims != axes:
            return None
        others = [i for i in range(len(shape)) if i not in numbers.offset_dims]
        rest = [dim for i, dim in enumerate(view.dims) if i != axes[0]]
        placed = dict(zip(numbers.offset_dims, rest, strict=True))
        for i in others:
            sides = {atom.side for atom in view.dims[axes[0]]}
            atoms = tuple(Atom(side, 1, shape[i]) for side in sides)
            placed[i] = atoms if len(sides) == 1 and shape[i] > 1 else ()
        dims = [placed[i] for i in range(len(shape))]
    else:
        axes = [i for i, size in enumerate(view.shape) if shape[i] != size]
        if any(len(view.dims[i]) != 1 for i in axes):
            return None
        dims = list(view.dims)
        for i in axes:
            atom = dims[i][0]._replace(size=shape[i])
            dims[i] = (atom,) if atom.size > 1 else ()
    single = [i for i in axes if eqn.primitive.name == "gather" or not dims[i]]
    taken = {atom.side for i in single for atom in view.dims[i]}
    view = view._replace(dims=tuple(dims))
    return seen._replace(view=view, indexed=seen.indexed | taken)


def _inline(eqn: jex.JaxprEqn, operands: list, shapes: Mapping) -> Iterator[Any]:
    closed = eqn.params["jaxpr"]
    return (yield from _walk(getattr(closed, "jaxpr", closed), operands, shapes))


def _scan(eqn: jex.JaxprEqn, operands: list, shapes: Mapping) -> Iterator[Any]:
    closed = eqn.params["jaxpr"]
    whole = [_aval(variable) for variable in eqn.invars]
    inner = [
        _step(seen) if seen and outer.ndim != aval.ndim else seen
        for outer, aval, seen in zip(whole, closed.in_avals, operands, strict=True)
    ]
    yield from _walk(closed.jaxpr, inner, shapes)
    return []


def _step(seen: _Seen) -> _Seen:
    """What a step of a scan has of a weight that is scanned."""
    first, *rest = seen.view.dims
    stack = seen.stack | {atom.side for atom in first}
    return seen._replace(view=seen.view._replace(dims=tuple(rest)), stack=stack)


def _aval(variable: Any) -> Any:
    """The shape of a variable, of which JAX promises too little for a checker."""
    return variable.aval


def _while(eqn: jex.JaxprEqn, operands: list, shapes: Mapping) -> Iterator[Any]:
    body = eqn.params["body_jaxpr"].jaxpr
    # What is carried is as it was, in the first step at least.
    yield from _walk(body, operands[eqn.params["cond_nconsts"] :], shapes)
    return []


def _cond(eqn: jex.JaxprEqn, operands: list, shapes: Mapping) -> Iterator[Any]:
    for branch in eqn.params["branches"]:
        yield from _walk(branch.jaxpr, operands[1:], shapes)
    return []


def _shard_map(eqn: jex.JaxprEqn, operands: list, shapes: Mapping) -> Iterator[Any]:
    mesh, specs = eqn.params["mesh"], eqn.params["in_specs"]
    inner = [
        _shard(seen, counts_of(spec, mesh, len(seen.view.shape))) if seen else None
        for seen, spec in zip(operands, specs, strict=True)
    ]
    for seen, shard in zip(operands, inner, strict=True):
        if seen and shard is None:
            yield seen.name, seen.used("shard_map")
    yield from _walk(eqn.params["jaxpr"], inner, shapes)
    return []


def _shard(seen: _Seen, counts: Counts) -> _Seen | None:
    """What a device has of a weight, if that is a part of one axis or of several."""
    view = cut(seen.view, counts)
    if view is None:
        return None
    dims = zip(seen.view.dims, counts, strict=True)
    by_axis = {dim[0].side: count for dim, count in dims if count > 1}
    return seen._replace(view=view, counts={**seen.counts, **by_axis})


def _same(eqn: jex.JaxprEqn, operands: list, shapes: Mapping) -> Iterator[Any]:
    """An operation that gives its operands back."""
    del eqn, shapes
    yield from ()
    return operands


_PROGRAMS: Mapping[str, Callable[..., Iterator[Any]]] = {
    "jit": _inline,
    primitives.remat_p.name: _inline,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "optimization_barrier": _same,
    "stop_gradient": _same,
}
