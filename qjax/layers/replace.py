"""Quantizes whole models: `quantize_model`."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx

from qjax import rules as rules_
from qjax.layers.linen import replace as linen
from qjax.layers.nnx import replace as of_nnx
from qjax.layers.report import Entry, Listener, Report


def quantize_model(
    model: Any,
    rules: rules_.Rules,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    method: str | None = None,
    strict: bool = False,
    report: Listener | None = None,
    **keywords: Any,
) -> Any:
    """Quantizes the weights of a Flax model, whoever wrote it.

    Every parameter of two or more axes that a rule matches becomes a `QTensor`, packed
    so that the products of the model sum its rows: groups run over the flattened
    contraction, as of an output projection ``(heads, head_dim, model)`` over ``heads *
    head_dim``. The modules' own code runs as ever, traced: it may transpose, reshape,
    cast, index, split, freeze, reshard, scan or checkpoint its weight, or multiply it
    by a number; its products go through `matmul`, those that are convolutions of
    windows that do not overlap as well, and rows that it looks up are dequantized
    alone. What else it does with a weight makes that one dense, with a warning that
    names its path, and is no error.

    Code that maps over shards of its weights (`jax.shard_map`) gets packed shards, of
    whole words and groups; a part of each of several heads would be none.

    A stack of matrices that a module scans, its own or one of layers below it, is read
    where it lies: by ``nn.scan``, ``nnx.scan``, `jax.lax.scan`, or one by one by its
    number. What scans stacks of stacks, or multiplies by transposes, copies the words
    of a step. So does a scan of layers that is in no method of a module above them, or
    in one that is compiled by itself (`nnx.jit`).

    Weights that name their axes (`nnx.with_partitioning`, ``nn.Partitioned``) pass the
    names on to their packed arrays, so that `nnx.get_partition_spec` and
    `nn.get_partition_spec` tell how to cut the quantized model; axes that are flattened
    into one are cut as the first of them is.

    In nnx, plain `nnx.Linear` layers become `layers.nnx.Linear`, but for those whose
    kernels other code reads in the call with ``inputs``; all other modules stay
    instances of their classes, their packed weights in an attribute ``packed``. Code of
    modules above these that reads a weight in that call, as of a table of embeddings,
    is traced like their own. Weights stay dense that the call reads in a state
    (`nnx.state`, `nnx.split`) outside of their own modules, such as those of
    `nnx.WeightNorm`. In linen, only ``apply`` of the model itself takes the quantized
    variables: ``bind`` refuses them.

    Args:
      model: An nnx model, which stays as it is, or a linen module. The arrays may be
        abstract (`nnx.eval_shape`, `jax.eval_shape`): the result is, too, and
        `layers.nnx.load`, or `layers.linen.to_variables`, fills it.
      rules: A `Spec` for all weights, or a sequence of ``(pattern, Spec or None)``, of
        which the first that matches decides: None leaves a weight as it is. The pattern
        is a regular expression that must match all of the path of the weight
        ("layers/0/attn/q_proj/w"), or of its module ("layers/0/attn/q_proj"). Rules of
        qwix (`QuantizationRule`) do as well, rounded as `quantize` does.
      *inputs: What the model is called with, arrays or shapes: from one abstract call,
        which JAX must be able to trace, is seen which axes of a weight are summed, and
        who reads it; random keys and mutable collections of linen are made up. Without
        them, and of weights that the call does not use, that is known of Flax's own
        modules of nnx, of modules with an ``einsum_str``, and guessed of weights of two
        axes (``[inputs, outputs]``, embeddings the other way round).
      variables: Variables of a linen module; their "params" are quantized, and weights
        that qwix quantized (`QArray`) keep their codes.
      method: Name of the method that is called with the inputs (default: ``__call__``).
      strict: Whether a matched weight that cannot be quantized is an error. Those that
        the inputs show to be no matrices of products, of most convolutions say, only
        are if their rule is narrower than ``".*"``.
      report: Is called with a `layers.Report` of what was replaced, what was not, and
        why: `print`, or a list's ``append`` (default: None; then a warning tells of
        matched weights that stay dense).
      **keywords: More inputs.

    Warns:
      UserWarning: If weights stay dense for which ``strict`` would be an error and no
        ``report`` is asked for, or rules have quantizers for paths that no weight has.

    Returns:
      The model, with weights replaced; for linen, the module and its variables. What
      pickle takes of the model, it takes of the result.

    Raises:
      TypeError: If the model is no Flax module, a rule is none, or the method does not
        take the inputs, by their number and names.
      ValueError: If a pattern is no regular expression, none matches a weight, a linen
        module comes without variables, there is no such method, or ``strict`` and a
        matched weight cannot be quantized.
      NotImplementedError: If a rule of qwix asks for more than integer weights.

    Example:
      >>> from flax import nnx
      >>> dense = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
      >>> rules = [("out", None), (".*", qjax.Spec(bits=4, group_size=32))]
      >>> model = quantize_model(dense, rules)
      >>> model.query.packed["kernel"].shape, type(model.query).__name__
      ((64, 64), 'LinearGeneral')
      >>> model(jnp.ones((1, 3, 64))).shape
      (1, 3, 64)
    """
    checked = rules_.read(rules)
    if not isinstance(model, nnx.Module | nn.Module):
        raise TypeError(f"model={model!r} must be an nnx.Module or an nn.Module.")
    _check_call(model, inputs, keywords, method)
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise TypeError("variables are for linen; an nnx model has its own.")
        result, entries = of_nnx.quantize(
            model, checked, inputs, keywords, method or "__call__"
        )
    else:
        if variables is None or "params" not in variables:
            raise ValueError(
                f"variables={variables!r} must hold the 'params' of the linen module, "
                "as model.init returns them."
            )
        *result, entries = linen.quantize(
            model, variables, checked, inputs, keywords, method
        )
        result = tuple(result)
    _check_matches(checked, entries)
    _check_quantizers(checked, entries)
    _tell(Report(tuple(entries)), strict=strict, report=report)
    return result


def _check_call(
    model: Any, inputs: tuple, keywords: Mapping[str, Any], method: str | None
) -> None:
    """Refuses what the model could not be called with: it may not be called at all."""
    if callable(method) or not (inputs or keywords or method):
        return
    name = method or "__call__"
    if not hasattr(model, name):
        raise ValueError(
            f"method={method!r}: {type(model).__name__} has no method {name!r} that "
            "could be called with the inputs; name one that it has."
        )
    try:
        inspect.signature(getattr(model, name)).bind(*inputs, **keywords)
    except ValueError:  # Nothing is known of it.
        return
    except TypeError as error:
        raise TypeError(
            f"inputs and keywords must be those of {type(model).__name__}.{name}: "
            f"{error}; quantize_model has none of these names itself."
        ) from None


def _check_matches(rules: Sequence[rules_.Rule], entries: Sequence[Entry]) -> None:
    wanting = [rule for rule in rules if rule.spec is not None]
    paths = [entry.path for entry in entries]
    if wanting and not any(rule.matches(path) for rule in wanting for path in paths):
        patterns = [rule.pattern.pattern for rule in wanting]
        raise ValueError(
            f"rules has the patterns {patterns}, and none of them matches all of a "
            f"path of the model, such as {paths[:3]}."
        )


def _check_quantizers(rules: Sequence[rules_.Rule], entries: Sequence[Entry]) -> None:
    """Speaks up about what was found out for weights that the model does not have."""
    paths = [entry.path for entry in entries]
    special = [rule for rule in rules if rule.literal and rule.spec and rule.spec.by]
    missed = [r.literal for r in special if not any(map(r.matches, paths))]
    if missed:
        warnings.warn(
            f"rules has quantizers for {len(missed)} paths that no weight has, such as "
            f"{missed[:3]}; the model's are like {paths[:3]}.",
            stacklevel=3,
        )


def _tell(found: Report, *, strict: bool, report: Listener | None) -> None:
    """Hands over the report, and speaks up about weights that were asked for."""
    if report is not None:
        report(found)
    if not found.refused:
        return
    message = "; ".join(f"{entry.path}: {entry.reason}" for entry in found.refused)
    message = f"{len(found.refused)} weights that rules match stay dense: {message}."
    if strict:
        raise ValueError(message)
    if report is None:
        warnings.warn(message, stacklevel=3)
