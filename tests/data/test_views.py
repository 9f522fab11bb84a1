"""Views are pure functions of (seed, row, view), and what each kind shows is what a slow plain loop makes of it."""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional

from akd_dist.base.errors import RefusedError
from akd_dist.data import augmenters
from akd_dist.data.philox import philox4x32, random_words
from akd_dist.data.text import Tokens
from akd_dist.data.views import SAMPLED, apply, check_augmentation, draw, view_digests, view_of
from akd_dist.recipe import (
    Augmentation,
    CustomAugmentation,
    NoAugmentation,
    PadCropFlip,
    RandomResizedCropFlip,
    Shift,
    TokenMask,
)
from tests import fleets

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


TOKENS = Tokens(vocabulary=50, padding=1, mask=4, special=(0, 1, 2))
IMAGES = np.random.default_rng(0).integers(0, 256, (200, 2, 6, 7), dtype=np.uint8)
IDS = np.random.default_rng(1).integers(0, 50, (200, 9), dtype=np.int32)
KINDS: dict[str, tuple[Augmentation, np.ndarray]] = {
    "none": (NoAugmentation(), IMAGES),
    "shift": (Shift(pixels=2), IMAGES),
    "pad_crop_flip": (PadCropFlip(pixels=3), IMAGES),
    "random_resized_crop_flip": (RandomResizedCropFlip(), IMAGES),
    "random_resized_crop_flip of floats": (RandomResizedCropFlip(), IMAGES.astype(np.float32) / np.float32(7)),
    "token_mask": (TokenMask(share=0.4), IDS),
    "token_mask with types": (TokenMask(share=0.4), np.stack([IDS, IDS % 2], axis=1)),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 500), st.lists(st.integers(0, 199), min_size=1, max_size=30))
def test_a_row_looks_the_same_in_every_batch(kind: str, seed: int, view: int, picked: list[int]) -> None:
    augmentation, inputs = KINDS[kind]
    rows = np.array(picked)
    together = view_of(augmentation, seed, inputs[rows], rows, view, TOKENS)
    alone = [view_of(augmentation, seed, inputs[[row]], np.array([row]), view, TOKENS) for row in picked]
    assert torch.equal(together, torch.cat(alone))
    assert together.numpy().dtype == inputs.dtype
    assert together.is_contiguous()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_views_differ_by_seed_row_and_view(kind: str) -> None:
    augmentation, inputs = KINDS[kind]
    same = inputs[[0]].repeat(40, axis=0)
    seen = [
        view_of(augmentation, seed, same, first + np.arange(40), view, TOKENS)
        for seed, first, view in ((0, 0, 0), (1, 0, 0), (0, 2**40, 0), (0, 0, 1))
    ]
    assert not any(torch.equal(one, other) for place, one in enumerate(seen) for other in seen[:place])
    assert len({one.numpy().tobytes() for one in seen[0]}) > 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_made_on_the_device_that_wants_it(kind: str) -> None:
    """The `meta` device stands for an accelerator: a tensor left on the CPU does not mix with one of its own."""
    augmentation, inputs = KINDS[kind]
    seen = view_of(augmentation, 0, inputs[:20], np.arange(20), 0, TOKENS, device="meta")
    assert (seen.device.type, seen.shape) == ("meta", inputs[:20].shape)
    if torch.cuda.is_available():
        there = view_of(augmentation, 0, inputs, np.arange(200), 0, TOKENS, device="cuda")
        assert torch.equal(there.cpu(), view_of(augmentation, 0, inputs, np.arange(200), 0, TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_no_rows_is_shown_as_none(kind: str) -> None:
    augmentation, inputs = KINDS[kind]
    seen = view_of(augmentation, 0, inputs[:0], np.arange(0), 0, TOKENS)
    assert seen.shape == inputs[:0].shape
    assert seen.numpy().dtype == inputs.dtype


def test_more_words_begin_with_the_same() -> None:
    rows = np.array([0, 5, 2**33])
    many = random_words(3, rows, 7, 11)
    assert many.shape == (3, 11)
    for fewer in (0, 1, 4, 5, 10):
        np.testing.assert_array_equal(random_words(3, rows, 7, fewer), many[:, :fewer])
    assert len(set(many.ravel().tolist())) == 33


def test_the_views_are_pinned() -> None:
    """A change of these numbers would make every store's views another thing than its students see."""
    for augmentation, pinned in PINNED.items():
        params = draw(augmentation, 7, np.arange(8), 3, (1, 8, 8))
        assert {name: values.astype(int).tolist() for name, values in params.items()} == pinned
    chosen = draw(TokenMask(share=0.5), 7, np.arange(2), 3, (10,), TOKENS)["chosen"]
    assert ["".join(".x"[one] for one in row) for row in chosen.astype(int)] == PINNED_TOKENS


PINNED: dict[Augmentation, dict[str, list[int]]] = {
    Shift(pixels=2): {"down": [0, 0, -1, -1, 1, 2, -1, 2], "right": [-2, 0, 2, 0, 0, 0, 2, 1]},
    PadCropFlip(pixels=2): {
        "top": [2, 2, 1, 1, 3, 4, 1, 4],
        "left": [0, 2, 4, 2, 2, 2, 4, 3],
        "flip": [0, 0, 0, 0, 1, 1, 0, 0],
    },
    RandomResizedCropFlip(scale=(0.1, 1.0)): {
        "top": [0, 0, 1, 1, 2, 1, 0, 0],
        "left": [1, 1, 1, 0, 1, 0, 1, 0],
        "height": [7, 6, 5, 5, 6, 7, 5, 8],
        "width": [6, 6, 6, 6, 6, 7, 6, 8],
        "flip": [1, 1, 1, 1, 0, 0, 1, 1],
    },
}
PINNED_TOKENS = [".xx..xxx..", ".xx......x"]


# ---- each kind against a slow plain loop


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("pixels", "flip"), [(1, True), (4, True), (4, False)])
def test_pad_crop_flip_is_padding_then_cropping_then_flipping(dtype: Any, pixels: int, flip: bool) -> None:
    augmentation = PadCropFlip(pixels=pixels, flip=flip)
    images = np.random.default_rng(0).integers(1, 256, (60, 3, 5, 8)).astype(dtype)
    params = draw(augmentation, 0, np.arange(60), 1, (3, 5, 8))
    seen = apply(augmentation, torch.from_numpy(images), params).numpy()
    for row, image in enumerate(images):
        padded = np.pad(image, ((0, 0), (pixels, pixels), (pixels, pixels)))
        top, left = params["top"][row], params["left"][row]
        cropped = padded[:, top : top + 5, left : left + 8]
        np.testing.assert_array_equal(seen[row], cropped[:, :, ::-1] if params["flip"][row] else cropped)
    assert params["flip"].any() == flip


def test_pad_crop_flip_crops_everywhere_alike_and_flips_half() -> None:
    n = 40_000
    params = draw(PadCropFlip(pixels=2), 1, np.arange(n), 0, (1, 8, 8))
    places, counts = np.unique(np.stack([*params.values()]), axis=1, return_counts=True)
    assert places.shape == (3, 5 * 5 * 2)
    assert places.max(axis=1).tolist() == [4, 4, 1]
    assert np.abs(counts - n / 50).max() < 5 * math.sqrt(n / 50)  # 5 standard deviations


def resized(image: np.ndarray, top: int, left: int, height: int, width: int, flip: bool) -> np.ndarray:
    """A part of an image [c, h, w] stretched to all of it, pixel by pixel, in fractions of 2048."""
    channels, full_height, full_width = image.shape
    whole = image.dtype == np.uint8
    shown = np.empty_like(image)

    def between(place: int, size: int, length: int) -> tuple[int, int, int]:
        position = min(max((2 * place + 1) * length - size, 0) * 2048 // (2 * size), (length - 1) * 2048)
        return position // 2048, min(position // 2048 + 1, length - 1), position % 2048

    for y in range(full_height):
        above, below, down = between(y, full_height, height)
        for x in range(full_width):
            before, after, right = between(full_width - 1 - x if flip else x, full_width, width)
            for channel in range(channels):
                part = image[channel, top : top + height, left : left + width]
                corners = part[above, before], part[below, before], part[above, after], part[below, after]
                if whole:
                    a, b, c, d = map(int, corners)
                    near, far = a * (2048 - down) + b * down, c * (2048 - down) + d * down
                    shown[channel, y, x] = (near * (2048 - right) + far * right + 2**21) >> 22
                else:
                    one, share, along = np.float32(1), np.float32(down / 2048), np.float32(right / 2048)
                    a, b, c, d = corners
                    near, far = a * (one - share) + b * share, c * (one - share) + d * share
                    shown[channel, y, x] = near * (one - along) + far * along
    return shown


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(2, 6, 9), (1, 8, 8), (3, 1, 5)], ids=str)
def test_random_resized_crop_flip_is_interpolation_of_the_part(dtype: Any, shape: tuple[int, ...]) -> None:
    augmentation = RandomResizedCropFlip(scale=(0.05, 1.0))
    images = np.random.default_rng(0).integers(0, 256, (30, *shape)).astype(dtype)
    params = draw(augmentation, 0, np.arange(30), 1, shape)
    seen = apply(augmentation, torch.from_numpy(images), params).numpy()
    for row, image in enumerate(images):
        np.testing.assert_array_equal(seen[row], resized(image, **{name: params[name][row] for name in params}))


def test_resizing_agrees_with_torch_up_to_its_rounding() -> None:
    augmentation = RandomResizedCropFlip()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (100, 3, 32, 32), dtype=np.uint8))
    params = draw(augmentation, 0, np.arange(100), 0, (3, 32, 32))
    seen = apply(augmentation, images, params).float()
    for row in range(100):
        top, left, height, width, flip = (int(params[name][row]) for name in params)
        part = images[row : row + 1, :, top : top + height, left : left + width].float()
        expected = functional.interpolate(part, (32, 32), mode="bilinear", align_corners=False)[0]
        # Positions are cut to 1/2048 of a pixel, so a step of 255 may be off by an eighth, and rounding adds a half.
        assert (seen[row] - (expected.flip(2) if flip else expected)).abs().max() < 0.5 + 2 * 255 / 2048


def test_the_whole_image_is_left_as_it_is() -> None:
    augmentation = RandomResizedCropFlip(scale=(1.0, 1.0), ratio=(0.5, 2.0), flip=False)
    for images in (IMAGES, IMAGES.astype(np.float32) / np.float32(255)):
        seen = view_of(augmentation, 0, images, np.arange(200), 0)
        np.testing.assert_array_equal(seen.numpy(), images)


def test_parts_have_the_areas_and_ratios_asked_for() -> None:
    n = 20_000
    augmentation = RandomResizedCropFlip(scale=(0.2, 0.6), ratio=(0.5, 2.0))
    params = draw(augmentation, 0, np.arange(n), 0, (3, 400, 400))
    area = params["height"] * params["width"] / 400**2
    logarithm = np.log2(params["width"] / params["height"])
    assert 0.2 - 0.005 < area.min() < 0.205
    assert 0.595 < area.max() < 0.6 + 0.005
    assert abs(area.mean() - 0.4) < 5 * 0.4 / math.sqrt(12 * n)
    shares = np.histogram(area, 8, (0.2, 0.6))[0]
    assert np.abs(shares - n / 8).max() < 5 * math.sqrt(n / 8)
    # Below half of the area every ratio fits, and its logarithm is uniform.
    free = logarithm[area < 0.49]
    counts = np.histogram(free, 8, (-1, 1))[0]
    assert np.abs(counts - len(free) / 8).max() < 5 * math.sqrt(len(free) / 8) + 0.01 * len(free) / 8
    assert np.abs(logarithm).max() < 1.02
    assert abs(params["flip"].mean() - 0.5) < 0.02
    room = 400 - params["height"]
    assert (params["top"] >= 0).all()
    assert (params["top"] <= room).all()
    assert abs((params["top"] / np.maximum(room, 1)).mean() - 0.5) < 0.02
    assert (params["left"] + params["width"] <= 400).all()


def test_parts_fit_into_long_images() -> None:
    for shape in ((1, 4, 200), (1, 200, 4), (1, 1, 1)):
        params = draw(RandomResizedCropFlip(), 0, np.arange(500), 0, shape)
        for start, size, whole in (("top", "height", shape[1]), ("left", "width", shape[2])):
            assert (params[size] >= 1).all()
            assert (params[start] >= 0).all()
            assert (params[start] + params[size] <= whole).all()


@pytest.mark.parametrize("types", [False, True])
def test_token_mask_replaces_tokens_that_are_not_special(types: bool) -> None:
    augmentation = TokenMask(share=0.3)
    inputs = np.stack([IDS, IDS % 2], axis=1) if types else IDS
    params = draw(augmentation, 0, np.arange(200), 1, inputs.shape[1:], TOKENS)
    seen = apply(augmentation, torch.from_numpy(inputs), params, TOKENS).numpy()
    ids = seen[:, 0] if types else seen
    for row in range(200):
        for place in range(9):
            masked = params["chosen"][row, place] and IDS[row, place] not in (0, 1, 2)
            assert ids[row, place] == (4 if masked else IDS[row, place])
    if types:
        np.testing.assert_array_equal(seen[:, 1], IDS % 2)


def test_tokens_are_masked_at_the_rate_asked_for() -> None:
    ids = np.full((400, 100), 7, dtype=np.int32)
    for share in (0.15, 0.5):
        seen = view_of(TokenMask(share=share), 0, ids, np.arange(400), 0, TOKENS).numpy()
        assert abs((seen == 4).mean() - share) < 5 * math.sqrt(share * (1 - share) / ids.size)
        assert ((seen == 4).mean(axis=0) > 0).all()


# ---- a user's own

OWN = """
import numpy as np, torch

class Dim:
    words = 1
    def __init__(self, least): self.least = least
    def draw(self, words, input_shape):
        return {"by": (self.least + (1 - self.least) * words[:, 0] / 2**32).astype(np.float32)}
    def apply(self, batch, params):
        return (batch * params["by"].view(-1, 1, 1, 1)).to(batch.dtype)

class Broken(Dim):
    def __init__(self, **change): self.least = 0.5; vars(self).update(change)

def dim(least=0.5): return Dim(least)
def no_apply():
    return type("Half", (), {"words": 1, "draw": None})()
def no_count():
    return type("Odd", (Dim,), {"words": 1.5})(0.5)
def raising(): raise ValueError("a mistake in the factory")
def bad_draw(): return Broken(draw=lambda words, shape: [1] / 0)
def list_draw(): return Broken(draw=lambda words, shape: {"by": [1]})
def short_draw(): return Broken(draw=lambda words, shape: {"by": words[:1, 0]})
def bad_apply(): return Broken(apply=lambda batch, params: batch.no_such_thing)
def other_dtype(): return Broken(apply=lambda batch, params: batch.float())
def other_shape(): return Broken(apply=lambda batch, params: batch[:, :, 1:])
def nothing(): return Broken(apply=lambda batch, params: None)
def mixing(): return Broken(apply=lambda batch, params: batch.roll(1, 0))
def moody(): return Broken(apply=lambda batch, params: torch.randint_like(batch, 256))
def not_a_number(): return Broken(apply=lambda batch, params: batch * torch.nan)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Names a factory in a user's module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_views.py").write_text(OWN)

    def named(name: str, **arguments: Any) -> CustomAugmentation:
        return fleets.own(CustomAugmentation(factory=f"own_views:{name}", arguments=arguments), tmp_path)

    yield named
    sys.modules.pop("own_views", None)
    augmenters._custom.cache_clear()


def test_a_users_own_augmentation_draws_and_applies(own: Any) -> None:
    seen = view_of(own("dim", least=0.25), 3, IMAGES, np.arange(200), 2)
    share = 0.25 + 0.75 * random_words(3, np.arange(200), 2, 1)[:, 0] / 2**32
    expected = (IMAGES * share.astype(np.float32).reshape(-1, 1, 1, 1)).astype(np.uint8)
    np.testing.assert_array_equal(seen.numpy(), expected)
    assert not torch.equal(seen, view_of(own("dim"), 3, IMAGES, np.arange(200), 2))
    check_augmentation(own("dim"), 0, IMAGES)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_apply", "a Half without draw and apply"),
        ("no_count", "a Odd of words 1.5"),
        ("raising", "a mistake in the factory"),
        ("bad_draw", "unsupported operand"),
        ("list_draw", "by: a list"),
        ("short_draw", r"by: uint32 \[1\]"),
        ("bad_apply", "no_such_thing"),
        ("other_dtype", r"torch.float32 \[4, 2, 6, 7\]"),
        ("other_shape", r"torch.uint8 \[4, 2, 5, 7\]"),
        ("nothing", "a NoneType"),
        ("mixing", "other pixels for a row in a batch"),
        ("moody", "other pixels for a row in a batch"),
        ("unheard_of", "no similar name"),
    ],
)
def test_an_augmentation_that_is_none_is_refused(own: Any, name: str, told: str) -> None:
    with pytest.raises(RefusedError) as refused:
        check_augmentation(own(name), 0, IMAGES)
    assert re.search(told, str(refused.value.got)), refused.value
    assert name in str(refused.value)
    if name in ("raising", "bad_draw", "bad_apply"):
        assert "own_views.py" in str(refused.value.got)


def test_a_view_that_is_not_finite_is_refused_with_its_row(own: Any) -> None:
    with pytest.raises(RefusedError, match="view 2 of row 5 holds NaN or infinity"):
        view_digests(own("not_a_number"), 0, IMAGES.astype(np.float32), [5, 6], 2)
    with pytest.raises(RefusedError, match="view 0 of row 0 holds NaN or infinity"):
        check_augmentation(own("not_a_number"), 0, IMAGES.astype(np.float32))


# ---- what does not fit


def test_no_augmentation_leaves_the_batch_untouched() -> None:
    inputs = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert draw(NoAugmentation(), 0, np.arange(4), 5, (3,)) == {}
    assert torch.equal(view_of(NoAugmentation(), 0, inputs, np.arange(4), 5), torch.from_numpy(inputs))


def test_a_probe_changes_with_pixels_seed_and_view() -> None:
    inputs = np.random.default_rng(0).integers(0, 256, (20, 1, 6, 6), dtype=np.uint8)
    seen = view_digests(Shift(), 0, inputs, [3, 17], 1)
    assert [one.row for one in seen] == [3, 17]
    assert seen == view_digests(Shift(), 0, inputs, np.array([3, 17]), 1)
    changed = inputs.copy()
    changed[3, 0, 3, 3] ^= 1
    now = view_digests(Shift(), 0, changed, [3, 17], 1)
    assert [one.sha256 == two.sha256 for one, two in zip(seen, now, strict=True)] == [False, True]
    others = [view_digests(Shift(), seed, inputs, range(20), view) for seed, view in ((0, 1), (0, 2), (1, 1))]
    assert len({str(other) for other in others}) == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int32])
@pytest.mark.parametrize("size", [1, 3, SAMPLED, 100, 3072])
def test_a_probe_keeps_evenly_spaced_values(dtype: Any, size: int) -> None:
    inputs = np.arange(size, dtype=np.int64).astype(dtype)[np.newaxis]
    (seen,) = view_digests(NoAugmentation(), 0, inputs, [0], 0)
    assert seen.sample is not None
    places = [number * size // min(size, SAMPLED) for number in range(min(size, SAMPLED))]
    assert seen.sample == inputs[0, places].tolist()
    assert all(type(value) is (float if dtype is np.float32 else int) for value in seen.sample)


@pytest.mark.parametrize(
    ("shape", "message"), [((64,), "needs images"), ((1, 3, 8), "out of sight")], ids=["vector", "small"]
)
@pytest.mark.parametrize("augmentation", [Shift(pixels=3), PadCropFlip(pixels=3)], ids=lambda one: str(one.kind))
def test_a_move_that_does_not_fit_is_refused(augmentation: Augmentation, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(RefusedError, match=f"the {augmentation.kind} augmentation .*{message}"):
        draw(augmentation, 0, np.arange(2), 0, shape)


def test_resizing_needs_images() -> None:
    with pytest.raises(RefusedError, match="random_resized_crop_flip augmentation needs images"):
        check_augmentation(RandomResizedCropFlip(), 0, np.zeros((5, 64), dtype=np.float32))


@pytest.mark.parametrize(
    ("tokens", "inputs", "message"),
    [
        (None, IDS, "needs text"),
        (TOKENS, IMAGES, "needs text"),
        (TOKENS.model_copy(update={"mask": None}), IDS, "needs a tokenizer that has a mask"),
    ],
    ids=["numbers", "images", "no mask"],
)
def test_masking_needs_text_and_a_mask(tokens: Tokens | None, inputs: np.ndarray, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        check_augmentation(TokenMask(), 0, inputs, tokens)
