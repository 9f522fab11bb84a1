"""Losses on targets of a large vocabulary, from hidden states and an output head: no logits exist beyond a chunk.

A `Term` is a loss of single targets with its gradient in their logits. `loss_of` takes one through a head, chunk by
chunk: a buffer turns from logits to gradient, block by block while they are in the cache, and is added into the
gradients of hidden states and head at once, so that nothing is computed again on the way back. `losses_of_logits` is
the same for a classifier whose logits are there.

In formulas s are the student's logits, z the teacher's, p_T and q_T the softmax of z / T and s / T, y the label.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from akd_dist.base.errors import RefusedError
from akd_dist.distill.output_head import Head, blocks, chunk_targets, parts
from akd_dist.distill.teacher_targets import Targets, row_dots, softmax_and_lse

# ---- losses of single targets


class Term(ABC):
    """A loss of single targets."""

    classes: int | None
    """How many logits it is about; None for as many as there are."""

    @abstractmethod
    def of(self, s: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The losses [m] of a block of targets, and their gradient in the logits, [m, classes].

        Args:
            s: float [m, classes]; left as it is.
            rows: which targets these are.
        """


@dataclass(frozen=True, eq=False)
class Softened(Term):
    """KD (Hinton et al., 2015): T^2 KL(p_T || q_T), whose gradient is T (q_T - p_T)."""

    targets: Targets
    temperature: float

    @property
    def classes(self) -> int:  # type: ignore[override]
        """Those of the targets."""
        return self.targets.classes

    def of(self, s: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `Term.of`."""
        p, T = self.targets.distribution(self.temperature, rows), self.temperature
        s = s / T if T != 1 else s
        q, lse = softmax_and_lse(s)
        losses = T * T * (p.negentropy + lse - p.dot(s))
        p.take_from(q)
        return losses, q.mul_(T)


@dataclass(frozen=True, eq=False)
class Annealed(Term):
    """Annealing-KD's idea with a softmax's own loss: cross-entropy of q_1 to softmax(Phi z), which is p at 1 / Phi."""

    targets: Targets
    phi: float

    @property
    def classes(self) -> int:  # type: ignore[override]
        """Those of the targets."""
        return self.targets.classes

    def of(self, s: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `Term.of`; the gradient is q_1 - p."""
        p = self.targets.distribution(1 / self.phi, rows)
        q, lse = softmax_and_lse(s)
        losses = lse - p.dot(s)
        p.take_from(q)
        return losses, q


@dataclass(frozen=True, eq=False)
class Labels(Term):
    """Cross-entropy to the labels; nothing where there is none."""

    labels: Tensor
    """int64 [n]; -1 stands for none."""
    classes: int | None = None

    def of(self, s: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `Term.of`; the gradient is q_1, less 1 at the label."""
        labels = self.labels[rows, None]
        at, there = labels.clamp_min(0), labels >= 0
        q, lse = softmax_and_lse(s)
        losses = (lse - s.gather(1, at)[:, 0]).where(there[:, 0], 0)
        q.scatter_(1, at, q.gather(1, at) - 1)
        return losses, q.mul_(there)


@dataclass(frozen=True, eq=False)
class Squared(Term):
    """Stage I of Annealing-KD: || s - Phi z ||^2, of centred logits or of raw ones.

    A language model's logits are mostly their mean, which no softmax sees; so they are centred.
    """

    targets: Targets
    phi: float
    center: bool = True
    """Whether each target's mean over classes is taken off both sides."""
    reduction: str = "mean"
    """Over classes: `mean` or `sum`."""

    @property
    def classes(self) -> int:  # type: ignore[override]
        """Those of the targets."""
        return self.targets.classes

    def of(self, s: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `Term.of`."""
        e = self.targets.logits(rows).mul_(-self.phi).add_(s)
        if self.center:
            e.sub_(e.mean(1, keepdim=True))
        share = 1 / s.shape[1] if self.reduction == "mean" else 1.0
        return row_dots(e, e).mul_(share), e.mul_(2 * share)


@dataclass(frozen=True, eq=False)
class Hinged(Term):
    """max(0, loss - margin): what Continuation-KD makes of the distance to annealed logits."""

    term: Term
    margin: float

    @property
    def classes(self) -> int | None:  # type: ignore[override]
        """Those of the term."""
        return self.term.classes

    def of(self, s: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `Term.of`."""
        losses, gradient = self.term.of(s, rows)
        over = losses - self.margin
        return over.clamp_min(0), gradient.mul_((over > 0)[:, None])


@dataclass(frozen=True, eq=False)
class Mixed(Term):
    """A sum of terms, each with its share: of labels and teacher, from one computation of the logits."""

    shares: tuple[tuple[float, Term], ...]

    @property
    def classes(self) -> int | None:  # type: ignore[override]
        """Those of the terms."""
        return next((term.classes for _, term in self.shares if term.classes is not None), None)

    def of(self, s: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """As `Term.of`; a share of 0 costs nothing."""
        used = [(share, term) for share, term in self.shares if share] or list(self.shares[:1])
        (share, term), *others = used
        losses, gradient = term.of(s, rows)
        losses, gradient = share * losses, gradient.mul_(share)
        for share, term in others:
            more, slope = term.of(s, rows)
            losses, gradient = losses + share * more, gradient.add_(slope, alpha=share)
        return losses, gradient


def continuation(
    targets: Targets, labels: Tensor, phi: float, psi: float, margin: float, *, center: bool = True
) -> Mixed:
    """Continuation-KD in an epoch: psi CE(y, s) + (1 - psi) max(0, || s - Phi z ||^2 - m Phi) (arXiv 2212.05998).

    Args:
        margin: m.
    """
    distance = Hinged(Squared(targets, phi, center), margin * phi)
    return Mixed(((psi, Labels(labels)), (1 - psi, distance)))


# ---- through a head


def loss_of(
    h: Tensor,
    head: Head,
    term: Term,
    *,
    weights: Tensor | None = None,
    total: Tensor | float | None = None,
    chunk: int | None = None,
    classes: int | None = None,
) -> Tensor:
    """The sum of weight times loss over targets, divided by the sum of the weights of the whole batch.

    Products are computed in the dtype of h, everything else in float32 (float64 where h is): logits, softmax, sums.
    At most a [chunk, classes] array of these exists, and blocks of it.

    Args:
        h: the student's hidden states at the targets, float [n, d].
        head: the student's; rows behind the classes of the targets are padding, and get no gradient.
        weights: of the targets, [n]; 1 by default.
        total: the sum of the weights over the global batch, that is over all ranks and micro-batches; by default over
            these targets.
        chunk: how many targets go through the head together. The gradient of the head is summed in the order of
            chunks, so its last bits depend on it. By default as many as `chunk_targets` says.
        classes: of the data, where the term does not tell.

    Returns:
        A number, float32 or float64.

    Raises:
        RefusedError: the head has fewer rows than there are classes.
    """
    classes = term.classes or classes or len(head.weight)
    check_rows(head, classes)
    shares = shares_of(h, weights, total)
    plan = _Plan(term, head.softcap, classes, chunk or chunk_targets(classes), torch.is_grad_enabled())
    found: Tensor = _ThroughHead.apply(h, head.weight, head.bias, shares, plan)  # type: ignore[no-untyped-call]
    return found


def shares_of(h: Tensor, weights: Tensor | None, total: Tensor | float | None) -> Tensor:
    """What each target of h counts in the loss of the global batch, float32 or float64 [n]: see `loss_of`."""
    like = torch.empty(0, dtype=_wide(h.dtype), device=h.device)
    own = like.new_ones(len(h)) if weights is None else weights.to(like)
    return own / (own.sum() if total is None else total)


def check_rows(head: Head, classes: int) -> None:
    """Refuse a head that has no logit for some class."""
    if len(head.weight) < classes:
        raise RefusedError(
            "the student has no logit for some classes of the data",
            got=f"an output embedding of {len(head.weight):,} rows",
            expected=f"at least {classes:,}, one for each id of the tokenizer",
            next="give the student's model a vocabulary of at least that size",
        )


@dataclass(frozen=True, eq=False)
class _Plan:
    term: Term
    softcap: float | None
    classes: int
    chunk: int
    gradients: bool


class _ThroughHead(torch.autograd.Function):
    """Gradients are made with the loss, and only scaled on the way back."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, shares: Tensor, plan: _Plan) -> Tensor:
        """See `loss_of`."""
        with torch.autocast(h.device.type, enabled=False):
            return _forward(ctx, h, weight, bias, shares, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `loss_of`."""
        return (*scaled_once(ctx, grad), None, None)


def scaled_once(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients that were made with a loss, `ctx.made`, times that of the loss.

    They are scaled where they lie, as a second array of the size of a head is much: so there is one way back.
    """
    made, ctx.made = ctx.made, None
    if made is None:
        raise RuntimeError("the gradients of this loss were taken before: compute the loss again")
    return [None if one is None else one.mul_(grad) for one in made]


def _forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, shares: Tensor, plan: _Plan) -> Tensor:
    wide = _wide(h.dtype)
    W = weight[: plan.classes].to(h.dtype)
    b = None if bias is None else bias[: plan.classes].to(wide)
    wanted = [plan.gradients and one is not None and one.requires_grad for one in (h, weight, bias)]
    dh = torch.empty_like(h) if wanted[0] else None
    dW = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if wanted[1] else None
    db = torch.zeros_like(bias) if wanted[2] and bias is not None else None
    total = torch.zeros((), dtype=wide, device=h.device)
    buffer = torch.empty(min(plan.chunk, len(h)), plan.classes, dtype=wide, device=h.device)
    for part in parts(0, len(h), plan.chunk):
        s = _product(h[part], W.T, buffer[: part.stop - part.start])
        for block in blocks(part, plan.classes, h.device):
            total = total + _turned(
                s[block.start - part.start : block.stop - part.start], block, b, shares[block], plan
            )
        if dh is not None:
            _product(s, W, dh[part])
        if dW is not None:
            _add_product(dW[: plan.classes], s, h[part])
        if db is not None:
            db[: plan.classes] += s.sum(0)
    ctx.made = [dh, None if dW is None else dW.to(weight.dtype), db]
    return total


def _turned(s: Tensor, rows: slice, bias: Tensor | None, shares: Tensor, plan: _Plan) -> Tensor:
    """The loss of a block, whose logits are replaced by its gradient in the products of h and W."""
    if bias is not None:
        s.add_(bias)
    if plan.softcap is not None:
        s.div_(plan.softcap).tanh_().mul_(plan.softcap)
    losses, gradient = plan.term.of(s, rows)
    if plan.softcap is not None:
        gradient.mul_(s.div_(plan.softcap).square_().neg_().add_(1))
    torch.mul(gradient, shares[:, None], out=s)
    return (losses * shares).sum()


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, computed in the dtype of the narrower one, a slice of rows at a time where dtypes differ."""
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    narrow = a.dtype if a.element_size() <= b.element_size() else b.dtype
    for part in parts(0, len(a), -(-len(a) // 8)):
        out[part] = a[part].to(narrow) @ b.to(narrow)
    return out


def _add_product(out: Tensor, s: Tensor, h: Tensor) -> None:
    """out += s' h, in the dtype of h, summed in that of out."""
    if out.dtype == s.dtype == h.dtype:
        out.addmm_(s.T, h)
        return
    for part in parts(0, len(h), -(-len(h) // 2)):
        out += s[part].to(h.dtype).T @ h[part]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- of logits that are there


def losses_of_logits(logits: Tensor, term: Term) -> Tensor:
    """The loss of each row of a classifier's logits, with a gradient.

    Besides the logits one array of their size exists, the gradient.

    Args:
        logits: float [n, columns]; columns behind the classes of the targets are padding.

    Returns:
        float32 or float64 [n].
    """
    found: Tensor = _OfLogits.apply(logits, term, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return found


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, term: Term, gradients: bool) -> Tensor:
        """See `losses_of_logits`."""
        classes, wide = term.classes or logits.shape[1], _wide(logits.dtype)
        wanted = gradients and logits.requires_grad
        gradient = torch.zeros_like(logits) if wanted else None
        losses = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in blocks(slice(0, len(logits)), classes, logits.device):
            losses[rows], slope = term.of(logits[rows, :classes].to(wide), rows)
            if gradient is not None:
                gradient[rows, :classes] = slope
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `losses_of_logits`."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None


# ---- a student judged


@dataclass(frozen=True, eq=False)
class Judged:
    """What a student says of n targets, one number each."""

    cross_entropy: Tensor
    """Of q_1 to the labels, nats; 0 where there is none."""
    divergence: Tensor | None
    """KL(p_1 || q_1) as the store knows p; None without targets."""
    choice: Tensor
    """The class of the largest logit, int64."""


def judged(
    h: Tensor,
    head: Head,
    labels: Tensor,
    targets: Targets | None = None,
    chunk: int | None = None,
    classes: int | None = None,
) -> Judged:
    """A student evaluated on targets, without a gradient and in the same chunks: see `loss_of`.

    Args:
        labels: int64 [n]; -1 stands for none.
    """
    classes = targets.classes if targets is not None else classes or len(head.weight)
    check_rows(head, classes)
    found: list[tuple[Tensor, Tensor | None, Tensor]] = []
    own, wide = head.cut(classes), _wide(h.dtype)
    with torch.no_grad():
        for part in parts(0, len(h), chunk or chunk_targets(classes)):
            s = own.logits(h[part])
            for rows in blocks(part, classes, h.device):
                mine = s[rows.start - part.start : rows.stop - part.start].to(wide)
                found.append(_judged(mine, labels[rows, None], targets, rows))
    entropies, divergences, choices = zip(*found, strict=True)
    return Judged(torch.cat(entropies), None if targets is None else torch.cat(divergences), torch.cat(choices))


def judged_logits(logits: Tensor, labels: Tensor, targets: Targets | None = None) -> Judged:
    """The same of a classifier's logits [n, classes]."""
    wide = _wide(logits.dtype)
    with torch.no_grad():
        found = [
            _judged(logits[rows].to(wide), labels[rows, None], targets, rows)
            for rows in blocks(slice(0, len(logits)), logits.shape[1], logits.device)
        ]
    entropies, divergences, choices = zip(*found, strict=True)
    return Judged(torch.cat(entropies), None if targets is None else torch.cat(divergences), torch.cat(choices))


def _judged(s: Tensor, labels: Tensor, targets: Targets | None, rows: slice) -> tuple[Tensor, Any, Tensor]:
    lse = torch.logsumexp(s, 1)
    entropy = (lse - s.gather(1, labels.clamp_min(0))[:, 0]).where(labels[:, 0] >= 0, 0)
    if targets is None:
        return entropy, None, s.argmax(1)
    p = targets.distribution(1.0, rows)
    return entropy, p.negentropy + lse - p.dot(s), s.argmax(1)
