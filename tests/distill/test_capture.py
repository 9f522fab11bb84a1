"""What is captured of a teacher, against NumPy's own sorting and float64 sums."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from akd_dist.base.errors import RefusedError
from akd_dist.distill.capture import Captured, capture, capture_logits, largest, log_masses
from akd_dist.distill.dictionary import HiddenProbe, make_dictionary
from akd_dist.distill.output_head import Head
from akd_dist.distill.sparse import TailDictionary
from akd_dist.distill.tail_curve import LOWEST, log_mass
from tests.language_logits import made_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

NODES = (1.0, 4 / 3, 2.0)


def sorted_ids(z: Tensor, k: int) -> np.ndarray:
    """By (-z, id), as it is written."""
    order = [np.lexsort((np.arange(z.shape[1]), -row)) for row in z.float().numpy()]
    return np.stack(order)[:, :k]


@pytest.mark.parametrize(("classes", "k"), [(5, 5), (300, 8), (1000, 7), (1024, 16), (4999, 33)])
@pytest.mark.parametrize("kind", ["bfloat16", "zeros", "steps", "float32"])
def test_the_largest_by_value_and_then_by_id(kind: str, classes: int, k: int) -> None:
    """Ties of bfloat16 come by the dozen; zeros of both signs are equal."""
    z = 3 * torch.randn(17, classes, generator=torch.Generator().manual_seed(classes))
    if kind == "bfloat16":
        z = z.bfloat16().float()
    elif kind == "zeros":
        z = torch.where(z > 0, 0.0, -0.0)
    elif kind == "steps":
        z = z.round()
    values, ids = largest(z, k)
    assert np.array_equal(ids.numpy(), sorted_ids(z, k))
    assert torch.equal(values, z.gather(1, ids))


@pytest.mark.parametrize(
    "nodes", [NODES, (1.0, 7 / 6, 7 / 5, 7 / 4, 7 / 3), (1.0, 1.3333, 2.0), (1.0, 1.7, 3.1), (0.5, 1.0), ()]
)
def test_log_masses(nodes: tuple[float, ...]) -> None:
    """One exponential or several: the float64 sum to half a step of what is stored, however peaked the logits."""
    for spread in (0.1, 5.0, 20.0):
        z = spread * torch.randn(9, 3000, generator=torch.Generator().manual_seed(3))
        _, ids = largest(z, 4)
        top = z.amax(1)
        found = log_masses(z.scatter(1, ids, -1e30), top, nodes)
        rest = z.double().scatter(1, ids, -math.inf) - top[:, None]
        want = torch.stack([torch.logsumexp(rest / T, 1) for T in nodes], 1) if nodes else rest[:, :0]
        assert found.shape == (9, len(nodes))
        assert (found - want).abs().max().item() < 5e-4 if nodes else True


def teacher(count: int = 300, classes: int = 1000) -> tuple[Tensor, Head, TailDictionary]:
    """A teacher with two padding rows of large logits, and its dictionary of rank 4."""
    h, head = made_teacher(classes, 24, count)
    padded = Head(torch.cat([head.weight, 50 + torch.zeros(2, 24)]), torch.linspace(-1, 1, classes + 2))
    arrays = make_dictionary(HiddenProbe(h, padded, classes), k=6, rank=4, temperatures=NODES)
    return h, padded, TailDictionary.of(arrays, NODES)


def test_captured_from_hidden_states() -> None:
    """Head, mean, curve and coefficients are those of dense logits without the padding rows."""
    h, head, dictionary = teacher()
    found = capture(h, head, dictionary, k=6, temperatures=NODES, classes=1000, chunk=64)
    z = (h.double() @ head.weight.double().T + head.bias.double())[:, :1000]  # type: ignore[union-attr]
    assert (found.ids == torch.topk(z, 6, 1).indices).all()
    torch.testing.assert_close(found.values.double(), z.gather(1, found.ids), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.mean.double(), z.mean(1), atol=1e-5, rtol=1e-5)
    rest = z.scatter(1, found.ids, -math.inf) - z.amax(1, keepdim=True)
    want = torch.stack([torch.logsumexp(rest / T, 1) for T in NODES], 1)
    torch.testing.assert_close(found.tail.double(), want, atol=2e-4, rtol=0)
    assert (found.coefficients.square().mean(0) - 1).abs().max().item() < 1e-3
    assert found.coefficients.mean(0).abs().max().item() < 1e-4
    assert {name: array.dtype.name for name, array in found.arrays().items()} == {
        "ids": "int64", "values": "float32", "mean": "float32", "tail": "float32", "coefficients": "float32",
    }  # fmt: skip


def test_bits_do_not_depend_on_how_many_targets_there_are() -> None:
    """A chunk that is not full is filled up."""
    h, head, dictionary = teacher()
    whole = capture(h, head, dictionary, k=6, temperatures=NODES, classes=1000, chunk=64)
    part = capture(h[:67], head, dictionary, k=6, temperatures=NODES, classes=1000, chunk=64)
    for name in ("ids", "values", "mean", "tail"):
        assert torch.equal(getattr(whole, name)[:67], getattr(part, name)), name


def test_bfloat16_logits_are_summed_in_float32() -> None:
    """Head and curve are of the same numbers, so that no mass is negative."""
    h, head, _ = teacher()
    small = Head(head.weight.bfloat16(), head.bias.bfloat16())  # type: ignore[union-attr]
    found = capture(h.bfloat16(), small, None, k=6, temperatures=NODES, classes=1000)
    z = small.cut(1000).logits(h.bfloat16()).double()
    assert np.array_equal(found.ids.numpy(), sorted_ids(z, 6))
    rest = z.scatter(1, found.ids, -math.inf) - z.amax(1, keepdim=True)
    torch.testing.assert_close(found.tail[:, 0].double(), torch.logsumexp(rest, 1), atol=2e-4, rtol=0)
    torch.testing.assert_close(found.mean.double(), z.mean(1), atol=1e-5, rtol=1e-5)


def test_a_softcapped_head_and_logits_that_are_there() -> None:
    """Coefficients come of the logits where no linear head makes them of hidden states."""
    h, head, _ = teacher()
    capped = Head(head.weight[:1000], softcap=5.0)
    arrays = make_dictionary(HiddenProbe(h, capped, 1000), k=6, rank=4, temperatures=NODES)
    assert arrays["projection"].shape == (4, 1000)
    dictionary = TailDictionary.of(arrays, NODES)
    a = capture(h, capped, dictionary, k=6, temperatures=NODES, classes=1000)
    b = capture_logits(capped.logits(h), dictionary, k=6, temperatures=NODES)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.coefficients, b.coefficients, atol=1e-4, rtol=1e-4)
    assert (a.coefficients.square().mean(0) - 1).abs().max().item() < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_with_their_target(bad: float) -> None:
    """The first, as the caller calls it, and how many more."""
    h, head, dictionary = teacher()
    h = h.clone()
    h[[70, 200]] = bad
    with pytest.raises(RefusedError, match=r"not finite[\s\S]*row 7, position 0, and 1 more of 300"):
        capture(
            h, head, dictionary, k=6, temperatures=NODES, classes=1000, chunk=64,
            named=lambda target: f"row {target // 10}, position {target % 10}",
        )  # fmt: skip
    z = torch.randn(20, 500)
    z[13, 499] = bad
    with pytest.raises(RefusedError, match=r"target 13, and 0 more"):
        capture_logits(z, None, k=3, temperatures=NODES)


def test_more_than_there_is_is_refused() -> None:
    """k above the classes, and classes above the head's rows."""
    with pytest.raises(RefusedError, match=r"k = 6, 5 classes"):
        capture_logits(torch.randn(2, 5), None, k=6, temperatures=NODES)
    with pytest.raises(RefusedError, match=r"5 logits a target[\s\S]*at least 7"):
        capture(torch.randn(2, 3), Head(torch.randn(5, 3)), None, k=2, temperatures=NODES, classes=7)


def test_tiny_sizes() -> None:
    """All classes stored, none stored, one target, no target."""
    z = torch.tensor([[1.0, 3.0, 2.0]])
    every = capture_logits(z, None, k=3, temperatures=NODES)
    assert every.ids.tolist() == [[1, 2, 0]]
    assert every.tail.tolist() == [[LOWEST] * 3]
    none = capture_logits(z, None, k=0, temperatures=(1.0,))
    torch.testing.assert_close(none.tail[:, 0], torch.logsumexp(z - 3, 1))
    assert none.values.shape == (1, 0)
    empty = capture(torch.zeros(0, 4), Head(torch.zeros(9, 4)), None, k=2, temperatures=NODES, classes=9)
    assert isinstance(empty, Captured)
    assert (empty.ids.shape, empty.tail.shape) == ((0, 2), (0, 3))


def test_the_curve_between_nodes() -> None:
    """Exactly what is stored at a node, and a mass within 0.003 on average between."""
    h, head = made_teacher(8000, 48, 256, spread=4.0)
    z = head.logits(h).double()
    found = capture_logits(z.float(), None, k=8, temperatures=NODES)
    top, (values, ids) = z.amax(1), torch.topk(z, 8, 1)
    rest = z.scatter(1, ids, -math.inf) - top[:, None]
    slope = (z.sum(1) - values.sum(1)) / (8000 - 8) - top
    stored = (found.tail * 1024).round() / 1024
    masses = []
    for T in (1.0, 7 / 6, 4 / 3, 1.5, 1.75, 2.0, 7 / 3, 3.0, 4.0, 7.0, 10.0):
        mass = log_mass(T, NODES, stored, math.log(8000 - 8), slope)
        if T in NODES:
            assert torch.equal(mass, stored[:, NODES.index(T)].double())
        head_mass = torch.logsumexp((values - top[:, None]) / T, 1)
        mine, true = (torch.sigmoid(one - head_mass) for one in (mass, torch.logsumexp(rest / T, 1)))
        masses.append(true.mean().item())
        assert (mine - true).abs().mean().item() < 0.003, T
    assert masses[0] < 0.4 < 0.9 < masses[-1]  # from peaked to flat


@pytest.mark.parametrize("temperature", [0.9, 0.0, -1.0, math.nan, math.inf])
def test_temperatures_that_no_store_describes(temperature: float) -> None:
    """Below the first that is stored."""
    with pytest.raises(RefusedError, match="temperature"):
        log_mass(temperature, NODES, torch.zeros(1, 3), 1.0, torch.zeros(1))
    assert log_mass(0.9, (0.9, 1.0), torch.tensor([[7.0, 8.0]]), 1.0, torch.zeros(1)).item() == 7
