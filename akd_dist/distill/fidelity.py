"""How well what is stored of a teacher describes it: the card of an encoding, measured on some of its targets.

Errors of gradients need no student of one's own: they are taken where a student says of every target what is true on
average (the unigram student), and where it says of a target what the teacher says of another one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from akd_dist.distill.capture import Captured, capture_chunk
from akd_dist.distill.dictionary import Probe
from akd_dist.distill.output_head import Head, blocks, parts
from akd_dist.distill.tail_curve import log_mass
from akd_dist.distill.teacher_targets import Distribution, Targets, Whole, row_dots

# ---- what others store, as targets


@dataclass(eq=False)
class TopKOnly(Targets):
    """The k largest logits and no more, as other systems use them; float16, with the mass of the tail at any T.

    At temperatures other than 1 those systems do not know that mass: they are shown better here than they are.
    """

    captured: Captured
    """With nodes at every temperature that it is asked for."""
    temperatures: tuple[float, ...]
    classes: int
    tail: Literal["none", "uniform", "ghost"]
    """Nothing but the head, renormalised; the rest spread evenly; or the rest as the student itself has it."""

    def __post_init__(self) -> None:
        self.choice = self.captured.ids[:, 0]
        self.values = self.captured.values.half().float()

    def distribution(self, temperature: float, rows: slice) -> Distribution:
        """As there; of a ghost tail, beside an even student."""
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
        """Zeros beside the head, less the mean that is not known either."""
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
) -> dict[str, Card]:
    """The cards of several encodings of the same targets, in two passes of the teacher's head over them.

    Args:
        candidates: what each decodes to, target by target as `numbers` has them.
        numbers: int64 [n], which of the probe's targets; all by default.
        head: of the teacher, where errors are wanted behind it; linear, a softcapped one is left out.
        chunk: targets whose logits exist at once.
    """
    numbers = torch.arange(len(probe), device=probe.device) if numbers is None else numbers
    head = head.cut(probe.classes) if head is not None and head.linear else None
    measured = _Measured(probe, numbers, tuple(temperatures), head, chunk or capture_chunk(probe.classes))
    with torch.inference_mode():
        return measured.cards(candidates)


_NOTHING = 1e-30  # a probability for which float32 may hold 0 on one side and something on the other
_PLACES = ("unigram", "other", "unigram_hidden", "other_hidden")


@dataclass(eq=False)
class _Sums:
    """Sums over targets, in float64: of one encoding at one temperature."""

    kl: float = 0.0
    tv: float = 0.0
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PLACES, 0.0))


@dataclass(eq=False)
class _Measured:
    probe: Probe
    numbers: Tensor
    temperatures: tuple[float, ...]
    head: Head | None
    chunk: int

    def cards(self, candidates: Mapping[str, Targets]) -> dict[str, Card]:
        """See `measure_fidelity`."""
        unigram = self._unigram()
        sums = {name: [_Sums() for _ in self.temperatures] for name in candidates}
        scale = [dict.fromkeys(_PLACES, 0.0) for _ in self.temperatures]
        agreed, left, energy = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0.0), 0.0
        shifted = self.numbers.roll(len(self.numbers) // 2)
        for part in parts(0, len(self.numbers), self.chunk):
            whole, others = self.probe.logits(self.numbers[part]), self.probe.logits(shifted[part])
            for block in blocks(slice(0, len(whole)), self.probe.classes, whole.device):
                rows = slice(part.start + block.start, part.start + block.stop)
                z, other = whole[block], others[block]
                centred = z - z.mean(1, keepdim=True)
                energy += _total(row_dots(centred, centred))
                for name, one in candidates.items():
                    agreed[name] += _total((one.choice[rows] == z.argmax(1)).double())
                    e = one.logits(rows).float()
                    e = e.sub_(e.mean(1, keepdim=True)).sub_(centred)
                    left[name] += _total(row_dots(e, e))
                for at, T in enumerate(self.temperatures):
                    p, students = (
                        torch.softmax(z / T, 1),
                        {"unigram": unigram[at].expand_as(z), "other": torch.softmax(other / T, 1)},
                    )
                    self._add(scale[at], {place: q - p for place, q in students.items()})
                    for name, one in candidates.items():
                        self._compare(sums[name][at], one, p, students, T, rows)
        count = len(self.numbers)
        return {
            name: Card(
                agreed[name] / count,
                left[name] / energy,
                tuple(self._at(T, sums[name][at], scale[at]) for at, T in enumerate(self.temperatures)),
            )
            for name in candidates
        }

    def _unigram(self) -> Tensor:
        """The mean of p at each temperature, float32 [temperatures, V]."""
        total = torch.zeros(len(self.temperatures), self.probe.classes, dtype=torch.float64, device=self.probe.device)
        for part in parts(0, len(self.numbers), self.chunk):
            z = self.probe.logits(self.numbers[part])
            for block in blocks(slice(0, len(z)), self.probe.classes, z.device):
                for at, T in enumerate(self.temperatures):
                    total[at] += torch.softmax(z[block] / T, 1).sum(0, dtype=torch.float64)
        return (total / len(self.numbers)).float()

    def _compare(
        self, sums: _Sums, one: Targets, p: Tensor, students: Mapping[str, Tensor], temperature: float, rows: slice
    ) -> None:
        if isinstance(one, TopKOnly) and one.tail == "ghost":
            taught = {place: one.beside(q, temperature, rows).p for place, q in students.items()}
        else:
            taught = dict.fromkeys(students, one.probabilities(temperature, rows))
        p_hat = taught["unigram"]
        each = (torch.xlogy(p, p) - torch.xlogy(p, p_hat)).masked_fill_(p < _NOTHING, 0.0)
        sums.kl += _total(each.sum(1))
        sums.tv += _total((p - p_hat).abs().sum(1)) / 2
        self._add(sums.errors, {place: p - p_hat for place, p_hat in taught.items()})

    def _add(self, into: dict[str, float], errors: Mapping[str, Tensor]) -> None:
        """Add the squared norms of errors, in the logits and behind the head."""
        for place, e in errors.items():
            into[place] += _total(row_dots(e, e))
            if self.head is not None:
                behind = e.to(self.head.weight.dtype) @ self.head.weight
                into[f"{place}_hidden"] += _total(row_dots(behind, behind))

    def _at(self, temperature: float, sums: _Sums, scale: Mapping[str, float]) -> AtTemperature:
        def error(place: str) -> float:
            return math.sqrt(sums.errors[place] / scale[place]) if scale[place] else 0.0

        count, behind = len(self.numbers), self.head is not None
        return AtTemperature(
            temperature, sums.kl / count, sums.tv / count, error("unigram"), error("other"),
            error("unigram_hidden") if behind else None, error("other_hidden") if behind else None,
        )  # fmt: skip


def _total(each: Tensor) -> float:
    return float(each.sum(dtype=torch.float64))
