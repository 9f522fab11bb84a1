"""Tokenizers of language models: known by what they do, compared by what ids mean, and read back as text.

A tokenizer's vocabulary is its last id + 1. The rows of a model's output embedding may be more, as padding.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data.text import BEGIN, END, MASK, PADDING, Tokens, load_tokenizer, vocabulary_of

# The parts of a tokenizer.json that decide which ids a text becomes.
_PARTS = ("model", "normalizer", "pre_tokenizer", "post_processor")
# How many ids that differ a message names.
_SHOWN = 5
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class LanguageTokenizer(Protocol):
    """Documents <-> ids. Several threads may use one at a time."""

    tokens: Tokens
    """What its ids mean; `end_of_text` and `tokenizer` are given."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each document, int32 [tokens], the end of text last; none of one that has no token of its own."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special ones; bytes that are no UTF-8 become U+FFFD."""

    def meanings(self) -> list[bytes | None]:
        """The bytes that each id stands for, [vocabulary]; None for ids that are no token."""


def language_tokenizer(spec: recipe.Text) -> LanguageTokenizer:
    """The tokenizer of a language model.

    Raises:
        RefusedError: no such tokenizer, none of the `tokenizers` library, or one without an end of text.
        MachineError: the hub cannot be reached.
    """
    if isinstance(spec, recipe.ByteText):
        return ByteDocuments()
    return HuggingFaceDocuments(load_tokenizer(spec), str(spec.path or spec.name))


class ByteDocuments:
    """UTF-8 bytes, then END."""

    tokens = Tokens(
        vocabulary=260,
        padding=PADDING,
        mask=MASK,
        special=(PADDING, BEGIN, END, MASK),
        end_of_text=END,
        tokenizer=sha256(canonical_json({"kind": "bytes", "padding": PADDING, "end": END})),
    )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As the protocol says."""
        ends = {False: np.empty(0, np.int32), True: np.array([END], np.int32)}
        encoded = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        return [np.concatenate([ids, ends[len(ids) > 0]]) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """As the protocol says."""
        return bytes(one for one in ids if one < 256).decode("utf-8", "replace")

    def meanings(self) -> list[bytes | None]:
        """As the protocol says."""
        return [*(bytes([one]) for one in range(256)), b"<padding>", b"<begin>", b"<end>", b"<mask>"]


class HuggingFaceDocuments:
    """A tokenizer of the `transformers` library that the `tokenizers` library runs, on all cores.

    Args:
        loaded: as `text.load_tokenizer` gives it.
        name: for messages.
    """

    def __init__(self, loaded: Any, name: str) -> None:
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise RefusedError(
                f"the tokenizer {name} is none of the `tokenizers` library",
                got=type(loaded).__name__,
                expected="a folder with a tokenizer.json",
                next="load it with AutoTokenizer and save it with save_pretrained, which writes that file",
            )
        if loaded.eos_token_id is None:
            raise RefusedError(
                f"the tokenizer {name} has no token that ends a text",
                got="eos_token: none",
                expected="a token that stands behind each document",
                next="add one with tokenizer.add_special_tokens({'eos_token': '<|endoftext|>'}) and save the tokenizer",
            )
        self.loaded = loaded
        """The tokenizer of `transformers`."""
        # A copy, since calls of the other one leave their padding and truncation behind in what they share.
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._end = int(loaded.eos_token_id)
        self._of_nothing = len(self._backend.encode("").ids)
        padding = self._end if loaded.pad_token_id is None else int(loaded.pad_token_id)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.tokens = Tokens(
            vocabulary=vocabulary_of(vocabulary, name),
            padding=padding,
            mask=loaded.mask_token_id,
            special=tuple(sorted({*map(int, loaded.all_special_ids), padding})),
            end_of_text=self._end,
            tokenizer=fingerprint_of(loaded),
        )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As the protocol says; the tokenizer adds its special tokens."""
        return [self._ended(one.ids) for one in self._backend.encode_batch_fast(list(texts))]

    def _ended(self, ids: list[int]) -> np.ndarray:
        if len(ids) <= self._of_nothing:
            return np.empty(0, np.int32)
        return np.array(ids if ids[-1] == self._end else [*ids, self._end], dtype=np.int32)

    def encode_rendered(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of chats that a template has written, int32 [tokens] each: nothing is added."""
        return [
            np.array(one.ids, np.int32)
            for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """As the protocol says."""
        return str(self._backend.decode(list(map(int, ids)), skip_special_tokens=True))

    def meanings(self) -> list[bytes | None]:
        """As the protocol says."""
        added = {number: token.content for number, token in self._backend.get_added_tokens_decoder().items()}
        bytes_of = _bytes_of_tokens(json.loads(self._backend.to_str()))
        found: list[bytes | None] = [None] * self.tokens.vocabulary
        for token, number in self._backend.get_vocab(with_added_tokens=True).items():
            found[number] = added[number].encode() if number in added else bytes_of(token)
        return found


def fingerprint_of(loaded: Any) -> str:
    """What a tokenizer of `transformers` is known by, whatever it is called and wherever it lies: the sha256 of its
    tokenizer.json as far as it decides which ids a text becomes, and of its bos, eos and pad ids.
    """
    document = json.loads(loaded.backend_tokenizer.to_str())
    parts = {name: document.get(name) for name in _PARTS}
    if isinstance(merges := (parts["model"] or {}).get("merges"), list):
        # Versions of the library write a merge as one string, or as two.
        parts["model"]["merges"] = [one.split(" ") if isinstance(one, str) else one for one in merges]
    added = sorted(document.get("added_tokens") or [], key=lambda token: int(token["id"]))
    ids = [loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id]
    return sha256(canonical_json({**parts, "added_tokens": added, "ids": ids}))


def text_key_of(data: recipe.DataSpec, tokens: Tokens) -> dict[str, Any]:
    """JSON that changes when the same documents may become other blocks.

    Args:
        tokens: what the ids of blocks mean.
    """
    assert data.text is not None
    return {
        "tokens": tokens.model_dump(mode="json"),
        "length": data.text.length,
        "remainder": data.packing.remainder,
        "scored": data.scored,
    }


def save_language_tokenizer(
    spec: recipe.HuggingFaceText, vocabulary: int, fingerprint: str | None, folder: Path
) -> None:
    """Write a tokenizer's files into the folder of a language model.

    Args:
        vocabulary: of the model: ids are below.
        fingerprint: of the tokenizer that it was trained with; none where nobody knows.

    Raises:
        RefusedError, MachineError: as `language_tokenizer`; or it is another tokenizer, or has ids that the model does
            not know.
    """
    loaded = load_tokenizer(spec)
    found, last = fingerprint_of(loaded) if fingerprint else None, max(loaded.get_vocab().values())
    if found != (fingerprint or None) or last >= vocabulary:
        other = last < vocabulary
        raise RefusedError(
            f"the tokenizer {spec.path or spec.name} is not the one that the model was trained with",
            got=f"fingerprint {str(found)[:16]}" if other else f"ids up to {last:,}",
            expected=f"fingerprint {str(fingerprint)[:16]}" if other else f"ids 0 to {vocabulary - 1:,}",
            next="choose the tokenizer of the model's recipe",
        )
    loaded.save_pretrained(folder)


def token_bytes(tokenizer: LanguageTokenizer) -> np.ndarray:
    """How many bytes of text each id stands for, int64 [vocabulary]; 0 of special ones, which are no text."""
    special = set(tokenizer.tokens.special)
    meanings = enumerate(tokenizer.meanings())
    return np.array([0 if number in special else len(text or b"") for number, text in meanings], np.int64)


def used_ids(inputs: np.ndarray, vocabulary: int) -> np.ndarray:
    """The ids that occur in blocks, int64, ascending.

    Args:
        inputs: blocks, int32 [rows, 3, length]; read a few at a time.
        vocabulary: of their tokenizer.
    """
    there = np.zeros(vocabulary, dtype=np.bool_)
    step = max(1, (1 << 22) // max(1, inputs.shape[-1]))
    for start in range(0, len(inputs), step):
        there[np.asarray(inputs[start : start + step])[:, 0].ravel()] = True
    return np.flatnonzero(there)


def check_same_meaning(ours: LanguageTokenizer, theirs: LanguageTokenizer, used: np.ndarray, whose: str) -> None:
    """Refuse a tokenizer to which ids that the data uses mean something else. What it is called does not matter, nor do
    tokens that do not occur.

    Args:
        ours: that of the data.
        theirs: another one, such as the teacher's.
        used: the ids that the data uses, as `used_ids` finds them.
        whose: `the teacher models/large`, for the message.

    Raises:
        RefusedError: names the first ids that differ.
    """
    if ours.tokens.tokenizer == theirs.tokens.tokenizer:
        return
    mine, others = ours.meanings(), theirs.meanings()
    other = [id for id in used.tolist() if id >= len(others) or mine[id] != others[id]]
    if not other:
        return
    shown = [f"id {id} is {_shown(mine, id)} in the data and {_shown(others, id)} there" for id in other[:_SHOWN]]
    more = f", and {len(other) - _SHOWN:,} more" if len(other) > _SHOWN else ""
    raise RefusedError(
        f"the tokenizer of {whose} is not that of the data",
        got=", ".join(shown) + more,
        expected="the same bytes for every id that the data uses",
        next="tokenize the data with the tokenizer of this model, or choose a model with that of the data; methods "
        "that cross tokenizers (ULD, GOLD, X-Token) are not offered",
    )


def check_model_rows(rows: int, tokens: Tokens, whose: str) -> None:
    """Refuse a model that has no logit for an id of the data. It may have more rows, as padding: these are cut off.

    Args:
        rows: of its output embedding.
        tokens: those of the data.
        whose: `students.small`, for the message.

    Raises:
        RefusedError: it has too few.
    """
    if rows < tokens.vocabulary:
        raise RefusedError(
            f"{whose} has fewer output rows than the tokenizer of the data has ids",
            got=f"{rows:,} rows, for ids 0 to {rows - 1:,}",
            expected=f"at least {tokens.vocabulary:,} rows: the last id is {tokens.vocabulary - 1:,}",
            next="choose a model of this tokenizer; more rows than ids, as padding, are fine",
        )


def _shown(meanings: Sequence[bytes | None], number: int) -> str:
    found = meanings[number] if number < len(meanings) else None
    return "nothing" if found is None else repr(found.decode("utf-8", "backslashreplace"))


def _bytes_of_tokens(document: dict[str, Any]) -> Any:
    """How tokens of a vocabulary are written there -> the bytes that they stand for."""
    kinds = set(_kinds_in([document.get("pre_tokenizer"), document.get("decoder"), document.get("normalizer")]))
    if "ByteLevel" in kinds:
        return _of_byte_level
    return _of_pieces if kinds & {"Metaspace", "ByteFallback"} else str.encode


def _kinds_in(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        yield str(node.get("type"))
        node = list(node.values())
    if isinstance(node, list):
        for one in node:
            yield from _kinds_in(one)


def _of_byte_level(token: str) -> bytes:
    alphabet = _byte_alphabet()
    return bytes(alphabet[one] for one in token) if all(one in alphabet for one in token) else token.encode()


def _of_pieces(token: str) -> bytes:
    """Of SentencePiece: a byte as <0x0A>, and a low block for a space."""
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for themselves, the others from
    U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [one for one in range(256) if one not in printable]
    return {chr(one): one for one in printable} | {chr(256 + at): one for at, one in enumerate(others)}
