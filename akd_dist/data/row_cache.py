"""Sources as memory-mapped rows, prepared once per node under a lock, and found again by every process there."""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import MachineError, is_limit, limit_reached
from akd_dist.base.files import (
    PARTIAL_SUFFIX,
    canonical_json,
    partial_name,
    replace,
    sha256,
    with_checksum,
    without_checksum,
)
from akd_dist.base.locks import file_lock
from akd_dist.data import findings, pictures, splitting
from akd_dist.data.columns import NotGreyError, notes_of
from akd_dist.data.documents import key_of_text, open_documents
from akd_dist.data.labels import Classes
from akd_dist.data.origins import Origin, Origins, SourceCheck, Stamps, check_unchanged, compare, look_at, show
from akd_dist.data.packed_files import tokenize, write_blocks
from akd_dist.data.prepare import (
    OpenedSource,
    Part,
    in_colour,
    kept_as,
    kinds_of,
    open_sources,
    read_labels,
    telling_sizes,
    write_source,
)
from akd_dist.data.row_entry import INDEX, arrays_of, open_entry, stats_of
from akd_dist.data.row_files import RowsFile, names_of
from akd_dist.data.rows import SPLITS, Splits, fingerprint, meaning_of
from akd_dist.data.sources.base import Kind, local_files
from akd_dist.data.splitting import (
    LEFT_OUT,
    UNLABELLED,
    RowCounts,
    is_drawn,
    reads_labels_first,
    rows_by_split,
    split_of_source,
)
from akd_dist.data.text import Tokens, text_key
from akd_dist.storage.content import discard
from akd_dist.storage.node_cache import Keep, NoRoomError, make_room, name_entry

# The format of the folder. It is part of its key, so that rows in an older format are prepared afresh.
_FORMAT = 2
# Sources that may hold encoded images.
_OF_IMAGES = recipe.Table | recipe.ImageFolder | recipe.WebDataset
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, rows done, rows in all)."""


def prepare(
    data: recipe.DataSpec,
    cache_root: Path,
    *,
    budget: int | None = None,
    most: int | None = None,
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
        most: bytes that these rows may take, also where they are there already; None for all that there is room for.
        on_progress: called with what is being read, rows done, and rows in all.

    Raises:
        RecipeError: data.text.length leaves no room for text.
        RefusedError: a file or column is missing, a label out of range, an image not decodable; names the column and
            the first such row. Or a class has rows, and none of them are train rows. Nothing is left behind.
        NoRoomError: they take more than they may, or there is no room under `cache_root`.
        MachineError: it cannot be written; a hub cannot be reached.
    """
    tell = on_progress or (lambda what, done, total: None)
    kinds = kinds_of(data)
    keys = {name: kind.key() for name, kind in kinds.items()}
    files = local_files(kinds, keys)
    folder = cache_root / "rows" / sha256(canonical_json(key_of(data, keys)))[:32]
    with file_lock(folder.with_suffix(".lock"), what=f"the prepared data {folder}"):
        splits = None if again else open_entry(folder)
        if splits is not None:
            _check_size(cache_root, splits.nbytes, most)
            splits = _believed(splits, folder, files, kinds) if expected is None else _as_expected(splits, expected)
        if splits is None:
            # What was written is then read back as every other process will find it.
            keep = _write(folder, data, kinds, files, functools.partial(_room_for, cache_root, budget, most), tell)
            try:
                splits = open_entry(folder)
            finally:
                keep.release()
    if splits is None:
        raise MachineError(
            f"the prepared data {folder} cannot be read back", expected="the files just written", next="check the disk"
        )
    return splits


def key_of(data: recipe.DataSpec, keys: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What prepared rows are known by, as JSON: `keys` of their sources, and how these become rows."""
    fractions = {name: getattr(data, name) for name in SPLITS[1:] if name not in keys}
    key: dict[str, Any] = {
        "format": _FORMAT,
        # Only where it changes which rows go where: for all others the key stays what it was before recipes had
        # `stratify`.
        **({"stratify": True} if data.stratify and is_drawn(data) else {}),
        **({"unlabelled": data.unlabelled} if isinstance(data.unlabelled, str) else {}),
        "sources": keys,
        "fractions": fractions,
        "subset": data.subset,
        # Where nothing is drawn the seed decides nothing, so recipes of any seed find the same rows.
        "seed": data.seed if fractions or data.subset else None,
        "task": data.task,
        "text": key_of_text(data) if data.task == "language_model" else text_key(data.text),
    }
    if data.text is None and any(isinstance(source, _OF_IMAGES) for source in data.sources.values()):
        kept = {"encoded": data.image.keep} if data.asks_for_encoded else {}
        key["image"] = {"rules": pictures.RULES, **data.image.written(), **kept}
    return key


def _write(
    folder: Path,
    data: recipe.DataSpec,
    kinds: dict[str, Kind],
    files: list[Origin],
    make_room: Callable[[int], None],
    tell: Progress,
) -> Keep:
    """Prepare all splits in a folder beside `folder`, then give it its name: it appears whole or not at all.

    Returns:
        The hold that keeps it.
    """
    origins, stamps = look_at(files)
    if data.task == "language_model":
        return _write_packed(folder, data, kinds, origins, stamps, make_room, tell)
    readings = open_sources(data, kinds)
    labels = None
    if reads_labels_first(data):
        told = functools.partial(tell, "the labels of data.train")
        _, labels = read_labels(readings["train"], data.task, Classes(), told)
    splits = {name: split_of_source(name, data, one.source, labels) for name, one in readings.items()}
    if data.task == "classification" and all(one.source.labels_at_hand for one in readings.values()):
        _check_labels(data, readings, splits, tell)

    def write(readings: dict[str, OpenedSource], tell: Progress) -> Keep:
        return _write_readings(folder, data, readings, splits, origins, stamps, make_room, tell)

    try:
        return write(readings, tell)
    except NotGreyError:
        # An image has colours and those before it were grey, so one channel was planned for all: begin again with
        # three.
        return write(in_colour(readings), lambda what, done, total: tell(f"{what}, in colour", done, total))


def _check_labels(
    data: recipe.DataSpec, readings: dict[str, OpenedSource], splits: dict[str, np.ndarray], tell: Progress
) -> None:
    """Refuse wrong labels before any input is read, which takes long where it has to be decoded.

    Raises:
        RefusedError: as `prepare`.
    """
    classes, counts = Classes(), np.zeros((), dtype=np.int64)
    for name, reading in readings.items():
        told = functools.partial(tell, f"the labels of data.{name}")
        classes, labels = read_labels(reading, data.task, classes, told)
        counts = counts + splitting.count(splits[name], labels, classes.number or 0)
    splitting.check_classes(data, counts, classes.names)


def _write_readings(
    folder: Path,
    data: recipe.DataSpec,
    readings: dict[str, OpenedSource],
    splits: dict[str, np.ndarray],
    origins: Origins,
    stamps: Stamps,
    make_room: Callable[[int], None],
    tell: Progress,
) -> Keep:
    needed = sum(reading.bytes_of(splits[name] != LEFT_OUT) for name, reading in readings.items())
    make_room(needed)
    with _making(folder, f"{needed:,} bytes free") as partial:
        rows, lead = rows_by_split(splits), next(iter(readings.values()))
        encoded = kept_as(lead)
        with telling_sizes(readings), contextlib.ExitStack() as stack:
            files = {
                name: RowsFile(names_of(partial, name, encoded=encoded is not None), rows.of(name), lead.inputs)
                for name in SPLITS
            }
            for file in files.values():
                stack.callback(file.close)
            classes, counts = Classes(), np.zeros((), dtype=np.int64)
            kept_labels: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
            for name, reading in readings.items():
                there = np.unique(splits[name]).tolist()
                numbers = [number for number in there if number not in (LEFT_OUT, UNLABELLED)]
                told = functools.partial(tell, f"the rows of data.{name}")
                if numbers:
                    parts = [Part(splits[name] == number, files[SPLITS[number]]) for number in numbers]
                    classes, labels = write_source(reading, parts, data.task, classes, told)
                    if data.task == "classification":
                        counts = counts + splitting.count(splits[name], labels, classes.number or 0)
                    for number, part in zip(numbers, parts, strict=True):
                        kept_labels[SPLITS[number]].append(labels[part.rows])
                    del labels  # eight bytes a row, which the next source would find taken
                if UNLABELLED in there:
                    # Behind those with labels: a source that has both is read again, without what is written already.
                    parts = [Part(splits[name] == UNLABELLED, files["train"])]
                    without = dataclasses.replace(reading, unlabelled="all")
                    _, labels = write_source(without, parts, data.task, classes, told)
                    kept_labels["train"].append(labels[parts[0].rows])
            for name, file in files.items():
                file.finish(np.concatenate(kept_labels[name]))
        lines = [note for reading in readings.values() for note in reading.source.notes]
        lines += [note for name, reading in readings.items() for note in notes_of(reading.inputs, f"data.{name}")]
        if data.task == "classification":
            splitting.check_classes(data, counts, classes.names)
            lines += findings.of_classes(counts[0], classes.names) if rows.labelled else []
        lines += findings.of_unlabelled(data, rows.labelled, rows.unlabelled)
        arrays = {name: arrays_of(partial, name, encoded) for name in SPLITS}
        kept = sum(one.nbytes for both in arrays.values() for one in both)
        lines += findings.of_encoded(kept, sum(len(labels) for _, labels in arrays.values()), encoded)
        lines += findings.in_two_splits(
            {name: inputs for name, (inputs, _) in arrays.items()}, functools.partial(tell, "rows in two splits")
        )
        del arrays  # mapped, and about to get another name
        origins["shown"] = show({name: reading.source for name, reading in readings.items()})
        # Once all of them have been read: of a file that was written meanwhile, nobody could say which rows it gave.
        check_unchanged(origins, stamps)
        _write_index(partial, data.task, classes, lead.inputs.tokens, encoded, rows, lines, origins, tell)
        # Whole from the moment that it has its name, like everything in the cache.
        return name_entry(partial, folder)


def _write_packed(
    folder: Path,
    data: recipe.DataSpec,
    kinds: dict[str, Kind],
    origins: Origins,
    stamps: Stamps,
    make_room: Callable[[int], None],
    tell: Progress,
) -> Keep:
    """As `_write_readings`, of a language model: documents become tokens once, and blocks are cut from these."""
    readings = open_documents(data, kinds)
    lead = next(iter(readings.values()))
    with _making(folder, "room for the tokens of all documents") as partial:
        tokenized = tokenize(data, readings, partial, tell)
        make_room(tokenized.nbytes)
        write_blocks(data, tokenized, lead, tell)
        origins["shown"] = {}
        check_unchanged(origins, stamps)
        rows = RowCounts((*(tokenized.layouts[name].blocks for name in SPLITS), 0, 0))
        tokens = lead.documents.tokens
        classes = Classes(tokens.vocabulary, complete=True)
        _write_index(partial, data.task, classes, tokens, None, rows, tokenized.lines, origins, tell)
        return name_entry(partial, folder)


@contextlib.contextmanager
def _making(folder: Path, needed: str) -> Iterator[Path]:
    """A folder beside `folder`, in which an entry is made that gets its name; what is left of it then is removed.

    Raises:
        MachineError: it cannot be written.
    """
    partial = partial_name(folder)
    try:
        # What killed processes left. Nobody else prepares these rows now, since the lock is ours.
        _remove(folder, *folder.parent.glob(f"{folder.name}.*{PARTIAL_SUFFIX}"))
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:
        if is_limit(error):
            raise limit_reached(error) from error
        raise MachineError(
            f"cannot prepare the data in {folder}",
            got=error.strerror or str(error),
            expected=f"{needed} in a folder that this user can write to",
            next="free some space, or choose another folder with --cache-root",
        ) from error
    finally:
        _remove(partial)


def _room_for(cache_root: Path, budget: int | None, most: int | None, needed: int) -> None:
    _check_size(cache_root, needed, most)
    make_room(cache_root, needed, budget)


def _check_size(cache_root: Path, needed: int, most: int | None) -> None:
    if most is not None and needed > most:
        raise NoRoomError(
            f"all rows are too many for the cache {cache_root}",
            got=f"{needed:,} bytes of rows",
            expected=f"{most:,} bytes at most",
            next="raise AKD_DIST_CACHE_BUDGET",
        )


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _write_index(
    folder: Path,
    task: recipe.Task,
    classes: Classes,
    tokens: Tokens | None,
    encoded: dict[str, Any] | None,
    rows: RowCounts,
    lines: Sequence[str],
    origins: Origins,
    tell: Progress,
) -> None:
    assert classes.number is not None
    index: dict[str, Any] = meaning_of(classes.number, task, classes.names, tokens, encoded)
    for name in SPLITS:
        inputs, labels = arrays_of(folder, name, encoded)
        told = functools.partial(tell, f"the fingerprint of the {name} rows")
        digest, blocks = fingerprint(
            inputs, labels, classes.number, task=task, class_names=classes.names, tokens=tokens, on_progress=told
        )
        index[name] = {"fingerprint": digest, "blocks": blocks, "files": stats_of(folder, name, index)}
    if rows.unlabelled:
        index["labelled"] = rows.labelled
    index["findings"] = list(dict.fromkeys(lines))
    replace(folder / INDEX, with_checksum(index | {"origins": origins}))


def _believed(splits: Splits, folder: Path, files: list[Origin], kinds: dict[str, Kind]) -> Splits | None:
    """Prepared splits, unless their sources are seen to have changed: then None."""
    index = without_checksum((folder / INDEX).read_bytes())
    origins, believed = compare(index["origins"], files, kinds)
    if origins is None:
        return None
    # A copy that was restored has other times and the same content: noted, so that it is not hashed by each command.
    if origins != index["origins"]:
        replace(folder / INDEX, with_checksum(index | {"origins": origins}))
    forget = functools.partial(discard, splits.train.files, splits.train.inodes)
    return dataclasses.replace(splits, sources=SourceCheck(believed, forget))


def _as_expected(splits: Splits, expected: Mapping[str, str]) -> Splits | None:
    """Prepared splits, unless they are others than those that somebody has seen: then None."""
    same = all(getattr(splits, name).fingerprint == fingerprint for name, fingerprint in expected.items())
    return splits if same else None
