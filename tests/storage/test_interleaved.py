"""All that is stored of an item lies together, each array where its dtype may lie, whatever sizes it has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from akd_dist.distill.batch_targets import split
from akd_dist.storage.interleaved import Interleaved
from akd_dist.storage.top_k import TopK


@pytest.mark.parametrize(
    ("encoding", "classes", "item_bytes"),
    [(TopK(), 49_152, 72), (TopK(), 151_936, 76), (TopK(k=4, rank=3), 70_000, 28), (TopK(k=1, rank=0), 9, 14)],
)
def test_what_is_joined_is_split_again(encoding: TopK, classes: int, item_bytes: int) -> None:
    """Also where 27 bytes leave one over, by torch as by NumPy, and of a part of the items."""
    together, generator = Interleaved.of(encoding, classes), np.random.default_rng(0)
    arrays = {
        name: np.frombuffer(generator.bytes(9 * np.dtype(dtype).itemsize * int(np.prod(shape))), dtype).reshape(
            9, *shape
        )
        for name, (dtype, shape) in encoding.arrays(classes).items()
    }
    items = together.join(tuple(arrays.values()))
    assert (items.shape, items.dtype.name, together.item_bytes) == ((9, item_bytes), "uint8", item_bytes)
    found, on_device = together.split(items[2:7]), split(torch.from_numpy(items)[2:7], together)
    assert list(found) == list(on_device) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array[2:7].tobytes()
        assert on_device[name].numpy().tobytes() == array[2:7].tobytes()
        assert split(torch.from_numpy(items)[:0], together)[name].shape == (0, *array.shape[1:])
