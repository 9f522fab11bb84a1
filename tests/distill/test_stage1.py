"""Stage I that was trained before, in this run or another: found by content, with the weights of each student alone."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base.locks import file_lock
from akd_dist.distill.checkpoint import decode, encode
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import CohortJob
from akd_dist.distill.stage1 import stage1_key, stages1_there
from akd_dist.distill.student import Student
from akd_dist.recipe import Custom, CustomAugmentation, CustomMetric, Recipe
from akd_dist.storage import removal
from akd_dist.storage.mean import Mixture, uris_of
from tests.distill.test_cohort import job_of
from tests.fleets import ANNEALING, HARD, a_recipe, a_student, weights

SHORT = a_student("short")
LONG = a_student("long", objective=ANNEALING | {"stage2_epochs": 3})
OTHERS = [
    a_student("other-seed", seed=1, objective=ANNEALING | {"stage2_epochs": 3}),
    a_student("other-length", objective=ANNEALING | {"stage1_epochs": 3}),
    a_student("other-tau", objective=ANNEALING | {"tau_max": 1}),
    a_student("from-labels", objective=HARD),
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return a_recipe([SHORT, LONG, *OTHERS])


@pytest.fixture(scope="module")
def alone(recipe: Recipe, stores: dict[str, str], home: Path) -> dict[str, str]:
    """Every student by itself, with nothing shared."""
    for spec in recipe.students:
        train_cohort(job_of(recipe, stores, home, home / "alone", students=(spec,)))
    return weights(home / "alone")


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Epochs that each student trains from here on."""
    trained: dict[str, int] = {}
    end_epoch = Student.end_epoch

    def counting(student: Student, *arguments: Any) -> Any:
        trained[student.spec.name] = trained.get(student.spec.name, 0) + 1
        return end_epoch(student, *arguments)

    monkeypatch.setattr(Student, "end_epoch", counting)
    return trained


class Runs:
    """Runs of single students that share stages I under a folder."""

    def __init__(self, recipe: Recipe, stores: dict[str, str], home: Path, root: Path) -> None:
        self.recipe, self.stores, self.home, self.root = recipe, stores, home, root
        (root / "stages").mkdir(exist_ok=True)

    def job(self, student: str, run: str) -> CohortJob:
        specs = tuple(spec for spec in self.recipe.students if spec.name == student)
        return job_of(
            self.recipe, self.stores, self.home, self.root / run, students=specs, stages=str(self.root / "stages")
        )

    def train(self, student: str, run: str) -> Any:
        (result,) = train_cohort(self.job(student, run))["students"]
        return result

    def left(self) -> list[Path]:
        return sorted((self.root / "stages").rglob("*.ckpt"))

    def log(self, student: str, run: str) -> str:
        return (self.root / run / "logs" / f"{student}.log").read_text()


@pytest.fixture
def runs(recipe: Recipe, stores: dict[str, str], home: Path, tmp_path: Path) -> Runs:
    return Runs(recipe, stores, home, tmp_path)


def lines(folder: Path) -> list[dict[str, Any]]:
    found = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


def test_a_student_of_another_run_begins_with_stage_two(
    runs: Runs, alone: dict[str, str], epochs: dict[str, int], home: Path
) -> None:
    first = runs.train("short", "one")
    assert (first["stage1_from"], epochs["short"]) == (None, 3)
    (left,) = runs.left()
    job = runs.job("long", "two")
    assert stages1_there(job, list(job.students)) == {"long": f"stages/{left.name}"}
    longer = runs.train("long", "two")
    assert (longer["stage1_from"], longer["epochs"], epochs["long"]) == ("one/short", 5, 3)
    assert "goes on from the stage I of one/short, which is the same" in runs.log("long", "two")
    assert weights(runs.root / "one") | weights(runs.root / "two") == {name: alone[name] for name in ("short", "long")}
    assert lines(runs.root / "two/students/long") == lines(home / "alone/students/long")
    again = runs.train("short", "two")
    assert again["stage1_from"] == "one/short"
    assert runs.left() == [left]


def test_in_one_run_it_is_called_by_its_name(runs: Runs, alone: dict[str, str]) -> None:
    runs.train("short", "one")
    assert runs.train("long", "one")["stage1_from"] == "short"
    assert weights(runs.root / "one")["long"] == alone["long"]


def test_what_code_of_the_users_own_reads_is_not_known(runs: Runs, tmp_path: Path) -> None:
    job = runs.job("short", "one")
    (spec,) = job.students
    assert stage1_key(job, spec) is not None
    (tmp_path / "nets.py").write_text("def net(input_shape, classes):\n    ...\n")
    own_model = spec.model_copy(update={"model": Custom(factory="nets:net", arguments={"path": "./w.json"})})
    assert stage1_key(job, own_model) is None
    data = job.data.model_copy(update={"metric": CustomMetric(factory="nets:measure")})
    assert stage1_key(replace(job, data=data), spec) is None
    data = job.data.model_copy(update={"augmentation": CustomAugmentation(factory="nets:views")})
    assert stage1_key(replace(job, data=data), spec) is None


@pytest.mark.parametrize("other", [block["name"] for block in OTHERS])
def test_another_stage_one_is_trained_anew(
    runs: Runs, alone: dict[str, str], epochs: dict[str, int], other: str
) -> None:
    runs.train("short", "one")
    result = runs.train(other, "two")
    assert result["stage1_from"] is None
    assert epochs[other] == result["epochs"]
    assert weights(runs.root / "two")[other] == alone[other]


def test_what_a_stage_one_depends_on_is_in_its_name(runs: Runs) -> None:
    job = runs.job("short", "one")
    (spec,) = job.students
    data, (uri, *_) = job.data.model_copy(update={"seed": 5}), uris_of(job.stores)
    others = [
        replace(job, data=data),
        replace(job, fingerprints=job.fingerprints | {"train": "ab"}),
        replace(job, fingerprints=job.fingerprints | {"validation": "ab"}),
        replace(job, stores={**job.stores, "train": "/elsewhere/" + "ab" * 32}),
        replace(job, stores={**job.stores, "train": Mixture((uri, "/elsewhere/" + "ab" * 32), (0.5, 0.5), "logits")}),
    ]
    keys = {stage1_key(one, spec) for one in [job, *others]}
    assert len(keys) == 6
    assert None not in keys
    moved = replace(job, stores={"train": f"s3://bucket/{uri.rpartition('/')[2]}"})
    assert stage1_key(moved, spec) == stage1_key(job, spec), "wherever the store lies"
    renamed = spec.model_copy(update={"name": "x", "gpus": 0.5})
    also = replace(job, stacks=dict.fromkeys([*job.stacks, "x"], 8))
    assert stage1_key(also, renamed) == stage1_key(job, spec)
    assert stage1_key(replace(job, stacks={}), spec) != stage1_key(job, spec), "steps in a stack round otherwise"


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_one_is_told_trained_anew_and_left_again(runs: Runs, alone: dict[str, str], damage: str) -> None:
    runs.train("short", "one")
    (left,) = runs.left()
    kept = left.read_bytes()
    data = bytearray(kept)
    data[-3] ^= 1
    tree = decode(kept) | {"weights": {"x": decode(kept)["weights"].popitem()[1]}}
    left.chmod(0o644)
    left.write_bytes({"cut": kept[:50], "flipped": bytes(data), "other": encode(tree)}[damage])
    result = runs.train("long", "two")
    assert result["stage1_from"] is None
    assert weights(runs.root / "two")["long"] == alone["long"]
    assert "its stage I is trained: " in runs.log("long", "two")
    assert decode(left.read_bytes())["student"] == "long"


def test_where_it_cannot_be_left_the_student_trains_on(
    runs: Runs, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (runs.root / "stages" / "stages").write_text("in the way")
    assert runs.train("short", "one")["state"] == "done"
    assert weights(runs.root / "one")["short"] == alone["short"]
    assert "is not shared" in runs.log("short", "one")


def test_gc_knows_them(runs: Runs, tmp_path: Path) -> None:
    runs.train("short", "one")
    (left,) = runs.left()
    root, cache = str(runs.root / "stages"), tmp_path / "no-cache"
    assert removal.disused(root, cache, older_than=3600) == []
    (found,) = removal.disused(root, cache, older_than=0)
    assert (found.store.id, found.store.bytes, found.kept) == (f"stages/{left.stem}", left.stat().st_size, None)
    assert removal.remove_store(root, found.store.id, cache) is None
    assert runs.left() == []
    assert list((runs.root / "stages").rglob("*.json")) == []
    assert runs.train("long", "two")["stage1_from"] is None


def test_who_takes_one_is_recorded(runs: Runs, tmp_path: Path) -> None:
    runs.train("short", "one")
    assert runs.train("long", "two")["stage1_from"] == "one/short"
    (left,) = runs.left()
    root, cache = str(runs.root / "stages"), tmp_path / "no-cache"
    os.utime(left, (1e9, 1e9))
    assert removal.disused(root, cache, unused_for=3600) == []
    (found,) = removal.disused(root, cache, older_than=3600)
    (use,) = found.store.uses
    assert (Path(use.run), found.kept) == (runs.root / "two", None)
    with file_lock(runs.root / "two" / "lock", what="the run"):
        (found,) = removal.disused(root, cache, older_than=3600)
        assert found.kept == f"in use by the run {runs.root / 'two'} on {use.host}"
        assert removal.remove_store(root, found.store.id, cache) == found.kept
    assert runs.left() == [left]
    assert removal.remove_store(root, found.store.id, cache) is None
    assert [one for one in (runs.root / "stages").rglob("*") if one.is_file()] == []
