"""Tokenizers: strings become ids that can be read back by hand."""

from pathlib import Path

import numpy as np
import pytest

from akd_dist.base.errors import MachineError, RecipeError, RefusedError
from akd_dist.data import hub
from akd_dist.data.text import BEGIN, END, MASK, PADDING, Tokens, text_key, tokenizer_of
from akd_dist.recipe import ByteText, HuggingFaceText, Text
from tests.tokenizers import a_tokenizer


def test_text_becomes_its_bytes() -> None:
    tokenizer = tokenizer_of(ByteText(length=8), pair=False)
    ids = tokenizer.encode([["hi", "é", "a long text"]])
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        [BEGIN, ord("h"), ord("i"), END, PADDING, PADDING, PADDING, PADDING],
        [BEGIN, 0xC3, 0xA9, END, PADDING, PADDING, PADDING, PADDING],
        [BEGIN, *b"a long", END],
    ]
    assert tokenizer.tokens == Tokens(vocabulary=260, padding=256, mask=259, special=(256, 257, 258, 259))
    assert {PADDING, BEGIN, END, MASK} == {256, 257, 258, 259}
    assert tokenizer.shape == (8,)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ("ab", "cd", ("ab", "cd")),
        ("abcdefgh", "xyz", ("abcd", "xyz")),
        ("abc", "rstuvwxyz", ("abc", "rstu")),
        ("abcdefgh", "rstuvwxyz", ("abcd", "rst")),
    ],
)
def test_of_a_pair_the_longer_text_is_cut(first: str, second: str, left: tuple[str, str]) -> None:
    ids = tokenizer_of(ByteText(length=10), pair=True).encode([[first], [second]])[0].tolist()
    expected = [BEGIN, *left[0].encode(), END, *left[1].encode(), END]
    assert ids == expected + [PADDING] * (10 - len(expected))


def test_a_length_without_room_for_text_is_refused(tmp_path: Path) -> None:
    tokenizer_of(ByteText(length=3), pair=False)
    cases: list[tuple[Text, bool]] = [
        (ByteText(length=2), False),
        (ByteText(length=4), True),
        (HuggingFaceText(path=str(a_tokenizer(tmp_path)), length=2), False),
    ]
    for spec, pair in cases:
        with pytest.raises(RecipeError, match=r"data\.text\.length"):
            tokenizer_of(spec, pair)


def test_a_hugging_face_tokenizer_pads_cuts_and_tells_its_tokens(tmp_path: Path) -> None:
    folder = a_tokenizer(tmp_path)
    tokenizer = tokenizer_of(HuggingFaceText(path=str(folder), length=5), pair=False)
    ids = tokenizer.encode([["red green", "blue", "red red red red red", "unheard"]])
    # [PAD] [UNK] [CLS] [SEP] [MASK] red green blue are 0 to 7.
    assert ids.tolist() == [[2, 5, 6, 3, 0], [2, 7, 3, 0, 0], [2, 5, 5, 5, 3], [2, 1, 3, 0, 0]]
    assert ids.dtype == np.int32
    assert tokenizer.tokens == Tokens(vocabulary=8, padding=0, mask=4, special=(0, 1, 2, 3, 4))


def test_token_types_are_a_second_channel(tmp_path: Path) -> None:
    folder = a_tokenizer(tmp_path, types=True)
    tokenizer = tokenizer_of(HuggingFaceText(path=str(folder), length=6), pair=True)
    assert tokenizer.shape == (2, 6)
    assert tokenizer.encode([["red", "red"], ["blue", "green blue"]]).tolist() == [
        [[2, 5, 3, 7, 3, 0], [0, 0, 0, 1, 1, 0]],
        [[2, 5, 3, 6, 7, 3], [0, 0, 0, 1, 1, 1]],
    ]


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no tokenizer at"):
        text_key(HuggingFaceText(path=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedError, match="cannot be read as a tokenizer"):
        tokenizer_of(HuggingFaceText(path=str(tmp_path / "empty")), pair=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no tokenizer")
    with pytest.raises(RefusedError, match=r"in it lie notes\.txt"):
        tokenizer_of(HuggingFaceText(path=str(tmp_path / "other")), pair=False)
    with pytest.raises(RefusedError, match="no padding token"):
        tokenizer_of(HuggingFaceText(path=str(a_tokenizer(tmp_path, padding=None))), pair=False)


def test_another_tokenizer_file_is_another_key(tmp_path: Path) -> None:
    spec = HuggingFaceText(path=str(a_tokenizer(tmp_path)))
    before = text_key(spec)
    assert before == text_key(spec)
    assert before != text_key(HuggingFaceText(path=spec.path, length=5))
    a_tokenizer(tmp_path, words=("red", "blue"))
    assert before != text_key(spec)
    assert text_key(ByteText(length=5)) != text_key(ByteText(length=6))


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="cannot be had from the hub") as refused:
        tokenizer_of(HuggingFaceText(name="some/tokenizer"), pair=False)
    assert "`path` instead of `name`" in str(refused.value.next)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="the tokenizer some/tokenizer cannot be had from the hub"):
        tokenizer_of(HuggingFaceText(name="some/tokenizer"), pair=False)


def test_a_missing_library_says_how_to_get_it() -> None:
    with pytest.raises(RefusedError) as refused:
        hub.require_extra("no_such_library")
    assert refused.value.next == "pip install 'akd-dist[huggingface]'"
    with pytest.raises(RefusedError):
        hub.version_of("no_such_library")
