"""Views: augmentation as a pure function of (data seed, row, view), the same on every machine and in every batch order.

A store row is the teacher's answer to one view of one row; a student replays that very view.
"""

import functools
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import sha256
from akd_dist.data import augmenters, encoded as encodeds, framing, philox, pictures
from akd_dist.data.augmenters import SIGNATURE, Augmenter, ResizedCropFlip, augmenter_of
from akd_dist.data.encoded import EncodedPictures, begin, decoded_by, encoded_of
from akd_dist.data.factories import source_sha256
from akd_dist.data.philox import random_words
from akd_dist.data.pictures import Crop
from akd_dist.data.text import Tokens
from akd_dist.recipe import Augmentation, CustomAugmentation, NoAugmentation
from akd_dist.storage.records import Probe

SAMPLED = 16
"""Values of a probe view that are remembered beside its digest, to tell how far pixels have drifted."""


def draw(
    augmentation: Augmentation,
    seed: int,
    rows: np.ndarray,
    view: int,
    input_shape: tuple[int, ...],
    tokens: Tokens | None = None,
) -> dict[str, np.ndarray]:
    """The augmentation's parameters for some rows of a view.

    Args:
        seed: the recipe's `data.seed`.
        rows: row numbers, int64 [n], in any order.
        view: 0-based view.
        input_shape: shape of one input.
        tokens: what ids mean, where inputs are text.

    Returns:
        Named parameters, [n, ...]: for a shift `down` and `right`, int64 [n], in pixels; none without an augmentation.

    Raises:
        RefusedError: the augmentation does not fit inputs of this shape.
    """
    return _draw(augmenter_of(augmentation, input_shape, tokens), seed, rows, view, input_shape)


def apply(
    augmentation: Augmentation, batch: torch.Tensor, params: dict[str, np.ndarray], tokens: Tokens | None = None
) -> torch.Tensor:
    """The batch as its rows look in this view: [n, *shape] -> the same shape, dtype and device."""
    return _apply(augmenter_of(augmentation, tuple(batch.shape[1:]), tokens), batch, params)


def view_of(
    augmentation: Augmentation,
    seed: int,
    inputs: np.ndarray,
    rows: np.ndarray,
    view: int,
    tokens: Tokens | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Inputs [n, *shape] of the given rows, int64 [n], as a view shows them: a tensor of the same shape and dtype.

    The inputs are moved to the device as they are, and augmented there. Of encoded pictures a resized crop is one of
    the whole picture, made where it is decoded; give them as they are taken from the rows, not decoded.
    """
    return begin_view(augmentation, seed, inputs, rows, view, tokens, device)()


def begin_view(
    augmentation: Augmentation,
    seed: int,
    inputs: np.ndarray,
    rows: np.ndarray,
    view: int,
    tokens: Tokens | None = None,
    device: torch.device | str = "cpu",
) -> Callable[[], torch.Tensor]:
    """As `view_of`, of which decoding is begun: called, it waits for that, and gives the view."""
    if isinstance(augmentation, NoAugmentation) and encoded_of(inputs) is None:
        return functools.partial(placed, inputs, device)
    return begin_views(augmentation, seed, inputs, rows, [view], tokens, device)[0]


def begin_views(
    augmentation: Augmentation,
    seed: int,
    inputs: np.ndarray,
    rows: np.ndarray,
    views: Sequence[int],
    tokens: Tokens | None = None,
    device: torch.device | str = "cpu",
) -> list[Callable[[], torch.Tensor]]:
    """As `begin_view`, several views of the same rows, which are decoded and moved to the device once for all."""
    shape = inputs.shape[1:]
    augmenter = augmenter_of(augmentation, shape, tokens)
    encoded = encoded_of(inputs)
    if encoded is not None and isinstance(augmenter, ResizedCropFlip):
        whole = encoded.begin([_crops(augmenter, seed, encoded, rows, view) for view in views])
        return [functools.partial(lambda at: placed(whole()[at], device), at) for at in range(len(views))]
    pixels = begin(inputs)

    def moved_now() -> torch.Tensor:
        return placed(pixels(), device)

    moved = functools.cache(moved_now) if len(views) > 1 else moved_now
    # A user's own may write into the batch that it is given.
    own = isinstance(augmentation, CustomAugmentation) and len(views) > 1

    def shown(params: dict[str, np.ndarray]) -> torch.Tensor:
        return _apply(augmenter, moved().clone() if own else moved(), params)

    return [functools.partial(shown, _draw(augmenter, seed, rows, view, shape)) for view in views]


def _crops(augmenter: ResizedCropFlip, seed: int, inputs: EncodedPictures, rows: np.ndarray, view: int) -> list[Crop]:
    """The part of each whole picture that a view shows: from the same words as a part of its pixels would be."""
    heights, widths = inputs.sizes
    drawn = augmenter.draw_within(random_words(seed, rows, view, augmenter.words), heights, widths)
    columns = [drawn[name] for name in ("top", "left", "height", "width", "flip")] + [heights, widths]
    return [
        Crop(top, left, height, width, bool(flip), (high, wide))
        for top, left, height, width, flip, high, wide in zip(*(one.tolist() for one in columns), strict=True)
    ]


def placed(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """An array [...] on a device, as a tensor of the same shape and dtype.

    A GPU copies it out of pinned memory, so nobody waits: not this thread, and not for what the GPU computes just now.
    Whatever the same stream is given next finds it there.
    """
    tensor, kind = torch.from_numpy(array), _kind_of(device)
    if kind == "cpu":
        return tensor
    return tensor.to(device) if kind != "cuda" else tensor.pin_memory().to(device, non_blocking=True)


@functools.cache
def _kind_of(device: torch.device | str) -> str:
    return torch.device(device).type


def check_augmentation(augmentation: Augmentation, seed: int, inputs: np.ndarray, tokens: Tokens | None = None) -> None:
    """Try the augmentation on the first few of some inputs [rows, *shape], before anything expensive starts.

    Raises:
        RefusedError: it does not fit them, fails, makes NaN or infinity, or shows a row otherwise beside others than
            alone.
    """
    numbers = np.arange(min(len(inputs), 4))
    view_digests(augmentation, seed, inputs, numbers, 0, tokens)
    together = view_of(augmentation, seed, inputs.take(numbers, axis=0), numbers, 0, tokens)
    alone = [view_of(augmentation, seed, inputs.take([row], axis=0), numbers[[row]], 0, tokens) for row in numbers]
    if not torch.equal(together, torch.cat(alone)):
        raise RefusedError(
            f"the augmentation {_name(augmentation)} is not a function of seed, row and view alone",
            got="other pixels for a row in a batch than for the row alone",
            expected="the same view of a row every time, whatever rows are beside it",
            next="take all chance from `words`, and treat each row for itself",
        )


def by_content(augmentation: Augmentation) -> dict[str, Any]:
    """A spec as JSON, for keys of what is trained on its views: the file of a user's own belongs to it.

    Raises:
        RefusedError: its factory cannot be imported.
    """
    document = augmentation.model_dump(mode="json")
    if isinstance(augmentation, CustomAugmentation):
        return document | {"source": source_sha256(augmentation, SIGNATURE)}
    return document


def drawn_by(augmentation: Augmentation, device: str, *, encoded: bool = False) -> dict[str, Any] | None:
    """All by which the views of given rows could come out otherwise, as JSON; None where nobody can tell.

    That is so for an augmentation of the user's own: what its file imports is not known.

    Args:
        device: where they are made, as `models.device.device_name` has it.
        encoded: whether the rows are encoded pictures.
    """
    if isinstance(augmentation, CustomAugmentation):
        return None
    return {
        "augmentation": by_content(augmentation),
        "code": _code(encoded=encoded),
        "versions": {"numpy": np.__version__, "torch": str(torch.__version__)} | (decoded_by() if encoded else {}),
        "device": device,
        "cpu": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
    }


@functools.cache
def _code(*, encoded: bool) -> str:
    files = [__file__, augmenters.__file__, philox.__file__]
    files += [encodeds.__file__, pictures.__file__, framing.__file__] if encoded else []
    return sha256(b"".join(Path(module).read_bytes() for module in files))


def view_digests(
    augmentation: Augmentation,
    seed: int,
    inputs: np.ndarray,
    rows: Iterable[int],
    view: int,
    tokens: Tokens | None = None,
    device: torch.device | str = "cpu",
) -> list[Probe]:
    """What a few rows of `inputs` [all rows, *shape] look like in a view, for readers to compare.

    Raises:
        RefusedError: a view is not finite; names the row.
    """
    numbers = np.fromiter(rows, dtype=np.int64)
    shown = inputs.take(numbers, axis=0)
    return shown_digests(augmentation, seed, shown, numbers, view, tokens, device)


def shown_digests(
    augmentation: Augmentation,
    seed: int,
    inputs: np.ndarray,
    numbers: np.ndarray,
    view: int,
    tokens: Tokens | None = None,
    device: torch.device | str = "cpu",
) -> list[Probe]:
    """The same of rows that were read: `inputs` [n, *shape] are those of the numbers, int64 [n]."""
    seen = view_of(augmentation, seed, inputs, numbers, view, tokens, device).cpu().numpy()
    return [digest_of(augmentation, int(row), one, view) for row, one in zip(numbers, seen, strict=True)]


def digest_of(augmentation: Augmentation, row: int, seen: np.ndarray, view: int) -> Probe:
    """What one row looks like in a view, as it is shown: [*shape].

    Raises:
        RefusedError: it is not finite; names the row.
    """
    if not np.isfinite(seen).all():
        raise RefusedError(
            f"view {view} of row {row} holds NaN or infinity",
            got=f"{np.count_nonzero(~np.isfinite(seen)):,} of {seen.size:,} values by {_name(augmentation)}",
            expected="finite inputs",
            next="correct the augmentation",
        )
    count = min(SAMPLED, seen.size)
    places = np.arange(count) * seen.size // count
    return Probe(row=row, sha256=sha256(seen.tobytes()), sample=seen.reshape(-1)[places].tolist())


def _draw(
    augmenter: Augmenter, seed: int, rows: np.ndarray, view: int, input_shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    return augmenter.draw(random_words(seed, rows, view, augmenter.words), input_shape)


def _apply(augmenter: Augmenter, batch: torch.Tensor, params: dict[str, np.ndarray]) -> torch.Tensor:
    return augmenter.apply(batch, {name: placed(values, batch.device) for name, values in params.items()})


def _name(augmentation: Augmentation) -> str:
    return augmentation.factory if isinstance(augmentation, CustomAugmentation) else augmentation.kind
