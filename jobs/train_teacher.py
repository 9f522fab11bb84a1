"""Train the models whose logits are cached: the teacher, where the recipe says how, and the assistants below it.

Each is trained once, by the student loop in one task, and found again by content under <store-root>/teachers/.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from akd_dist import recipe as recipes
from akd_dist.base.errors import HeldError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data import views
from akd_dist.data.factories import read_beside
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.distill import hooks
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import CohortJob, forget_failures, read_progress, renewals
from akd_dist.distill.published import train_and_publish
from akd_dist.jobs.idle import may_work_here
from akd_dist.models.build import by_content
from akd_dist.models.device import device_name, gpus_of
from akd_dist.options import RecipeOptions
from akd_dist.recipe import HardLabels, Recipe
from akd_dist.storage.claim import CLAIM_SUFFIX, claim_store
from akd_dist.storage.layout import TEACHERS
from akd_dist.storage.manifest import Identity
from akd_dist.storage.mean import Stores, uris_of
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import using
from akd_dist.tracking.progress import Meter, meter, tell

if TYPE_CHECKING:
    from akd_dist.jobs.demand import Demand
    from akd_dist.jobs.idle import IdleWorkers
    from akd_dist.jobs.line import Line
    from akd_dist.jobs.local_tasks import LocalTasks
    from akd_dist.jobs.shared import Shared
    from akd_dist.jobs.stopping import StopFlag
    from akd_dist.jobs.working_dir import WorkingDir


@dataclass(frozen=True)
class Workspace:
    """Where a command works, who stops it and who is told."""

    store_root: str
    """Folder or URI of stores, and of the models that a recipe trains for them."""
    cache_root: str
    """Prepared data and decoded stores of this node."""
    address: str | None = None
    """A Ray cluster; None starts one on this machine."""
    wait: bool = False
    """Wait for somebody else's claim instead of leaving."""
    patient: bool = False
    """Wait for nodes instead of refusing a cluster that is too small, whether or not it has an autoscaler."""
    stop: StopFlag | None = None
    """The flag of Ctrl-C and SIGTERM; None for a plain loop in this process."""
    console: Console = field(default_factory=lambda: Console(quiet=True))
    """Where progress is told."""
    run: Path | None = None
    """The run's folder, where students are trained afterwards: nodes that do not see it are of no use before either."""
    folder: WorkingDir | None = None
    """What travels to the nodes of a cluster, and what they have to have; None for neither."""
    here: IdleWorkers | None = None
    """Workers of this machine that tasks run in; None where Ray runs them."""

    @classmethod
    def of(
        cls, options: RecipeOptions, recipe: Recipe, run: Path | None = None, idle: IdleWorkers | None = None
    ) -> Workspace:
        """Where a command works that was given these options.

        Args:
            run: the run's folder, where there is one.
            idle: workers of this machine, which run tasks where no cluster has to.
        """
        console = options.console or Console(stderr=True)
        kept_out = [options.stores, options.cache] + ([] if run is None else [str(run.parent)])
        folder = None
        if options.address is not None:
            from akd_dist.jobs.working_dir import WorkingDir

            folder = WorkingDir.of(recipe, kept_out)
        places = options.stores, options.cache, options.address
        # With stores elsewhere, the driver and a task that trains a model have no folder in common.
        if "://" in options.stores or not may_work_here(recipe.device, options.address):
            idle = None
        return cls(*places, options.wait, options.patient, console=console, run=run, folder=folder, here=idle)

    @property
    def remote(self) -> bool:
        """Whether stores lie in object storage, and not in a folder."""
        return "://" in self.store_root

    def tell(self, text: str) -> None:
        """Say something to the person who waits."""
        tell(self.console, text)

    def claim(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold a store, or a model under TEACHERS, while it is made."""
        check = (lambda: None) if self.stop is None else self.stop.check
        return claim_store(self.store_root, name, wait=self.wait, on_wait=self.tell, on_poll=check)

    def sweep(self, name: str) -> None:
        """Remove the claim that is left where a driver died when its work was just done. A living holder keeps his."""
        if open_root(self.store_root).exists(name + CLAIM_SUFFIX):
            with contextlib.suppress(HeldError, MachineError), claim_store(self.store_root, name):
                pass

    def join(self) -> None:
        """Connect to Ray, or start it, where it is to run tasks."""
        if self.here is not None:
            return
        from akd_dist.jobs import cluster

        cluster.connect(self.address, tell=self.tell, travels=None if self.folder is None else self.folder.folder)

    def connect(self) -> StopFlag:
        """Connect to Ray, or start it; the flag that running tasks are to heed."""
        assert self.stop is not None, "whoever runs tasks watches for signals"
        self.join()
        self.stop.check()
        return self.stop

    def device(self, device: str) -> str:
        """What `device_name` says where this recipe's device computes: a driver's machine needs no GPU of its own.

        Raises:
            MachineError: no node has one.
        """
        if self.stop is None or not gpus_of(device):
            return device_name(device)
        from akd_dist.jobs.tasks import Task, run_tasks

        # One task answers for all: a store is pinned to one kind of card, and each caching task compares its own with
        # that.
        stop, found = self.connect(), list[str]()
        with self.shared() as shared:
            run_tasks(
                lambda device, _: device_name(device),
                [Task("the teacher's GPU", device, None)],
                threads=1,
                gpus=gpus_of(device),
                shared=shared,
                stop=stop,
                on_result=lambda _, name: found.append(name),
            )
        stop.check()
        return found[0]

    def shared(self) -> Shared | LocalTasks:
        """The nodes that see the store root and the run, as a context: no other node may be given work."""
        if self.here is not None:
            from akd_dist.jobs.local_tasks import LocalTasks

            return LocalTasks(self.here)
        from akd_dist.jobs.shared import Shared

        folders = {"the store root": self.store_root}
        if self.run is not None:
            folders["the run's folder"] = str(self.run / "control")
        return Shared(folders, self.cache_root, self.tell, demand=self.demand(), folder=self.folder)

    def demand(self) -> Demand:
        """What is asked of the cluster's autoscaler, and whether nodes are waited for at all."""
        from akd_dist.jobs.demand import Demand

        return Demand(self.patient)


@dataclass(frozen=True)
class Trained:
    """A model that the recipe trains before its students: the teacher or an assistant."""

    name: str
    """`the teacher`, or `the assistant mlp-64`."""
    setting: str
    """The key of the recipe that says how it is trained."""
    spec: recipes.StudentSpec
    """How it is trained. Its name is what it is found by: the hash of everything that its weights depend on."""
    views: int
    """How many views its epochs go round."""
    stores: Stores
    """The logits of the model above it; empty for the teacher."""
    data: recipes.DataSpec | None = None
    """The rows that it is trained on, as `Recipe.data_of_teachers` has them; None for those of the students."""

    def rows(self, splits: Splits) -> Splits:
        """The rows that it is trained on, of those of the recipe."""
        return _its(splits, self.data)

    def uri(self, store_root: str) -> str:
        """Its model folder, whether it is there or not."""
        return f"{store_root.rstrip('/')}/{self.claim}"

    @property
    def claim(self) -> str:
        """The name by which it is held while it is trained."""
        return f"{TEACHERS}/{self.spec.name}"

    def job(self, recipe: Recipe, splits: Splits, workspace: Workspace) -> CohortJob:
        """The model as a cohort of one: the same loop as for students."""
        # Checkpoints are renamed into place, which object storage cannot do: there the model is trained in the node's
        # cache.
        root = Path(workspace.cache_root if workspace.remote else workspace.store_root) / TEACHERS
        splits = self.rows(splits)
        return CohortJob(
            name="teacher",
            data=(self.data or recipe.data).model_copy(update={"views": self.views}),
            fingerprints={split: getattr(splits, split).fingerprint for split in SPLITS},
            students=(self.spec,),
            root=str(root),
            logs=str(root / self.spec.name),
            cache_root=workspace.cache_root,
            stores=self.stores,
            control=str(root / self.spec.name / "checkpoints"),
            checkpoint_seconds=recipe.checkpoint_seconds,
            device=recipe.device,
            rows=splits.train.sealed,
        )


Run = Callable[[Trained, CohortJob, Workspace], dict[str, Any]]
"""Trains a model as `train_cohort` does."""


def teacher_of(recipe: Recipe, splits: Splits, member: int = 0) -> Trained | None:
    """The teacher that the recipe trains, on hard labels; None where its weights lie somewhere.

    It needs no cached logits, so each of its epochs sees a fresh view; and it stays the same when `data.views` changes.

    Args:
        member: which one of an ensemble.
    """
    teacher = recipe.teacher.each[member]
    model, train = teacher.model, teacher.train
    if model is None or train is None:
        return None
    data = recipe.data_of_teachers if train.rows == "all" else None
    spec = _spec(recipe, _its(splits, data), train, model, HardLabels(epochs=train.epochs), "labels")
    setting = "teacher.train" if recipe.teacher.members is None else f"teacher.{member}.train"
    return Trained(name_of(recipe, member), setting, spec, train.epochs, {}, data)


def _its(splits: Splits, data: recipes.DataSpec | None) -> Splits:
    """The rows that a model is trained on."""
    if data is None:
        return splits
    assert splits.of_teacher is not None, "whoever opened the rows of the recipe opened these, too"
    return splits.of_teacher


def name_of(recipe: Recipe, member: int = 0) -> str:
    """What a teacher is called: `the teacher`, or of an ensemble `the teacher 2 of 3`."""
    count = len(recipe.teacher.each)
    return "the teacher" if recipe.teacher.members is None else f"the teacher {member + 1} of {count}"


def assistant_of(
    recipe: Recipe, splits: Splits, assistant: recipes.AssistantSpec, above: Identity, stores: Stores
) -> Trained:
    """An assistant as the recipe has it.

    Args:
        above: the train store of the model above it: whose logits, which views, what encoding. In which format of
            stores they are kept changes no weight.
        stores: where that model's stores lie.
    """
    learns_from = above.model_dump(mode="json", exclude={"format"})
    spec = _spec(recipe, splits, assistant, assistant.model, assistant.objective, learns_from)
    name = f"the assistant {assistant.model.label}"
    return Trained(name, "teacher.assistant", spec, views=recipe.data.views, stores=stores)


def _spec(
    recipe: Recipe,
    splits: Splits,
    training: recipes.Training,
    model: recipes.Model,
    objective: recipes.Objective,
    learns_from: str | dict[str, Any],
) -> recipes.StudentSpec:
    """A model of the chain as a student whose name is the hash of all that its weights depend on."""
    common = {name: getattr(training, name) for name in recipes.Training.model_fields}
    if isinstance(training, recipes.Learning):
        common["labelled"] = training.labelled
    spec = recipes.StudentSpec(name="unnamed", model=model, objective=objective, **common)
    data = recipe.data.model_dump(mode="json", include={"seed", "augmentation", "window", "normalize"})
    if recipe.data.image != recipes.Image():  # the card says so
        data["image"] = recipe.data.image.written()
    data["augmentation"] = views.by_content(recipe.data.augmentation)
    dumped = spec.model_dump(mode="json", exclude={"name", "on_epoch_end"}) | {
        "model": by_content(model),
        "objective": hooks.objective_by_content(objective),
    }
    # A key that recipes learnt later must not rename, and so train again, models that lie there already.
    recipes.forget_later_keys(dumped)
    own = recipe.data.own_metric
    metric = recipe.data.primary_metric if own is None else hooks.metric_by_content(own)
    document = {
        "spec": dumped,
        "rows": [splits.train.fingerprint, splits.validation.fingerprint],
        "data": data | {"metric": metric},
        "device": recipe.device,
        "learns_from": learns_from,
    }
    if read := _read_by(model=model, objective=objective, augmentation=recipe.data.augmentation, metric=own):
        document["read"] = read
    return spec.model_copy(update={"name": sha256(canonical_json(document))[:32]})


def _read_by(**specs: object) -> dict[str, dict[str, str]]:
    """What functions of the user's own read beside their files, as far as that is known, by content."""
    own = {key: read_beside(spec) for key, spec in specs.items() if isinstance(spec, recipes.Factory)}
    return {key: read for key, read in own.items() if read}


def is_there(uri: str) -> bool:
    """Whether a model folder is complete; its card is written last."""
    return open_root(uri).exists("model.json")


def ensure_trained(trained: Trained, recipe: Recipe, splits: Splits, workspace: Workspace, run: Run) -> str:
    """The URI of a model's folder; it is trained if it is not there yet, by `run`.

    Raises:
        RefusedError: its training failed.
        HeldError: somebody else is training it.
    """
    uri, claim = trained.uri(workspace.store_root), trained.claim
    if is_there(uri):
        workspace.sweep(claim)
        return uri
    root = open_root(workspace.store_root)
    root.check_writable()
    job = trained.job(recipe, splits, workspace)
    lock = root.local_path(claim + CLAIM_SUFFIX)  # where there are folders, the claim is a locked file
    with workspace.claim(claim):
        if not is_there(uri):
            with using(uris_of(trained.stores), run=uri, lock=lock), _in_shared_folder(job, workspace):
                outcome = run(trained, job, workspace)
                for line in [*renewals(job), *outcome.get("renewed", ())]:
                    workspace.tell(f"warning: {line}")
                result = _result(trained, job, outcome)
            metric = recipe.data.primary_metric
            workspace.tell(f"{trained.name} is trained: test {recipe.data.metric_name} {result['test'][metric]:.4f}")
    return uri


@contextlib.contextmanager
def _in_shared_folder(job: CohortJob, workspace: Workspace) -> Iterator[None]:
    """Have the folders of a job that all nodes share: where stores lie in a folder, a model is trained where it lies.

    Elsewhere it is trained in a folder of its node alone, which `train_and_publish` sees to.
    """
    if workspace.remote:
        yield
        return
    Path(job.control).mkdir(parents=True, exist_ok=True)
    job.stop_file.unlink(missing_ok=True)
    forget_failures(job)
    try:
        yield
    except BaseException:
        _leave_no_empty_folder(job)
        raise
    shutil.rmtree(job.control, ignore_errors=True)


def _leave_no_empty_folder(job: CohortJob) -> None:
    """Where nothing was trained yet, as after a refusal, nothing is left; a log or a checkpoint stays."""
    with contextlib.suppress(OSError):
        Path(job.control).rmdir()
        Path(job.control).parent.rmdir()


def run_in_task(trained: Trained, job: CohortJob, workspace: Workspace) -> dict[str, Any]:
    """Train a model in one task, on a node of the cluster or in a worker of this machine, and show how far it is."""
    from akd_dist.jobs.line import Line, train_elsewhere
    from akd_dist.jobs.tasks import run_one

    stop = workspace.connect()
    with (
        workspace.shared() as shared,
        meter(workspace.console, f"training {trained.name}", total=1, unit="steps") as shown,
        Line(stop) if workspace.remote else contextlib.nullcontext() as line,
    ):
        uri = trained.uri(workspace.store_root)
        work = (train_cohort, job) if line is None else (train_elsewhere, job, uri, line.end)
        outcome = run_one(
            *work,
            threads=trained.spec.threads,
            gpus=gpus_of(job.device),
            stop=stop,
            on_poll=functools.partial(_follow, job, shown, stop, line),
            name=trained.name,
            shared=shared,
        )
    job.stop_file.unlink(missing_ok=True)
    if outcome["stopped"]:
        raise stop.error(
            f"stopped; the last checkpoint of {trained.name} is kept", "the same command carries on from it"
        )
    return dict(outcome)


def run_in_process(trained: Trained, job: CohortJob, workspace: Workspace) -> dict[str, Any]:
    """Train a model in this process; the weights are those of the task."""
    if workspace.remote:
        return train_and_publish(job, trained.uri(workspace.store_root))
    return train_cohort(job)


def _result(trained: Trained, job: CohortJob, outcome: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any]
    (result,) = outcome["students"]
    on = f" on the node {outcome['node']}" if "node" in outcome else ""
    if result["state"] != "done":
        raise RefusedError(
            f"the training of {trained.name} ended as {result['state']}",
            got=result["reason"],
            expected="a trained model",
            next=f"see {job.log_of(trained.spec.name)}{on}; then change {trained.setting} in the recipe",
        )
    return result


def _follow(job: CohortJob, shown: Meter, stop: StopFlag, line: Line | None) -> None:
    """Show the job's latest progress, and pass the stop flag on to its worker."""
    if stop and line is None:
        job.stop_file.touch()
    if (progress := read_progress(job) if line is None else line.exchange()) is not None:
        (model,) = progress.students
        shown.update(model.steps, total=model.steps_total, note=f"{model.rows_per_second:,.0f} rows/s")
