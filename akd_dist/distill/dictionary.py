"""The dictionary of a `top_k` store: what tails of all its targets share, made once from some targets of the teacher's.

m is the mean of centred logits; U their principal components, each class weighted by its mean probability over three
temperatures, scaled so that coefficients have unit variance; rho and v what a class's logits have left over in tails; a
prior of the tail, and a factor of each class that makes its mean tail probability the teacher's, by temperature.

With a linear head, U comes of an eigenproblem of the size of the hidden state, in float64. Without one it comes of the
logits themselves by a randomised range finder. Logits exist for a chunk of targets at a time, in either case.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from akd_dist.base.errors import RefusedError
from akd_dist.distill.capture import capture_chunk, capture_logits, exponentials, projected
from akd_dist.distill.output_head import Head, blocks, parts
from akd_dist.distill.sparse import COEFFICIENT_STEP, NEVER, SparseTargets, TailDictionary

WEIGHTING = (1.0, 2.0, 4.0)
"""Temperatures over which a class's probability is averaged to weight it."""
MOST_TARGETS = 8192
"""Targets that passes over the vocabulary are made on, evenly spaced: statistics of classes need no more."""
ROUNDS = 2
"""Of fitting the calibration."""
_KEPT = 2**24  # logits that are kept of these targets, k of each
_SUMMED = 128  # targets that are summed up in float32
_SMOOTHED = 0.05  # of the mass of tails, spread evenly: classes that are hardly seen stay as they are
_OVERSAMPLED = 16  # columns of the sketch beyond the rank
_POWERS = 2  # times that the sketch is turned towards the large components
_ROWS = 8192  # of a head, in float64, at a time

F64 = torch.float64


class Probe(ABC):
    """Targets that a dictionary is made from; their logits can be had in slices, as often as they are asked for."""

    classes: int
    device: torch.device

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Raw logits of the targets with these numbers, float32 [m, classes], ours to change.

        Args:
            out: memory that they may be made in, float32 [m or more, classes].
        """


@dataclass(eq=False)
class HiddenProbe(Probe):
    """Hidden states of a teacher, with its head."""

    h: Tensor
    """[P, d], of any float dtype."""
    head: Head
    classes: int

    def __post_init__(self) -> None:
        self.head, self.device = self.head.cut(self.classes), self.h.device

    def __len__(self) -> int:
        return len(self.h)

    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """As `Probe.logits`."""
        h = self.h[rows]
        return self.head.logits(h, out if h.dtype == torch.float32 else None).float()


@dataclass(eq=False)
class LogitProbe(Probe):
    """Logits that are there, as of a classifier: [P, classes], of any float dtype; they may lie in a memory map."""

    stored: Tensor

    def __post_init__(self) -> None:
        self.classes, self.device = self.stored.shape[1], self.stored.device

    def __len__(self) -> int:
        return len(self.stored)

    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """As `Probe.logits`."""
        return self.stored[rows].float()


@dataclass(eq=False)
class ComputedProbe(Probe):
    """Logits that are computed whenever they are asked for, as by a classifier whose rows are run again."""

    compute: Callable[[Tensor, Tensor], Tensor]
    """Numbers of targets, int64 [m], and memory -> their logits in that memory, float32 [m, classes]."""
    count: int
    classes: int
    device: torch.device

    def __len__(self) -> int:
        return self.count

    def logits(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """As `Probe.logits`."""
        return self.compute(rows, torch.empty(len(rows), self.classes, device=self.device) if out is None else out)


def make_dictionary(
    probe: Probe, *, k: int, rank: int, temperatures: Sequence[float], chunk: int | None = None
) -> dict[str, Tensor]:
    """The arrays of a dictionary by name, on the probe's device: see `TailDictionary.of`.

    `mean_logit` float32 [V] and `tail_prior` float32 [t, V]; where the rank is above 0 also `basis` float16 [V, r],
    `projection` float32 [r, d + 1] or [r, V], `residual_mean` and `residual_variance` float32 [V], `tail_calibration`
    float32 [t, V]. A pure function of its arguments, on one kind of device.

    Args:
        k: the size of the head that is stored: tails are all else.
        chunk: targets whose logits exist at once.

    Raises:
        RefusedError: too few targets, logits that are not finite, or a rank that the teacher's logits do not have.
    """
    count = min(len(probe), MOST_TARGETS, max(2, 2 * rank, _KEPT // max(1, k)))
    used = torch.linspace(0, len(probe) - 1, count, dtype=F64).round().long().to(probe.device)
    if len(probe) < max(2, 2 * rank):
        raise RefusedError(
            "there are too few targets to make the dictionary of the store from",
            got=f"{len(probe):,} targets for rank {rank}",
            expected=f"at least {max(2, 2 * rank):,}, better eight times the rank",
            next="raise cache.encoding.probe_rows or lower cache.encoding.rank",
        )
    with torch.inference_mode():
        work = _Work(probe, used, k, tuple(temperatures), chunk or capture_chunk(probe.classes))
        return work.arrays(rank)


def check_rank(rank: int, width: int) -> None:
    """Refuse more components than logits have that are a linear function of a hidden state.

    Raises:
        RefusedError: there are.
    """
    if rank > width:
        raise RefusedError(
            "the rank is larger than the teacher's hidden state",
            got=f"rank {rank}, a hidden state of {width}",
            expected=f"at most {width}",
            next="lower cache.encoding.rank",
        )


class _Sum:
    """A sum over targets of something of each class, float64 [V]: of some of them in float32, which is faster."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._whole = torch.zeros(classes, dtype=F64, device=device)
        self._some, self._targets = torch.zeros(classes, device=device), 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows of x, float32 [m, V], each with its weight of [m], or 1."""
        self._some.addmv_(x.T, x.new_ones(len(x)) if weights is None else weights)
        self._targets += len(x)
        if self._targets >= _SUMMED:
            self._join()

    @property
    def found(self) -> Tensor:
        """So far."""
        self._join()
        return self._whole

    def _join(self) -> None:
        self._whole += self._some
        self._some.zero_()
        self._targets = 0


@dataclass(eq=False)
class _Work:
    probe: Probe
    used: Tensor
    """Numbers of the targets that passes are made on."""
    k: int
    temperatures: tuple[float, ...]
    chunk: int

    def arrays(self, rank: int) -> dict[str, Tensor]:
        """See `make_dictionary`."""
        m, weights = self._mean_and_weights()
        linear = isinstance(self.probe, HiddenProbe) and self.probe.head.linear
        if rank and linear:
            assert isinstance(self.probe, HiddenProbe)
            m, basis, projection = _eigenproblem(self.probe, weights, rank)
        elif rank:
            basis, projection = self._sketched(m, weights, rank)
        else:
            basis, projection = m.new_zeros(len(m), 0), m.new_zeros(0, 0)
        made = {"mean_logit": m.float(), "basis": basis.half(), "projection": projection.float()}
        if not rank:
            del made["basis"], made["projection"]
        if not all(bool(torch.isfinite(array).all()) for array in made.values()):
            raise RefusedError(
                "the teacher's logits cannot be described by as many components",
                got=f"rank {rank}, {len(self.probe):,} targets of {self.probe.classes:,} classes",
                expected="a rank that is smaller than what the logits of these targets have",
                next="lower cache.encoding.rank, or raise cache.encoding.probe_rows",
            )
        tails, described, true = self._tails(made)
        made |= tails
        if rank:
            made["tail_calibration"] = self._calibration(described, true)
        else:
            del made["residual_mean"], made["residual_variance"]
        return made

    # ---- passes over the logits

    def _sums(self, count: int) -> list[_Sum]:
        return [_Sum(self.probe.classes, self.probe.device) for _ in range(count)]

    def _passes(self) -> Iterator[Tensor]:
        """Blocks of raw logits of the targets in use, float32 [m, V]."""
        out = torch.empty(min(self.chunk, len(self.used)), self.probe.classes, device=self.probe.device)
        for part in parts(0, len(self.used), self.chunk):
            z = self.probe.logits(self.used[part], out)
            for rows in blocks(slice(0, len(z)), self.probe.classes, self.probe.device):
                yield z[rows]

    def _mean_and_weights(self) -> tuple[Tensor, Tensor]:
        """The mean of centred logits, and the mean probability over three temperatures, both float64 [V]."""
        total, weights = self._sums(2)
        for z in self._passes():
            total.add(z.sub_(z.mean(1, keepdim=True)))
            for _, x in exponentials(z, WEIGHTING):
                weights.add(x, x.sum(1).reciprocal_())
        if not torch.isfinite(total.found).all():
            raise RefusedError(
                "the teacher's logits are not finite",
                got="infinities or NaN among the targets that the store's dictionary is made from",
                expected="finite numbers",
                next="compute the teacher in float32 or bfloat16, and check its weights",
            )
        return total.found / len(self.used), weights.found / (len(WEIGHTING) * len(self.used)) + 1e-7

    def _tails(self, made: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[SparseTargets], Tensor]:
        """What is left over in tails, and their mean at each temperature; the targets as they are described; and the
        sum of p of each class over the targets in whose tails it is, float64 [t, V]."""
        dictionary = TailDictionary.of(made, self.temperatures, self.probe.device)
        mean, squares, *both = self._sums(2 + 2 * len(self.temperatures))
        priors, true = both[: len(self.temperatures)], both[len(self.temperatures) :]
        outside = torch.full_like(mean.found, len(self.used))
        described = []
        for z, one in self._described(dictionary):
            described.append(one)
            outside -= torch.bincount(one.ids.flatten(), minlength=len(outside))
            if one.coefficients.shape[1]:
                left = (z - one.logits(slice(0, len(z)))).scatter_(1, one.ids, 0.0)
                mean.add(left)
                squares.add(left.square_())
            for at, x in exponentials(z.scatter_(1, one.ids, NEVER), self.temperatures):
                within = x.sum(1).reciprocal_()
                priors[at].add(x, within)
                true[at].add(x, within * one.tail_mass(self.temperatures[at]))
        count = outside.clamp_min(1)
        means = mean.found / count
        prior = (torch.stack([one.found for one in priors]) / count).clamp_min(1e-12)
        found = {
            "residual_mean": means.float(),
            "residual_variance": (squares.found / count - means.square()).clamp_min(0).float(),
            "tail_prior": (prior / prior.sum(1, keepdim=True)).float(),
        }
        return found, described, torch.stack([one.found for one in true])

    def _calibration(self, described: Sequence[SparseTargets], true: Tensor) -> Tensor:
        """a_T of each class, so that its mean tail probability as decoded is the teacher's: [t, V].

        With w what the tail's logits are exponentiated to, that is exp(a_T) times the sum of tau w / (w . exp(a_T)).
        """
        logs = torch.zeros_like(true)
        smooth = _SMOOTHED * true.sum(1, keepdim=True) / self.probe.classes
        for _ in range(ROUNDS):
            ours, factors = self._sums(len(self.temperatures)), logs.exp().float()
            for one in described:
                tails = one.centred_tails(slice(0, len(one))).scatter_(1, one.ids, NEVER)
                for at, x in exponentials(tails, self.temperatures):
                    ours[at].add(x, one.tail_mass(self.temperatures[at]) / (x @ factors[at]))
            decoded = torch.stack([one.found for one in ours]) * factors
            logs += torch.nan_to_num(((true + smooth) / (decoded + smooth)).log())  # no mass in any tail: as it is
        return logs.float()

    def _described(self, dictionary: TailDictionary) -> Iterator[tuple[Tensor, SparseTargets]]:
        """Logits of blocks of targets, ours to change, and what is stored of them, with coefficients as rounded."""
        at = 0
        for z in self._passes():
            numbers = self.used[at : at + len(z)]
            at += len(z)
            linear = not _projects_logits(self.probe)
            projecting = None if linear else dictionary
            captured = capture_logits(z, projecting, k=self.k, temperatures=self.temperatures)
            c = captured.coefficients
            if linear and dictionary.projection is not None:
                assert isinstance(self.probe, HiddenProbe)
                c = projected(self.probe.h[numbers], dictionary)
            c = (c / COEFFICIENT_STEP).round().clamp(-128, 127) * COEFFICIENT_STEP
            yield z, dataclasses.replace(captured, coefficients=c).targets(self.temperatures, dictionary)

    def _sketched(self, m: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Basis [V, r] and projection [r, V] by a randomised range finder on weighted centred logits X sqrt(D)."""
        classes, count = self.probe.classes, len(self.used)
        columns, root = min(rank + _OVERSAMPLED, classes, count), weights.sqrt()
        signs = np.random.Generator(np.random.Philox(0)).integers(0, 2, (classes, columns), np.int8) * 2 - 1
        test = torch.from_numpy(signs).to(self.probe.device).float()
        for turn in range(_POWERS + 1):
            seen = [((x := self._weighted(z, m, root)) @ test) for z in self._passes()]
            range_, _ = torch.linalg.qr(torch.cat(seen).double())
            small, at = torch.zeros(columns, classes, dtype=F64, device=m.device), 0
            for z in self._passes():
                x = self._weighted(z, m, root)
                small += (range_[at : at + len(x)].T.float() @ x).double()
                at += len(x)
            if turn < _POWERS:
                test = torch.linalg.qr(small.T)[0].float()
        values, vectors = torch.linalg.eigh(small @ small.T)
        scale = values.flip(0)[:rank].clamp_min(0).sqrt()
        right = (vectors.flip(1)[:, :rank].T @ small) / scale[:, None]  # [r, V], orthonormal rows
        right *= _signs(right.T / root[:, None])[:, None]
        basis = (right * scale[:, None] / count**0.5 / root).T
        return basis, right * root * count**0.5 / scale[:, None]

    def _weighted(self, z: Tensor, m: Tensor, root: Tensor) -> Tensor:
        return (z - z.mean(1, keepdim=True) - m.float()).mul_(root.float())


def _projects_logits(probe: Probe) -> bool:
    """Whether coefficients are made of logits, as there is no linear head that would make them of hidden states."""
    return not (isinstance(probe, HiddenProbe) and probe.head.linear)


def _eigenproblem(probe: HiddenProbe, weights: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """m [V], U [V, r] and the projection [r, d + 1], in float64.

    With Sigma = L L' the covariance of h and K = W_c' D W_c, W_c the head less its mean row: L' K L = Q diag Q',
    U = W_c L Q_r, c = Q_r' L^-1 (h - mean h).
    """
    h, head = probe.h, probe.head
    width, device = h.shape[1], h.device
    check_rank(rank, width)
    mean, second = torch.zeros(width, dtype=F64, device=device), torch.zeros(width, width, dtype=F64, device=device)
    for part in parts(0, len(h), _ROWS):
        mean += h[part].double().sum(0) / len(h)
    for part in parts(0, len(h), _ROWS):
        off = h[part].double() - mean
        second.addmm_(off.T, off)
    covariance = second / len(h)
    jitter = 1e-9 * covariance.trace() / width
    L = torch.linalg.cholesky(covariance + jitter * torch.eye(width, dtype=F64, device=device))
    W, slices = head.weight, list(parts(0, probe.classes, _ROWS))
    row = sum((W[part].double().sum(0) for part in slices), torch.zeros_like(mean)) / probe.classes
    K = torch.zeros_like(second)
    for part in slices:
        off = W[part].double() - row
        K.addmm_(off.T * weights[part], off)
    inner = L.T @ K @ L
    _, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    Q = vectors.flip(1)[:, :rank]
    LQ = L @ Q
    basis = torch.cat([(W[part].double() - row) @ LQ for part in slices])
    m = torch.cat([(W[part].double() - row) @ mean for part in slices])
    if head.bias is not None:
        m += head.bias.double() - head.bias.double().mean()
    projection = torch.linalg.solve_triangular(L.T, Q, upper=True).T
    signs = _signs(basis)
    basis, projection = basis * signs, projection * signs[:, None]
    return m, basis, torch.cat([projection, -(projection @ mean)[:, None]], 1)


def _signs(columns: Tensor) -> Tensor:
    """What each column is multiplied by so that its largest entry is positive, [r]."""
    at = columns.abs().argmax(0, keepdim=True)
    return torch.where(columns.gather(0, at)[0] < 0, -1.0, 1.0).to(columns.dtype)
