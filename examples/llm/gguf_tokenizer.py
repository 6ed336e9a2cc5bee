"""The tokenizer that a GGUF file describes: byte-level BPE, by tokens and merges.

Its patterns are those in the tokenizer.json of Llama 3 and of Qwen2, which llama.cpp
knows by the names in "tokenizer.ggml.pre".
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing

import qjax

# How texts are cut into words, by "tokenizer.ggml.pre"; None: as GPT-2 does.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}"
_QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_OTHERS}"
PATTERNS = {
    "gpt-2": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_CONTROL, _USER_DEFINED = 3, 4


def read_tokenizer(path: Path) -> Tokenizer:
    """Makes the tokenizer that a GGUF file describes.

    Raises:
      ValueError: If it is no byte-level BPE, or cuts texts in a way not known here.
    """
    metadata = qjax.checkpoints.read_metadata(path)
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    model, pre = own.get("model"), own.get("pre")
    if model != "gpt2" or pre not in PATTERNS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model={model!r} and pre={pre!r}, but only 'gpt2' "
            f"with one of {[*PATTERNS]} is known; pass --tokenizer and the "
            "tokenizer.json of the original model."
        )
    tokens, merges = own.get("tokens", []), own.get("merges", [])
    merges = [tuple(merge.split(" ")) for merge in merges]
    is_llama3 = PATTERNS[pre] is _LLAMA3
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens has a token twice.")
    if any(len(merge) != 2 or "".join(merge) not in vocabulary for merge in merges):
        raise ValueError(f"{path}: tokenizer.ggml.merges has one that makes no token.")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama3))
    if PATTERNS[pre] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    words = ByteLevel(add_prefix_space=False, use_regex=PATTERNS[pre] is None)
    if PATTERNS[pre] is not None:
        split = Split(Regex(PATTERNS[pre]), "isolated")
        words = Sequence([split, words])
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    kinds = own.get("token_type", [])
    special = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(special)
    if own.get("add_bos_token", is_llama3):
        number = own.get("bos_token_id")
        if number not in range(len(tokens)):
            raise ValueError(
                f"{path}: tokenizer.ggml.bos_token_id={number} is no token."
            )
        begin = tokens[number]
        # In a template, these have a meaning of their own.
        if begin.startswith("$") or ":" in begin:
            raise ValueError(
                f"{path}: tokenizer.ggml.bos_token_id={number} is {begin!r}, which "
                "cannot be put before a text here; pass --tokenizer."
            )
        tokenizer.post_processor = TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, number)]
        )
    return tokenizer
