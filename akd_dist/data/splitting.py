"""Which rows train, validate and test: a function of the seed, and of the labels where that is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.findings import refuse_lost_classes
from akd_dist.data.labels import are_unknown
from akd_dist.data.sources.base import Source
from akd_dist.storage import rows as stored

SPLITS = stored.SPLITS
LEFT_OUT = len(SPLITS)
"""In place of a split: a train row that is not in the subset."""
UNLABELLED = LEFT_OUT + 1
"""A train row without a label, or whose label is not read; it follows those with labels."""
# The key of the generator that draws a subset. Key 0 draws the split, and the epochs shuffle with the keys from 1 on:
# so no two draws of one seed share their random words.
_SUBSET_KEY = 1 << 62


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


def stratified_split(labels: np.ndarray, validation: float, test: float, seed: int) -> np.ndarray:
    """As `split_of_rows`, with each class's rows shared out alike, and at least one of each class left to train.

    Args:
        labels: class ids, int64 [rows].
    """
    order, classes = _class_by_class(labels, seed, 0)
    for_test, for_validation = round(len(labels) * test), round(len(labels) * validation)
    spare = len(labels) - classes
    if for_test + for_validation > spare:  # nearly as many classes as rows
        for_validation = round(spare * for_validation / (for_test + for_validation))
        for_test = spare - for_validation
    split = np.zeros(len(labels), dtype=np.uint8)
    split[order[:for_test]] = SPLITS.index("test")
    split[order[for_test : for_test + for_validation]] = SPLITS.index("validation")
    return split


def stratified_subset(labels: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """As `subset_of_rows`, with each class's share of rows, and at least one: `wanted` are no fewer than classes."""
    order, _ = _class_by_class(labels, seed, _SUBSET_KEY)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    chosen[order[::-1][:wanted]] = True
    return chosen


def _class_by_class(labels: np.ndarray, seed: int, key: int) -> tuple[np.ndarray, int]:
    """Row numbers in an order of which every part holds of each class what it has in all, and the number of classes.

    A class's rows stand in the order of their Philox words, as far from each other as its number of rows says: the k-th
    of n at (k + 1/2) / n of the way. The last row of each class stands at the end.
    """
    words = np.random.Philox(key=[seed, key]).random_raw(len(labels))
    by_class = np.lexsort((words, labels))
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    place = (rank + 0.5) / np.repeat(counts, counts)
    place[starts + counts - 1] = 1
    return by_class[np.lexsort((words[by_class], place))], len(counts)


def split_of_source(name: str, data: recipe.DataSpec, source: Source, labels: np.ndarray | None) -> np.ndarray:
    """Which split each row of a source belongs to, uint8 [rows]: all to its own, but shares of the train source.

    Args:
        labels: those of the train source, where `reads_labels_first`.
    """
    if name != "train":
        return np.full(source.rows, UNLABELLED if name == "unlabelled" else SPLITS.index(name), dtype=np.uint8)
    split = np.full(source.rows, UNLABELLED, dtype=np.uint8)
    there = np.ones(source.rows, dtype=np.bool_)
    if labels is not None and data.unlabelled == "missing":
        there = ~are_unknown(labels)
        if not there.any():
            raise RefusedError(
                f"no row of {source.name} has a label",
                got=f"{source.rows:,} rows without",
                expected="some with, as data.unlabelled: missing says",
                next="leave data.train out, and name the source in data.unlabelled",
            )
    by_class = labels[there] if labels is not None and data.stratify else None
    split[there] = _split_of_labelled(data, source.name, int(there.sum()), by_class)
    return split


def _split_of_labelled(data: recipe.DataSpec, name: str, rows: int, labels: np.ndarray | None) -> np.ndarray:
    """Which split each row of the train source belongs to that has a label, uint8 [rows].

    Args:
        name: of the source.
        labels: class ids, where the split is stratified.
    """
    given = {other: getattr(data, other) for other in ("validation", "test")}
    shares = {other: share if isinstance(share, float) else 0.0 for other, share in given.items()}
    if labels is None:
        split = split_of_rows(rows, seed=data.seed, **shares)
    else:
        split = stratified_split(labels, seed=data.seed, **shares)
    needed = {"train", *(other for other, share in shares.items() if share)}
    empty = [other for other in SPLITS if other in needed and not (split == SPLITS.index(other)).any()]
    if empty:
        raise RefusedError(
            f"no rows are left for {' and '.join(empty)}",
            got=f"{rows:,} rows in {name}, with the shares {shares}",
            expected="at least one row in each split",
            next="change data.validation and data.test, or add rows",
        )
    train = np.flatnonzero(split == SPLITS.index("train"))
    if data.subset is not None:
        if data.subset > len(train):
            raise RefusedError(
                "data.subset is larger than what there is",
                got=f"{data.subset:,} of {len(train):,} train rows in {name}",
                expected=f"at most {len(train):,}",
                next="lower data.subset, or leave it out to train on all rows",
            )
        if labels is None:
            chosen = subset_of_rows(len(train), data.subset, data.seed)
        elif (classes := len(np.unique(labels))) > data.subset:
            raise RefusedError(
                "data.subset is smaller than the number of classes",
                got=f"{data.subset:,} rows of {classes:,} classes",
                expected="at least a row of each class, as data.stratify says",
                next="raise data.subset",
            )
        else:
            chosen = stratified_subset(labels[train], data.subset, data.seed)
        split[train[~chosen]] = UNLABELLED if data.unlabelled == "rest" else LEFT_OUT
    return split


@dataclass(frozen=True)
class RowCounts:
    """How many rows there are, by where `split_of_source` puts them."""

    counts: tuple[int, ...]
    """Of each split, of what is left out, and of train rows without labels."""

    @property
    def labelled(self) -> int:
        """Train rows with labels."""
        return self.counts[0]

    @property
    def unlabelled(self) -> int:
        """Train rows without."""
        return self.counts[UNLABELLED]

    def of(self, split: str) -> int:
        """The rows of a split."""
        number = SPLITS.index(split)
        return self.counts[number] + (self.unlabelled if number == 0 else 0)


def rows_by_split(splits: Mapping[str, np.ndarray]) -> RowCounts:
    """The counts of all sources, whose rows belong to these splits: uint8 [rows] each, as of `split_of_source`."""
    found = sum(np.bincount(split, minlength=UNLABELLED + 1) for split in splits.values())
    return RowCounts(tuple(np.asarray(found).tolist()))


def source_of_split(data: recipe.DataSpec, split: str) -> str:
    """The split whose source the rows of a split are read from: `train` for one that is a share of the train rows."""
    if split == "train" and data.train is None:
        return "unlabelled"
    return "train" if isinstance(getattr(data, split), float) else split


def rows_of_split(assigned: np.ndarray, split: str) -> np.ndarray:
    """Which row of its source each row of a split is, int64 [rows]: rows keep the order of their source, and train rows
    without labels follow those that have some.

    Args:
        assigned: of each row of the source, as `split_of_source` gives it, uint8 [rows of the source].
    """
    rows = np.flatnonzero(assigned == SPLITS.index(split))
    return rows if split != "train" else np.concatenate([rows, np.flatnonzero(assigned == UNLABELLED)])


def is_drawn(data: recipe.DataSpec) -> bool:
    """Whether the train source is split, or only a part of it taken."""
    return data.subset is not None or isinstance(data.validation, float) or isinstance(data.test, float)


def reads_labels_first(data: recipe.DataSpec) -> bool:
    """Whether labels decide which row goes where."""
    return data.unlabelled == "missing" or (data.stratify and is_drawn(data))


def check_classes(data: recipe.DataSpec, counts: np.ndarray, names: Sequence[str] | None) -> None:
    """Refuse classes that have rows, and none in the train split.

    Args:
        counts: as `count` gives them, of all sources.
        names: of classes, where they have names.

    Raises:
        RefusedError: names the classes, and where their rows are.
    """
    if data.unlabelled is not None:
        return  # the teacher may know them, and unlabelled rows may be theirs
    hint = "add such rows to data.train, or remove them from data.validation and data.test"
    if not data.stratify and is_drawn(data):
        hint = "set data.stratify: true, which draws another split, with train rows of each class; or add such rows"
    refuse_lost_classes(counts, names, (*SPLITS, "outside of data.subset"), hint)


def count(split: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Rows by split and class, int64 [splits and what is left out, classes]; rows without labels are not counted.

    Args:
        split: of each row, uint8 [rows].
        labels: class ids, int64 [rows].
    """
    if (unlabelled := split == UNLABELLED).any():
        split, labels = split[~unlabelled], labels[~unlabelled]
    counts = np.bincount(split * np.int64(classes) + labels, minlength=(LEFT_OUT + 1) * classes)
    return counts.reshape(LEFT_OUT + 1, classes)
