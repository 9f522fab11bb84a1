"""The dictionary of a `top_k` store: what its targets have in common, kept once.

It lies in the Zarr group `dictionary`, is made before the first shard from a few rows, and is never changed: the shards
name the hash of its bytes, since coefficients mean nothing without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import RefusedError
from akd_dist.storage.top_k import TopK

DICTIONARY = "dictionary"
"""The name of its group, and of the table that it is; see `tables`."""
_DTYPES = {"basis": "float16"}  # the others are float32


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Arrays over all V classes; t temperatures are those of the encoding, r its rank."""

    mean_logit: npt.NDArray[np.float32]
    """[V]: mean over targets of z less its own mean."""
    tail_prior: npt.NDArray[np.float32] | None = None
    """[t, V]: mean probability of a class among those that are not stored, a distribution; needed where r = 0."""
    basis: npt.NDArray[np.float16] | None = None
    """[V, r]: what coefficients are multiplied by; needed where r > 0, as are the next two."""
    residual_mean: npt.NDArray[np.float32] | None = None
    """[V]: mean of what the coefficients leave."""
    residual_variance: npt.NDArray[np.float32] | None = None
    """[V]: its variance."""
    tail_calibration: npt.NDArray[np.float32] | None = None
    """[t, V]: added to the tail's log-weights at these temperatures, in place of the residuals; or there is none."""
    projection: npt.NDArray[np.float32] | None = None
    """[r, d + 1]: coefficients from the hidden state of a linear head with a 1 behind it; [r, V]: from z - z-bar - m;
    or there is none. Not needed to read."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that there are by name, in the stored dtypes and in the order they are published in."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: np.ascontiguousarray(array, dtype=_DTYPES.get(name, "float32"))
            for name, array in given.items()
            if array is not None
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """From arrays by name; TypeError if there are others, or not enough."""
        return cls(**arrays)

    def check(self, top_k: TopK, classes: int) -> None:
        """Refuse a dictionary that is not one of this encoding.

        Raises:
            RefusedError: an array is missing, of another shape, or not finite; names it.
        """
        found, t, r = self.arrays(), len(top_k.tail_temperatures), top_k.rank
        vector, table = (classes,), (t, classes)
        shapes = {"mean_logit": vector, "tail_prior": table, "basis": (classes, r), "residual_mean": vector}
        shapes |= {"residual_variance": vector, "tail_calibration": table}
        needed = ["mean_logit", *(("basis", "residual_mean", "residual_variance") if r else ("tail_prior",))]
        for name in [*needed, *found]:
            array = found.get(name)
            expected = shapes.get(name, (r, 0 if array is None or array.ndim < 2 else array.shape[1]))
            got = "nothing" if array is None else str(array.shape)
            if array is None or array.shape != expected or 0 in array.shape or not np.isfinite(array).all():
                finite = array is None or bool(np.isfinite(array).all())
                raise RefusedError(
                    f"{name} is not that of a dictionary for {top_k}",
                    got=got if finite else f"{got}, with NaN or infinity",
                    expected=f"{expected}, finite",
                    next="see cache.encoding, and the teacher's weights",
                )
