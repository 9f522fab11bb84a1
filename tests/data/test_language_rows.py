"""Documents as prepared blocks: from files of each kind, on a node and for a cluster, with what is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.data import documents, packed_files, row_store, rows
from akd_dist.data.packing import IDS, SEGMENTS, TARGETS
from akd_dist.data.row_blocks import write_run
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import fetch_rows
from akd_dist.data.row_store import RowsPlan, Take, ensure_rows
from akd_dist.data.rows import SPLITS, Rows
from akd_dist.data.sources import text as text_source
from akd_dist.data.text import END, PADDING
from akd_dist.recipe import ByteText, ChatData, DataSpec, HuggingFaceText, Packing, Text, TextData
from tests.tokenizers import CHATML, a_byte_pair_tokenizer

DOCUMENTS = [f"document {number} " * (1 + number % 7) for number in range(120)]


def a_parquet(folder: Path, texts: list[Any] = DOCUMENTS, name: str = "text.parquet", **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), folder / name, **options)
    return folder / name


def spec(path: Path | str, *, text: Text | None = None, **options: Any) -> DataSpec:
    text = text or ByteText(length=32)
    return DataSpec(train=TextData(path=str(path)), task="language_model", text=text, **options)


def all_train(path: Path | str, **options: Any) -> DataSpec:
    """Each split the whole source."""
    return spec(path, validation=TextData(path=str(path)), test=TextData(path=str(path)), **options)


def read(inputs: np.ndarray) -> str:
    """Blocks of bytes as text, with a bar where a document ends."""
    ids = inputs[:, IDS].ravel().tolist()
    return bytes(ord("|") if one == END else one for one in ids if one != PADDING).decode()


def test_blocks_hold_all_documents_in_their_order(tmp_path: Path) -> None:
    splits = prepare(all_train(a_parquet(tmp_path), packing=Packing(remainder="pad")), tmp_path / "cache")
    assert read(splits.train.inputs) == "".join(f"{one}|" for one in DOCUMENTS)
    assert splits.train.inputs.dtype == np.int32
    assert splits.train.shape == (3, 32)
    assert (splits.train.task, splits.train.classes) == ("language_model", 260)
    dropped = prepare(all_train(a_parquet(tmp_path)), tmp_path / "cache").train
    np.testing.assert_array_equal(dropped.inputs, splits.train.inputs[: len(dropped)])
    assert len(splits.train) == len(dropped) + 1


def test_offsets_count_the_targets_before_each_row(tmp_path: Path) -> None:
    train = prepare(spec(a_parquet(tmp_path)), tmp_path / "cache").train
    scored = train.inputs[:, TARGETS].astype(bool)
    assert train.offsets.dtype == np.int64
    np.testing.assert_array_equal(train.offsets, np.cumsum([0, *scored.sum(axis=1)]))
    assert train.targets == scored.sum()
    # A target's label is the next token of its own document.
    ids, segments = train.inputs[:, IDS], train.inputs[:, SEGMENTS]
    np.testing.assert_array_equal(scored[:, :-1], segments[:, 1:] == segments[:, :-1])
    assert not scored[:, -1].any()
    assert (ids[:, 1:][scored[:, :-1]] != PADDING).all()


def test_documents_are_split_before_they_are_packed(tmp_path: Path) -> None:
    """No document is in two splits, and each keeps its order."""
    path = a_parquet(tmp_path, [f"<{number:03}>" * 9 for number in range(100)])
    splits = prepare(spec(path, packing=Packing(remainder="pad")), tmp_path / "cache")
    parts = {name: read(getattr(splits, name).inputs).split("|")[:-1] for name in SPLITS}
    assert {name: len(part) for name, part in parts.items()} == {"train": 70, "validation": 10, "test": 20}
    assert all(part == sorted(part) for part in parts.values())
    assert len(set().union(*parts.values())) == 100
    other = prepare(spec(path, seed=1, packing=Packing(remainder="pad")), tmp_path / "cache")
    assert read(other.train.inputs) != read(splits.train.inputs)


def test_files_of_each_kind_become_the_same_blocks(tmp_path: Path) -> None:
    options = {"packing": Packing(remainder="pad")}
    found = {"parquet": prepare(all_train(a_parquet(tmp_path), **options), tmp_path / "cache")}
    (tmp_path / "lines").mkdir()
    for number in range(2):
        lines = [json.dumps({"text": one, "more": 1}) for one in DOCUMENTS[60 * number : 60 * number + 60]]
        (tmp_path / "lines" / f"{number}.jsonl").write_text("\n\n".join(lines) + "\n")
    found["folder of lines"] = prepare(all_train(tmp_path / "lines", **options), tmp_path / "cache")
    (tmp_path / "plain").mkdir()
    for number, one in enumerate(DOCUMENTS):
        (tmp_path / "plain" / f"{number:03}.txt").write_text(one)
    (tmp_path / "plain" / "README.md").write_text("about")
    found["folder"] = prepare(all_train(tmp_path / "plain", **options), tmp_path / "cache")
    found["glob"] = prepare(all_train(tmp_path / "plain" / "*.txt", **options), tmp_path / "cache")
    assert {splits.train.fingerprint for splits in found.values()} == {found["parquet"].train.fingerprint}
    assert any("left out of" in line and "README.md" in line for line in found["folder"].findings)


def test_bytes_do_not_depend_on_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = HuggingFaceText(path=str(a_byte_pair_tokenizer(tmp_path / "tokenizer")), length=16)
    path = a_parquet(tmp_path)
    one = prepare(spec(path, text=text), tmp_path / "one")
    monkeypatch.setattr(documents, "default_threads", lambda: 5)
    monkeypatch.setattr(documents, "_READ_DOCUMENTS", 3)
    monkeypatch.setattr(packed_files, "_CUT_BYTES", 1)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    assert prepare(spec(path, text=text), tmp_path / "other").fingerprints == one.fingerprints


def loop(plan: RowsPlan, take: Take) -> None:
    """As tasks do it, the last run first: what they are given comes as bytes."""
    for run in reversed(plan.runs):
        take(pickle.loads(pickle.dumps(write_run(*pickle.loads(pickle.dumps((plan.job, run)))))))


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "chat"])
def test_blocks_written_for_a_cluster_are_those_of_a_node(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rows, row_store):
        monkeypatch.setattr(module, "BLOCK_ROWS", 8)
    monkeypatch.setattr("akd_dist.data.row_entry.BLOCK_ROWS", 8)
    monkeypatch.setattr(text_source, "_NOTED_ROWS", 4)
    texts = [*DOCUMENTS[:50], "", "long " * 200, *DOCUMENTS[50:]]
    text: Text = ByteText(length=32)
    if kind == "parquet":
        data = spec(a_parquet(tmp_path, texts, row_group_size=11), text=text)
    elif kind == "chat":
        text = HuggingFaceText(path=str(a_byte_pair_tokenizer(tmp_path / "tokenizer", template=CHATML)), length=128)
        chats = [[{"role": "user", "content": one[:9]}, {"role": "assistant", "content": one}] for one in DOCUMENTS]
        (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in chats))
        source = ChatData(path=str(tmp_path / "chats.jsonl"))
        data = DataSpec(train=source, task="language_model", text=text, scored="completions")
    elif kind == "jsonl":
        (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in texts))
        data = spec(tmp_path / "text.jsonl", text=text)
    else:
        for number, one in enumerate(texts):
            (tmp_path / f"{number:03}.txt").write_text(one)
        data = spec(tmp_path / "*.txt", text=text)
    here = prepare(data, tmp_path / "cache")
    sealed = ensure_rows(data, str(tmp_path / "stores"), loop)
    there = fetch_rows(sealed.sealed, tmp_path / "node")
    assert there.fingerprints == here.fingerprints
    assert there.findings == here.findings
    assert ensure_rows(data, str(tmp_path / "stores"), _nothing_to_do).sealed == sealed.sealed
    for name in SPLITS:
        mine, theirs = getattr(here, name), getattr(there, name)
        np.testing.assert_array_equal(mine.inputs, theirs.inputs)
        np.testing.assert_array_equal(mine.offsets, theirs.offsets)
        theirs.content().verify()
        assert theirs.block_targets is not None
        assert theirs.targets == mine.targets == sum(theirs.block_targets)
        for start, stop in ((0, len(mine)), (3, 5), (9, 9), (len(mine) - 1, len(mine))):
            np.testing.assert_array_equal(theirs.offsets_of(start, stop), mine.offsets[start : stop + 1])
            np.testing.assert_array_equal(mine.offsets_of(start, stop), mine.offsets[start : stop + 1])


def _nothing_to_do(plan: RowsPlan, take: Take) -> None:
    raise AssertionError("written again")


def test_another_tokenizer_on_a_node_is_refused(tmp_path: Path) -> None:
    folder = a_byte_pair_tokenizer(tmp_path / "tokenizer")
    data = spec(a_parquet(tmp_path), text=HuggingFaceText(path=str(folder), length=16))

    def on_another_node(plan: RowsPlan, take: Take) -> None:
        a_byte_pair_tokenizer(folder, vocabulary=280)
        take(write_run(plan.job, plan.runs[0]))

    with pytest.raises(RefusedError, match="the tokenizer on this node is not that of the driver") as refused:
        ensure_rows(data, str(tmp_path / "stores"), on_another_node)
    assert "vocabulary: " in str(refused.value.got)
    assert "tokenizer: " in str(refused.value.got)


def test_what_was_begun_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "BLOCK_ROWS", 8)
    data = spec(a_parquet(tmp_path))
    written = []

    def half(plan: RowsPlan, take: Take) -> None:
        for run in plan.runs[::2]:
            take(write_run(plan.job, run))
            written.append(str(run))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_rows(data, str(tmp_path / "stores"), half)

    def rest(plan: RowsPlan, take: Take) -> None:
        assert not {str(run) for run in plan.runs} & set(written)
        loop(plan, take)

    assert ensure_rows(data, str(tmp_path / "stores"), rest).manifest.creation.format == 3


def test_empty_documents_are_left_out_and_told_of(tmp_path: Path) -> None:
    """A document of spaces is a document."""
    path = a_parquet(tmp_path, ["a", "", "  ", "", "b" * 40])
    splits = prepare(all_train(path, packing=Packing(remainder="pad")), tmp_path / "cache")
    assert read(splits.train.inputs) == f"a|  |{'b' * 40}|"
    told = [line for line in splits.findings if "empty" in line]
    assert told[0].startswith(
        "2 of the documents of data.train are left out, as they are empty; the first is row 1 of "
    )


def test_a_subset_is_one_of_documents_and_the_others_are_not_tokenized(tmp_path: Path) -> None:
    path = a_parquet(tmp_path, [*DOCUMENTS, *[""] * 9])
    given = all_train(path, packing=Packing(remainder="pad"))
    splits = prepare(given.model_copy(update={"subset": 20}), tmp_path / "cache")
    kept = [one for one in read(splits.train.inputs).split("|") if one]
    assert kept == [one for one in DOCUMENTS if one in kept]
    told = [line for line in splits.findings if "documents of data.train" in line]
    assert len(kept) + (int(told[0].split()[0]) if told else 0) == 20
    assert len(splits.test) > len(splits.train)


def test_equal_documents_in_two_splits_are_told_of(tmp_path: Path) -> None:
    path = a_parquet(tmp_path, ["the very same document of some length"] * 40)
    assert any("have the very inputs of a train row" in line for line in prepare(spec(path), tmp_path / "c").findings)


def test_the_key_goes_by_what_a_tokenizer_does(tmp_path: Path) -> None:
    """Not by where it lies or how old it is; another end of text makes other rows."""
    path, folder = a_parquet(tmp_path), a_byte_pair_tokenizer(tmp_path / "tokenizer")
    one = prepare(spec(path, text=HuggingFaceText(path=str(folder), length=16)), tmp_path / "cache")
    moved = folder.rename(tmp_path / "moved")
    os.utime(moved / "tokenizer.json", (0, 0))
    again = prepare(spec(path, text=HuggingFaceText(path=str(moved), length=16)), tmp_path / "cache")
    assert again.train.folder == one.train.folder
    config = json.loads((moved / "tokenizer_config.json").read_text())
    (moved / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|padding|>"}))
    other = prepare(spec(path, text=HuggingFaceText(path=str(moved), length=16)), tmp_path / "cache")
    assert other.train.fingerprint != one.train.fingerprint


def test_attention_is_part_of_what_rows_mean(tmp_path: Path) -> None:
    path = a_parquet(tmp_path)
    one = prepare(spec(path), tmp_path / "cache").train
    other = prepare(spec(path, packing=Packing(attention="block")), tmp_path / "cache").train
    np.testing.assert_array_equal(one.inputs, other.inputs)
    assert (one.tokens and one.tokens.attention, other.tokens and other.tokens.attention) == ("document", "block")
    assert one.fingerprint != other.fingerprint


def refusal(data: DataSpec, tmp_path: Path) -> RefusedError:
    with pytest.raises(RefusedError) as refused:
        prepare(data, tmp_path / "cache")
    assert not [one for one in (tmp_path / "cache" / "rows").glob("*") if one.suffix != ".lock"]
    return refused.value


def test_what_is_no_document_is_refused_by_its_row(tmp_path: Path) -> None:
    error = refusal(spec(a_parquet(tmp_path, [*DOCUMENTS[:70], None])), tmp_path)
    assert "no value in row 70 of" in error.what
    error = refusal(all_train(a_parquet(tmp_path, [[1, 2]] * 3)), tmp_path)
    assert (error.expected, error.next) == ("text, a document in each row", "set `input` to another column")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    error = refusal(all_train(tmp_path / "a.jsonl"), tmp_path)
    assert error.what.startswith("no text under `text` in row 1 of")
    assert error.got == "int"
    assert "--input" in str(error.next)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    assert refusal(all_train(tmp_path / "a.jsonl"), tmp_path).got == "the keys txt"
    for text in (ByteText(length=4), HuggingFaceText(path=str(a_byte_pair_tokenizer(tmp_path / "t")), length=4)):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "cut \\ud83d"}\n')
        assert refusal(all_train(tmp_path / "a.jsonl", text=text), tmp_path).what.startswith(
            "half a character in row 1"
        )
    (tmp_path / "a.jsonl").write_text('[\n{"text": "a"},\n')
    error = refusal(all_train(tmp_path / "a.jsonl"), tmp_path)
    assert error.what.startswith("no JSON in row 0 of")
    (tmp_path / "a.txt").write_bytes(b"\x1f\x8b\xff")
    error = refusal(all_train(tmp_path / "a.txt"), tmp_path)
    assert error.what.endswith("a.txt is not UTF-8")


def test_paths_that_name_no_documents_are_refused(tmp_path: Path) -> None:
    error = refusal(spec(tmp_path / "nothing"), tmp_path)
    assert error.what.startswith("no document at")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.txt").write_text("a")
    a_parquet(tmp_path / "both")
    error = refusal(spec(tmp_path / "both"), tmp_path)
    assert error.got == "text.parquet, a.txt"
    assert "*.parquet" in str(error.next)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.doc").write_text("a")
    assert "a folder" in str(refusal(spec(tmp_path / "other"), tmp_path).got)
    (tmp_path / "outside.txt").write_text("secret")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.txt").symlink_to(tmp_path / "outside.txt")
    assert "link" in str(refusal(spec(tmp_path / "links"), tmp_path))


def test_too_few_documents_for_a_block_are_refused(tmp_path: Path) -> None:
    error = refusal(spec(a_parquet(tmp_path, ["a b c"] * 20), text=ByteText(length=64)), tmp_path)
    assert error.what == "the documents of validation do not fill a block"
    assert error.got == "12 tokens in 2 documents"
    assert "data.packing.remainder: pad" in str(error.next)


def test_a_source_that_changes_is_prepared_anew(tmp_path: Path) -> None:
    one = prepare(spec(a_parquet(tmp_path)), tmp_path / "cache")
    other = prepare(spec(a_parquet(tmp_path, DOCUMENTS[::-1])), tmp_path / "cache")
    assert one.train.fingerprint != other.train.fingerprint


def test_rows_say_what_they_are(tmp_path: Path) -> None:
    train: Rows = prepare(spec(a_parquet(tmp_path)), tmp_path / "cache").train
    assert "260 ids" in repr(train)
    described = train.describe()
    assert described["meaning"]["task"] == "language_model"
    assert described["meaning"]["tokens"]["end_of_text"] == END
