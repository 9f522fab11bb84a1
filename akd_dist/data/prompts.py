"""Text that a language model is to continue, as ids, and ids that it has made, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.chats import written_for_an_answer
from akd_dist.data.text import END, load_tokenizer


class PromptTokenizer(Protocol):
    """A prompt <-> ids."""

    end: int | None
    """The id that ends a text; None where there is none."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text that goes on: without an end."""

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a chat in which a user says this, up to where the assistant answers.

        Raises:
            RefusedError: there is no template that says how.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special ones; bytes that are no UTF-8 become U+FFFD."""


def prompt_tokenizer(spec: recipe.Text) -> PromptTokenizer:
    """The tokenizer that a recipe asks for, for prompts.

    Raises:
        RefusedError: no such tokenizer; the library is not installed.
        MachineError: the hub cannot be reached.
    """
    return _Bytes() if isinstance(spec, recipe.ByteText) else _HuggingFace(load_tokenizer(spec))


def _utf8(text: str) -> str:
    """A prompt, if it is text: what a terminal sends in another encoding comes as half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(
            "the prompt is not UTF-8",
            got=f"{text[error.start : error.start + 1]!a} at character {error.start}",
            expected="text in UTF-8",
            next="see that the terminal, or the file that the prompt comes from, is in UTF-8",
        ) from None
    return text


class _Bytes:
    """UTF-8 bytes; what begins a text of other tasks has no place here, since documents stand one behind another."""

    end: int | None = END

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text).encode())

    def encode_chat(self, text: str) -> list[int]:
        raise RefusedError(
            "bytes have no chat template", got="a model of bytes", expected="a tokenizer with a chat_template",
            next="leave --chat out: the prompt is then continued as it stands",
        )  # fmt: skip

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(one for one in ids if one < 256).decode("utf-8", "replace")


class _HuggingFace:
    """A tokenizer of the `transformers` library, which puts before a text what it puts before documents."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self.end: int | None = loaded.eos_token_id

    def encode(self, text: str) -> list[int]:
        ids = [int(one) for one in self._loaded.encode(_utf8(text))]
        return ids[:-1] if ids and ids[-1] == self.end else ids

    def encode_chat(self, text: str) -> list[int]:
        written = written_for_an_answer(self._loaded, _utf8(text))
        return [int(one) for one in self._loaded.encode(written, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._loaded.decode(list(ids), skip_special_tokens=True))
