"""A tokenizer of a few words, as a folder that `transformers` reads."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from akd_dist.data import hub

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
