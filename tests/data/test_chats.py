"""Chats become tokens by the tokenizer's template, which can do no harm, and what the assistant wrote is told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.data import chats
from akd_dist.data.packing import IDS, SEGMENTS, TARGETS
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Splits
from akd_dist.data.tokenizers import language_tokenizer
from akd_dist.recipe import ChatData, DataSpec, HuggingFaceText, Scored
from tests.tokenizers import CHATML, TELLING, a_byte_pair_tokenizer, with_template

HELLO = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on the mat"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "ran"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_byte_pair_tokenizer(tmp_path_factory.mktemp("chats") / "tokenizer", template=CHATML)


def lines(folder: Path, chats: list[Any]) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    return path


def spec(path: Path, tokenizer: Path, *, length: int = 64, scored: Scored = "completions") -> DataSpec:
    source = ChatData(path=str(path))
    text = HuggingFaceText(path=str(tokenizer), length=length)
    return DataSpec(train=source, validation=source, test=source, task="language_model", text=text, scored=scored)


def prepared(folder: Path, chats: list[Any], tokenizer: Path, **options: Any) -> Splits:
    return prepare(spec(lines(folder, chats), tokenizer, **options), folder / "cache")


def read(block: np.ndarray, tokenizer: Path) -> tuple[str, list[str]]:
    """The text of a block without padding, and each run of labels."""
    encoder = language_tokenizer(HuggingFaceText(path=str(tokenizer), length=8))
    meanings = encoder.meanings()
    text = [meanings[one] or b"" for one in block[IDS].tolist()]
    real = block[SEGMENTS] < block[SEGMENTS].max() if block[IDS, -1] == encoder.tokens.padding else block[IDS] >= 0
    runs, before = list[bytes](), False
    for at in np.flatnonzero(np.ones(block.shape[1] - 1)):
        learnt = bool(block[TARGETS, at])
        if learnt:
            runs = [*runs[:-1], runs[-1] + text[at + 1]] if before else [*runs, text[at + 1]]
        before = learnt
    return b"".join(one for one, its in zip(text, real, strict=True) if its).decode(), [run.decode() for run in runs]


def test_a_template_that_tells_and_one_that_does_not_agree(tokenizer: Path, tmp_path: Path) -> None:
    telling = with_template(tokenizer, tmp_path / "telling", TELLING)
    (tmp_path / "one").mkdir()
    text, runs = read(prepared(tmp_path, [HELLO], telling).train.inputs[0], telling)
    assert text.startswith("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat on the mat<|im_end|>\n")
    assert runs == ["sat on the mat<|im_end|>", "ran<|im_end|>"]
    also, prefixes = read(prepared(tmp_path / "one", [HELLO], tokenizer).train.inputs[0], tokenizer)
    assert also == text
    # What the template adds to a message of the assistant's: here the line's end as well.
    assert prefixes == ["sat on the mat<|im_end|>\n", "ran<|im_end|>\n"]


def test_all_tokens_are_learnt_where_the_recipe_says_so(tokenizer: Path, tmp_path: Path) -> None:
    rows = prepared(tmp_path, [HELLO], tokenizer, scored="all").train
    text, (run,) = read(rows.inputs[0], tokenizer)
    assert "<|im_start|>" + run == text
    assert rows.targets == rows.offsets[-1] == int(rows.inputs[:, TARGETS].sum())


def test_columns_of_messages_are_those_of_json_lines(tokenizer: Path, tmp_path: Path) -> None:
    chats = [HELLO, HELLO[:2], [{"role": "user", "content": "the", "name": None}, HELLO[1]]]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "chats.parquet")
    one = prepare(spec(tmp_path / "chats.parquet", tokenizer), tmp_path / "parquet")
    other = prepared(tmp_path, chats, tokenizer)
    assert one.fingerprints == other.fingerprints


def test_chats_are_packed_whole_and_the_long_ones_lose_their_first_turns(tokenizer: Path, tmp_path: Path) -> None:
    system = {"role": "system", "content": "on"}
    long = [system, *HELLO * 3]
    splits = prepared(tmp_path, [HELLO[:2], long, [], HELLO[:1], HELLO[2:]], tokenizer, length=48)
    text, _ = read(splits.train.inputs[1], tokenizer)
    assert text.startswith("<|im_start|>system\non<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("ran<|im_end|>\n")
    assert "longer than a block: the first turns of it are left out" in " ".join(splits.findings)
    assert any(line.startswith("1 of the chats of data.train is left out, as it is empty") for line in splits.findings)
    assert any(
        line.startswith("1 of the chats of data.train is left out, as it holds nothing") for line in splits.findings
    )


def test_a_last_turn_longer_than_a_block_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="last turn of the chat in row 1 of") as refused:
        prepared(tmp_path, [HELLO[2:], [*HELLO[:2], {"role": "user", "content": "cat " * 50}]], tokenizer, length=40)
    assert "raise data.text.length" in str(refused.value.next)


def test_a_template_that_rewrites_what_it_wrote_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    """As those do that leave out the thoughts of earlier turns: row and message are named."""
    changing = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if loop.last %}thought {% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    )
    folder = with_template(tokenizer, tmp_path / "changing", changing)
    with pytest.raises(RefusedError, match="the chat in row 1 of") as refused:
        prepared(tmp_path, [HELLO[1:2], HELLO], folder)
    assert "before message 1" in str(refused.value.got)
    assert "generation" in str(refused.value.next)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch HARM') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append(messages[0]) }}",
        "{% include 'HARM' %}",
        "{{ range(1000000000) | list | length }}",
        "{{ strftime_now.__globals__['os'].system('touch HARM') }}",
    ],
)
def test_an_evil_template_can_do_no_harm(
    attack: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = with_template(tokenizer, tmp_path / "evil", attack)
    with pytest.raises(RefusedError, match="chat template of the tokenizer refuses the messages in row 0") as refused:
        prepared(tmp_path, [HELLO], folder, scored="all")
    assert str(refused.value.got).startswith(("SecurityError", "TypeError", "OverflowError", "UndefinedError"))
    assert not (tmp_path / "HARM").exists()


def test_a_template_that_tells_the_date_is_told_of(tokenizer: Path, tmp_path: Path) -> None:
    folder = with_template(tokenizer, tmp_path / "dated", "{{ strftime_now('%Y') }}" + CHATML)
    assert any("today's date" in line for line in prepared(tmp_path, [HELLO], folder, scored="all").findings)


@pytest.mark.parametrize(
    ("chat", "what", "got"),
    [
        ("hello", "no list of messages under `messages` in row 1", "str"),
        ([{"content": "x"}], "message 0 in row 1 of .* does not say who speaks", "the keys content"),
        ([{"role": "user", "content": "\ud83d"}], "half a character in row 1", "UTF-8"),
        (["x"], "message 0 in row 1 of .* does not say who speaks", "str"),
        ([{"role": "user"}], "message 0 in row 1 of .* says nothing", "no content"),
        ([{"role": "user", "content": None, "name": "I"}], "message 0 in row 1 of .* says nothing", "no content"),
        ([{"role": "user", "content": 3}], "message 0 in row 1 of .* says nothing", "content of int"),
    ],
)
def test_what_is_no_chat_is_refused(chat: Any, what: str, got: str, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=what) as refused:
        prepared(tmp_path, [HELLO, chat], tokenizer)
    assert got in str(refused.value.got)


def test_a_message_without_text_may_say_something_else(tokenizer: Path, tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    prepared(tmp_path, [[HELLO[0], called]], tokenizer)


def test_a_template_that_goes_round_and_round_is_ended(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chats, "LONGEST_SECONDS", 0.1)
    around = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    folder = with_template(tokenizer, tmp_path / "around", around)
    with pytest.raises(RefusedError, match="refuses the messages in row 0") as refused:
        prepared(tmp_path, [HELLO], folder, scored="all")
    assert "TimeoutError: more than 0.1 seconds" in str(refused.value.got)


def test_chats_without_anything_to_learn_are_told_of(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the documents of train do not fill a block") as refused:
        prepared(tmp_path, [HELLO[:1]], tokenizer)
    assert "left out, as it holds nothing to learn from" in str(refused.value.got)


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the tokenizer has no chat template"):
        prepared(tmp_path, [HELLO], a_byte_pair_tokenizer(tmp_path / "tokenizer"))


def test_another_template_makes_other_rows(tokenizer: Path, tmp_path: Path) -> None:
    """Also where it writes the same: it is another template, which may write other chats otherwise."""
    folder = with_template(tokenizer, tmp_path / "other", CHATML + "{# a remark #}")
    (tmp_path / "one").mkdir()
    one, other = prepared(tmp_path, [HELLO], tokenizer), prepared(tmp_path / "one", [HELLO], folder)
    np.testing.assert_array_equal(one.train.inputs, other.train.inputs)
    assert one.train.fingerprint != other.train.fingerprint
