"""Tokenizers as folders that `transformers` reads: one of a few words, and byte-pair ones of language models."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from akd_dist.data import hub
from akd_dist.jobs.stdlib_texts import write_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def a_tokenizer(
    root: Path,
    words: Sequence[str] = ("red", "green", "blue"),
    *,
    types: bool = False,
    padding: str | None = "[PAD]",
) -> Path:
    """A folder with a tokenizer: special tokens 0 to 4, then the words, in this order."""
    names = [*SPECIAL, *words]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    hub.require_extra("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token=padding,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids"],
    ).save_pretrained(root / "tokenizer")
    return root / "tokenizer"


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that does not say what the assistant has written."""
TELLING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""One that does."""


def a_byte_pair_tokenizer(folder: Path, vocabulary: int = 300, template: str | None = None) -> Path:
    """A folder with a byte-pair tokenizer of a few words, and with a chat template if one is given."""
    write_tokenizer(folder, ["the cat sat on the mat", "the dog ran after the cat"] * 5, vocabulary)
    if template is not None:
        with_template(folder, folder, template)
    return folder


def with_template(folder: Path, to: Path, template: str) -> Path:
    """The same tokenizer with this template, in another folder."""
    loaded = hub.require_extra("transformers").AutoTokenizer.from_pretrained(str(folder))
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    loaded.chat_template = template
    loaded.save_pretrained(str(to))
    return to
