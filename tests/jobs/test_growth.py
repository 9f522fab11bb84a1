"""Runs that grow: students come and go, and whoever is not concerned stays as it is to the byte."""

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import akd_dist
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.base.locks import file_lock
from akd_dist.cli import main
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import CohortJob
from akd_dist.documents.fleet import RunIdentity
from akd_dist.jobs import ray_train
from akd_dist.jobs.growth import Growth, has_begun, names_in_run, settle
from akd_dist.recipe import Recipe
from akd_dist.storage.run_copy import MODEL, RunCopy
from akd_dist.storage.run_objects import RunObjects
from tests.fleets import ANNEALING, HARD, KD, a_recipe, a_student, a_teacher, weights
from tests.survivors import snapshot

QUIET = Console(quiet=True)
RATE = {"kind": "sgd", "lr": 0.1}


def students_of(recipe: Recipe) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(recipe.identity()))["students"]
    return document


def run_of(*students: dict[str, Any], **more: Any) -> RunIdentity:
    recipe = a_recipe(list(students))
    return RunIdentity(teacher={}, dataset={}, students=students_of(recipe), **more)


def grown(run: Path, saved: RunIdentity, *students: dict[str, Any]) -> tuple[list[str], Growth]:
    recipe = a_recipe(list(students))
    settled, growth = settle(run, saved, recipe, students_of(recipe))
    return [spec.name for spec in settled.students], growth


def test_who_is_new_who_is_kept_and_who_is_out(tmp_path: Path) -> None:
    saved = run_of(a_student("a"), a_student("b", objective=HARD))
    names, growth = grown(tmp_path, saved, a_student("a"), a_student("c", seed=3))
    assert names == ["a", "c"]
    assert (growth.kept, growth.added, growth.taken_out, growth.refused) == (["a"], ["c"], ["b"], [])
    assert growth.lines == ["1 student new, 1 kept", "taken out, and left on disk: b"]
    identity = growth.into({"students": {}})
    assert set(identity["taken_out"]) == {"b"}
    assert [(change["added"], change["taken_out"]) for change in identity["history"]] == [(["c"], ["b"])]


def test_a_run_that_is_as_the_recipe_says_has_nothing_to_tell(tmp_path: Path) -> None:
    saved = run_of(a_student("a"), a_student("b", objective=HARD))
    names, growth = grown(tmp_path, saved, a_student("b", objective=HARD), a_student("a"))
    assert (names, growth.lines, growth.told) == (["b", "a"], [], {})
    assert growth.into({"students": {}}) == {"students": {}}, "identities of runs that never changed are as ever"


def test_a_student_that_was_taken_out_comes_back_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    _, growth = grown(tmp_path, run_of(a_student("a"), a_student("b", objective=HARD)), a_student("a"))
    (tmp_path / "students" / "b").mkdir(parents=True)
    saved = RunIdentity.model_validate(growth.into(run_of(a_student("a")).plain()))
    names, back = grown(tmp_path, saved, a_student("a"), a_student("b", objective=HARD))
    assert (names, back.taken_out, back.out) == (["a", "b"], [], {})
    assert [change.added for change in back.history] == [[], ["b"]]
    names, other = grown(tmp_path, saved, a_student("a"), a_student("b", objective=KD))
    assert names == ["a"]
    assert [one.name for one in other.refused] == ["b"]
    assert "objective.kind: hard_labels -> kd" in other.refused[0].differences


def test_a_student_that_has_changed_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "students" / "a").mkdir(parents=True)
    saved = run_of(a_student("a"), a_student("b", objective=HARD))
    names, growth = grown(tmp_path, saved, a_student("a", optimizer=RATE), a_student("b", objective=HARD))
    assert names == ["b"]
    assert growth.taken_out == []
    (line,) = growth.lines
    assert line.startswith("refused: a, which the run has otherwise (")
    assert "optimizer.lr: 0.005 -> 0.1" in line
    assert line.endswith("give it another name, or train it in another run")
    with pytest.raises(RecipeError, match=r"students a: .*optimizer\.lr: 0\.005 -> 0\.1"):
        grown(tmp_path, saved, a_student("a", optimizer=RATE))


def test_a_longer_student_is_said_to_be_trained_from_its_start(tmp_path: Path) -> None:
    saved = run_of(a_student("a", objective=KD), a_student("b"))
    longer = a_student("c", objective=KD | {"epochs": 9})
    later = a_student("d", objective=ANNEALING | {"stage2_epochs": 4})  # goes on from what b left of its stage I
    annealed = a_student("e", objective=ANNEALING | {"stage1_epochs": 4})
    _, growth = grown(tmp_path, saved, a_student("a", objective=KD), a_student("b"), longer, later, annealed)
    assert growth.again == {"c": "a but for epochs: 3 -> 9", "e": "b but for stage1_epochs: 2 -> 4"}
    assert (
        "trained from their start, since their schedules are others: c, like a but for epochs: 3 -> 9, e"
        in " ".join(growth.lines)
    )


def test_a_student_that_never_began_may_change(tmp_path: Path) -> None:
    saved = run_of(a_student("a"))
    assert not has_begun(tmp_path, "a")
    names, growth = grown(tmp_path, saved, a_student("a", optimizer=RATE))
    assert (names, growth.added, growth.refused) == (["a"], ["a"], [])


def test_an_old_name_serves_one_of_several_equal_students(tmp_path: Path) -> None:
    saved = run_of(a_student("old"))
    names, growth = grown(tmp_path, saved, a_student("a"), a_student("b"), a_student("c", objective=HARD))
    assert names == ["old", "b", "c"]
    assert (growth.kept, growth.added, growth.renamed) == (["old"], ["b", "c"], {"a": "old"})
    two = run_of(a_student("x"), a_student("y"))
    names, growth = grown(tmp_path, two, a_student("a"), a_student("b"), a_student("c"))
    assert (names, growth.added) == (["x", "y", "c"], ["c"])
    saved = run_of(a_student("old-s0"))
    assert grown(tmp_path, saved, a_student("a"), a_student("b", objective=HARD))[0] == ["old-s0", "b"]


def test_a_name_that_differs_from_one_of_the_run_by_case_alone_is_refused(tmp_path: Path) -> None:
    saved = run_of(a_student("a"), taken_out=students_of(a_recipe([a_student("Out", objective=HARD)])))
    for name in ("A", "oUT"):
        with pytest.raises(RecipeError, match="by the case of letters alone") as refused:
            grown(tmp_path, saved, a_student(name, objective=KD), a_student("b"))
        assert f"{name}, and the run has" in str(refused.value.got)
    assert grown(tmp_path, saved, a_student("A"))[0] == ["a"], "the same student by its name in the run"


def test_students_are_found_by_what_they_are_where_a_grid_gives_them_other_names() -> None:
    before = students_of(a_recipe([a_student("mlp-s0"), a_student("mlp-s1", seed=1)]))
    now = students_of(
        a_recipe(
            [
                a_student("mlp-lr0.005-s0"),
                a_student("mlp-lr0.005-s1", seed=1),
                a_student("mlp-lr0.005-s2", seed=2),
                a_student("mlp-lr0.1-s0", optimizer=RATE),
            ]
        )
    )
    assert names_in_run(before, now) == {
        "mlp-lr0.005-s0": "mlp-s0",
        "mlp-lr0.005-s1": "mlp-s1",
        "mlp-lr0.005-s2": "mlp-s2",
        "mlp-lr0.1-s0": "mlp-lr0.1-s0",
    }


def test_further_seeds_and_temperatures_of_a_grid_rename_nobody() -> None:
    def named(seeds: list[int], taus: list[int]) -> dict[str, Any]:
        blocks = [
            a_student("x", seed=seed, objective={"kind": "annealing_kd", "tau_max": tau, "stage1_epochs": 4,
                                                 "stage2_epochs": 1})
            for seed in seeds for tau in taus
        ]  # fmt: skip
        for block in blocks:
            del block["name"]
        return students_of(a_recipe(blocks))

    before, now = named([0, 1], [2]), named([0, 1, 2], [2, 4])
    assert set(before) < set(now)
    assert all(given == name for given, name in names_in_run(before, now).items())


# ---- whole commands; cohorts train in this process, and all else is as always


@contextlib.contextmanager
def cohorts_here() -> Iterator[None]:
    def fit(job: CohortJob, *_: Any) -> str:
        train_cohort(job)
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_train, "fit", fit)
        yield


class Home:
    """A teacher, and commands on recipes of its students."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.teacher = a_teacher(a_recipe([a_student("any")]), root / "teacher", root / "cache")

    def recipe(self, *students: dict[str, Any], **changes: Any) -> Recipe:
        return a_recipe(list(students), teacher={"weights": self.teacher}, **changes)

    def train(self, run_root: Any, *students: dict[str, Any], dry_run: bool = False, **changes: Any) -> dict[str, Any]:
        with cohorts_here():
            return akd_dist.train_students(
                self.recipe(*students, **changes),
                store_root=self.root / "stores",
                run_root=run_root,
                cache_root=self.root / "cache",
                console=QUIET,
                dry_run=dry_run,
            )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Home:
    return Home(tmp_path_factory.mktemp("growth"))


SHORT = HARD | {"epochs": 1}
A, B, C = (a_student(f"mlp-s{seed}", objective=SHORT, seed=seed) for seed in range(3))


@pytest.mark.ray
def test_a_run_grows_and_leaves_alone_who_is_not_concerned(
    place: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "fleet"
    place.train(tmp_path, A, B)
    before = {name: snapshot(run / "students" / name) for name in ("mlp-s0", "mlp-s1")}
    logs = {name: (run / "logs" / f"{name}.log").stat() for name in before}
    planned = place.train(tmp_path, A, C, dry_run=True)
    assert ([one["name"] for one in planned["ended"]], planned["taken_out"]) == (["mlp-s0"], ["mlp-s1"])
    assert [one["standing"] for cohort in planned["cohorts"] for one in cohort["students"]] == ["new"]

    found = place.train(tmp_path, A, C)
    assert [student["name"] for student in found["students"]] == ["mlp-s0", "mlp-s2"]
    assert found["taken_out"] == ["mlp-s1"]
    assert "still in the run: mlp-s1" in (run / "report.html").read_text()
    assert {name: snapshot(run / "students" / name) for name in before} == before
    assert {name: (run / "logs" / f"{name}.log").stat().st_mtime_ns for name in before} == {
        name: stat.st_mtime_ns for name, stat in logs.items()
    }
    with pytest.raises(SystemExit):
        main(["status", str(run), "--json"])
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["students"]] == ["mlp-s0", "mlp-s2"]
    assert place.train(tmp_path, A, C) == found, "done: the saved results"

    alone = tmp_path / "alone"
    place.train(alone, C)
    assert weights(alone / "fleet")["mlp-s2"] == weights(run)["mlp-s2"]

    whole = place.train(tmp_path, A, B, C)  # nothing to train, and another table
    assert [student["name"] for student in whole["students"]] == ["mlp-s0", "mlp-s1", "mlp-s2"]
    assert "taken_out" not in whole
    assert {name: snapshot(run / "students" / name) for name in before} == before
    history = json.loads((run / "identity.json").read_bytes())["history"]
    assert [(one["added"], one["taken_out"]) for one in history] == [(["mlp-s2"], ["mlp-s1"]), (["mlp-s1"], [])]


@pytest.mark.ray
def test_a_changed_student_is_left_out_and_the_command_says_so(place: Home, tmp_path: Path) -> None:
    place.train(tmp_path, A, B)
    run, changed = tmp_path / "fleet", B | {"optimizer": RATE}
    before = snapshot(run / "students" / "mlp-s1")
    assert place.train(tmp_path, A, changed, C, dry_run=True)["refused"][0]["name"] == "mlp-s1"
    found = place.train(tmp_path, A, changed, C)
    assert [student["name"] for student in found["students"]] == ["mlp-s0", "mlp-s2"]
    assert "optimizer.lr: 0.005 -> 0.1" in found["refused"][0]["differences"]
    assert snapshot(run / "students" / "mlp-s1") == before
    again = place.train(tmp_path, A, B, C)
    assert "refused" not in again
    assert [student["state"] for student in again["students"]] == ["done"] * 3
    with pytest.raises(RefusedError, match="made from another recipe, data or teacher") as refused:
        place.train(tmp_path, A, data={"train": {"kind": "digits"}, "seed": 4})
    assert "data.seed: 0 -> 4" in str(refused.value.got)


@pytest.mark.ray
def test_a_run_grows_once_who_drives_it_is_done(place: Home, tmp_path: Path) -> None:
    """What the run has is looked at after the wait: whoever was waited for may have made it grow."""
    place.train(tmp_path, A)
    told = Console(file=io.StringIO(), width=200)
    held, over = threading.Event(), threading.Event()

    def other() -> None:
        with file_lock(tmp_path / "fleet" / "lock", what="the run"):
            held.set()
            over.wait(600)
            file = tmp_path / "fleet" / "identity.json"
            identity = json.loads(file.read_bytes())
            identity["students"] |= {"mlp-s1": identity["students"]["mlp-s0"] | {"name": "mlp-s1", "seed": 1}}
            file.write_text(json.dumps(identity))

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(60)
    threading.Timer(0.5, over.set).start()
    with cohorts_here():
        found = akd_dist.train_students(
            place.recipe(A, C),
            store_root=place.root / "stores",
            run_root=tmp_path,
            cache_root=place.root / "cache",
            console=told,
            wait=True,
        )
    thread.join()
    assert found["taken_out"] == ["mlp-s1"]
    assert [student["name"] for student in found["students"]] == ["mlp-s0", "mlp-s2"]
    text = told.file.getvalue()  # type: ignore[attr-defined]
    assert text.index("waiting for") < text.index("1 student new, 1 kept")


@pytest.mark.ray
def test_a_run_in_object_storage_grows(place: Home, bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/grown"
    place.train(root, A, B)
    objects = RunObjects.at(f"{root}/fleet").root
    before = {key: stat for key, stat in objects.list().items() if key.startswith("students/")}
    found = place.train(root, A, C)
    assert (found["run"], found["taken_out"]) == (f"{root}/fleet", ["mlp-s1"])
    assert [student["name"] for student in found["students"]] == ["mlp-s0", "mlp-s2"]
    after = objects.list()
    assert {key: after[key] for key in before} == before
    copy = RunCopy(f"{root}/fleet", tmp_path / "copy")
    copy.refresh(MODEL)
    assert set(json.loads((copy.folder / "identity.json").read_bytes())["students"]) == {"mlp-s0", "mlp-s2"}
    changed = place.train(root, A, C | {"optimizer": RATE})
    assert [one["name"] for one in changed["refused"]] == ["mlp-s2"]
