"""The same few rows in every kind of source: as files that a recipe names, or as a module of the user's own."""

from __future__ import annotations

import gzip
import importlib
import itertools
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data import hub
from akd_dist.data.row_cache import prepare
from tests.fleets import own

KINDS = ("parquet", "idx", "idx.gz", "huggingface", "table", "dataset")
_names = itertools.count()


def idx_bytes(values: np.ndarray, code: int | None = None) -> bytes:
    """An IDX file."""
    codes = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
    big = values.astype(values.dtype.newbyteorder(">"))
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return struct.pack(">HBB", 0, code or codes[values.dtype.str[1:]], values.ndim) + shape + big.tobytes()


def idx(folder: Path, images: bytes, labels: bytes, **options: Any) -> recipe.Idx:
    """A source of two files; gzip-compressed where `folder` says so."""
    folder.mkdir(parents=True, exist_ok=True)
    compress = gzip.compress if folder.suffix == ".gz" else bytes
    (folder / "images").write_bytes(compress(images))
    (folder / "labels").write_bytes(compress(labels))
    return recipe.Idx(images=str(folder / "images"), labels=str(folder / "labels"), **options)


def module(folder: Path, code: str) -> str:
    """A module of the user's own that can be imported; its name."""
    name = f"user_data_{next(_names)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # for tests that import it themselves
    importlib.invalidate_caches()
    return name


DATASET = """
class Items:
    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        if isinstance(self.labels[row], Exception):
            raise self.labels[row]
        return self.inputs[row], self.labels[row]
"""


def dataset(folder: Path, inputs: Any, labels: Any, **options: Any) -> recipe.CustomData:
    """A map-style dataset over two sequences."""
    name = module(folder, f"{DATASET}\ndata = []\ndef make():\n    return Items(*data)\n")
    importlib.import_module(name).data.extend([inputs, labels])
    return own(recipe.CustomData(factory=f"{name}:make", **options), folder)


def table(folder: Path, made: Any, **options: Any) -> recipe.CustomData:
    """A function that returns what it is given."""
    name = module(folder, "data = []\ndef make():\n    return data[0]\n")
    importlib.import_module(name).data.append(made)
    return own(recipe.CustomData(factory=f"{name}:make", **options), folder)


def parquet(folder: Path, made: Any, **options: Any) -> recipe.Parquet:
    """A Parquet file."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, folder / "data.parquet", row_group_size=4)
    return recipe.Parquet(path=str(folder / "data.parquet"), **options)


def huggingface(folder: Path, made: Any, **options: Any) -> recipe.HuggingFaceData:
    """A dataset that was saved to disk."""
    hub.require_extra("datasets").Dataset(made).save_to_disk(str(folder))
    return recipe.HuggingFaceData(path=str(folder), **options)


def source(kind: str, folder: Path, inputs: np.ndarray, labels: Any, **options: Any) -> Any:
    """Rows of uint8 [n, ...] in a source of this kind; tables have the columns `input` and `label`."""
    place = folder / kind
    columns = pa.table({"input": pa.array(inputs.tolist()).cast(_lists(inputs.ndim - 1)), "label": labels})
    match kind:
        case "parquet":
            return parquet(place, columns, **options)
        case "huggingface":
            return huggingface(place, columns, **options)
        case "table":
            return table(place, columns, **options)
        case "dataset":
            return dataset(place, inputs, labels, **options)
        case _:
            return idx(place, idx_bytes(inputs), idx_bytes(np.array(labels, dtype=np.uint8)), **options)


def refused_whole(make: Callable[[Path], Any], words: Sequence[str], folder: Path) -> None:
    """Prepare what `make` gives, a recipe's data or its train source: it is refused in these words, and nothing is left
    in the cache.
    """
    made = make(folder)
    with pytest.raises(RefusedError) as caught:
        prepare(made if isinstance(made, recipe.DataSpec) else recipe.DataSpec(train=made), folder / "cache")
    assert caught.value.code == 4
    for word in words:
        assert word in str(caught.value)
    assert not list(folder.glob("cache/rows/*/index.json"))
    assert not list(folder.glob("cache/rows/*.partial"))


def _lists(depth: int) -> Any:
    kind = pa.uint8()
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind
