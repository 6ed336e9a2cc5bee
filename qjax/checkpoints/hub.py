"""Models of the Hugging Face Hub: `download`."""

import functools
import os
import re
from pathlib import Path

from qjax.checkpoints.shards import INDEX, SINGLE, weight_files

_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.+\.gguf))?")
# llama.cpp's number of a split file, without that of the last.
_NUMBER = re.compile(r"-\d{5}(?=-of-\d{5}\.gguf$)")


def download(name: str, *, revision: str | None = None) -> Path:
    """Downloads what qjax reads of a model on the Hugging Face Hub.

    It goes to the Hub's own cache: what is there already, also of another program, is
    not downloaded again, and is used where there is no network. Of a directory, these
    are the JSON files and the safetensors files, of those in folders none: nothing that
    runs code. The package ``huggingface_hub`` must be installed.

    Args:
      name: "organization/model", and "organization/model/file.gguf" for a GGUF file,
        of split ones any. "organization/model@revision" does as well.
      revision: A branch, such as ExLlamaV2's "4.0bpw", a tag or a commit (default: the
        main branch).

    Returns:
      The directory, or the file, for `load` and whatever else takes a path.

    Raises:
      ModuleNotFoundError: If ``huggingface_hub`` is not installed.
      ValueError: If the name is none of a model, or has another revision as well.
      FileNotFoundError: If there is no such model, revision or file, or it is neither
        to be reached nor in the cache.

    Example:
      >>> download("model")  # load(download("organization/model-GPTQ")) loads one
      Traceback (most recent call last):
      ValueError: name='model' must be 'organization/model[@revision][/file.gguf]'.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"name={name!r} must be 'organization/model[@revision][/file.gguf]'."
        )
    repository, named, file = match.groups()
    if named and revision:
        raise ValueError(f"name={name!r} has a revision, and {revision=} is another.")
    get = functools.partial(_snapshot, name, repository, revision or named)
    if file is not None:
        found = get([_NUMBER.sub("-*", file)]) / file
        if not found.is_file():
            raise FileNotFoundError(f"{repository} has no file {file!r}.")
        return found
    directory = get(["*.json"])
    shards = weight_files(directory) - {SINGLE, INDEX}
    get([*shards] or ["*.safetensors"])
    if not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{repository} has no .safetensors files. Of a repository of GGUF files, "
            f"name one: '{repository}/file.gguf'."
        )
    return directory


def locate(path: str | os.PathLike[str]) -> Path:
    """Takes a path, or a name for `download`, as the commands of qjax do.

    Args:
      path: A path; or the name of a model on the Hub, if there is no such path.

    Returns:
      The path as it is, whether it is there or not, or that of what was downloaded.

    Raises:
      ModuleNotFoundError: As `download`.
      FileNotFoundError: As `download`, also for a path that could be a name.

    Example:
      >>> str(locate("examples/llm/checkpoint"))
      'examples/llm/checkpoint'
    """
    if Path(path).exists() or not _NAME.fullmatch(str(path)):
        return Path(path)
    return download(str(path))


def _snapshot(
    name: str, repository: str, revision: str | None, wanted: list[str]
) -> Path:
    """The folder of the Hub's cache with all wanted files, downloaded if need be."""
    try:
        import huggingface_hub  # noqa: PLC0415  # Only who downloads needs it.
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{name!r} is no path here; to download it, install huggingface_hub."
        ) from None
    # Folders hold the same weights in other formats.
    others = None if any("/" in one for one in wanted) else ["*/*"]
    try:
        found = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=others,
        )
    except (OSError, ValueError) as error:
        # An HTTP error says its number before what it means.
        *_, reason = str(error).strip().split("\n\n", maxsplit=1)
        raise FileNotFoundError(
            f"{name!r} is no path here, and not to be had from the Hugging Face Hub: "
            + reason.splitlines()[0]
        ) from error
    return Path(found)
