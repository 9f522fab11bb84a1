"""Views: augmentation as a pure function of (data seed, row, view), the same on every machine and in every batch order.

The random numbers are counter-based: a row's draw is a hash of its number, so nothing depends on the rows before it.
A store row is the teacher's answer to one view of one row; a student replays that very view.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn import functional

from akd_dist.recipe import Augmentation, NoAugmentation, Shift
from akd_dist.storage.errors import RefusedError
from akd_dist.storage.files import sha256

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: four random words for each counter.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11, section 4.3.

    Args:
        counter: uint32 [n, 4].
        key: uint32 [2].

    Returns:
        uint32 [n, 4]; the same on every machine and with every version of NumPy.
    """
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key.astype(np.uint64)
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> _32) ^ c1 ^ k0, second & _LOW, (first >> _32) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def random_words(seed: int, rows: np.ndarray, view: int) -> np.ndarray:
    """Four random words for each row of a view: int64 [n] -> uint32 [n, 4]."""
    counter = np.zeros((len(rows), 4), dtype=np.uint32)
    counter[:, 0] = rows & 0xFFFFFFFF
    counter[:, 1] = rows >> 32
    counter[:, 2] = view
    return philox4x32(counter, np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint32))


def draw(
    augmentation: Augmentation, seed: int, rows: np.ndarray, view: int, input_shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The augmentation's parameters for some rows of a view.

    Args:
        seed: the recipe's `data.seed`.
        rows: row numbers, int64 [n], in any order.
        view: 0-based view.
        input_shape: shape of one input.

    Returns:
        Named parameters: for a shift `down` and `right`, int64 [n], in pixels; none where there is no augmentation.

    Raises:
        RefusedError: the augmentation does not fit inputs of this shape.
    """
    match augmentation:
        case NoAugmentation():
            return {}
        case Shift(pixels=pixels):
            _check_image(input_shape, pixels)
            words = random_words(seed, rows, view)[:, :2].astype(np.uint64)
            # The high half of word * choices is uniform over the choices (Lemire, 2019, without the rejection step).
            steps = (words * np.uint64(2 * pixels + 1) >> _32).astype(np.int64) - pixels
            return {"down": steps[:, 0], "right": steps[:, 1]}
        case _:
            raise NotImplementedError(augmentation.kind)


def apply(augmentation: Augmentation, batch: torch.Tensor, params: dict[str, np.ndarray]) -> torch.Tensor:
    """The batch as its rows look in this view: [n, *shape] -> the same shape and dtype. What is shifted in is zero."""
    match augmentation:
        case NoAugmentation():
            return batch
        case Shift(pixels=pixels):
            return _shift(batch, torch.from_numpy(params["down"]), torch.from_numpy(params["right"]), pixels)
        case _:
            raise NotImplementedError(augmentation.kind)


def view_of(augmentation: Augmentation, seed: int, inputs: np.ndarray, rows: np.ndarray, view: int) -> torch.Tensor:
    """Inputs [n, *shape] of the given rows, int64 [n], as a view shows them: a tensor of the same shape and dtype."""
    batch = torch.from_numpy(inputs)
    return apply(augmentation, batch, draw(augmentation, seed, rows, view, inputs.shape[1:]))


def probe(
    augmentation: Augmentation, seed: int, inputs: np.ndarray, rows: Iterable[int], view: int
) -> list[tuple[int, str]]:
    """(row, sha256 of its pixels in this view) of a few rows of `inputs` [all rows, *shape], for readers to compare."""
    numbers = np.fromiter(rows, dtype=np.int64)
    pixels = view_of(augmentation, seed, np.take(inputs, numbers, axis=0), numbers, view).numpy()
    return [(int(row), sha256(one.tobytes())) for row, one in zip(numbers, pixels, strict=True)]


def _check_image(input_shape: tuple[int, ...], pixels: int) -> None:
    if len(input_shape) != 3:
        raise RefusedError(
            "the shift augmentation needs images",
            got=f"inputs of shape {list(input_shape)}",
            expected="shape [channels, height, width]",
            next="set data.augmentation to {kind: none}, or give data.train.shape",
        )
    if pixels >= min(input_shape[1:]):
        raise RefusedError(
            "the shift augmentation would move an image out of sight",
            got=f"pixels = {pixels} on images of {input_shape[1]} x {input_shape[2]}",
            expected="fewer pixels than the smaller side",
            next="lower data.augmentation.pixels",
        )


def _shift(batch: torch.Tensor, down: torch.Tensor, right: torch.Tensor, pixels: int) -> torch.Tensor:
    n, channels, height, width = batch.shape
    padded = functional.pad(batch, (pixels, pixels, pixels, pixels))
    row = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(channels).view(1, channels, 1, 1)
    y = torch.arange(height).view(1, 1, height, 1) + (pixels - down).view(n, 1, 1, 1)
    x = torch.arange(width).view(1, 1, 1, width) + (pixels - right).view(n, 1, 1, 1)
    return padded[row, channel, y, x]
