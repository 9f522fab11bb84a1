"""What a user should know of prepared rows, a line each, and the refusal of classes that nobody could learn."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.formatting import size
from akd_dist.data.encoded import EncodedPictures, encoded_of

# The most classes that a message names.
_SHOWN = 5
# The most bytes of rows that are hashed at a time: their copies as Python bytes are held meanwhile.
_HASHED_BYTES = 1 << 22
_HASHED_PICTURES = 64
# What pandas, Arrow and others write for a missing value where a column is text.
_NO_VALUE = ("nan", "none", "null", "n/a", "na", "<na>")


def refuse_lost_classes(counts: np.ndarray, names: Sequence[str] | None, parts: Sequence[str], hint: str) -> None:
    """Refuse classes that have rows, but none among the train rows.

    Args:
        counts: rows by part and class, int64 [parts, classes]; the train rows are the first part.
        names: of classes, where they have names.
        parts: what the parts are called.
        hint: what to do about it.

    Raises:
        RefusedError: names the classes, and where their rows are.
    """
    lost = np.flatnonzero((counts[0] == 0) & counts.any(axis=0))
    if not len(lost):
        return
    several = len(lost) > 1
    shown = []
    for number in lost[:_SHOWN].tolist():
        there = [f"{n:,} {part}" for n, part in zip(counts[:, number].tolist(), parts, strict=True) if n]
        shown.append(f"{_name(number, names)} ({', '.join(there)})")
    raise RefusedError(
        f"{len(lost):,} classes have no row in the train split" if several else "a class has no row in the train split",
        got=", ".join(shown) + (f" and {len(lost) - _SHOWN:,} more" if len(lost) > _SHOWN else ""),
        expected="a train row of every class that has rows",
        next=hint,
    )


def of_classes(counts: np.ndarray, names: Sequence[str] | None) -> list[str]:
    """Lines on classes: those without rows, a single one, names that look like something else.

    Args:
        counts: train rows of each class, int64 [classes].
    """
    there, missing = np.flatnonzero(counts), np.flatnonzero(counts == 0)
    lines = []
    if len(missing):
        shown = ", ".join(_name(number, names) for number in missing[:_SHOWN].tolist())
        more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
        have = "class" if len(missing) == 1 else f"{len(missing):,} of {len(counts):,} classes"
        verb = f"{have} {shown} has" if len(missing) == 1 else f"{have} have"
        rest = "" if len(missing) == 1 else f": {shown}{more}"
        lines.append(f"{verb} no row in the train split{rest}{_guess(missing, there, names)}")
    if len(there) == 1:
        only = _name(int(there[0]), names)
        lines.append(f"all {counts.sum():,} train rows are of one class, {only}: there is nothing to learn")
    if names is not None:
        empty = [name for name in names if name.strip().lower() in _NO_VALUE]
        lines += [f"a class is called {name!r}: are these rows without a label?" for name in empty]
        if all(name.isdecimal() for name in names) and sorted(names) != sorted(names, key=int):
            first = ", ".join(names[:4])
            lines.append(f"class names are numbers, and are in the order of text: {first}; integers would be class ids")
    return lines


def of_unlabelled(data: recipe.DataSpec, labelled: int, unlabelled: int) -> list[str]:
    """A line on train rows without labels.

    Args:
        data: what asks for such rows.
        labelled: how many train rows have labels.
        unlabelled: how many have none.
    """
    if data.unlabelled is None:
        return []
    if not unlabelled:
        return ["data.unlabelled is given, and every train row has a label"]
    return [f"{unlabelled:,} of {labelled + unlabelled:,} train rows have no label: they are learned from the teacher"]


def _guess(missing: np.ndarray, there: np.ndarray, names: Sequence[str] | None) -> str:
    """What ids without rows may mean."""
    if names is not None:
        return ""
    if missing.tolist() == [0]:
        return ": are labels counted from 1?"
    last, gap = int(there[-1]), int(there[-1] - there[-2]) - 1 if len(there) > 1 else 0
    # One id far beyond all others, as 255 beside 0 to 9, is how many data sets mark rows without a label.
    if gap == len(missing) and gap > len(there):
        return f": is {last} a mark of rows without a label?"
    return ""


def in_two_splits(inputs: Mapping[str, np.ndarray], tell: Callable[[int, int], None]) -> list[str]:
    """A line on the rows of other splits whose inputs are, bit for bit, those of a train row; none if there are none.

    Takes 8 bytes a row, and a second for five million small rows, or for two gigabytes of large ones.

    Args:
        inputs: rows by split, arrays [rows, *shape]; the train rows first.
        tell: called with rows done, and rows in all.
    """
    rows, done = sum(map(len, inputs.values())), 0

    def after(before: int) -> Callable[[int], None]:
        return lambda count: tell(before + count, rows)

    hashes = {}
    for split, array in inputs.items():
        hashes[split] = _hashes(array, after(done))
        done += len(array)
    return of_hashes(hashes)


def of_hashes(hashes: Mapping[str, np.ndarray]) -> list[str]:
    """As `in_two_splits`, of the hashes of rows by split: int64 [rows], sorted, all by one function."""
    (train, known), *others = hashes.items()
    found = []
    for split, mine in others:
        common = _how_many(mine, known)
        found += [f"{common:,} of {len(mine):,} {split} rows"] if common else []
    if not found:
        return []
    return [f"{' and '.join(found)} have the very inputs of a {train} row: they do not show how models do on new rows"]


def of_encoded(kept: int, rows: int, encoded: Mapping[str, Any] | None) -> list[str]:
    """A line on pictures that stay encoded; none where none do.

    Args:
        kept: bytes of all rows as they are kept.
        rows: how many.
        encoded: what their meaning says of them.
    """
    if encoded is None:
        return []
    pixels = size(rows * math.prod(encoded["shape"]))
    return [
        f"images stay encoded, in {size(kept)} where pixels would take {pixels}, and are decoded when they are read: "
        "`data.image.keep: pixels` decodes them once"
    ]


def near_chance(name: str, agreement: float, counts: np.ndarray, split: str = "train") -> str | None:
    """A line on a model that agrees with the labels hardly more often than the most frequent class does.

    Args:
        name: of the model.
        agreement: share of the rows where its first class is the label.
        counts: rows of each class, int64 [classes]; where there is one class only, there is nothing to say.
        split: which rows they are.
    """
    rows = int(counts.sum())
    most = float(counts.max()) / rows
    # Two standard errors of a share: an agreement within them may be luck.
    noise = 2 * math.sqrt(most * (1 - most) / rows)
    if np.count_nonzero(counts) < 2 or agreement > most + max(noise, min((1 - most) / 20, most / 2)):
        return None
    return (
        f"{name} is near chance: it agrees with the labels of {agreement:.1%} of {rows:,} {split} rows, and naming the "
        f"most frequent class each time would with {most:.1%}; are its classes and inputs those of the data?"
    )


def stable_hashes(inputs: np.ndarray) -> np.ndarray:
    """A hash of each row's bytes that is the same in every process, int64 [rows], in the order of rows."""
    if (encoded := encoded_of(inputs)) is not None:
        given = encoded.stored.take(np.arange(len(encoded))).data
        return np.frombuffer(b"".join(hashlib.blake2b(one, digest_size=8).digest() for one in given), "<i8")
    rows = np.ascontiguousarray(inputs).reshape(len(inputs), -1).view(np.uint8)
    found = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
    return np.frombuffer(found, "<i8")


def _how_many(values: np.ndarray, known: np.ndarray) -> int:
    """How many values are among the known ones; both sorted, which is many times as fast as `np.isin`."""
    places = np.searchsorted(known, values)
    return int((known[np.minimum(places, len(known) - 1)] == values).sum())


def _hashes(array: np.ndarray, tell: Callable[[int], None]) -> np.ndarray:
    """The hashes of rows' bytes, int64 [rows], sorted. Python's own has 64 bits, and a key that nobody knows."""
    if (encoded := encoded_of(array)) is not None:
        return _hashes_of_encoded(encoded, tell)
    size = array[:1].nbytes
    hashes = np.empty(len(array), dtype=np.int64)
    step = max(1, _HASHED_BYTES // size)
    for start in range(0, len(array), step):
        block = np.ascontiguousarray(array[start : start + step])
        rows = block.reshape(len(block), -1).view(f"V{size}").ravel().tolist()
        hashes[start : start + len(block)] = np.fromiter(map(hash, rows), np.int64, len(rows))
        tell(start + len(block))
    hashes.sort()
    return hashes


def _hashes_of_encoded(encoded: EncodedPictures, tell: Callable[[int], None]) -> np.ndarray:
    hashes = np.empty(len(encoded), dtype=np.int64)
    for start in range(0, len(encoded), _HASHED_PICTURES):
        numbers = np.arange(start, min(start + _HASHED_PICTURES, len(encoded)))
        hashes[numbers] = [hash(one) for one in encoded.stored.take(numbers).data]
        tell(int(numbers[-1]) + 1)
    hashes.sort()
    return hashes


def _name(number: int, names: Sequence[str] | None) -> str:
    return str(number) if names is None else names[number]
