"""Blocks of a language model as files of a node: documents are tokenized once, and blocks cut from their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.data.documents import Counted, OpenedDocuments, count_documents
from akd_dist.data.packed import assigned_to, findings_of, layouts_of
from akd_dist.data.packing import Layout, cut, target_counts
from akd_dist.data.row_files import RowsFile, names_of
from akd_dist.data.splitting import LEFT_OUT, source_of_split

# Bytes of blocks that are cut at a time, if more than one.
_CUT_BYTES = 1 << 22


@dataclass(frozen=True)
class Tokenized:
    """The tokens of all documents of the sources, in files, and where they go."""

    folder: Path
    layouts: dict[str, Layout]
    counted: dict[str, Counted]
    lines: list[str]
    """What users should know of them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, and of what is said of each."""
        return sum(one.blocks * (3 * one.length * 4 + 8) for one in self.layouts.values())


def tokenize(
    data: recipe.DataSpec,
    readings: Mapping[str, OpenedDocuments],
    folder: Path,
    tell: Callable[[str, int, int], None],
) -> Tokenized:
    """Tokenize the documents of all splits into files of a folder, a few at a time.

    Raises:
        RefusedError: names the first row that is wrong; or the documents of a split fill no block.
        OSError: the folder cannot be written.
    """
    assigned, counted = assigned_to(data, readings), {}
    for name, reading in readings.items():
        with open(_file(folder, name), "wb") as file:

            def write(found: list[np.ndarray], file: Any = file) -> None:
                file.write(np.concatenate(found).astype("<i4", copy=False).tobytes())

            def told(done: int, total: int, name: str = name) -> None:
                tell(f"the documents of data.{name}", done, total)

            counted[name] = count_documents(name, reading, assigned[name] != LEFT_OUT, told, write)
    layouts = layouts_of(data, assigned, counted)
    return Tokenized(folder, layouts, counted, findings_of(data, layouts, counted))


def write_blocks(
    data: recipe.DataSpec,
    tokenized: Tokenized,
    reading: OpenedDocuments,
    tell: Callable[[str, int, int], None],
) -> None:
    """Write the blocks of all splits, with their numbers of targets in place of labels; and remove the tokens.

    Raises:
        OSError: the folder cannot be written.
    """
    inputs = reading.documents
    for split, layout in tokenized.layouts.items():
        name = source_of_split(data, split)
        tokens, ends = _tokens(tokenized, name), np.cumsum(tokenized.counted[name].counts)
        file = RowsFile(names_of(tokenized.folder, split, encoded=False), layout.blocks, inputs)
        targets = []
        try:
            step = max(1, _CUT_BYTES // (3 * layout.length * 4))
            for first in range(0, layout.blocks, step):
                part = layout.part(first, min(first + step, layout.blocks))
                after = ends[part.documents]
                begin = after - part.counts

                def tokens_of(number: int, tokens: Any = tokens, begin: Any = begin, after: Any = after) -> np.ndarray:
                    return np.asarray(tokens[begin[number] : after[number]])

                blocks = cut(part, tokens_of, inputs.tokens.padding)
                file.write(blocks)
                targets.append(target_counts(blocks))
                tell(f"the blocks of {split}", first + part.blocks, layout.blocks)
            file.finish(np.concatenate(targets))
        finally:
            file.close()
    for name in tokenized.counted:
        _file(tokenized.folder, name).unlink()


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.tokens"


def _tokens(tokenized: Tokenized, name: str) -> np.ndarray:
    return np.memmap(_file(tokenized.folder, name), dtype="<i4", mode="r")
