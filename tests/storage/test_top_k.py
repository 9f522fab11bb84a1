"""What `top_k` keeps of logits: its bits, what it refuses, and what is decoded of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings, strategies as st

from akd_dist.base.errors import RefusedError
from akd_dist.storage.decoder import probabilities, tail_curve, tail_mass
from akd_dist.storage.dictionary import Dictionary
from akd_dist.storage.top_k import TopK, pack_bits, top_k_from_config, unpack_bits
from tests.target_stores import describe

NODES = (1.0, 4 / 3, 2.0)


def teacher(n: int, classes: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Logits with a few large ones, as a language model's."""
    draw = np.random.Generator(np.random.Philox(seed))
    z = draw.normal(size=(n, classes)) * 2 + draw.normal(size=(n, 1)) * 5
    z[np.arange(n)[:, None], draw.integers(0, classes, (n, 3))] += draw.exponential(6, (n, 3))
    result: npt.NDArray[np.float32] = z.astype(np.float32)
    return result


def softmax(z: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    e = np.exp(z.astype(np.float64) - z.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float64] = e / e.sum(axis=1, keepdims=True)
    return result


def low_rank(z: npt.NDArray[np.float32], rank: int) -> tuple[Dictionary, npt.NDArray[np.float32]]:
    """A dictionary of logits, and their coefficients, by a singular value decomposition."""
    centred = z.astype(np.float64) - z.mean(axis=1, keepdims=True)
    mean = centred.mean(axis=0)
    u, s, vt = np.linalg.svd(centred - mean, full_matrices=False)
    c, basis = u[:, :rank] * np.sqrt(len(z)), (vt[:rank] * s[:rank, None] / np.sqrt(len(z))).T
    left = centred - mean - c @ basis.T
    said = Dictionary(
        mean.astype(np.float32),
        basis=basis.astype(np.float16),
        residual_mean=left.mean(axis=0).astype(np.float32),
        residual_variance=left.var(axis=0).astype(np.float32),
    )
    return said, c.astype(np.float32)


# ---- bytes


@pytest.mark.parametrize(
    ("top_k", "classes", "size"),
    [
        (TopK(6, 8, 6, (1.0, 2.0)), 49_152, 34),
        (TopK(6, 8, 4), 49_152, 35),
        (TopK(8, 8, 6), 131_072, 43),
        (TopK(), 65_536, 72),
        (TopK(), 65_537, 74),
        (TopK(), 131_073, 76),
        (TopK(64, 32, 8), 200_000, 251),
    ],
    ids=str,
)
def test_a_target_takes_the_bytes_that_are_documented(top_k: TopK, classes: int, size: int) -> None:
    arrays = top_k.arrays(classes)
    assert sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in arrays.values()) == size
    z = teacher(2, classes)
    packed = top_k.pack(describe(top_k, z), classes)
    assert {name: (str(array.dtype), array.shape[1:]) for name, array in packed.items()} == arrays


def test_bits_are_packed_from_the_low_end() -> None:
    assert pack_bits(np.array([[1, 2, 3]]), 6).tolist() == [[0b10_000001, 0b0011_0000, 0]]
    assert pack_bits(np.array([[1, 0, 3]]), 2).tolist() == [[0b11_00_01]]


@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_packed_bits_come_back(bits: int, count: int, seed: int) -> None:
    numbers = np.random.Generator(np.random.Philox(seed)).integers(0, 2**bits, (3, count))
    packed = pack_bits(numbers, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), numbers)


@pytest.mark.parametrize("classes", [40, 65_536, 65_537, 131_073])
@pytest.mark.parametrize("value_bits", [4, 6, 8, 16])
def test_packing_what_was_unpacked_changes_no_byte(classes: int, value_bits: int) -> None:
    top_k = TopK(7, 3, value_bits)
    z = teacher(8, classes)
    z[0] = -3.25  # all the same: the smallest classes are kept, and nothing is divided by their range
    z[1, [classes - 1, classes - 2]] = 60
    given_ = np.random.Generator(np.random.Philox(1)).normal(size=(8, 3)).astype(np.float32) * 3
    described = describe(top_k, z, given_)
    packed = top_k.pack(described, classes)
    unpacked = top_k.unpack(packed, classes)
    np.testing.assert_array_equal(unpacked.ids, described.ids)
    assert unpacked.ids[0].tolist() == list(range(7))
    step = (described.values[:, :1] - described.values[:, -1:]) / 2 ** min(value_bits, 10)
    above = np.abs(described.values[:, :1] - described.mean[:, None]) + np.abs(described.mean[:, None])
    assert (np.abs(unpacked.values - described.values) <= step + above * 2**-10).all()
    again = top_k.pack(unpacked, classes)
    for name, array in packed.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_one_logit_needs_no_gaps_and_rank_0_no_coefficients() -> None:
    assert list(TopK(1, 0).arrays(100)) == ["ids", "top", "mean", "tail"]
    z = teacher(9, 100)
    top_k = TopK(1, 0)
    unpacked = top_k.unpack(top_k.pack(describe(top_k, z), 100), 100)
    np.testing.assert_array_equal(unpacked.ids[:, 0], z.argmax(axis=1))
    assert unpacked.coefficients.shape == (9, 0)


def test_it_is_rebuilt_from_its_config() -> None:
    assert top_k_from_config(TopK(8, 4).config()) == TopK(8, 4)
    wrong: list[dict[str, Any]] = [{"k": True}, {"more": 1}, {"tail_temperatures": [1]}, {"rank": 1.0}]
    for changed in wrong:
        with pytest.raises(RefusedError, match="not known to this version"):
            top_k_from_config(TopK().config() | changed)


# ---- refusals


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("k", 0, "k of the encoding top_k"),
        ("rank", -1, "rank of the encoding"),
        ("value_bits", 5, "value_bits of"),
        ("tail_temperatures", (0.5, 1.0), "tail_temperatures of"),
        ("tail_temperatures", (2.0, 1.0), "tail_temperatures of"),
        ("tail_temperatures", (), "tail_temperatures of"),
        ("tail_temperatures", (float("nan"),), "tail_temperatures of"),
        ("probe_rows", 0, "probe_rows of"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: object, told: str) -> None:
    with pytest.raises(RefusedError, match=told):
        replace(TopK(), **{setting: value})  # type: ignore[arg-type]


def test_more_logits_than_classes_are_refused() -> None:
    with pytest.raises(RefusedError, match="top_k keeps 16 logits of each target, and there are 10 classes"):
        TopK().arrays(10)
    with pytest.raises(RefusedError, match="classes of 24 bits"):
        TopK().arrays(2**24 + 1)
    assert TopK().arrays(2**24)["ids_high"] == ("uint8", (16,))


@pytest.mark.parametrize("field", ["values", "mean", "tail", "coefficients"])
def test_what_is_not_finite_is_refused_by_row_and_position(field: str) -> None:
    top_k = TopK(4, 2)
    described = describe(top_k, teacher(20, 50))
    getattr(described, field).reshape(20, -1)[[3, 7], 0] = np.nan
    with pytest.raises(RefusedError) as refused:
        top_k.pack(described, 50, lambda target: f"row {target // 6}, position {target % 6}")
    told = "2 targets have logits that cannot be kept: row 0, position 3; row 1, position 1"
    assert refused.value.what == told
    assert refused.value.got is not None
    assert refused.value.got.startswith("NaN or infinity in their ")


@pytest.mark.parametrize("shift", [(70_000.0, 0.0), (0.0, 140_000.0)])
def test_what_is_beyond_float16_is_refused(shift: tuple[float, float]) -> None:
    top_k, z = TopK(4, 0), teacher(5, 50)
    z[2] += np.where(np.arange(50) < 25, shift[0] or shift[1], shift[0])
    with pytest.raises(RefusedError, match="1 target has logits that cannot be kept: target 2") as refused:
        top_k.pack(describe(top_k, z), 50)
    assert refused.value.got == "logits beyond float16"


def test_a_writers_mistakes_are_told() -> None:
    top_k = TopK(4, 0)
    described = describe(top_k, teacher(5, 50))
    with pytest.raises(ValueError, match="have to descend"):
        top_k.pack(replace(described, values=described.values[:, ::-1]), 50)
    with pytest.raises(ValueError, match="of 40"):
        top_k.pack(describe(top_k, teacher(500, 50)), 40)
    with pytest.raises(ValueError, match="ids of top 4"):
        top_k.pack(replace(described, ids=described.ids[:, :2]), 50)


# ---- decoded


def test_as_many_logits_as_classes_are_the_logits() -> None:
    classes = 12
    top_k, z = TopK(classes, 0, 16), teacher(30, classes)
    described = top_k.unpack(top_k.pack(describe(top_k, z), classes), classes)
    said = Dictionary(np.zeros(classes, np.float32), np.full((3, classes), 1 / classes, np.float32))
    for temperature in (1.0, 1.7, 5.0):
        found = probabilities(top_k, described, said, temperature)
        np.testing.assert_allclose(found, softmax(z / temperature), atol=2e-3)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def test_a_full_basis_gives_the_teacher_back() -> None:
    """Rank V - 1 leaves no residual: what is left are the bits, and the tail's mass between its nodes."""
    z = teacher(300, 60) / np.float32(2)
    said, c = low_rank(z, 59)
    top_k = TopK(5, 59, 16, NODES)
    described = replace(describe(top_k, z, c), coefficients=c)
    for temperature in (1.0, 1.5, 2.0, 4.0):
        apart = np.abs(probabilities(top_k, described, said, temperature) - softmax(z / temperature))
        assert apart.max() < 0.02
        assert apart.mean() < 2e-4


def test_probabilities_are_exact_on_what_is_stored_and_sum_up_to_1() -> None:
    z = teacher(200, 1000)
    said, c = low_rank(z, 4)
    top_k = TopK(8, 4, 16, NODES)
    described = top_k.unpack(top_k.pack(describe(top_k, z, c), 1000), 1000)
    for temperature in NODES:
        p, found = softmax(z / temperature), probabilities(top_k, described, said, temperature)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
        kept = np.take_along_axis(found, described.ids, axis=1)
        np.testing.assert_allclose(kept, np.take_along_axis(p, described.ids, axis=1), atol=0.003)
        # No class of the tail is above the smallest stored one, by more than its own correction.
        assert (found.argmax(axis=1) == described.ids[:, 0]).all()


def test_the_tails_mass_is_exact_at_nodes_and_close_between() -> None:
    z = teacher(150, 5000)
    top_k = TopK(8, 0)
    described = describe(top_k, z)
    for temperature in (1.0, 7 / 6, 4 / 3, 1.5, 1.75, 2.0, 3.0, 4.0, 7.0):
        p = softmax(z / temperature)
        true = 1 - np.take_along_axis(p, described.ids, axis=1).sum(axis=1)
        apart = np.abs(tail_mass(top_k, described, 5000, temperature) - true)
        assert apart.mean() < (1e-6 if temperature in NODES else 0.003)
    # Its value and slope at 0 are known without being stored.
    np.testing.assert_allclose(tail_curve(top_k, described, 5000, 0.0), np.log(4992))


def test_calibration_makes_the_tail_lean_as_told_and_ends_with_its_grid() -> None:
    z = teacher(50, 400)
    said, c = low_rank(z, 2)
    top_k = TopK(4, 2)
    described = describe(top_k, z, c)
    favoured = np.zeros((3, 400), np.float32)
    favoured[:, 7] = [4.0, 3.0, 2.0]
    calibrated = replace(said, tail_calibration=favoured)
    outside = ~(described.ids == 7).any(axis=1)
    for temperature, more in ((1.0, True), (1.1, True), (2.0, True), (2.5, False)):
        with_it = probabilities(top_k, described, calibrated, temperature)[outside, 7]
        without = probabilities(top_k, described, replace(calibrated, tail_calibration=favoured * 0), temperature)
        assert (with_it > without[outside, 7] * 2).all() == more


def test_at_rank_0_the_tail_is_the_prior_and_uniform_in_the_end() -> None:
    top_k, z = TopK(4, 0), teacher(20, 300)
    weights = np.arange(1, 301, dtype=np.float64) ** np.array([[3.0], [2.0], [1.0]])
    prior = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    said, described = Dictionary(np.zeros(300, np.float32), prior), describe(top_k, z)
    tail = np.ones((20, 300), bool)
    np.put_along_axis(tail, described.ids, False, axis=1)
    for temperature, expected in ((1.0, prior[0]), (2.0, prior[2]), (1e6, np.full(300, 1 / 300))):
        found = np.where(tail, probabilities(top_k, described, said, temperature), 0)
        wanted = np.where(tail, expected, 0)
        np.testing.assert_allclose(
            found / found.sum(axis=1, keepdims=True), wanted / wanted.sum(axis=1, keepdims=True), rtol=1e-4
        )


@pytest.mark.parametrize("temperature", [0.5, 0.999, 0.0, -1.0, float("nan")])
def test_a_temperature_below_the_first_stored_one_is_refused(temperature: float) -> None:
    top_k, z = TopK(4, 0), teacher(3, 50)
    said = Dictionary(np.zeros(50, np.float32), np.full((3, 50), 0.02, np.float32))
    with pytest.raises(RefusedError, match="says nothing of its teacher at temperature") as refused:
        probabilities(top_k, describe(top_k, z), said, temperature)
    assert refused.value.expected == "T of 1 or more, the first of its tail_temperatures"


# ---- the dictionary


def test_a_dictionary_of_another_encoding_is_refused_by_the_array() -> None:
    said, _ = low_rank(teacher(50, 40), 3)
    said.check(TopK(4, 3), 40)
    cases: list[tuple[TopK, int, Dictionary, str]] = [
        (TopK(4, 2), 40, said, "basis is not that"),
        (TopK(4, 3), 41, said, "mean_logit is not that"),
        (TopK(4, 0), 40, said, "tail_prior is not that"),
        (TopK(4, 3), 40, replace(said, residual_variance=None), "residual_variance is not that"),
        (TopK(4, 3), 40, replace(said, projection=np.zeros((2, 5), np.float32)), "projection is not that"),
        (TopK(4, 3), 40, replace(said, mean_logit=said.mean_logit * np.float32("nan")), "mean_logit is not that"),
        (TopK(4, 3), 40, replace(said, tail_calibration=np.zeros((2, 40), np.float32)), "tail_calibration is not"),
    ]
    for top_k, classes, wrong, told in cases:
        with pytest.raises(RefusedError, match=told):
            wrong.check(top_k, classes)
