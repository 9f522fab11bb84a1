"""Chats: a list of messages -> token ids, written by the tokenizer's own template.

Templates are programs that come with a tokenizer. `transformers` runs them in Jinja's immutable sandbox: they see
messages as plain data, and reach neither files nor attributes of Python.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.base.threads import within
from akd_dist.data import hub
from akd_dist.data.columns import Place
from akd_dist.data.tokenizers import HuggingFaceDocuments

Message = dict[str, Any]
LONGEST_SECONDS = 20.0
"""How long a template may write at one chat: the sandbox bounds what it reaches, and not how long it goes round."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SYSTEM, _USER, _ASSISTANT = ("system", "developer"), "user", "assistant"


@dataclass(frozen=True)
class Chat:
    """A chat as tokens."""

    ids: np.ndarray
    """int32 [tokens]; an id that is not to be learnt stands as ~id, its bitwise complement, which is negative."""
    cut: bool = False
    """Whether its first turns are left out, since it is longer than a block."""


class Chats:
    """The template of a tokenizer. Several threads may use one at a time.

    Args:
        tokenizer: whose template it is.
        length: the most tokens of a chat.
        scored: which tokens are to be learnt.
        place: where chats stand, for messages.

    Raises:
        RefusedError: it has no template.
    """

    def __init__(self, tokenizer: HuggingFaceDocuments, length: int, scored: recipe.Scored, place: Place) -> None:
        self._tokenizer, self._length, self._scored, self._place = tokenizer, length, scored, place
        self._template = template_of(tokenizer)
        self._tells = _GENERATION.search(self._template) is not None
        self.tells_the_date = "strftime_now" in self._template
        """Whether the template may write today's date."""
        # `transformers` keeps padding and truncation as state of a tokenizer, which two threads would mix up.
        self._lock = threading.Lock()

    def encode(self, messages: Sequence[Message], row: int) -> Chat:
        """A chat as tokens; its first turns are left out where it is too long.

        Raises:
            RefusedError: the template refuses it; it does not say what the assistant has written; the last turn of the
                user and what follows do not fit in a block. Names the row, and the message.
        """
        whole = self._marked(messages, row)
        if len(whole) <= self._length:
            return Chat(whole)
        system = list(messages[:1]) if messages[0]["role"] in _SYSTEM else []
        turns = [at for at, one in enumerate(messages) if one["role"] == _USER and at > len(system)]
        for at in turns:
            shorter = self._marked([*system, *messages[at:]], row)
            if len(shorter) <= self._length:
                return Chat(shorter, cut=True)
        raise RefusedError(
            f"the last turn of the chat in {self._place(row)} does not fit in a block",
            got=f"{len(shorter) if turns else len(whole):,} tokens",
            expected=f"at most {self._length:,}: of a longer chat the first turns are left out, and not the last one",
            next="raise data.text.length, or remove the row",
        )

    def _marked(self, messages: Sequence[Message], row: int) -> np.ndarray:
        """The ids of messages; ~id of those that are not to be learnt."""
        if self._scored == "all":
            return self._tokenizer.encode_rendered([self._rendered(messages, row)])[0]
        ids, learnt = self._by_template(messages, row) if self._tells else self._by_prefixes(messages, row)
        return np.where(learnt, ids, ~ids)

    def _by_template(self, messages: Sequence[Message], row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and which of them the template says that the assistant has written."""
        apply = functools.partial(
            self._tokenizer.loaded.apply_chat_template, return_dict=True, return_assistant_tokens_mask=True
        )
        with self._lock:
            told = self._tried(apply, messages, row)
        return np.array(told["input_ids"], np.int32), np.array(told["assistant_masks"], np.bool_)

    def _by_prefixes(self, messages: Sequence[Message], row: int) -> tuple[np.ndarray, np.ndarray]:
        """The same of a template that does not say: the assistant's tokens are those that each of its messages adds."""
        spoken = [at for at, one in enumerate(messages) if one["role"] == _ASSISTANT]
        texts = [self._rendered(messages, row)]
        for at in spoken:
            texts.append(self._rendered(messages[:at], row, asks=True, message=at) if at else "")
            texts.append(self._rendered(messages[: at + 1], row, message=at))
        whole, *parts = self._tokenizer.encode_rendered(texts)
        learnt = np.zeros(len(whole), dtype=np.bool_)
        for at, before, after in zip(spoken, parts[::2], parts[1::2], strict=True):
            for prefix, what in ((before, "before"), (after, "up to")):
                if not np.array_equal(prefix, whole[: len(prefix)]):
                    raise self._changed(row, at, what, prefix, whole)
            learnt[len(before) : len(after)] = True
        return whole, learnt

    def _changed(self, row: int, at: int, what: str, prefix: np.ndarray, whole: np.ndarray) -> RefusedError:
        same = min(len(prefix), len(whole))
        other = np.flatnonzero(prefix[:same] != whole[:same])
        where = int(other[0]) if len(other) else same
        return RefusedError(
            f"which tokens of the chat in {self._place(row)} the assistant has written cannot be told",
            got=f"the template writes the messages {what} message {at} in another way where others follow: token "
            f"{where} is the first that differs",
            expected="a template that writes each message as it would without those after it",
            next="give the template {% generation %} and {% endgeneration %} around what the assistant writes, or set "
            "data.scored: all",
        )

    def _rendered(
        self, messages: Sequence[Message], row: int, *, asks: bool = False, message: int | None = None
    ) -> str:
        apply = functools.partial(
            self._tokenizer.loaded.apply_chat_template, tokenize=False, add_generation_prompt=asks
        )
        return str(self._tried(apply, messages, row, message))

    def _tried(self, apply: Any, messages: Sequence[Message], row: int, message: int | None = None) -> Any:
        try:
            return within(LONGEST_SECONDS, lambda: apply(list(messages)))
        except Exception as error:  # whatever a template leads to
            at = "" if message is None else f", up to message {message}"
            raise RefusedError(
                f"the chat template of the tokenizer refuses the messages in {self._place(row)}{at}",
                got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
                expected="messages as the template takes them",
                next="correct or remove the row, or choose a tokenizer whose template takes such chats",
            ) from error


def written_for_an_answer(loaded: Any, text: str) -> str:
    """A chat in which a user says `text`, as the template of a tokenizer of `transformers` writes it, up to the answer.

    Raises:
        RefusedError: it has no template, or that refuses such a chat.
    """
    _text_of_template(loaded)
    try:
        said = [{"role": _USER, "content": text}]
        write = functools.partial(loaded.apply_chat_template, tokenize=False, add_generation_prompt=True)
        return str(within(LONGEST_SECONDS, lambda: write(said)))
    except Exception as error:  # whatever a template leads to
        raise RefusedError(
            "the chat template of the tokenizer refuses a chat of one message",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
            expected="a template that takes a user's message",
            next="leave --chat out, and write the prompt as the model was trained on it",
        ) from error


def template_of(tokenizer: HuggingFaceDocuments) -> str:
    """The text of a tokenizer's template.

    Raises:
        RefusedError: it has none.
    """
    return _text_of_template(tokenizer.loaded)


def _text_of_template(loaded: Any) -> str:
    try:
        return str(loaded.get_chat_template())
    except ValueError as error:
        raise RefusedError(
            "the tokenizer has no chat template",
            got=str(error).strip().partition("\n")[0],
            expected="a chat_template, which says how messages become text",
            next="choose the tokenizer of a chat model, or save one with a `chat_template` of your own",
        ) from error


def template_key(tokenizer: HuggingFaceDocuments) -> str:
    """What a template is known by: the sha256 of its text, and of the version of the library that runs it."""
    return sha256(canonical_json([template_of(tokenizer), hub.version_of("transformers")]))


def messages_of(value: Any, place: str) -> list[Message]:
    """A row's messages.

    Raises:
        RefusedError: it is no list of messages; names the message.
    """
    if not isinstance(value, list):
        raise RefusedError(
            f"no messages in {place}", got=type(value).__name__, expected="a list of messages", next="correct the row"
        )
    for at, one in enumerate(value):
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise RefusedError(
                f"message {at} in {place} does not say who speaks",
                got=f"the keys {', '.join(map(str, one))}" if isinstance(one, dict) else type(one).__name__,
                expected="`role` and `content`, as in {role: user, content: Hello}",
                next="correct the row",
            )
        if not _says_something(one):
            raise RefusedError(
                f"message {at} in {place} says nothing",
                got=f"content of {type(one['content']).__name__}" if one.get("content") is not None else "no content",
                expected="text in `content`, or another key that says something, such as tool_calls",
                next="correct the row, or leave the message out",
            )
    return value


def _says_something(message: Message) -> bool:
    """Whether a template finds something to write: of nothing it would write `None`, or nothing at all."""
    content = message.get("content")
    if content is None:
        return any(value is not None for key, value in message.items() if key not in ("role", "content", "name"))
    return isinstance(content, str | list)
