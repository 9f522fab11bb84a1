"""Texts to run a finished language model on: the blocks of a recipe's split, or documents of files, in batches.

A recipe's blocks are those that students were trained and measured on. Documents of files each stand for themselves:
every token but the first is a target, or of chats those that the recipe of the model's run would learn. A document that
is longer than the model's blocks goes through it in windows that overlap by a token, so that no target is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.data.blocks import Block, default_threads, map_blocks
from akd_dist.data.documents import OpenedDocuments, open_documents
from akd_dist.data.packing import IDS, SEGMENTS, TARGETS
from akd_dist.data.prepare import kinds_of
from akd_dist.data.row_cache import Progress, prepare
from akd_dist.data.rows import SPLITS, Rows
from akd_dist.data.tokenizers import LanguageTokenizer, check_same_meaning, language_tokenizer, token_bytes, used_ids
from akd_dist.models.card import blocks_of
from akd_dist.models.language import Blocks, LanguageModel
from akd_dist.serve.examples import DIGITS, DataRequest, recipe_path, refuse_options
from akd_dist.serve.generating import folder_text, text_of
from akd_dist.serve.served import Served

BATCH_TOKENS = 8192
"""Of the blocks that go through a model together, as while students are trained."""
WINDOW = 2048
"""The most tokens of a document that a model sees at once, where its blocks are longer than that."""
_READ_DOCUMENTS = 256
_UNCUT = 10**7  # the largest length that a recipe may name: chats are cut into windows here, and not before
Batch = tuple[np.ndarray, np.ndarray]
"""Which row each block is of, int64 [n], ascending; and blocks int32 [n, 3, length]. A row of files that is longer than
a block comes as several, each beginning with the last token of the one before; one without tokens does not come."""


@dataclass(frozen=True)
class Texts:
    """Rows to run language models on."""

    name: str
    """For messages and documents."""
    split: recipe.Split | None
    """Of a recipe."""
    rows: int
    """How many: blocks of a recipe, documents of files."""
    blocks: Blocks
    """What models are to take."""
    batches: Callable[[], Iterator[Batch]]
    """All rows in their order."""
    notes: Callable[[], Sequence[str]]
    """What a user should know of them, a line each; known once all batches are read."""
    tokenizer: LanguageTokenizer | None
    """What made their ids; None where it is not on this machine any more."""
    used: Callable[[], np.ndarray]
    """The ids that may occur, int64."""
    files: Callable[[int], str] | None = None
    """The file that a row comes from, where there are several."""

    @property
    def token_bytes(self) -> np.ndarray | None:
        """How many bytes of text each id stands for, int64 [vocabulary]; 0 of special ones, which are no text."""
        return None if self.tokenizer is None else token_bytes(self.tokenizer)

    def shown(self, what: str, on_progress: Progress | None, on_note: Callable[[str], None] | None) -> Iterator[Batch]:
        """The batches, each told of once it is done with; what is to be known of the texts is told at the end."""
        for owners, blocks in self.batches():
            yield owners, blocks
            if on_progress is not None:
                on_progress(what, int(owners[-1]) + 1, self.rows)
        if on_note is not None:
            for note in self.notes():
                on_note(note)

    def prepare(self, model: Served) -> None:
        """See that a model is for these texts, and have it take them.

        Raises:
            RefusedError: it is no language model, was made for another tokenizer or shorter blocks, or an id means
                something else to it.
        """
        what = f"the model {model.home.uri}"
        compared = model.card.blocks is not None and self._compared(model, model.card.blocks, what)
        model.card.on_blocks(self.blocks, what, compared=compared)
        assert isinstance(model.module, LanguageModel)
        model.module.attention = self.blocks.attention

    def _compared(self, model: Served, theirs: Blocks, what: str) -> bool:
        """Whether every id in use means the same to a model whose card does not say so, as far as that can be told."""
        if self.tokenizer is None or theirs.tokenizer == self.blocks.tokenizer:
            return False
        if (text := folder_text(model)) is None:
            return False
        check_same_meaning(self.tokenizer, language_tokenizer(text), self.used(), what)
        return True


def open_texts(asked: DataRequest, model: Served, cache_root: Path, *, on_progress: Progress | None = None) -> Texts:
    """The texts that a user names, for a model.

    Raises:
        RecipeError: options that do not go together.
        RefusedError: there are no such data, or nobody knows the model's tokenizer.
        MachineError: object storage, the hub or the disk does not do what it should.
    """
    if asked.label:
        raise RecipeError(
            "texts of language models have no labels but their own tokens", got=f"--label {asked.label}",
            expected="no --label", next="leave it out",
        )  # fmt: skip
    if (path := recipe_path(asked.data)) is not None:
        refuse_options(asked, "input", "tokenizer")
        return _of_recipe(path, asked, cache_root, on_progress)
    refuse_options(asked, "split")
    if asked.data == DIGITS:
        raise RefusedError(
            f"the model {model.home.uri} is one of texts, and digits are pictures",
            got="digits",
            expected="a recipe, or Parquet, JSON Lines or .txt files",
            next="name files with documents",
        )
    return _of_files(asked, model)


# ---- a recipe


def _of_recipe(path: Path, asked: DataRequest, cache_root: Path, on_progress: Progress | None) -> Texts:
    split: recipe.Split = asked.split or "test"
    if split not in SPLITS:
        raise RecipeError("there is no such split", got=split, expected=f"one of {', '.join(SPLITS)}")
    loaded = recipe.load_recipe(path)
    recipe.trust(loaded, asked.trusted().seen_from(f"the recipe {path}", loaded.folder))
    if loaded.data.task != "language_model":
        raise RefusedError(
            f"the rows of {path} are none of a language model",
            got=f"data.task: {loaded.data.task}",
            expected="data.task: language_model",
            next="name a recipe of documents or chats, or the files themselves",
        )
    splits = prepare(loaded.data, cache_root, on_progress=on_progress)
    rows: Rows = getattr(splits, split)

    def batches() -> Iterator[Batch]:
        splits.sources.begin()
        size = max(1, BATCH_TOKENS // rows.shape[-1])
        for start in range(0, len(rows), size):
            inputs, _ = rows.read(start, min(start + size, len(rows)))
            yield np.arange(start, start + len(inputs)), np.asarray(inputs)
        # At the end, when all rows were read: nothing is reported before that.
        rows.content().verify()
        splits.sources.finish()

    text, blocks = loaded.data.text, blocks_of(rows)
    tokenizer = None if text is None else language_tokenizer(text)
    if tokenizer is not None and tokenizer.tokens.tokenizer != blocks.tokenizer:
        tokenizer = None
    return Texts(
        asked.data,
        split,
        len(rows),
        blocks,
        batches,
        lambda: splits.findings,
        tokenizer,
        lambda: used_ids(rows.inputs, rows.classes),
    )


# ---- files


def _of_files(asked: DataRequest, model: Served) -> Texts:
    assert model.card.blocks is not None
    data = _as_recipe(asked, model)
    opened = open_documents(data, {"train": kinds_of(data)["train"]})["train"]
    assert data.text is not None
    tokenizer = language_tokenizer(data.text)
    length = min(model.card.blocks.length, WINDOW)
    blocks = Blocks(
        length=length,
        vocabulary=tokenizer.tokens.vocabulary,
        tokenizer=tokenizer.tokens.tokenizer or "",
        attention="block",  # each row is one document: who sees whom follows from places alone
        end_of_text=tokenizer.tokens.end_of_text,
    )
    padding = tokenizer.tokens.padding
    return Texts(
        asked.data,
        None,
        opened.source.rows,
        blocks,
        lambda: _batched(_windows(_read(opened), length), length, padding),
        lambda: [
            *opened.source.notes,
            *(line.replace(" of data.files", "") for line in opened.documents.notes("files")),
        ],
        tokenizer,
        lambda: np.arange(tokenizer.tokens.vocabulary),
        _files_of(opened),
    )


def _as_recipe(asked: DataRequest, model: Served) -> recipe.DataSpec:
    """The files as a recipe would name them: columns are called as in that of the model's run."""
    if len(asked.input) > 1:
        raise RecipeError(
            "documents lie in one column", got=", ".join(asked.input), expected="one --input", next="name one"
        )
    run = model.home.run
    sources = () if run is None else (run.data.test, run.data.train)
    known = next((one for one in sources if isinstance(one, recipe.TextData | recipe.ChatData)), None)
    known = known or recipe.TextData(path="")
    column = asked.input[0] if asked.input else known.input
    chats = run is not None and isinstance(known, recipe.ChatData)
    return recipe.DataSpec(
        task="language_model",
        train=known.model_copy(update={"path": asked.data, "input": column}),
        text=text_of(model, asked.tokenizer).model_copy(update={"length": _UNCUT}),
        scored=run.data.scored if run is not None and chats else "all",
    )


def _files_of(opened: OpenedDocuments) -> Callable[[int], str] | None:
    source = opened.source
    if source.file_starts is None or len(source.files) < 2:
        return None
    starts = source.file_starts
    return lambda row: source.files[int(np.searchsorted(starts, row, side="right")) - 1]


def _read(opened: OpenedDocuments) -> Iterator[tuple[int, np.ndarray]]:
    """Every row and its ids, int32 [tokens]: ~id of those that are not to be learnt."""

    def work(block: Block) -> tuple[np.ndarray, list[np.ndarray]]:
        return block.rows, opened.documents(block.inputs, block.rows)

    for rows, found in map_blocks(opened.source.blocks(_READ_DOCUMENTS), work, default_threads()):
        yield from zip(rows.tolist(), found, strict=True)


def _windows(documents: Iterator[tuple[int, np.ndarray]], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of documents of at most so many tokens, each beginning with the last one of the part before."""
    for row, ids in documents:
        for start in range(0, max(len(ids) - 1, min(len(ids), 1)), length - 1):
            yield row, ids[start : start + length]


def _batched(windows: Iterator[tuple[int, np.ndarray]], length: int, padding: int) -> Iterator[Batch]:
    """Windows as blocks, as many together as BATCH_TOKENS allow."""
    held: list[tuple[int, np.ndarray]] = []
    longest = 0
    for row, ids in windows:
        longest = max(longest, len(ids))
        if held and (len(held) + 1) * longest > BATCH_TOKENS:
            yield _as_blocks(held, padding)
            held, longest = [], len(ids)
        held.append((row, ids))
    if held:
        yield _as_blocks(held, padding)


def _as_blocks(held: list[tuple[int, np.ndarray]], padding: int) -> Batch:
    """Blocks of one document each, filled up at their end."""
    longest = max(2, *(len(ids) for _, ids in held), 2)
    blocks = np.zeros((len(held), 3, longest), np.int32)
    blocks[:, IDS], blocks[:, SEGMENTS] = padding, 1
    for block, (_, ids) in zip(blocks, held, strict=True):
        block[IDS, : len(ids)], block[SEGMENTS, : len(ids)] = np.where(ids < 0, ~ids, ids), 0
        block[TARGETS, : max(len(ids) - 1, 0)] = ids[1:] >= 0
    return np.array([row for row, _ in held], np.int64), blocks
