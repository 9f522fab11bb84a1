"""Losses through a head against dense autograd in float64: values to 1e-9, gradients to 1e-10."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from akd_dist.base.errors import RefusedError
from akd_dist.distill.losses import annealing_losses, softened_losses
from akd_dist.distill.output_head import Head, chunk_targets
from akd_dist.distill.sparse import SparseTargets, TailDictionary
from akd_dist.distill.sparse_losses import (
    Annealed,
    Labels,
    Mixed,
    Softened,
    Squared,
    Term,
    continuation,
    judged,
    judged_logits,
    loss_of,
    losses_of_logits,
)
from akd_dist.distill.squared_losses import SquaredForm, continuation_loss, squared_loss, squared_without_vocabulary
from akd_dist.distill.teacher_targets import DenseTargets, Targets
from tests.top_k_records import TEMPERATURES, decoded, exact_targets, random_dictionary

pytestmark = pytest.mark.usefixtures("one_thread")

N, V, D, K, R = 37, 3001, 16, 5, 3
F64 = torch.float64


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    """Random numbers in float64."""
    return torch.randn(*shape, dtype=F64)


def student(rows: int = V, *, bias: bool = False, softcap: float | None = None) -> tuple[Tensor, Head]:
    """Hidden states and a head, both wanting gradients."""
    h, weight = normal(N, D).requires_grad_(), normal(rows, D).requires_grad_()
    return h, Head(weight, normal(rows).requires_grad_() if bias else None, softcap)


def targets_of(kind: str, z: Tensor) -> Targets:
    """A teacher's logits as each kind of store has them, with nothing rounded."""
    if kind == "dense":
        return DenseTargets(z, F64)
    rank = 0 if kind == "prior" else R
    dictionary = random_dictionary(z.shape[1], rank, calibrated=kind == "calibrated")
    return exact_targets(z, K, dictionary, normal(len(z), rank))


def probabilities(targets: Targets, temperature: float) -> Tensor:
    """As the formulas have them, for all targets."""
    if isinstance(targets, DenseTargets):
        return torch.softmax(targets.stored / temperature, 1)
    assert isinstance(targets, SparseTargets)
    return decoded(targets, temperature, targets.tail_mass(temperature))


def full_logits(h: Tensor, head: Head, classes: int = V) -> Tensor:
    """Dense, through plain autograd."""
    s = h @ head.weight.T + (0 if head.bias is None else head.bias)
    return (s if head.softcap is None else head.softcap * torch.tanh(s / head.softcap))[:, :classes]


def kl(p: Tensor, s: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || softmax(s / T)) of each target."""
    return temperature**2 * (torch.xlogy(p, p) - p * functional.log_softmax(s / temperature, 1)).sum(1)


def check(mine: Tensor, dense: Tensor, h: Tensor, head: Head) -> None:
    """The same value and gradients."""
    wanting = [one for one in (h, head.weight, head.bias) if one is not None]
    got, want = torch.autograd.grad(mine, wanting), torch.autograd.grad(dense, wanting, retain_graph=True)
    assert abs(mine - dense).item() < 1e-9 * max(1, abs(dense.item()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
@pytest.mark.parametrize("kind", ["dense", "prior", "rank", "calibrated"])
def test_kd_is_dense_autograd(kind: str, temperature: float) -> None:
    """KD through a head with bias, with weights."""
    if kind == "prior" and temperature == 7:
        temperature = 4 / 3
    targets, weights, (h, head) = targets_of(kind, 3 * normal(N, V)), torch.rand(N, dtype=F64), student(bias=True)
    p = probabilities(targets, temperature)
    dense = (weights * kl(p, full_logits(h, head), temperature)).sum() / weights.sum()
    check(loss_of(h, head, Softened(targets, temperature), weights=weights, chunk=8), dense, h, head)


@pytest.mark.parametrize("phi", [0.25, 0.5, 1.0])
def test_annealed_cross_entropy_is_dense_autograd(phi: float) -> None:
    """The target is Phi z, the student has no temperature."""
    targets, (h, head) = targets_of("rank", 3 * normal(N, V)), student()
    p = probabilities(targets, 1 / phi)
    dense = -(p * functional.log_softmax(full_logits(h, head), 1)).sum(1).mean()
    check(loss_of(h, head, Annealed(targets, phi), chunk=10), dense, h, head)


def test_labels_through_padded_and_softcapped_heads() -> None:
    """Rows behind the classes count for nothing; no label costs nothing; a softcap is differentiated."""
    h, head = student(V + 7, bias=True, softcap=5.0)
    labels = torch.randint(0, V, (N,))
    labels[::5] = -1
    dense = functional.cross_entropy(full_logits(h, head), labels, ignore_index=-1, reduction="sum") / 20
    mine = loss_of(h, head, Labels(labels), total=20.0, classes=V, chunk=9)
    check(mine, dense, h, head)
    (slope,) = torch.autograd.grad(loss_of(h, head, Labels(labels), classes=V), head.weight)
    assert not slope[V:].any()


def test_a_head_with_fewer_rows_than_classes_is_refused() -> None:
    """With both numbers."""
    h, head = student(V - 1)
    targets = targets_of("rank", normal(N, V))
    for call in (
        lambda: loss_of(h, head, Softened(targets, 2.0)),
        lambda: squared_loss(h, head, targets, 1.0),
        lambda: judged(h, head, torch.zeros(N, dtype=torch.int64), targets),
    ):
        with pytest.raises(RefusedError, match=r"no logit for some classes[\s\S]*3,000[\s\S]*3,001"):
            call()


@pytest.mark.parametrize("phi", [0.25, 1.0])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["dense", "prior", "rank"])
def test_squared_error_is_dense_autograd(kind: str, center: bool, reduction: str, phi: float) -> None:
    """In chunks and without a vocabulary, with a bias and padding rows."""
    targets, weights, (h, head) = (
        targets_of(kind, 3 * normal(N, V)),
        torch.rand(N, dtype=F64),
        student(V + 3, bias=True),
    )
    e = full_logits(h, head) - phi * targets.logits(slice(0, N))
    e = e - e.mean(1, keepdim=True) if center else e
    each = e.square().mean(1) if reduction == "mean" else e.square().sum(1)
    dense = (weights * each).sum() / 11
    batch = {"weights": weights, "total": 11.0}
    term = Squared(targets, phi, center, reduction)
    check(loss_of(h, head, term, chunk=8, weights=weights, total=11.0), dense, h, head)
    check(squared_loss(h, head, targets, phi, center=center, reduction=reduction, **batch), dense, h, head)  # type: ignore[arg-type]


def test_squared_error_without_a_vocabulary_needs_a_linear_head() -> None:
    """It is refused with the reason; the chunked form takes the head."""
    targets, (h, head) = targets_of("rank", normal(N, V)), student(softcap=3.0)
    with pytest.raises(RefusedError, match=r"linear in the hidden state[\s\S]*within 3 by a tanh[\s\S]*in chunks"):
        squared_without_vocabulary(h, head, targets, SquaredForm(1.0))  # type: ignore[arg-type]
    e = full_logits(h, head) - targets.logits(slice(0, N))
    check(squared_loss(h, head, targets, 1.0), (e - e.mean(1, keepdim=True)).square().mean(), h, head)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_continuation_kd_is_dense_autograd(softcap: float | None) -> None:
    """The hinge cuts some targets and not others."""
    targets, (h, head) = targets_of("rank", 3 * normal(N, V)), student(softcap=softcap)
    labels = torch.randint(0, V, (N,))
    s, z, margin, phi = full_logits(h, head), targets.logits(slice(0, N)), 38.0, 0.5
    e = (s - s.mean(1, keepdim=True)) - phi * (z - z.mean(1, keepdim=True))
    distances = e.square().mean(1)
    assert 0 < (distances > margin * phi).sum() < N
    hinged = (distances - margin * phi).clamp_min(0)
    dense = 0.3 * functional.cross_entropy(s, labels) + 0.7 * hinged.mean()
    check(continuation_loss(h, head, targets, labels, phi, 0.3, margin), dense, h, head)
    check(loss_of(h, head, continuation(targets, labels, phi, 0.3, margin)), dense, h, head)


def by_micro_batches(count: int, loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients in h and W of one batch of 36 targets in that many micro-batches, of uneven weights."""
    torch.manual_seed(1)
    h, head = student()
    targets, weights = 3 * normal(36, V), torch.rand(36, dtype=F64)
    shared, coefficients = random_dictionary(V, R), normal(36, R)
    for part in torch.arange(36).chunk(count):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        stored = exact_targets(targets[rows], K, shared, coefficients[rows])
        loss(h[rows], head, stored, weights=weights[rows], total=weights.sum()).backward()  # type: ignore[no-untyped-call]
    assert h.grad is not None
    assert head.weight.grad is not None
    return h.grad, head.weight.grad


@pytest.mark.parametrize(
    "loss",
    [
        lambda h, head, stored, **batch: loss_of(h, head, Softened(stored, 2.0), **batch),
        lambda h, head, stored, **batch: squared_loss(h, head, stored, 0.5, **batch),
    ],
    ids=["kd", "squared"],
)
def test_accumulation_gives_the_same_gradient(loss: Callable[..., Tensor]) -> None:
    """Of 1, 2 and 4 micro-batches, by the weights of the whole batch."""
    whole = by_micro_batches(1, loss)
    for count in (2, 4):
        for a, b in zip(by_micro_batches(count, loss), whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_mixture_computes_logits_once_and_is_the_sum() -> None:
    """KD's: (1 - a) CE + a T^2 KL."""
    targets, (h, head) = targets_of("calibrated", 3 * normal(N, V)), student()
    labels = torch.randint(0, V, (N,))
    p, s = probabilities(targets, 2.0), full_logits(h, head)
    dense = 0.25 * functional.cross_entropy(s, labels) + 0.75 * kl(p, s, 2.0).mean()
    check(loss_of(h, head, Mixed(((0.25, Labels(labels)), (0.75, Softened(targets, 2.0)))), chunk=11), dense, h, head)


@pytest.mark.parametrize(
    ("term", "plain"),
    [
        (lambda t: Softened(t, 4.0), lambda s, z: softened_losses(s, z, 4.0)),
        (lambda t: Squared(t, 0.5, center=False), lambda s, z: annealing_losses(s, z, 0.5)),
        (lambda t: Squared(t, 0.5, False, "sum"), lambda s, z: annealing_losses(s, z, 0.5, "sum")),
    ],
    ids=["kd", "squared", "squared sum"],
)
def test_logits_of_a_classifier(term: Callable[[Targets], Term], plain: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Row losses and gradients are those of the losses for few classes; more rows than a block."""
    s, z, slope = normal(300, 2000).requires_grad_(), 3 * normal(300, 2000), torch.rand(300, dtype=F64)
    mine, dense = losses_of_logits(s, term(DenseTargets(z, F64))), plain(s, z)
    torch.testing.assert_close(mine, dense, atol=1e-9, rtol=1e-12)
    (a,), (b,) = torch.autograd.grad(mine @ slope, s), torch.autograd.grad(dense @ slope, s)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_classifiers_continuation_kd_from_a_sparse_store() -> None:
    """With logits that are there: psi CE + (1 - psi) hinge."""
    z, s = 3 * normal(N, V), normal(N, V).requires_grad_()
    targets, labels = targets_of("rank", z), torch.randint(0, V, (N,))
    distances = annealing_losses(s, targets.logits(slice(0, N)), 0.5)
    hinged = (distances - distances.detach().median()).clamp_min(0)
    dense = 0.3 * functional.cross_entropy(s, labels, reduction="none") + 0.7 * hinged
    margin = 2 * distances.detach().median().item()
    mine = losses_of_logits(s, continuation(targets, labels, 0.5, 0.3, margin, center=False))
    torch.testing.assert_close(mine, dense, atol=1e-9, rtol=1e-9)


def test_a_student_judged() -> None:
    """Cross-entropy, divergence and choice, through a head and of logits, are the dense ones."""
    targets, (h, head) = targets_of("rank", 3 * normal(N, V)), student(V + 2)
    labels = torch.randint(0, V, (N,))
    s = full_logits(h, head).detach()
    for found in (judged(h, head, labels, targets, chunk=7), judged_logits(s, labels, targets)):
        torch.testing.assert_close(found.cross_entropy, functional.cross_entropy(s, labels, reduction="none"))
        assert found.divergence is not None
        torch.testing.assert_close(found.divergence, kl(probabilities(targets, 1.0), s, 1.0), atol=1e-9, rtol=1e-9)
        assert torch.equal(found.choice, s.argmax(1))
    assert judged(h, head, labels, classes=V).divergence is None


def test_bfloat16_hidden_states() -> None:
    """Products in bfloat16, all else in float32: close to float32, gradients in the dtypes of what they are of."""
    z, (h, head) = 3 * normal(N, V), student(bias=True)
    assert head.bias is not None
    small = h.detach().bfloat16().requires_grad_()
    light = Head(head.weight.detach().float().requires_grad_(), head.bias.detach().float().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        mine = loss_of(small, light, Softened(DenseTargets(z.bfloat16()), 2.0), chunk=8)
    assert mine.dtype == torch.float32
    dh, dW = torch.autograd.grad(mine, (small, light.weight))
    assert (dh.dtype, dW.dtype) == (torch.bfloat16, torch.float32)
    want = torch.autograd.grad(loss_of(h, head, Softened(DenseTargets(z, F64), 2.0)), (h, head.weight))
    assert (dh.double() - want[0]).norm() < 0.02 * want[0].norm()
    assert (dW.double() - want[1]).norm() < 0.02 * want[1].norm()


def test_the_same_bits_each_time_and_the_chunk_in_them() -> None:
    """Deterministic in float32."""
    h, weight = torch.randn(64, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    term = Softened(DenseTargets(torch.randn(64, V)), 2.0)
    first, again = (torch.autograd.grad(loss_of(h, Head(weight), term, chunk=16), (h, weight)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_nothing_is_made_for_gradients_that_nobody_wants() -> None:
    """Without a gradient the loss is the same number."""
    targets, (h, head) = targets_of("rank", normal(N, V)), student()
    with torch.no_grad():
        alone = loss_of(h, head, Softened(targets, 2.0))
    assert not alone.requires_grad
    assert alone == loss_of(h, head, Softened(targets, 2.0))
    frozen = Head(head.weight.detach())
    (dh,) = torch.autograd.grad(loss_of(h, frozen, Softened(targets, 2.0)), h)
    torch.testing.assert_close(dh, torch.autograd.grad(loss_of(h, head, Softened(targets, 2.0)), h)[0])


def test_tiny_sizes() -> None:
    """One target, two classes, one coefficient; and no target at all."""
    z = normal(1, 2)
    targets = exact_targets(z, 1, random_dictionary(2, 1), normal(1, 1))
    h, head = normal(1, 1).requires_grad_(), Head(normal(2, 1).requires_grad_())
    s = h @ head.weight.T
    check(loss_of(h, head, Softened(targets, 1.0)), kl(torch.softmax(z, 1), s, 1.0).sum(), h, head)
    none = exact_targets(normal(0, V), K, random_dictionary(V, R), normal(0, R))
    h, head = student()
    for loss in (loss_of(h[:0], head, Softened(none, 2.0), total=5.0), squared_loss(h[:0], head, none, 1.0, total=5.0)):
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    assert chunk_targets(151_936) == 441


def most_alive(work: Callable[[], object]) -> int:
    """The most bytes of tensors that are made and alive at once in a piece of work, as torch's profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    alive = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


@pytest.mark.parametrize(("kind", "buffers"), [("labels", 1), ("kd", 1), ("squared", 1), ("without", 0)])
def test_one_chunk_of_logits_is_alive(kind: str, buffers: int) -> None:
    """Beside the gradients of head and hidden states, on the way forth and back."""
    n, classes, width, chunk = 1024, 20_000, 16, 256
    h, head = torch.randn(n, width, requires_grad=True), Head(torch.randn(classes, width, requires_grad=True))
    shared = random_dictionary(classes, 8, calibrated=True)
    tensors = {field.name: getattr(shared, field.name) for field in dataclasses.fields(shared)}
    single = TailDictionary.of({name: one for name, one in tensors.items() if isinstance(one, Tensor)}, TEMPERATURES)
    stored = SparseTargets(
        torch.arange(4).expand(n, 4), torch.rand(n, 4).sort(1, descending=True).values, torch.zeros(n),
        torch.zeros(n, 3), torch.randn(n, 8), TEMPERATURES, single,
    )  # fmt: skip

    def loss() -> Tensor:
        if kind == "without":
            return squared_loss(h, head, stored, 0.5)
        terms = {
            "labels": Labels(torch.zeros(n, dtype=torch.int64)),
            "kd": Softened(stored, 2.0),
            "squared": Squared(stored, 0.5),
        }
        return loss_of(h, head, terms[kind], chunk=chunk)

    gradients, buffer = 4 * width * (n + classes), 4 * chunk * classes
    most = most_alive(lambda: torch.autograd.grad(loss(), (h, head.weight)))
    small = 0.6 * buffer  # vectors over the classes, and blocks of a few rows
    assert most <= gradients + buffers * buffer + small
    if kind in ("labels", "kd"):
        assert most >= gradients + buffer


def test_gradients_are_taken_once() -> None:
    """They are scaled where they lie, so a second time is refused and not wrong."""
    h, head = student()
    loss = loss_of(h, head, Labels(torch.zeros(N, dtype=torch.int64)))
    torch.autograd.grad(loss, h, retain_graph=True)
    with pytest.raises(RuntimeError, match="taken before"):
        torch.autograd.grad(loss, h)
