"""Small recipes on real digits, and the digests that bit-for-bit tests compare.

AKD_DIST_TEST_DEVICE=cuda has the students of all tests that use these trained on a GPU: `make test-gpu`.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, TypeVar

from akd_dist import recipe as recipes
from akd_dist.base.files import canonical_json, sha256
from akd_dist.base.trusted import Trusted
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Splits
from akd_dist.distill.checkpoint import newest_checkpoint
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning.stacking import stacks_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import Recipe

DEVICE = os.environ.get("AKD_DIST_TEST_DEVICE", "cpu")
ANNEALING = {"kind": "annealing_kd", "tau_max": 2, "stage1_epochs": 2, "stage2_epochs": 1}
HARD = {"kind": "hard_labels", "epochs": 3}
KD = {"kind": "kd", "epochs": 3}
CONTINUATION = {"kind": "continuation_kd", "tau_max": 2, "epochs": 3, "margin": 0.5}
ADAMW = {"kind": "adamw", "lr": 5e-3, "schedule": {"kind": "linear"}}


def a_student(name: str, **changes: Any) -> dict[str, Any]:
    """A student block with small defaults."""
    defaults = {"model": {"kind": "mlp", "hidden": 8, "dropout": 0.1}, "objective": ANNEALING, "optimizer": ADAMW}
    share = {"gpus": 0.125} if DEVICE == "cuda" and changes.get("workers", 1) == 1 else {}
    return {"name": name} | defaults | share | changes


def a_recipe(students: list[dict[str, Any]], **changes: Any) -> Recipe:
    """A recipe on digits whose teacher is trained for one epoch."""
    document = {
        "name": "fleet",
        "data": {"train": {"kind": "digits"}, "views": 2, "augmentation": {"kind": "shift", "pixels": 1}},
        "teacher": {"model": {"kind": "cnn", "width": 8}, "train": {"epochs": 1, "optimizer": ADAMW}},
        "students": students,
        "checkpoint_seconds": 0,
        "device": DEVICE,
    }
    return Recipe.model_validate(document | changes).own()


def stacks_of(recipe: Recipe, splits: Splits, cache_root: Path) -> dict[str, int]:
    """Whose steps are taken in stacks, as `train_in_process` finds it."""
    return stacks_in_process(recipe, splits, str(cache_root))


Own = TypeVar("Own", bound=recipes.Factory)
TESTS = Trusted(modules=("tests",))


def own(spec: Own, folder: Path) -> Own:
    """A factory that a recipe of the user's names, whose module lies in this folder."""
    return recipes.trust(spec, Trusted(factories=(spec.factory,), folder=str(folder), named_by="the recipe"))


def a_teacher(recipe: Recipe, folder: Path, cache_root: Path) -> str:
    """A teacher with random weights in `folder`: caching does not care how good it is."""
    rows = prepare(recipe.data, cache_root).train
    card = ModelCard.of(recipes.Cnn(kind="cnn", width=8), rows, None)
    save_model(folder, build(card, seed=7), card)
    return str(folder)


def stores_of(recipe: Recipe, teacher: str, root: Path) -> dict[str, str]:
    """The stores of a recipe's splits, cached by a plain loop."""
    document = cache_in_process(recipe, teacher, store_root=str(root / "stores"), cache_root=str(root / "cache"))
    return {"train": document["store"]} | {split: part["store"] for split, part in document["splits"].items()}


def chain_of(cached: dict[str, Any]) -> list[dict[str, str]]:
    """The stores of the teacher and of its assistants, from the document that caching returns."""
    return [
        {"train": model["store"]} | {split: part["store"] for split, part in model["splits"].items()}
        for model in (cached, *cached["assistants"])
    ]


def newest_tree(folder: Path) -> Any:
    """What the newest intact checkpoint of a folder holds."""
    found = newest_checkpoint(folder)
    assert found is not None
    return found[1]


def weights(run: Path) -> dict[str, str]:
    """The sha256 of each student's delivered weights."""
    found = sorted(run.glob("students/*/model.safetensors"))
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def store_bytes(root: Path) -> dict[str, str]:
    """The sha256 of every file under a store root that must not depend on how it came about."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not {"teachers", "stages"} & {*path.parts}]
    kept = [path for path in files if path.parent.name not in ("receipts", "uses") and path.name != "source.json"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def resealed(document: dict[str, Any]) -> dict[str, Any]:
    """A card's document with the checksum of what it says now, as somebody who forges one would write it."""
    fields = {name: value for name, value in document.items() if name != "sha256"}
    return fields | {"sha256": sha256(canonical_json(fields))}
