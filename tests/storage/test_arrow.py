"""A store as an array of rows, and as a stream of Arrow."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests import stores


def test_a_store_is_asked_for_rows_as_an_array_is(tmp_path: Path) -> None:
    store = stores.build(tmp_path)
    whole = np.stack([store.rows(view, 0, len(store)) for view in range(store.views)])
    assert len(store) == whole.shape[1] == store.num_rows
    for rows in (slice(None), slice(2, 9), slice(-3, None), slice(None, None, 7), slice(9, 2, -2), slice(5, 5), 3, -1):
        assert np.array_equal(store[rows], whole[:, rows])
        assert np.array_equal(store[1, rows], whole[1, rows])
        assert np.array_equal(store[-1, rows], whole[-1, rows])
        assert store[rows].dtype == np.float32
    assert np.array_equal(np.stack(list(store)), whole.swapaxes(0, 1)), "it is iterated by row"
    for wrong in (len(store), -len(store) - 1, (store.views, 0)):
        with pytest.raises(IndexError):
            store[wrong]
    for no_place in ("a", 1.5, (0, [1, 2])):
        with pytest.raises(TypeError):
            store[no_place]


def test_a_store_is_a_stream_of_arrow(tmp_path: Path) -> None:
    store = stores.build(tmp_path)
    reader = store.to_arrow()
    assert reader.schema.field("logits").type == pa.list_(pa.float32(), store.classes)
    batches = list(reader)
    assert len(batches) == store.layout.shard_count
    table = store.to_arrow().read_all()
    assert table["row"].to_pylist() == [*range(len(store))] * store.views
    assert table["view"].to_pylist() == [view for view in range(store.views) for _ in range(len(store))]
    logits = np.array(table["logits"].to_pylist(), dtype=np.float32)
    assert np.array_equal(logits, store[:].reshape(-1, store.classes))
    assert set(store.to_arrow([-1]).read_all()["view"].to_pylist()) == {store.views - 1}
    with pytest.raises(IndexError):
        store.to_arrow([store.views])
