"""Tar files of pictures with their labels, as WebDataset has them.

`open` reads the headers and labels of all shards once, several shards at a time, and notes where parts of about
_PART_BYTES begin: each part is then read in one request, wherever reading begins. Tasks are told of the parts (`known`)
and do not look for them again.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.blocks import MAX_THREADS, Block, default_threads, read_ahead
from akd_dist.data.picture_files import MOST_BYTES
from akd_dist.data.sources.base import Source, slices, stats_of
from akd_dist.data.tar_shards import Sample, Shard, bytes_of, content, find_shards, key_of, open_shard, read_samples
from akd_dist.storage.remote import RemoteFile

_PART_BYTES = 1 << 22
# The most bytes of a label's member.
_MOST_LABEL = 1 << 24
_CLASS_ID = re.compile(rb"-?[0-9]{1,19}")
_Label = int | float | str


@dataclass(frozen=True)
class Parts:
    """Where the samples of all shards lie: small, picklable."""

    starts: np.ndarray
    """The number of each part's first row, and at its end that of all rows: int64 [parts + 1]."""
    shards: np.ndarray
    """The shard of each part, int32 [parts]."""
    bounds: np.ndarray
    """Where each begins and ends in its shard, int64 [parts, 2]."""
    labels: str
    """The type of labels: int64, double, string, or null where there are none."""

    @property
    def rows(self) -> int:
        """Of all shards."""
        return int(self.starts[-1])


@dataclass
class _Index:
    """What one shard holds."""

    names: list[str] = field(default_factory=list)
    """Of the pictures' members."""
    labels: list[_Label] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """The place of each part's first sample among those of the shard."""
    offsets: list[int] = field(default_factory=list)
    """Where each part begins, and at the end where the last one ends."""


class WebDatasetSource:
    """Samples of tar files, in the order of the shards and of the samples in them."""

    def __init__(self, spec: recipe.WebDataset) -> None:
        self.spec = spec
        self.found = find_shards(spec.path)
        self.files = self.found.files

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed."""
        return {**self.spec.model_dump(mode="json"), "files": stats_of(self.files)}

    def open(self, known: Parts | None = None) -> Source:
        """Look at the rows: headers and labels of all shards are read, unless `known` says where the samples lie."""
        if known is not None:
            return self._source(known, None, None)
        # Objects are waited for, so that more of them are under way than there are cores.
        with ThreadPoolExecutor(MAX_THREADS if self._remote else default_threads()) as pool:
            indexes = list(pool.map(self._index, self.files))
        labels = self._labels(indexes)
        names = pa.chunked_array([pa.array(index.names, pa.string()) for index in indexes])
        return self._source(_parts(indexes, labels), labels, names)

    def _source(self, parts: Parts, labels: Any, names: Any) -> Source:
        name, rows = self.spec.path, parts.rows

        def where(row: int) -> str:
            part = int(np.searchsorted(parts.starts, row, side="right")) - 1
            shard = self.files[parts.shards[part]]
            # Tasks were not told of names, which are needed where something is wrong only.
            its = names[row].as_py() if names is not None else self._read(parts, part)[row - parts.starts[part]][0]
            return f"row {row} of {name} ({shard.name}, {its})"

        def labels_alone(first: int, last: int) -> tuple[Sequence[Any], Any]:
            return [], labels[first:last]

        def called(first: int, last: int) -> list[str]:
            shards = np.searchsorted(parts.starts, np.arange(first, last), side="right") - 1
            both = zip(parts.shards[shards].tolist(), names[first:last].to_pylist(), strict=True)
            return [f"{self.files[shard].name}/{one}" for shard, one in both]

        def keys(wanted: np.ndarray) -> Any:
            return pa.array([key_of(one) for one in names.take(pa.array(wanted)).to_pylist()], pa.string())

        return Source(
            name,
            rows,
            functools.partial(self._blocks, parts),
            where,
            label_blocks=functools.partial(slices, rows, labels_alone) if labels is not None else None,
            notes=self._notes(),
            label=(self.spec.label,) if self.spec.label else (),
            classes=self.spec.classes,
            files=tuple(map(str, self.files)),
            file_starts=parts.starts[np.searchsorted(parts.shards, np.arange(len(self.files)))],
            names=called if names is not None else None,
            keys=keys if names is not None else None,
            known=parts,
            labels_at_hand=labels is not None,
        )

    def _notes(self) -> tuple[str, ...]:
        others = self.found.left_out
        if not others:
            return ()
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        return (f"left out of {self.spec.path}, as they are no tar files: {shown}",)

    @property
    def _remote(self) -> bool:
        return isinstance(self.files[0], RemoteFile)

    # ---- headers and labels

    def _index(self, shard: Shard) -> _Index:
        index, end = _Index(), 0
        with open_shard(shard) as opened:
            for sample in read_samples(opened, shard):
                self._check_size(shard, sample)
                if not index.offsets or sample.offset - index.offsets[-1] >= _PART_BYTES:
                    index.starts.append(len(index.names))
                    index.offsets.append(sample.offset)
                index.names.append(sample.picture.name)
                if self.spec.label:
                    index.labels.append(self._label(opened, shard, sample))
                end = sample.end
        if not index.names:
            raise RefusedError(
                f"{shard} holds no samples",
                got="an archive without pictures",
                expected="at least one sample",
                next="remove it, or write it again",
            )
        index.offsets.append(end)
        return index

    @staticmethod
    def _check_size(shard: Shard, sample: Sample) -> None:
        size = sample.picture.size
        if not 0 < size <= MOST_BYTES:
            raise RefusedError(
                f"the sample {sample.key} of {shard} holds no picture that can be read",
                got=f"{sample.picture.name} with {size:,} bytes",
                expected=f"a picture, of {MOST_BYTES:,} bytes at most",
                next="remove the sample, or write it again",
            )

    def _label(self, opened: IO[bytes], shard: Shard, sample: Sample) -> _Label:
        wanted = self.spec.label
        ending = "cls" if wanted == "cls" else "json"
        member = sample.others.get(ending)
        if member is None:
            raise self._no_label(opened, shard, sample, ending)
        if member.size > _MOST_LABEL:
            raise self._refused_label(shard, sample, f"{member.size:,} bytes in {member.name}")
        text = content(opened, shard, member)
        return self._class_id(shard, sample, text) if ending == "cls" else self._within(shard, sample, text)

    def _class_id(self, shard: Shard, sample: Sample, text: bytes) -> int:
        # `int` would take 1_0 and digits of other scripts as well.
        if _CLASS_ID.fullmatch(text.strip()) is None or abs(number := int(text)) >= 2**63:
            raise self._refused_label(shard, sample, f"{text[:40]!r} in {sample.key}.cls")
        return number

    def _within(self, shard: Shard, sample: Sample, text: bytes) -> _Label:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._refused_label(shard, sample, f"{sample.key}.json, which is no JSON: {error}") from error
        keys = list(document) if isinstance(document, dict) else []
        if self.spec.label not in keys:
            got = f"{sample.key}.json with {', '.join(map(str, keys[:10])) or type(document).__name__}"
            raise self._refused_label(shard, sample, got, f"the key {self.spec.label} in each json")
        value = document[self.spec.label]
        if type(value) not in (int, float, str) or (type(value) is int and abs(value) >= 2**63):
            got = f"{self.spec.label}: {json.dumps(value)[:60]} in {sample.key}.json"
            raise self._refused_label(shard, sample, got, "a class id, a class name or a number")
        return value  # type: ignore[no-any-return]

    def _no_label(self, opened: IO[bytes], shard: Shard, sample: Sample, ending: str) -> RefusedError:
        advice = "set `label: cls` for class ids in key.cls" if "cls" in sample.others else None
        if ending == "cls" and (member := sample.others.get("json")) is not None and member.size <= _MOST_LABEL:
            try:
                keys = ", ".join(list(json.loads(content(opened, shard, member)))[:10])
            except (ValueError, TypeError, RecursionError):
                keys = ""
            advice = f"set `label` to a key of {sample.key}.json: {keys}"
        return RefusedError(
            f"the sample {sample.key} of {shard} has no label",
            got=", ".join(one.name for one in (sample.picture, *sample.others.values())),
            expected=f"{sample.key}.{ending}, as `label: {self.spec.label}` says",
            next=advice or "add it, or remove the sample",
        )

    def _refused_label(self, shard: Shard, sample: Sample, got: str, expected: str | None = None) -> RefusedError:
        return RefusedError(
            f"the label of the sample {sample.key} of {shard} cannot be read",
            got=got,
            expected=expected or "an integer, the class id",
            next="correct it, or set `label` to another key",
        )

    def _labels(self, indexes: Sequence[_Index]) -> Any:
        """The labels of all rows: an Arrow array of one type."""
        if not self.spec.label:
            return pa.nulls(sum(len(index.names) for index in indexes))
        text = isinstance(indexes[0].labels[0], str)
        for shard, index in zip(self.files, indexes, strict=True):
            for name, label in zip(index.names, index.labels, strict=True):
                if isinstance(label, str) != text:
                    first = repr(indexes[0].labels[0])
                    raise RefusedError(
                        f"the label of {name} of {shard} is of another type than the first one",
                        got=repr(label),
                        expected=f"{'a name' if text else 'a number'}, as {first} of {indexes[0].names[0]}",
                        next="write all labels alike",
                    )
        floats = any(isinstance(label, float) for index in indexes for label in index.labels)
        kind = pa.string() if text else pa.float64() if floats else pa.int64()
        return pa.concat_arrays([pa.array(index.labels, kind) for index in indexes])

    # ---- samples

    def _blocks(self, parts: Parts, most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        stop = parts.rows if stop is None else min(stop, parts.rows)
        first = int(np.searchsorted(parts.starts, start, side="right")) - 1
        numbers = range(first, int(np.searchsorted(parts.starts, stop)))
        kind = pa.type_for_alias(parts.labels)
        sizes = np.diff(parts.bounds, axis=1)[:, 0].tolist()
        read = functools.partial(self._read, parts)
        ahead = read_ahead(numbers, read, sizes.__getitem__, waits=self._remote)
        for number, samples in zip(numbers, ahead, strict=True):
            at = int(parts.starts[number])
            begin, end = max(start, at), min(stop, at + len(samples))
            for row in range(begin, end, most):
                mine = samples[row - at : min(row + most, end) - at]
                pictures = pa.array([picture for _, picture, _ in mine], pa.large_binary())
                yield Block(row, [pictures], pa.array([label for *_, label in mine], kind))

    def _read(self, parts: Parts, number: int) -> list[tuple[str, bytes, _Label | None]]:
        """Name, picture and label of each sample of a part."""
        shard, (begin, end) = self.files[parts.shards[number]], parts.bounds[number].tolist()
        opened, labelled = bytes_of(shard, begin, end), parts.labels != "null"
        found = []
        for sample in list(read_samples(opened, shard, whole=False)):
            label = self._label(opened, shard, sample) if labelled else None
            found.append((sample.picture.name, content(opened, shard, sample.picture), label))
        if len(found) != parts.starts[number + 1] - parts.starts[number]:
            raise RefusedError(
                f"{shard} was written while it was read",
                got=f"{len(found):,} samples in a part that had {parts.starts[number + 1] - parts.starts[number]:,}",
                expected="a file that nobody writes to",
                next="run the same command again once it is whole",
            )
        return found


def _parts(indexes: Sequence[_Index], labels: Any) -> Parts:
    starts, shards, bounds = list[int](), list[int](), list[tuple[int, int]]()
    rows = 0
    for number, index in enumerate(indexes):
        starts += [rows + start for start in index.starts]
        shards += [number] * len(index.starts)
        bounds += list(zip(index.offsets, index.offsets[1:], strict=False))
        rows += len(index.names)
    return Parts(
        np.array([*starts, rows], dtype=np.int64),
        np.array(shards, dtype=np.int32),
        np.array(bounds, dtype=np.int64).reshape(-1, 2),
        str(labels.type),
    )
