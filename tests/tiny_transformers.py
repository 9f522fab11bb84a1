"""Tiny transformers models, and rows for them, of the tests of Hugging Face models; ways to damage a folder."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.data.rows import Rows
from akd_dist.data.text import Tokens
from akd_dist.models.card import WEIGHTS

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *(f"word{number}" for number in range(35))]
TINY = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
LENGTH = 16


def library() -> Any:
    return importlib.import_module("transformers")


def rows(
    length: int = LENGTH, types: bool = False, vocabulary: int = 40, padding: int = 0, classes: int = 3, **more: Any
) -> Rows:
    """Texts of 2, 4, ... tokens."""
    inputs = np.random.default_rng(0).integers(5, 40, (8, length), dtype=np.int32)
    inputs[np.arange(length) >= 2 * np.arange(8)[:, None] + 2] = padding
    if types:
        inputs = np.stack([inputs, (np.arange(length, dtype=np.int32) > 4) * np.ones_like(inputs)], axis=1)
    tokens = Tokens(vocabulary=vocabulary, padding=padding, mask=4, special=(0, 1, 2, 3, 4))
    labels = np.zeros(8, np.float32 if more.get("task") == "regression" else np.int64)
    return Rows(inputs, labels, classes, "", (), Path(), tokens=tokens, **more)


def pretrained(folder: Path, **changes: Any) -> recipe.HuggingFaceModel:
    return recipe.HuggingFaceModel(path=str(folder), **changes)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


HOSTILE: list[dict[str, Any]] = [
    {"_attn_implementation": "someone/kernels"},
    {"attn_implementation": "someone/kernels"},
    {"auto_map": {"AutoModelForSequenceClassification": "theirs.Model"}},
    {"attribute_map": {"alias": "_attn_implementation_internal"}, "alias": "someone/kernels"},
    {"nested": {"_attn_implementation": "someone/kernels"}},
]
