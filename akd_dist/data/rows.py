"""Rows: a dataset as numbered rows. The row number joins inputs and logits, so nothing can slip by one.

`prepare` turns the sources of a recipe into memory-mapped arrays, once per node, under a lock; every process there
shares them. The fingerprint of a split is over content and order, not over files.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.base.files import PARTIAL_SUFFIX, canonical_json, replace, sha256, with_checksum, without_checksum
from akd_dist.base.locks import file_lock
from akd_dist.data import findings, pictures, splitting
from akd_dist.data.blocks import default_threads
from akd_dist.data.columns import NotGreyError, notes_of
from akd_dist.data.labels import Classes
from akd_dist.data.origins import Origins, SourceCheck, Stamps, check_unchanged, compare, look_at, show
from akd_dist.data.prepare import OpenedSource, in_colour, open_sources, read_labels, write_source
from akd_dist.data.sources.base import Kind
from akd_dist.data.sources.kinds import kind_of
from akd_dist.data.splitting import LEFT_OUT, is_drawn, split_of_source
from akd_dist.data.text import Tokens, text_key
from akd_dist.storage.content import Content, Part, digest, discard, inodes_of, map_array
from akd_dist.storage.node_cache import IN_USE, hold, make_room

BLOCK_ROWS = 4096
"""Rows of one block of the fingerprint."""
SPLITS = splitting.SPLITS
"""The names of the splits."""
_INDEX = "index.json"
_FORMAT = 2  # of the prepared folder; part of its key


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
    files: tuple[Path, ...] = ()
    """The files that are mapped; none for rows that are not prepared."""
    inodes: tuple[int | None, ...] = ()
    """Theirs."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.inputs.shape[1:]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of rows start..stop - 1, without a copy."""
        return self.inputs[start:stop], self.labels[start:stop]

    def content(self, start: int = 0, stop: int | None = None) -> Content:
        """What the blocks that hold rows start..stop - 1 must hash to; by default all."""
        last = len(self) if stop is None else stop

        def parts() -> Iterator[Part]:
            for number in range(start // BLOCK_ROWS, min(-(-last // BLOCK_ROWS), len(self.blocks))):
                arrays = _block(self.inputs, self.labels, number * BLOCK_ROWS)
                end = number * BLOCK_ROWS + len(arrays[1])
                yield Part(f"rows {number * BLOCK_ROWS:,} to {end - 1:,}", arrays, self.blocks[number])

        return Content(self.files, parts, self.inodes)

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
    sources: SourceCheck = field(default_factory=lambda: SourceCheck({}, lambda: None), kw_only=True)
    """Files that the rows are believed to be made from, still to be read."""
    findings: tuple[str, ...] = field(default=(), kw_only=True)
    """What a user should know of them, a line each: found when they were prepared, and kept with them."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each split."""
        return {name: getattr(self, name).fingerprint for name in SPLITS}

    def contents(self) -> list[Content]:
        """What all rows must hash to."""
        return [getattr(self, name).content() for name in SPLITS]


def prepare(
    data: recipe.DataSpec,
    cache_root: Path,
    *,
    budget: int | None = None,
    on_progress: Progress | None = None,
    again: bool = False,
    expected: Mapping[str, str] | None = None,
) -> Splits:
    """The splits of a recipe's data as memory-mapped arrays, prepared on this node if they are not yet.

    A fraction is cut from the train source by an order seeded with `data.seed`; within a split rows keep the order of
    their source. All cores decode. Memory stays bounded: a few megabytes of inputs for each thread, and about 40 bytes
    for each row of the source; about 80 while a stratified split is drawn.

    Args:
        data: sources, split and seed.
        cache_root: prepared data lies in `<cache_root>/rows/<key>/`; the key is over sources, sizes and times of files,
            the split, the task, the tokenizer, and how images become pixels.
        again: prepare them afresh, whatever is there.
        expected: the fingerprints of splits, of those who know them. Sources are not looked at then, as rows are known
            by these; rows that have others are prepared afresh.
        budget: bytes that everything under `cache_root` may take; None for the default budget of the node cache.
        on_progress: called with what is being read, rows done, and rows in all.

    Raises:
        RecipeError: data.text.length leaves no room for text.
        RefusedError: a file or column is missing, a label out of range, an image not decodable; names the column and
            the first such row. Or a class has rows, and none of them are train rows. Nothing is left behind.
        MachineError: no room under `cache_root`, or it cannot be written; a hub cannot be reached.
    """
    tell = on_progress or (lambda what, done, total: None)
    specs = {name: getattr(data, name) for name in SPLITS}
    kinds = {name: kind_of(spec) for name, spec in specs.items() if not isinstance(spec, float)}
    keys = {name: kind.key() for name, kind in kinds.items()}
    files = [Path(path) for path in dict.fromkeys(file[0] for key in keys.values() for file in key.get("files", []))]
    folder = cache_root / "rows" / sha256(canonical_json(_key(data, keys)))[:32]
    with file_lock(folder.with_suffix(".lock"), what=f"the prepared data {folder}"):
        splits = None if again else _open(folder)
        if splits is not None:
            splits = _believed(splits, folder, files, kinds) if expected is None else _as_expected(splits, expected)
        if splits is None:
            _write(folder, data, kinds, files, cache_root, budget, tell)
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
    blocks = []
    with ThreadPoolExecutor(default_threads()) as pool:
        found = pool.map(lambda start: digest(_block(inputs, labels, start)), range(0, len(labels), BLOCK_ROWS))
        for number, block in enumerate(found, 1):
            blocks.append(block)
            if on_progress is not None:
                on_progress(min(number * BLOCK_ROWS, len(labels)), len(labels))
    meaning = _meaning(classes, task, class_names, tokens)
    return _fingerprint(inputs, labels, meaning, blocks), tuple(blocks)


def _fingerprint(inputs: np.ndarray, labels: np.ndarray, meaning: dict[str, Any], blocks: Sequence[str]) -> str:
    """The fingerprint of rows whose blocks have these digests."""
    header = {
        "dtype": inputs.dtype.str,
        "shape": list(inputs.shape[1:]),
        "rows": len(labels),
        "block_rows": BLOCK_ROWS,
        **meaning,
    }
    return sha256(canonical_json({**header, "blocks": list(blocks)}))


def _block(inputs: np.ndarray, labels: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """What one digest is over."""
    return inputs[start : start + BLOCK_ROWS], labels[start : start + BLOCK_ROWS]


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


# ---- preparing


def _key(data: recipe.DataSpec, keys: dict[str, dict[str, Any]]) -> dict[str, Any]:
    fractions = {name: getattr(data, name) for name in SPLITS if name not in keys}
    key = {
        "format": _FORMAT,
        **({"stratify": True} if data.stratify and is_drawn(data) else {}),
        "sources": keys,
        "fractions": fractions,
        "subset": data.subset,
        "seed": data.seed if fractions or data.subset else None,
        "task": data.task,
        "text": text_key(data.text),
    }
    if data.text is None and any(isinstance(getattr(data, name), recipe.Table) for name in keys):
        key["image"] = {"rules": pictures.RULES, **data.image.model_dump(mode="json")}
    return key


def _write(
    folder: Path,
    data: recipe.DataSpec,
    kinds: dict[str, Kind],
    files: list[Path],
    cache_root: Path,
    budget: int | None,
    tell: Progress,
) -> None:
    """Prepare all splits in a folder beside `folder`, then give it its name: it appears whole or not at all."""
    origins, stamps = look_at(files)
    readings = open_sources(data, kinds)
    stratified = None
    if data.stratify and is_drawn(data):
        stratified = read_labels(readings["train"], functools.partial(tell, "the labels of data.train"))
    splits = {name: split_of_source(name, data, one.source, stratified) for name, one in readings.items()}

    def write(readings: dict[str, OpenedSource], tell: Progress) -> None:
        _write_readings(folder, data, readings, splits, origins, stamps, cache_root, budget, tell)

    try:
        write(readings, tell)
    except NotGreyError:  # an image has colours, and those before it were grey
        write(in_colour(readings), lambda what, done, total: tell(f"{what}, in colour", done, total))


def _write_readings(
    folder: Path,
    data: recipe.DataSpec,
    readings: dict[str, OpenedSource],
    splits: dict[str, np.ndarray],
    origins: Origins,
    stamps: Stamps,
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
        classes, counts = Classes(), np.zeros((), dtype=np.int64)
        for name, reading in readings.items():
            parts = {
                number: splits[name] == number for number in np.unique(splits[name]).tolist() if number != LEFT_OUT
            }
            outputs = [(part, *_files(partial, SPLITS[number])) for number, part in parts.items()]
            told = functools.partial(tell, f"the rows of data.{name}")
            classes, labels = write_source(reading, outputs, data.task, classes, told)
            if data.task == "classification":
                counts = counts + splitting.count(splits[name], labels, classes.number or 0)
            del labels  # eight bytes a row
        lines = [note for reading in readings.values() for note in reading.source.notes]
        lines += [note for name, reading in readings.items() for note in notes_of(reading.inputs, f"data.{name}")]
        if data.task == "classification":
            splitting.check_classes(data, counts, classes.names)
            lines += findings.of_classes(counts[0], classes.names)
        lines += findings.in_two_splits(
            {name: _arrays(partial, name)[0] for name in SPLITS}, functools.partial(tell, "rows in two splits")
        )
        origins["shown"] = show({name: reading.source for name, reading in readings.items()})
        check_unchanged(origins, stamps)
        _write_index(partial, data.task, classes, readings["train"].inputs.tokens, lines, origins, tell)
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
    folder: Path,
    task: recipe.Task,
    classes: Classes,
    tokens: Tokens | None,
    lines: Sequence[str],
    origins: Origins,
    tell: Progress,
) -> None:
    assert classes.number is not None
    index: dict[str, Any] = _meaning(classes.number, task, classes.names, tokens)
    for name in SPLITS:
        inputs, labels = _arrays(folder, name)
        told = functools.partial(tell, f"the fingerprint of the {name} rows")
        digest, blocks = fingerprint(
            inputs, labels, classes.number, task=task, class_names=classes.names, tokens=tokens, on_progress=told
        )
        index[name] = {"fingerprint": digest, "blocks": blocks, "files": _stats(folder, name)}
    index["findings"] = list(dict.fromkeys(lines))
    replace(folder / _INDEX, with_checksum(index | {"origins": origins}))


def _open(folder: Path) -> Splits | None:
    """The prepared splits; None where there are none, or not whole ones."""
    try:
        index = without_checksum((folder / _INDEX).read_bytes())
        splits = [_rows(folder, name, index) for name in SPLITS]
        lines = tuple(map(str, index.get("findings", ())))  # rows of before have none
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Splits(*splits, findings=lines)


def _rows(folder: Path, name: str, index: dict[str, Any]) -> Rows:
    """The rows of a split as they were written, as far as that is known without reading them."""
    split = index[name]
    if _stats(folder, name) != split["files"]:
        raise ValueError(f"{folder}: the arrays of {name} are not the files that were fingerprinted")
    rows = Rows(
        *_arrays(folder, name),
        classes=index["classes"],
        fingerprint=split["fingerprint"],
        blocks=tuple(split["blocks"]),
        folder=folder,
        task=index.get("task", "classification"),
        class_names=tuple(index["class_names"]) if "class_names" in index else None,
        tokens=Tokens.model_validate(index["tokens"]) if "tokens" in index else None,
        files=_files(folder, name),
        inodes=inodes_of(_files(folder, name)),
    )
    label = np.dtype(np.int64 if rows.task == "classification" else np.float32)
    meaning = _meaning(rows.classes, rows.task, rows.class_names, rows.tokens)
    if (
        (rows.labels.shape, rows.labels.dtype) != ((len(rows.inputs),), label)
        or len(rows.blocks) != -(-len(rows) // BLOCK_ROWS)
        or _fingerprint(rows.inputs, rows.labels, meaning, rows.blocks) != rows.fingerprint
    ):
        raise ValueError(f"{folder}: the arrays of {name} are not those that were fingerprinted")
    return rows


def _believed(splits: Splits, folder: Path, files: list[Path], kinds: dict[str, Kind]) -> Splits | None:
    """Prepared splits, unless their sources are seen to have changed: then None."""
    index = without_checksum((folder / _INDEX).read_bytes())
    origins, believed = compare(index["origins"], files, kinds)
    if origins is None:
        return None
    if origins != index["origins"]:
        replace(folder / _INDEX, with_checksum(index | {"origins": origins}))
    forget = functools.partial(discard, splits.train.files, splits.train.inodes)
    return dataclasses.replace(splits, sources=SourceCheck(believed, forget))


def _as_expected(splits: Splits, expected: Mapping[str, str]) -> Splits | None:
    """Prepared splits, unless they are others than those that somebody has seen: then None."""
    same = all(getattr(splits, name).fingerprint == fingerprint for name, fingerprint in expected.items())
    return splits if same else None


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
        mapped = map_array(file)
        keep.until_unmapped(mapped)
    return np.asarray(mapped)
