"""The tokenizer that a GGUF file describes: byte-level BPE, or SentencePiece's BPE.

The first by tokens and merges; its patterns are those in the tokenizer.json of Llama 3,
Phi-4, SmolLM3, Qwen2, Granite 3 and gpt-oss, which llama.cpp knows by the names in
"tokenizer.ggml.pre". The second, of Llama 2, Mistral, Phi-3 and Gemma, by pieces and
their scores.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from tokenizers.processors import TemplateProcessing

import qjax

# How texts are cut into words, by "tokenizer.ggml.pre"; None: as GPT-2 does, and those
# of DIGITS so, but with each digit apart.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}"
_QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_OTHERS}"
# Words of capitals and then of small letters are apart, and with them their endings.
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+{_ENDINGS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*{_ENDINGS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
PATTERNS = {
    "gpt-2": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "refact": None,
    "smollm": None,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _O200K,
}
DIGITS = ("refact", "smollm")
# A word that is a token needs no merges, and texts begin with a token.
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
# What "tokenizer.ggml.token_type" says of a token.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_OTHERWISE = "pass --tokenizer and the tokenizer.json of the original model."
# SentencePiece's space.
_SPACE = "▁"


def read_tokenizer(path: Path) -> Tokenizer:
    """Makes the tokenizer that a GGUF file describes.

    Raises:
      ValueError: If it is of another kind, cuts texts in a way not known here, or does
        not fit together.
    """
    metadata = qjax.checkpoints.read_metadata(path)
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    try:
        return _tokenizer(own)
    except ValueError as error:
        raise ValueError(f"{path}: tokenizer.ggml.{error}") from None


def _tokenizer(own: Mapping[str, Any]) -> Tokenizer:
    kind, tokens = own.get("model"), own.get("tokens", [])
    if kind not in _MAKERS:
        raise ValueError(f"model={kind!r} must be one of {[*_MAKERS]}; {_OTHERWISE}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("tokens has a token twice.")
    tokenizer, begins = _MAKERS[kind](own, vocabulary)
    kinds = own.get("token_type", [])
    # Gemma's runs of spaces are found where spaces are SentencePiece's own already. A
    # space that is put before each text would be put before them, too.
    late = kind == "llama" and not own.get("add_space_prefix", True)
    special = [
        AddedToken(
            token,
            normalized=late and type_ == _USER_DEFINED,
            special=type_ == _CONTROL,
        )
        for token, type_ in zip(tokens, kinds, strict=False)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(special)
    if own.get("add_bos_token", begins):
        number = own.get("bos_token_id")
        if number not in range(len(tokens)):
            raise ValueError(f"bos_token_id={number} is no token.")
        begin = tokens[number]
        # In a template, these have a meaning of their own.
        if begin.startswith("$") or ":" in begin:
            raise ValueError(
                f"bos_token_id={number} is {begin!r}, which cannot be put before a "
                "text here; pass --tokenizer."
            )
        tokenizer.post_processor = TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, number)]
        )
    return tokenizer


def _byte_level(
    own: Mapping[str, Any], vocabulary: dict[str, int]
) -> tuple[Tokenizer, bool]:
    """Of tokens and merges, and whether a text begins with a token if nothing says."""
    if (pre := own.get("pre")) not in PATTERNS:
        raise ValueError(f"pre={pre!r} must be one of {[*PATTERNS]}; {_OTHERWISE}")
    merges = [tuple(merge.split(" ")) for merge in own.get("merges", [])]
    is_llama3 = pre in LLAMA3
    if any(len(merge) != 2 or "".join(merge) not in vocabulary for merge in merges):
        raise ValueError("merges has one that makes no token.")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama3))
    if PATTERNS[pre] is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    words = ByteLevel(add_prefix_space=False, use_regex=PATTERNS[pre] is None)
    if PATTERNS[pre] is not None:
        split = Split(Regex(PATTERNS[pre]), "isolated")
        words = Sequence([split, words])
    if pre in DIGITS:
        words = Sequence([Digits(individual_digits=True), words])
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, is_llama3


def _sentence_pieces(
    own: Mapping[str, Any], vocabulary: dict[str, int]
) -> tuple[Tokenizer, bool]:
    """Of pieces and their scores; as `_byte_level`.

    SentencePiece joins the neighbours whose piece has the highest score: so every way
    to make a piece of two is a merge, in the order of scores.
    """
    scores, kinds = own.get("scores", []), own.get("token_type", [])
    if not len(vocabulary) == len(scores) == len(kinds):
        raise ValueError(
            f"tokens, scores and token_type have {len(vocabulary)}, {len(scores)} and "
            f"{len(kinds)} entries, which must be as many."
        )
    if not all(isinstance(score, float) for score in scores):
        raise ValueError("scores must be floats.")
    pieces = list(zip(vocabulary, scores, kinds, strict=True))
    made = [one for one in pieces if one[2] == _NORMAL]
    merges = [
        (piece[:i], piece[i:])
        for piece, *_ in sorted(made, key=lambda one: -one[1])
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    unknown = next((piece for piece, _, kind in pieces if kind == _UNKNOWN), None)
    how = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **how))
    first = own.get("add_space_prefix", True)
    parts = [normalizers.Prepend(_SPACE)] if first else []
    parts.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(parts)
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if first:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer, True


_MAKERS: Mapping[str, Callable[..., tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentence_pieces,
}
