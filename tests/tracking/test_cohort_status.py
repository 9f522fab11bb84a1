"""What a cohort tells as it goes, and a real fleet, watched."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

import akd_dist
from akd_dist.base.errors import RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import read_progress
from akd_dist.documents.status import CohortProgress, FleetPlan, StatusDocument
from akd_dist.jobs.fleet import Fleet
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.planning.planner import cohort_job
from akd_dist.jobs.stopping import StopFlag
from akd_dist.recipe import Recipe
from akd_dist.tracking.status import RunReader, write_document
from tests.fleets import ANNEALING, HARD, a_recipe, a_student, a_teacher, stores_of
from tests.run_folders import a_run, by_name, leave, planned
from tests.survivors import HELD_MODELS, a_held_model

# ---- what a cohort tells


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("status")


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    students = [a_student("annealing"), a_student("hard", objective=HARD)]
    return a_recipe(students, teacher={"weights": a_teacher(a_recipe(students), home / "teacher", home / "cache")})


@pytest.fixture(scope="module")
def stores(home: Path, recipe: Recipe) -> dict[str, str]:
    return stores_of(recipe, str(home / "teacher"), home)


def test_a_cohort_tells_of_every_student_as_it_goes(
    home: Path, recipe: Recipe, stores: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("akd_dist.distill.progress.PROGRESS_SECONDS", 0.0)
    told: list[CohortProgress] = []
    monkeypatch.setattr("akd_dist.distill.progress.write_document", lambda _path, document: told.append(document))
    splits = prepare(recipe.data, home / "cache")
    base = fleet_job(recipe, splits, stores, tmp_path, str(home / "cache"))
    train_cohort(cohort_job(base, tuple(recipe.students), {}))

    first, last = told[0], told[-1]
    assert [student.state for student in first.students] == ["training", "training"]
    assert [student.state for student in last.students] == ["done", "done"]
    story = [document.students[0] for document in told]
    assert {student.temperature for student in story if student.stage == "annealing"} == {2, 1}
    assert {student.temperature for student in story if student.stage == "hard_labels"} == {None}
    assert [student.steps for student in story] == sorted(student.steps for student in story)
    assert story[-1].steps == story[-1].steps_total
    middle = story[len(story) // 2]
    assert middle.loss is not None
    assert middle.validation is not None
    assert middle.rows_per_second > 0
    assert middle.seconds_left is not None
    assert middle.rows_per_second == pytest.approx(middle.steps_per_second * len(splits.train) * 3 / middle.steps_total)
    result = json.loads((tmp_path / "students" / "annealing" / "result.json").read_bytes())
    assert story[-1].validation == result["validation"]["accuracy"]


def test_a_shared_stage_is_counted_once(
    home: Path, stores: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = [ANNEALING | {"stage2_epochs": epochs} for epochs in (1, 2, 3)]
    students = [a_student(f"fork-{index}", objective=one) for index, one in enumerate(objectives)]
    recipe = a_recipe(students, teacher={"weights": str(home / "teacher")})
    splits = prepare(recipe.data, home / "cache")
    base = fleet_job(recipe, splits, stores, tmp_path, str(home / "cache"))
    fleet = Fleet(base, CostModel(base.device, len(splits.train)), StopFlag(), Console(quiet=True))
    fleet.waiting = [tuple(recipe.students)]
    before = fleet._plan()
    told: list[CohortProgress] = []
    monkeypatch.setattr("akd_dist.distill.progress.PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr("akd_dist.distill.progress.write_document", lambda _path, document: told.append(document))
    train_cohort(cohort_job(base, tuple(recipe.students), {}))
    fleet.waiting = []
    resumed = fleet._plan()
    stage1 = recipe.students[0].objective.epochs - 1
    own = [stage1 + 1, 2, 3]
    per_epoch = fleet.costs.steps_until(recipe.students[0], 1)
    documents: list[FleetPlan | CohortProgress] = [before, *told, resumed]
    for document in documents:
        assert [student.steps_total for student in document.students] == [per_epoch * epochs for epochs in own]
    write_document(tmp_path / "control" / "plan.json", before)
    after = RunReader(tmp_path).read()
    assert (after.steps, after.steps_total) == (per_epoch * sum(own), per_epoch * sum(own))
    assert {student.epochs_shared for student in after.students[1:]} == {stage1}


def test_what_was_planned_stays_although_a_leader_fails(tmp_path: Path) -> None:
    rider = {"epochs": 4, "epochs_shared": 3, "steps_total": 10}
    a_run(tmp_path, students=[planned(name, **rider) for name in ("rode", "alone", "unmade", "rides", "began")])
    leave(tmp_path, "rode", result={"stage1_from": "first"})
    leave(tmp_path, "alone", result={"stage1_from": None})
    leave(tmp_path, "unmade", result={"stage1_from": None, "epochs": 0, "state": "failed"})
    leave(tmp_path, "rides", checkpoint="000003-000002-1")
    leave(tmp_path, "began", checkpoint="000002-000005-1")
    students = by_name(RunReader(tmp_path).read())
    counts = {name: (one.steps, one.steps_total) for name, one in students.items()}
    assert counts == {"rode": (10, 10), "alone": (10, 10), "unmade": (0, 10), "rides": (2, 10), "began": (6, 10)}


def test_what_a_cohort_wrote_is_what_is_read(
    home: Path, recipe: Recipe, stores: dict[str, str], tmp_path: Path
) -> None:
    splits = prepare(recipe.data, home / "cache")
    job = cohort_job(fleet_job(recipe, splits, stores, tmp_path, str(home / "cache")), tuple(recipe.students), {})
    assert read_progress(job) is None
    train_cohort(job)
    document = read_progress(job)
    assert document is not None
    assert not document.training
    assert [student.name for student in document.students] == ["annealing", "hard"]


# ---- a real fleet, watched


@pytest.mark.ray
def test_a_fleet_is_watched_while_it_trains(
    home: Path, recipe: Recipe, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "held_models.py").write_text(HELD_MODELS)
    hold, run = tmp_path / "hold", tmp_path / "runs" / "fleet"
    hold.touch()
    students = [a_student(f"s{seed}", seed=seed, objective=HARD | {"epochs": 8}) for seed in range(2)]
    students.append(a_student("held", objective=HARD | {"epochs": 8}, model=a_held_model(at=150)))
    fleet = a_recipe(students, teacher={"weights": recipe.teacher.weights}, folder=str(tmp_path))
    seen: list[StatusDocument] = []
    over = threading.Event()

    def watch() -> None:
        reader = RunReader(run)
        while not over.wait(0.1):
            try:
                seen.append(reader.read())
            except RefusedError:
                continue
            training = [one for one in seen[-1].students if one.state == "training"]
            if any(one.rows_per_second > 0 and one.loss is not None for one in training):
                hold.unlink(missing_ok=True)  # until here, a student of them waits

    watcher = threading.Thread(target=watch)
    watcher.start()
    with open(tmp_path / "err", "w") as err:
        trained = akd_dist.train_students(
            fleet,
            store_root=str(home / "stores"),
            run_root=str(tmp_path / "runs"),
            cache_root=str(home / "cache"),
            trackers=["mlflow"],
            console=Console(file=err, width=80),
        )
    over.set()
    watcher.join()
    assert {student["state"] for student in trained["students"]} == {"done"}
    states = list(dict.fromkeys(status.state for status in seen))
    assert states[:2] == ["preparing", "training"]
    assert any(cohort.state == "starting" for status in seen for cohort in status.cohorts)
    assert not hold.exists(), "nobody was seen to train"
    done = RunReader(run).read()
    assert (done.state, done.over, done.steps) == ("done", 3, done.steps_total)

    told = (tmp_path / "err").read_text()
    assert "\r" not in told
    assert "training 3 students in 1 cohort" in told
    assert "s1 is done after 8 of 8 epochs: validation accuracy" in told
    for name in ("s0", "s1", "held"):
        events = EventAccumulator(str(run / "students" / name / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(range(8))
        assert len(events.Scalars("test/accuracy")) == 1
    assert len(list((run / "mlruns").glob("*/*/tags/akd_dist.student"))) == 3
