"""Targets of a `top_k` store on a device: an exact head of k logits, and a tail that is decoded block by block.

In formulas z are the teacher's raw logits, a bar stands for the mean over all classes, H are the k stored ids, m and U
the mean and the basis of the store's dictionary, c a target's coefficients in that, and tau_T the mass of the tail: of
all classes but H. A tail of rank 0 is the dictionary's prior; otherwise its logits at T are

    min(z-bar + m + U c + rho + v / 2T, min z_H)

with rho and v the mean and the variance of what c leaves over; or, between the temperatures that the dictionary is
calibrated at, min(z-bar + m + U c, min z_H) and a factor exp(a_T) on what they are exponentiated to.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from akd_dist.base.errors import RefusedError
from akd_dist.distill.tail_curve import check_temperature, log_mass
from akd_dist.distill.teacher_targets import Distribution, Targets, Whole, row_dots

COEFFICIENT_STEP = 10 / 256
"""Of stored coefficients, in standard deviations."""
TAIL_STEP = 1 / 1024
"""Of the stored curve of the tail's log-mass."""
SHARED_BYTES = 256 * 2**20
"""Decoded probabilities that students of a cohort share, at most."""
NEVER = -1e30
"""A logit whose exponential is 0, and whose product with 0 is 0."""
_MADE = 64  # vectors over the vocabulary that a dictionary keeps, of temperatures that were asked for


class Encoding(Protocol):
    """What of a store's encoding says how its arrays are read."""

    @property
    def k(self) -> int:
        """Logits of the head."""

    @property
    def rank(self) -> int:
        """Coefficients."""

    @property
    def value_bits(self) -> int:
        """Bits of each gap: 4, 6, 8, or 16 for float16."""

    @property
    def tail_temperatures(self) -> Sequence[float]:
        """Where the curve of the tail is stored."""


@dataclass(frozen=True, eq=False)
class TailDictionary:
    """What all targets of a store share, as tensors on one device, float32 (float64 in tests)."""

    mean_logit: Tensor
    """m, [V]: the mean of z - z-bar."""
    basis: Tensor
    """U, [V, r]."""
    residual_mean: Tensor
    """rho, [V]."""
    residual_variance: Tensor
    """v, [V]."""
    temperatures: tuple[float, ...]
    """Of the rows of the next two."""
    tail_prior: Tensor
    """w_T, [t, V]: each row a distribution."""
    tail_calibration: Tensor
    """a_T, [t, V]; no rows where nothing was calibrated."""
    projection: Tensor | None = None
    """What makes coefficients: [r, d + 1] of hidden states with a 1 behind them, or [r, V] of z - z-bar - m."""
    _made: dict[tuple[str, float], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, Tensor],
        temperatures: Sequence[float],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "TailDictionary":
        """A dictionary of its stored arrays, by their names; those of rank 0 may be absent."""

        def tensor(name: str, *shape: int) -> Tensor:
            found = arrays.get(name)
            return torch.zeros(shape, dtype=dtype, device=device) if found is None else found.to(device, dtype)

        classes = len(arrays["mean_logit"])
        return cls(
            tensor("mean_logit", classes), tensor("basis", classes, 0), tensor("residual_mean", classes),
            tensor("residual_variance", classes), tuple(temperatures), tensor("tail_prior", 0, classes),
            tensor("tail_calibration", 0, classes), tensor("projection", 0, 0) if "projection" in arrays else None,
        )  # fmt: skip

    @functools.cached_property
    def spread(self) -> Tensor:
        """U', [r, V], laid out as products with coefficients read it fastest."""
        return self.basis.T.contiguous()

    def prior(self, temperature: float) -> Tensor:
        """w_T, [V]: see `_prior`; made once."""
        return self._once("prior", temperature, lambda: self._prior(temperature))

    def base(self, temperature: float) -> Tensor:
        """What all targets' tails have in common at T, [V]: (m + rho + v / 2T) / T, or m / T where it is calibrated."""
        return self._once("base", temperature, lambda: self._base(temperature))

    def calibration(self, temperature: float) -> Tensor | None:
        """a_T, [V]: interpolated linearly in 1 / T between calibrated temperatures; None outside of these."""
        if not self._calibrated_at(temperature):
            return None
        return self._once("calibration", temperature, lambda: self._calibration(temperature))

    def _once(self, what: str, temperature: float, make: Callable[[], Tensor]) -> Tensor:
        if (what, temperature) not in self._made:
            if len(self._made) >= _MADE:
                self._made.clear()
            self._made[what, temperature] = make()
        return self._made[what, temperature]

    def _base(self, temperature: float) -> Tensor:
        base = self.mean_logit / temperature
        if self._calibrated_at(temperature):
            return base
        return base + (self.residual_mean + self.residual_variance / (2 * temperature)) / temperature

    def _prior(self, temperature: float) -> Tensor:
        """Its logarithm interpolated linearly in 1 / T, towards a uniform one at 1 / T = 0."""
        if not len(self.tail_prior):
            raise RefusedError(
                "a tail without coefficients needs a prior, and this dictionary has none",
                next="cache with a rank of 1 or more, or make the dictionary anew",
            )
        logs = self.tail_prior.clamp_min(torch.finfo(torch.float32).tiny).log()
        nodes = [(1 / T, log) for T, log in zip(self.temperatures, logs, strict=True)]
        return torch.softmax(_between(1 / temperature, [(0.0, torch.zeros_like(logs[0])), *nodes]), dim=0)

    def _calibrated_at(self, temperature: float) -> bool:
        served = self.temperatures[: len(self.tail_calibration)]
        return bool(served) and min(served) - 1e-9 <= temperature <= max(served) + 1e-9

    def _calibration(self, temperature: float) -> Tensor:
        nodes = list(zip((1 / T for T in self.temperatures), self.tail_calibration, strict=True))
        return _between(1 / temperature, nodes)


@dataclass(frozen=True, eq=False)
class FromPrior(Distribution):
    """A head, and a prior scaled to the tail's mass elsewhere: O(k) a target besides two passes over the logits."""

    ids: Tensor
    head: Tensor
    """p on the ids, [m, k]."""
    tail: Tensor
    """tau over the prior's mass outside the ids, [m, 1]."""
    prior: Tensor
    """w, [V]."""
    negentropy: Tensor

    def dot(self, s: Tensor) -> Tensor:
        """sum over H of (p - tau' w) s, and tau' w . s."""
        return (self._beside * s.gather(1, self.ids)).sum(1) + self.tail[:, 0] * (s @ self.prior)

    def take_from(self, q: Tensor) -> None:
        """As `Distribution.take_from`."""
        q.addr_(self.tail[:, 0], self.prior, alpha=-1)
        q.scatter_(1, self.ids, q.gather(1, self.ids) - self._beside)

    @property
    def _beside(self) -> Tensor:
        return self.head - self.tail * self.prior[self.ids]


@dataclass(eq=False)
class SparseTargets(Targets):
    """n targets of a `top_k` store.

    Raises:
        RefusedError: by all that takes a temperature, where it is below the first one that is stored.
    """

    ids: Tensor
    """int64 [n, k], the class of the largest logit first."""
    values: Tensor
    """Their raw logits as stored, float [n, k]."""
    mean: Tensor
    """z-bar, float [n]."""
    tail: Tensor
    """L(1 / T) at each stored temperature, float [n, t]."""
    coefficients: Tensor
    """c, float [n, r]."""
    temperatures: tuple[float, ...]
    """Where `tail` is stored."""
    dictionary: TailDictionary
    _shared: dict[tuple[float, int, int], Whole] = field(default_factory=dict, init=False)
    _room: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.classes = len(self.dictionary.mean_logit)
        self.k = self.ids.shape[1]

    @property
    def choice(self) -> Tensor:  # type: ignore[override]
        """`ids[:, 0]`: decoded values may be tied where the teacher's were not."""
        return self.ids[:, 0]

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor], encoding: Encoding, dictionary: TailDictionary) -> "SparseTargets":
        """Targets of a store's arrays [n, ...], which lie on the dictionary's device: what is packed expands there."""
        dtype = dictionary.mean_logit.dtype
        ids, mean = unpacked_ids(arrays, encoding.k, len(dictionary.mean_logit)), arrays["mean"].to(dtype)
        if encoding.k:
            top = arrays["top"].to(dtype)
            gaps = unpacked_gaps(arrays.get("gaps"), top[:, 1:], encoding.k, encoding.value_bits)
            values = (mean + top[:, 0])[:, None] - gaps
        else:
            values = mean.new_zeros(len(mean), 0)
        found = arrays.get("coefficients")
        coefficients = mean.new_zeros(len(mean), 0) if found is None else found.to(dtype) * COEFFICIENT_STEP
        tail = arrays["tail"].to(dtype) * TAIL_STEP
        return cls(ids, values, mean, tail, coefficients, tuple(encoding.tail_temperatures), dictionary)

    # ---- what a temperature makes of them

    def head(self, temperature: float, rows: slice = slice(None)) -> Tensor:
        """p of the stored ids, float [m, k]: their softmax, times the mass that the tail leaves."""
        return torch.softmax(self.values[rows] / temperature, 1) * (1 - self.tail_mass(temperature, rows))[:, None]

    def tail_mass(self, temperature: float, rows: slice = slice(None)) -> Tensor:
        """tau_T, float [m]."""
        values = self.values[rows]
        if self.k in (0, self.classes):
            check_temperature(temperature, self.temperatures)
            return torch.full_like(self.mean[rows], float(self.k == 0))
        top = values[:, 0].double()
        rest = (self.classes * self.mean[rows].double() - values.double().sum(1)) / (self.classes - self.k)
        slope = torch.minimum(rest, values[:, -1].double()) - top  # a rounded mean may put the tail above the head
        mass = log_mass(temperature, self.temperatures, self.tail[rows], math.log(self.classes - self.k), slope)
        head = torch.logsumexp((values.double() - top[:, None]) / temperature, 1)
        return torch.sigmoid(mass - head).to(values.dtype)

    def tail_logits(self, temperature: float, rows: slice) -> Tensor:
        """Raw logits of the tail at T with the calibration in them, float [m, V]; what stands at the ids is no tail."""
        return self._tail_exponents(temperature, rows).mul_(temperature).add_(self.mean[rows, None])

    def distribution(self, temperature: float, rows: slice) -> Distribution:
        """As `Targets.distribution`: a sum of 1 by construction, whatever was rounded."""
        key = (temperature, rows.start, rows.stop)
        if (kept := self._shared.get(key)) is not None:
            return kept
        if self.coefficients.shape[1] == 0:
            return self._from_prior(temperature, rows)
        made = self._decoded(temperature, rows)
        if self._room >= made.p.nbytes:
            self._room -= made.p.nbytes
            self._shared[key] = made
        return made

    def logits(self, rows: slice) -> Tensor:
        """z-bar + m + U c, and the stored logits on the ids: not clamped, so linear in what is stored, as the squared
        error without a vocabulary takes them."""
        shared = self.dictionary
        z = torch.addmm(shared.mean_logit, self.coefficients[rows], shared.spread).add_(self.mean[rows, None])
        return z.scatter_(1, self.ids[rows], self.values[rows])

    @contextlib.contextmanager
    def shared(self, most_bytes: int = SHARED_BYTES) -> Iterator[None]:
        """Keep what is decoded, for students that ask for the same temperature one after another within this block.

        What was decoded first is kept until the bytes are spent, and all of it is dropped at the end of the block.
        """
        self._room = most_bytes
        try:
            yield
        finally:
            self._room = 0
            self._shared.clear()

    # ---- tails

    def centred_tails(self, rows: slice) -> Tensor:
        """min(m + U c, min z_H - z-bar) of all classes, [m, V]: what calibrated tails are exponentiated from."""
        return self._clamped(self.dictionary.mean_logit, 1.0, rows)

    def _tail_exponents(self, temperature: float, rows: slice) -> Tensor:
        """(z^ - z-bar) / T of all classes, with the calibration added behind the clamp: [m, V]."""
        calibration = self.dictionary.calibration(temperature)
        x = self._clamped(self.dictionary.base(temperature), temperature, rows)
        return x if calibration is None else x.add_(calibration)

    def _clamped(self, base: Tensor, temperature: float, rows: slice) -> Tensor:
        """base + U c / T, never above the smallest stored logit: [m, V]."""
        x = torch.addmm(base, self.coefficients[rows] / temperature, self.dictionary.spread)
        if self.k:
            smallest = (self.values[rows, -1:] - self.mean[rows, None]) / temperature
            torch.minimum(x, smallest, out=x)
        return x

    def _decoded(self, temperature: float, rows: slice) -> Whole:
        ids, tau, head = self.ids[rows], self.tail_mass(temperature, rows), self.head(temperature, rows)
        x = self._tail_exponents(temperature, rows).scatter_(1, ids, NEVER)
        p = torch.softmax(x, dim=1)
        # Of w = softmax(x): the sum of w log w is w . x less the log of the sum of exponentials.
        inner = row_dots(p, x) - (x.amax(1) - p.amax(1).log())
        negentropy = _xlogx(head).sum(1) + _xlogx(tau) + tau * inner
        return Whole(p.mul_(tau[:, None]).scatter_(1, ids, head), negentropy)

    def _from_prior(self, temperature: float, rows: slice) -> FromPrior:
        ids, tau, head = self.ids[rows], self.tail_mass(temperature, rows), self.head(temperature, rows)
        prior = self.dictionary.prior(temperature)
        at = prior[ids]
        rest = (1 - at.sum(1)).clamp_min(1e-12)
        inner = (_xlogx(prior).sum() - _xlogx(at).sum(1)) / rest - rest.log()
        negentropy = _xlogx(head).sum(1) + _xlogx(tau) + tau * inner
        return FromPrior(ids, head, (tau / rest)[:, None], prior, negentropy)


# ---- packed numbers


def unpacked_ids(arrays: Mapping[str, Tensor], k: int, classes: int) -> Tensor:
    """The ids, int64 [n, k]: 16 bits of each, and the higher ones where the vocabulary has more."""
    if k == 0:
        return torch.zeros(len(arrays["mean"]), 0, dtype=torch.int64, device=arrays["mean"].device)
    low = arrays["ids"].view(torch.int16).to(torch.int64) & 0xFFFF
    bits = max(0, (classes - 1).bit_length() - 16)
    return low if bits == 0 else low | unpacked(arrays["ids_high"], k, bits) << 16


def unpacked_gaps(gaps: Tensor | None, range_: Tensor, k: int, bits: int) -> Tensor:
    """z_1 - z_i of the head, [n, k].

    Args:
        gaps: uint8 [n, ceil((k - 1) bits / 8)], or float16 [n, k - 1]; None where k is 1.
        range_: z_1 - z_k, [n, 1].
    """
    first = torch.zeros_like(range_)
    if k == 1 or gaps is None:
        return first
    if bits == 16:
        return torch.cat([first, gaps.view(torch.float16).to(range_.dtype)], 1)
    return torch.cat([first, unpacked(gaps, k - 1, bits).to(range_.dtype) / (2**bits - 1) * range_], 1)


def unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    """Numbers of some bits each, packed from the low end of each row of bytes: uint8 [n, bytes] -> int64 [n, count]."""
    if bits == 8:
        return packed[:, :count].to(torch.int64)
    places = torch.arange(8, device=packed.device)
    each = (packed.to(torch.int64)[..., None] >> places) & 1
    each = each.flatten(1)[:, : count * bits].view(len(packed), count, bits)
    return (each << torch.arange(bits, device=packed.device)).sum(2)


def _xlogx(p: Tensor) -> Tensor:
    return torch.xlogy(p, p)


def _between(b: float, nodes: Sequence[tuple[float, Tensor]]) -> Tensor:
    """What stands at b between nodes, linearly; outside of all, at the nearest."""
    ordered = sorted(nodes, key=lambda node: node[0])
    b = min(max(b, ordered[0][0]), ordered[-1][0])
    for (low, at_low), (high, at_high) in itertools.pairwise(ordered):
        if low <= b < high:
            return torch.lerp(at_low, at_high, (b - low) / (high - low)) if b > low else at_low
    return ordered[-1][1]
