"""Targets of a `top_k` store: unpacked number by number, decoded against the formulas in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from akd_dist.base.errors import RefusedError
from akd_dist.distill.capture import capture, capture_logits
from akd_dist.distill.dictionary import HiddenProbe, LogitProbe, make_dictionary
from akd_dist.distill.sparse import SparseTargets, TailDictionary, unpacked
from akd_dist.distill.teacher_targets import Whole
from tests.language_logits import made_teacher
from tests.top_k_records import TEMPERATURES, Packing, decoded, exact_targets, pack, pack_bits, random_dictionary

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
ALL = slice(None)


def some(classes: int, packing: Packing, n: int = 11, seed: int = 0) -> SparseTargets:
    """Random targets before rounding, ids over the whole vocabulary."""
    torch.manual_seed(seed)
    z = 3 * torch.randn(n, classes, dtype=F64) + 7
    dictionary = random_dictionary(classes, packing.rank)
    return exact_targets(z, packing.k, dictionary, torch.randn(n, packing.rank, dtype=F64))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_packed_numbers(bits: int) -> None:
    """Against one big integer a row."""
    for count in (1, 5, 8, 17):
        numbers = np.random.default_rng(bits).integers(0, 2**bits, (6, count))
        assert np.array_equal(unpacked(torch.from_numpy(pack_bits(numbers, bits)), count, bits).numpy(), numbers)


@pytest.mark.parametrize("value_bits", [4, 6, 8, 16])
@pytest.mark.parametrize("classes", [300, 65_536, 65_537, 131_073])
def test_arrays_of_a_store_are_read_back(classes: int, value_bits: int) -> None:
    """Ids to the bit, with their high bits where the vocabulary needs them; values within half a step."""
    packing = Packing(k=7, rank=3, value_bits=value_bits)
    targets = some(classes, packing, n=4)
    arrays = pack(targets, packing)
    assert ("ids_high" in arrays) == (classes > 65_536)
    found = SparseTargets.of(arrays, packing, targets.dictionary)
    assert torch.equal(found.ids, targets.ids)
    width = (targets.values[:, :1] - targets.values[:, -1:]) / (2 ** min(value_bits, 8) - 1)
    assert ((found.values - targets.values).abs() <= width / 2 + 2e-2).all()
    assert torch.equal(found.mean, arrays["mean"].double())
    assert ((found.tail - targets.tail).abs() <= 0.5 / 1024 + 1e-9).all()
    inside = targets.coefficients.abs() < 4.9
    assert ((found.coefficients - targets.coefficients).abs()[inside] <= 5 / 256 + 1e-6).all()


@pytest.mark.parametrize(("k", "rank"), [(1, 2), (5, 0), (0, 4), (9, 3), (40, 3)])
@pytest.mark.parametrize("temperature", [1.0, 1.2, 4 / 3, 1.9, 2.0, 3.0, 7.0, 50.0])
def test_probabilities_sum_to_one(k: int, rank: int, temperature: float) -> None:
    """At any temperature, in float32, whatever was rounded; k = 0 and k = V among them."""
    packing = Packing(k, rank)
    targets = some(40, packing)
    single = TailDictionary.of(
        {
            field.name: getattr(targets.dictionary, field.name)
            for field in dataclasses.fields(TailDictionary)
            if isinstance(getattr(targets.dictionary, field.name), Tensor)
        },
        TEMPERATURES,
    )
    found = SparseTargets.of(pack(targets, packing), packing, single)
    p = found.probabilities(temperature, ALL)
    assert p.dtype == torch.float32
    assert (p >= 0).all()
    assert (p.sum(1) - 1).abs().max().item() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 4 / 3, 2.0, 2.5])
@pytest.mark.parametrize("calibrated", [True, False])
def test_decoded_as_the_formulas_have_it(calibrated: bool, temperature: float) -> None:
    """Clamped at the smallest stored logit, corrected or calibrated, with its negentropy."""
    z = 3 * torch.randn(9, 500, dtype=F64, generator=torch.Generator().manual_seed(1))
    dictionary = random_dictionary(500, 3, calibrated=calibrated)
    targets = exact_targets(z, 6, dictionary, torch.randn(9, 3, dtype=F64))
    want = decoded(targets, temperature, targets.tail_mass(temperature))
    torch.testing.assert_close(targets.probabilities(temperature, ALL), want, atol=1e-12, rtol=1e-10)
    found = targets.distribution(temperature, ALL)
    torch.testing.assert_close(found.negentropy, torch.xlogy(want, want).sum(1))
    if temperature in TEMPERATURES:
        exact = torch.softmax(z / temperature, 1)
        torch.testing.assert_close(targets.head(temperature), exact.gather(1, targets.ids))
        torch.testing.assert_close(targets.tail_mass(temperature), 1 - exact.gather(1, targets.ids).sum(1))


def test_the_clamp_holds() -> None:
    """No tail logit is above the smallest that is stored, but for a calibration's factor."""
    targets = some(700, Packing(k=6, rank=3))
    targets.coefficients *= 5
    z = targets.tail_logits(1.5, ALL).scatter(1, targets.ids, -math.inf)
    assert (z <= targets.values[:, -1:] + 1e-9).all()
    assert torch.isclose(z.amax(1), targets.values[:, -1]).any()


def test_calibration_is_interpolated_and_goes_no_further() -> None:
    """Linearly in 1 / T; above, the Gaussian form."""
    shared = random_dictionary(50, 2, calibrated=True)
    a = shared.tail_calibration
    middle = 2 / (1 / 1.0 + 3 / 4)
    found = shared.calibration(middle)
    assert found is not None
    torch.testing.assert_close(found, (a[0] + a[1]) / 2)
    for T, row in zip(TEMPERATURES, a, strict=True):
        assert torch.equal(shared.calibration(T), row)  # type: ignore[arg-type]
    assert shared.calibration(2.01) is None
    torch.testing.assert_close(shared.base(1.0), shared.mean_logit)
    want = (shared.mean_logit + shared.residual_mean + shared.residual_variance / 6) / 3
    torch.testing.assert_close(shared.base(3.0), want)


def test_the_prior_between_and_above_its_temperatures() -> None:
    """The stored one at a node; ever flatter above the last."""
    shared = random_dictionary(50, 0)
    torch.testing.assert_close(shared.prior(2.0), shared.tail_prior[2])
    torch.testing.assert_close(shared.prior(4.0), torch.softmax(shared.tail_prior[2].log() / 2, 0))
    assert shared.prior(1e6).std() < 1e-5
    none = dataclasses.replace(shared, tail_prior=shared.tail_prior[:0])
    with pytest.raises(RefusedError, match="needs a prior"):
        none.prior(2.0)


def test_students_of_a_cohort_share_what_is_decoded() -> None:
    """Within a block, as far as the bytes go; nothing is kept after it."""
    targets, rows, other = some(200, Packing(k=4, rank=2)), slice(0, 5), slice(5, 10)
    assert targets.distribution(2.0, rows) is not targets.distribution(2.0, rows)
    with targets.shared(most_bytes=5 * 200 * 8):
        first = targets.distribution(2.0, rows)
        assert targets.distribution(2.0, rows) is first
        assert targets.distribution(2.0, other) is not targets.distribution(2.0, other)
        assert targets.distribution(3.0, rows) is not first
    again = targets.distribution(2.0, rows)
    assert again is not first
    assert isinstance(again, Whole)
    assert isinstance(first, Whole)
    assert torch.equal(again.p, first.p)


def test_temperatures_below_1_are_refused() -> None:
    """For tails that are decoded, and for those of the prior, and where there is no tail."""
    for packing in (Packing(k=4, rank=2), Packing(k=4, rank=0), Packing(k=30, rank=2)):
        with pytest.raises(RefusedError, match=r"temperature 0.5[\s\S]*1 or more"):
            some(30, packing).distribution(0.5, ALL)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_full_rank_decodes_to_dense_logits(kind: str) -> None:
    """V - 1 coefficients say all of centred logits; so does k = V, but for the rounding of the basis."""
    classes = 12
    h, head = made_teacher(classes, 14, 400)
    z = head.logits(h)
    probe = HiddenProbe(h, head, classes) if kind == "hidden" else LogitProbe(z)
    dictionary = TailDictionary.of(
        make_dictionary(probe, k=2, rank=classes - 1, temperatures=TEMPERATURES), TEMPERATURES
    )
    if kind == "hidden":
        captured = capture(h, head, dictionary, k=2, temperatures=TEMPERATURES, classes=classes)
    else:
        captured = capture_logits(z, dictionary, k=2, temperatures=TEMPERATURES)
    targets = captured.targets(TEMPERATURES, dictionary)
    plain = TailDictionary.of(make_dictionary(probe, k=2, rank=0, temperatures=TEMPERATURES), TEMPERATURES)
    assert (targets.logits(ALL) - z).abs().max().item() < 0.02
    every = capture_logits(z, None, k=classes, temperatures=TEMPERATURES).targets(TEMPERATURES, plain)
    assert torch.equal(every.logits(ALL), z)
    torch.testing.assert_close(every.probabilities(3.0, ALL), torch.softmax(z / 3, 1))
