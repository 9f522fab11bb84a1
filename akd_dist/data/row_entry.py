"""An entry of the node's cache that holds prepared rows: arrays of each split, and the index that vouches for them."""

from pathlib import Path
from typing import Any

import numpy as np

from akd_dist.base.errors import is_limit
from akd_dist.base.files import without_checksum
from akd_dist.data.encoded import Mapped, pictures_of
from akd_dist.data.row_files import names_of
from akd_dist.data.rows import BLOCK_ROWS, SPLITS, Rows, Splits, block_fingerprint, meaning_of
from akd_dist.data.text import Tokens
from akd_dist.storage.content import inodes_of, map_array
from akd_dist.storage.node_cache import hold

INDEX = "index.json"
"""Written last in the entry."""


def open_entry(folder: Path) -> Splits | None:
    """The prepared splits; None where there are none, or not whole ones.

    Raises:
        OSError: this process may open no more files, which says nothing of these.
    """
    try:
        index = without_checksum((folder / INDEX).read_bytes())
        splits = [_rows(folder, name, index) for name in SPLITS]
        lines = tuple(map(str, index.get("findings", ())))  # rows that an earlier version prepared have none
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and is_limit(error):
            raise
        return None
    return Splits(*splits, findings=lines)


def _rows(folder: Path, name: str, index: dict[str, Any]) -> Rows:
    """The rows of a split as they were written, as far as that is known without reading them."""
    split = index[name]
    if stats_of(folder, name, index) != split["files"]:
        raise ValueError(f"{folder}: the arrays of {name} are not the files that were fingerprinted")
    encoded, files = index.get("encoded"), names_of(folder, name, encoded="encoded" in index)
    rows = Rows(
        *arrays_of(folder, name, encoded),
        classes=index["classes"],
        fingerprint=split["fingerprint"],
        blocks=tuple(split["blocks"]),
        folder=folder,
        task=index.get("task", "classification"),
        class_names=tuple(index["class_names"]) if "class_names" in index else None,
        tokens=Tokens.model_validate(index["tokens"]) if "tokens" in index else None,
        with_labels=index.get("labelled") if name == "train" else None,
        files=files,
        inodes=inodes_of(files),
    )
    label = np.dtype(np.float32 if rows.task == "regression" else np.int64)
    meaning = meaning_of(rows.classes, rows.task, rows.class_names, rows.tokens, encoded)
    if (
        (rows.labels.shape, rows.labels.dtype) != ((len(rows.inputs),), label)
        or len(rows.blocks) != -(-len(rows) // BLOCK_ROWS)
        or block_fingerprint(rows.inputs.dtype, rows.inputs.shape, meaning, rows.blocks) != rows.fingerprint
    ):
        raise ValueError(f"{folder}: the arrays of {name} are not those that were fingerprinted")
    return rows


def stats_of(folder: Path, name: str, index: dict[str, Any]) -> list[list[int]]:
    """Size and time of a split's files: one that was touched since it was fingerprinted is not trusted."""
    files = names_of(folder, name, encoded="encoded" in index)
    return [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def arrays_of(folder: Path, name: str, encoded: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of a split, memory-mapped.

    Args:
        encoded: what the meaning of the rows says of pictures that stay encoded.

    Raises:
        ValueError: they are no such arrays.
    """
    inputs, labels, *index = map(_mapped, names_of(folder, name, encoded=encoded is not None))
    if encoded is None:
        return inputs, labels
    return pictures_of(Mapped(index[0], inputs), encoded).as_array(), labels


def _mapped(file: Path) -> np.ndarray:
    """A read-only map that keeps its folder from being evicted; a plain array, as indexing np.memmap costs more."""
    with hold(file.parent) as keep:
        mapped = map_array(file)
        keep.until_unmapped(mapped)
    return np.asarray(mapped)
