"""Documents become blocks: segments, targets, padding, and blocks of a part that are those of the whole."""

import numpy as np
import pytest

from akd_dist.data.packing import IDS, SEGMENTS, TARGETS, Layout, cut, first_fit, flow, target_counts

PAD = 99


def blocks_of(layout: Layout, documents: list[list[int]]) -> np.ndarray:
    def tokens_of(number: int) -> np.ndarray:
        return np.array(documents[layout.documents[number]], np.int32)

    return cut(layout, tokens_of, PAD)


def counts_of(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(documents)), np.array([len(one) for one in documents])


def test_documents_follow_each_other_and_the_rest_is_dropped() -> None:
    documents = [[1, 2, 3], [], [4, 5], [6, 7, 8, 9]]
    blocks = blocks_of(flow(*counts_of(documents), 4, pad=False), documents)
    assert blocks[:, IDS].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    # The second document runs on, and is the first of its block: segments begin anew in each.
    assert blocks[:, SEGMENTS].tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    # A position is a target where the next token is of the same document: never the last one of a block.
    assert blocks[:, TARGETS].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert blocks.dtype == np.int32
    assert target_counts(blocks).tolist() == [2, 2]


def test_the_rest_is_padded_where_that_is_asked_for() -> None:
    documents = [[1, 2, 3], [4, 5], [6]]
    blocks = blocks_of(flow(*counts_of(documents), 4, pad=True), documents)
    assert blocks[:, IDS].tolist() == [[1, 2, 3, 4], [5, 6, PAD, PAD]]
    assert blocks[:, SEGMENTS].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert blocks[:, TARGETS].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_padding_is_no_target_although_its_id_may_be_a_token() -> None:
    documents = [[1, PAD], [PAD, 2]]
    blocks = blocks_of(flow(*counts_of(documents), 8, pad=True), documents)
    assert blocks[0, TARGETS].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]


def test_a_document_longer_than_a_block_runs_over_several() -> None:
    documents = [list(range(1, 11))]
    blocks = blocks_of(flow(*counts_of(documents), 4, pad=True), documents)
    assert blocks[:, IDS].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, PAD, PAD]]
    assert blocks[:, SEGMENTS].tolist() == [[0] * 4, [0] * 4, [0, 0, 1, 1]]


def test_tokens_that_are_not_to_be_learnt_are_no_labels() -> None:
    documents = [[~1, ~2, 3, 4], [~5, 6]]
    blocks = blocks_of(flow(*counts_of(documents), 6, pad=False), documents)
    assert blocks[0, IDS].tolist() == [1, 2, 3, 4, 5, 6]
    assert blocks[0, TARGETS].tolist() == [0, 1, 1, 0, 1, 0]


def test_chats_stay_whole_in_the_first_block_with_room() -> None:
    documents = [[1] * 5, [2] * 4, [3] * 3, [4] * 4, [5]]
    layout = first_fit(*counts_of(documents), 8)
    assert layout.documents.tolist() == [0, 2, 1, 3, 4]
    blocks = blocks_of(layout, documents)
    assert blocks[:, IDS].tolist() == [[1] * 5 + [3] * 3, [2] * 4 + [4] * 4, [5] + [PAD] * 7]
    assert blocks[:, SEGMENTS].tolist() == [[0] * 5 + [1] * 3, [0] * 4 + [1] * 4, [0] + [1] * 7]


def test_few_blocks_are_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("akd_dist.data.packing._OPEN_BLOCKS", 2)
    documents = [[1] * 6, [2] * 6, [3] * 6, [4] * 2]
    layout = first_fit(*counts_of(documents), 8)
    # The first block is closed when the third is opened.
    assert layout.documents.tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize("pack", ["flow", "first_fit"])
def test_parts_are_those_of_the_whole(pack: str) -> None:
    """As tasks cut them that write a few blocks each."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 50, size).tolist() for size in random.integers(0, 17, 200)]
    numbers, counts = counts_of(documents)
    layout = flow(numbers, counts, 16, pad=True) if pack == "flow" else first_fit(numbers, counts, 16)
    whole = blocks_of(layout, documents)
    parts = [
        blocks_of(layout.part(first, min(first + 7, layout.blocks)), documents) for first in range(0, layout.blocks, 7)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    # Every token is there once, and all else is padding.
    assert (whole[:, IDS] != PAD).sum() == counts.sum()
