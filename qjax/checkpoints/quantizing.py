"""A dense checkpoint directory into a quantized one, a matrix at a time."""

import functools
import hashlib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax import rtn, tensor
from qjax import rules as rules_
from qjax.checkpoints import modules
from qjax.checkpoints.config import read_config
from qjax.checkpoints.matrices import Matrix
from qjax.checkpoints.rewriting import Request, Weight, kept, rewrite
from qjax.checkpoints.shards import Stored
from qjax.checkpoints.writing import SHARD_BYTES, is_head, is_router, linear_of
from qjax.rules import Rule, Spec
from qjax.tensor import QTensor

Watch = Callable[[str, Float[Array, "k n"], QTensor], object]

_ADVICE = (
    "Choose another group size or width, or another format, or leave these modules "
    "dense (skip)."
)

# Models of Transformers whose Conv1D modules store [k, n], by model_type, and the last
# names of these modules.
_CONV1D = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "clvp": ("c_proj", "c_fc"),
    "clvp_decoder": ("c_proj", "c_fc"),
}


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str,
    rules: rules_.Rules,
    skip: Sequence[str] = (),
    head: bool = False,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    watch: Watch | None = None,
) -> None:
    """Quantizes the linear layers of a dense checkpoint directory.

    Linear layers are all two-axis tensors named ``weight``, but not embeddings (modules
    with "embed" in their last name, or the last names wte, wpe, emb, shared and
    relative_attention_bias), not routers of a mixture of experts (modules with gate,
    router or shared_expert_gate in their paths; gate_proj is another name), nor
    ``lm_head`` unless ``head``. A UserWarning tells of tensors of three or more axes,
    such as fused experts, which stay dense. What cannot be quantized is found before
    anything is quantized or written. Memory holds one matrix, and what its quantizer
    needs for it. Other weights and files go where `convert` puts them, and what is
    interrupted can be resumed as there.

    Args:
      source: The directory to read, float16, bfloat16 or float32.
      target: The directory to make, as in `save`.
      format: As in `save`, but not "exl2" or "modelopt", whose scales no quantizer
        makes.
      rules: As in `qjax.quantize_model`: a `Spec` for all linear layers, or a sequence
        of ``(pattern, Spec or None)``, of which the first decides whose pattern matches
        all of the name of the tensor ("model.layers.0.mlp.up_proj.weight"), or of the
        path of its module ("model.layers.0.mlp.up_proj"). None, or no match, leaves a
        layer dense. `quantizers.calibrated` makes such rules of grams by the paths of
        modules. A quantizer gets the weight ``[k, n]``, the transpose of what is in
        the file, in the file's dtype, and is traceable by JAX, which asks for shapes
        first. It is a function with a name in a module, or a `functools.partial` of one
        with numbers, strings, dtypes and arrays, so that whoever resumes is known to
        ask for the same. Other programs expect float16 scales in GPTQ and AWQ files.
      skip: Patterns of layers that stay dense whatever ``rules`` say.
      head: Whether ``lm_head`` may be quantized, too.
      overwrite: As in `save`.
      shard_bytes: As in `save`.
      watch: Called with the path, the dense weight and the quantized one of each
        matrix that is quantized now, not of those that an earlier call had finished.

    Raises:
      ValueError: As `save`: all modules that cannot be quantized, with their reasons;
        if ``source`` is quantized already; if a pattern is not sound or matches no
        linear layer that it may decide on, or only layers that patterns before it
        match, unless these name one path each, or it is the last, ".*"; if a module
        stores ``[k, n]``, as those of GPT-2 do; if ``head`` is asked for and tied to
        the embeddings; or if a weight, or what it became, is not finite.
      TypeError: If ``rules`` are none, ``skip`` is one string, a quantizer is no such
        function, wants more than a weight, or makes something else.
      NotImplementedError: As `qjax.quantize_model`.
      OSError: As `load` and `save`.

    Example:
      >>> import tempfile
      >>> four = qjax.Spec(symmetric=True, scale_dtype=jnp.float16)
      >>> eight = qjax.Spec(bits=8, symmetric=True, scale_dtype=jnp.float16)
      >>> options = {"format": "gptq", "rules": [(".*down_proj", eight), (".*", four)]}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     quantize("tests/data/llama_bf16", f"{folder}/gptq", **options)
      ...     weights = qjax.checkpoints.load(f"{folder}/gptq", prepare=False)
      >>> [weights[f"model.layers.0.mlp.{name}_proj"].bits for name in ("up", "down")]
      [4, 8]
    """
    given = rules_.read(rules)
    if isinstance(skip, str):
        raise TypeError(
            f"skip={skip!r} must be a sequence of patterns; pass [{skip!r}]."
        )
    chosen = functools.partial(
        _chosen, rules=given, skip=[_skipping(text) for text in skip], head=head
    )
    request = Request(
        target=target,
        format=format,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
        how="; ".join(map(_rule_said, given)),
        advice=_ADVICE,
    )
    rewrite(source, request, lambda origin: _weights(origin, chosen, watch))


def _weights(
    directory: Path,
    chosen: Callable[[Path, Mapping[str, Stored]], Mapping[str, Spec]],
    watch: Watch | None,
) -> dict[str, Weight]:
    parts: dict[str, Stored] = {}
    for name, part in modules.open_parts(directory).items():
        if isinstance(part, Matrix):
            # No TypeError: the directory is wrong, not the type of an argument.
            raise ValueError(  # noqa: TRY004
                f"{directory} is quantized already: {name} is {part.dialect}. `qjax "
                "convert` (checkpoints.convert) moves it to another format; to "
                "quantize anew, take the dense model."
            )
        parts[name] = part
    specs = chosen(directory, parts)
    weights: dict[str, Weight] = {}
    for name, part in parts.items():
        if name not in specs:
            weights[name] = kept(part)
            continue
        path = _path(name)
        if path in parts:
            raise ValueError(
                f"{directory}: {path} is a tensor, and with {name} quantized also the "
                "name of a matrix; leave it dense (skip)."
            )
        weights[path] = _matrix(specs[name], watch, path, part)
    _warn_of_axes(directory, parts)
    return weights


def _warn_of_axes(directory: Path, parts: Mapping[str, Stored]) -> None:
    """Tells of tensors that may hold many matrices, such as all experts of a layer."""
    stacks = {
        name: part.nbytes
        for name, part in parts.items()
        if len(part.shape) > 2 and jnp.issubdtype(part.dtype, jnp.floating)
    }
    if stacks:
        some = ", ".join(list(stacks)[:3]) + (" and others" if len(stacks) > 3 else "")
        total = sum(part.nbytes for part in parts.values())
        warnings.warn(
            f"{directory}: tensors of three or more axes stay dense, {len(stacks)} of "
            f"{len(parts)} with {sum(stacks.values())} of {total} bytes: {some}.",
            stacklevel=6,
        )


def _path(name: str) -> str:
    """Path of the module that has a tensor of that name."""
    return name.rpartition(".")[0]


def _skipping(text: str) -> Rule:
    try:
        return Rule(rules_.compiled(text), None)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"skip={text!r} is not a regular expression: {error}."
        ) from None


def _chosen(
    directory: Path,
    parts: Mapping[str, Stored],
    *,
    rules: Sequence[Rule],
    skip: Sequence[Rule],
    head: bool,
) -> dict[str, Spec]:
    """How the weights of linear layers are quantized, by name."""
    linear = [name for name, part in parts.items() if linear_of(name, part.shape)]
    if head and not any(is_head(_path(name)) for name in linear):
        raise ValueError(
            f"head=True, but {directory} has no lm_head.weight; a head that is tied to "
            "the embeddings stays dense with them."
        )
    # A head that is tied to the embeddings has no tensor, and may be named.
    known = [*linear, "lm_head.weight"]
    left = [
        name
        for name in linear
        if not is_router(_path(name)) and (head or not is_head(_path(name)))
    ]
    for rule in skip:
        if not _is_used(rule, known):
            raise ValueError(
                f"skip={rule.pattern.pattern!r} matches the whole path of no linear "
                f"layer of {directory}, such as {next(map(_path, linear), None)}."
            )
    for rule in rules:
        if left and not _is_used(rule, known if rule.spec is None else left):
            raise ValueError(
                f"rules has the pattern {rule.pattern.pattern!r}, which matches the "
                f"whole path of no linear layer of {directory} that may be quantized, "
                f"such as {_path(left[0])}; routers stay dense, and lm_head does "
                "without head=True."
            )
    for i, rule in enumerate(rules):
        is_rest = i == len(rules) - 1 and rule.pattern.pattern == ".*"
        if left and not is_rest:
            _check_decides(rule, rules[:i], known if rule.spec is None else left)
    decided = {name: _first((*skip, *rules), name) for name in left}
    specs = {name: spec for name, spec in decided.items() if spec is not None}
    if not specs:
        raise ValueError(
            f"{directory}: no linear layer is left to quantize, of {len(linear)}."
        )
    _check_model(directory, list(map(_path, specs)))
    return specs


def _is_used(rule: Rule, names: Iterable[str]) -> bool:
    return any(rule.matches(name, ".") for name in names)


def _check_decides(rule: Rule, before: Sequence[Rule], names: Iterable[str]) -> None:
    """Refuses a rule to which those before it leave nothing.

    Those that name one path are exceptions from it: grams may be all that there are.
    """
    matched = [name for name in names if rule.matches(name, ".")]
    patterns = [one for one in before if not one.is_exact]
    if all(any(one.matches(name, ".") for one in patterns) for name in matched):
        raise ValueError(
            f"rules has the pattern {rule.pattern.pattern!r}, which decides nothing: "
            f"others before it match all that it does, such as {_path(matched[0])}; "
            "put it before them, or leave it out."
        )


def _first(rules: Iterable[Rule], name: str) -> Spec | None:
    return next((rule.spec for rule in rules if rule.matches(name, ".")), None)


def _check_model(directory: Path, paths: Sequence[str]) -> None:
    """Refuses modules that are no linear layers of their own, which the config says."""
    config = read_config(directory)
    kinds = conv1d(config)
    for path in paths:
        if kind := kinds.get(path.rpartition(".")[2]):
            raise ValueError(
                f"{directory}: model_type={kind!r} stores the weights of {path} "
                "and others [k, n] (Conv1D), where linear layers have [n, k]; they "
                "would be quantized transposed. Leave them dense (skip), or quantize "
                "them in Python (qjax.quantize) and write them (checkpoints.save)."
            )
    heads = [path for path in paths if is_head(path)]
    if heads and config.get("tie_word_embeddings") is True:
        raise ValueError(
            f"head=True, but the config of {directory} ties {heads[0]} to the "
            "embeddings (tie_word_embeddings), which stay dense: loaders would not use "
            "a quantized one. Leave it dense, or set tie_word_embeddings to false if "
            "the two differ."
        )


def conv1d(config: Mapping[str, Any]) -> dict[str, str]:
    """Finds the modules of a model whose dense weights are ``[k, n]`` in the files.

    Args:
      config: Its ``config.json``.

    Returns:
      Last names of their paths, each with the model_type that says so.
    """
    # A model may be made of others, such as an encoder and a decoder.
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    kinds = [part.get("model_type") for part in parts]
    return {
        name: kind
        for kind in kinds
        if isinstance(kind, str)
        for name in _CONV1D.get(kind, ())
    }


def _matrix(spec: Spec, watch: Watch | None, path: str, stored: Stored) -> Weight:
    def look() -> QTensor | ValueError:
        shape = jax.ShapeDtypeStruct(stored.shape[::-1], stored.dtype)
        try:
            return jax.eval_shape(spec.quantize, shape)
        except ValueError as reason:
            return reason
        except TypeError as error:
            error.add_note(f"It was raised for the shape of {path}.")
            raise

    def read() -> QTensor:
        # JAX takes the memory of the file's array and turns it by itself.
        w = jax.device_put(stored.read()).T
        # Largest and smallest numbers, which scales come from, may leave out NaN.
        if not jnp.isfinite(w).all():
            raise ValueError(
                f"{stored.file}: {stored.name} is not finite: it holds NaN or infinity "
                "and cannot be quantized; download it again, or leave it dense (skip)."
            )
        try:
            packed = spec.quantize(w)
        except ValueError as error:
            raise ValueError(f"{stored.file}: {stored.name}: {error}") from error
        for name, numbers in (("scale", packed.scale), ("zero", packed.zero)):
            if numbers is not None and not jnp.isfinite(tensor.plain(numbers)).all():
                raise ValueError(
                    f"{stored.file}: {stored.name}: a {name} of what it became is not "
                    "finite; a wider scale_dtype would hold it."
                )
        if watch is not None:
            watch(path, w, packed)
        return packed

    return Weight(nbytes=stored.nbytes, look=look, read=read)


def _rule_said(rule: Rule) -> str:
    """Says what a rule is, the same in every process."""
    pattern, spec = rule.pattern, rule.spec
    matched = f"{pattern.pattern!r} {pattern.flags}"
    if spec is None:
        return f"{matched} dense"
    codes = (spec.bits, spec.group_size, spec.symmetric, spec.scale_dtype)
    said = ", ".join(map(_value, codes))
    return f"{matched} {said} by {_said(spec.quantizer or rtn.quantize)}"


def _said(quantizer: Any) -> str:
    """Says what a quantizer is, the same in every process."""
    quantizer = inspect.unwrap(quantizer)  # of `jax.jit`
    if isinstance(quantizer, functools.partial):
        arguments = [_value(value) for value in quantizer.args]
        named = sorted(quantizer.keywords.items())
        arguments += [f"{name}={_value(value)}" for name, value in named]
        return f"{_said(quantizer.func)}({', '.join(arguments)})"
    name = getattr(quantizer, "__qualname__", "<")
    if not callable(quantizer) or "<" in name or hasattr(quantizer, "__self__"):
        raise TypeError(
            f"quantizer={quantizer!r} must be a function with a name in a module, or a "
            "functools.partial of one, so that a call that resumes another knows "
            "whether it asks for the same."
        )
    try:
        # In a script, a function may change under its name.
        source = inspect.getsource(quantizer)
    except (OSError, TypeError):
        source = ""
    digest = hashlib.sha256(source.encode()).hexdigest()
    return f"{quantizer.__module__}.{name} {digest}"


def _value(value: Any) -> str:
    """Says what an argument is; its ``repr`` may leave out numbers."""
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return repr(value)
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value, order="C")
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        return f"{array.dtype}{array.shape}{digest}"
    # To NumPy, any other class is a dtype of objects.
    if isinstance(value, np.dtype | type) and jnp.dtype(value) != np.dtype(object):
        return jnp.dtype(value).name
    raise TypeError(
        f"quantizer has the argument {value!r}, which must be None, a number, a "
        "string, a dtype or an array, so that a call that resumes another knows "
        "whether it asks for the same."
    )
