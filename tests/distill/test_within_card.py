"""Students of a `top_k` store are taught what its card says, and no further from the teacher in the loop.

The store is cached with its card and read by a stream; the other side is the teacher on the same batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.distill.cards import chosen
from akd_dist.distill.cohort import open_stream
from akd_dist.distill.dictionary import LogitProbe
from akd_dist.distill.sparse import SparseTargets
from akd_dist.distill.sparse_losses import Annealed, Softened, Squared
from akd_dist.distill.target_shards import drawn_rows
from akd_dist.distill.teacher import forget
from akd_dist.distill.teacher_targets import DenseTargets, Targets
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import CausalLm
from akd_dist.storage.reader import open_store
from benchmarks.within_card import gradient, rms
from tests.language_stores import TOP_K, a_corpus, a_recipe, a_student, a_teacher, logits_of


@pytest.fixture(scope="module", autouse=True)
def own_process_state() -> Iterator[None]:
    """What caching sets for good is put back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    forget()


@dataclass(frozen=True, eq=False)
class Sides:
    """All targets of the train rows, in their order."""

    stored: SparseTargets
    exact: DenseTargets
    card: dict[str, Any]
    measured: Tensor
    """Which of them the card was measured on."""

    def students(self) -> dict[str, Tensor]:
        """Logits of students that know nothing, something false, and a good part of it."""
        z = self.exact.stored
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        return {"even": torch.zeros_like(z), "random": 3 * noise, "near": z + noise}

    def at(self, temperature: float) -> dict[str, float]:
        """What the card says of a temperature."""
        found: dict[str, float] = next(one for one in self.card["at"] if one["temperature"] == temperature)
        return found


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    folder = tmp_path_factory.mktemp("card")
    recipe = a_recipe(a_corpus(folder, 130), [a_student("one")], cache={"encoding": TOP_K, "batch_rows": 8})
    splits = prepare(recipe.data, folder / "cache")
    rows: Rows = splits.train
    teacher = a_teacher(rows)
    with torch.no_grad():
        teacher.output_weight.mul_(0.3)  # as unsure as a language model, so that there is a tail at T = 1
    save_model(folder / "teacher", teacher, ModelCard.of(CausalLm(width=32, depth=1, heads=2), rows, None))
    roots = {"store_root": str(folder / "stores"), "cache_root": str(folder / "cache")}
    document = cache_in_process(recipe, str(folder / "teacher"), **roots)
    job = fleet_job(recipe, splits, {"train": document["store"]}, folder / "run", roots["cache_root"])
    read: dict[int, dict[str, Tensor]] = {}
    for batch in open_stream(job, splits)[0].batches(0):
        assert batch.targets is not None
        for at, row in enumerate(batch.rows.tolist()):
            read[row] = batch.targets.part(at, at + 1).arrays
            decoder = batch.targets.decoder
    arrays = {name: torch.cat([read[row][name] for row in sorted(read)]) for name in read[0]}
    stored = decoder.targets(arrays)
    assert isinstance(stored, SparseTargets)
    exact = DenseTargets(logits_of(teacher, torch.from_numpy(np.array(rows.inputs)), rows.classes))
    manifest = open_store(document["store"]).manifest
    assert manifest.fidelity is not None
    seen = drawn_rows(rows, manifest.identity.top_k)[1]
    numbers = torch.cat([torch.arange(rows.offsets[row], rows.offsets[row + 1]) for row in seen])
    numbers = numbers[chosen(LogitProbe(exact.stored[numbers]))]
    return Sides(stored, exact, manifest.fidelity, numbers)


def difference(sides: Sides, stored: Targets, s: Tensor, temperature: float) -> Tensor:
    """p - p^ of all targets, as a student sees it: from the gradients of KD, less its factor T."""
    told, true = (gradient(s, Softened(one, temperature)) for one in (stored, sides.exact))
    return (told - true) / temperature


def scale(sides: Sides, temperature: float, which: Tensor) -> float:
    """The gradient of the student that says the mean p."""
    p = torch.softmax(sides.exact.stored[which] / temperature, 1)
    return rms(p.mean(0) - p)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_gradients_differ_by_what_the_card_says_whatever_the_student_says(sides: Sides, temperature: float) -> None:
    card, which = sides.at(temperature), sides.measured
    assert card["unigram_error"] > 0.01
    for name, s in sides.students().items():
        off = difference(sides, sides.stored, s, temperature)
        assert rms(off[which]) == pytest.approx(card["unigram_error"] * scale(sides, temperature, which), rel=1e-3)
        # On targets that it was not measured on, as near as a sample says.
        all_of_them = torch.arange(len(off))
        assert rms(off) <= 1.2 * card["unigram_error"] * scale(sides, temperature, all_of_them), name
        told, true = (gradient(s, Annealed(one, 1 / temperature)) for one in (sides.stored, sides.exact))
        torch.testing.assert_close(told - true, off, rtol=0, atol=1e-5)


@pytest.mark.parametrize("phi", [0.25, 1.0])
def test_squared_gradients_differ_by_what_it_leaves_unexplained(sides: Sides, phi: float) -> None:
    z = sides.exact.stored[sides.measured]
    energy = rms(z - z.mean(1, keepdim=True)) ** 2
    expected = 2 * phi / z.shape[1] * (sides.card["unexplained"] * energy) ** 0.5
    for s in sides.students().values():
        told, true = (gradient(s, Squared(one, phi)) for one in (sides.stored, sides.exact))
        assert rms((told - true)[sides.measured]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_losses_differ_by_no_more_than_its_total_variation_allows(sides: Sides, temperature: float) -> None:
    """sum (p^ - p) log q is at most the total variation times the range of log q, target by target."""
    everywhere = slice(0, len(sides.stored))
    p, p_hat = (one.probabilities(temperature, everywhere) for one in (sides.exact, sides.stored))
    for s in sides.students().values():
        ranges = (s.amax(1) - s.amin(1)) / temperature
        off = ((p_hat - p) * torch.log_softmax(s / temperature, 1)).sum(1).abs()[sides.measured]
        distance = (p - p_hat).abs().sum(1)[sides.measured] / 2
        assert float(distance.mean()) == pytest.approx(sides.at(temperature)["total_variation"], rel=1e-3)
        assert bool((off <= distance * ranges[sides.measured] + 1e-5).all())
        assert float(off.mean()) <= sides.at(temperature)["total_variation"] * float(ranges.max()) + 1e-5
    # A student that has learnt all that is stored is as far from its teacher as the card says.
    kl = (torch.xlogy(p, p) - torch.xlogy(p, p_hat)).sum(1)[sides.measured].mean()
    assert float(kl) == pytest.approx(sides.at(temperature)["kl"], rel=2e-3)


@pytest.mark.parametrize("wrong", ["another target", "no coefficients", "another curve"])
def test_the_comparison_sees_what_it_should(sides: Sides, wrong: str) -> None:
    stored, s = sides.stored, sides.students()["near"]
    changes: dict[str, Any] = {
        "another target": {
            name: getattr(stored, name).roll(1, 0) for name in ("ids", "values", "mean", "tail", "coefficients")
        },
        "no coefficients": {"coefficients": torch.zeros_like(stored.coefficients)},
        "another curve": {"tail": stored.tail + 1},
    }[wrong]
    off = difference(sides, dataclasses.replace(stored, **changes), s, 2.0)[sides.measured]
    assert rms(off) > 1.2 * sides.at(2.0)["unigram_error"] * scale(sides, 2.0, sides.measured)
