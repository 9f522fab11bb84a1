"""What logits of others turn out to be: finite, of which kind, and of these rows in this order, as labels show.

`LogitKind` says what a row z stands for. Log-probabilities, log p = z - logsumexp(z), differ from raw logits by a
constant c of each row. A softmax does not see it, at any temperature T: softmax((z - c) / T) = softmax(z / T). So KD
and TAKD lose nothing but rounding. The squared distance of Annealing-KD's stage I and of Continuation-KD does see it:
with k classes, ||z_s - Phi (z_t - c)||^2 = ||z_s - Phi z_t||^2 + 2 Phi c sum(z_s - Phi z_t) + k (Phi c)^2, and c is
another number for each row, which nobody can give back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.recipe import LogitKind

_SHOWN = 5
_TOLERANCE = 1e-3
"""By how much a sum of probabilities may miss 1: rows may have been written as float16."""
_ROUNDED = 0.05
"""The same, as a share, where none is negative: they may have been rounded to two digits."""
_SCALES = {1: "", 100: ", in percent"}
"""What rows of probabilities sum to."""
_MOST_CONSTANT = 0.01
"""The share of rows in which all logits may be equal, as two of half precision sometimes are."""
_SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4)
_PARTS = 50
_PART_ROWS = 20
"""The fewest rows of a part."""
_FEW_ROWS = 50
"""So few rows show no order."""
_MUCH = 0.15
"""An order that agrees better by so much is believed to be the one."""
_SURE = 5.0
"""... if that is so many standard errors."""
_CLASSES_ASSIGNED = 2_000


@dataclass
class Looks:
    """What was seen of all rows of a file so far.

    Raises:
        RefusedError: a row is not finite; names it.
    """

    name: str
    classes: int
    task: recipe.Task
    rows: int = 0
    zero: int = 0
    constant: int = 0
    examples: list[int] = field(default_factory=list)
    probabilities: dict[int, bool] = field(default_factory=lambda: dict.fromkeys(_SCALES, True))
    """Whether all rows are probabilities, by what these sum to."""
    log_probabilities: bool = True
    one_hot: bool = True
    confidence: float = 0.0
    """Sum over rows of the probability of the first class."""

    def add(self, logits: np.ndarray, numbers: np.ndarray, view: int) -> np.ndarray:
        """Look at some rows, float32 [n, classes]; what each says: its first class, or its number for regression.

        Args:
            numbers: of these rows in the file, int64 [n].
        """
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise self._not_finite(logits, numbers, view, bad)
        self.rows += len(logits)
        if self.task == "regression":
            return logits[:, 0].astype(np.float64)
        highest, lowest = logits.max(axis=1), logits.min(axis=1)
        flat = highest == lowest
        if self.classes > 1 and flat.any():
            self.constant += int(flat.sum())
            self.zero += int((flat & (highest == 0)).sum())
            self.examples += numbers[flat][: _SHOWN - len(self.examples)].tolist()
        shifted = np.exp((logits - highest[:, None]).astype(np.float64)).sum(axis=1)
        self.confidence += float((1 / shifted).sum())
        self.log_probabilities &= bool((np.abs(highest + np.log(shifted)) < 10 * _TOLERANCE).all())
        sums = logits.sum(axis=1, dtype=np.float64)
        for scale in _SCALES:
            close = (lowest >= 0).all() and (np.abs(sums / scale - 1) < _ROUNDED).all()
            self.probabilities[scale] &= bool(close)
        self.one_hot &= bool(((logits == 0) | (logits == highest[:, None])).all() and (lowest == 0).all())
        self.one_hot &= bool(((logits != 0).sum(axis=1) == 1).all())
        first: np.ndarray = logits.argmax(axis=1)
        return first

    def kind(self, said: LogitKind | None) -> LogitKind:
        """What all rows are, once they were seen.

        Args:
            said: what the user says; None leaves it to what is seen.

        Raises:
            RefusedError: rows are empty, labels or probabilities, or of another kind than was said.
        """
        if self.task == "regression":
            if said == "log_probabilities":
                raise self._refused("a regression has no probabilities", "data.task: regression", "leave --kind out")
            return "logits"
        self._check_filled()
        if self.one_hot:
            what = f"{self.name} holds labels: one entry a row, and zeros"
            raise self._refused(what, "one-hot rows", "train by hard_labels, which needs no logits")
        for scale in (scale for scale, found in self.probabilities.items() if found):
            share = "them" if scale == 1 else f"them divided by {scale}"
            advice = f"save numpy.log of {share}, as float32 and of at least 1e-30, and give --kind log_probabilities"
            got = f"rows that sum to {scale}, and no number is negative"
            raise self._refused(f"{self.name} holds probabilities{_SCALES[scale]}", got, advice)
        if said == "logits" and self.log_probabilities:
            got = "rows whose exponentials sum to 1"
            raise self._refused(f"{self.name} holds log-probabilities", got, "give --kind log_probabilities")
        if said == "log_probabilities" and not self.log_probabilities:
            got = "rows whose exponentials do not sum to 1"
            raise self._refused(f"{self.name} does not hold log-probabilities", got, "leave --kind out for raw logits")
        return "log_probabilities" if self.log_probabilities else "logits"

    def _check_filled(self) -> None:
        if self.zero or self.constant > _MOST_CONSTANT * self.rows:
            count, what = (self.zero, "all zero") if self.zero else (self.constant, "equal in all classes")
            more = ", ..." if count > len(self.examples) else ""
            raise RefusedError(
                f"{self.name} has rows that say nothing: their logits are {what}",
                got=f"{count:,} of {self.rows:,} rows: {', '.join(map(str, self.examples))}{more}",
                expected="logits of every row",
                next="look whether they were all computed and saved",
            )

    def _refused(self, what: str, got: str, advice: str) -> RefusedError:
        return RefusedError(what, got=got, expected="raw logits: the outputs before a softmax", next=advice)

    def _not_finite(self, logits: np.ndarray, numbers: np.ndarray, view: int, bad: np.ndarray) -> RefusedError:
        row = int(bad[0])
        what = "NaN" if np.isnan(logits[row]).any() else "infinity, or more than float32 can hold"
        place = np.flatnonzero(~np.isfinite(logits[row]))
        return RefusedError(
            f"{self.name} has logits that are not finite",
            got=f"{what} in view {view}, row {int(numbers[row])}, class {int(place[0])}",
            expected="finite numbers",
            next="look whether all rows were computed, and every part of the file was copied",
        )


@dataclass
class Stored:
    """Which rows of a file say nothing once they are stored, in an encoding that rounds."""

    name: str
    rows: int = 0
    zero: int = 0
    lost: int = 0
    examples: list[int] = field(default_factory=list)

    def add(self, logits: np.ndarray, stored: np.ndarray, numbers: np.ndarray) -> None:
        """Compare some rows with what is stored of them, float32 [n, classes] each; numbers: of them in the file."""
        several = logits.shape[1] > 1
        zero = (stored == 0).all(axis=1)
        differ = np.ptp(logits, axis=1) > 0 if several else logits[:, 0] != 0
        lost = differ & ((np.ptp(stored, axis=1) == 0) if several else zero)
        self.rows += len(logits)
        self.lost += int(lost.sum())
        self.zero += int((lost & zero).sum()) if several else 0
        self.examples += numbers[lost][: _SHOWN - len(self.examples)].tolist()

    def check(self, encoding: str) -> None:
        """Refuse rows that the encoding makes all zero, or more than a few that it makes equal in all classes.

        Raises:
            RefusedError: names rows and encoding.
        """
        if not self.zero and self.lost <= _MOST_CONSTANT * self.rows:
            return
        more = ", ..." if self.lost > len(self.examples) else ""
        raise RefusedError(
            f"{self.name} has rows that say nothing as they would be stored, in {encoding}",
            got=f"{self.lost:,} of {self.rows:,} rows, all zero or equal in all classes once rounded: "
            f"{', '.join(map(str, self.examples))}{more}",
            expected="logits that are large enough, and far enough apart, for their encoding",
            next="set cache.encoding: float32",
        )


@dataclass(frozen=True)
class Order:
    """How well logits fit the labels of the rows that they stand for."""

    agreement: float
    """Share of rows whose first class is the label; Pearson's correlation for regression."""
    chance: float
    """What logits of other rows would come to."""
    rows: int
    """How many rows have a label."""
    informative: bool
    """Whether the labels say anything of an order: there are rows enough, of more than one label."""
    explained: str | None = None
    """What would agree much better, if anything does: in words that follow `if`."""
    better: float = 0.0
    """So well."""
    shuffled: str | None = None
    """Rows that agree as those in any order would, although the others agree far better; if there are such."""

    @property
    def found_wrong(self) -> bool:
        """Whether rows were found in another order, all of them or some."""
        return self.explained is not None or self.shuffled is not None

    @property
    def at_chance(self) -> bool:
        """Whether it is no better than that of rows in any order."""
        noise = np.sqrt(max(self.chance * (1 - self.chance), 1e-12) / self.rows) if self.chance else self.rows**-0.5
        above = self.agreement - self.chance
        return bool(self.informative and above < 3 * noise and above < 0.1 * (1 - self.chance))

    def better_than(self, other: Order) -> bool:
        """Whether it agrees so much better that the other one is not the one that was meant."""
        noise = (max(self.agreement * (1 - self.agreement), 0.01) / max(self.rows, 1)) ** 0.5
        return self.informative and self.agreement - other.agreement > max(_MUCH, _SURE * noise)

    def worse_than(self, together: Order) -> bool:
        """Whether it agrees less than all rows together do, by more than few rows of a weak teacher may by chance."""
        return bool(self.rows and together.agreement - self.agreement > 1.5 * self.rows**-0.5)


Score = Callable[[np.ndarray, np.ndarray], float]


def look_at_order(said: np.ndarray, labels: np.ndarray, classes: int, task: recipe.Task, *, keyed: bool) -> Order:
    """Compare what logits say with labels, in the order of their file.

    Args:
        said: the first class of each row, or its number for regression; [n].
        labels: of the same rows; below 0 or NaN where there is none.
        keyed: whether rows were joined by a key, so that their order is no question.
    """
    known = ~np.isnan(labels) if task == "regression" else labels >= 0
    said, labels = said[known], labels[known]
    score: Score = _correlation if task == "regression" else _equal
    if not len(labels):
        return Order(0.0, 0.0, 0, False)
    agreement, chance = score(said, labels), 0.0
    if task == "classification":
        shares = [np.bincount(one.astype(np.int64), minlength=classes) / len(labels) for one in (said, labels)]
        chance = float(shares[0] @ shares[1])
    informative = len(labels) >= _FEW_ROWS and bool((labels != labels[0]).any())
    tried = [] if keyed else _orders(said, labels, score)
    if task == "classification":
        tried += _classes(said, labels, classes)
    better, words = max(tried, default=(0.0, ""))
    if Order(better, chance, len(labels), informative).better_than(Order(agreement, chance, len(labels), informative)):
        return Order(agreement, chance, len(labels), informative, words, better)
    shuffled = None
    if task == "classification" and not keyed and informative:
        shuffled = _shuffled_block(said.astype(np.int64), labels.astype(np.int64), np.flatnonzero(known), classes)
    return Order(agreement, chance, len(labels), informative, shuffled=shuffled)


def check_order(name: str, order: Order, *, keyed: bool, hint: str | None = None) -> None:
    """Refuse logits that are those of other rows, or of classes in another order.

    Args:
        hint: what may have led to another order, if anything is known.

    Raises:
        RefusedError: says how well they agree, how well by chance, and what would agree better.
    """
    got = f"agreement {order.agreement:.1%}, chance {order.chance:.1%}"
    more = "" if hint is None else f"; {hint}"
    if order.explained is not None:
        raise RefusedError(
            f"{name} does not fit the labels as it is: it would agree in {order.better:.1%} if {order.explained}",
            got=got,
            expected="a row of logits for each row, in their order, and classes in the order of the labels",
            next=f"bring rows and classes into that order, or join rows by --key{more}",
        )
    if order.at_chance:
        raise RefusedError(
            f"the logits in {name} look shuffled: they agree with the labels as those of any rows would",
            got=got,
            expected="logits of these very rows" + ("" if keyed else ", in their order"),
            next="look which rows and which classes they are of" + ("" if keyed else f"; or join rows by --key{more}"),
        )
    if order.shuffled is not None:
        raise RefusedError(
            f"some of the rows in {name} look shuffled: {order.shuffled}",
            got=f"{got} over all rows",
            expected="a row of logits for each row, in their order",
            next=f"bring these rows into the order of the data, or join rows by --key{more}",
        )


def unsure(name: str, order: Order, confidence: float) -> str | None:
    """A line on logits that are far surer of themselves than right; None where they are not."""
    if order.informative and confidence - order.agreement > 0.3:
        return (
            f"{name} is sure of its classes ({confidence:.0%} on average) and agrees with the labels in "
            f"{order.agreement:.1%} only: are some of the rows in another order?"
        )
    return None


def _equal(said: np.ndarray, labels: np.ndarray) -> float:
    return float((said == labels).mean())


def _correlation(said: np.ndarray, labels: np.ndarray) -> float:
    spread = said.std() * labels.std()
    return float(((said - said.mean()) * (labels - labels.mean())).mean() / spread) if spread else 0.0


def _orders(said: np.ndarray, labels: np.ndarray, score: Score) -> list[tuple[float, str]]:
    """How well other orders of the rows would agree, each with its words."""
    tried = [
        (score(said[::-1], labels), "its rows were in the reverse order"),
        (score(said, np.sort(labels, kind="stable")), "the rows were sorted by label"),
    ]
    for by in _SHIFTS:
        if abs(by) < len(labels):
            ours, theirs = (said[by:], labels[:-by]) if by > 0 else (said[:by], labels[-by:])
            where = "before" if by > 0 else "after"
            count = "one row" if abs(by) == 1 else f"{abs(by)} rows"
            tried.append((score(ours, theirs), f"each row stood {count} {where} its place"))
            tried += _from_a_row_on(said, labels, by, f"stood {count} {where} their places", score)
    return tried


def _from_a_row_on(said: np.ndarray, labels: np.ndarray, by: int, words: str, score: Score) -> list[tuple[float, str]]:
    """The same of the rows from some place on: where one is missing or twice there, all that follow are shifted."""
    cuts = np.unique(np.linspace(0, len(labels), _PARTS + 1).astype(np.int64))
    parts = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
    if len(labels) < _PARTS * _PART_ROWS:
        return []
    moved = np.roll(said, -by)
    as_is, shifted = ([score(one[a:b], labels[a:b]) for a, b in parts] for one in (said, moved))
    gained = np.array(shifted) - np.array(as_is)
    # The cut after which the shift gains most, if it loses before.
    gains = np.cumsum(gained[::-1])[::-1]
    at = int(gains.argmax())
    if not at or gains[at] <= 0:
        return []
    first = parts[at][0]
    together = np.concatenate([said[:first], moved[first:]])
    return [(score(together, labels), f"the rows from about {first:,} on {words}")]


def _shuffled_block(said: np.ndarray, labels: np.ndarray, rows: np.ndarray, classes: int) -> str | None:
    """Rows that follow one another and agree as by chance, in words; None if there are none.

    Only such are told that another order of theirs would make agree: their classes are those of their labels, as often.
    A teacher that knows nothing of a class says others, and no order would help.

    Args:
        said, labels: class ids of rows with labels, int64 [n].
        rows: their numbers, for the words; int64 [n].
    """
    right, parts = said == labels, min(_PARTS, len(labels) // _PART_ROWS)
    overall = np.bincount(said, minlength=classes) @ np.bincount(labels, minlength=classes) / len(labels) ** 2
    cuts = np.linspace(0, len(labels), parts + 1).astype(np.int64)
    # Parts with fewer right rows than halfway between all rows and chance; those together in which most are missing.
    short = (right.mean() + overall) / 2 * np.diff(cuts) - np.add.reduceat(right.astype(np.int64), cuts[:-1])
    sums = np.concatenate([[0.0], np.cumsum(short)])
    lows = np.minimum.accumulate(sums)
    last = int((sums - lows).argmax())
    first = int(sums[: last + 1].argmin())
    start, stop = int(cuts[first]), int(cuts[last])
    count = stop - start
    if count < _FEW_ROWS or count > 0.8 * len(labels):
        return None
    theirs = [np.bincount(one[start:stop], minlength=classes) for one in (said, labels)]
    chance = float(theirs[0] @ theirs[1]) / count**2
    found = float(right[start:stop].mean())
    others = float(right.sum() - right[start:stop].sum()) / (len(labels) - count)
    best = float(np.minimum(*theirs).sum()) / count
    noise = (max(others * (1 - others), 0.01) / count) ** 0.5
    as_by_chance = found - chance < 0.1 * (1 - chance)
    if not as_by_chance or min(others, best) - found < max(_MUCH, _SURE * noise, (others - chance) / 2):
        return None
    return (
        f"about {rows[start]:,} to {rows[stop - 1]:,} agree with the labels in {found:.1%}, by chance {chance:.1%}; "
        f"the others in {others:.1%}"
    )


def _classes(said: np.ndarray, labels: np.ndarray, classes: int) -> list[tuple[float, str]]:
    """How well another order of the classes would agree. Of few rows, some order always does."""
    if not 1 < classes <= _CLASSES_ASSIGNED or len(labels) < 10 * classes:
        return []
    from scipy.optimize import linear_sum_assignment

    table = np.bincount(said.astype(np.int64) * classes + labels.astype(np.int64), minlength=classes**2)
    table = table.reshape(classes, classes)
    ours, theirs = linear_sum_assignment(table, maximize=True)
    moved = [(int(a), int(b)) for a, b in zip(ours, theirs, strict=True) if a != b and table[a, b]]
    if not moved:
        return []
    shown = ", ".join(f"column {a} is class {b}" for a, b in moved[:_SHOWN]) + (", ..." if len(moved) > _SHOWN else "")
    found = float(table[ours, theirs].sum() / len(labels))
    return [(found, f"its classes were in another order: {shown}")] if found > 0.4 else []
