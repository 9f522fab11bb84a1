"""Logits <-> the named arrays a store keeps: small value objects, rebuilt from their own JSON config."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import RefusedError
from akd_dist.storage.layout import LOGITS

_ROWS_NAMED = 8


class Encoding:
    """How logits are stored. A later encoding may keep several arrays; these keep one, `logits`."""

    name: ClassVar[str]
    # The dtype of the stored array `logits`.
    dtype: ClassVar[str]

    def encode(self, logits: npt.NDArray[np.float32], first_row: int) -> dict[str, npt.NDArray[Any]]:
        """Logits float32 [n, classes] as named arrays of n rows each.

        Args:
            first_row: the dataset row number of `logits[0]`, for the message.

        Raises:
            RefusedError: NaN or infinity after the cast (float16 ends at 65504), naming the rows.
        """
        with np.errstate(over="ignore"):  # an overflow becomes inf, which is refused below with its row
            stored = np.ascontiguousarray(logits, dtype=self.dtype)
        bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
        if len(bad):
            raise self._non_finite(logits, bad, first_row)
        return {LOGITS: stored}

    def decode(self, arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """Named arrays back to logits, float32 [n, classes]."""
        return arrays[LOGITS].astype(np.float32, copy=False)

    def config(self) -> dict[str, Any]:
        """What `encoding_from_config` rebuilds this encoding from."""
        return {"name": self.name}

    def _non_finite(self, logits: npt.NDArray[np.float32], bad: npt.NDArray[np.intp], first_row: int) -> RefusedError:
        named = ", ".join(str(first_row + int(row)) for row in bad[:_ROWS_NAMED])
        more = f" and {len(bad) - _ROWS_NAMED} more" if len(bad) > _ROWS_NAMED else ""
        cast_only = bool(np.isfinite(logits[bad]).all())
        return RefusedError(
            f"{len(bad)} {'row has' if len(bad) == 1 else 'rows have'} logits that are not finite as {self.name}: "
            f"{'row' if len(bad) == 1 else 'rows'} {named}{more}",
            got=f"a largest magnitude of {np.abs(logits[bad]).max():g}" if cast_only else "NaN or infinity",
            expected=f"finite {self.name} numbers, at most {np.finfo(self.dtype).max:g} in magnitude",
            next="set cache.encoding: float32" if cast_only else "look at these rows and at the teacher's weights",
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Encoding) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(self.name)


class Float32(Encoding):
    """The logits as they are."""

    name = "float32"
    dtype = "float32"


class Float16(Encoding):
    """Half the bytes; 11 significant bits, magnitudes up to 65504."""

    name = "float16"
    dtype = "float16"


_BY_NAME: dict[str, type[Encoding]] = {encoding.name: encoding for encoding in (Float32, Float16)}


def encoding_from_config(config: Mapping[str, Any]) -> Encoding:
    """The encoding that wrote `config`.

    Raises:
        RefusedError: an encoding, or a setting of one, that this version does not know.
    """
    encoding = _BY_NAME.get(str(config.get("name")))
    # A setting that nobody here knows would be passed over, and the logits be read as something else.
    if encoding is None or encoding().config() != dict(config):
        raise RefusedError(
            "the store's encoding is not known to this version of akd-dist",
            got=dict(config),
            expected=f"one of {', '.join(_BY_NAME)}",
            next="read the store with the version that wrote it, or a newer one",
        )
    return encoding()
