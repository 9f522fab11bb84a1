"""Text: strings -> arrays of token ids, all of one length.

The byte tokenizer's vocabulary: ids 0 to 255 are the bytes of UTF-8; PADDING fills up; BEGIN opens an input; END closes
it and stands between the two texts of a pair; MASK hides a token.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from akd_dist import recipe
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.data import hub
from akd_dist.recipe.paths import START

PADDING, BEGIN, END, MASK = 256, 257, 258, 259
MOST_IDS = 2**24
"""Ids are below: the largest vocabularies have some 300,000."""
# What only language models need: left out where it is not given, so that the rows of before are the same rows.
_LATER = ("end_of_text", "attention", "tokenizer", "template")


class Tokens(BaseModel):
    """What models and views need to know of token ids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocabulary: Annotated[int, Field(ge=1, lt=2**31)]
    """Ids are 0 to vocabulary - 1."""
    padding: Annotated[int, Field(ge=0, lt=2**31)]
    """The id that fills inputs up to their length; attention leaves it out."""
    mask: int | None = None
    """The id that stands for a hidden token; None if the tokenizer has none."""
    special: tuple[int, ...] = ()
    """Ids that are never masked, padding among them."""
    end_of_text: int | None = None
    """The id that ends a document, and the text that a language model writes; None for other tasks."""
    attention: recipe.Attention | None = None
    """What a token of a block sees, see `recipe.Packing`; None for other tasks than language models."""
    tokenizer: str | None = None
    """The fingerprint of the tokenizer of a language model (`data.tokenizers`)."""
    template: str | None = None
    """Of chats: the sha256 of what writes them as text."""

    @model_serializer(mode="wrap")
    def _as_before_there_were_language_models(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {field: value for field, value in spell(self).items() if field not in _LATER or value is not None}


class Tokenizer(Protocol):
    """Strings -> ids. Several threads may use one at a time."""

    tokens: Tokens
    """What its ids mean."""
    shape: tuple[int, ...]
    """Of one input: [length], or [2, length] with the token types as the second channel."""

    def encode(self, texts: Sequence[list[str]]) -> np.ndarray:
        """Ids, int32 [n, *shape], of n texts; or of n pairs, given as two lists."""


def tokenizer_of(spec: recipe.Text, pair: bool) -> Tokenizer:
    """The tokenizer that a recipe asks for.

    Raises:
        RecipeError: its length leaves no room for a token of text.
        RefusedError: no such tokenizer, or none that pads; the library is not installed.
        MachineError: the hub cannot be reached.
    """
    match spec:
        case recipe.ByteText():
            return ByteTokenizer(spec.length, pair)
        case recipe.HuggingFaceText():
            return _HuggingFaceTokenizer(spec, pair)


def save_tokenizer(spec: recipe.HuggingFaceText, tokens: Tokens, folder: Path) -> None:
    """Write a tokenizer's files into a folder.

    Args:
        tokens: what its ids must mean.

    Raises:
        RefusedError, MachineError: as `tokenizer_of`; or its ids mean something else.
    """
    found = _HuggingFaceTokenizer(spec, pair=False).tokens
    if found != tokens:
        raise RefusedError(
            f"the tokenizer {spec.path or spec.name} is not the one that the model was trained with",
            got=found.model_dump_json(),
            expected=tokens.model_dump_json(),
            next="choose the tokenizer of the model's recipe",
        )
    load_tokenizer(spec).save_pretrained(folder)


def text_key(spec: recipe.Text | None) -> dict[str, Any] | None:
    """JSON that changes when the same text may become other ids; cheap."""
    if not isinstance(spec, recipe.HuggingFaceText):
        return None if spec is None else spec.model_dump(mode="json")
    key = {**spec.model_dump(mode="json"), **{name: hub.version_of(name) for name in ("transformers", "tokenizers")}}
    if spec.path is not None:
        folder = _folder(spec.path)
        stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
        key["files"] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return key


class ByteTokenizer:
    """UTF-8 bytes: BEGIN, text, END; or BEGIN, first, END, second, END. Needs no vocabulary, knows every language."""

    tokens = Tokens(vocabulary=260, padding=PADDING, mask=MASK, special=(PADDING, BEGIN, END, MASK))

    def __init__(self, length: int, pair: bool) -> None:
        self.shape: tuple[int, ...] = (length,)
        self._room = length - (3 if pair else 2)
        _check_length(length, special=3 if pair else 2, texts=2 if pair else 1)

    def encode(self, texts: Sequence[list[str]]) -> np.ndarray:
        """As the protocol says. What is too long is cut at its end, of a pair the longer text first."""
        ids = np.full((len(texts[0]), *self.shape), PADDING, dtype=np.int32)
        for row, parts in zip(ids, zip(*texts, strict=True), strict=True):
            row[0], at = BEGIN, 1
            for data in self._cut([part.encode() for part in parts]):
                row[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
                at += len(data) + 1
                row[at - 1] = END
        return ids

    def _cut(self, parts: list[bytes]) -> list[bytes]:
        if len(parts) == 1:
            return [parts[0][: self._room]]
        first, second = parts
        half = self._room // 2
        # Each text may take half of the room, and also what a short other one leaves of the other half.
        of_first = max(self._room - half, self._room - len(second))
        return [first[:of_first], second[: self._room - min(len(first), of_first)]]


class _HuggingFaceTokenizer:
    """A tokenizer of the `transformers` library, from a folder or from the hub."""

    def __init__(self, spec: recipe.HuggingFaceText, pair: bool) -> None:
        self._length = spec.length
        self._tokenizer = load_tokenizer(spec)
        # A tokenizer keeps its padding and truncation as state, which calls from two threads would mix up. Nothing is
        # lost: the fast ones work in threads of their own.
        self._lock = threading.Lock()
        _check_length(spec.length, self._tokenizer.num_special_tokens_to_add(pair), texts=2 if pair else 1)
        padding = self._tokenizer.pad_token_id
        if padding is None:
            raise RefusedError(
                f"the tokenizer {spec.path or spec.name} has no padding token",
                got="pad_token: none",
                expected="a token that fills short texts up",
                next="add one with tokenizer.add_special_tokens({'pad_token': '[PAD]'}) and save the tokenizer",
            )
        special = set(self._tokenizer.all_special_ids) | {padding}
        self.tokens = Tokens(
            vocabulary=vocabulary_of(self._tokenizer.get_vocab(), str(spec.path or spec.name)),
            padding=padding,
            mask=self._tokenizer.mask_token_id,
            special=tuple(sorted(special)),
        )
        self._types = "token_type_ids" in self._tokenizer.model_input_names
        self.shape: tuple[int, ...] = (2, spec.length) if self._types else (spec.length,)

    def encode(self, texts: Sequence[list[str]]) -> np.ndarray:
        """As the protocol says; the tokenizer adds its special tokens, and cuts the longer text of a pair first."""
        with self._lock:
            encoded = self._tokenizer(
                *texts,
                padding="max_length",
                truncation=True,
                max_length=self._length,
                return_token_type_ids=self._types,
            )
        names = ["input_ids", "token_type_ids"] if self._types else ["input_ids"]
        ids = np.stack([np.asarray(encoded[name], dtype=np.int32) for name in names], axis=1)
        return ids.reshape(len(texts[0]), *self.shape)


def load_tokenizer(spec: recipe.HuggingFaceText) -> Any:
    """The tokenizer of the `transformers` library that a recipe names.

    Raises:
        RefusedError, MachineError: as `tokenizer_of`.
    """
    transformers = hub.require_extra("transformers")
    if spec.name is not None:
        hub.reach("model", spec.name)
    place = spec.name or str(_folder(spec.path))
    try:
        return transformers.AutoTokenizer.from_pretrained(
            place, use_fast=True, trust_remote_code=False, local_files_only=spec.path is not None
        )
    except Exception as error:  # of many kinds, from many libraries
        # An OSError is what transformers makes of files that could not be downloaded.
        if spec.name is not None and isinstance(error, OSError):
            raise hub.unreachable("tokenizer", spec.name, error) from error
        raise RefusedError(
            f"{place} cannot be read as a tokenizer",
            got=(str(error).strip().partition("\n")[0] or type(error).__name__).removesuffix(":") + _files_in(place),
            expected="the files that tokenizer.save_pretrained writes, without code of its own",
            next="check that this is the tokenizer's folder, and that it was copied whole",
        ) from error


def _files_in(place: str) -> str:
    """The first few names in a folder, as the end of a sentence; nothing of what is no folder."""
    if not Path(place).is_dir():
        return ""
    names = sorted(found.name for found in Path(place).iterdir())
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"; in it lie {', '.join(names[:5])}{more}" if names else "; it is empty"


def vocabulary_of(ids: Mapping[str, int], name: str) -> int:
    """The largest id of a tokenizer plus one: ids may have holes between them, so there can be fewer tokens.

    Args:
        ids: of all its tokens.
        name: of the tokenizer, for the message.

    Raises:
        RefusedError: there is none, or one that no model has a row for.
    """
    last = max(ids.values(), default=-1)
    if not 0 <= last < MOST_IDS:
        raise RefusedError(
            f"the tokenizer {name} has ids that no model has rows for",
            got="no token" if last < 0 else f"ids up to {last:,}",
            expected=f"ids from 0 on, below {MOST_IDS:,}",
            next="check its tokenizer.json, and the added tokens in it",
        )
    return last + 1


def _folder(path: str | None) -> Path:
    folder = Path(path or "")
    if not folder.is_dir():
        raise RefusedError(
            f"no tokenizer at {path}",
            got="a file" if folder.exists() else "nothing there",
            expected="a folder that tokenizer.save_pretrained wrote",
            next=f"correct data.text.path; {START}",
        )
    return folder


def _check_length(length: int, special: int, texts: int) -> None:
    if length < special + texts:
        raise RecipeError(
            "data.text.length leaves no room for text",
            got=f"{length}, of which {special} are special tokens",
            expected=f"at least {special + texts}",
            next="raise data.text.length",
        )
