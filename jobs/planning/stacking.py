"""Which students of a run step in stacks: as the run has it, and of architectures that are new to it by a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from akd_dist.base.errors import RecipeError
from akd_dist.base.files import sha256
from akd_dist.data.rows import Splits
from akd_dist.distill.probe import Measured
from akd_dist.distill.stacking import most_together
from akd_dist.documents.fleet import RunIdentity, Stacking
from akd_dist.jobs.planning.probing import Prober, probe_key
from akd_dist.recipe import Recipe, StudentSpec

Found = dict[str, Measured | None]
"""What was measured of each student, by name; None where that failed."""
Stackings = dict[str, Stacking]
"""How steps are taken, by what that depends on."""


def kept_by(saved: RunIdentity | None) -> Stackings | None:
    """What a run keeps; None for one of before there were stacks, whose students step alone."""
    return {} if saved is None else saved.stacking


def key_of(spec: StudentSpec) -> str:
    """What the way of its steps depends on, as a digest: model, batch, workers, threads, precision, optimizer."""
    return sha256(probe_key(spec).encode())[:16]


def settle_stacking(
    recipe: Recipe, students: Sequence[StudentSpec], found: Found, kept: Stackings | None
) -> tuple[Found, Stackings | None]:
    """How the students step.

    Args:
        found: of each student, as the trial of its architecture had it.
        kept: what the run has; that holds, whatever a trial says now.

    Returns:
        What was measured with that in it, and what the run keeps from now on.

    Raises:
        RecipeError: the recipe says `stacked: always`, and one cannot be.
    """
    if kept is None:
        return {name: one and replace(one, stacked=False) for name, one in found.items()}, None
    settled = dict(kept)
    for spec in students:
        one, key = found[spec.name], key_of(spec)
        if key not in settled:
            why = "its trial failed" if one is None else one.why
            settled[key] = Stacking(model=spec.model.label, stacked=one is not None and one.stacked, why=why)
        if recipe.stacked == "always" and not settled[key].stacked:
            raise RecipeError(
                f"the recipe says stacked: always, and {spec.name} cannot step in a stack",
                got=settled[key].why,
                expected="a model whose steps come to the same bits in stacks of any size",
                next="set stacked: auto, by which such students step one after the other",
            )
    measured = {spec.name: found[spec.name] for spec in students}
    for spec in students:
        if (one := measured[spec.name]) is not None:
            measured[spec.name] = _as_kept(one, stacked=settled[key_of(spec)].stacked)
    return found | measured, settled


def _as_kept(one: Measured, *, stacked: bool) -> Measured:
    if stacked and not one.stacked:  # what it takes in a stack was not measured
        return replace(one, stacked=True, together=one.step)
    return replace(one, stacked=stacked)


def stacks_of(students: Sequence[StudentSpec], found: Mapping[str, Measured | None], device: str) -> dict[str, int]:
    """Whose steps are taken in stacks, and how many students at most in one, as `CohortJob.stacks`."""
    stacked = {spec.name: one for spec in students if (one := found[spec.name]) is not None and one.stacked}
    return {name: most_together(one.step_memory, device) for name, one in stacked.items()}


def stacks_in_process(recipe: Recipe, splits: Splits, cache_root: str) -> dict[str, int]:
    """The same for all students of a recipe, tried here and now.

    Args:
        splits: its rows, which lie prepared in the cache.
    """
    if recipe.stacked == "never":
        return {}
    tried: dict[str, Measured | None] = {}
    with Prober(recipe, cache_root, splits.train.sealed) as prober:
        for spec in recipe.students:
            if probe_key(spec) not in tried:
                tried[probe_key(spec)] = prober.probe(spec)
    found: Found = {spec.name: tried[probe_key(spec)] for spec in recipe.students}
    found, _ = settle_stacking(recipe, recipe.students, found, {})
    return stacks_of(recipe.students, found, recipe.device)
