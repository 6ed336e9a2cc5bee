"""Weights of a model become packed matrices: what linen and nnx share of it."""

import contextlib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax import progress
from qjax.layers import qarrays
from qjax.layers.report import Entry
from qjax.layers.tracing import uses
from qjax.layers.tracing.views import Form
from qjax.rules import Rule, Spec
from qjax.tensor import QTensor

# A bias of several features has several axes, and is still no matrix.
_ADDED = re.compile(r"(.*_)?(bias|scale)")


class Choice(NamedTuple):
    """What the rules say of a weight.

    Attributes:
      spec: How it is quantized, or None if it stays as it is.
      reason: Why it stays, or None.
      asked: Whether a rule wants it quantized.
      named: Whether that rule is not one for all weights.
    """

    spec: Spec | None
    reason: str | None
    asked: bool
    named: bool = False

    def without_form(self) -> "Choice":
        """What the rules say of a weight that was seen to be no matrix of a product.

        A rule for all weights did not mean it, and one that names it did.
        """
        return self._replace(asked=self.named)


def choose(rules: Sequence[Rule], path: str, weight: Any) -> Choice:
    """Finds the first rule for a weight, and whether it can be followed.

    Args:
      rules: The rules.
      path: The path of the weight.
      weight: An array, which may be abstract, or a `QArray` of qwix.
    """
    rule = next((rule for rule in rules if rule.matches(path)), None)
    if rule is None:
        return Choice(None, "no rule matches", False)
    if rule.spec is None:
        return Choice(None, "a rule leaves it", False)
    if len(weight.shape) < 2:
        return Choice(None, "it has fewer than two axes", False)
    if _ADDED.fullmatch(path.rpartition("/")[2]):
        return Choice(None, "it is named as what is added or scaled by", False)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        return Choice(None, f"it is {weight.dtype}", False)
    if rule.spec.scale_dtype is None:
        try:
            rule.spec.check_dtype(weight.dtype)
        except ValueError as error:
            return Choice(None, str(error), True)
    return Choice(rule.spec, None, asked=True, named=not rule.is_for_all)


def assumed(path: str, shape: Sequence[int]) -> Form | str:
    """A form where nothing is known of the use of a weight: Flax's own for two axes.

    Either is multiplied without being made dense, whichever axis is summed.
    """
    if len(shape) != 2:
        return "how it is used is not known: pass the inputs of a call"
    is_table = "embed" in path.rpartition("/")[2].lower()
    rows, columns = ((1,), (0,)) if is_table else ((0,), (1,))
    return Form(tuple(shape), rows, columns)


def seen(path: str, shape: Sequence[int], found: Sequence[uses.Use]) -> Form | str:
    """The form of a weight that the uses of it show.

    Of one that the call does not use, as the images' encoder in a call with a text,
    is thought what would be if no call were known.
    """
    if not uses.is_used(found) and isinstance(form := assumed(path, shape), Form):
        return form
    return uses.form(tuple(shape), found)


def unfit(weight: Any, form: Form, spec: Spec) -> str | None:
    """Returns why a weight cannot be packed as a spec says, or None if it can."""
    if not math.prod(weight.shape):
        return "it is empty"
    if qarrays.is_qarray(weight):
        return qarrays.unfit(weight, form)
    return spec.unfit(form.k)


def pack(weight: Any, form: Form, spec: Spec) -> QTensor:
    """Packs a weight and prepares it for this device.

    Args:
      weight: Array of ``(*outer, *form.shape)``; of an abstract one, nothing but the
        shapes of what it would become is computed. A `QArray` keeps its codes.
      form: How it is flattened.
      spec: How it is rounded.

    Returns:
      ``[*outer, *stack, k, n]``.
    """

    def packed(weight: Any) -> QTensor:
        if qarrays.is_qarray(weight):
            return qarrays.to_qtensor(weight, form)
        return spec.pack(form.matrix(weight))

    if _is_concrete(weight):
        # JAX works in the background: without waiting, what is in the middle of being
        # packed of all weights would be alive at once.
        return jax.block_until_ready(packed(weight))
    return jax.eval_shape(packed, weight)


def spec_of(packed: QTensor) -> Spec:
    """How a dense weight becomes a matrix of the format of another.

    Raises:
      ValueError: If rounding makes none.
    """
    extra = (packed.order, packed.row_group, packed.input_scale)
    is_float = packed.zero is not None and packed.zero.dtype != jnp.uint8
    is_float |= not packed.affine.counts
    segment, *others = packed.segments
    if others or is_float or any(part is not None for part in extra):
        raise ValueError(
            "it has an order, factors, zeros or numbers that its quantizer found; "
            "quantize the weight, and pass a QTensor"
        )
    return Spec(
        bits=segment.bits,
        group_size=segment.group_size,
        symmetric=packed.zero is None,
        scale_dtype=packed.dtype,
    )


def bar(weights: Iterable[Any]) -> contextlib.AbstractContextManager:
    """Shows how many bytes of some weights are packed, if that takes its time."""
    return progress.bar(sum(map(_nbytes, weights)), "Quantizing weights")


def settle(
    path: str, weight: Any, choice: Choice, form: Form | str, note: str | None = None
) -> tuple[QTensor | None, Entry]:
    """Packs a weight if it can be packed, and reports on it.

    Args:
      path: The path of the weight.
      weight: As in `pack`.
      choice: What the rules say.
      form: How it is flattened, or why there is no way.
      note: What there is to know of the weight once it is packed.

    Returns:
      The packed weight, or None, and the entry for the report.
    """
    reason, packed = choice.reason, None
    if choice.spec is not None:
        reason = form if isinstance(form, str) else unfit(weight, form, choice.spec)
        if isinstance(form, Form) and reason is None:
            try:
                packed = pack(weight, form, choice.spec)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{path}: {error}") from error
            reason = _notes(weight, choice.spec, note)
    before = _nbytes(weight)
    entry = Entry(
        path=path,
        shape=tuple(weight.shape),
        dtype=str(weight.dtype),
        weight=None if packed is None else repr(packed),
        reason=reason,
        asked=choice.asked,
        before=before,
        after=before if packed is None else packed.nbytes,
    )
    return packed, entry


def _notes(weight: Any, spec: Spec, note: str | None) -> str | None:
    """What there is to know of a packed weight."""
    notes = [note, spec.by and f"by {spec.by}"]
    if spec.by and not _is_concrete(weight):
        notes.append("a dense array that is loaded there is rounded, or refused")
    return "; ".join(filter(None, notes)) or None


def _is_concrete(weight: Any) -> bool:
    return all(isinstance(leaf, Array) for leaf in jax.tree.leaves(weight))


def _nbytes(weight: Any) -> int:
    leaves = jax.tree.leaves(weight)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
