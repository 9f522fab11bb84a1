"""Train the teacher that a recipe describes: once, by the student loop in one Ray task, found again by content."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.cohort import CohortJob, read_progress, train_cohort
from akd_dist.jobs.progress import Meter, meter, tell
from akd_dist.models import load_card
from akd_dist.recipe import HardLabels, Recipe
from akd_dist.rows import SPLITS, Splits
from akd_dist.storage.claim import claim_store
from akd_dist.storage.errors import RefusedError
from akd_dist.storage.files import canonical_json, sha256
from akd_dist.storage.objects import open_root

if TYPE_CHECKING:
    from akd_dist.jobs.cluster import StopFlag

TEACHERS = "teachers"


def ensure_teacher(
    recipe: Recipe,
    splits: Splits,
    *,
    store_root: str,
    cache_root: str,
    address: str | None,
    wait: bool,
    stop: StopFlag,
    console: Console,
) -> str:
    """The URI of the teacher's model folder; one that the recipe trains is trained once, and found again by content.

    Raises:
        RefusedError: the teacher does not fit the data, or its training failed.
        HeldError: somebody else is training it.
    """
    if recipe.teacher.weights is not None:
        load_card(recipe.teacher.weights).check_rows(splits.train, f"the teacher in {recipe.teacher.weights}")
        return recipe.teacher.weights
    key = teacher_key(recipe, splits)
    uri = f"{store_root.rstrip('/')}/{TEACHERS}/{key}"
    if open_root(uri).exists("model.json"):
        return uri
    open_root(store_root).check_writable()
    job = teacher_job(recipe, splits, key, store_root=store_root, cache_root=cache_root)
    claim = f"{TEACHERS}/{key}"
    with claim_store(store_root, claim, wait=wait, on_wait=lambda text: tell(console, text), on_poll=stop.check):
        if not open_root(uri).exists("model.json"):
            _train_teacher(job, address, stop, console)
            _deliver(Path(job.root) / key, uri)
    return uri


def teacher_key(recipe: Recipe, splits: Splits) -> str:
    """The content that a trained teacher is found by: everything its weights depend on."""
    model, train = recipe.teacher.model, recipe.teacher.train
    assert model is not None
    assert train is not None
    document = {
        "model": model.model_dump(mode="json"),
        "train": train.model_dump(mode="json"),
        "data": [splits.train.fingerprint, splits.validation.fingerprint],
        "views": [recipe.data.seed, recipe.data.augmentation.model_dump(mode="json")],
        "normalize": recipe.data.normalize and recipe.data.normalize.model_dump(mode="json"),
    }
    return sha256(canonical_json(document))[:32]


def teacher_job(recipe: Recipe, splits: Splits, key: str, *, store_root: str, cache_root: str) -> CohortJob:
    """The teacher as a cohort of one that trains on hard labels: the same loop as for students.

    It needs no cached logits, so each of its epochs sees a fresh view; and it stays the same when `data.views` changes.
    """
    model, train = recipe.teacher.model, recipe.teacher.train
    assert model is not None
    assert train is not None
    root = Path(cache_root) if "://" in store_root else Path(store_root)
    spec = recipes.Student(
        name=key,
        model=model,
        objective=HardLabels(kind="hard_labels", epochs=train.epochs),
        optimizer=train.optimizer,
        batch=train.batch,
        seed=train.seed,
        threads=train.threads,
    )
    return CohortJob(
        name="teacher",
        data=recipe.data.model_copy(update={"views": train.epochs}),
        fingerprints={split: getattr(splits, split).fingerprint for split in SPLITS},
        students=(spec,),
        root=str(root / TEACHERS),
        logs=str(root / TEACHERS / key),
        cache_root=cache_root,
        stores={},
        folder=recipe.folder,
        control=str(root / TEACHERS / key / "checkpoints"),
        checkpoint_seconds=recipe.checkpoint_seconds,
    )


def _train_teacher(job: CohortJob, address: str | None, stop: StopFlag, console: Console) -> None:
    from akd_dist.jobs import cluster

    Path(job.control).mkdir(parents=True, exist_ok=True)
    job.stop_file.unlink(missing_ok=True)
    cluster.connect(address, tell=lambda text: tell(console, text))
    stop.check()
    with meter(console, "training the teacher", total=1, unit="steps") as shown:
        poll = functools.partial(_follow, job, shown, stop)
        threads = job.students[0].threads
        outcome = cluster.run_one(train_cohort, job, threads=threads, stop=stop, on_poll=poll, name="the teacher")
    job.stop_file.unlink(missing_ok=True)
    if outcome["stopped"]:
        raise stop.error("stopped; the teacher's last checkpoint is kept", "the same command carries on from it")
    (result,) = outcome["students"]
    if result["state"] != "done":
        raise RefusedError(
            f"the teacher's training ended as {result['state']}",
            got=result["reason"],
            expected="a trained teacher",
            next=f"see {Path(job.logs) / (job.students[0].name + '.log')}; then change teacher.train in the recipe",
        )
    shutil.rmtree(Path(job.control), ignore_errors=True)
    tell(console, f"the teacher is trained: test accuracy {result['test']['accuracy']:.4f}")


def _follow(job: CohortJob, shown: Meter, stop: StopFlag) -> None:
    """Show the job's latest progress, and pass the stop flag on to its worker."""
    if stop:
        job.stop_file.touch()
    if (progress := read_progress(job)) is not None:
        (teacher,) = progress["students"]
        note = f"{progress['rows_per_second']:,.0f} rows/s"
        shown.update(teacher["steps"], total=teacher["steps_total"], note=note)


def _deliver(folder: Path, uri: str) -> None:
    """Put a teacher that was trained on this node into an object store; model.json last, since it says: I am there."""
    if "://" in uri:
        target = open_root(uri)
        for name in ("model.safetensors", "model.json"):
            target.put(name, (folder / name).read_bytes())
