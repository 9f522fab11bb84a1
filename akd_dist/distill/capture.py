"""The teacher's side of a `top_k` store: from hidden states or logits to the numbers that are stored of a target.

Logits exist for a chunk of targets, and several passes are made over a block of these while it is in the cache: the
means of groups of classes for the head, the mean, and one exponential that serves every stored temperature.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from akd_dist.base.errors import RefusedError
from akd_dist.distill.output_head import Head, blocks, chunk_targets, parts
from akd_dist.distill.sparse import NEVER, SparseTargets, TailDictionary
from akd_dist.distill.tail_curve import LOWEST

_GROUP = 64  # classes of which the largest logit is looked for before the largest of all
_LARGEST_POWER = 12  # of one exponential, for temperatures that are base / 1, base / 2, ...


@dataclass(frozen=True, eq=False)
class Captured:
    """What is stored of n targets, before it is rounded: tensors on the device, fields as of `Described`."""

    ids: Tensor
    """int64 [n, k]: the classes of the largest logits, largest first, ties by the smaller id."""
    values: Tensor
    """float32 [n, k]: their raw logits."""
    mean: Tensor
    """float32 [n]: over all classes."""
    tail: Tensor
    """float32 [n, t]: the log of the sum of exp((z - max z) / T) over all other classes, at least `LOWEST`."""
    coefficients: Tensor
    """float32 [n, r], in standard deviations."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name, in NumPy on the host, as a store's encoding packs them."""
        return {one.name: getattr(self, one.name).cpu().numpy() for one in fields(self)}

    def targets(self, temperatures: Sequence[float], dictionary: TailDictionary) -> SparseTargets:
        """The same as targets of losses, with nothing rounded."""
        return SparseTargets(
            self.ids, self.values, self.mean, self.tail, self.coefficients, tuple(temperatures), dictionary
        )


def _numbered(target: int) -> str:
    return f"target {target}"


def capture(
    h: Tensor,
    head: Head,
    dictionary: TailDictionary | None,
    *,
    k: int,
    temperatures: Sequence[float],
    classes: int,
    chunk: int | None = None,
    named: Callable[[int], str] = _numbered,
    out: Tensor | None = None,
) -> Captured:
    """What is stored of targets, from the teacher's hidden states at them.

    Every chunk has the same number of targets, the last one padded with copies of its first: kernels choose their order
    of summation by the shape, so the bits of a target depend on itself and the chunk alone.

    Args:
        h: float [n, d], in the dtype that the teacher computes in; logits are computed in it, and all else in float32.
        head: the teacher's; rows behind the classes are padding, and are cut off before anything is made of them.
        dictionary: None, or one of rank 0, for no coefficients.
        temperatures: where the curve of the tail is stored.
        chunk: how many targets go through the head together; by default `capture_chunk`.
        named: how a message calls a target, by its number in h.
        out: memory for the logits of a chunk, as of `Head.logits`.

    Raises:
        RefusedError: logits that are not finite, with the first such target; k > classes; a head of fewer rows.
    """
    _check(k, classes, len(head.weight))
    head, size = head.cut(classes), chunk or capture_chunk(classes)
    found = []
    with torch.inference_mode():
        out = h.new_empty(size, classes) if out is None else out
        for part in parts(0, len(h), size):
            given = h[part]
            padding = given[:1].expand(size - len(given), -1)
            z = head.logits(torch.cat([given, padding]) if len(padding) else given, out)[: len(given)]
            coefficients = projected(given, dictionary) if head.linear else None
            for rows in blocks(slice(0, len(given)), classes, h.device):
                own = None if coefficients is None else coefficients[rows]
                found.append(_described(z[rows].float(), k, temperatures, dictionary, own))
    return _checked(_joined(found, k, len(temperatures), h.device), named)


def capture_logits(
    logits: Tensor,
    dictionary: TailDictionary | None,
    *,
    k: int,
    temperatures: Sequence[float],
    classes: int | None = None,
    named: Callable[[int], str] = _numbered,
) -> Captured:
    """The same from logits [n, columns] of any float dtype, a chunk at a time: of heads that are not linear, and of
    classifiers; coefficients as the dictionary's projection [r, V] has them."""
    classes = classes or logits.shape[1]
    _check(k, classes, logits.shape[1])
    with torch.inference_mode():
        found = [
            _described(logits[rows, :classes].float(), k, temperatures, dictionary, None)
            for rows in blocks(slice(0, len(logits)), classes, logits.device)
        ]
    return _checked(_joined(found, k, len(temperatures), logits.device), named)


def capture_chunk(classes: int) -> int:
    """Targets that go through a teacher's head together, by default: at most a quarter of what losses take, and a power
    of two, as the number of targets of a batch mostly is."""
    return 1 << (max(4, chunk_targets(classes)).bit_length() - 3)


# ---- of a block of logits


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values [m, k] and ids int64 of the k largest of each row, largest first and ties by the smaller id.

    The k groups of neighbours with the largest maxima, ties by place, hold them: so few are compared one by one. Values
    and places are compared as one whole number, which has no ties, so that every device finds the same.

    Args:
        z: float32 [m, V], finite.
    """
    classes = z.shape[1]
    if k * _GROUP >= classes:
        ids = _first(z, torch.arange(classes, device=z.device), k)
        return z.gather(1, ids), ids
    whole = classes // _GROUP
    tops = z[:, : whole * _GROUP].view(len(z), whole, _GROUP).amax(2)
    if classes % _GROUP:
        tops = torch.cat([tops, z[:, whole * _GROUP :].amax(1, keepdim=True)], 1)
    groups = _first(tops, torch.arange(tops.shape[1], device=z.device), k)
    ids = (groups[:, :, None] * _GROUP + torch.arange(_GROUP, device=z.device)).flatten(1)
    values = z.gather(1, ids.clamp_max(classes - 1)).masked_fill_(ids >= classes, -math.inf)
    ids = _first(values, ids, k)
    return z.gather(1, ids), ids


def _first(values: Tensor, places: Tensor, k: int) -> Tensor:
    """The places of the k largest values of each row, ties by the smaller place: int64 [m, k]."""
    bits = (values + 0.0).view(torch.int32)  # a negative zero becomes a positive one, as both are equal
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = 0xFFFFFFFF
    keys = (ordered << 32) | (last - places)
    return last - (torch.topk(keys, k, dim=1).values & last)


def log_masses(z: Tensor, top: Tensor, temperatures: Sequence[float]) -> Tensor:
    """log of the sum of exp((z - top) / T) of each row at each temperature, [m, t].

    Args:
        z: float32 [m, V]; what is no part of the sum is `NEVER`.
        top: [m].
    """
    below, found = z.amax(1) - top, z.new_zeros(len(z), len(temperatures))
    for at, x in exponentials(z, temperatures):
        found[:, at] = x.sum(1).log() + below / temperatures[at]
    return found


def exponentials(z: Tensor, temperatures: Sequence[float]) -> Iterator[tuple[int, Tensor]]:
    """x = exp((z - max z) / T) of each row, [m, V], at each temperature by its number; those to come need it unchanged.

    With x = exp(z / base), those at temperatures base / n are x^n: one exponential serves all that are so related, as
    1, 4/3, 2 and 4 are, or tau_max / 1, tau_max / 2, ...; others take one each.

    Args:
        z: float32 [m, V]; what has no part in any is `NEVER`.
    """
    base = _common_base(temperatures)
    if base is None:
        yield from ((at, _exponential(z, T)) for at, T in enumerate(temperatures))
        return
    powers = [round(base / T) for T in temperatures]
    x = power = _exponential(z, base)
    for n in range(1, max(powers, default=0) + 1):
        power = x if n == 1 else power * x
        yield from ((at, power) for at, one in enumerate(powers) if one == n)


def _exponential(z: Tensor, temperature: float) -> Tensor:
    x = torch.softmax(z / temperature, dim=1)
    return x.div_(x.amax(1, keepdim=True))  # so that no power of it is lost below what floats can hold


def _common_base(temperatures: Sequence[float]) -> int | None:
    """The smallest whole number of which all temperatures are whole fractions, to half a step of what is stored."""

    def whole(base: int, temperature: float) -> bool:
        return base / temperature > 0.5 and math.isclose(round(base / temperature) * temperature, base, rel_tol=5e-5)

    return next((n for n in range(1, _LARGEST_POWER + 1) if all(whole(n, T) for T in temperatures)), None)


def _described(
    z: Tensor, k: int, temperatures: Sequence[float], dictionary: TailDictionary | None, coefficients: Tensor | None
) -> Captured:
    """What is stored of the targets of a block of logits, float32 [m, V], which are left as they are."""
    mean = z.mean(1)
    if coefficients is None:
        coefficients = _from_logits(z, mean, dictionary)
    # Numbers that are not finite are found later: here they must only do no harm.
    values, ids = largest(z, k)
    if k == z.shape[1]:
        tail = z.new_full((len(z), len(temperatures)), LOWEST)
    else:
        top = values[:, 0] if k else z.amax(1)
        tail = log_masses(z.scatter(1, ids, NEVER), top, temperatures).clamp_min_(LOWEST)
    return Captured(ids, values, mean, tail, coefficients)


def projected(h: Tensor, dictionary: TailDictionary | None) -> Tensor:
    """Coefficients [n, r] by a projection of hidden states; none without a dictionary."""
    if dictionary is None or dictionary.projection is None or not len(dictionary.projection):
        return torch.zeros(len(h), 0, device=h.device)
    projection = dictionary.projection
    return torch.addmm(projection[:, -1], h.to(projection.dtype), projection[:, :-1].T)


def _from_logits(z: Tensor, mean: Tensor, dictionary: TailDictionary | None) -> Tensor:
    """Coefficients [m, r] by a projection of logits; none without a dictionary."""
    if dictionary is None or dictionary.projection is None or not len(dictionary.projection):
        return z.new_zeros(len(z), 0)
    centred = z - mean[:, None] - dictionary.mean_logit
    return centred @ dictionary.projection.T


def _joined(found: Sequence[Captured], k: int, nodes: int, device: torch.device) -> Captured:
    if not found:
        empty = torch.zeros(0, device=device)
        return Captured(empty.long().view(0, k), empty.view(0, k), empty, empty.view(0, nodes), empty.view(0, 0))
    return Captured(*(torch.cat([getattr(one, each.name) for one in found]) for each in fields(Captured)))


def _check(k: int, classes: int, rows: int) -> None:
    if k > classes:
        raise RefusedError(
            "more logits of each target would be stored than there are",
            got=f"k = {k:,}, {classes:,} classes",
            expected="k of at most the number of classes",
            next="lower cache.encoding.k",
        )
    if rows < classes:
        raise RefusedError(
            "the teacher has no logit for some classes of the data",
            got=f"{rows:,} logits a target",
            expected=f"at least {classes:,}",
            next="check that teacher and tokenizer belong together",
        )


def _checked(captured: Captured, named: Callable[[int], str]) -> Captured:
    """Refuse logits that are not finite: their mean is not, wherever one of them stands."""
    wrong = ~torch.isfinite(captured.mean)
    if wrong.any():
        first = int(wrong.nonzero()[0, 0])
        raise RefusedError(
            "the teacher's logits are not finite",
            got=f"{named(first)}, and {int(wrong.sum()) - 1:,} more of {len(wrong):,} targets",
            expected="finite numbers",
            next="compute the teacher in float32 or bfloat16, and check its weights",
        )
    return captured
