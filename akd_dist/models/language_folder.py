"""Folders of Hugging Face causal language models as they are: found, known by content, and read without a card.

A folder says nothing of how blocks are packed, so whoever has data gives that; alone it is read for blocks as long as
its positions reach, of documents that do not see each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.files import parse_json
from akd_dist.models import huggingface_lm
from akd_dist.models.build import build_language_model, check_memory
from akd_dist.models.card import CARD, ModelCard, of_language
from akd_dist.models.checkpoint_files import INDEX, digest_of, find_files
from akd_dist.models.huggingface_config import CONFIG, CONTINUES, WEIGHTS, configuration, kept, parse_config
from akd_dist.models.language import Blocks, LanguageModel

LONGEST = 2**17
"""The length of blocks where a configuration names none."""


def is_language_folder(uri: str | Path) -> bool:
    """Whether a local folder holds a causal language model as transformers saves it, and no card of ours."""
    folder = Path(uri)
    if "://" in str(uri) or (folder / CARD).exists() or not (folder / CONFIG).is_file():
        return False
    try:
        named = parse_json((folder / CONFIG).read_bytes()).get("architectures")
    except (ValueError, AttributeError, OSError):  # who reads it as something else says what is wrong
        return False
    return isinstance(named, list) and any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in named)


def card_of_folder(uri: str | Path, blocks: Blocks | None = None) -> ModelCard:
    """The card of a Hugging Face causal language model: a function of its files' content, and of the blocks.

    Args:
        uri: a folder that `is_language_folder`.
        blocks: what it is to take; None asks its configuration.

    Raises:
        RefusedError: it is no causal language model, is not for such blocks, or has no safetensors.
    """
    folder = Path(uri)
    found = parse_config((folder / CONFIG).read_bytes(), folder / CONFIG)
    spec = recipe.HuggingFaceLm(path=folder.resolve().name)
    config = configuration(kept(found), spec.label, CONTINUES)
    blocks = blocks or _blocks_of(config)
    huggingface_lm.check_blocks(spec, config, blocks)
    spec = spec.model_copy(update={"config": kept(found)})
    return ModelCard(**of_language(spec, blocks), weights_sha256=digest_of(_weights(folder)))


def read_folder(uri: str | Path, blocks: Blocks | None = None) -> tuple[LanguageModel, ModelCard]:
    """The module of such a folder in eval mode, seen to fit the memory before it is built, and its card.

    Raises:
        RefusedError: as `card_of_folder`; weights are missing, of another shape or damaged, or fit no memory.
    """
    card = card_of_folder(uri, blocks)
    check_memory(card)
    assert isinstance(card.model, recipe.HuggingFaceLm)
    placed = card.model_copy(update={"model": card.model.model_copy(update={"path": str(uri)})})
    with torch.random.fork_rng(devices=[]):
        module = build_language_model(placed, pretrained=True)
    module.eval()
    return module, card


def _blocks_of(config: Any) -> Blocks:
    """What a configuration says of blocks; an end of text only where there is one."""
    most = getattr(config, "max_position_embeddings", None) or LONGEST
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    end = getattr(config, "eos_token_id", None)
    return Blocks(
        length=min(most, window or most),
        vocabulary=config.vocab_size,
        end_of_text=end if isinstance(end, int) and 0 <= end < config.vocab_size else None,
    )


def _weights(folder: Path) -> list[Path]:
    """Its safetensors, whole or in shards; pickles are not looked at."""
    for name in (WEIGHTS, f"{WEIGHTS}{INDEX}"):
        if (folder / name).is_file():
            return find_files(folder / name)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*"))
    raise RefusedError(
        f"{folder} has no safetensors" + (", and pickles are never unpickled" if pickles else ""),
        got=", ".join(pickles[:3]) or "no weights",
        expected=f"{WEIGHTS}, or its shards with {WEIGHTS}{INDEX}",
        next="where you trust it, load the model yourself and save it with model.save_pretrained",
    )
