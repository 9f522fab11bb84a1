"""Where students and their teacher differ on the test rows: what each finished student leaves in test.parquet."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from akd_dist.documents.damage import reading

Array = npt.NDArray[Any]
POINTS = 600
"""The most rows of a scatter: more would hide each other, and weigh much."""


@dataclass(frozen=True)
class StoredPredictions:
    """What a student and its teacher say of the test rows: class ids, int64 [n], or numbers, float [n]."""

    label: Array
    student: Array
    teacher: Array


def read_predictions(path: Path) -> StoredPredictions | None:
    """A student's test.parquet; None where there is none (an older run), or it had no teacher.

    Raises:
        DamagedError: it is not what training wrote.
    """
    import pyarrow.parquet as pq

    expected = "what train-students wrote: row, label, student, teacher"
    with reading(path, expected=expected, next="remove it: the report then does without it"):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Neither by `read_table` nor by `to_numpy` below, which import pandas.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(["label", "student", "teacher"])
        if table.column("teacher").null_count == len(table):
            return None
        each = (table.column(name).chunks for name in ("label", "student", "teacher"))
        return StoredPredictions(*(np.concatenate([np.from_dlpack(one) for one in chunks]) for chunks in each))


@dataclass(frozen=True)
class Classes:
    """Rows counted by who is right, and by the pair of classes that are chosen; students of several seeds together."""

    students: int
    both_right: int
    teacher_alone: int
    student_alone: int
    both_wrong_alike: int
    both_wrong_apart: int
    _: KW_ONLY
    pairs: Counter[tuple[int, int]]
    """(the teacher's class, the student's) -> rows."""
    classes: int
    """How many there are, as far as they occur."""

    @property
    def cases(self) -> tuple[int, ...]:
        """All of the rows, by who is right."""
        alone = (self.both_right, self.teacher_alone, self.student_alone)
        return (*alone, self.both_wrong_alike, self.both_wrong_apart)

    @property
    def rows(self) -> int:
        """Test rows times students."""
        return sum(self.pairs.values())

    def top(self, count: int) -> list[tuple[int, int, int]]:
        """The most frequent pairs of different classes: the teacher's, the student's, how often."""
        differing = [(*pair, number) for pair, number in self.pairs.items() if pair[0] != pair[1]]
        return sorted(differing, key=lambda found: (-found[2], found[:2]))[:count]


def classes_of(together: Iterable[StoredPredictions]) -> Classes | None:
    """The counts over students that saw the same rows; None for no student."""
    pairs: Counter[tuple[int, int]] = Counter()
    counts, students, largest = np.zeros(5, np.int64), 0, 0
    for said in together:
        students += 1
        right, taught = said.student == said.label, said.teacher == said.label
        alike = said.student == said.teacher
        cases = (right & taught, ~right & taught, right & ~taught, ~right & ~taught & alike, ~right & ~taught & ~alike)
        counts += [int(case.sum()) for case in cases]
        chosen, numbers = np.unique(np.stack([said.teacher, said.student], axis=1), axis=0, return_counts=True)
        for (theirs, ours), number in zip(chosen.tolist(), numbers.tolist(), strict=True):
            pairs[theirs, ours] += number
        largest = max(largest, *(int(part.max()) for part in (said.label, said.student, said.teacher)))
    return Classes(students, *map(int, counts), pairs=pairs, classes=largest + 1) if students else None


@dataclass(frozen=True)
class Numbers:
    """What a regression's students say against their teacher, several seeds together."""

    students: int
    student_error: float
    """Root mean square of student less label."""
    teacher_error: float
    """Root mean square of teacher less label."""
    apart: float
    """Root mean square of student less teacher."""
    correlation: float | None
    """Pearson's correlation of their errors; None where one of them makes the same error everywhere."""
    points: list[tuple[float, float, float]]
    """Evenly spaced rows of the first student: label, the teacher's number, the student's."""


def numbers_of(together: Iterable[StoredPredictions]) -> Numbers | None:
    """The same for regression; None for no student."""
    every = list(together)
    if not every:
        return None
    ours, theirs, apart = (
        np.concatenate(parts).astype(np.float64)
        for parts in (
            [said.student - said.label for said in every],
            [said.teacher - said.label for said in every],
            [said.student - said.teacher for said in every],
        )
    )
    varied = ours.std() > 0 and theirs.std() > 0
    first = every[0]
    rows = np.unique(np.linspace(0, len(first.label) - 1, min(POINTS, len(first.label))).astype(np.int64))
    shown = [part[rows].astype(float).tolist() for part in (first.label, first.teacher, first.student)]
    student_error, teacher_error, distance = (math.sqrt(float(np.mean(part**2))) for part in (ours, theirs, apart))
    return Numbers(
        len(every),
        student_error,
        teacher_error,
        distance,
        float(np.corrcoef(ours, theirs)[0, 1]) if varied else None,
        list(zip(*shown, strict=True)),
    )
