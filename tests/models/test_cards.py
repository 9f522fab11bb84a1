"""Cards: what a model was made for, and the refusal of other rows, with both sides."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data.rows import Rows
from akd_dist.models.build import build
from akd_dist.models.card import CARD, ModelCard
from akd_dist.models.folder import load_card, save_model
from tests.small_models import CNN, MLP, TEXT, TOKENS, card, rows, texts


def test_a_card_says_what_the_data_says() -> None:
    assert ModelCard.of(CNN, rows(), None) == card()
    of_text = ModelCard.of(TEXT, texts(class_names=tuple("abcdefghij")), None)
    assert (of_text.input_dtype, of_text.input_shape, of_text.tokens) == ("int32", (8,), TOKENS)
    assert of_text.class_names == tuple("abcdefghij")
    assert ModelCard.of(MLP, rows(classes=1, task="regression"), None).task == "regression"


@pytest.mark.parametrize(
    ("data", "ours", "theirs"),
    [
        (rows(classes=11), "10 classes", "11 classes"),
        (rows(np.zeros((4, 1, 8, 9), np.uint8)), "[1, 8, 8]", "[1, 8, 9]"),
        (rows(np.zeros((4, 1, 8, 8), np.float32)), "uint8", "float32"),
        (rows(classes=1, task="regression"), "10 classes", "1 value (regression)"),
        (texts(), "uint8", "int32 [8], 300 tokens with padding 256"),
    ],
    ids=["classes", "shape", "dtype", "task", "tokens"],
)
def test_other_rows_are_refused_with_both_sides(data: Rows, ours: str, theirs: str) -> None:
    card().check_rows(rows(), "the teacher")
    with pytest.raises(RefusedError, match="the teacher was made for other data") as refused:
        card().check_rows(data, "the teacher")
    assert ours in str(refused.value.got)
    assert theirs in str(refused.value.expected)


@pytest.mark.parametrize(
    "data",
    [
        texts(tokens=TOKENS.model_copy(update={"vocabulary": 301})),
        texts(tokens=TOKENS.model_copy(update={"padding": 0})),
        texts(length=9),
        rows(np.full((4, 2, 8), 7, np.int32), tokens=TOKENS),
    ],
    ids=["vocabulary", "padding", "longer", "token types"],
)
def test_other_texts_are_refused_and_shorter_ones_are_not(data: Rows) -> None:
    of_text = ModelCard.of(TEXT, texts(), None)
    of_text.check_rows(texts(), "the teacher")
    of_text.check_rows(texts(length=5), "the teacher")
    with pytest.raises(RefusedError, match="the teacher was made for other data"):
        of_text.check_rows(data, "the teacher")


def test_classes_in_another_order_are_refused_with_both_lists() -> None:
    named = card(classes=3, class_names=("cat", "dog", "eel"))
    for fine in (("cat", "dog", "eel"), None):
        named.check_rows(rows(classes=3, class_names=fine), "the teacher")
    with pytest.raises(RefusedError, match="another order") as refused:
        named.check_rows(rows(classes=3, class_names=("dog", "cat", "eel")), "the teacher")
    assert "cat, dog, eel" in str(refused.value.got)
    assert "dog, cat, eel" in str(refused.value.expected)
    many = tuple(f"person {number}" for number in range(1000))
    other = (*many[:500], "nobody", *many[501:])
    with pytest.raises(RefusedError) as refused:
        card(classes=1000, class_names=many).check_rows(rows(classes=1000, class_names=other), "the teacher")
    assert refused.value.got == f"classes ..., {', '.join(many[500:510])}, ... (1,000 in all)"
    assert "classes ..., nobody, person 501" in str(refused.value)


def test_a_card_without_the_later_fields_still_reads(tmp_path: Path) -> None:
    """As the first ones were written."""
    save_model(tmp_path, build(card(), seed=0), card())
    document = json.loads((tmp_path / CARD).read_text()) | {"format": 1}
    del document["sha256"]
    earlier = ("format", "model", "input_shape", "input_dtype", "classes", "normalize", "weights_sha256")
    (tmp_path / CARD).write_text(json.dumps({key: document[key] for key in earlier}))
    whole = ModelCard.model_validate(document)
    assert load_card(tmp_path) == whole
    assert load_card(tmp_path).fingerprint == whole.fingerprint
    assert (whole.task, whole.tokens, whole.class_names) == ("classification", None, None)


def test_a_fingerprint_leaves_out_defaults_of_the_card() -> None:
    document = {
        "format": 1,
        "model": {"kind": "cnn", "width": 4, "depth": 2},
        "input_shape": [1, 8, 8],
        "input_dtype": "uint8",
        "classes": 10,
    }
    assert card().fingerprint == sha256(canonical_json(document))
    others: list[dict[str, Any]] = [
        {"task": "regression"},
        {"class_names": tuple("abcdefghij")},
        {"tokens": TOKENS},
        {"source_sha256": "0"},
        {"normalize": recipe.Normalize(mean=[0.0], std=[1.0])},
        {"model": recipe.Cnn(width=4, depth=1)},
    ]
    prints = {card(**changes).fingerprint for changes in others}
    assert len(prints | {card().fingerprint}) == len(others) + 1
