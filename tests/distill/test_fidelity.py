"""Dictionaries of made teachers that are like language models, and the cards of what is stored with them."""

import dataclasses

import pytest
import torch
from torch import Tensor

from akd_dist.base.errors import RefusedError
from akd_dist.distill.capture import Captured, capture
from akd_dist.distill.dictionary import ComputedProbe, HiddenProbe, LogitProbe, make_dictionary
from akd_dist.distill.fidelity import Card, TopKOnly, measure_fidelity
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse import SparseTargets, TailDictionary
from akd_dist.distill.teacher_targets import DenseTargets, Targets
from tests.language_logits import made_teacher
from tests.top_k_records import TEMPERATURES, Packing, pack

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, K = 3000, 8


@pytest.fixture(scope="module")
def teacher() -> tuple[Tensor, Tensor, Head]:
    """Hidden states to make a dictionary from, others to measure on, and the head."""
    h, head = made_teacher(CLASSES, 32, 1400, spread=4.0)
    return h[:1000], h[1000:], head


def stored(teacher: tuple[Tensor, Tensor, Head], rank: int) -> SparseTargets:
    """The held-out targets as a store of k = 8 has them, rounding and all."""
    fit, held_out, head = teacher
    arrays = make_dictionary(HiddenProbe(fit, head, CLASSES), k=K, rank=rank, temperatures=TEMPERATURES)
    dictionary = TailDictionary.of(arrays, TEMPERATURES)
    captured = capture(held_out, head, dictionary, k=K, temperatures=TEMPERATURES, classes=CLASSES)
    packing = Packing(K, rank)
    return SparseTargets.of(pack(captured.targets(TEMPERATURES, dictionary), packing), packing, dictionary)


@pytest.fixture(scope="module")
def cards(teacher: tuple[Tensor, Tensor, Head]) -> dict[str, Card]:
    """Of encodings that differ."""
    _, held_out, head = teacher
    temperatures = (1.0, 2.0, 4.0)
    plain = capture(held_out, head, None, k=K, temperatures=temperatures, classes=CLASSES)
    calibrated = stored(teacher, 8)
    gaussian = dataclasses.replace(calibrated.dictionary, tail_calibration=torch.zeros(0, CLASSES))
    candidates: dict[str, Targets] = {
        "exact": DenseTargets(head.logits(held_out)),
        "float16": DenseTargets(head.logits(held_out).half()),
        "rank 8": calibrated,
        "rank 8, Gaussian": dataclasses.replace(calibrated, dictionary=gaussian),
        "rank 0": stored(teacher, 0),
        **{tail: TopKOnly(plain, temperatures, CLASSES, tail) for tail in ("none", "uniform", "ghost")},
    }
    return measure_fidelity(HiddenProbe(held_out, head, CLASSES), candidates, temperatures, head=head, chunk=150)


def test_an_exact_store_has_no_errors(cards: dict[str, Card]) -> None:
    """And float16 hardly any."""
    assert cards["exact"].agreement == 1
    assert cards["exact"].unexplained < 1e-10
    for name, most in (("exact", 1e-6), ("float16", 2e-3)):
        for one in cards[name].at:
            assert abs(one.kl) < most
            assert one.total_variation < most
            assert max(one.unigram_error, one.other_error, one.unigram_hidden_error or 0) < most


def test_tails_in_the_order_of_what_they_know(cards: dict[str, Card]) -> None:
    """Renormalised heads are worst and infinitely far; coefficients beat a prior, and calibration beats none."""
    for at, T in enumerate((1.0, 2.0, 4.0)):
        kl = {name: card.at[at].kl for name, card in cards.items()}
        assert kl["none"] == float("inf")
        assert kl["rank 8"] < kl["rank 0"] < kl["uniform"], T
        if T < 4:
            assert kl["rank 8"] < kl["rank 8, Gaussian"]
        assert cards["none"].at[at].unigram_error > 2 * cards["rank 8"].at[at].unigram_error
    assert cards["rank 8"].agreement == cards["ghost"].agreement == 1
    assert cards["rank 8"].unexplained < 0.5 < 0.9 < cards["none"].unexplained


def test_the_numbers_of_a_card(teacher: tuple[Tensor, Tensor, Head], cards: dict[str, Card]) -> None:
    """Against the whole arrays in float64."""
    _, held_out, head = teacher
    z, targets = head.logits(held_out), stored(teacher, 8)
    p, p_hat = torch.softmax(z.double() / 2, 1), targets.probabilities(2.0, slice(None)).double()
    other = p.roll(len(p) // 2, 0)
    found = cards["rank 8"].at[1]
    assert found.kl == pytest.approx((p * (p.log() - p_hat.log())).sum(1).mean().item(), rel=1e-4)
    assert found.total_variation == pytest.approx((p - p_hat).abs().sum(1).mean().item() / 2, rel=1e-4)
    for q, error, behind in (
        (p.mean(0), found.unigram_error, found.unigram_hidden_error),
        (other, found.other_error, found.other_hidden_error),
    ):
        assert error == pytest.approx(((p - p_hat).norm() / (q - p).norm()).item(), rel=1e-4)
        W = head.weight.double()
        assert behind == pytest.approx((((p - p_hat) @ W).norm() / ((q - p) @ W).norm()).item(), rel=1e-3)
    mass = [each.scatter(1, targets.ids, 0).sum(1) for each in (p, p_hat)]
    assert found.mass_error == pytest.approx((mass[0] - mass[1]).abs().mean().item(), abs=1e-6)
    assert cards["ghost"].at[1].mass_error is None


def test_a_card_does_not_depend_on_the_chunk_and_says_how_far_it_is(teacher: tuple[Tensor, Tensor, Head]) -> None:
    _, held_out, head = teacher
    probe, told = HiddenProbe(held_out, head, CLASSES), list[int]()
    exact: dict[str, Targets] = {name: DenseTargets(head.logits(held_out).half()) for name in ("one", "two")}
    whole = measure_fidelity(probe, exact, (1.0, 2.0), head=head, done=told.append)["one"].at[1]
    parts = measure_fidelity(probe, exact, (1.0, 2.0), head=head, chunk=90)["two"].at[1]
    assert sum(told) == 2 * 2 * len(held_out)
    assert parts.other_hidden_error == pytest.approx(whole.other_hidden_error, rel=1e-3)
    assert parts.total_variation == pytest.approx(whole.total_variation, rel=1e-3)


def test_a_calibrated_tail_has_the_teachers_mean(teacher: tuple[Tensor, Tensor, Head]) -> None:
    """On the targets that it was fitted on, class by class where there is mass."""
    fit, _, head = teacher
    arrays = make_dictionary(HiddenProbe(fit, head, CLASSES), k=K, rank=4, temperatures=TEMPERATURES)
    dictionary = TailDictionary.of(arrays, TEMPERATURES)
    captured: Captured = capture(fit, head, dictionary, k=K, temperatures=TEMPERATURES, classes=CLASSES)
    for T in TEMPERATURES:
        true = torch.softmax(head.logits(fit) / T, 1).scatter_(1, captured.ids, 0).mean(0)
        errors = []
        for shared in (dictionary, dataclasses.replace(dictionary, tail_calibration=torch.zeros(0, CLASSES))):
            p = captured.targets(TEMPERATURES, shared).probabilities(T, slice(None)).clone()
            errors.append((p.scatter_(1, captured.ids, 0).mean(0) - true).abs().sum().item() / true.sum().item())
        assert errors[0] < 0.08
        assert errors[0] < errors[1] / 2


def test_signs_scale_and_bits_of_a_dictionary(teacher: tuple[Tensor, Tensor, Head]) -> None:
    """The largest entry of each column is positive, and a second making gives the same bits."""
    fit, _, head = teacher
    for probe in (HiddenProbe(fit, head, CLASSES), LogitProbe(head.logits(fit))):
        made, again = (make_dictionary(probe, k=K, rank=5, temperatures=TEMPERATURES, chunk=256) for _ in range(2))
        assert all(torch.equal(made[name], again[name]) for name in made)
        basis = made["basis"].float()
        assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
        torch.testing.assert_close(made["tail_prior"].sum(1), torch.ones(3))
        assert made["residual_variance"].min() >= 0


def test_the_sketch_finds_what_the_eigenproblem_finds(teacher: tuple[Tensor, Tensor, Head]) -> None:
    """The same leading components, up to the jitter of a covariance."""
    fit, _, head = teacher
    hidden = make_dictionary(HiddenProbe(fit, head, CLASSES), k=K, rank=4, temperatures=TEMPERATURES)
    logits = make_dictionary(LogitProbe(head.logits(fit)), k=K, rank=4, temperatures=TEMPERATURES)
    a, b = hidden["basis"].float(), logits["basis"].float()
    assert ((a - b).norm(dim=0) / a.norm(dim=0)).max().item() < 0.02
    torch.testing.assert_close(hidden["mean_logit"], logits["mean_logit"], atol=1e-3, rtol=1e-3)


def test_logits_may_be_computed_anew(teacher: tuple[Tensor, Tensor, Head]) -> None:
    """A slice at a time, to the same dictionary."""
    z, most = teacher[2].logits(teacher[0][:300]), []

    def compute(rows: Tensor, out: Tensor) -> Tensor:
        most.append(len(rows))
        return out[: len(rows)].copy_(z[rows])

    probe = ComputedProbe(compute, 300, CLASSES, z.device)
    made, again = (
        make_dictionary(one, k=K, rank=3, temperatures=TEMPERATURES, chunk=64) for one in (probe, LogitProbe(z))
    )
    assert max(most) == 64
    assert all(torch.equal(made[name], again[name]) for name in again)


def test_bad_input(teacher: tuple[Tensor, Tensor, Head]) -> None:
    """Too few targets, too high a rank, numbers that are not finite."""
    fit, _, head = teacher
    with pytest.raises(RefusedError, match=r"7 targets for rank 4[\s\S]*probe_rows"):
        make_dictionary(HiddenProbe(fit[:7], head, CLASSES), k=K, rank=4, temperatures=TEMPERATURES)
    with pytest.raises(RefusedError, match=r"rank 33, a hidden state of 32"):
        make_dictionary(HiddenProbe(fit, head, CLASSES), k=K, rank=33, temperatures=TEMPERATURES)
    bad = fit.clone()
    bad[3] = torch.nan
    with pytest.raises(RefusedError, match="not finite"):
        make_dictionary(HiddenProbe(bad, head, CLASSES), k=K, rank=4, temperatures=TEMPERATURES)
    flat = LogitProbe(torch.zeros(100, 50))
    with pytest.raises(RefusedError, match="rank 4, 100 targets of 50 classes"):
        make_dictionary(flat, k=2, rank=4, temperatures=TEMPERATURES)
