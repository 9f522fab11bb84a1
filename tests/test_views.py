"""Views are pure functions of (seed, row, view)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from akd_dist.recipe import NoAugmentation, Shift
from akd_dist.storage.errors import RefusedError
from akd_dist.views import apply, draw, philox4x32, probe, random_words, view_of

# Known answers of Random123 1.14, kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    got = philox4x32(words(counter)[np.newaxis], words(key))
    np.testing.assert_array_equal(got, words(expected)[np.newaxis])


def test_philox_is_vectorised_over_counters() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (50, 4), dtype=np.uint32)
    key = np.array([1, 2], dtype=np.uint32)
    one_by_one = np.concatenate([philox4x32(counter[np.newaxis], key) for counter in counters])
    np.testing.assert_array_equal(philox4x32(counters, key), one_by_one)


def test_words_depend_on_seed_row_and_view_up_to_their_high_bits() -> None:
    rows = np.array([0, 1, 2**32, 2**40])
    drawn = [random_words(seed, rows, view) for seed in (0, 1, 2**32) for view in (0, 1)]
    assert len({tuple(row) for words in drawn for row in words}) == 4 * 6


def test_shifts_are_uniform_and_independent_of_order() -> None:
    rows = np.arange(9000)
    params = draw(Shift(pixels=1), 3, rows, 2, (1, 8, 8))
    pairs, counts = np.unique(np.stack([params["down"], params["right"]]), axis=1, return_counts=True)
    assert pairs.shape == (2, 9)
    assert pairs.min() == -1
    assert pairs.max() == 1
    assert np.abs(counts - 1000).max() < 130  # 4 standard deviations
    shuffled = np.random.default_rng(0).permutation(rows)
    again = draw(Shift(pixels=1), 3, shuffled, 2, (1, 8, 8))
    np.testing.assert_array_equal(again["down"], params["down"][shuffled])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("pixels", [1, 3])
def test_shift_moves_images_and_fills_with_zeros(dtype: torch.dtype, pixels: int) -> None:
    batch = torch.arange(1, 40 * 2 * 5 * 6 + 1).remainder(250).add(1).reshape(40, 2, 5, 6).to(dtype)
    params = draw(Shift(pixels=pixels), 0, np.arange(40), 1, (2, 5, 6))
    shifted = apply(Shift(pixels=pixels), batch, params)
    assert shifted.dtype == dtype
    for row, (down, right) in enumerate(zip(params["down"], params["right"], strict=True)):
        expected = torch.zeros_like(batch[row])
        for y in range(5):
            for x in range(6):
                if 0 <= y - down < 5 and 0 <= x - right < 6:
                    expected[:, y, x] = batch[row, :, y - down, x - right]
        assert torch.equal(shifted[row], expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 500), st.lists(st.integers(0, 199), min_size=1, max_size=30))
def test_a_row_looks_the_same_in_every_batch(seed: int, view: int, picked: list[int]) -> None:
    inputs = np.random.default_rng(0).integers(0, 256, (200, 1, 6, 6), dtype=np.uint8)
    rows = np.array(picked)
    together = view_of(Shift(pixels=2), seed, inputs[rows], rows, view)
    alone = [view_of(Shift(pixels=2), seed, inputs[[row]], np.array([row]), view) for row in picked]
    assert torch.equal(together, torch.cat(alone))


def test_the_views_are_pinned() -> None:
    """A change of these numbers would make every store's views another thing than its students see."""
    params = draw(Shift(pixels=2), 7, np.arange(8), 3, (1, 8, 8))
    assert params["down"].tolist() == PINNED_DOWN
    assert params["right"].tolist() == PINNED_RIGHT


PINNED_DOWN = [0, 0, -1, -1, 1, 2, -1, 2]
PINNED_RIGHT = [-2, 0, 2, 0, 0, 0, 2, 1]


def test_no_augmentation_leaves_the_batch_untouched() -> None:
    inputs = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert draw(NoAugmentation(), 0, np.arange(4), 5, (3,)) == {}
    assert torch.equal(view_of(NoAugmentation(), 0, inputs, np.arange(4), 5), torch.from_numpy(inputs))


def test_a_probe_changes_with_pixels_seed_and_view() -> None:
    inputs = np.random.default_rng(0).integers(0, 256, (20, 1, 6, 6), dtype=np.uint8)
    seen = probe(Shift(), 0, inputs, [3, 17], 1)
    assert [row for row, _ in seen] == [3, 17]
    assert seen == probe(Shift(), 0, inputs, np.array([3, 17]), 1)
    changed = inputs.copy()
    changed[3, 0, 3, 3] ^= 1
    assert [one == two for one, two in zip(seen, probe(Shift(), 0, changed, [3, 17], 1), strict=True)] == [False, True]
    others = [probe(Shift(), seed, inputs, range(20), view) for seed, view in ((0, 1), (0, 2), (1, 1))]
    assert len({str(other) for other in others}) == 3


@pytest.mark.parametrize(
    ("shape", "message"), [((64,), "needs images"), ((1, 3, 8), "out of sight")], ids=["vector", "small"]
)
def test_a_shift_that_does_not_fit_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        draw(Shift(pixels=3), 0, np.arange(2), 0, shape)
