"""Small built-in models, their cards, and rows that these are of."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from akd_dist import recipe
from akd_dist.data.rows import Rows
from akd_dist.data.text import Tokens
from akd_dist.models.card import ModelCard

MLP = recipe.Mlp(hidden=[6, 5], dropout=0.1)
CNN = recipe.Cnn(width=4)
SPECS: list[recipe.Model] = [
    MLP,
    CNN,
    recipe.Mlp(hidden=8),
    recipe.Cnn(width=2, depth=3),
    recipe.ResNet(depth=8, width=4),
    recipe.PlainCnn(layers=2),
]


def card(model: Any = CNN, **changes: Any) -> ModelCard:
    fields: dict[str, Any] = {"input_shape": (1, 8, 8), "input_dtype": "uint8", "classes": 10}
    return ModelCard(model=model, **fields | changes)


def images(n: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8))


TOKENS = Tokens(vocabulary=300, padding=256, mask=257, special=(256, 257))


def rows(inputs: np.ndarray | None = None, classes: int = 10, **more: Any) -> Rows:
    inputs = np.zeros((4, 1, 8, 8), np.uint8) if inputs is None else inputs
    labels = np.zeros(4, np.float32 if more.get("task") == "regression" else np.int64)
    return Rows(inputs, labels, classes, "", (), Path(), **more)


def texts(length: int = 8, **more: Any) -> Rows:
    return rows(np.full((4, length), 7, np.int32), **{"tokens": TOKENS, **more})


TEXT = recipe.TextTransformer(width=8)
