"""A small recipe as text, changed by tests of how recipes are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from akd_dist.base.errors import RecipeError
from akd_dist.recipe import load_recipe

TEXT = """\
name: small
data:
  train: {kind: digits}
  views: 2
  augmentation: {kind: shift, pixels: 1}
teacher:
  model: {kind: cnn, width: 8}
  train:
    epochs: 3
    optimizer: {kind: sgd, lr: 1e-2}
students:
  - model: {kind: mlp}
    grid:
      model.hidden: [4, 8]
      seed: [0, 1, 2]
    objective: {kind: annealing_kd, tau_max: 2, stage1_epochs: 4, stage2_epochs: 1}
    optimizer: {kind: adamw, lr: 1e-4}
  - model: {kind: cnn, width: 2}
    objective: {kind: hard_labels, epochs: 5}
    optimizer: {kind: sgd, lr: 0.1}
"""


def refusal(path: Path, text: str | None = None, *overrides: str) -> RecipeError:
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.code == 2
    return caught.value


MLP, SEED = "mlp-4-annealing_kd-t2", "s0"
