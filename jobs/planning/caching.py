"""What caching takes, before it begins: which models of the chain are there, which of their stores, what these miss.

Everything is looked up once: the stores that are found sealed stay open, and are what the command goes on with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from torch import nn

from akd_dist import recipe as recipes
from akd_dist.base.errors import MachineError
from akd_dist.base.files import check_folder
from akd_dist.data.findings import near_chance
from akd_dist.data.rows import SPLITS, Rows, Splits
from akd_dist.data.views import check_augmentation
from akd_dist.distill.agreement import check_in_store, check_on_rows
from akd_dist.distill.trial import try_inference, try_teacher, try_training
from akd_dist.documents.cache import PlanDocument, PlannedAssistant, PlannedSplit, PlannedSplits
from akd_dist.documents.check import TeacherCheck
from akd_dist.jobs.packing import ResourceRequest
from akd_dist.jobs.planning.creations import computed_on, creation_of, identity_of
from akd_dist.jobs.planning.language import check_can_be_cached, check_language_teacher, check_pretrained
from akd_dist.jobs.planning.models import CachedModel, Level, SplitPlan, count_of, levels_of
from akd_dist.jobs.planning.stored import check_kind, stores_of
from akd_dist.jobs.planning.windows import check_chain
from akd_dist.jobs.prepare_rows import rows_of_recipe
from akd_dist.jobs.train_teacher import Trained, Workspace, assistant_of, is_there, name_of, teacher_of
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard, blocks_of
from akd_dist.models.device import device_name, gpus_of
from akd_dist.models.folder import load_card, read_model
from akd_dist.models.imported import open_checkpoint
from akd_dist.models.inference import compiled_by
from akd_dist.recipe import Recipe, Split, StoredTeacher
from akd_dist.storage import catalog
from akd_dist.storage.layout import RECEIPTS, TEACHERS
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.roots import open_root
from akd_dist.storage.writer import StoreWriter
from akd_dist.tracking.progress import tell_once

WORK_OF_TEACHER = "training or caching the teacher"


@dataclass(frozen=True)
class Inputs:
    """What a command works from, opened once: the rows, and the models that are there with their stores."""

    recipe: Recipe
    splits: Splits
    models: list[CachedModel]
    """From the teacher, or the members of an ensemble, on, as far as they are there: an assistant is found by what it
    learns from."""
    parameters: dict[str, int]
    """The number of parameters of each student, by name; of none where only a teacher is cached."""

    @property
    def complete(self) -> bool:
        """Whether all models of the chain are there."""
        return len(self.models) == count_of(self.recipe)

    @property
    def levels(self) -> list[Level]:
        """Whom others learn from, as far as they are there."""
        return levels_of(self.recipe, self.models)


def open_inputs(
    recipe: Recipe, workspace: Workspace, *, students: bool, again: bool, only_look: bool = False
) -> Inputs:
    """Prepare the rows, look up models and stores, and refuse what does not go together before anything is computed.

    Args:
        students: whether they are to be trained.
        again: prepare the rows afresh, whatever was prepared before.
        only_look: write nothing but to this node's cache.

    Raises:
        AkdError: rows, models or stores are refused.
    """
    return with_models(open_rows(recipe, workspace, students=students, again=again, only_look=only_look), workspace)


def open_rows(recipe: Recipe, workspace: Workspace, *, students: bool, again: bool, only_look: bool = False) -> Inputs:
    """The first half of `open_inputs`: the rows, and whether the students can be trained on them."""
    splits = rows_of_recipe(recipe, workspace, again=again, only_look=only_look)
    # Files that were believed by their times are hashed from here on, while everything else goes on.
    splits.sources.begin()
    return Inputs(recipe, splits, [], check_students(recipe, splits) if students else {})


def with_models(inputs: Inputs, workspace: Workspace) -> Inputs:
    """The second half of `open_inputs`: the models that are there by now, with their stores."""
    recipe, splits = inputs.recipe, inputs.splits
    models = models_there(recipe, splits, workspace)
    for model in models:
        look_up(model, recipe, workspace)
    check_models(recipe, splits, models, workspace)
    return replace(inputs, models=models)


def models_there(recipe: Recipe, splits: Splits, workspace: Workspace) -> list[CachedModel]:
    """The models of the chain that are there, from the teacher on; what their stores are is known, but not looked up.

    An assistant is found by what it learns from, so its place is not known before the model above it is there.
    """
    models: list[CachedModel] = []
    while len(models) < count_of(recipe):
        trained = next_below(recipe, splits, models)
        found = _there(recipe, len(models), trained, splits, workspace)
        if found is None:
            break
        models.append(found)
    return models


def _there(
    recipe: Recipe, number: int, trained: Trained | None, splits: Splits, workspace: Workspace
) -> CachedModel | None:
    """A model of the chain: as it is trained, if it is there, or where the recipe says."""
    if trained is None:
        return given_teacher(recipe, number, splits, workspace)
    uri = trained.uri(workspace.store_root)
    return model_at(trained.name, uri, recipe, splits) if is_there(uri) else None


def _further(inputs: Inputs, workspace: Workspace) -> list[CachedModel | None]:
    """The models after those that are there: members of an ensemble may be, and have stores, although one before is
    still to be trained."""
    recipe, splits, found = inputs.recipe, inputs.splits, []
    for number in range(len(inputs.models), count_of(recipe)):
        model = None
        if number < len(recipe.teacher.each):
            model = _there(recipe, number, teacher_of(recipe, splits, number), splits, workspace)
        if model is not None:
            look_up(model, recipe, workspace)
        found.append(model)
    return found


def _stored_teacher(name: str, recipe: Recipe, named: StoredTeacher, splits: Splits, store_root: str) -> CachedModel:
    """A teacher of whom there are only stores, as the recipe names them."""
    plans = []
    for split, store in stores_of(recipe, named, splits, store_root).items():
        creation = store.manifest.creation()
        # Who asks for fewer views learns the same from a store of more.
        views = recipe.data.views if split == "train" else 1
        identity = creation.identity.model_copy(update={"views": views})
        creation = creation.model_copy(update={"identity": identity})
        plans.append(SplitPlan(split, getattr(splits, split), creation, store))
    return CachedModel(name, "", None, plans)


def given_teacher(recipe: Recipe, member: int, splits: Splits, workspace: Workspace) -> CachedModel:
    """A teacher that the recipe does not train: stores, a model folder, or a checkpoint from elsewhere.

    A checkpoint becomes a model folder beside the stores, by its content, once something is to be computed with it.
    """
    teacher, name = recipe.teacher.each[member], name_of(recipe, member)
    if teacher.store is not None:
        return _stored_teacher(name, recipe, teacher.store, splits, workspace.store_root)
    model, source = teacher.model, teacher.checkpoint
    if model is None or source is None:
        return model_at(name, str(teacher.weights), recipe, splits)
    imported = open_checkpoint(model, source, splits.train, recipe.data, Path(workspace.cache_root))
    uri = f"{workspace.store_root.rstrip('/')}/{TEACHERS}/{imported.card.fingerprint[:32]}"
    return replace(_of_card(name, uri, imported.card, recipe, splits), imported=imported)


def next_below(recipe: Recipe, splits: Splits, above: Sequence[CachedModel]) -> Trained | None:
    """The model that comes after those, as it is trained; None is a teacher that lies somewhere."""
    teachers = len(recipe.teacher.each)
    if len(above) < teachers:
        return teacher_of(recipe, splits, len(above))
    level = levels_of(recipe, above)[-1]
    return assistant_of(recipe, splits, recipe.teacher.chain[len(above) - teachers], level.taught, level.stores)


def look_up(model: CachedModel, recipe: Recipe, workspace: Workspace) -> None:
    """Find which stores of a model are sealed, and what the others miss as far as it can be told without a claim."""
    for plan in model.plans:
        if plan.store is None:  # else the recipe names it
            plan.store = catalog.find_store(workspace.store_root, plan.identity)
        if plan.store is None:
            if workspace.address is None:
                # Which card the nodes of a cluster have is not asked: views that are there may count as missing.
                plan.creation = computed_on(device_name(recipe.device), plan.creation)
            # Receipts are counted and not read: a command that computes looks at each of them once it holds the claim.
            done = set(StoreWriter(workspace.store_root, plan.creation).store.list(RECEIPTS))
            narrower = [] if plan.identity.tables else catalog.narrower_stores(workspace.store_root, plan.identity)
            source = source_of(plan, narrower)
            taken = 0 if source is None else source.identity.views
            shards = plan.identity.layout.shards()
            plan.missing = [one for one in shards if one.view >= taken and one.receipt_key not in done]


def foresee_caching(inputs: Inputs, workspace: Workspace) -> PlanDocument:
    """What caching would compute: nothing of the stores and views that are there; all of models that are not.

    Raises:
        MachineError: there is something to compute, and the disk, the store root or the cluster cannot take it; on
            this machine without an `address`, else on the cluster that is connected.
    """
    from akd_dist.jobs import cluster
    from akd_dist.jobs.demand import foreseen

    recipe, models = inputs.recipe, inputs.models
    planned = [_planned(recipe, inputs.splits, model) for model in (*models, *_further(inputs, workspace))]
    count = len(recipe.teacher.each)
    teachers, assistants = planned[:count], planned[count:]
    needed = sum(split.bytes for one in planned for split in one.values())
    root = open_root(workspace.store_root)
    waits = None
    # What is all there needs neither room nor nodes, and is not refused for the lack of them.
    if not inputs.complete:
        check_chain(recipe, inputs.splits, workspace, len(inputs.levels))
    if needed:
        check_folder(root.local_path(""))
        check_room(workspace.store_root, needed, recipe)
        waits = foreseen(cluster.all_nodes(), room_of_teacher(recipe), WORK_OF_TEACHER, workspace.demand())
    return PlanDocument(
        dry_run=True,
        teacher_checks=checks_of(models),
        store_root=workspace.store_root,
        bytes=needed,
        free=root.free_bytes(),
        splits=teachers[0] if count == 1 else _together(teachers),
        members=[] if count == 1 else teachers,
        assistants=[
            PlannedAssistant(model=assistant.model.label, trained=number < len(models), splits=one)
            for number, (assistant, one) in enumerate(zip(recipe.teacher.chain, assistants, strict=True), count)
        ],
        waits_for=waits,
    )


def _planned(recipe: Recipe, splits: Splits, model: CachedModel | None) -> PlannedSplits:
    """What the stores of a model take; None is one that is not there."""

    def of(split: str, rows: Rows, views: int, plan: SplitPlan | None) -> PlannedSplit:
        identity = identity_of(recipe, rows, split, "")
        layout = identity.layout
        shards = list(layout.shards()) if plan is None else plan.missing
        size = sum(layout.stored_bytes(shard) for shard in shards)
        hit = plan is not None and plan.store is not None
        counts = {"rows": len(rows), "unlabelled": rows.unlabelled, "shards": len(shards), "bytes": size}
        counts |= {} if identity.items is None else {"targets": identity.items}
        return PlannedSplit(views=views, hit=hit, **counts)

    names: tuple[Split, ...] = ("train", "validation", "test")
    plans = {} if model is None else {plan.split: plan for plan in model.plans}
    return {
        split: of(split, getattr(splits, split), recipe.data.views if split == "train" else 1, plans.get(split))
        for split in names
        if model is None or split in plans
    }


def _together(teachers: Sequence[PlannedSplits]) -> PlannedSplits:
    """What the stores of an ensemble's members take together."""
    together: PlannedSplits = {}
    for split, part in ((split, part) for one in teachers for split, part in one.items()):
        known = together.get(split)
        sums = {"hit": known.hit and part.hit, "shards": known.shards + part.shards} if known else {}
        sums |= {"bytes": known.bytes + part.bytes} if known else {}
        together[split] = part.model_copy(update=sums)
    return together


def model_at(name: str, uri: str, recipe: Recipe, splits: Splits) -> CachedModel:
    """A model that is there, and the stores that the recipe asks for; these are still to be looked up."""
    blocks = None if splits.train.task != "language_model" else blocks_of(splits.train)
    return _of_card(name, uri, load_card(uri, recipe.trusted, blocks=blocks), recipe, splits)


def _of_card(name: str, uri: str, card: ModelCard, recipe: Recipe, splits: Splits) -> CachedModel:
    rows: dict[str, Rows] = {split: getattr(splits, split) for split in SPLITS}
    plans = [SplitPlan(split, of, creation_of(recipe, of, split, card, recipe.device)) for split, of in rows.items()]
    return CachedModel(name, uri, card, plans)


def check_models(recipe: Recipe, splits: Splits, models: Sequence[CachedModel], workspace: Workspace) -> None:
    """Try the teacher and its assistants on these rows before anything is trained or cached.

    What is trained already is not tried again, and weights whose logits are stored are not loaded. A teacher that the
    recipe does not train is asked of rows with labels, and what it said is told.

    Args:
        models: those that are there, looked up.

    Raises:
        RefusedError: a model cannot be built or read, is for other rows, does not give a logit per class, lacks its
            pretrained weights, fits no memory, or cannot be trained on its batches; or an augmentation does not fit.
        DamagedError: weights or a store are not what was written.
    """
    rows, data = splits.train, recipe.data
    check_can_be_cached(recipe, splits)
    for number, member in enumerate(recipe.teacher.each):
        if member.train is None:
            # One of an ensemble is looked at although one before it is still to be trained.
            model = models[number] if number < len(models) else given_teacher(recipe, number, splits, workspace)
            look_up(model, recipe, workspace)
            _check_given(model, recipe, splits, workspace)
        elif member.train is not None and number >= len(models):
            teacher = teacher_of(recipe, splits, number)
            assert teacher is not None, "it is trained"
            its = teacher.rows(splits)
            check_pretrained(teacher.spec.model, recipe, splits, teacher.setting)
            try_training(teacher.spec.model, [(teacher.setting, member.train)], its.train, data)
            if recipe.cache.inference:
                card = ModelCard.of(teacher.spec.model, rows, data.normalize, data.image)
                _try_inference(build(card, seed=0).eval(), card, recipe, splits, workspace)
    check_kind(recipe, [model.opened.get("train") for model in models[: len(recipe.teacher.each)]])
    for number, assistant in enumerate(recipe.teacher.chain, 1):
        whose = "teacher" + number * ".assistant"
        check_pretrained(assistant.model, recipe, splits, whose)
        try_training(assistant.model, [(whose, assistant)], rows, data)
    check_augmentation(data.augmentation, data.seed, rows.inputs, rows.tokens)
    for model in models:
        tell_of_chance(model, workspace.console)


def _check_given(model: CachedModel, recipe: Recipe, splits: Splits, workspace: Workspace) -> None:
    """Try a teacher that the recipe does not train, and ask it of labelled rows, if only in its stores."""
    if model.card is None:  # there are only stores, which were compared with the rows when they were found
        if (store := model.opened.get("validation")) is not None:
            model.check = check_in_store(store, splits.validation, model.name)
        _tell_check(model, workspace)
        return
    if splits.train.task == "language_model":
        check_language_teacher(model, recipe, splits, workspace)
        _tell_check(model, workspace)
        return
    model.card.check_rows(splits.train, f"the teacher in {model.model_uri}")
    if (store := model.opened.get("validation")) is not None and len(model.opened) == len(SPLITS):
        model.check = check_in_store(store, splits.validation, model.name)
    else:
        if model.imported is not None:
            module, card = model.imported.module(Path(workspace.cache_root)), model.card
            try_teacher(module, card, splits.train, recipe.cache)
            if model.imported.notes:
                workspace.tell(f"{model.imported.source}: {'; '.join(model.imported.notes)}")
        else:
            module, card = read_model(model.model_uri, recipe.trusted)
            try_teacher(module, card, splits.train, recipe.cache)
        _try_inference(module, card, recipe, splits, workspace)
        model.check = check_on_rows(module, splits.validation, model.name)
    _tell_check(model, workspace)


def _try_inference(module: nn.Module, card: ModelCard, recipe: Recipe, splits: Splits, workspace: Workspace) -> None:
    """As `trial.try_inference`; on a cluster its nodes may have what this machine lacks."""
    cache, root = recipe.cache, Path(workspace.cache_root)
    if workspace.address is None or not cache.compile or compiled_by(recipe.device):
        try_inference(module, card, splits.train, cache, recipe.device, root)


def checks_of(models: Sequence[CachedModel]) -> list[TeacherCheck]:
    """What teachers from elsewhere say of labelled rows."""
    return [model.check for model in models if model.check is not None]


def _tell_check(model: CachedModel, workspace: Workspace) -> None:
    for warning in () if model.check is None else model.check.warnings:
        tell_once(workspace.console, warning)


def room_of_teacher(recipe: Recipe) -> ResourceRequest:
    """The most that a task takes which trains or caches the teacher, or an assistant."""
    threads = [recipe.cache.threads, *(one.threads for one in recipe.teacher.chain)]
    threads += [one.train.threads for one in recipe.teacher.each if one.train is not None]
    return ResourceRequest(1, max(threads), gpus_of(recipe.device))


def check_room(store_root: str, needed: int, recipe: Recipe) -> None:
    """Refuse before the teacher runs what the disk cannot hold. Object stores do not say how much is free."""
    free = open_root(store_root).free_bytes()
    if free is not None and needed > free:
        raise MachineError(
            f"the logits do not fit in {store_root}",
            got=f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            next=_how_to_need_less(recipe),
        )


def _how_to_need_less(recipe: Recipe) -> str:
    """What would make the stores of a recipe smaller, or have them elsewhere."""
    encoding, ways = recipe.cache.encoding, []
    if encoding.kind == "top_k":
        ways.append("a smaller k or rank of cache.encoding")
    elif recipe.data.task == "language_model":
        ways.append("cache.encoding={kind: top_k}")
    elif encoding.kind == "float32" or encoding.compress == "none":
        ways.append("cache.encoding={kind: float16, compress: blosc}")
    if recipe.data.views > 1:
        ways.append("fewer data.views")
    ways.append("another --store-root")
    return f"free some space, or use {', or '.join(ways)}"


def tell_of_chance(model: CachedModel, console: Console) -> None:
    """Say so if a model, by what the shards of its train store say, knows hardly anything of the labels."""
    if (store := model.opened.get("train")) is None or (model.check is not None and model.check.warnings):
        return
    if model.plans[0].rows.task == "language_model":
        return
    rows, shards = model.plans[0].rows, zip(store.layout.shards(), store.manifest.records(), strict=True)
    # The first rows have labels; in regression no label is chosen.
    labelled = ((min(shard.stop, rows.labelled) - shard.start, record.label_agreement) for shard, record in shards)
    agreed = [(count, share) for count, share in labelled if share is not None]
    if not agreed:
        return
    agreement = sum(count * share for count, share in agreed) / sum(count for count, _ in agreed)
    line = near_chance(model.name, agreement, rows.class_counts())
    if line is not None:
        tell_once(console, line)


def source_of(plan: SplitPlan, narrower: list[Manifest]) -> Manifest | None:
    """The widest of narrower stores that was computed as this one is to be."""
    return next((one for one in narrower if one.computed == plan.creation.computed), None)


def check_students(recipe: Recipe, splits: Splits) -> dict[str, int]:
    """Build each distinct model once, so that one that does not fit is refused before the teacher runs.

    Returns:
        The number of parameters by student.

    Raises:
        RefusedError: as `trial.try_training`.
    """
    alike: dict[str, list[recipes.StudentSpec]] = {}
    for spec in recipe.students:
        alike.setdefault(spec.model.model_dump_json(), []).append(spec)
    counts: dict[str, int] = {}
    for group in alike.values():
        trainings = [(f"the student {spec.name}", spec) for spec in group]
        check_pretrained(group[0].model, recipe, splits, trainings[0][0])
        count = try_training(group[0].model, trainings, splits.train, recipe.data)
        counts |= {spec.name: count for spec in group}
    return {spec.name: counts[spec.name] for spec in recipe.students}
