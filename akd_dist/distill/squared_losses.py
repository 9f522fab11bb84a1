"""Stage I's squared error through a linear head, without a vocabulary: no logit is made but of the stored ids.

The loss is quadratic in the logits s, and s = W h. With z^ = z-bar + m + U c, and what the stored logits differ by from
that, delta, on the ids H:

    || s - Phi z^ ||^2  =  h' W'W h  +  Phi^2 ||z^||^2
                           - 2 Phi [h . W'm + h' W'U c + h . sum_H delta_i W_i + z-bar V (h . w-bar)]

with w-bar the mean row of W; centred, V (h . w-bar)^2 comes off the first part, and (sum of z^) (h . w-bar) takes the
place of what z-bar adds. W'W, W'm and W'U cost what the head costs for d + r + 1 targets, once a call.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from akd_dist.base.errors import RefusedError
from akd_dist.distill.output_head import Head, parts
from akd_dist.distill.sparse import SparseTargets
from akd_dist.distill.sparse_losses import Hinged, Labels, Squared, check_rows, loss_of, scaled_once, shares_of
from akd_dist.distill.teacher_targets import Targets

_GATHERED_BYTES = 64 * 2**20  # of the head's rows at the stored ids of a slice of targets


@dataclass(frozen=True, eq=False)
class SquaredForm:
    """What the loss is besides its targets."""

    phi: float
    center: bool = True
    reduction: str = "mean"
    """Over classes: `mean` or `sum`."""
    margin: float | None = None
    """Of a hinge, max(0, loss - margin); None for none."""


def squared_loss(
    h: Tensor,
    head: Head,
    targets: Targets,
    phi: float,
    *,
    center: bool = True,
    reduction: str = "mean",
    margin: float | None = None,
    weights: Tensor | None = None,
    total: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Stage I's squared error as cheap as it can be had: without a vocabulary where head and targets allow it, else in
    chunks. Arguments as of `loss_of` and `Squared`."""
    if isinstance(targets, SparseTargets) and head.linear:
        form = SquaredForm(phi, center, reduction, margin)
        return squared_without_vocabulary(h, head, targets, form, weights=weights, total=total)
    term = Squared(targets, phi, center, reduction)
    hinged = term if margin is None else Hinged(term, margin)
    return loss_of(h, head, hinged, weights=weights, total=total, chunk=chunk)


def squared_without_vocabulary(
    h: Tensor,
    head: Head,
    targets: SparseTargets,
    form: SquaredForm,
    *,
    weights: Tensor | None = None,
    total: Tensor | float | None = None,
) -> Tensor:
    """The same number, and the same gradients, as the squared error in chunks; O(d^2 + d r + k d) a target.

    Computed in float32, float64 where h is. ||z^||^2 is that of the decoded logits, an estimate of the teacher's own:
    it moves the loss and no gradient.

    Raises:
        RefusedError: the head is not linear, or has fewer rows than there are classes.
    """
    if not head.linear:
        raise RefusedError(
            "the squared error without a vocabulary needs logits that are linear in the hidden state",
            got=f"a head whose logits are held within {head.softcap:g} by a tanh",
            expected="a linear output embedding, with or without a bias",
            next="use the squared error in chunks, or stage1_loss: cross_entropy",
        )
    check_rows(head, targets.classes)
    shares = shares_of(h, weights, total)
    gradients = torch.is_grad_enabled()
    given = (h, head.weight, head.bias, shares)
    found: Tensor = _WithoutVocabulary.apply(*given, targets, form, gradients)  # type: ignore[no-untyped-call]
    return found


def continuation_loss(
    h: Tensor,
    head: Head,
    targets: Targets,
    labels: Tensor,
    phi: float,
    psi: float,
    margin: float = 0.0,
    *,
    center: bool = True,
    reduction: str = "mean",
    weights: Tensor | None = None,
    total: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Continuation-KD in an epoch: psi CE(y, s) + (1 - psi) max(0, || s - Phi z ||^2 - m Phi) (arXiv 2212.05998).

    A part whose share is 0 is not computed.

    Args:
        labels: int64 [n]; -1 stands for none.
        margin: m.
    """
    batch: dict[str, Any] = {"weights": weights, "total": total, "chunk": chunk}
    found = h.new_zeros((), dtype=torch.promote_types(h.dtype, torch.float32))
    if psi:
        found = found + psi * loss_of(h, head, Labels(labels, targets.classes), **batch)
    if psi < 1:
        distance = squared_loss(h, head, targets, phi, center=center, reduction=reduction, margin=margin * phi, **batch)
        found = found + (1 - psi) * distance
    return found


class _WithoutVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, shares: Tensor,
        targets: SparseTargets, form: SquaredForm, gradients: bool,
    ) -> Tensor:  # fmt: skip
        """See `squared_without_vocabulary`."""
        wanted = gradients and any(one is not None and one.requires_grad for one in (h, weight, bias))
        with torch.autocast(h.device.type, enabled=False):
            dtype = torch.promote_types(h.dtype, torch.float32)
            computed = _Computed(h, weight, bias, shares, targets, form, dtype)
            if wanted:
                ctx.made = computed.gradients()
            return computed.loss()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `squared_without_vocabulary`."""
        return (*scaled_once(ctx, grad), None, None, None, None)


class _Computed:
    """Loss and gradients of one call, in the letters of the module's docstring. A bias is a column of W; h has a 1."""

    def __init__(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, shares: Tensor,
        targets: SparseTargets, form: SquaredForm, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.given, self.targets, self.form = (h, weight, bias), targets, form
        classes, shared = targets.classes, targets.dictionary
        W, h = weight[:classes].to(dtype), h.to(dtype)
        if bias is not None:
            W = torch.cat([W, bias[:classes, None].to(dtype)], 1)
            h = torch.cat([h, h.new_ones(len(h), 1)], 1)
        self.W, self.h, self.share = W, h, 1 / classes if form.reduction == "mean" else 1.0
        self.low_rank = torch.cat([shared.mean_logit[:, None], shared.basis], 1)  # [V, 1 + r]
        self.c = torch.cat([torch.ones_like(targets.mean)[:, None], targets.coefficients], 1)  # [n, 1 + r]
        at = self._low_rank_at()
        self.delta = targets.values - targets.mean[:, None] - at
        sums = self.c @ self.low_rank.sum(0) + self.delta.sum(1)  # of z^ less z-bar, over classes
        self.mean_factor = -sums if form.center else classes * targets.mean
        self.w_bar, self.hw = W.mean(0), h @ W.mean(0)
        self.gram = W.T @ W
        if form.center:
            self.gram.addr_(self.w_bar, self.w_bar, alpha=-classes)
        self.Gh = h @ self.gram
        # What s is multiplied by and summed, as a vector that h is: W' z^, less its mean where that is taken off.
        self.toward = self.c @ (self.low_rank.T @ W)
        self.toward += self._head_sums()
        self.toward.addr_(self.mean_factor, self.w_bar)
        each = (self.Gh * h).sum(1) - 2 * form.phi * (self.toward * h).sum(1) + form.phi**2 * self._norms(at, sums)
        self.each = each * self.share
        self.shares = shares.to(dtype)
        if form.margin is not None:
            over = self.each - form.margin
            self.each, self.shares = over.clamp_min(0), self.shares * (over > 0)

    def loss(self) -> Tensor:
        """The weighted sum."""
        return (self.each * self.shares).sum()

    def gradients(self) -> list[Tensor | None]:
        """In h, W and b, as these were given."""
        h, weight, bias = self.given
        ours, phi, classes = (self.shares * self.share)[:, None], self.form.phi, self.targets.classes
        dh = 2 * ours * (self.Gh - phi * self.toward)
        dW = torch.zeros(len(weight), self.W.shape[1], dtype=self.W.dtype, device=self.W.device)
        weighted = ours * self.h
        into = dW[:classes]
        torch.mm(self.W, 2 * (self.h.T @ weighted), out=into)
        into.addmm_(self.low_rank, self.c.T @ weighted, alpha=-2 * phi)
        # The same for all rows: what goes through the mean row.
        through_mean = -2 * phi * (self.mean_factor @ weighted) / classes
        if self.form.center:
            through_mean -= 2 * (self.hw @ weighted)
        into += through_mean
        self._spread(into, -2 * phi * weighted)
        db = None if bias is None else dW[:, -1].to(bias.dtype)
        width = weight.shape[1]
        return [dh[:, :width].to(h.dtype), dW[:, :width].to(weight.dtype), db]

    def _norms(self, at: Tensor, sums: Tensor) -> Tensor:
        """||z^||^2 of each target, centred if the loss is."""
        z_bar, classes = self.targets.mean, self.targets.classes
        rest = ((self.c @ (self.low_rank.T @ self.low_rank)) * self.c).sum(1)
        rest = rest + (self.delta * (2 * at + self.delta)).sum(1)
        if self.form.center:
            return rest - sums.square() / classes
        return rest + 2 * z_bar * sums + classes * z_bar.square()

    def _slices(self) -> list[slice]:
        size = max(1, _GATHERED_BYTES // (self.h.element_size() * self.h.shape[1] * max(1, self.targets.k)))
        return list(parts(0, len(self.h), size))

    def _low_rank_at(self) -> Tensor:
        """m + U c at the stored ids, [n, k]."""
        ids = self.targets.ids
        each = [torch.bmm(self.low_rank[ids[part]], self.c[part, :, None])[..., 0] for part in self._slices()]
        return torch.cat(each) if each else self.c.new_zeros(ids.shape)

    def _head_sums(self) -> Tensor:
        """sum_H delta_i W_i, [n, d]."""
        ids = self.targets.ids
        each = [torch.bmm(self.delta[part, None], self.W[ids[part]])[:, 0] for part in self._slices()]
        return torch.cat(each) if each else torch.zeros_like(self.h)

    def _spread(self, into: Tensor, rows: Tensor) -> None:
        """Add delta_i times a target's row to the row of each of its ids."""
        for part in self._slices():
            each = self.delta[part, :, None] * rows[part, None]
            into.index_add_(0, self.targets.ids[part].flatten(), each.flatten(0, 1))
