"""What a language model from elsewhere says of blocks: counted by hand, and noticed where it says nothing."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.distill.language_check import check_on_blocks
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import read_model
from akd_dist.models.imported import open_checkpoint
from akd_dist.models.language import Blocks, LanguageModel
from tests.language_models import BLOCKS, VOCABULARY, decoder, saved, some_blocks
from tests.tiny_transformers import rows


@pytest.mark.parametrize("name", ["own", "capped"])
def test_it_is_the_cross_entropy_of_scored_positions(tmp_path: Path, name: str) -> None:
    model: Any = decoder() if name == "own" else read_model(saved(tmp_path, name), blocks=BLOCKS)[0]
    blocks = some_blocks(5)
    blocks[:, 2] = 0
    blocks[:, 2, [2, 3, 9]] = 1
    check = check_on_blocks(model, blocks.numpy(), VOCABULARY)
    with torch.no_grad():
        logits, meant = model(blocks)[:, [2, 3, 9]].flatten(0, 1), blocks[:, 0, [3, 4, 10]].long().flatten()
    assert check.rows == 15
    assert check.cross_entropy == pytest.approx(float(torch.nn.functional.cross_entropy(logits, meant)), rel=1e-5)
    assert check.accuracy == pytest.approx(float((logits.argmax(1) == meant).float().mean()))
    assert f"of {check.rows} next tokens" in check.line


def test_a_model_that_knows_less_than_nothing_is_told(tmp_path: Path) -> None:
    model, _ = read_model(saved(tmp_path, "llama"), blocks=BLOCKS)
    assert isinstance(model, LanguageModel)
    with torch.no_grad():
        model.output_weight.mul_(100)
    check = check_on_blocks(model, some_blocks(4).numpy(), VOCABULARY)
    assert check.cross_entropy is not None
    assert check.cross_entropy > math.log(VOCABULARY)
    assert "another tokenizer" in check.warnings[0]
    nothing = np.zeros((2, 3, 16), np.int32)
    check = check_on_blocks(model, nothing, VOCABULARY)
    assert check.rows == 0
    assert check.line.endswith("asked for no next token: the validation rows have none to learn")


def test_rows_of_blocks_say_what_a_model_is_to_take(tmp_path: Path) -> None:
    tokens: Any = SimpleNamespace(tokenizer="f" * 64, attention="document", end_of_text=0)
    inputs = some_blocks(4).numpy()
    data: Any = SimpleNamespace(normalize=None, image=recipe.Image())
    given = replace(rows(), inputs=inputs, classes=VOCABULARY, task="language_model", tokens=tokens)
    card = ModelCard.of(recipe.CausalLm(width=32, heads=4), given, None)
    assert card.blocks == BLOCKS
    assert isinstance(build(card, 0), LanguageModel)
    card.check_rows(given, "it")
    longer = replace(given, inputs=np.zeros((4, 3, 17), np.int32))
    with pytest.raises(RefusedError, match="it was made for shorter blocks"):
        card.check_rows(longer, "it")
    with pytest.raises(RefusedError, match="is no language model"):
        ModelCard.of(recipe.Mlp(hidden=8), given, None)
    with pytest.raises(RefusedError, match="it is no language model"):
        ModelCard.of(recipe.TextTransformer(width=8), rows(), None).check_rows(given, "it")
    folder = saved(tmp_path / "llama", "llama")
    found = open_checkpoint(recipe.HuggingFaceLm(path=str(folder)), str(folder), given, data, tmp_path)
    assert found.card.blocks == Blocks(length=16, vocabulary=VOCABULARY, tokenizer="f" * 64, end_of_text=0)
    assert torch.equal(found.module(tmp_path)(some_blocks()), read_model(folder, blocks=BLOCKS)[0](some_blocks()))
