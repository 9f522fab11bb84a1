"""Tiny language models, blocks for them, and folders as transformers saves them, for tests."""

from pathlib import Path
from typing import Any

import torch

from akd_dist import recipe
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.language import Blocks, LanguageModel, as_blocks
from tests.tiny_transformers import library

VOCABULARY = 50
BLOCKS = Blocks(length=16, vocabulary=VOCABULARY, tokenizer="f" * 64, end_of_text=0)
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
LLAMA: dict[str, Any] = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", GPT2),
    "scaled": ("GraniteConfig", {**LLAMA, "logits_scaling": 4.0}),
    "biased": ("PhiConfig", {**LLAMA, "num_key_value_heads": 4}),
    "capped": ("Gemma2Config", {**LLAMA, "head_dim": 8}),
    "window": ("MistralConfig", {**LLAMA, "sliding_window": 8}),
    "no_positions": ("BloomConfig", {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "state_space": ("MambaConfig", {**SMALL, "hidden_size": 32, "num_hidden_layers": 2}),
    "padded": ("LlamaConfig", {**LLAMA, "vocab_size": 64}),
}


def saved(folder: Path, name: str, **how: Any) -> Path:
    """A folder with a model of random weights, as `save_pretrained` writes it."""
    kind, settings = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = library().AutoModelForCausalLM.from_config(getattr(library(), kind)(**settings))
        for weight in model.parameters():  # norms and biases too, which begin as ones and zeros
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder, **how)
    return folder


def decoder(seed: int = 0, blocks: Blocks = BLOCKS, **changes: Any) -> LanguageModel:
    """A built-in language model of random weights, in eval mode."""
    module = build(
        ModelCard.of_blocks(recipe.CausalLm(**{"width": 32, "depth": 2, "heads": 4, **changes}), blocks), seed
    )
    assert isinstance(module, LanguageModel)
    module.eval()
    return module


def some_blocks(rows: int = 4, length: int = 16, seed: int = 0, cut: int = 6) -> torch.Tensor:
    """Blocks int32 [rows, 3, length] of two documents each, the second from `cut` on."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    blocks = as_blocks(ids)
    blocks[:, 1, cut:] = 1
    return blocks
