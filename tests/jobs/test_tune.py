"""Searches as whole commands; cohorts train in this process, and all else is as always."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import akd_dist
from akd_dist.base.errors import RecipeError
from akd_dist.base.formatting import metric_format
from akd_dist.cli import main
from akd_dist.cli.tune import of_test_rows
from akd_dist.distill.stack import Stack
from akd_dist.distill.stack_evaluation import evaluate_together
from akd_dist.distill.student import Student
from akd_dist.documents.tune import TuneDocument, TunedSearch, TunedSeed
from akd_dist.jobs.tune import Halving, _as_planned, _document
from akd_dist.recipe import load_recipe, load_search
from akd_dist.reporting.seeds import estimate
from akd_dist.storage.run_objects import RunObjects
from tests.fleets import a_recipe, a_student, a_teacher, weights
from tests.jobs.test_growth import cohorts_here
from tests.survivors import snapshot

QUIET = Console(quiet=True)
RECIPE = """
name: digits
data: {{train: {{kind: digits}}, views: 2, augmentation: {{kind: shift, pixels: 1}}}}
teacher: {{weights: {teacher}}}
checkpoint_seconds: 30
students:
  - model: {{kind: mlp, hidden: 8}}
    objective: {{kind: annealing_kd, tau_max: 2}}
    optimizer: {{kind: sgd, momentum: 0.9}}
    batch: 256
    search:
      objective.stage1_epochs: {{low: 2, high: 4}}
      objective.stage2_epochs: [1, 2]
      optimizer.lr: {{low: 1e-3, high: 1.0, log: true}}
      trials: {trials}
  - {{model: {{kind: mlp, hidden: 4}}, objective: {{kind: hard_labels, epochs: 1}}, optimizer: {{kind: sgd, lr: 0.1}}}}
"""


class Searching:
    """A recipe with a search, and commands on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.teacher = a_teacher(a_recipe([a_student("any")]), root / "teacher", root / "cache")

    def recipe(self, folder: Path, trials: int = 4, **changes: str) -> Path:
        path = folder / "recipe.yaml"
        text = RECIPE.format(teacher=self.teacher, trials=trials)
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
        return path

    def places(self, folder: Path) -> dict[str, Any]:
        return {"store_root": self.root / "stores", "run_root": folder, "cache_root": self.root / "cache"}

    def tune(self, folder: Path, recipe: Path, **options: Any) -> TuneDocument:
        with cohorts_here():
            found = akd_dist.tune(recipe, console=QUIET, **{**self.places(folder), **options})
        return TuneDocument.model_validate(found)


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Searching:
    return Searching(tmp_path_factory.mktemp("tune"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each epoch that a student trains, and how many rows it is evaluated on."""
    found: list[tuple[str, int]] = []
    evaluate = Student.evaluate

    def watched(student: Student, rows: Any) -> Any:
        found.append((student.spec.name, len(rows)))
        return evaluate(student, rows)

    def together(stack: Stack, rows: Any, own: Any) -> Any:
        found.extend((student.spec.name, len(rows)) for student in stack.students)
        return evaluate_together(stack, rows, own)

    monkeypatch.setattr(Student, "evaluate", watched)
    monkeypatch.setattr("akd_dist.distill.lockstep.evaluate_together", together)
    return found


@pytest.mark.ray
def test_a_search_halves_resumes_and_reads_test_rows_for_the_best_alone(
    searching: Searching, tmp_path: Path, seen: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = searching.recipe(tmp_path)
    planned = searching.tune(tmp_path, recipe, dry_run=True)
    assert planned.dry_run
    assert planned.left_out == 1
    assert not (tmp_path / "digits-tune" / "identity.json").exists()

    found = searching.tune(tmp_path, recipe)
    (search,) = found.searches
    run = tmp_path / "digits-tune"
    assert [len(trial.rungs) for trial in search.trials] == [2] * 4
    firsts = {trial.number: trial.scores[0] for trial in search.trials}
    ended = [trial.number for trial in search.trials if len(trial.scores) == 2]
    assert search.best in ended
    assert all(firsts[number] == max(firsts.values()) for number in ended), "one of four goes on, and its equals"
    trained = {name: sum(one == name for one, _ in seen) for name, _ in seen}
    for trial in search.trials:
        assert trained[trial.students[0]] == trial.rungs[1 if trial.number in ended else 0], "nothing is trained twice"
    assert {rows for _, rows in seen} == {180}, "validation rows, and no student saw another"
    assert not list(run.glob("students/*/test.parquet"))
    assert all(json.loads(path.read_bytes())["test"] is None for path in run.glob("students/*/result.json"))
    fleet = json.loads((run / "fleet.json").read_bytes())
    assert fleet["test_withheld"]
    assert (run / "report.html").exists()

    best = search.trials[search.best or 0]
    (seed,) = search.seeds
    measured = akd_dist.evaluate(
        run / "students" / seed.student, run, split="test", cache_root=searching.root / "cache"
    )
    assert seed.test == pytest.approx(measured["student"]["metrics"]["accuracy"])

    before, epochs = snapshot(run / "students"), len(seen)
    assert searching.tune(tmp_path, recipe) == found, "the saved result"
    assert snapshot(run / "students") == before
    assert len(seen) == epochs

    block = tmp_path / "best.yaml"
    text = recipe.read_text()
    block.write_text(text[: text.index("students:")] + "students:\n" + search.block)
    (spec,) = load_recipe(block).students
    assert spec.optimizer.lr == best.values["optimizer.lr"]
    with cohorts_here():
        akd_dist.train_students(block, console=QUIET, **searching.places(tmp_path / "alone"))
    (alone,) = weights(tmp_path / "alone" / "digits").values()
    assert alone == weights(run)[seed.student], "waiting at a rung changes no bit"

    with pytest.raises(SystemExit) as left:
        main(["tune", str(recipe), *(part for key, value in searching.places(tmp_path).items()
                                      for part in (f"--{key.replace('_', '-')}", str(value)))])  # fmt: skip
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert f"k{search.best:03d} *" in out
    assert "best    as a block of students:" in out


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ([0.9], "90.00 %"),
        ([0.9, 0.8], "85.00 ± 7.07 % (standard deviation over 2 seeds)"),
        ([0.9, 0.8, 0.7], "80.00 ± 24.84 % (95 % interval over 3 seeds)"),
    ],
)
def test_what_follows_the_mean_of_the_test_rows_has_a_name(test: list[float], told: str) -> None:
    seeds = [TunedSeed(seed=seed, student=f"s{seed}", validation=0.5, test=one) for seed, one in enumerate(test)]
    search = TunedSearch(
        name="s", reduction=3, trials=[], best=1, validation=0.5, seeds=seeds,
        test=estimate(dict(enumerate(test))), block="",
    )  # fmt: skip
    assert search.test is not None
    assert of_test_rows(search, search.test, metric_format("accuracy")) == told


@pytest.mark.ray
def test_more_trials_go_on_and_another_search_is_refused(
    searching: Searching, tmp_path: Path, seen: list[tuple[str, int]]
) -> None:
    first = searching.tune(tmp_path, searching.recipe(tmp_path, trials=3))
    count = len(seen)
    more = searching.tune(tmp_path, searching.recipe(tmp_path, trials=4))
    (old,), (new,) = first.searches, more.searches
    assert [one.values for one in new.trials[:3]] == [one.values for one in old.trials]
    assert {name for name, _ in seen[count:]} <= {new.trials[3].students[0], *_new_finalists(old, new)}
    halved = searching.recipe(tmp_path, trials=4, **{"trials: 4": "trials: 4\n      reduction: 2"})
    planned, found = (searching.tune(tmp_path, halved, dry_run=dry).searches[0] for dry in (True, False))
    assert (planned.reduction, found.reduction) == (2, 2)
    assert [one.rungs for one in found.trials] == [one.rungs for one in planned.trials]
    assert [one.values for one in found.trials] == [one.values for one in new.trials]
    other = searching.recipe(tmp_path, trials=4, **{"high: 1.0": "high: 0.5"})
    with pytest.raises(RecipeError, match="holds another search") as refused:
        searching.tune(tmp_path, other)
    assert "optimizer.lr" in str(refused.value.got)
    assert "--set name=" in str(refused.value.next)


@pytest.mark.ray
def test_a_search_that_loses_every_trial_says_so_and_tries_again_what_failed(
    searching: Searching, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = searching.recipe(tmp_path, trials=3, **{"{low: 1e-3, high: 1.0, log: true}": "[1.0e+30, 2.0e+30]"})
    (search,) = searching.tune(tmp_path, recipe).searches
    run = tmp_path / "digits-tune"
    assert search.best is None
    assert all(trial.lost is not None and " diverged: " in trial.lost for trial in search.trials)
    assert (run / "report.html").exists()
    assert {one["state"] for one in json.loads((run / "fleet.json").read_bytes())["students"]} == {"diverged"}

    (lost, *_) = search.trials[0].students
    path = run / "students" / lost / "result.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"state": "failed", "reason": "a full disk"}))
    (again,) = searching.tune(tmp_path, recipe).searches
    assert again == search
    assert json.loads(path.read_bytes())["state"] == "diverged"

    places = [part for key, value in searching.places(tmp_path).items()
              for part in (f"--{key.replace('_', '-')}", str(value))]  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["tune", str(recipe), *places])
    assert left.value.code == 1
    out = capsys.readouterr().out
    assert "every trial that was left ended without a result; k000: " in out
    assert "epochs  " not in out


@pytest.mark.ray
def test_a_search_in_object_storage(searching: Searching, bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/tuned"
    recipe = searching.recipe(tmp_path, trials=3)
    found = searching.tune(tmp_path, recipe, run_root=root)
    assert found.run == f"{root}/digits-tune"
    (search,) = found.searches
    objects = RunObjects.at(found.run).root
    kept = json.loads(objects.get("tune.json"))
    assert (kept["run"], kept["searches"][0]["best"]) == (".", search.best)
    local = searching.tune(tmp_path, recipe)
    assert local.searches == found.searches, "wherever the run lies"
    assert searching.tune(tmp_path, recipe, run_root=root, cache_root=tmp_path / "cache") == found


def _new_finalists(old: Any, new: Any) -> set[str]:
    ended = {one.number for one in old.trials if len(one.scores) == len(one.rungs)}
    return {one.students[0] for one in new.trials if len(one.scores) == len(one.rungs) and one.number not in ended}


def test_who_is_kept(searching: Searching, tmp_path: Path) -> None:
    given = load_search(searching.recipe(tmp_path, trials=9))
    halving = Halving.of(given.tunings[0], {spec.name: spec for spec in given.recipe.students})
    scores: dict[int, float | None] = {0: 0.1, 1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6, 5: None, 6: 0.2, 7: 0.3, 8: 0.4}
    assert halving.kept(scores) == [1, 2, 3]
    assert halving.kept(scores | {4: 0.7}) == [1, 2, 3, 4], "who is as good as the last that is kept"
    assert halving.kept({1: None, 2: None}) == []
    assert halving.kept({1: None, 2: 0.5}) == [2]
    assert halving.kept({7: 0.5, 8: 0.6}) == [8]
    lowest = dataclasses.replace(halving, metric="cross_entropy")
    assert lowest.kept(scores) == [0, 6, 7], "of a metric of which less is better, the lowest"
    assert halving.budget < sum(rungs[-1] for rungs in halving.rungs.values())


def test_what_a_search_trains_is_planned_once(searching: Searching, tmp_path: Path) -> None:
    given = load_search(searching.recipe(tmp_path, trials=9))
    halving = Halving.of(given.tunings[0], {spec.name: spec for spec in given.recipe.students})
    seeds = len(given.tunings[0].trials[0].students)
    longest = sorted(halving.rungs, key=lambda number: halving.rungs[number], reverse=True)
    left, behind = longest, 0
    for rung in range(halving.count - 1):
        now = sum(halving.rungs[number][rung] for number in left) * seeds
        assert behind + now + halving.later(left, rung) == halving.budget
        kept = left[: max(1, len(left) // halving.tuning.search.reduction)]
        behind += sum(halving.rungs[number][rung] for number in left if number not in kept) * seeds
        left = kept
    assert halving.behind(left) == behind
    assert halving.later(longest, -1) == halving.budget, "before the first rung of its own"


def test_a_saved_search_is_compared_as_a_whole(searching: Searching, tmp_path: Path) -> None:
    def planned(**changes: str) -> list[Any]:
        given = load_search(searching.recipe(tmp_path, trials=9, **changes))
        specs = {spec.name: spec for spec in given.recipe.students}
        return _as_planned(_document(given, [Halving.of(one, specs) for one in given.tunings], tmp_path, {}, None))

    assert planned() == planned(**{"trials: 9": "trials: 9\n      reduction: 3"})
    for setting in ("reduction: 2", "seed: 1"):
        assert planned() != planned(**{"trials: 9": f"trials: 9\n      {setting}"})
    assert planned() != planned(**{"trials: 9": "trials: 8"})


def test_a_recipe_object_has_no_search() -> None:
    with pytest.raises(RecipeError, match="recipe is not what it takes"):
        akd_dist.tune(a_recipe([a_student("a")]))
