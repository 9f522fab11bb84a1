"""Which row of a file of logits belongs to which row of the data: by their order, or by a key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.keys import has_key, key_column
from akd_dist.data.logit_arrays import Check, LogitFile, NoSuchKeyError, Shape
from akd_dist.data.parquet_files import out_of_order
from akd_dist.data.prepare import kinds_of, open_sources
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.data.schemas import plain
from akd_dist.data.source_rows import rows_of_splits
from akd_dist.data.sources.base import Source
from akd_dist.data.splitting import source_of_split
from akd_dist.recipe import NoAugmentation, Split

_SHOWN = 5
# The most names in a file that are looked for in the data.
_NAMES = 20
_PLAIN = NoAugmentation()


@dataclass(frozen=True, eq=False)
class Place:
    """Where the rows of a split stand in their source."""

    source: str
    """The split whose key of `data` names the source: a split that is a share comes from `train`."""
    numbers: np.ndarray
    """The row of the source of each row of the split, int64, ascending."""
    opened: Source
    """The source, looked at."""
    followed: bool = False
    """Whether rows of `data.unlabelled` follow: then only the split has its rows together, and they are counted as its
    own."""

    @property
    def total(self) -> int:
        """How many rows the source has."""
        return len(self.numbers) if self.followed else self.opened.rows

    @property
    def files(self) -> Sequence[tuple[str, int]]:
        """The name and rows of each file of the source, in the order of its rows; none where it is one whole."""
        if self.opened.file_starts is None or self.followed:
            return ()
        counts = np.diff(np.append(self.opened.file_starts, self.opened.rows))
        return list(zip(self.opened.files, counts.tolist(), strict=True))

    @property
    def whole(self) -> str:
        """What all rows together are called."""
        if self.followed:
            return f"the train rows: those of data.{self.source} that train, then those of data.unlabelled"
        return f"all rows of data.{self.source}"


def places_of(data: recipe.DataSpec) -> dict[str, Place]:
    """Where the rows of each split stand; raises as `source_rows`."""
    readings = open_sources(data, kinds_of(data))
    sources = {split: source_of_split(data, split) for split in SPLITS}
    places = {
        split: Place(sources[split], found.rows, readings[sources[split]].source)
        for split, found in rows_of_splits(data, readings).items()
    }
    if data.train is not None and "unlabelled" in readings:
        count = len(places["train"].numbers)
        places["train"] = Place("train", np.arange(count), readings["train"].source, followed=True)
    return places


@dataclass(frozen=True)
class Wanted:
    """What a file has to hold."""

    data: recipe.DataSpec
    splits: Splits
    sources: Mapping[str, Place]
    split: Split | None
    """The split that the user names; None for the train rows, and what else comes from their source."""
    key: str | None
    """The column that joins rows; None for their order."""

    @property
    def first(self) -> Split:
        """The split that has to be there."""
        return self.split or "train"

    @property
    def classes(self) -> int:
        """Logits of a row."""
        return self.splits.train.classes

    @property
    def augmented(self) -> bool:
        """Whether the rows of that split are seen in views."""
        return self.first == "train" and not isinstance(self.data.augmentation, NoAugmentation)

    def counts(self) -> dict[int, str]:
        """How many rows a file may have, and which they are."""
        where = self.sources[self.first]
        return {len(where.numbers): f"the {self.first} rows"} | {where.total: where.whole}

    def taken(self, rows: int, split: Split | None = None) -> str:
        """Which rows of a split a file with so many has, by their order; None is the split that has to be there."""
        where = self.sources[split or self.first]
        return where.whole if rows == where.total else f"the {split or self.first} rows of data.{where.source}"

    def may_be(self, rows: int) -> list[Split]:
        """The splits that a file with so many rows, in their order, may be of as well: a split of each other source."""
        found: dict[str, Split] = {self.sources[self.first].source: self.first}
        splits: list[Any] = [*SPLITS]
        for split in splits:
            one = self.sources[split]
            if rows in (one.total, len(one.numbers)):
                found.setdefault(one.source, split)
        return list(found.values())[1:]

    def taken_for(self, rows: int, *, informative: bool) -> list[str]:
        """What to know where the file may be of other splits as well, a line each.

        Args:
            informative: whether labels have shown which rows they are.
        """
        told = "labels alone tell" if informative else "it is taken at your word, for want of labels,"
        return [
            f"as many ({rows:,}) are {self.taken(rows, split)}: {told} that these are the logits of {self.taken(rows)}"
            for split in self.may_be(rows)
        ]

    def order_of_files(self) -> str | None:
        """A line on a source whose files stand in another order than their numbers; None where they do not."""
        where = self.sources[self.first]
        files = () if len(where.files) == where.total else where.files
        swapped = out_of_order([name for name, _ in files])
        if swapped is None:
            return None
        first, then = (Path(name).name for name in swapped)
        return f"the rows of data.{where.source} go by the names of its files, {first} before {then}"

    def check(self, path: str) -> Check:
        """What takes the shape of the file's array; see `logit_arrays.Check`."""

        def check(written: Shape) -> tuple[int, int, int]:
            shape = _in_three(written, regression=self.data.task == "regression")
            if shape is None or shape[2] != self.classes or (self.key is None and shape[1] not in self.counts()):
                raise self._shape_refused(path, written)
            self._check_views(path, written, shape[0])
            return shape

        return check

    def _shape_refused(self, path: str, written: Shape) -> RefusedError:
        counts, classes = self.counts(), self.classes
        last, known = written[-1] if written else 0, [*counts]
        advice = "bring one row of logits for each row of the data, and one logit for each class"
        if len(written) == 2 and written[0] == classes and (self.key or written[1] in counts):
            advice = "it is transposed: save array.T, rows first"
        elif len(written) == 3 and last == classes and written[0] in counts:
            advice = "views come first: save array.transpose(1, 0, 2)"
        elif len(written) <= 1 and (written and written[0] in counts):
            advice = "one number a row is a class id or a prediction: save all logits of a row"
        elif last == 1 and classes == 2:
            advice = "one logit z for two classes is that of a sigmoid: save [0, z] for each row"
        elif self.key is None and last == classes and known:
            advice = "bring all rows of the source in the order of its files, or join rows by --key"
        views = "[views, rows, classes]" if self.augmented else "[rows, classes]"
        meant = " or ".join(f"{count:,} ({which})" for count, which in counts.items())
        return RefusedError(
            f"{path} has not the shape of the logits of these rows",
            got=f"shape {list(written)}",
            expected=f"{views} with {meant if self.key is None else 'as many'} rows and {classes:,} classes",
            next=advice,
        )

    def _check_views(self, path: str, written: Shape, views: int) -> None:
        data = self.data
        if self.augmented and len(written) != 3:
            raise RefusedError(
                f"{path} has one row of logits for each row, and the train rows are seen in views",
                got=f"shape {list(written)}; data.augmentation is {data.augmentation.kind}",
                expected=f"[{data.views}, rows, classes]: the logits of each view, as this recipe draws it",
                next="set data.augmentation: none and data.views: 1, since these are the logits of rows as they are; "
                "or let the teacher see the recipe's views, and save its logits of each",
            )
        expected = data.views if self.augmented else 1
        if views != expected:
            raise RefusedError(
                f"{path} has other views than the {self.first} rows",
                got=f"{views} views, in shape {list(written)}",
                expected=f"{expected}, as {'data.views says' if self.augmented else 'they are not augmented'}",
                next=f"set data.views: {views}" if self.augmented else "bring the logits of rows as they are",
            )


def _in_three(written: Shape, *, regression: bool) -> tuple[int, int, int] | None:
    """A shape as views, rows, classes; None where it is none."""
    if len(written) == 1 and regression:
        return 1, written[0], 1
    if len(written) == 2:
        return 1, *written
    return written if len(written) == 3 else None


@dataclass(frozen=True)
class Part:
    """A split whose logits the file has."""

    split: Split
    numbers: np.ndarray
    """The row of the file of each row of the split, int64."""


def match(file: LogitFile, wanted: Wanted) -> tuple[list[Part], dict[Split, str]]:
    """The splits whose logits a file has, the one that has to be there first; and why the others are left out.

    Raises:
        RefusedError: keys are there twice, are missing, or belong to no row of the data; names some.
    """
    by_key = None if wanted.key is None else _joined(file, wanted, wanted.sources[wanted.first].source)
    parts, left_out = list[Part](), dict[Split, str]()
    splits: list[Any] = [wanted.first, *(split for split in SPLITS if split != wanted.first)]
    for split in splits:
        why = None if split == wanted.first else _why_not(split, wanted, file)
        if why is None:
            numbers = _numbers(split, wanted, file, by_key)
            if isinstance(numbers, str):
                why = numbers
            else:
                parts.append(Part(split, numbers))
        if why is not None:
            left_out[split] = why
    return parts, left_out


@contextlib.contextmanager
def telling_keys(wanted: Wanted) -> Iterator[None]:
    """A block that refuses a key which a file of logits has not: where the data have no such column either, with what
    could be a key of both.
    """
    try:
        yield
    except NoSuchKeyError as error:
        assert wanted.key is not None
        source = wanted.sources[wanted.first].source
        try:
            key_column(wanted.data, source, wanted.key)
        except RefusedError as theirs:
            raise _in_neither(error, theirs, wanted, source) from error
        raise


def _in_neither(error: NoSuchKeyError, theirs: RefusedError, wanted: Wanted, source: str) -> RefusedError:
    both = [name for name in error.there[:_NAMES] if has_key(wanted.data, source, name)]
    keys = " or ".join(f"--key {name}" for name in both)
    return RefusedError(
        f"neither {error.name} nor data.{source} has {wanted.key}, by which --key joins rows",
        got=f"{error.got} in the file; data.{source}: {theirs.got}",
        expected=f"a column of both, as {' and '.join(both)}" if both else "a column of both",
        next=f"name it: {keys}" if both else "bring logits in the order of the rows and leave --key out",
    )


def _why_not(split: Split, wanted: Wanted, file: LogitFile) -> str | None:
    """Why a split other than the one that is asked for is not looked for in the file."""
    if wanted.split is not None:
        return f"--split says {wanted.split}"
    where = wanted.sources[split]
    if where.source != "train":
        return f"data.{split} is another source: import its logits with --split {split}"
    if wanted.augmented:
        return f"its rows are not augmented: import logits of rows as they are with --split {split}"
    if wanted.sources["train"].followed:  # however many rows that are, they are no rows of data.train in their order
        return f"the file has the train rows of data.train and data.unlabelled: import its logits with --split {split}"
    if wanted.key is None and file.shape[1] != where.total:
        return f"the file has the train rows alone: import its logits with --split {split}"
    return None


def _numbers(split: Split, wanted: Wanted, file: LogitFile, by_key: np.ndarray | None) -> np.ndarray | str:
    """The row of the file of each row of a split; why there is none, of a split that need not be there."""
    where = wanted.sources[split]
    if by_key is None:
        return where.numbers if file.shape[1] == where.total else np.arange(len(where.numbers))
    numbers: np.ndarray = by_key[where.numbers]
    lacking = np.flatnonzero(numbers < 0)
    if not len(lacking):
        return numbers
    if split != wanted.first:
        return f"{len(lacking):,} of its {len(numbers):,} rows have no logits in the file"
    assert wanted.key is not None
    keys = key_column(wanted.data, where.source, wanted.key)
    raise RefusedError(
        f"{file.name} has no logits of {len(lacking):,} of {len(numbers):,} {split} rows",
        got=f"no {wanted.key} {_some(keys, where.numbers[lacking])}",
        expected="a row for each of them",
        next="bring the logits of all rows",
    )


def _joined(file: LogitFile, wanted: Wanted, source: str) -> np.ndarray:
    """For each row of a source the row of the file with its key, int64; -1 where there is none."""
    assert wanted.key is not None
    if wanted.first == "train" and len(wanted.data.sources.keys() & {"train", "unlabelled"}) == 2:
        raise RefusedError(
            "train rows of two sources have no key together",
            got=f"--key {wanted.key}, with data.train and data.unlabelled",
            expected="their logits in the order of rows: those of data.train, then those of data.unlabelled",
            next="leave out --key",
        )
    theirs, ours = plain(file.key), key_column(wanted.data, source, wanted.key)
    if theirs.null_count or len(theirs) != file.shape[1]:
        raise RefusedError(
            f"{file.name} has not a {wanted.key} for each row",
            got=f"{theirs.null_count:,} nulls among {len(theirs):,} for {file.shape[1]:,} rows",
            expected="one for each row",
            next="save the key of every row beside its logits, as the data have it",
        )
    ours, theirs = _alike(ours, theirs, wanted.key, file.name)
    for keys, whose in ((ours, f"data.{source}"), (theirs, file.name)):
        counts = pc.value_counts(keys)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise RefusedError(
                f"{wanted.key} is no key of {whose}: rows share one",
                got=f"{_some(twice, range(len(twice)))} several times",
                expected="another value in each row",
                next="choose a column for --key whose values differ, or leave it out and bring all rows in their order"
                if whose.startswith("data.")
                else "keep one row of logits for each of them",
            )
    surplus = pc.filter(theirs, pc.invert(pc.is_in(theirs, value_set=ours)))
    if len(surplus):
        raise RefusedError(
            f"{file.name} has logits of rows that data.{source} does not have",
            got=f"{len(surplus):,} of them: {wanted.key} {_some(surplus, range(len(surplus)))}",
            expected="the keys of its rows",
            next="see whether these are the logits of this data",
        )
    found = pc.fill_null(pc.index_in(ours, value_set=theirs), -1)
    return np.array(found.to_numpy(zero_copy_only=False), dtype=np.int64)


def _alike(ours: Any, theirs: Any, key: str, name: str) -> tuple[Any, Any]:
    """Two columns of keys in one type."""
    integers = all(pa.types.is_integer(one.type) for one in (ours, theirs))
    if integers and not any(pa.types.is_uint64(one.type) for one in (ours, theirs)):
        return ours.cast(pa.int64()), theirs.cast(pa.int64())
    if integers or all(any(kind(one.type) for kind in _TEXTS) for one in (ours, theirs)):
        # As text, too, are integers of which some may be beyond int64, as hashes are, and others below zero.
        return ours.cast(pa.large_string()), theirs.cast(pa.large_string())
    raise RefusedError(
        f"the keys of {name} and of the data are not of one kind",
        got=f"{key} is {theirs.type} in the file and {ours.type} in the data",
        expected="integers in both, or text in both",
        next="write the key in the file as it is in the data",
    )


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def _some(keys: Any, places: Sequence[int] | np.ndarray) -> str:
    shown = ", ".join(str(keys[int(place)].as_py()) for place in list(places)[:_SHOWN])
    return shown + (f" and {len(places) - _SHOWN:,} more" if len(places) > _SHOWN else "")
