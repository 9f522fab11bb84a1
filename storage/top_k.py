"""The encoding `top_k`: what is kept of a target's logits where there are too many classes to keep them all.

Of each target: the `k` largest logits, the mean of all, the mass of the others (the tail) at a few temperatures, and
`rank` coefficients that say, in the store's dictionary, how the tail is spread. By default these are 72 bytes, whatever
the number of classes. Packing what was unpacked gives the same bytes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import RefusedError

Floats = npt.NDArray[np.float32]
Where = Callable[[int], str]
"""Names a target by its place among those at hand, as `row 12, position 7`."""

VALUE_BITS = (4, 6, 8, 16)
"""Bits of each logit below the largest; 16 are a float16."""
COEFFICIENT_STEPS = 25.6
"""Steps of a coefficient in a standard deviation: int8 reaches five of them to either side."""
TAIL_STEPS = 1024
"""Steps of the logarithm of the tail's mass; int16 reaches 32 to either side."""
MOST_CLASSES = 2**24
"""Classes have 16 bits in one array, and up to 8 in another."""
_LOW_BITS = 16
_NAMED = 8


@dataclass(frozen=True, eq=False)
class Described:
    """What `top_k` keeps of the logits z [V] of n targets."""

    ids: npt.NDArray[np.int64]
    """[n, k]: the classes of the k largest logits, the largest first, of equal ones the smaller class first."""
    values: Floats
    """[n, k]: these logits."""
    mean: Floats
    """[n]: the mean of all V logits."""
    tail: Floats
    """[n, t]: for each stored temperature T the log of the sum of exp((z - max z) / T) over the other V - k classes;
    minus infinity where there are none."""
    coefficients: Floats
    """[n, rank]: in the store's dictionary, in standard deviations."""

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class TopK:
    """How many of each there are, and in how many bits.

    Raises:
        RefusedError: a setting out of its range.
    """

    k: int = 16
    rank: int = 16
    value_bits: int = 6
    tail_temperatures: tuple[float, ...] = (1.0, 4 / 3, 2.0)
    """Ascending; above the last one the mean alone tells the tail's mass, and below the first one nothing does."""
    probe_rows: int = 64
    """Rows of the dataset that the dictionary is made from."""

    name: ClassVar[str] = "top_k"
    compress: ClassVar[str] = "none"
    rounds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        temperatures = np.asarray(self.tail_temperatures, np.float64)
        checks: dict[str, tuple[bool, object, str]] = {
            "k": (self.k >= 1, self.k, "at least 1"),
            "rank": (self.rank >= 0, self.rank, "0 or more"),
            "value_bits": (self.value_bits in VALUE_BITS, self.value_bits, f"one of {VALUE_BITS}"),
            "probe_rows": (self.probe_rows >= 1, self.probe_rows, "at least 1"),
            "tail_temperatures": (
                len(temperatures) > 0 and bool(temperatures[0] >= 1 and (np.diff(temperatures) > 0).all()),
                list(self.tail_temperatures),
                "one or more numbers from 1 on, ascending",
            ),
        }
        for setting, (right, got, expected) in checks.items():
            if not right:
                raise RefusedError(f"{setting} of the encoding top_k is out of range", got=got, expected=expected)

    def arrays(self, classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of what is stored of each target, by array, in order.

        Raises:
            RefusedError: there are fewer classes than `k`, or more than 2^24.
        """
        if self.k > classes:
            raise RefusedError(
                f"top_k keeps {self.k} logits of each target, and there are {classes} classes",
                got=f"k: {self.k}",
                expected=f"k of {classes} at most",
                next="set cache.encoding.k lower, or cache.encoding: float16",
            )
        if classes > MOST_CLASSES:
            raise RefusedError(
                "top_k keeps classes of 24 bits", got=f"{classes:,} classes", expected=f"{MOST_CLASSES:,}"
            )
        high = high_bits(classes)
        gaps: tuple[str, tuple[int, ...]] = ("uint8", (packed_bytes(self.k - 1, self.value_bits),))
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "ids": ("uint16", (self.k,)),
            "ids_high": ("uint8", (packed_bytes(self.k, high),)),
            "top": ("float16", (2,)),
            "gaps": ("float16", (self.k - 1,)) if self.value_bits == 16 else gaps,
            "mean": ("float16", ()),
            "tail": ("int16", (len(self.tail_temperatures),)),
            "coefficients": ("int8", (self.rank,)),
        }
        return {name: (dtype, shape) for name, (dtype, shape) in found.items() if 0 not in shape}

    def pack(
        self, described: Described, classes: int, where: Where = "target {}".format
    ) -> dict[str, npt.NDArray[Any]]:
        """What is stored of n targets, by array, [n, ...] as `arrays` says.

        Args:
            where: names a target in messages.

        Raises:
            RefusedError: something is not finite, or beyond float16; names the targets.
            ValueError: another shape, a class that does not exist, or logits that do not descend.
        """
        self._check(described, classes, where)
        # float64, so that every number is rounded once.
        values, mean = described.values.astype(np.float64), described.mean.astype(np.float64)
        with np.errstate(over="ignore"):
            stored_mean = mean.astype(np.float16)
            range_ = values[:, 0] - values[:, -1]
            top = np.stack([values[:, 0] - stored_mean.astype(np.float64), range_], axis=1).astype(np.float16)
        within = np.isfinite(stored_mean) & np.isfinite(top).all(axis=1)
        _refuse(within, where, "logits beyond float16", "float16 numbers: at most 65504 from zero and from each other")
        below = values[:, :1] - values[:, 1:]
        found: dict[str, npt.NDArray[Any]] = {
            "ids": described.ids.astype(np.uint16),
            "ids_high": pack_bits(described.ids >> _LOW_BITS, high_bits(classes)),
            "top": top,
            "gaps": self._gaps(below, top[:, 1:].astype(np.float64)),
            "mean": stored_mean,
            "tail": _steps(described.tail, TAIL_STEPS, np.int16),
            "coefficients": _steps(described.coefficients, COEFFICIENT_STEPS, np.int8),
        }
        return {name: np.ascontiguousarray(found[name]) for name in self.arrays(classes)}

    def unpack(self, arrays: Mapping[str, npt.NDArray[Any]], classes: int) -> Described:
        """What was packed, as far as its bits tell."""
        count = len(arrays["mean"])
        ids = arrays["ids"].astype(np.int64)
        if "ids_high" in arrays:
            ids |= unpack_bits(arrays["ids_high"], high_bits(classes), self.k).astype(np.int64) << _LOW_BITS
        mean, top = arrays["mean"].astype(np.float64), arrays["top"].astype(np.float64)
        below = np.zeros((count, self.k))
        if "gaps" in arrays:
            below[:, 1:] = self._below(arrays["gaps"], top[:, 1:])
        coefficients = arrays.get("coefficients", np.zeros((count, 0), np.int8))
        return Described(
            ids,
            ((mean + top[:, 0])[:, None] - below).astype(np.float32),
            mean.astype(np.float32),
            (arrays["tail"].astype(np.float64) / TAIL_STEPS).astype(np.float32),
            (coefficients.astype(np.float64) / COEFFICIENT_STEPS).astype(np.float32),
        )

    def config(self) -> dict[str, Any]:
        """What `top_k_from_config` rebuilds it from."""
        temperatures = [float(one) for one in self.tail_temperatures]
        return {"name": self.name, **asdict(self), "tail_temperatures": temperatures}

    def __str__(self) -> str:
        return f"top {self.k} logits of {self.value_bits} bits, rank {self.rank}"

    def _gaps(self, below: npt.NDArray[np.float64], top_range: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        if self.value_bits == 16:
            return below.astype(np.float16)
        most = 2**self.value_bits - 1
        share = np.divide(below, top_range, out=np.zeros_like(below), where=top_range > 0)
        return pack_bits(np.clip(np.rint(share * most), 0, most), self.value_bits)

    def _below(self, gaps: npt.NDArray[Any], top_range: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """By how much each logit but the first is below the first, float64 [n, k - 1]."""
        if self.value_bits == 16:
            return gaps.astype(np.float64)
        levels = unpack_bits(gaps, self.value_bits, self.k - 1).astype(np.float64)
        found: npt.NDArray[np.float64] = levels / (2**self.value_bits - 1) * top_range
        return found

    def _check(self, described: Described, classes: int, where: Where) -> None:
        count = len(described)
        shapes = {"ids": self.k, "values": self.k, "tail": len(self.tail_temperatures), "coefficients": self.rank}
        for name, width in shapes.items():
            if (got := getattr(described, name).shape) != (count, width):
                raise ValueError(f"{name} of {self}: shape {got} instead of {(count, width)}")
        for name in ("values", "mean", "coefficients"):
            good = np.isfinite(getattr(described, name)).reshape(count, -1).all(axis=1)
            _refuse(good, where, f"NaN or infinity in their {_CALLED[name]}", "finite logits")
        good = np.asarray((described.tail < np.inf).all(axis=1))
        _refuse(good, where, f"NaN or infinity in their {_CALLED['tail']}", "finite logits")
        if count and not (described.ids.min() >= 0 and described.ids.max() < classes):
            raise ValueError(f"classes {described.ids.min()} to {described.ids.max()} of {classes}")
        if not (np.diff(described.values, axis=1) <= 0).all():
            raise ValueError("the logits of a target have to descend")


_CALLED = {
    "values": "largest logits",
    "mean": "logits' mean",
    "tail": "tail's mass",
    "coefficients": "coefficients",
}


def top_k_from_config(config: Mapping[str, Any]) -> TopK:
    """The encoding that wrote `config`.

    Raises:
        RefusedError: a setting that this version does not know, or one out of range.
    """
    settings = {name: value for name, value in config.items() if name != "name"}
    whole = ("k", "rank", "value_bits", "probe_rows")
    temperatures = settings.get("tail_temperatures")
    known = (
        all(type(settings.get(name)) is int for name in whole)
        and isinstance(temperatures, list)
        and all(type(one) is float for one in temperatures)
    )
    if known and isinstance(temperatures, list):
        found = TopK(**{name: settings[name] for name in whole}, tail_temperatures=tuple(temperatures))
        if found.config() == dict(config):
            return found
    raise RefusedError(
        "the store's encoding top_k is not known to this version of akd-dist",
        got=dict(config),
        expected=f"the settings {', '.join(TopK().config())}",
        next="read the store with the version that wrote it, or a newer one",
    )


def high_bits(classes: int) -> int:
    """Bits of a class that do not fit uint16."""
    return max(0, (classes - 1).bit_length() - _LOW_BITS)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many numbers of so many bits take."""
    return -(-count * bits // 8)


def pack_bits(numbers: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Whole numbers [n, m] below 2^bits, bits at most 8, as uint8 [n, ceil(m bits / 8)].

    Number i has the bits i * bits up to (i + 1) * bits of a row, its lowest first; bit b of a row is bit b mod 8 of
    byte b / 8, counted from the lowest. What is left of the last byte is zero.
    """
    each = np.unpackbits(numbers.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(each.reshape(len(numbers), -1), axis=-1, bitorder="little")


def unpack_bits(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The numbers, uint8 [n, count], that `pack_bits` packed."""
    each = np.unpackbits(packed, axis=-1, bitorder="little", count=count * bits)
    return np.packbits(each.reshape(len(packed), count, bits), axis=-1, bitorder="little")[..., 0]


def _steps(numbers: Floats, steps: float, kind: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    """Numbers in whole steps, clipped to what an integer holds."""
    limits = np.iinfo(kind)
    return np.clip(np.rint(numbers.astype(np.float64) * steps), limits.min, limits.max).astype(kind)


def _refuse(good: npt.NDArray[np.bool_], where: Where, got: str, expected: str) -> None:
    """Refuse targets of which something is not good, naming them."""
    bad = np.flatnonzero(~good)
    if not len(bad):
        return
    named = "; ".join(where(int(one)) for one in bad[:_NAMED])
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    raise RefusedError(
        f"{len(bad)} {'target has' if len(bad) == 1 else 'targets have'} logits that cannot be kept: {named}{more}",
        got=got,
        expected=expected,
        next="look at these rows and at the teacher's weights",
    )
