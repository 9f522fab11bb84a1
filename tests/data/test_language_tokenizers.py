"""Tokenizers of language models: known by what they do, and compared by what ids mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.data.text import Tokens
from akd_dist.data.tokenizers import (
    ByteDocuments,
    LanguageTokenizer,
    check_model_rows,
    check_same_meaning,
    language_tokenizer,
    save_language_tokenizer,
    used_ids,
)
from akd_dist.recipe import ByteText, HuggingFaceText
from tests.tokenizers import a_byte_pair_tokenizer, a_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_byte_pair_tokenizer(tmp_path_factory.mktemp("tokenizers") / "tokenizer")


def opened(folder: Path) -> LanguageTokenizer:
    return language_tokenizer(HuggingFaceText(path=str(folder), length=8))


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy whose tokenizer.json a function has changed."""
    to.mkdir()
    (to / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    document = json.loads((folder / "tokenizer.json").read_text())
    change(document)
    (to / "tokenizer.json").write_text(json.dumps(document))
    return to


def exchange(document: dict[str, Any]) -> None:
    """Two ids."""
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["t"] = vocabulary["t"], vocabulary["a"]


def add_a_token(document: dict[str, Any]) -> None:
    last = max(document["model"]["vocab"].values())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document["added_tokens"].append({"id": last + 1, "content": "<|tool|>", **token})


def test_documents_end_with_the_end_of_text(folder: Path) -> None:
    for tokenizer in (opened(folder), ByteDocuments()):
        documents = ["the cat", "", " \n", "é 😀", "the <|endoftext|> cat"]
        ids = tokenizer.encode(documents)
        assert [len(one) > 0 for one in ids] == [True, False, True, True, True]
        assert all(one.dtype == np.int32 for one in ids)
        assert {int(one[-1]) for one in ids if len(one)} == {tokenizer.tokens.end_of_text}
        assert [tokenizer.decode(ids[at]) for at in (0, 2, 3)] == ["the cat", " \n", "é 😀"]
        meanings = tokenizer.meanings()
        assert len(meanings) == tokenizer.tokens.vocabulary
        for at in (0, 2, 3):
            assert b"".join(meanings[one] or b"" for one in ids[at][:-1]).decode() == documents[at]


def test_special_tokens_of_the_tokenizer_stay(tmp_path: Path) -> None:
    """Its own begin of text, and its end only once."""
    folder = a_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "[SEP]"}))
    (ids, nothing) = opened(folder).encode(["red green", ""])
    assert ids.tolist() == [2, 5, 6, 3]
    assert not len(nothing)


def test_a_fingerprint_is_of_what_a_tokenizer_does(folder: Path, tmp_path: Path) -> None:
    first = opened(folder).tokens
    same = changed(folder, tmp_path / "same", lambda document: document.update(truncation=None, version="1.0"))
    assert opened(same).tokens == first
    for number, change in enumerate((exchange, add_a_token)):
        assert opened(changed(folder, tmp_path / str(number), change)).tokens.tokenizer != first.tokenizer
    merges = changed(folder, tmp_path / "merges", lambda document: document["model"]["merges"].reverse())
    assert opened(merges).tokens.tokenizer != first.tokenizer
    prefix = changed(
        folder, tmp_path / "prefix", lambda document: document["pre_tokenizer"].update(add_prefix_space=True)
    )
    assert opened(prefix).tokens.tokenizer != first.tokenizer


def test_the_same_tokenizer_is_accepted_whatever_it_is_called(folder: Path, tmp_path: Path) -> None:
    copied = changed(folder, tmp_path / "another name", lambda document: None)
    used = np.arange(opened(folder).tokens.vocabulary)
    check_same_meaning(opened(folder), opened(copied), used, "the teacher")
    # A token that the data does not use may be there, on either side.
    more = changed(folder, tmp_path / "more", add_a_token)
    check_same_meaning(opened(folder), opened(more), used, "the teacher")
    check_same_meaning(opened(more), opened(folder), used, "the teacher")
    with pytest.raises(RefusedError, match="is not that of the data") as refused:
        check_same_meaning(opened(more), opened(folder), np.append(used, used[-1] + 1), "the teacher")
    assert refused.value.got == f"id {used[-1] + 1} is '<|tool|>' in the data and nothing there"


def test_exchanged_ids_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "exchanged", exchange)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    one, two = sorted((vocabulary["a"], vocabulary["t"]))
    with pytest.raises(RefusedError, match=r"the tokenizer of students\.small is not that of the data") as refused:
        check_same_meaning(opened(folder), opened(other), np.arange(250), "students.small")
    assert refused.value.got == f"id {one} is 'a' in the data and 't' there, id {two} is 't' in the data and 'a' there"
    assert all(name in str(refused.value.next) for name in ("ULD", "GOLD", "X-Token"))
    unused = np.setdiff1d(np.arange(250), [one, two])
    check_same_meaning(opened(folder), opened(other), unused, "students.small")


def test_tokenizers_of_different_kinds_mean_bytes(folder: Path) -> None:
    """A byte-level vocabulary writes bytes in an alphabet of its own: what they stand for is compared."""
    meanings, alphabet = opened(folder).meanings(), {bytes([one]) for one in range(256)}
    assert alphabet <= set(meanings)
    with pytest.raises(RefusedError):
        check_same_meaning(ByteDocuments(), opened(folder), np.arange(256), "the teacher")


def test_models_may_have_padding_rows_and_not_too_few() -> None:
    tokens = Tokens(vocabulary=300, padding=0)
    check_model_rows(300, tokens, "students.small")
    check_model_rows(320, tokens, "students.small")
    with pytest.raises(RefusedError, match=r"students\.small has fewer output rows than the tokenizer") as refused:
        check_model_rows(299, tokens, "students.small")
    assert refused.value.expected == "at least 300 rows: the last id is 299"


def test_used_ids_are_those_of_the_first_channel() -> None:
    blocks = np.zeros((4, 3, 5), np.int32)
    blocks[:, 0] = [[1, 2, 3, 2, 1], [1] * 5, [7] * 5, [2] * 5]
    blocks[:, 1:] = 5
    assert used_ids(blocks, 9).tolist() == [1, 2, 3, 7]


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="has no token that ends a text"):
        opened(a_tokenizer(tmp_path))


def test_ids_that_no_model_has_rows_for_are_refused(tmp_path: Path) -> None:
    folder = a_byte_pair_tokenizer(tmp_path / "tokenizer")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["far"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(RefusedError, match="has ids that no model has rows for") as refused:
        language_tokenizer(HuggingFaceText(path=str(folder), length=8))
    assert "2,147,483,648" in str(refused.value.got)


def test_padding_is_the_end_of_text_where_there_is_none(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "other", lambda document: None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    tokens = opened(other).tokens
    assert tokens.padding == tokens.end_of_text


def test_tokenizers_are_saved_as_they_were_trained_with(folder: Path, tmp_path: Path) -> None:
    spec = HuggingFaceText(path=str(folder), length=8)
    tokens = opened(folder).tokens
    save_language_tokenizer(spec, tokens.vocabulary, tokens.tokenizer, tmp_path / "saved")
    assert opened(tmp_path / "saved").tokens == opened(folder).tokens
    with pytest.raises(RefusedError, match="is not the one that the model was trained with"):
        save_language_tokenizer(spec, 10**6, ByteDocuments.tokens.tokenizer, tmp_path / "other")
    # Where nobody knows the fingerprint, ids tell at least.
    save_language_tokenizer(spec, tokens.vocabulary, "", tmp_path / "unknown")
    with pytest.raises(RefusedError, match="is not the one that the model was trained with"):
        save_language_tokenizer(spec, tokens.vocabulary - 1, "", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tokens_of_before_are_spelled_as_before() -> None:
    before = {"vocabulary": 9, "padding": 0, "mask": None, "special": [0]}
    assert Tokens.model_validate(before).model_dump(mode="json") == before
    assert isinstance(language_tokenizer(ByteText(length=8)), ByteDocuments)
