"""Data of language models: how documents share blocks, which tokens are learnt, and what fits no language model."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from akd_dist.recipe.base import NotRightError, Spec, Task
from akd_dist.recipe.sources import ChatData, TextData

Attention = Literal["document", "block"]
Scored = Literal["all", "completions"]


class Packing(Spec):
    """How documents share the blocks of a language model."""

    attention: Attention = "document"
    """What a token sees: the tokens before it of its own document, whose positions begin at 0; or all that stand before
    it in its block."""
    remainder: Literal["drop", "pad"] = "drop"
    """What becomes of the tokens of a split that fill no block: `drop` leaves them out, `pad` fills the block up."""


class Data(Protocol):
    """What is asked of a recipe's data, `recipe.DataSpec`."""

    @property
    def task(self) -> Task: ...  # noqa: D102
    @property
    def sources(self) -> Any: ...  # noqa: D102
    @property
    def text(self) -> Any: ...  # noqa: D102
    @property
    def packing(self) -> Packing: ...  # noqa: D102
    @property
    def scored(self) -> Scored: ...  # noqa: D102
    @property
    def own_metric(self) -> object: ...  # noqa: D102


# What has no meaning where each token is a label; `data` holds it where it is not as by default.
_NOT_FOR_LANGUAGE = {
    "unlabelled": "each token of a text is a label already: leave `unlabelled` out",
    "stratify": "stratify draws rows class by class, and documents have no classes: leave it out",
    "normalize": "normalize is for images and numbers: leave it out",
    "image": "image is for encoded images: leave it out",
    "augmentation": "the blocks of a language model are used as they are: leave `augmentation` out",
    "views": "a block has one view: leave `views` out",
}


def why_not_a_language_model(data: Data, changed: set[str]) -> NotRightError | None:
    """What is wrong with the keys of a language model; or with those of another task, where only it could have them.

    Args:
        changed: the keys that do not hold their defaults.
    """
    languages = {name: source for name, source in data.sources.items() if isinstance(source, TextData | ChatData)}
    if data.task == "language_model":
        return _of_language(data, changed, languages)
    if languages:
        name, source = next(iter(languages.items()))
        return NotRightError(
            f"the kind {source.kind} of {name} is for language models, and task is {data.task}",
            "task: language_model; or kind: parquet, for texts with a label each",
            (name, "kind"),
        )
    if data.packing != Packing():
        return NotRightError(f"packing is for language models, and task is {data.task}", "it left out", ("packing",))
    if data.scored != "all":
        return NotRightError(f"scored is for language models, and task is {data.task}", "it left out", ("scored",))
    return None


def _of_language(data: Data, changed: set[str], languages: dict[str, Any]) -> NotRightError | None:
    for name, source in data.sources.items():
        if name not in languages and name != "unlabelled":
            return NotRightError(
                f"the kind {source.kind} of {name} has no documents, and task is language_model",
                "kind: text or kind: chat",
                (name, "kind"),
            )
    for key, why in _NOT_FOR_LANGUAGE.items():
        if key in changed:
            return NotRightError(f"task is language_model, and {why}", "it left out", (key,))
    if data.own_metric is not None:
        return NotRightError(
            "a metric of your own is given all logits, which language models never hold at once",
            "cross_entropy or accuracy",
            ("metric",),
        )
    if data.text is None:
        return NotRightError(
            "task is language_model, and text is missing",
            "how text becomes tokens, as in text: {kind: huggingface, path: tokenizer, length: 1024}",
        )
    if data.text.length < 2:
        return NotRightError("a block of one token has nothing to predict", "at least 2", ("text", "length"))
    return _of_chats(data, languages)


def _of_chats(data: Data, languages: dict[str, Any]) -> NotRightError | None:
    chats = [name for name, source in languages.items() if isinstance(source, ChatData)]
    if chats and data.text is not None and data.text.kind == "bytes":
        return NotRightError(
            "the bytes of a chat have no template that says who speaks",
            "kind: huggingface, with a tokenizer that has a chat_template",
            ("text", "kind"),
        )
    if data.scored == "completions" and len(chats) < len(languages):
        return NotRightError(
            "completions are what the assistant of a chat has written, and documents have none",
            "all, or kind: chat for all sources",
            ("scored",),
        )
    if chats and len(chats) < len(languages):
        other = next(name for name in languages if name not in chats)
        return NotRightError("chats and documents are packed in different ways", "one kind for all sources", (other,))
    return None
