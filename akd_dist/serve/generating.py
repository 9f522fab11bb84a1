"""A language model that continues a text, as people read it: pieces of text as they come, and what was made in all.

generate("runs/stdlib/students/small", "def main", Sampling(tokens=50))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.files import expanded
from akd_dist.base.trusted import Trusted
from akd_dist.data.prompts import PromptTokenizer, prompt_tokenizer
from akd_dist.data.text import ByteTokenizer
from akd_dist.documents.use import GenerationDocument
from akd_dist.models import generation
from akd_dist.models.device import autocast
from akd_dist.models.generation import Sampling
from akd_dist.models.language import Blocks, LanguageModel
from akd_dist.serve.served import Served, open_model

_CUT = "\ufffd"  # what a character is read as of which some bytes are still to come
_LONGEST_CHARACTER = 4  # bytes


def generate(
    student: str,
    prompt: str,
    how: Sampling,
    *,
    tokenizer: str | None = None,
    trust: tuple[str, ...] = (),
    chat: bool = False,
    device: recipe.Device = "cpu",
    on_text: Callable[[str], None] = lambda piece: None,
) -> GenerationDocument:
    """Continue a text.

    Args:
        student: a model folder of a language model, absolute or `s3://`; or a local one of transformers.
        prompt: the text.
        how: how tokens are chosen; its `end` is that of the tokenizer where it is None.
        tokenizer: a folder, or a name on the hub; None takes that of the model's run, or the one beside the model.
        trust: modules that the model's folder may name.
        chat: whether the prompt is what a user says in a chat, as the tokenizer's template writes it.
        device: `cpu` or `cuda`.
        on_text: told each piece of text as soon as it is there.

    Raises:
        RefusedError: it is no language model, nobody knows its tokenizer or that has no template, or the text is too
            long for it.
        DamagedError, MachineError: as `served.open_model`.
    """
    started = time.monotonic()
    model = open_model(student, device, Trusted(modules=trust))
    blocks = _blocks_of(model)
    assert isinstance(model.module, LanguageModel)
    speaks = prompt_tokenizer(text_of(model, tokenizer))
    end = next((one for one in (how.end, blocks.end_of_text, speaks.end) if one is not None), None)
    how, ids = replace(how, end=end), speaks.encode_chat(prompt) if chat else speaks.encode(prompt)
    made: list[int] = []
    with autocast(model.device, model.precision):
        for piece in _pieces(generation.generate(model.module, ids, how, blocks.vocabulary), speaks, made):
            on_text(piece)
    return GenerationDocument(
        student=student,
        model=model.card.model.label,
        fingerprint=model.card.fingerprint,
        prompt=prompt,
        text=speaks.decode(made),
        prompt_tokens=len(ids),
        tokens=len(made),
        ended="text" if len(made) < how.tokens else "tokens",
        temperature=how.temperature,
        top_p=how.top_p,
        seed=how.seed,
        device=device,
        seconds=round(time.monotonic() - started, 3),
    )


def text_of(model: Served, tokenizer: str | None) -> recipe.Text:
    """How text becomes the ids of a language model.

    Args:
        tokenizer: a folder, or a name on the hub, if one was given.

    Raises:
        RefusedError: nobody knows.
    """
    blocks = _blocks_of(model)
    if tokenizer is not None:
        local = expanded(tokenizer)
        return _of_folder(local) if local.is_dir() else recipe.HuggingFaceText(name=tokenizer)
    if (found := folder_text(model)) is not None:
        return found
    if blocks.vocabulary == ByteTokenizer.tokens.vocabulary:
        return recipe.ByteText()
    raise RefusedError(
        f"nobody knows the tokenizer of {model.home.uri}",
        got="no tokenizer_config.json beside the model, and no run around it",
        expected=f"a tokenizer of {blocks.vocabulary:,} tokens",
        next="name its folder with --tokenizer",
    )


def folder_text(model: Served) -> recipe.Text | None:
    """How text becomes ids by the recipe of a model's run, or by the tokenizer beside it; None where neither is."""
    if model.home.run is not None and model.home.run.data.text is not None:
        return model.home.run.data.text
    folder = Path(model.home.uri)
    return _of_folder(folder) if (folder / "tokenizer_config.json").is_file() else None


def _of_folder(folder: Path) -> recipe.Text:
    return recipe.HuggingFaceText(path=str(folder))


def _blocks_of(model: Served) -> Blocks:
    if model.card.blocks is None:
        raise RefusedError(
            f"the model {model.home.uri} continues no text",
            got=f"the model {model.card.model.label}, for {model.card.task}",
            expected="a language model",
            next="choose a model of kind causal_lm or huggingface_lm",
        )
    return model.card.blocks


def _pieces(tokens: Iterable[int], speaks: PromptTokenizer, made: list[int]) -> Iterator[str]:
    """What each token adds to the text. Half a character waits for its other bytes, as long as there can be any.

    Args:
        made: where tokens are kept.
    """
    shown, waiting = "", 0
    for token in tokens:
        made.append(token)
        text = speaks.decode(made)
        waiting = waiting + 1 if text.endswith(_CUT) else 0
        if 0 < waiting < _LONGEST_CHARACTER or len(text) <= len(shown):
            continue
        yield text[len(shown) :]
        shown = text
    if len(rest := speaks.decode(made)) > len(shown):
        yield rest[len(shown) :]
