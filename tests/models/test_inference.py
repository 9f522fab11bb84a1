"""Other ways to run a teacher: another teacher with a store of its own, the same bits as with it in the loop, and
refused where they cannot work. What is as by default says nothing, so that stores and runs of before stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.distill.teacher import load_teacher, served_fingerprint, teacher_logits
from akd_dist.distill.trial import try_inference
from akd_dist.jobs.planning.creations import creation_of
from akd_dist.models import inference
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_card
from akd_dist.recipe import CacheSpec, Cnn, Mlp, Recipe
from akd_dist.storage.reader import open_store
from benchmarks.cached_equals_online import both, cases
from tests.fleets import DEVICE, a_recipe, a_student, a_teacher, stores_of

LAID_OUT = CacheSpec(channels_last=True)
COMPILED = CacheSpec(compile=True)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe([a_student("one")])


@pytest.fixture(scope="module")
def teacher(recipe: Recipe, home: Path) -> str:
    return a_teacher(recipe, home / "teacher", home / "cache")


@pytest.fixture(scope="module")
def train(recipe: Recipe, home: Path) -> Rows:
    return prepare(recipe.data, home / "cache").train


def test_what_is_as_by_default_says_nothing(recipe: Recipe, teacher: str, train: Rows) -> None:
    card = load_card(teacher)
    assert served_fingerprint(card, CacheSpec()) == card.fingerprint
    assert recipe.identity()["cache"].keys() == {"encoding", "batch_rows", "threads", "precision"}
    assert creation_of(recipe, train, "train", card, "cpu").teacher.keys() == {"fingerprint", "spec"}


def test_each_way_is_another_teacher_and_is_recorded(recipe: Recipe, teacher: str, train: Rows) -> None:
    ways = [
        CacheSpec(),
        LAID_OUT,
        COMPILED,
        CacheSpec(channels_last=True, compile=True),
        CacheSpec(precision="bfloat16"),
    ]
    served = {served_fingerprint(load_card(teacher), way) for way in ways}
    assert len(served) == len(ways)
    other = recipe.model_copy(update={"cache": ways[3]})
    assert other.identity()["cache"] | {"channels_last": True, "compile": True} == other.identity()["cache"]
    creation = creation_of(other, train, "train", load_card(teacher), "cpu")
    assert creation.teacher["inference"] == {"channels_last": True, "compile": True}
    assert creation.identity.teacher == creation.teacher["fingerprint"]
    assert creation.computed.versions["c++"] == inference.compiled_by("cpu")["c++"]


def test_a_store_says_how_its_teacher_was_run(recipe: Recipe, teacher: str, home: Path) -> None:
    """And holds what the teacher says when it is run in that way, close to what it says in the usual one."""
    other = recipe.model_copy(update={"cache": LAID_OUT})
    stores = stores_of(other, teacher, home)
    store = open_store(stores["test"])
    assert store.manifest.teacher["inference"] == {"channels_last": True}
    module = load_teacher(teacher, store.manifest.identity.teacher, LAID_OUT)
    convolution = next(one for one in module.modules() if isinstance(one, nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    inputs = torch.from_numpy(np.array(prepare(other.data, home / "cache").test.inputs))
    np.testing.assert_array_equal(store.rows(0, 0, len(inputs)), teacher_logits(module, inputs, LAID_OUT.batch_rows))
    usual = open_store(stores_of(recipe, teacher, home)["test"])
    assert usual.manifest.id != store.manifest.id
    np.testing.assert_allclose(store.rows(0, 0, len(inputs)), usual.rows(0, 0, len(inputs)), atol=1e-4)


def test_training_from_the_store_is_training_with_such_a_teacher(tmp_path: Path) -> None:
    recipe = cases(device=DEVICE)["images"]
    ours, loop = both(recipe.model_copy(update={"cache": LAID_OUT}), tmp_path, padded=True)
    assert ours.losses == loop.losses
    assert all(torch.equal(ours.weights[key], loop.weights[key]) for key in loop.weights)


@pytest.mark.slow
def test_training_from_the_store_is_training_with_a_compiled_teacher(tmp_path: Path) -> None:
    recipe = cases(device=DEVICE)["images"].model_copy(update={"cache": CacheSpec(channels_last=True, compile=True)})
    ours, loop = both(recipe, tmp_path, padded=True)
    assert ours.losses == loop.losses
    assert all(torch.equal(ours.weights[key], loop.weights[key]) for key in loop.weights)
    train = prepare(recipe.data, tmp_path / "cache").train
    assert recipe.teacher.model is not None
    card = ModelCard.of(recipe.teacher.model, train, None)
    try_inference(build(card, seed=7).eval(), card, train, recipe.cache, DEVICE, tmp_path / "cache")
    assert list((tmp_path / "cache" / "compiled").iterdir())


# ---- refusals


def tried(model: Any, rows: Rows, cache: CacheSpec, root: Path, module: nn.Module | None = None) -> None:
    card = ModelCard.of(model, rows, None)
    try_inference(module or build(card, seed=0).eval(), card, rows, cache, "cpu", root)


def test_a_layout_without_convolutions_is_refused(train: Rows, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"(?s)channels_last lays out nothing.*mlp-8.*a model with convolutions"):
        tried(Mlp(hidden=8), train, LAID_OUT, tmp_path)
    tried(Cnn(width=4), train, LAID_OUT, tmp_path)


def test_a_machine_without_a_compiler_is_refused(train: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    inference.compiled_by.cache_clear()
    with pytest.raises(MachineError, match=r"(?s)needs a compiler.*no g\+\+"):
        tried(Mlp(hidden=8), train, COMPILED, tmp_path)
    inference.compiled_by.cache_clear()


class OfTheBatch(nn.Module):
    """What it says of a row depends on the batch's first."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 10, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.convolution(inputs.float()).flatten(1)
        return logits + logits[:1]


class Failing(OfTheBatch):
    """Cannot be run on a batch."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such\nbatch")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (OfTheBatch(), r"(?s)changes what cnn-4 says.*another place of the batch.*leave cache.channels_last out"),
        (Failing(), r"(?s)cannot be run with cache.channels_last.*ValueError: no such"),
    ],
)
def test_a_model_that_does_not_bear_it_is_refused(module: nn.Module, message: str, train: Rows, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=message):
        tried(Cnn(width=4), train, LAID_OUT, tmp_path, module)
