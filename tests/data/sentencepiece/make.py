"""Makes pieces.json beside it: SentencePiece models, and what they make of texts.

Run by hand, from the root of the repository:

    pip install sentencepiece==0.2.3
    python tests/data/sentencepiece/make.py

Both are trained as Llama 2's and Gemma's were (BPE, bytes for other characters, digits
apart, no normalization), on source code of this repository: the first puts a space
before a text, the second has pieces of its user.
"""

import io
import json
from pathlib import Path

import sentencepiece

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
# As Gemma's has runs of spaces and of lines.
DEFINED = ["▁▁▁", "<b>", "\n\n"]
TEXTS = [
    "def main(arguments):\n    return arguments[0] + 1\n",
    "  two spaces, then\ta tab  and   three ",
    "An expert of a mixture: 1234.5 tokens, 0x1F",
    "déjà vu, 日本語, 🙂 and <0x41> or ▁ itself",
    "\n\n\r\n leading lines",
    "x",
    " ",
    "four    spaces <b>bold<b> and\n\n\nthree lines",
    "aaaaaaaaaaaaaaa bbbb====---->>>>",
]


def main() -> None:
    """Trains both, and encodes the texts with them."""
    known = {
        "sentencepiece": sentencepiece.__version__,
        "llama": trained(add_dummy_prefix=True),
        "gemma": trained(add_dummy_prefix=False, user_defined_symbols=DEFINED),
    }
    text = json.dumps(known, ensure_ascii=False, indent=None)
    (FOLDER / "pieces.json").write_text(text + "\n")


def trained(**options) -> dict:
    """A model's pieces, and the ids of the texts."""
    stream = io.BytesIO()
    files = sorted((ROOT / "qjax" / "formats").glob("*.py"))
    lines = [line for file in files for line in file.read_text().splitlines() if line]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=stream,
        model_type="bpe",
        vocab_size=512,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=1,
        **options,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    numbers = range(model.GetPieceSize())
    encoded = [(text, model.EncodeAsIds(text)) for text in TEXTS]
    return {
        "tokens": [model.IdToPiece(i) for i in numbers],
        "scores": [model.GetScore(i) for i in numbers],
        "token_type": [kind(model, i) for i in numbers],
        "texts": [
            {"text": text, "ids": ids, "back": model.DecodeIds(ids)}
            for text, ids in encoded
        ],
    }


def kind(model: sentencepiece.SentencePieceProcessor, i: int) -> int:
    """What a GGUF file calls the type of a piece."""
    if model.IsUnknown(i):
        return 2
    if model.IsControl(i):
        return 3
    if model.IdToPiece(i) in DEFINED:
        return 4
    return 6 if model.IsByte(i) else 1


if __name__ == "__main__":
    main()
