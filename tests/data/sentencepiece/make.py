"""Makes pieces.json beside it: a SentencePiece model, and what it makes of texts.

Run by hand, from the root of the repository:

    pip install sentencepiece==0.2.3
    python tests/data/sentencepiece/make.py

The model is trained as Llama 2's was (BPE, bytes for other characters, digits apart, a
space before the text, no normalization), on source code of this repository.
"""

import io
import json
from pathlib import Path

import sentencepiece

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
TEXTS = [
    "def main(arguments):\n    return arguments[0] + 1\n",
    "  two spaces, then\ta tab  and   three ",
    "An expert of a mixture: 1234.5 tokens, 0x1F",
    "déjà vu, 日本語, 🙂 and <0x41> or ▁ itself",
    "\n\n\r\n leading lines",
    "x",
    " ",
    "aaaaaaaaaaaaaaa bbbb====---->>>>",
]


def main() -> None:
    """Trains the model, and encodes the texts with it."""
    stream = io.BytesIO()
    files = sorted((ROOT / "qjax" / "formats").glob("*.py"))
    lines = [line for file in files for line in file.read_text().splitlines() if line]
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=stream,
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=1,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    numbers = range(model.GetPieceSize())
    kinds = [
        2 if model.IsUnknown(i)
        else 3 if model.IsControl(i)
        else 6 if model.IsByte(i)
        else 1
        for i in numbers
    ]  # fmt: skip
    known = {
        "sentencepiece": sentencepiece.__version__,
        "tokens": [model.IdToPiece(i) for i in numbers],
        "scores": [model.GetScore(i) for i in numbers],
        "token_type": kinds,
        "texts": [
            {"text": text, "ids": model.EncodeAsIds(text), "back": model.DecodeIds(ids)}
            for text in TEXTS
            for ids in [model.EncodeAsIds(text)]
        ],
    }
    text = json.dumps(known, ensure_ascii=False, indent=None)
    (FOLDER / "pieces.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
