"""The JSON files of a checkpoint directory."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qjax.checkpoints.atomic import left_over

# The bound that safetensors sets to its headers; the index of the largest models has a
# fifth of it.
_MAX_BYTES = 100_000_000


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the ``config.json`` of a checkpoint directory.

    Args:
      path: The directory, as Hugging Face transformers (4 or 5) writes it.

    Returns:
      The parsed object, unchanged. ``quantization_config``, if it has one, is an object
      or None; nothing else is looked at.

    Raises:
      FileNotFoundError: If the directory or the file is not there.
      ValueError: If the file is no JSON object, names a key twice or nests too deeply.

    Example:
      >>> config = read_config("examples/llm/checkpoint")
      >>> config["model_type"], config["quantization_config"]["quant_method"]
      ('llama', 'gptq')
    """
    directory = Path(path)
    if not directory.is_dir():
        if old := left_over(path):
            raise FileNotFoundError(
                f"{directory} is not there: replacing it was interrupted, and what it "
                f"was is {old[0]}. Do the same again, or rename that."
            )
        raise FileNotFoundError(
            f"{directory} is not a directory; pass one that holds config.json and "
            "model.safetensors (qjax.checkpoints.download gets one from the Hugging "
            "Face Hub). What a GGUF file has instead of config.json, read_metadata "
            "gives."
        )
    file = directory / "config.json"
    config = read_object(file)
    entry = config.get("quantization_config")
    if not isinstance(entry, dict | None):
        # No TypeError, here and below: the file is wrong, not the type of an argument.
        raise ValueError(  # noqa: TRY004
            f"{file}: quantization_config={entry!r} must be an object."
        )
    return config


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
      file: The file.

    Returns:
      The object as a dictionary.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is too large, no JSON, no object, or has a key twice.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; a checkpoint directory is not complete without it."
        )
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{file} has {size} bytes; at most {_MAX_BYTES} are read.")
    return parse_object(file.read_bytes(), file)


def parse_object(text: bytes, file: Path | str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
      text: The object in UTF-8.
      file: Where it is from, for messages.

    Returns:
      The object as a dictionary.

    Raises:
      ValueError: If ``text`` is no JSON, no object, or has a key twice.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{file} nests too deeply to be read.") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(  # noqa: TRY004
            f"{file} must hold a JSON object, not {type(value).__name__}."
        )
    return value


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object; the json module would keep the last of two equal keys."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} appears twice in one object")
        value[key] = item
    return value
