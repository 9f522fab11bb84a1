"""scikit-learn's handwritten digits: real data that come with a package."""

import functools
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from akd_dist.data.sources.base import Source, row_of, slices


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, the built-in example: uint8 [1, 8, 8], ten classes."""

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed."""
        return {"kind": "digits", "scikit-learn": version("scikit-learn")}

    def open(self) -> Source:
        """Look at the rows, without reading them."""
        # Here, because it takes a second.
        from sklearn.datasets import load_digits

        grey, labels = load_digits(return_X_y=True)
        # Their grey levels are 0 to 16.
        inputs, ids = np.rint(grey * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8), pa.array(labels)
        name = "the digits of scikit-learn"

        def read(start: int, stop: int) -> tuple[list[np.ndarray], Any]:
            return [inputs[start:stop]], ids[start:stop]

        return Source(name, len(ids), functools.partial(slices, len(ids), read), row_of(name), classes=10)
