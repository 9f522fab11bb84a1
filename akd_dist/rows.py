"""Rows: a dataset as numbered rows. The row number joins inputs and logits, so nothing can slip by one.

`prepare` turns the sources of a recipe into memory-mapped arrays, once per node, under a lock; every process there
shares them. The fingerprint of a split is over content and order, not over files.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist import pictures, recipe
from akd_dist.blocks import default_threads
from akd_dist.columns import NotGreyError, notes_of
from akd_dist.labels import Classes
from akd_dist.prepare import Reading, in_colour, open_sources, write_source
from akd_dist.sources import Kind, Source, kind_of
from akd_dist.storage.errors import MachineError, RefusedError
from akd_dist.storage.files import PARTIAL_SUFFIX, canonical_json, file_lock, replace, sha256
from akd_dist.storage.node_cache import IN_USE, hold, make_room
from akd_dist.text import Tokens, text_key

BLOCK_ROWS = 4096
"""Rows of one block of the fingerprint."""
SPLITS = ("train", "validation", "test")
LEFT_OUT = len(SPLITS)
"""In place of a split: a train row that is not in the subset."""
_FORMAT = 2  # of the prepared folder; part of its key
_SUBSET_KEY = 1 << 62  # of the generator that draws a subset; key 0 splits, and epochs have the keys from 1 on


Progress = Callable[[str, int, int], None]
"""Called with (what is being done, rows done, rows in all)."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Numbered rows of a split, memory-mapped and read-only."""

    inputs: np.ndarray
    """uint8, float32 or int32 [rows, *shape]: images [channels, height, width], numbers, or ids of tokens [length]."""
    labels: np.ndarray
    """int64 [rows], each in 0..classes - 1; float32 [rows] for regression."""
    classes: int
    """Number of logits a row has: the classes; 1 for regression."""
    fingerprint: str
    """sha256 over dtype, shape, what labels and ids mean, and the digests of all blocks."""
    blocks: tuple[str, ...]
    """sha256 of each BLOCK_ROWS rows: bytes of the inputs, then of the labels."""
    folder: Path
    """Where the arrays lie."""
    task: recipe.Task = "classification"
    """What a label is."""
    class_names: tuple[str, ...] | None = None
    """The names of classes 0, 1, ..., where the data has names."""
    tokens: Tokens | None = None
    """What ids mean, where inputs are text."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.inputs.shape[1:]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of rows start..stop - 1, without a copy."""
        return self.inputs[start:stop], self.labels[start:stop]

    def describe(self) -> dict[str, Any]:
        """What a store remembers of its dataset, enough to name the first block that differs."""
        return {
            "fingerprint": self.fingerprint,
            "rows": len(self),
            "block_rows": BLOCK_ROWS,
            "blocks": list(self.blocks),
            "meaning": self._meaning,
        }

    @property
    def _meaning(self) -> dict[str, Any]:
        meaning = _meaning(self.classes, self.task, self.class_names, self.tokens)
        return {"dtype": self.inputs.dtype.str, "shape": list(self.shape), **meaning}

    def check_same(self, described: dict[str, Any]) -> None:
        """Refuse if these are not the very rows that `describe` once told of.

        Raises:
            RefusedError: names the first block that differs.
        """
        if described["fingerprint"] == self.fingerprint:
            return
        raise RefusedError(
            "the dataset is not the one the store was made from",
            got=f"fingerprint {self.fingerprint[:16]}, {len(self):,} rows; "
            f"{first_difference(self.describe(), described)}",
            expected=f"fingerprint {described['fingerprint'][:16]}, {described['rows']:,} rows",
            next="bring back the data, its order and its split, or cache the teacher anew",
        )


def blocks_in_common(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """How many blocks two descriptions (`Rows.describe`) share before the first that differs."""
    pairs = itertools.zip_longest(ours["blocks"], theirs["blocks"])
    return next((number for number, (one, other) in enumerate(pairs) if one != other), len(ours["blocks"]))


def first_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Where two datasets that are not the same begin to differ, from their descriptions (`Rows.describe`)."""
    common = blocks_in_common(ours, theirs)
    if common == len(ours["blocks"]) == len(theirs["blocks"]):
        changed = "; ".join(recipe.differences(theirs.get("meaning", {}), ours.get("meaning", {})))
        return f"the rows are the same, but not what they mean{changed and ': '}{changed}"
    return f"rows {common * BLOCK_ROWS:,} to {(common + 1) * BLOCK_ROWS:,} are the first that differ"


@dataclass(frozen=True, eq=False)
class Splits:
    """The three disjoint parts of a recipe's data."""

    train: Rows
    """What teachers and students learn from; the only rows that are augmented."""
    validation: Rows
    """What picks the best epoch."""
    test: Rows
    """What is reported, once."""
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    """What of their sources is left out without being wrong, a line each."""


def prepare(
    data: recipe.Data, cache_root: Path, *, budget: int | None = None, on_progress: Progress | None = None
) -> Splits:
    """The splits of a recipe's data as memory-mapped arrays, prepared on this node if they are not yet.

    A fraction is cut from the train source by an order seeded with `data.seed`; within a split rows keep the order of
    their source. All cores decode. Memory stays bounded: a few megabytes of inputs for each thread, and about 40 bytes
    for each row of the source.

    Args:
        data: sources, split and seed.
        cache_root: prepared data lies in `<cache_root>/rows/<key>/`; the key is over sources, sizes and times of files,
            the split, the task, the tokenizer, and how images become pixels.
        budget: bytes that everything under `cache_root` may take; None for the default budget of the node cache.
        on_progress: called with what is being read, rows done, and rows in all.

    Raises:
        RecipeError: data.text.length leaves no room for text.
        RefusedError: a file or column is missing, a label out of range, an image not decodable; names the column and
            the first such row. Nothing is left behind.
        MachineError: no room under `cache_root`, or it cannot be written; a hub cannot be reached.
    """
    tell = on_progress or (lambda what, done, total: None)
    specs = {name: getattr(data, name) for name in SPLITS}
    kinds = {name: kind_of(spec) for name, spec in specs.items() if not isinstance(spec, float)}
    key = sha256(canonical_json(_key(data, kinds)))[:32]
    folder = cache_root / "rows" / key
    with file_lock(folder.with_suffix(".lock"), what=f"the prepared data {folder}"):
        splits = _open(folder)
        if splits is None:
            _write(folder, data, kinds, cache_root, budget, tell)
            splits = _open(folder)
    if splits is None:
        raise MachineError(
            f"the prepared data {folder} cannot be read back", expected="the files just written", next="check the disk"
        )
    return splits


def fingerprint(
    inputs: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    task: recipe.Task = "classification",
    class_names: tuple[str, ...] | None = None,
    tokens: Tokens | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[str, tuple[str, ...]]:
    """The fingerprint of rows and the digests of their blocks: changes with any bit, any label, any swap, any meaning.

    Args:
        on_progress: called with rows done, and rows in all.
    """
    header = {
        "dtype": inputs.dtype.str,
        "shape": list(inputs.shape[1:]),
        "rows": len(labels),
        "block_rows": BLOCK_ROWS,
        **_meaning(classes, task, class_names, tokens),
    }

    def digest(start: int) -> str:
        block = hashlib.sha256()
        for array in (inputs, labels):
            block.update(np.ascontiguousarray(array[start : start + BLOCK_ROWS]).data)
        return block.hexdigest()

    blocks = []
    with ThreadPoolExecutor(default_threads()) as pool:
        for start, block in enumerate(pool.map(digest, range(0, len(labels), BLOCK_ROWS)), 1):
            blocks.append(block)
            if on_progress is not None:
                on_progress(min(start * BLOCK_ROWS, len(labels)), len(labels))
    return sha256(canonical_json({**header, "blocks": blocks})), tuple(blocks)


def _meaning(
    classes: int, task: recipe.Task, class_names: tuple[str, ...] | None, tokens: Tokens | None
) -> dict[str, Any]:
    """What labels and ids mean, as JSON. What is usual is left out, so that it may become a choice later."""
    meaning: dict[str, Any] = {"classes": classes}
    if task != "classification":
        meaning["task"] = task
    if class_names is not None:
        meaning["class_names"] = list(class_names)
    if tokens is not None:
        meaning["tokens"] = tokens.model_dump(mode="json")
    return meaning


# ---- splitting


def split_of_rows(rows: int, validation: float, test: float, seed: int) -> np.ndarray:
    """Which split each row belongs to: uint8 [rows], an index into SPLITS.

    A function of its arguments alone: raw Philox words are the same in every version of NumPy.
    """
    order = np.argsort(np.random.Philox(key=[seed, 0]).random_raw(rows), kind="stable")
    for_test, for_validation = round(rows * test), round(rows * validation)
    split = np.zeros(rows, dtype=np.uint8)
    split[order[:for_test]] = SPLITS.index("test")
    split[order[for_test : for_test + for_validation]] = SPLITS.index("validation")
    return split


def subset_of_rows(rows: int, wanted: int, seed: int) -> np.ndarray:
    """Which rows belong to a subset of `wanted`: bool [rows]. A smaller subset lies within a larger one."""
    order = np.argsort(np.random.Philox(key=[seed, _SUBSET_KEY]).random_raw(rows), kind="stable")
    chosen = np.zeros(rows, dtype=np.bool_)
    chosen[order[:wanted]] = True
    return chosen


def _split_of_source(name: str, data: recipe.Data, source: Source) -> np.ndarray:
    """Which split each row of a source belongs to, uint8 [rows]: all to its own, but shares of the train source."""
    if name != "train":
        return np.full(source.rows, SPLITS.index(name), dtype=np.uint8)
    given = {other: getattr(data, other) for other in ("validation", "test")}
    shares = {other: share if isinstance(share, float) else 0.0 for other, share in given.items()}
    split = split_of_rows(source.rows, seed=data.seed, **shares)
    needed = {"train", *(other for other, share in shares.items() if share)}
    empty = [other for other in SPLITS if other in needed and not (split == SPLITS.index(other)).any()]
    if empty:
        raise RefusedError(
            f"no rows are left for {' and '.join(empty)}",
            got=f"{source.rows:,} rows in {source.name}, with the shares {shares}",
            expected="at least one row in each split",
            next="change data.validation and data.test, or add rows",
        )
    train = np.flatnonzero(split == SPLITS.index("train"))
    if data.subset is not None:
        if data.subset > len(train):
            raise RefusedError(
                "data.subset is larger than what there is",
                got=f"{data.subset:,} of {len(train):,} train rows in {source.name}",
                expected=f"at most {len(train):,}",
                next="lower data.subset, or leave it out to train on all rows",
            )
        split[train[~subset_of_rows(len(train), data.subset, data.seed)]] = LEFT_OUT
    return split


# ---- preparing


def _key(data: recipe.Data, kinds: dict[str, Kind]) -> dict[str, Any]:
    fractions = {name: getattr(data, name) for name in SPLITS if name not in kinds}
    key = {
        "format": _FORMAT,
        "sources": {name: kind.key() for name, kind in kinds.items()},
        "fractions": fractions,
        "subset": data.subset,
        "seed": data.seed if fractions or data.subset else None,
        "task": data.task,
        "text": text_key(data.text),
    }
    if data.text is None and any(isinstance(getattr(data, name), recipe.Table) for name in kinds):
        key["image"] = {"rules": pictures.RULES, **data.image.model_dump(mode="json")}
    return key


def _write(
    folder: Path, data: recipe.Data, kinds: dict[str, Kind], cache_root: Path, budget: int | None, tell: Progress
) -> None:
    """Prepare all splits in a folder beside `folder`, then give it its name: it appears whole or not at all."""
    readings = open_sources(data, kinds)
    splits = {name: _split_of_source(name, data, reading.source) for name, reading in readings.items()}
    try:
        _write_readings(folder, data, readings, splits, cache_root, budget, tell)
    except NotGreyError:  # an image has colours, and those before it were grey

        def tell_again(what: str, done: int, total: int) -> None:
            tell(f"{what}, in colour", done, total)

        _write_readings(folder, data, in_colour(readings), splits, cache_root, budget, tell_again)


def _write_readings(
    folder: Path,
    data: recipe.Data,
    readings: dict[str, Reading],
    splits: dict[str, np.ndarray],
    cache_root: Path,
    budget: int | None,
    tell: Progress,
) -> None:
    needed = sum(reading.bytes_of(splits[name] != LEFT_OUT) for name, reading in readings.items())
    make_room(cache_root, needed, budget)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        # Left by killed processes: the lock is ours.
        _remove(folder, *folder.parent.glob(f"{folder.name}.*{PARTIAL_SUFFIX}"))
        partial.mkdir(parents=True)
        classes = Classes()
        for name, reading in readings.items():
            parts = {
                number: splits[name] == number for number in np.unique(splits[name]).tolist() if number != LEFT_OUT
            }
            files = [(part, *_files(partial, SPLITS[number])) for number, part in parts.items()]
            classes = write_source(
                reading, files, data.task, classes, functools.partial(tell, f"the rows of data.{name}")
            )
        notes = [note for name, reading in readings.items() for note in notes_of(reading.inputs, f"data.{name}")]
        _write_index(partial, data.task, classes, readings["train"].inputs.tokens, notes, tell)
        (partial / IN_USE).touch()
        partial.rename(folder)
    except OSError as error:
        raise MachineError(
            f"cannot prepare the data in {folder}",
            got=error.strerror or str(error),
            expected=f"{needed:,} bytes free in a folder that this user can write to",
            next="free some space, or choose another folder with --cache-root",
        ) from error
    finally:
        _remove(partial)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _write_index(
    folder: Path, task: recipe.Task, classes: Classes, tokens: Tokens | None, notes: list[str], tell: Progress
) -> None:
    assert classes.number is not None
    index: dict[str, Any] = _meaning(classes.number, task, classes.names, tokens) | {"notes": notes}
    for name in SPLITS:
        inputs, labels = _arrays(folder, name)
        told = functools.partial(tell, f"the fingerprint of the {name} rows")
        digest, blocks = fingerprint(
            inputs, labels, classes.number, task=task, class_names=classes.names, tokens=tokens, on_progress=told
        )
        index[name] = {"fingerprint": digest, "blocks": blocks, "files": _stats(folder, name)}
    replace(folder / "index.json", json.dumps(index, indent=1).encode())


def _open(folder: Path) -> Splits | None:
    """The prepared splits; None where there are none, or not whole ones."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        splits = [_rows(folder, name, index) for name in SPLITS]
        notes = tuple(index.get("notes", ()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Splits(*splits, notes=notes)


def _rows(folder: Path, name: str, index: dict[str, Any]) -> Rows:
    split = index[name]
    if _stats(folder, name) != split["files"]:
        raise ValueError(f"{folder}: the arrays of {name} are not the files that were fingerprinted")
    return Rows(
        *_arrays(folder, name),
        classes=index["classes"],
        fingerprint=split["fingerprint"],
        blocks=tuple(split["blocks"]),
        folder=folder,
        task=index.get("task", "classification"),
        class_names=tuple(index["class_names"]) if "class_names" in index else None,
        tokens=Tokens.model_validate(index["tokens"]) if "tokens" in index else None,
    )


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}-inputs.npy", folder / f"{name}-labels.npy"


def _stats(folder: Path, name: str) -> list[list[int]]:
    """Size and time of a split's files: one that was touched since it was fingerprinted is not trusted."""
    return [[file.stat().st_size, file.stat().st_mtime_ns] for file in _files(folder, name)]


def _arrays(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of a split, memory-mapped."""
    inputs, labels = _files(folder, name)
    return _mapped(inputs), _mapped(labels)


def _mapped(file: Path) -> np.ndarray:
    """A read-only map that keeps its folder from being evicted; a plain array, as indexing np.memmap costs more."""
    with hold(file.parent) as keep:
        mapped = np.load(file, mmap_mode="r")
        keep.until_unmapped(mapped)
    return np.asarray(mapped)
