"""The blocks of each split of a language model: which documents are in it, and where their tokens go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data import findings
from akd_dist.data.documents import Counted, OpenedDocuments
from akd_dist.data.packing import Layout, first_fit, flow
from akd_dist.data.splitting import SPLITS, rows_of_split, source_of_split, split_of_source


def assigned_to(data: recipe.DataSpec, readings: Mapping[str, OpenedDocuments]) -> dict[str, np.ndarray]:
    """Which split each document of a source belongs to, as `split_of_source`: before anything is packed."""
    return {name: split_of_source(name, data, one.source, None) for name, one in readings.items()}


def layouts_of(
    data: recipe.DataSpec, assigned: Mapping[str, np.ndarray], counted: Mapping[str, Counted]
) -> dict[str, Layout]:
    """Where the documents of each split go.

    Args:
        assigned: as `assigned_to` gives it.
        counted: the documents of each source; of those that are left out of all splits nothing need be known.

    Raises:
        RefusedError: a split has no document, or not enough of them for a block.
    """
    found = {}
    for split in SPLITS:
        name = source_of_split(data, split)
        documents = rows_of_split(assigned[name], split)
        counts = counted[name].counts[documents]
        found[split] = _layout(data, split, documents, counts, counted[name].notes)
    return found


def _layout(
    data: recipe.DataSpec, split: str, documents: np.ndarray, counts: np.ndarray, notes: Sequence[str]
) -> Layout:
    assert data.text is not None
    chats = any(isinstance(source, recipe.ChatData) for source in data.sources.values())
    length, pad = data.text.length, chats or data.packing.remainder == "pad"
    layout = first_fit(documents, counts, length) if chats else flow(documents, counts, length, pad=pad)
    if not layout.blocks:
        raise RefusedError(
            f"the documents of {split} do not fill a block",
            got="; ".join([f"{int(counts.sum()):,} tokens in {len(documents):,} documents", *notes]),
            expected=f"at least {1 if pad else length:,} tokens",
            next="add documents, change the shares of data.validation and data.test, lower data.text.length, or set "
            "data.packing.remainder: pad",
        )
    return layout


def findings_of(data: recipe.DataSpec, layouts: Mapping[str, Layout], counted: Mapping[str, Counted]) -> list[str]:
    """What users should know of the blocks, a line each."""
    lines = [note for one in counted.values() for note in one.notes]
    for split, layout in layouts.items():
        tokens, room = int(layout.counts.sum()), layout.blocks * layout.length
        if tokens < room * 0.9:
            share = 1 - tokens / room
            held = f"{tokens:,} tokens in {layout.blocks:,} blocks"
            lines.append(f"{share:.0%} of the tokens of {split} are padding: {held}")
    hashes = {}
    for split, layout in layouts.items():
        hashes[split] = np.sort(counted[source_of_split(data, split)].hashes[layout.documents])
    return lines + findings.of_hashes(hashes)
