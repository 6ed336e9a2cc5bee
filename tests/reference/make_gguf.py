"""Make gpt_oss/model.gguf: the directory beside it, by llama.cpp's own converter.

Run by hand, from the root of the repository, after make_logits.py:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0
    python tests/reference/make_gguf.py llama_cpp_python-0.3.36/vendor/llama.cpp

The directory has no tokenizer, and the file says so. Its experts are the MXFP4 of the
directory, reordered; the rest is bfloat16 and float32.
"""

import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "gpt_oss"


def main(llama_cpp: str) -> None:
    """Converts, with the code of that checkout."""
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    import convert_hf_to_gguf  # noqa: PLC0415  (found on the path just added)
    import gguf  # noqa: PLC0415

    hparams = convert_hf_to_gguf.ModelBase.load_hparams(FOLDER, False)
    kind = convert_hf_to_gguf.get_model_class(hparams["architectures"][0])

    def set_vocab(model) -> None:
        model.gguf_writer.add_tokenizer_model("none")
        model.gguf_writer.add_vocab_size(hparams["vocab_size"])

    kind.set_vocab = set_vocab
    dtype = gguf.LlamaFileType.MOSTLY_BF16
    with torch.inference_mode():
        kind(FOLDER, dtype, FOLDER / "model.gguf", hparams=hparams).write()


if __name__ == "__main__":
    main(sys.argv[1])
