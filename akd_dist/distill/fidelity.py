"""How well what is stored of a teacher describes it: the card of an encoding, measured on some of its targets.

Errors of gradients need no student of one's own: they are taken where a student says of every target what is true on
average (the unigram student), and where it says of a target what the teacher says of another one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from akd_dist.distill.capture import Captured, capture_chunk
from akd_dist.distill.dictionary import Probe
from akd_dist.distill.output_head import Head, blocks, parts
from akd_dist.distill.sparse import SparseTargets
from akd_dist.distill.tail_curve import log_mass
from akd_dist.distill.teacher_targets import Distribution, Targets, Whole, row_dots

# ---- what others store, as targets


@dataclass(eq=False)
class TopKOnly(Targets):
    """The k largest logits and no more, as other systems use them; float16, with the mass of the tail at any T.

    At temperatures other than 1 those systems do not know that mass: they are shown better here than they are.
    """

    captured: Captured
    """Of the same k, with the mass of the tail at every temperature that is asked for."""
    temperatures: tuple[float, ...]
    classes: int
    tail: Literal["none", "uniform", "ghost"]
    """Nothing but the head, renormalised; the rest spread evenly; or the rest as the student itself has it."""

    def __post_init__(self) -> None:
        self.choice = self.captured.ids[:, 0]
        self.values = self.captured.values.half().float()

    def distribution(self, temperature: float, rows: slice) -> Distribution:
        """As `Targets.distribution`; a ghost tail is spread as by a student that finds all classes equally likely."""
        return self.beside(None, temperature, rows)

    def beside(self, q: Tensor | None, temperature: float, rows: slice) -> Whole:
        """The probabilities that a student with q [m, classes] is taught."""
        ids, values = self.captured.ids[rows], self.values[rows]
        head, k = torch.softmax(values / temperature, 1), ids.shape[1]
        if self.tail == "none" or k == self.classes:
            p = torch.zeros(len(ids), self.classes, device=ids.device).scatter_(1, ids, head)
            return Whole(p, torch.xlogy(p, p).sum(1))
        top, rest = values[:, 0], self.classes - k
        slope = (self.classes * self.captured.mean[rows] - values.sum(1)) / rest - top
        mass = log_mass(temperature, self.temperatures, self.captured.tail[rows], math.log(rest), slope)
        tau = torch.sigmoid(mass - torch.logsumexp((values - top[:, None]).double() / temperature, 1)).float()[:, None]
        shape = torch.ones(len(ids), self.classes, device=ids.device) if q is None or self.tail == "uniform" else q
        p = shape.scatter(1, ids, 0.0)
        p = p.mul_(tau / p.sum(1, keepdim=True)).scatter_(1, ids, head * (1 - tau))
        return Whole(p, torch.xlogy(p, p).sum(1))

    def logits(self, rows: slice) -> Tensor:
        """The stored logits, and 0 for all other classes."""
        zeros = torch.zeros(len(self.values[rows]), self.classes, device=self.values.device)
        return zeros.scatter_(1, self.captured.ids[rows], self.values[rows])


# ---- the card


@dataclass(frozen=True)
class AtTemperature:
    """What p^ of an encoding is beside the teacher's p at one temperature: means over targets."""

    temperature: float
    kl: float
    """KL(p || p^), nats; infinite where p^ is 0 and p is not."""
    total_variation: float
    """Half the sum of |p - p^|."""
    unigram_error: float
    """Of the gradient in the logits, over the gradient (root mean squares), at the student that says the mean p."""
    other_error: float
    """The same at the student that says what the teacher says of another target."""
    unigram_hidden_error: float | None = None
    """The first behind the teacher's head, as a backbone would receive it; None without a linear head."""
    other_hidden_error: float | None = None
    """The second there."""
    mass_error: float | None = None
    """Of the tail's mass, which is interpolated between stored temperatures: mean absolute error; None where none is
    stored."""


@dataclass(frozen=True)
class Card:
    """Of one encoding."""

    agreement: float
    """Share of targets whose largest logit is that of the class which the encoding names."""
    unexplained: float
    """Share of the energy of the teacher's centred logits that decoded ones leave over."""
    at: tuple[AtTemperature, ...]


def measure_fidelity(
    probe: Probe,
    candidates: Mapping[str, Targets],
    temperatures: Sequence[float],
    *,
    numbers: Tensor | None = None,
    head: Head | None = None,
    chunk: int | None = None,
    done: Callable[[int], None] = lambda targets: None,
) -> dict[str, Card]:
    """The cards of several encodings of the same targets, in two passes of the teacher's head over them.

    Args:
        candidates: what each decodes to, target by target as `numbers` has them.
        numbers: int64 [n], which of the probe's targets; all by default.
        head: of the teacher, where errors are wanted behind it; linear, a softcapped one is left out.
        chunk: targets whose logits exist at once.
        done: told how many targets of one candidate were compared at one temperature, whenever some were.
    """
    numbers = torch.arange(len(probe), device=probe.device) if numbers is None else numbers
    head = head.cut(probe.classes) if head is not None and head.linear else None
    measured = _Measured(probe, numbers, tuple(temperatures), head, chunk or capture_chunk(probe.classes), done)
    with torch.inference_mode():
        return measured.cards(candidates)


_NOTHING = 1e-30  # a probability for which float32 may hold 0 on one side and something on the other
_PLACES = ("unigram", "other")


@dataclass(eq=False)
class _Sums:
    """Sums over targets, in float64: of one encoding at one temperature, or of the gradients themselves."""

    kl: float = 0.0
    tv: float = 0.0
    mass: float = 0.0
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PLACES, 0.0))
    behind: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PLACES, 0.0))


@dataclass(eq=False)
class _Chunk:
    """Some targets, at one temperature."""

    p: Tensor
    """What the teacher says, [m, V]."""
    students: dict[str, Tensor]
    """What students say where errors are taken, by place: [m, V]."""
    errors: Tensor
    """A buffer [m, V], so that all of it goes through the head together."""
    start: int
    """The number of its first target."""

    @property
    def blocks(self) -> Iterator[slice]:
        """Some of its targets, as places in it."""
        return blocks(slice(0, len(self.p)), self.p.shape[1], self.p.device)


@dataclass(eq=False)
class _Measured:
    probe: Probe
    numbers: Tensor
    temperatures: tuple[float, ...]
    head: Head | None
    chunk: int
    done: Callable[[int], None]

    def cards(self, candidates: Mapping[str, Targets]) -> dict[str, Card]:
        """See `measure_fidelity`."""
        unigram = self._unigram()
        sums = {name: [_Sums() for _ in self.temperatures] for name in candidates}
        scale = [_Sums() for _ in self.temperatures]
        agreed, left, energy = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0.0), 0.0
        shifted = self.numbers.roll(len(self.numbers) // 2)
        for part in parts(0, len(self.numbers), self.chunk):
            z, other = self.probe.logits(self.numbers[part]), self.probe.logits(shifted[part])
            buffer = torch.empty_like(z)
            energy += self._logits_left(z, candidates, part.start, agreed, left)
            for at, T in enumerate(self.temperatures):
                students = {"unigram": unigram[at].expand_as(z), "other": torch.softmax(other / T, 1)}
                chunk = _Chunk(torch.softmax(z / T, 1), students, buffer, part.start)
                for place, q in students.items():
                    self._add(scale[at], [place], torch.sub(chunk.p, q, out=buffer))
                for name, one in candidates.items():
                    self._compare(sums[name][at], one, T, chunk)
                    self.done(len(z))
        count = len(self.numbers)
        return {
            name: Card(
                agreed[name] / count,
                left[name] / energy,
                tuple(self._at(T, one, sums[name][at], scale[at]) for at, T in enumerate(self.temperatures)),
            )
            for name, one in candidates.items()
        }

    def _unigram(self) -> Tensor:
        """The mean of p at each temperature, float32 [temperatures, V]."""
        total = torch.zeros(len(self.temperatures), self.probe.classes, dtype=torch.float64, device=self.probe.device)
        for part in parts(0, len(self.numbers), self.chunk):
            z = self.probe.logits(self.numbers[part])
            for block in blocks(slice(0, len(z)), self.probe.classes, z.device):
                for at, T in enumerate(self.temperatures):
                    total[at] += torch.softmax(z[block] / T, 1).sum(0)
        return (total / len(self.numbers)).float()

    def _logits_left(
        self, z: Tensor, candidates: Mapping[str, Targets], start: int, agreed: dict[str, float], left: dict[str, float]
    ) -> float:
        """Count what agrees, add what decoded logits leave over, and return the energy of the teacher's."""
        energy = 0.0
        for block in blocks(slice(0, len(z)), self.probe.classes, z.device):
            rows, choice = slice(start + block.start, start + block.stop), z[block].argmax(1)
            centred = z[block] - z[block].mean(1, keepdim=True)
            energy += _total(row_dots(centred, centred))
            for name, one in candidates.items():
                agreed[name] += _total((one.choice[rows] == choice).double())
                e = one.logits(rows).float()
                e = e.sub_(e.mean(1, keepdim=True)).sub_(centred)
                left[name] += _total(row_dots(e, e))
        return energy

    def _compare(self, sums: _Sums, one: Targets, temperature: float, chunk: _Chunk) -> None:
        """One encoding beside the teacher: what it says depends on the student only where the tail is the student's."""
        apart = isinstance(one, TopKOnly) and one.tail == "ghost"
        for places in [[place] for place in _PLACES] if apart else [list(_PLACES)]:
            for block in chunk.blocks:
                rows, p = slice(chunk.start + block.start, chunk.start + block.stop), chunk.p[block]
                if isinstance(one, TopKOnly):
                    p_hat = one.beside(chunk.students[places[0]][block], temperature, rows).p
                else:
                    p_hat = one.probabilities(temperature, rows)
                e = torch.sub(p, p_hat, out=chunk.errors[block])
                if "unigram" in places:
                    sums.kl += _total(torch.xlogy(p, p / p_hat).masked_fill_(p < _NOTHING, 0.0).sum(1))
                    sums.tv += _total(e.abs().sum(1)) / 2
                    if isinstance(one, SparseTargets):
                        sums.mass += _total(e.gather(1, one.ids[rows]).sum(1).abs())
            self._add(sums, places, chunk.errors)

    def _add(self, into: _Sums, places: Sequence[str], e: Tensor) -> None:
        """Add the squared norms of errors [m, V], in the logits and behind the head."""
        here = _total(row_dots(e, e))
        behind = 0.0
        if self.head is not None:
            through = e.to(self.head.weight.dtype) @ self.head.weight
            behind = _total(row_dots(through, through))
        for place in places:
            into.errors[place] += here
            into.behind[place] += behind

    def _at(self, temperature: float, one: Targets, sums: _Sums, scale: _Sums) -> AtTemperature:
        def error(place: str, behind: bool) -> float:
            mine, whole = (each.behind[place] if behind else each.errors[place] for each in (sums, scale))
            return math.sqrt(mine / whole) if whole else 0.0

        count = len(self.numbers)
        behind = {f"{place}_hidden_error": error(place, True) for place in _PLACES if self.head is not None}
        return AtTemperature(
            temperature, sums.kl / count, sums.tv / count, error("unigram", False), error("other", False), **behind,
            mass_error=sums.mass / count if isinstance(one, SparseTargets) else None,
        )  # fmt: skip


def _total(each: Tensor) -> float:
    return float(each.sum(dtype=torch.float64))
