"""A search by successive halving: trials train from one store, and at each rung the best of them go on.

akd-dist tune recipe.yaml

All trials are students of one run, and each has its full schedule from the start: at a rung it checkpoints and waits,
and who is kept goes on from there, bit for bit as if it had not waited. Which are kept is a function of what lies in
the run, so there is nothing else to resume from. No trial sees the test rows; the best is measured on them at the end.

Source of the rule: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016 (arXiv 1502.07943); its rungs as in Li et al., "A System for Massively Parallel Hyperparameter Tuning",
MLSys 2020 (arXiv 1810.05934).
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from akd_dist.base.files import replace as write
from akd_dist.base.formatting import SHOWN, counted
from akd_dist.distill.metrics import evaluate
from akd_dist.documents.damage import load, read_epochs, read_result
from akd_dist.documents.plan import FleetPlanDocument
from akd_dist.documents.tune import TuneDocument, TunedSearch, TunedSeed, TunedTrial
from akd_dist.jobs.planning.plan import RunPlan
from akd_dist.jobs.remote_run import copy_of
from akd_dist.jobs.train_students import Rung, run_recipe
from akd_dist.models.folder import load_model
from akd_dist.options import RunOptions
from akd_dist.recipe import Recipe, SearchRecipe, StudentSpec, Trial, Tuning, rung_count, rung_epochs
from akd_dist.reporting.seeds import estimate
from akd_dist.serve.language import metrics_of_rows
from akd_dist.serve.served import open_model
from akd_dist.storage.run_copy import MODEL, put_documents
from akd_dist.tracking.progress import tell

TUNE_NAME = "tune.json"
Score = float | None
"""The best validation metric of a trial until a rung; None where one of its students was lost."""


@dataclass(frozen=True)
class Halving:
    """A search as it is run: its trials, and after which epochs they are compared."""

    tuning: Tuning
    rungs: dict[int, list[int]]
    """Number of a trial -> its rungs."""
    metric: str = "accuracy"
    """By which trials are compared."""

    @classmethod
    def of(cls, tuning: Tuning, specs: Mapping[str, StudentSpec], metric: str = "accuracy") -> Halving:
        """As many rungs as bring the trials down to one."""
        epochs = {trial.number: specs[trial.students[0]].objective.epochs for trial in tuning.trials}
        reduction = tuning.search.reduction
        count = rung_count(min(epochs.values()), len(tuning.trials), reduction)
        return cls(tuning, {number: rung_epochs(total, count, reduction) for number, total in epochs.items()}, metric)

    def standing(self, score: float) -> float:
        """A score so that more is better."""
        return SHOWN[self.metric].standing(score)

    @property
    def count(self) -> int:
        """How many rungs there are."""
        return len(next(iter(self.rungs.values())))

    def kept(self, scores: Mapping[int, Score]) -> list[int]:
        """Which of the trials that were compared go on: the best part, and who is as good as the last of these."""
        standings = {number: self.standing(score) for number, score in scores.items() if score is not None}
        ranked = sorted(standings.values(), reverse=True)
        if not ranked:
            return []
        least = ranked[min(max(1, len(scores) // self.tuning.search.reduction), len(ranked)) - 1]
        return [number for number, standing in standings.items() if standing >= least]

    @property
    def budget(self) -> int:
        """Epochs that its trials train if no two are equal."""
        return self.to_come(list(self.rungs), 0)

    def to_come(self, numbers: Sequence[int], rung: int) -> int:
        """Epochs that these trials train from a rung of theirs on, at most, if no two are equal."""
        left, spent = len(numbers), 0
        longest = sorted((self.rungs[number] for number in numbers), reverse=True)
        for at in range(rung, self.count):
            spent += sum(rungs[at] - (rungs[at - 1] if at else 0) for rungs in longest[:left])
            left = max(1, left // self.tuning.search.reduction)
        return spent * len(self.tuning.trials[0].students)

    def behind(self, left: Sequence[int]) -> int:
        """Epochs of the trials that went no further, where these are left at the last rung."""
        mine = sum(self.rungs[number][-1] for number in left) * len(self.tuning.trials[0].students)
        return max(0, self.budget - mine)

    def later(self, numbers: Sequence[int], rung: int) -> int:
        """Epochs that are left once these trials have come to a rung; before the first of its own, all of them."""
        if rung < 0:
            return self.budget
        now = sum(self.rungs[one][rung] - (self.rungs[one][rung - 1] if rung else 0) for one in numbers)
        return self.to_come(numbers, rung) - now * len(self.tuning.trials[0].students)


def tune(given: SearchRecipe, options: RunOptions) -> TuneDocument:
    """Run the searches of a recipe to their end, or go on with them.

    Raises:
        AkdError: as `train_students`; or the run holds another search.
    """
    recipe = given.recipe
    specs = {spec.name: spec for spec in recipe.students}
    halvings = [Halving.of(tuning, specs, recipe.data.primary_metric) for tuning in given.tunings]
    rungs = max(halving.count for halving in halvings)
    if options.dry_run:
        _, planned = _train(recipe, options, _alive_at_first(halvings), halvings, 0, rungs)
        return _document(given, halvings, Path(planned["run"]), {}, FleetPlanDocument.model_validate(planned))
    told, place = Told(options), f"{options.runs.rstrip('/')}/{recipe.name}"
    if not options.fresh and (saved := _saved(given, options, halvings, place)) is not None:
        tell(told.console, f"the search {recipe.name} is done: this is its saved result")
        return saved
    alive = _alive_at_first(halvings)
    scores: dict[str, dict[int, list[Score]]] = {halving.tuning.name: {} for halving in halvings}
    for rung in range(rungs):
        told.begins(rung, rungs, alive)
        plan, _ = _train(recipe, options, alive, halvings, rung, rungs)
        options = replace(options, fresh=False)
        for halving in halvings:
            if (at := _rung_of(halving, rung, rungs)) >= 0:
                name = halving.tuning.name
                found = {number: _score(plan, halving, number, at) for number in alive[name]}
                for number, score in found.items():
                    scores[name].setdefault(number, []).append(score)
                alive[name] = halving.kept(found)
                told.ends(halving, rung, rungs, found, alive[name])
        if not any(alive.values()):
            if rung + 1 < rungs:
                _collect_lost(recipe, options, plan)
            break
    if "://" in place:
        wanted = [name for one in halvings for name in _students(one, alive[one.tuning.name])]
        copy_of(place, options.cache).refresh(MODEL, documents=(), driver=False, only=wanted)
    document = _document(given, halvings, Path(plan.run), scores, None, plan)
    searches = [
        _with_best(search, halving, alive[search.name], plan)
        for search, halving in zip(document.searches, halvings, strict=True)
    ]
    document = document.model_copy(update={"searches": searches})
    write(plan.run / TUNE_NAME, json.dumps(document.plain() | {"run": "."}, indent=1).encode())
    if "://" in place:
        put_documents(place, plan.run)
        return document.model_copy(update={"run": place})
    return document


def _alive_at_first(halvings: Sequence[Halving]) -> dict[str, list[int]]:
    return {halving.tuning.name: list(halving.rungs) for halving in halvings}


def _rung_of(halving: Halving, rung: int, rungs: int) -> int:
    """The number of a search's own rung: searches of fewer rungs begin later, so that all end together."""
    return rung - (rungs - halving.count)


def _train(
    recipe: Recipe,
    options: RunOptions,
    alive: Mapping[str, list[int]],
    halvings: Sequence[Halving],
    rung: int,
    rungs: int,
) -> tuple[RunPlan, dict[str, Any]]:
    """Bring all trials that are left to a rung; those that are not stay where they are, and out of the last one."""
    if rung + 1 == rungs:
        left = {name for one in halvings for name in _students(one, alive[one.tuning.name])}
        students = [spec for spec in recipe.students if spec.name in left]
        behind = sum(halving.behind(alive[halving.tuning.name]) for halving in halvings)
        return run_recipe(recipe.model_copy(update={"students": students}), options, Rung({}, behind, 0, last=True))
    pauses = dict.fromkeys((spec.name for spec in recipe.students), 0)  # who is not brought on stays where it is
    later = 0
    for halving in halvings:
        at, trials = _rung_of(halving, rung, rungs), alive[halving.tuning.name]
        later += halving.later(trials, at)
        for number in trials if at >= 0 else []:
            pauses |= dict.fromkeys(_students(halving, [number]), halving.rungs[number][at])
    return run_recipe(recipe, options, Rung(pauses, 0, later, last=False))


def _collect_lost(recipe: Recipe, options: RunOptions, plan: RunPlan) -> None:
    """Make the run's results of a search that nothing is left of: they say how its students ended."""
    lost = [spec for spec in recipe.students if read_result(_folder(plan) / spec.name) is not None]
    if lost:
        nobody = Rung(dict.fromkeys((spec.name for spec in lost), 0), 0, 0, last=True)
        run_recipe(recipe.model_copy(update={"students": lost}), options, nobody)


def _students(halving: Halving, numbers: Sequence[int]) -> list[str]:
    return [name for number in numbers for name in halving.tuning.trials[number].students]


# ---- what trials came to


def _score(plan: RunPlan, halving: Halving, number: int, at: int) -> Score:
    """The mean over seeds of the best validation metric until a rung."""
    trial = halving.tuning.trials[number]
    found = [_score_of(plan, name, halving.rungs[number][at]) for name in trial.students]
    return None if None in found or not found else statistics.fmean(score for score in found if score is not None)


def _score_of(plan: RunPlan, name: str, epochs: int) -> Score:
    """A student's best validation metric until an epoch; None if it diverged or failed before.

    A student that waits for somebody else's stage I, which would be its own, has that one's metrics.
    """
    metric = plan.recipe.data.primary_metric
    records = read_epochs(_folder(plan) / name)
    result = read_result(_folder(plan) / name)
    if result is not None and result.state != "done" and result.epochs < epochs:
        return None
    if result is not None and result.state == "done" and result.epochs == epochs:
        return result.validation.get(metric) if result.validation else None  # of the weights that it delivers
    if not records:
        records = _of_leader(plan, name)
    values = [
        record.validation.get(metric) for record in records if record.epoch < epochs and record.validation is not None
    ]
    return max((value for value in values if value is not None), key=SHOWN[metric].standing, default=None)


def _of_leader(plan: RunPlan, name: str) -> list[Any]:
    specs = {spec.name: spec for spec in plan.recipe.students}
    stage1 = specs[name].stage1 if name in specs else None
    alike = [one for one, spec in specs.items() if stage1 is not None and spec.stage1 == stage1 and one != name]
    found = [[one for one in read_epochs(_folder(plan) / other) if one.stage == "annealing"] for other in alike]
    return max(found, key=len, default=[])


def _folder(plan: RunPlan) -> Path:
    return plan.run / "students"


def _why_lost(plan: RunPlan, trial: Trial) -> str | None:
    for name in trial.students:
        result = read_result(_folder(plan) / name)
        if result is not None and result.state != "done":
            return f"{name} {result.state}: {result.reason or 'no reason recorded'}"
    return None


# ---- the best


def _with_best(search: TunedSearch, halving: Halving, left: Sequence[int], plan: RunPlan) -> TunedSearch:
    """The document of a search that is over: its best trial is measured on the test rows."""
    metric = plan.recipe.data.primary_metric
    last = len(halving.rungs[0]) - 1
    ended = {number: _score(plan, halving, number, last) for number in left}
    results = {number: score for number, score in ended.items() if score is not None}
    if not results:
        return search
    best = max(results, key=lambda number: halving.standing(results[number]))  # of equals the first that was drawn
    specs = {spec.name: spec for spec in plan.recipe.students}
    trial = halving.tuning.trials[best]
    tested = _test(plan, [specs[name] for name in trial.students])
    seeds = []
    for name in trial.students:
        result = read_result(_folder(plan) / name)
        assert result is not None
        assert result.validation is not None
        seeds.append(
            TunedSeed(seed=specs[name].seed, student=name, validation=result.validation[metric], test=tested[name])
        )
    return search.model_copy(
        update={
            "best": best,
            "validation": results[best],
            "seeds": seeds,
            "test": estimate({one.seed: one.test for one in seeds}),
            "block": block_of([specs[name] for name in trial.students]),
        }
    )


def _test(plan: RunPlan, specs: Sequence[StudentSpec]) -> dict[str, float]:
    """The primary metric of finished students on the test rows."""
    recipe, rows = plan.recipe, plan.inputs.splits.test
    device = torch.device("cuda" if recipe.device == "cuda" and torch.cuda.is_available() else "cpu")
    found = {}
    for spec in specs:
        if recipe.data.task == "language_model":
            model = open_model(str(_folder(plan) / spec.name), "cuda" if device.type == "cuda" else "cpu")
            found[spec.name] = metrics_of_rows(model, rows)[recipe.data.primary_metric]
            continue
        module = load_model(_folder(plan) / spec.name, recipe.trusted).to(device)
        measured, _ = evaluate(module, rows, device, spec.precision, recipe.data.own_metric)
        found[spec.name] = measured[recipe.data.primary_metric]
    return found


def block_of(specs: Sequence[StudentSpec]) -> str:
    """A block of a recipe for students that differ in their seed alone, as YAML."""
    from ruamel.yaml import YAML

    block = specs[0].model_dump(mode="json", exclude_unset=True, exclude={"name", "seed"})
    seeds = [spec.seed for spec in specs]
    block |= {"seed": seeds[0]} if len(seeds) == 1 else {"grid": {"seed": seeds}}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None  # mappings of plain values in a line
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 120
    text = io.StringIO()
    yaml.dump([block], text)
    return text.getvalue()


# ---- the document


def _document(
    given: SearchRecipe,
    halvings: Sequence[Halving],
    run: Path,
    scores: Mapping[str, Mapping[int, list[Score]]],
    first: FleetPlanDocument | None,
    plan: RunPlan | None = None,
) -> TuneDocument:
    specs = {spec.name: spec for spec in given.recipe.students}
    searches = []
    for halving in halvings:
        trials = []
        for trial in halving.tuning.trials:
            found = scores.get(halving.tuning.name, {}).get(trial.number, [])
            trials.append(
                TunedTrial(
                    number=trial.number,
                    values=trial.values,
                    students=trial.students,
                    epochs=specs[trial.students[0]].objective.epochs,
                    rungs=halving.rungs[trial.number],
                    scores=[score for score in found if score is not None],
                    lost=None if plan is None else _why_lost(plan, trial),
                )
            )
        searches.append(
            TunedSearch(
                name=halving.tuning.name,
                reduction=halving.tuning.search.reduction,
                trials=trials,
                best=None,
                validation=None,
                seeds=[],
                test=None,
                block="",
            )
        )
    beside: dict[str, Any] = {} if first is None else {"dry_run": True, "first": first}
    return TuneDocument(
        run=str(run),
        metric=given.recipe.data.primary_metric,
        metric_name=given.recipe.data.metric_name if given.recipe.data.own_metric else None,
        searches=searches,
        epochs=sum(halving.budget for halving in halvings),
        epochs_of_all=sum(spec.objective.epochs for spec in specs.values()),
        left_out=given.others,
        **beside,
    )


def _saved(given: SearchRecipe, options: RunOptions, halvings: Sequence[Halving], place: str) -> TuneDocument | None:
    """The result of a search that is over, if it was of these trials: the test rows are not read again for it.

    Raises:
        AkdError: the run is of another search, or of other data or another teacher.
    """
    if "://" not in place and not (Path(place) / TUNE_NAME).exists():
        return None
    nobody = Rung(dict.fromkeys((spec.name for spec in given.recipe.students), 0), 0, 0, last=False)
    plan, _ = run_recipe(given.recipe, replace(options, dry_run=True), nobody)
    advice = "remove it: the search is then collected again from its students, and the test rows are read again"
    try:
        saved = load(plan.run / TUNE_NAME, TuneDocument, expected="what akd-dist tune wrote", next=advice)
    except (FileNotFoundError, NotADirectoryError):
        return None
    planned = _document(given, halvings, plan.run, {}, None)
    if _as_planned(saved) != _as_planned(planned) or _any_failed(plan) or not (plan.run / "fleet.json").exists():
        return None
    return saved.model_copy(update={"run": place, "left_out": planned.left_out})


def _as_planned(document: TuneDocument) -> list[Any]:
    """What a search is before anything of it has run: by another plan, others may go on at its rungs."""
    return [
        (search.reduction, [(one.number, one.values, one.students, one.epochs, one.rungs) for one in search.trials])
        for search in document.searches
    ]


def _any_failed(plan: RunPlan) -> bool:
    """Whether a trial failed: unlike one that diverged it is tried again, since its reason may be gone by then."""
    results = (read_result(_folder(plan) / spec.name) for spec in plan.recipe.students)
    return any(result is not None and result.state == "failed" for result in results)


class Told:
    """What the terminal is told of rungs."""

    def __init__(self, options: RunOptions) -> None:
        self.console = options.console or Console(stderr=True)

    def begins(self, rung: int, rungs: int, alive: Mapping[str, list[int]]) -> None:
        """A rung begins."""
        left = sum(map(len, alive.values()))
        tell(self.console, f"rung {rung + 1} of {rungs}: {counted(left, 'trial')}")

    def ends(self, halving: Halving, rung: int, rungs: int, scores: Mapping[int, Score], kept: Sequence[int]) -> None:
        """The trials of a search were compared."""
        known = ((halving.standing(score), -number) for number, score in scores.items() if score is not None)
        best = max(known, default=None)
        if best is None:
            tell(self.console, f"{halving.tuning.name}: every trial diverged or failed")
            return
        score = halving.standing(best[0])
        told = f"{halving.tuning.name}: k{-best[1]:03d} is ahead with {score:.4f} on the validation rows"
        if rung + 1 < rungs:
            told += f"; {len(kept)} of {counted(len(scores), 'trial')} go on"
        tell(self.console, told)
