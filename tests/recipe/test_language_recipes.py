"""Recipes of language models: what their data may say, what is refused, and how large vocabularies are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.errors import RecipeError
from akd_dist.recipe import LOWEST_IS_BEST, METRICS, EncodingSpec, Recipe, load_recipe

TEXT = """\
name: small
data:
  train: {kind: text, path: texts.parquet}
  task: language_model
  text: {kind: bytes, length: 64}
teacher:
  weights: teacher
students:
  - model: {kind: mlp, hidden: 4}
    objective: {kind: hard_labels, epochs: 1}
    optimizer: {kind: adamw, lr: 1e-3}
"""
CHAT = [
    "data.train={kind: chat, path: chats.jsonl}",
    "data.text={kind: huggingface, path: tokenizer, length: 64}",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(TEXT)
    return file


def test_a_language_model_has_defaults(path: Path) -> None:
    recipe = load_recipe(path)
    data = recipe.data
    assert (data.packing.attention, data.packing.remainder, data.scored) == ("document", "drop", "all")
    assert data.primary_metric == "cross_entropy"
    assert data.primary_metric in LOWEST_IS_BEST
    assert METRICS["language_model"] == ("cross_entropy", "accuracy")
    assert data.train is not None
    assert data.train.kind == "text"
    assert str(path.parent / "texts.parquet") == getattr(data.train, "path", None)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_what_changes_targets_is_part_of_the_identity(path: Path) -> None:
    plain = load_recipe(path, CHAT).identity()
    for change in ("data.scored=completions", "data.packing.attention=block", "data.packing.remainder=pad"):
        assert load_recipe(path, [*CHAT, change]).identity() != plain
    assert load_recipe(path, [CHAT[0].replace("chats", "moved"), CHAT[1]]).identity() == plain


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.task=classification"], ["small.yaml:3: key data.train.kind", "is for language models"]),
        (["data.train={kind: digits}"], ["data.train.kind", "has no documents", "kind: text or kind: chat"]),
        (["data.validation={kind: digits}"], ["data.validation.kind", "has no documents"]),
        (["data.text=null"], ["task is language_model, and text is missing"]),
        (["data.text.length=1"], ["data.text.length", "nothing to predict", "at least 2"]),
        (["data.views=2", "data.augmentation={kind: token_mask}"], ["augmentation", "are used as they are"]),
        (["data.augmentation={kind: token_mask}"], ["data.augmentation", "leave `augmentation` out"]),
        (["data.stratify=true"], ["data.stratify", "documents have no classes"]),
        (["data.unlabelled=missing"], ["data.unlabelled", "each token of a text is a label already"]),
        (["data.normalize={mean: [0], std: [1]}"], ["data.normalize", "for images and numbers"]),
        (["data.image={size: 8}"], ["data.image", "image is for encoded images: leave it out"]),
        (["data.metric=f1"], ["f1 is not one of language_model, which has cross_entropy, accuracy"]),
        (["data.metric={factory: 'm:f'}"], ["data.metric", "given all logits"]),
        (["data.scored=completions"], ["data.scored", "completions are what the assistant of a chat has written"]),
        (["data.packing.attention=all"], ["data.packing.attention cannot be", "'document' or 'block'"]),
        (["data.packing.remainder=keep"], ["data.packing.remainder cannot be", "'drop' or 'pad'"]),
        ([CHAT[0]], ["data.text.kind", "no template that says who speaks", "a chat_template"]),
        ([*CHAT, "data.test={kind: text, path: x.txt}"], ["data.test", "packed in different ways"]),
        (
            ["data.task=classification", "data.train={kind: digits}", "data.text=null", "data.scored=completions"],
            ["data.scored", "scored is for language models"],
        ),
        (
            ["data.task=classification", "data.train={kind: digits}", "data.text=null", "data.packing.remainder=pad"],
            ["data.packing", "packing is for language models"],
        ),
        (["data.train={kind: text, path: x, label: y}"], ["data.train.label is not known"]),
    ],
)
def test_what_does_not_fit_a_language_model_is_refused(changes: list[str], words: list[str], path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, changes)
    told = f"{refused.value}"
    assert [word for word in words if word not in told] == [], told


def test_top_k_says_all_that_a_store_depends_on(path: Path) -> None:
    encoding = load_recipe(path, ["cache.encoding=top_k"]).cache.encoding
    assert encoding.config() == {
        "name": "top_k",
        "k": 16,
        "rank": 16,
        "value_bits": 6,
        "tail_temperatures": [1.0, 4 / 3, 2.0],
        "probe_rows": 64,
    }
    assert hash(encoding) == hash(EncodingSpec(kind="top_k"))  # teachers are loaded once by what is said of them
    one = load_recipe(path, ["cache.encoding={kind: top_k, k: 8, rank: 0, tail_temperatures: [4, 1]}"])
    other = load_recipe(path, ["cache.encoding={kind: top_k, k: 8, rank: 0, tail_temperatures: [1, 4.0]}"])
    assert one.cache.encoding.config() == other.cache.encoding.config()
    assert one.identity() == other.identity()
    assert Recipe.model_validate(one.model_dump(mode="json")).identity() == one.identity()


def test_dense_encodings_are_spelled_as_before() -> None:
    for kind in ("float32", "float16"):
        encoding = EncodingSpec.model_validate(kind)
        assert json.loads(encoding.model_dump_json()) == kind
        assert encoding.config() == {"name": kind}


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        (
            "{kind: top_k, tail_temperatures: [0.5, 1]}",
            ["encoding.tail_temperatures.0 cannot be 0.5", "equal to 1"],
        ),
        ("{kind: top_k, tail_temperatures: []}", ["tail_temperatures"]),
        ("{kind: top_k, tail_temperatures: [2, 1, 2.01]}", ["2.0 and 2.01 are nearly the same", "1 % apart"]),
        ("{kind: top_k, tail_temperatures: [1, 2, 3, 4, 5, 6, 7, 8, 9]}", ["too many", "8 at most"]),
        ("{kind: top_k, tail_temperatures: [1e300]}", ["tail_temperatures.0 cannot be 1e+300", "equal to 100"]),
        ("{kind: top_k, tail_temperatures: [1, 2, 1.0]}", ["tail_temperatures", "stands there twice"]),
        ("{kind: top_k, k: 0}", ["cache.encoding.k cannot be 0"]),
        ("{kind: top_k, rank: -1}", ["cache.encoding.rank cannot be -1"]),
        ("{kind: top_k, value_bits: 5}", ["cache.encoding.value_bits cannot be 5", "4, 6, 8 or 16"]),
        (
            "{kind: top_k, compress: zstd}",
            ["cache.encoding.compress", "it is for float32 and float16"],
        ),
        ("{kind: float16, k: 8}", ["cache.encoding.k", "it is for top_k, and kind is float16"]),
        ("top_p", ["cache.encoding"]),
    ],
)
def test_what_no_store_can_hold_is_refused(encoding: str, words: list[Any], path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, [f"cache.encoding={encoding}"])
    told = f"{refused.value}"
    assert [word for word in words if word not in told] == [], told


def test_a_rank_above_the_width_of_a_teacher_is_refused_before_it_is_trained(path: Path) -> None:
    teacher = (
        "teacher={model: {kind: causal_lm, width: 16, heads: 2}, train: {epochs: 1, optimizer: {kind: sgd, lr: 0.1}}}"
    )
    with pytest.raises(RecipeError, match="rank 17 is larger than the width of the teacher, 16"):
        load_recipe(path, [teacher, "cache.encoding={kind: top_k, rank: 17}"])
    assert load_recipe(path, [teacher, "cache.encoding=top_k"]).cache.encoding.rank == 16


def test_a_regression_has_no_largest_logits(path: Path) -> None:
    regression = ["data.task=regression", "data.train={kind: parquet, path: x}", "data.text=null"]
    with pytest.raises(RecipeError, match="one number a row"):
        load_recipe(path, [*regression, "cache.encoding=top_k"])
