"""A teacher of whom there are only stores: found as the recipe names them, and what its logits may be learnt for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from akd_dist.base.errors import RefusedError
from akd_dist.data.rows import SPLITS, Rows, Splits
from akd_dist.data.views import by_content
from akd_dist.distill.objectives import stages_of
from akd_dist.recipe import NoAugmentation, Recipe, StoredTeacher
from akd_dist.recipe.paths import STORE_NAME
from akd_dist.storage import catalog
from akd_dist.storage.encodings import encoding_from_config
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.top_k import TopK, top_k_from_config

if TYPE_CHECKING:
    from akd_dist.recipe import Learning, LogitKind


def stores_of(recipe: Recipe, named: StoredTeacher, splits: Splits, store_root: str) -> dict[str, LogitStore]:
    """The sealed stores of a teacher, by split: those that the recipe names, and of the others those of the same
    teacher that lie beside its train store.

    Raises:
        RefusedError: a store is not there, or not of these rows, views or encoding; says what differs.
        DamagedError: it is not what was sealed.
    """
    found: dict[str, LogitStore] = {}
    for split in SPLITS:
        rows: Rows = getattr(splits, split)
        name: str | None = getattr(named, split)
        if name is not None:
            found[split] = open_store(_uri_of(name, store_root))
            _check_same(recipe, split, rows, found[split])
        elif (beside := _beside(found["train"], rows)) is not None:
            found[split] = beside
    return found


def _uri_of(name: str, store_root: str) -> str:
    if STORE_NAME.fullmatch(name):
        return f"{store_root.rstrip('/')}/{catalog.resolve_id(store_root, name)}"
    return name


def _beside(train: LogitStore, rows: Rows) -> LogitStore | None:
    """The store of other rows by the teacher of a train store."""
    plain = {"augmentation": by_content(NoAugmentation()), "data_seed": None, "views": 1}
    same = {"dataset": rows.fingerprint, "rows": len(rows), **plain}
    if rows.task == "language_model":
        same["items"] = rows.targets
    root = train.uri.rpartition("/")[0]
    return catalog.find_store(root, train.manifest.identity.model_copy(update=same))


def _check_same(recipe: Recipe, split: str, rows: Rows, store: LogitStore) -> None:
    """Refuse a store that is not of a split's rows as the recipe has them."""
    whose = f"the store {store.id[:12]} that `teacher.store` names"
    try:
        rows.check_same(store.manifest.dataset)
    except RefusedError as error:
        error.what = f"{whose} is not of the recipe's {split} rows"
        error.next = "name the store of these rows, or import their logits: akd-dist stores import"
        raise
    identity, data = store.manifest.identity, recipe.data
    augmentation = data.augmentation if split == "train" else NoAugmentation()
    seed = None if isinstance(augmentation, NoAugmentation) else data.seed
    config = recipe.cache.encoding.config()
    encoding = top_k_from_config(config) if config["name"] == TopK.name else encoding_from_config(config)
    wanted, got = str(encoding), str(identity.encoded)
    pairs = [
        ("data.augmentation", identity.augmentation, by_content(augmentation)),
        ("data.seed", identity.data_seed, seed),
        ("cache.encoding", got, wanted),
        ("classes", identity.classes, rows.classes),
    ]
    differing = [(name, theirs, ours) for name, theirs, ours in pairs if theirs != ours]
    if (views := data.views if split == "train" else 1) > identity.views:
        differing.append(("data.views", identity.views, views))
    if differing:
        raise RefusedError(
            f"{whose} is not what the recipe asks for",
            got="; ".join(f"{name}: {theirs}" for name, theirs, _ in differing),
            expected="; ".join(f"{name}: {ours}" for name, _, ours in differing),
            next="set these in the recipe as the store has them, or import the logits again",
        )


def kind_of_store(store: LogitStore) -> LogitKind:
    """What the logits of a store are; those of a model are raw."""
    imported = store.manifest.teacher.get("imported")
    kind = imported.get("kind") if isinstance(imported, dict) else None
    return "log_probabilities" if kind == "log_probabilities" else "logits"


def cannot_learn(recipe: Recipe) -> list[str]:
    """Those that learn from the teacher and need raw logits, a line each: with log-probabilities they are refused."""
    learners: list[tuple[str, Learning]] = [
        (f"the student {spec.name}", spec) for spec in recipe.students if spec.objective.learns_from != "assistant"
    ]
    learners += [(f"the assistant {one.model.label}", one) for one in recipe.teacher.chain[:1]]
    raw = [(name, stage.name) for name, what in learners for stage in stages_of(what) if stage.needs_raw_logits]
    return [
        f"{name} cannot learn from log-probabilities: its stage {stage} is a squared distance to raw logits, and the "
        "constant that each row has lost changes it; kd and takd, by softmax alone, can"
        for name, stage in raw
    ]


def check_kind(recipe: Recipe, stores: Sequence[LogitStore | None]) -> None:
    """Refuse students and assistants that cannot learn from what the teacher's stores hold.

    Args:
        stores: the train store of each teacher, as far as they are there.

    Raises:
        RefusedError: log-probabilities, for an objective that needs raw logits.
    """
    held = [store for store in stores if store is not None and kind_of_store(store) == "log_probabilities"]
    averaged = recipe.teacher.average == "probabilities"
    if (held or averaged) and (lines := cannot_learn(recipe)):
        where = "teacher.average: probabilities" if averaged else f"log-probabilities in the store {held[0].id[:12]}"
        raise RefusedError(
            lines[0],
            got=f"{where}, for {len(lines)} that need raw logits",
            expected="raw logits, or objectives that a softmax is enough for: kd, takd, hard_labels",
            next="average logits, or change `objective`"
            if averaged
            else "import the outputs before the log-softmax, or change `objective`",
        )
