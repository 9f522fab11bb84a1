"""Rows of documents or chats -> token ids, by all cores, with what users should know of them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.blocks import Block, default_threads, map_blocks
from akd_dist.data.chats import Chats, messages_of, template_key
from akd_dist.data.columns import refuse_nulls
from akd_dist.data.schemas import plain
from akd_dist.data.sources.base import Kind, Source
from akd_dist.data.sources.kinds import open_kind
from akd_dist.data.text import Tokens
from akd_dist.data.tokenizers import HuggingFaceDocuments, LanguageTokenizer, language_tokenizer, text_key_of

# The most documents that are read at a time; sources give fewer of long ones.
_READ_DOCUMENTS = 512


class Documents:
    """Columns of documents or chats -> ids. Several threads may use one at a time.

    Args:
        data: the recipe's.
        tokenizer: as `language_tokenizer` gives it.
        source: what they come from.
        chats: whether it has chats.
    """

    dtype: np.dtype[Any] = np.dtype(np.int32)
    """Of blocks."""

    def __init__(self, data: recipe.DataSpec, tokenizer: LanguageTokenizer, source: Source, *, chats: bool) -> None:
        assert data.text is not None
        self._tokenizer, self._place = tokenizer, source.input_place
        self._chats: Chats | None = None
        self.shape: tuple[int, ...] = (3, data.text.length)
        """Of a block."""
        self.tokens: Tokens = tokens_of(data, tokenizer)
        """What ids mean."""
        if chats:
            assert isinstance(tokenizer, HuggingFaceDocuments)
            self._chats = Chats(tokenizer, data.text.length, data.scored, self._place)
        self._noted: Counter[str] = Counter()
        self._first: dict[str, int] = {}
        self._noting = threading.Lock()

    def __call__(self, columns: Sequence[Any], rows: np.ndarray) -> list[np.ndarray]:
        """The ids of each row, int32 [tokens]: ~id of those that are not to be learnt; none of rows that are left out.

        Raises:
            RefusedError: a row is no document, or no chat.
        """
        values = self._values(columns[0], int(rows[0]))
        try:
            return self._encoded(values, rows.tolist())
        except (UnicodeEncodeError, TypeError) as error:  # half a character, which JSON can spell and UTF-8 cannot
            if all(_is_whole(value) for value in values):
                raise
            raise RefusedError(
                f"half a character in {self._place(int(rows[0]))}",
                got="text that cannot be written as UTF-8",
                expected="whole characters",
                next="correct or remove the row: it was cut within an escape, as \\ud83d",
            ) from error

    def _encoded(self, values: list[Any], rows: list[int]) -> list[np.ndarray]:
        if self._chats is not None:
            return [self._chat(value, row) for value, row in zip(values, rows, strict=True)]
        found = self._tokenizer.encode(values)
        for row, ids in zip(rows, found, strict=True):
            self._note("empty", row, not len(ids))
        return found

    def _chat(self, value: Any, row: int) -> np.ndarray:
        assert self._chats is not None
        messages = messages_of(value, self._place(row))
        self._note("empty", row, not messages)
        if not messages:
            return np.empty(0, np.int32)
        chat = self._chats.encode(messages, row)
        silent = not (chat.ids[1:] >= 0).any()
        self._note("cut", row, chat.cut)
        self._note("silent", row, silent)
        return np.empty(0, np.int32) if silent else chat.ids

    def _values(self, column: Any, row: int) -> list[Any]:
        if not isinstance(column, pa.Array | pa.ChunkedArray):
            return list(column)
        column = plain(column)
        refuse_nulls(column, self._place, row)
        try:
            values: list[Any] = column.to_pylist()
        except UnicodeDecodeError as error:
            raise RefusedError(f"text that is not UTF-8 in {self._place(row)}", got=error, expected="UTF-8") from error
        return values

    def _note(self, what: str, row: int, there: bool) -> None:
        if there:
            with self._noting:
                self._noted[what] += 1
                self._first[what] = min(row, self._first.get(what, row))

    def notes(self, name: str) -> list[str]:
        """What users should know of the rows that were read, a line each; `name` is that of their source."""
        what = "documents" if self._chats is None else "chats"
        said = {
            "empty": "left out, as {} empty",
            "cut": "longer than a block: the first turns of {} are left out",
            "silent": "left out, as {} nothing to learn from",
        }
        words = {"empty": ("it is", "they are"), "cut": ("it", "them"), "silent": ("it holds", "they hold")}
        lines = []
        for key, line in said.items():
            if number := self._noted[key]:
                verb, word = ("is", words[key][0]) if number == 1 else ("are", words[key][1])
                first = self._place(self._first[key])
                lines.append(
                    f"{number:,} of the {what} of data.{name} {verb} {line.format(word)}; the first is {first}"
                )
        if self._chats is not None and self._chats.tells_the_date:
            lines.append("the chat template may write today's date: prepared on another day, these are other rows")
        return lines


@dataclass(frozen=True)
class OpenedDocuments:
    """A source of documents that is about to be read."""

    source: Source
    documents: Documents


@dataclass(frozen=True)
class Counted:
    """What all documents of a source were like, in the order of its rows."""

    counts: np.ndarray
    """Tokens of each, int64 [rows]; none of those that are left out, or not wanted."""
    hashes: np.ndarray
    """By which equal documents are found, int64 [rows]."""
    notes: tuple[str, ...]
    """What users should know of them."""


def tokens_of(data: recipe.DataSpec, tokenizer: LanguageTokenizer) -> Tokens:
    """What the ids of blocks mean, and what their tokens see of each other."""
    template = None
    if any(isinstance(source, recipe.ChatData) for source in data.sources.values()):
        assert isinstance(tokenizer, HuggingFaceDocuments)
        template = template_key(tokenizer)
    return tokenizer.tokens.model_copy(update={"attention": data.packing.attention, "template": template})


def key_of_text(data: recipe.DataSpec) -> dict[str, Any]:
    """JSON that changes when the same documents may become other blocks."""
    assert data.text is not None
    tokens = tokens_of(data, language_tokenizer(data.text))
    return text_key_of(data, tokens)


def open_documents(
    data: recipe.DataSpec, kinds: Mapping[str, Kind], known: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, OpenedDocuments]:
    """Look at all sources of a language model, and read none.

    Raises:
        RefusedError, MachineError: as `language_tokenizer`; a source is not there, or has no such column.
    """
    assert data.text is not None
    tokenizer = language_tokenizer(data.text)
    found = {}
    for name, kind in kinds.items():
        source, chats = open_kind(kind, known.get(name)), isinstance(data.sources[name], recipe.ChatData)
        found[name] = OpenedDocuments(source, Documents(data, tokenizer, source, chats=chats))
    return found


def read_documents(
    reading: OpenedDocuments,
    take: Callable[[np.ndarray, list[np.ndarray]], None],
    *,
    threads: int | None = None,
    start: int = 0,
    stop: int | None = None,
    wanted: np.ndarray | None = None,
) -> None:
    """Tokenize rows of a source, in their order, and hand them on: their numbers, and the ids of each.

    Args:
        take: is called with both, for a few rows at a time.
        threads: that read and tokenize; by default as many as there are cores.
        start, stop: which rows.
        wanted: which of these, bool [stop - start]; None for all.

    Raises:
        RefusedError: names the first row that is wrong.
    """

    def work(block: Block) -> tuple[np.ndarray, list[np.ndarray]]:
        rows, columns = block.rows, block.inputs
        if wanted is not None:
            mine = wanted[rows - start]
            rows, columns = rows[mine], [_chosen(column, mine) for column in columns]
        return rows, reading.documents(columns, rows) if len(rows) else []

    blocks = reading.source.blocks(_READ_DOCUMENTS, start, stop)
    for rows, found in map_blocks(blocks, work, threads or default_threads()):
        take(rows, found)


def _is_whole(value: Any) -> bool:
    """Whether all text in a value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _chosen(column: Any, mine: np.ndarray) -> Any:
    if isinstance(column, list):
        return [value for value, one in zip(column, mine, strict=True) if one]
    return column.filter(pa.array(mine))


def count_documents(
    name: str,
    reading: OpenedDocuments,
    wanted: np.ndarray,
    tell: Callable[[int, int], None],
    take: Callable[[list[np.ndarray]], None] = lambda found: None,
) -> Counted:
    """Tokenize rows of a source, and count their tokens.

    Args:
        name: of the split whose source it is, for notes.
        wanted: which rows, bool [rows].
        tell: called with rows done, and rows in all.
        take: called with the ids of a few of these rows at a time, in their order.
    """
    total = reading.source.rows
    counts, hashes = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)

    def count(rows: np.ndarray, found: list[np.ndarray]) -> None:
        if not found:
            return
        counts[rows] = [len(one) for one in found]
        digests = b"".join(hashlib.blake2b(one.tobytes(), digest_size=8).digest() for one in found)
        hashes[rows] = np.frombuffer(digests, "<i8")
        take(found)
        tell(int(rows[-1]) + 1, total)

    read_documents(reading, count, wanted=wanted)
    return Counted(counts, hashes, (*reading.source.notes, *reading.documents.notes(name)))
