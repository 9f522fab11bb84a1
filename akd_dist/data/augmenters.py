"""Augmentations: what each draws for a row, and what it does to the pixels or tokens of a batch.

Draws are made by NumPy on the host, and applied by torch where the batch is: whole numbers alone, or float32 operations
of one rounding each, so that a CPU and a GPU show the same pixels, bit for bit.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from akd_dist.base.errors import AkdError, RefusedError
from akd_dist.base.tracebacks import whole
from akd_dist.base.trusted import Trusted
from akd_dist.data.factories import call_factory
from akd_dist.data.philox import WORD_BITS
from akd_dist.data.text import Tokens
from akd_dist.recipe import (
    Augmentation,
    CustomAugmentation,
    NoAugmentation,
    PadCropFlip,
    RandomResizedCropFlip,
    Shift,
    TokenMask,
    trust,
)

SIGNATURE = "(**arguments) -> an object with words, draw(words, input_shape) and apply(batch, params)"
# Weights of the interpolation are multiples of 2**-11: 255 times two of them still fits in int32.
_BITS = 11


class Augmenter(Protocol):
    """One kind of augmentation: how much chance a row takes, what is drawn from it, and how that is applied.

    A user's own (`CustomAugmentation`) has the same three members.
    """

    @property
    def words(self) -> int:
        """Random words of a row."""

    def draw(self, words: np.ndarray, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Parameters by name, [n, ...], from uint32 [n, words]: those of a row are a function of its own words.

        Raises:
            RefusedError: the augmentation does not fit inputs of this shape.
        """

    def apply(self, batch: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        """The batch [n, *input_shape] as its rows look, in the same shape and dtype and on the same device."""


def augmenter_of(augmentation: Augmentation, input_shape: tuple[int, ...], tokens: Tokens | None) -> Augmenter:
    """What draws and applies an augmentation to inputs of a shape.

    Raises:
        RefusedError: it does not fit such inputs, or the user's own cannot be made.
    """
    match augmentation:
        case NoAugmentation():
            return _Nothing()
        case Shift(pixels=pixels):
            return _Shift(pixels)
        case PadCropFlip(pixels=pixels, flip=flip):
            return _PadCropFlip(pixels, flip)
        case RandomResizedCropFlip(scale=scale, ratio=ratio, flip=flip):
            return ResizedCropFlip(scale, ratio, flip)
        case TokenMask(share=share):
            return _token_mask(share, input_shape, tokens)
        case CustomAugmentation():
            return _custom(augmentation.model_dump_json(), augmentation.trusted)


@dataclass(frozen=True)
class _Nothing:
    words = 0

    def draw(self, words: np.ndarray, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {}

    def apply(self, batch: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch


@dataclass(frozen=True)
class _Shift:
    pixels: int
    words = 2

    def draw(self, words: np.ndarray, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        _check_image("shift", input_shape, self.pixels)
        down, right = (_choice(words[:, axis], 2 * self.pixels + 1) - self.pixels for axis in (0, 1))
        return {"down": down, "right": right}

    def apply(self, batch: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        return _crop(batch, self.pixels, self.pixels - params["down"], self.pixels - params["right"])


@dataclass(frozen=True)
class _PadCropFlip:
    """The augmentation of CIFAR in He et al. (2016), section 4.2, and in the paper."""

    pixels: int
    flip: bool
    words = 3

    def draw(self, words: np.ndarray, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        _check_image("pad_crop_flip", input_shape, self.pixels)
        top, left = (_choice(words[:, axis], 2 * self.pixels + 1) for axis in (0, 1))
        return {"top": top, "left": left, "flip": _coin(words[:, 2]) & self.flip}

    def apply(self, batch: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        cropped = _crop(batch, self.pixels, params["top"], params["left"])
        return torch.where(params["flip"].view(-1, 1, 1, 1), cropped.flip(3), cropped)


@dataclass(frozen=True)
class ResizedCropFlip:
    """As torchvision's RandomResizedCrop, but for the rejection loop: ratios are drawn among those that fit.

    Given its area, a part's ratio has the same distribution here as there. An image so long that no allowed ratio fits
    gets the nearest one that does, at the same area.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool
    words = 5

    def draw(self, words: np.ndarray, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """As `Augmenter.draw`."""
        _check_image("random_resized_crop_flip", input_shape)
        return self.draw_within(words, *map(np.asarray, input_shape[1:]))

    def draw_within(self, words: np.ndarray, height: np.ndarray, width: np.ndarray) -> dict[str, np.ndarray]:
        """The same of images of these sizes: int64 [n], or one for all."""
        share = self.scale[0] + (self.scale[1] - self.scale[0]) * (words[:, 0] / 2**32)
        fitting = share * width / height, width / (share * height)
        least, most = (np.clip(ratio, *fitting) for ratio in self.ratio)
        ratio = least * _power(most / least, words[:, 1])
        area = share * (height * width)
        tall = np.clip(np.rint(np.sqrt(area / ratio)), 1, height).astype(np.int64)
        wide = np.clip(np.rint(np.sqrt(area * ratio)), 1, width).astype(np.int64)
        return {
            "top": _choice(words[:, 2], height - tall + 1),
            "left": _choice(words[:, 3], width - wide + 1),
            "height": tall,
            "width": wide,
            "flip": _coin(words[:, 4]) & self.flip,
        }

    def apply(self, batch: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        """As `Augmenter.apply`."""
        height, width = batch.shape[2:]
        rows = torch.arange(height, device=batch.device).view(1, -1)
        columns = torch.arange(width, device=batch.device).view(1, -1)
        columns = torch.where(params["flip"].view(-1, 1), width - 1 - columns, columns)
        whole_numbers = batch.dtype == torch.uint8
        pixels = batch.to(torch.int32) if whole_numbers else batch
        pixels = _resample(pixels, 2, rows, params["top"], params["height"])
        pixels = _resample(pixels, 3, columns, params["left"], params["width"])
        # The two blends, along width and height, have each scaled whole numbers by 2**11: half of 2**22 is added before
        # the shift, which so rounds to the nearest.
        return ((pixels + (1 << 2 * _BITS - 1)) >> 2 * _BITS).to(torch.uint8) if whole_numbers else pixels


@dataclass(frozen=True)
class _TokenMask:
    """Each token but special ones becomes the mask by chance; token types (channel 1 of two) stay as they are."""

    share: float
    mask: int
    special: tuple[int, ...]
    words: int
    """The length of an input: one for each position."""

    def draw(self, words: np.ndarray, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {"chosen": words < round(self.share * 2**32)}

    def apply(self, batch: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch[:, 0] if batch.ndim == 3 else batch
        special = torch.tensor(self.special, dtype=ids.dtype, device=ids.device)
        spared = (ids.unsqueeze(-1) == special).any(dim=-1)
        masked = ids.masked_fill(params["chosen"] & ~spared, self.mask)
        return torch.stack([masked, batch[:, 1]], dim=1) if batch.ndim == 3 else masked


def _token_mask(share: float, input_shape: tuple[int, ...], tokens: Tokens | None) -> _TokenMask:
    if tokens is None or len(input_shape) not in (1, 2):
        raise RefusedError(
            "the token_mask augmentation needs text",
            got=f"inputs of shape {list(input_shape)}",
            expected="token ids",
            next="choose another data.augmentation, or name a column of text",
        )
    if tokens.mask is None:
        raise RefusedError(
            "the token_mask augmentation needs a tokenizer that has a mask",
            got="a tokenizer without one",
            expected="a token that stands for hidden ones, as [MASK] or <mask> does",
            next="choose another data.augmentation, or another tokenizer with data.text",
        )
    return _TokenMask(share, tokens.mask, (*tokens.special, tokens.padding), input_shape[-1])


@dataclass(frozen=True, eq=False)
class _Custom:
    """A user's own augmentation, and checks of what it gives."""

    name: str
    own: Any

    @property
    def words(self) -> int:
        return int(self.own.words)

    def draw(self, words: np.ndarray, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        with _shown_whole(f"the augmentation {self.name} failed in draw"):
            params = self.own.draw(words, input_shape)
        expected = f"a dict of arrays [{len(words)}, ...]"
        self._expect("draw", _describe_params(params), _fits(params, len(words)), expected)
        return dict(params)

    def apply(self, batch: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
        with _shown_whole(f"the augmentation {self.name} failed in apply"), torch.no_grad():
            applied = self.own.apply(batch, params)
        got, expected = _describe(applied), _describe(batch)
        self._expect("apply", got, got == expected, f"{expected}, as the batch is")
        return applied  # type: ignore[no-any-return]

    def _expect(self, method: str, got: str, fits: bool, expected: str) -> None:
        if not fits:
            raise RefusedError(
                f"{method} of the augmentation {self.name} returned something else than it should",
                got=got,
                expected=expected,
                next="see docs/howto/data.md for what an augmentation of your own must give",
            )


@functools.lru_cache(maxsize=8)
def _custom(spec: str, trusted: Trusted) -> _Custom:
    """The user's object, made once in a process; `spec` is the CustomAugmentation as JSON."""
    augmentation = trust(CustomAugmentation.model_validate_json(spec), trusted)
    own = call_factory(augmentation, SIGNATURE, augmentation.arguments)
    words = getattr(own, "words", None)
    missing = [name for name in ("draw", "apply") if not callable(getattr(own, name, None))]
    if missing or type(words) is not int or words < 0:
        raise RefusedError(
            f"the factory {augmentation.factory} did not return an augmentation",
            got=f"a {type(own).__name__} " + (f"without {' and '.join(missing)}" if missing else f"of words {words!r}"),
            expected="an object with words (how many a row takes), draw(words, input_shape) and apply(batch, params)",
            next="see docs/howto/data.md for what an augmentation of your own must give",
        )
    return _Custom(augmentation.factory, own)


@contextlib.contextmanager
def _shown_whole(what: str) -> Iterator[None]:
    """An exception of the user's own code becomes a refusal that shows it whole."""
    try:
        yield
    except AkdError:
        raise
    except (Exception, SystemExit) as error:
        raise RefusedError(
            what, got=whole(error), expected="no exception", next="correct it; the traceback leads to the line"
        ) from error


def _fits(params: object, rows: int) -> bool:
    return isinstance(params, dict) and all(
        isinstance(name, str) and isinstance(values, np.ndarray) and values.dtype.kind in "biuf" and len(values) == rows
        for name, values in params.items()
    )


def _describe_params(params: object) -> str:
    if not isinstance(params, dict):
        return f"a {type(params).__name__}"
    return ", ".join(f"{name}: {_describe(values)}" for name, values in params.items())


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _choice(words: np.ndarray, choices: int | np.ndarray) -> np.ndarray:
    """Uniform over 0..choices - 1, int64: the high half of word * choices (Lemire, 2019, without rejection)."""
    return (words.astype(np.uint64) * np.asarray(choices, dtype=np.uint64) >> WORD_BITS).astype(np.int64)


def _coin(words: np.ndarray) -> np.ndarray:
    """True for half of the words: bool [n]."""
    return words >= np.uint32(2**31)


def _power(base: np.ndarray, words: np.ndarray) -> np.ndarray:
    """base ** (words / 2**32), the exponent cut to 16 bits: float64 [n].

    By square roots and products, which every machine rounds alike; exp and log of two libraries may differ.
    """
    power = np.ones_like(base)
    for bit in range(31, 15, -1):
        base = np.sqrt(base)
        power = np.where(words >> np.uint32(bit) & np.uint32(1), power * base, power)
    return power


def _check_image(kind: str, input_shape: tuple[int, ...], pixels: int = 0) -> None:
    if len(input_shape) != 3:
        raise RefusedError(
            f"the {kind} augmentation needs images",
            got=f"inputs of shape {list(input_shape)}",
            expected="shape [channels, height, width]",
            next="set data.augmentation to {kind: none}, or give data.train.shape",
        )
    if pixels >= min(input_shape[1:]):
        raise RefusedError(
            f"the {kind} augmentation would move an image out of sight",
            got=f"pixels = {pixels} on images of {input_shape[1]} x {input_shape[2]}",
            expected="fewer pixels than the smaller side",
            next="lower data.augmentation.pixels",
        )


def _crop(batch: torch.Tensor, pixels: int, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The windows at `top`, `left`, int64 [n], of the batch with zeros around it; [n, c, h, w] as before."""
    height, width = batch.shape[2:]
    windows = functional.pad(batch, [pixels] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(batch), device=batch.device), :, top, left].contiguous()


def _resample(
    pixels: torch.Tensor, axis: int, order: torch.Tensor, start: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    """Stretch a part of one axis over all of it, by linear interpolation within the part.

    Sample i lies at (i + 1/2) * length / size - 1/2 from the part's first pixel, and not beyond its outermost pixels,
    as in torch's `interpolate(mode="bilinear", align_corners=False)`; here cut to 2**-11 of a pixel.

    Args:
        pixels: [n, c, h, w], float32 or int32.
        axis: 2 or 3.
        order: which sample goes where, int64 [1 or n, size].
        start: first pixel of the part, int64 [n].
        length: pixels of the part, int64 [n].

    Returns:
        [n, c, h, w]; int32 comes out 2**11 times as large, exactly.
    """
    size, last = pixels.shape[axis], length.view(-1, 1) - 1
    # Below 2**63 for any image, and never negative, where integer division would round elsewhere.
    place = (((2 * order + 1) * length.view(-1, 1) - size).clamp(min=0) << _BITS) // (2 * size)
    place = torch.minimum(place, last << _BITS)
    first = place >> _BITS
    second = torch.minimum(first + 1, last)
    along = [len(pixels), 1, 1, 1]
    along[axis] = size
    share, one = (place & (1 << _BITS) - 1).view(along).to(pixels.dtype), 1 << _BITS
    if pixels.is_floating_point():
        share, one = share / one, 1

    def taken(index: torch.Tensor) -> torch.Tensor:
        return pixels.gather(axis, (start.view(-1, 1) + index).view(along).expand_as(pixels))

    return taken(first) * (one - share) + taken(second) * share
