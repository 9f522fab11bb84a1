"""Caching killed wherever it can die: what is left, what `stores gc` makes of it, and the manifest afterwards.

Each kill is a SIGKILL of a process of its own, forked from one that has loaded torch, so that many cost little.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.data.row_cache import prepare
from akd_dist.distill import teacher
from akd_dist.distill.teacher import cache_shard
from akd_dist.jobs.cache_teacher import cache_in_process, cache_job
from akd_dist.jobs.planning.creations import creation_of
from akd_dist.jobs.planning.models import SplitPlan
from akd_dist.jobs.repair import repair
from akd_dist.jobs.train_teacher import Workspace, ensure_trained, teacher_of
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_card, save_model
from akd_dist.recipe import Mlp, Recipe, TeacherSpec
from akd_dist.storage import catalog, removal
from akd_dist.storage.claim import claim_store
from akd_dist.storage.layout import FORMAT_VERSION
from akd_dist.storage.reader import read_manifest
from akd_dist.storage.writer import create_store, missing_shards, seal_store
from tests.fleets import a_recipe, a_student
from tests.survivors import FORKS

pytestmark = pytest.mark.usefixtures("own_process_state")

SHARDS = 5
# The creation document, two of metadata, a shard and a receipt each, the manifest; beside them, the hint.
PUBLISHED = 3 + 2 * SHARDS + 1
FAILPOINTS = [
    *(f"publish.before_link:{number}" for number in (1, 2, 3, 4, 5, 10, PUBLISHED - 1, PUBLISHED)),
    "replace.before_rename:1",
    *(f"shard.before_publish:{number}" for number in (1, SHARDS)),
    *(f"shard.before_receipt:{number}" for number in range(1, SHARDS + 1)),
    "seal.before_manifest:1",
]


@dataclass(frozen=True)
class Case:
    """A store to be filled: a teacher, how its logits are kept, and in which format."""

    root: str
    cache_root: str
    teacher: str
    encoding: str
    format: int

    @property
    def recipe(self) -> Recipe:
        cache = {"encoding": self.encoding, "batch_rows": 256}
        data = {"train": {"kind": "digits"}, "views": 1, "augmentation": {"kind": "shift", "pixels": 1}}
        recipe = a_recipe([a_student("one")], data=data, cache=cache)
        return recipe.model_copy(update={"teacher": TeacherSpec(weights=self.teacher)})

    def fill(self) -> str:
        """What a driver and its tasks do, in one process; the sha256 of the manifest's bytes."""
        recipe = self.recipe
        rows = prepare(recipe.data, Path(self.cache_root)).train
        creation = creation_of(recipe, rows, "train", load_card(self.teacher), "cpu", self.format)
        hint = {"recipe": recipe.model_dump(mode="json"), "split": "train"}
        with claim_store(self.root, creation.identity.id):
            plan = SplitPlan("train", rows, creation, writer=create_store(self.root, creation, hint))
            assert plan.writer is not None
            job = cache_job(plan, recipe, self.teacher, self.cache_root)
            for shard in missing_shards(plan.writer):
                cache_shard(job, shard)
            seal_store(plan.writer)
        return sha256(plan.writer.store.get("manifest.json"))


def fill_and_die(case: Case, failpoint: str) -> None:
    os.environ["AKD_FAILPOINT"] = failpoint
    case.fill()


@pytest.fixture(scope="module")
def forks() -> Any:
    return FORKS


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def teacher_uri(tmp_path_factory: pytest.TempPathFactory, cache_root: str) -> str:
    """A teacher whose logits sit around 100, where float16 knows sixteenths alone: many rows have two best classes."""
    return a_teacher_around(100.0, tmp_path_factory.mktemp("teacher"), cache_root)


def a_teacher_around(level: float, folder: Path, cache_root: str) -> str:
    rows = prepare(a_recipe([a_student("one")]).data, Path(cache_root)).train
    card = ModelCard.of(Mlp(hidden=8), rows, None)
    module = build(card, seed=1)
    with torch.no_grad():
        list(module.parameters())[-1].add_(level)  # the bias of its last layer
    save_model(folder, module, card)
    return str(folder)


@pytest.mark.parametrize(
    ("encoding", "store_format"),
    [
        ("float16", FORMAT_VERSION),
        *(pytest.param("float16", older, marks=pytest.mark.slow) for older in range(1, FORMAT_VERSION)),
        *(pytest.param("float32", one, marks=pytest.mark.slow) for one in range(1, FORMAT_VERSION + 1)),
    ],
)
def test_killed_anywhere_it_resumes_to_the_same_manifest(
    tmp_path: Path, cache_root: str, teacher_uri: str, forks: Any, encoding: str, store_format: int
) -> None:
    undisturbed = Case(str(tmp_path / "undisturbed"), cache_root, teacher_uri, encoding, store_format).fill()
    for failpoint in FAILPOINTS:
        case = Case(str(tmp_path / failpoint), cache_root, teacher_uri, encoding, store_format)
        process = forks.Process(target=fill_and_die, args=(case, failpoint))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, failpoint
        would = removal.gc(case.root, dry_run=True)
        assert removal.gc(case.root) == would, failpoint
        assert removal.gc(case.root) == [], failpoint
        assert_only_whole_things(Path(case.root), failpoint)
        assert case.fill() == undisturbed, failpoint
        assert removal.gc(case.root) == [], failpoint


def assert_only_whole_things(root: Path, failpoint: str) -> None:
    """No store without a shard, nothing in the making, no claim."""
    left = [path for path in root.rglob("*") if path.is_file()]
    assert [path for path in left if path.suffix in (".partial", ".claim", ".removing")] == [], failpoint
    for summary in catalog.list_stores(str(root)):
        assert summary.problem is None, failpoint
        assert summary.bytes > 0, failpoint
    assert len(list(root.iterdir())) == len(catalog.list_stores(str(root)))


def test_what_a_receipt_says_is_a_function_of_the_stored_bytes(
    tmp_path: Path, cache_root: str, teacher_uri: str
) -> None:
    """Also where float16 makes two classes equal: the first is chosen, whether the logits were computed or found."""
    case = Case(str(tmp_path), cache_root, teacher_uri, "float16", FORMAT_VERSION)
    case.fill()
    (summary,) = catalog.list_stores(case.root)
    store = catalog.find_store(case.root, read_manifest(f"{case.root}/{summary.id}").identity)
    assert store is not None
    rows = prepare(case.recipe.data, Path(cache_root)).train
    logits = store.rows(0, 0, len(rows))
    ties = np.sum(np.sort(logits, axis=1)[:, -1] == np.sort(logits, axis=1)[:, -2])
    assert ties > 20
    for shard, record in zip(store.layout.shards(), store.manifest.records(), strict=True):
        chosen = logits[shard.start : shard.stop].argmax(axis=1)
        assert record.label_agreement == np.mean(chosen == rows.labels[shard.start : shard.stop])


def test_shards_that_were_found_count_as_not_timed(tmp_path: Path, cache_root: str, teacher_uri: str) -> None:
    """What looking at a found shard takes says nothing of what a pass of the teacher takes."""
    case = Case(str(tmp_path), cache_root, teacher_uri, "float32", FORMAT_VERSION)
    case.fill()
    (store,) = tmp_path.iterdir()
    before = catalog.time_spent(str(store))
    (store / "manifest.json").unlink()
    (store / "receipts/0-0.json").unlink()
    (store / "receipts/0-1.json").write_bytes(b"{")
    case.fill()
    after = catalog.time_spent(str(store))
    assert before.rows - after.rows == 512
    assert 0 < after.seconds < before.seconds


def test_a_manifest_is_made_again_from_shards_alone(tmp_path: Path, cache_root: str, teacher_uri: str) -> None:
    case = Case(str(tmp_path), cache_root, teacher_uri, "float32", FORMAT_VERSION)
    undisturbed = case.fill()
    (store,) = tmp_path.iterdir()
    receipt = store / "receipts/0-2.json"
    receipt.write_bytes(receipt.read_bytes().replace(b'"label_agreement":0', b'"label_agreement":1'))
    (store / "receipts/0-3.json").unlink()
    (store / "manifest.json").write_bytes(b"{")
    mended = repair(case.root, store.name, None, cache_root, Console(quiet=True))
    assert mended["repaired"] == []  # nothing was computed: the shards are there
    assert sha256((store / "manifest.json").read_bytes()) == undisturbed


def test_a_remade_manifest_allows_no_other_computation(tmp_path: Path, cache_root: str, teacher_uri: str) -> None:
    """No sealed sha256 would tell a last bit that differs."""
    case = Case(str(tmp_path), cache_root, teacher_uri, "float16", FORMAT_VERSION)
    undisturbed = case.fill()
    (store,) = tmp_path.iterdir()
    (store / "manifest.json").write_bytes(b"{")
    (store / "arrays.zarr/logits/c/0/1/0").unlink()
    other = case.recipe.model_copy(update={"cache": case.recipe.cache.model_copy(update={"batch_rows": 200})})
    with pytest.raises(RefusedError, match="cannot be computed as it was") as refused:
        repair(case.root, store.name, other, cache_root, Console(quiet=True))
    assert "batch_rows: 200 != 256" in str(refused.value.got)
    assert (store / "manifest.json").read_bytes() == b"{"
    assert repair(case.root, store.name, None, cache_root, Console(quiet=True))["repaired"] == ["logits/c/0/1/0"]
    assert sha256((store / "manifest.json").read_bytes()) == undisturbed


# ---- what a refused command leaves


def test_a_refused_teacher_leaves_no_store(tmp_path: Path, cache_root: str) -> None:
    uri = a_teacher_around(float("inf"), tmp_path / "teacher", cache_root)
    recipe = Case("", cache_root, uri, "float16", FORMAT_VERSION).recipe
    root = tmp_path / "stores"
    for _ in range(2):
        with pytest.raises(RefusedError, match="not finite as float16"):
            cache_in_process(recipe, uri, store_root=str(root), cache_root=cache_root)
        assert list(root.iterdir()) == []


def test_a_teacher_that_is_not_trained_leaves_no_folder(tmp_path: Path, cache_root: str) -> None:
    recipe = a_recipe([a_student("one")])
    splits = prepare(recipe.data, Path(cache_root))

    def refuse(*_: object) -> dict[str, Any]:
        raise MachineError("Ray does not start")

    teacher = teacher_of(recipe, splits)
    assert teacher is not None
    with pytest.raises(MachineError, match="does not start"):
        ensure_trained(teacher, recipe, splits, Workspace(str(tmp_path), cache_root), refuse)
    assert [path for path in tmp_path.rglob("*") if path.name != "teachers"] == []


def test_a_refusal_keeps_the_shards_that_were_computed(
    tmp_path: Path, cache_root: str, teacher_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Case("", cache_root, teacher_uri, "float16", FORMAT_VERSION).recipe
    done = list[str]()

    def fail_at_the_third(job: teacher.CacheJob, shard: Any) -> Any:
        done.append(job.split)
        if len(done) == 3:
            raise RefusedError("the third")
        return cache_shard(job, shard)

    monkeypatch.setattr("akd_dist.jobs.cache_teacher.cache_shard", fail_at_the_third)
    with pytest.raises(RefusedError, match="the third"):
        cache_in_process(recipe, teacher_uri, store_root=str(tmp_path), cache_root=cache_root)
    (kept,) = catalog.list_stores(str(tmp_path))
    assert (kept.shards_done, kept.hint["split"]) == (2, "train")
    assert removal.gc(str(tmp_path)) == []
