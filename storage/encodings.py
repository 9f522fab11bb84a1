"""Logits <-> the named arrays a store keeps: small value objects, rebuilt from their own JSON config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from numcodecs.bitround import BitRound, max_bits

from akd_dist.base.errors import RefusedError
from akd_dist.storage.layout import LOGITS
from akd_dist.storage.top_k import Where

Kind = Literal["float32", "float16"]
Compression = Literal["none", "zstd", "blosc"]

_ROWS_NAMED = 8


@dataclass(frozen=True)
class Encoding:
    """How logits are stored: as one array `logits`, perhaps rounded, perhaps compressed.

    Rounding happens before writing, so whoever reads needs no decoder for it, and only makes compression work better.
    """

    name: Kind
    """The dtype of the stored array: float16 has 11 significant bits and magnitudes up to 65504."""
    keep_bits: int | None = None
    """Bits of the mantissa that are kept, the others are rounded to zero (Klöwer et al., Nature Computational Science
    2021); None keeps all."""
    compress: Compression = "none"
    """Codec of the chunks: one that other readers of Zarr v3 know as well."""

    @property
    def dtype(self) -> str:
        """The dtype of the stored array `logits`."""
        return self.name

    @property
    def rounds(self) -> bool:
        """Whether what is stored may differ from the teacher's float32 logits."""
        return self.name != "float32" or self.keep_bits is not None

    def encode(
        self, logits: npt.NDArray[np.float32], first_row: int, where: Where | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Logits float32 [n, classes] as named arrays of n rows each.

        Args:
            first_row: the dataset row number of `logits[0]`, for the message; of targets its number among them.
            where: names a target of such a number, as `row 12, position 7`; None names rows.

        Raises:
            RefusedError: NaN or infinity after the cast and rounding (float16 ends at 65504), naming the rows.
        """
        rounded = np.ascontiguousarray(logits, dtype=np.float32)
        if self.keep_bits is not None:
            # Before the cast, so that each logit is rounded once. NaN and infinity are told first, since rounding their
            # bits could make numbers of them.
            self._check_finite(logits, rounded, first_row, where)
            rounded = np.asarray(BitRound(self.keep_bits).encode(rounded)).view(np.float32).reshape(rounded.shape)
        with np.errstate(over="ignore"):  # an overflow becomes inf, which is refused below with its row
            stored = np.ascontiguousarray(rounded, dtype=self.dtype)
        self._check_finite(logits, stored, first_row, where)
        return {LOGITS: stored}

    def decode(self, arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Named arrays back to logits, float32 [n, classes]."""
        return arrays[LOGITS].astype(np.float32, copy=False)

    def config(self) -> dict[str, Any]:
        """What `encoding_from_config` rebuilds this encoding from; what is not used is left out, as before format 3."""
        rounding = {} if self.keep_bits is None else {"keep_bits": self.keep_bits}
        return {"name": self.name} | rounding | ({} if self.compress == "none" else {"compress": self.compress})

    def __str__(self) -> str:
        rounding = "" if self.keep_bits is None else f", {self.keep_bits} bits of the mantissa kept"
        return f"{self.name}{rounding}" + ("" if self.compress == "none" else f", {self.compress}")

    def _check_finite(
        self,
        logits: npt.NDArray[np.float32],
        stored: npt.NDArray[Any],
        first_row: int,
        where: Where | None,
    ) -> None:
        bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
        if not len(bad):
            return
        numbers = [first_row + int(row) for row in bad[:_ROWS_NAMED]]
        if where is None:
            named = f"{'row' if len(bad) == 1 else 'rows'} {', '.join(map(str, numbers))}"
        else:
            named = "; ".join(map(where, numbers))
        more = f" and {len(bad) - _ROWS_NAMED} more" if len(bad) > _ROWS_NAMED else ""
        cast_only = bool(np.isfinite(logits[bad]).all())
        noun = "row" if where is None else "target"
        have = f"{noun} has" if len(bad) == 1 else f"{noun}s have"
        raise RefusedError(
            f"{len(bad)} {have} logits that are not finite as {self.name}: {named}{more}",
            got=f"a largest magnitude of {np.abs(logits[bad]).max():g}" if cast_only else "NaN or infinity",
            expected=f"finite {self.name} numbers, at most {np.finfo(self.dtype).max:g} in magnitude",
            next="set cache.encoding: float32" if cast_only else "look at these rows and at the teacher's weights",
        )


def most_bits(kind: Kind) -> int:
    """Bits of the mantissa of a dtype: the most that `keep_bits` may say."""
    return int(max_bits[kind])


def encoding_from_config(config: Mapping[str, Any]) -> Encoding:
    """The encoding that wrote `config`.

    Raises:
        RefusedError: an encoding, or a setting of one, that this version does not know.
    """
    settings = dict(config)
    kind: Any = settings.get("name")
    bits, compress = settings.get("keep_bits"), settings.get("compress", "none")
    known = kind in get_args(Kind) and compress in get_args(Compression)
    if known and (bits is None or (type(bits) is int and 1 <= bits < most_bits(kind))):
        encoding = Encoding(kind, bits, compress)
        # A setting that nobody here knows would be passed over, and the logits be read as something else.
        if encoding.config() == settings:
            return encoding
    raise RefusedError(
        "the store's encoding is not known to this version of akd-dist",
        got=dict(config),
        expected=f"one of {', '.join(get_args(Kind))}, perhaps with keep_bits, and with compress as one of "
        f"{', '.join(get_args(Compression))}",
        next="read the store with the version that wrote it, or a newer one",
    )
