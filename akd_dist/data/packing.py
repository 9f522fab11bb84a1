"""Documents -> blocks of one length: where each document's tokens go, and blocks cut from that.

A block is int32 [3, length]: ids, segments, and which positions are targets. Segments number the documents of a block
from 0; padding is a segment of its own, behind them. A position is a target where the next one is in the same segment
and is to be learnt: its logits are about that next token. Nothing else shifts labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IDS, SEGMENTS, TARGETS = 0, 1, 2
"""The channels of a block."""
# So many blocks are open at a time while chats are packed: more would fill blocks hardly better, and have tasks read
# chats that lie far apart.
_OPEN_BLOCKS = 64


@dataclass(frozen=True)
class Layout:
    """Where the tokens of documents go, in the order of their places."""

    length: int
    """Tokens of a block."""
    blocks: int
    """How many blocks there are."""
    documents: np.ndarray
    """Which document, int64 [n]: its row in the source. Those without tokens are not among them."""
    starts: np.ndarray
    """Where its first token goes, counted through all blocks: int64 [n], ascending."""
    counts: np.ndarray
    """How many tokens it has, int64 [n]; what lies behind the last block is left out."""

    def part(self, first: int, last: int) -> Layout:
        """The layout of blocks first..last - 1, whose places begin at the first of them: that of a document that
        begins before it is negative.
        """
        begin, end = first * self.length, last * self.length
        # Documents follow each other, so that ends ascend as starts do.
        here = slice(
            int(np.searchsorted(self.starts + self.counts, begin, side="right")), int(np.searchsorted(self.starts, end))
        )
        return Layout(self.length, last - first, self.documents[here], self.starts[here] - begin, self.counts[here])


def flow(documents: np.ndarray, counts: np.ndarray, length: int, *, pad: bool) -> Layout:
    """One document behind the other, through all blocks.

    Args:
        documents: the rows of the source, int64 [n], in their order.
        counts: the tokens of each, int64 [n].
        length: tokens of a block.
        pad: whether tokens that fill no block get one that is filled up; else they are left out.
    """
    documents, counts = _with_tokens(documents, counts)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    blocks = -(-total // length) if pad else total // length
    starts = ends - counts
    kept = starts < blocks * length
    return Layout(length, blocks, documents[kept], starts[kept], counts[kept])


def first_fit(documents: np.ndarray, counts: np.ndarray, length: int) -> Layout:
    """Each document whole, in the first block that has room for it, of those that are open; what is left is padding.

    The first of _OPEN_BLOCKS that are open is closed where none has room: so a block's documents lie near each other.

    Args:
        documents, length: as of `flow`.
        counts: the tokens of each, int64 [n], at most `length`.
    """
    documents, counts = _with_tokens(documents, counts)
    places = np.empty(len(counts), dtype=np.int64)
    filled, first = np.zeros(_OPEN_BLOCKS, dtype=np.int64), 0  # of the open blocks, in their order
    opened = 0
    for number, count in enumerate(counts.tolist()):
        fits = np.flatnonzero(filled[:opened] + count <= length)
        if len(fits):
            at = int(fits[0])
        else:
            if opened == _OPEN_BLOCKS:
                filled = np.append(filled[1:], 0)
                first, opened = first + 1, opened - 1
            at, opened = opened, opened + 1
        places[number] = (first + at) * length + filled[at]
        filled[at] += count
    order = np.argsort(places, kind="stable")
    return Layout(length, first + opened, documents[order], places[order], counts[order])


def _with_tokens(documents: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = counts > 0
    return documents[there], counts[there].astype(np.int64)


def cut(layout: Layout, tokens_of: Callable[[int], np.ndarray], padding: int) -> np.ndarray:
    """The blocks of a layout, int32 [blocks, 3, length].

    Args:
        layout: as `flow` and `first_fit` give it, or a part.
        tokens_of: the ids of the n-th document of the layout, int32; ~id of those that are not to be learnt.
        padding: the id that fills blocks up.
    """
    size = layout.blocks * layout.length
    ids, learnt = np.full(size, padding, dtype=np.int32), np.zeros(size, dtype=np.bool_)
    document = np.full(size, len(layout.starts), dtype=np.int32)
    for number, start in enumerate(layout.starts.tolist()):
        tokens = tokens_of(number)[max(-start, 0) : size - start]
        here = slice(max(start, 0), max(start, 0) + len(tokens))
        ids[here] = np.where(tokens < 0, ~tokens, tokens)
        learnt[here] = tokens >= 0
        document[here] = number
    blocks = np.empty((layout.blocks, 3, layout.length), dtype=np.int32)
    blocks[:, IDS] = ids.reshape(layout.blocks, layout.length)
    blocks[:, SEGMENTS] = _segments(document.reshape(layout.blocks, layout.length), len(layout.starts))
    same = blocks[:, SEGMENTS, 1:] == blocks[:, SEGMENTS, :-1]
    blocks[:, TARGETS, :-1] = same & learnt.reshape(layout.blocks, layout.length)[:, 1:]
    blocks[:, TARGETS, -1] = 0
    return blocks


def _segments(document: np.ndarray, none: int) -> np.ndarray:
    """Documents numbered within their blocks, and the padding of each as one more; int32 [blocks, length].

    Args:
        document: that of each token, ascending within a block.
        none: the number that stands for padding.
    """
    padding = document == none
    # A block begins with a token, so its largest number but that of padding is there.
    last = np.where(padding, -1, document).max(axis=1, keepdims=True, initial=0)
    numbers: np.ndarray = np.where(padding, last + 1, document) - document[:, :1]
    return numbers


def target_counts(blocks: np.ndarray) -> np.ndarray:
    """How many targets each block has, int64 [blocks].

    Args:
        blocks: int32 [blocks, 3, length].
    """
    counts: np.ndarray = blocks[:, TARGETS].sum(axis=1, dtype=np.int64)
    return counts
