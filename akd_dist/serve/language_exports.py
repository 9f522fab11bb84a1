"""Language models as others run them: ids int64 [rows, length] -> logits [rows, length, ids], one document a row.

That is what every program that runs language models feeds: `input_ids` and nothing else, with attention to all tokens
before. Blocks of several documents are a matter of training and stay here. The built-in model becomes a Llama, which
transformers has the code of, with the same numbers under the same names.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.packing import IDS
from akd_dist.data.row_cache import Progress
from akd_dist.data.tokenizers import save_language_tokenizer
from akd_dist.models.card import WEIGHTS
from akd_dist.models.decoder import CausalDecoder, llama_config, llama_state
from akd_dist.models.huggingface_config import CONFIG
from akd_dist.models.huggingface_lm import HuggingFaceDecoder
from akd_dist.models.language import Blocks, LanguageModel, plain_logits
from akd_dist.serve.examples import DataRequest
from akd_dist.serve.generating import text_of
from akd_dist.serve.language_data import Texts, open_texts
from akd_dist.serve.served import Served

INPUT = "input_ids"
_ROWS, _LENGTH = 8, 32  # of what an export is compared on
_NUMBERS = 1 << 26  # logits that are compared, at most, where real texts are longer than that


class OnIds(nn.Module):
    """A language model on ids int64 [rows, length], each row one document -> logits [rows, length, ids]."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.language = copy.copy(model)
        self.language.attention = "block"  # a row is one document: who sees whom follows from places alone

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, ids] of ids int64 [rows, length]."""
        return plain_logits(self.language, input_ids)


def on_ids(model: Served) -> Served:
    """The same model for ids instead of blocks."""
    assert isinstance(model.module, LanguageModel)
    return replace(model, module=OnIds(model.module).eval())


def random_ids(blocks: Blocks) -> np.ndarray:
    """Ids int64 [rows, length] all over the vocabulary."""
    shape = (_ROWS, min(blocks.length, _LENGTH))
    return np.random.default_rng(0).integers(0, blocks.vocabulary, shape, dtype=np.int64)


def real_ids(
    model: Served, asked: DataRequest, cache_root: Path, on_progress: Progress | None
) -> tuple[np.ndarray, Texts]:
    """Ids int64 [rows, length] of texts that a user names, from their beginning, and these texts.

    Raises:
        RecipeError, RefusedError, MachineError: as `language_data.open_texts` and `Texts.prepare`; or there is no
            token.
    """
    texts = open_texts(asked, model, cache_root, on_progress=on_progress)
    texts.prepare(model)
    _, blocks = next(texts.batches(), (None, np.empty((0, 3, 0), np.int32)))
    # Logits of all positions are held, several times over.
    length = max(_LENGTH, _NUMBERS // (_ROWS * texts.blocks.vocabulary))
    ids = blocks[:_ROWS, IDS, :length].astype(np.int64)
    if ids.size == 0:
        raise RefusedError(
            f"there is no token in {asked.data}",
            got="empty documents alone",
            expected="text",
            next="name other data, or leave --data out",
        )
    return ids, texts


def example(module: nn.Module, blocks: Blocks) -> tuple[torch.Tensor, dict[int, Any]]:
    """What a program is traced on, and the dimensions that stay free."""
    assert isinstance(module, OnIds)
    most = module.language.most_positions
    free = {0: torch.export.Dim("rows", min=1), 1: torch.export.Dim("length", min=1, max=most)}
    return torch.from_numpy(random_ids(blocks)[:2]), free


def inputs_in_words(blocks: Blocks) -> str:
    """What an export takes."""
    return f"{INPUT}: int64 [rows, length], ids 0 to {blocks.vocabulary - 1}, one document a row, trained on up to " + (
        f"{blocks.length} tokens"
    )


def outputs_in_words(module: nn.Module, precision: str) -> str:
    """What an export gives."""
    assert isinstance(module, OnIds)
    rows = module.language.output_weight.shape[0]
    return f"{precision} [rows, length, {rows}], logits of the next token at each position"


def notes(model: Served, to: str, tokenizer: str | None, *, real: bool) -> list[str]:
    """What to know besides.

    Args:
        real: whether it was compared on texts that the user named.
    """
    told = [] if real else ["compared on random tokens"]
    if model.card.blocks is not None and model.card.blocks.attention == "document":
        told.append("takes one document a row: several documents in one block are kept apart by akd-dist alone")
    if to == "huggingface" and not isinstance(_known_text(model, tokenizer), recipe.HuggingFaceText):
        told.append("without a tokenizer: none of Hugging Face is known here; --tokenizer FOLDER adds one")
    return told


def write_huggingface(model: Served, folder: Path, tokenizer: str | None) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` loads, its tokenizer beside it where one is known.

    Raises:
        RefusedError: the tokenizer has other ids than the model.
    """
    assert isinstance(model.module, OnIds)
    assert model.card.blocks is not None
    module = model.module.language
    if isinstance(module, HuggingFaceDecoder):
        module.model.save_pretrained(folder)
    else:
        assert isinstance(module, CausalDecoder)
        assert isinstance(model.card.model, recipe.CausalLm)
        folder.mkdir()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in llama_state(module).items()}
        safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config = llama_config(model.card.model, model.card.blocks)
        config["dtype"] = str(module.output_weight.dtype).removeprefix("torch.")
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if isinstance(text := _known_text(model, tokenizer), recipe.HuggingFaceText):
        save_language_tokenizer(text, model.card.blocks.vocabulary, model.card.blocks.tokenizer, folder)


def _known_text(model: Served, tokenizer: str | None) -> recipe.Text | None:
    """How text becomes ids; None where nobody knows, unless somebody says so and is wrong."""
    try:
        return text_of(model, tokenizer)
    except RefusedError:
        if tokenizer is not None:
            raise
        return None
