"""What storing a model's logits cost, and what it saved: arithmetic on measured times and counted epochs.

A student that reads stored logits for an epoch would, with the model in the loop, have had it go over the train rows
once. So many passes are replaced by one pass for each stored view.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from akd_dist import recipe
from akd_dist.distill.objectives import stages_of
from akd_dist.documents.fleet import Economics, EconomicsOfViews
from akd_dist.storage.catalog import Spent, time_spent
from akd_dist.storage.mean import AnyStore, members_of


@dataclass(frozen=True)
class StudentUsage:
    """What one student read of a model's logits."""

    epochs: int
    """Epochs that it trained on them itself."""
    shared: int
    """Epochs that another student trained for it."""


def reading(spec: recipe.StudentSpec, epochs: int, stage1_from: str | None) -> StudentUsage:
    """What a student read, from how far it came.

    Args:
        epochs: those behind it, over all stages.
        stage1_from: the student whose first stage it went on from, if any.
    """
    used = [0, 0]  # trained itself, and by another
    for number, stage in enumerate(stages_of(spec)):
        trained, epochs = min(stage.epochs, epochs), max(epochs - stage.epochs, 0)
        used[number == 0 and stage1_from is not None] += trained * stage.needs_logits
    return StudentUsage(*used)


def economics(
    role: Literal["teacher", "assistant"],
    model: str,
    stores: Mapping[str, AnyStore],
    readings: Sequence[StudentUsage],
    training_seconds: float | None = None,
) -> Economics:
    """The balance of one model's stores.

    With p the seconds of a pass in the loop (that of the median shard times the rows), s the seconds that filling the
    store took, v views, o the seconds of the other splits, e epochs that read logits and n students that read some: the
    cache cost C = s + o, the model in the loop would have cost e p; the cache is paid for after C / (e p / n) students,
    and after C / p epochs. With one view stored, C = s / v + o.
    """
    train = stores["train"]
    spent = _time_spent(train)
    other = sum(_time_spent(store).seconds for split, store in stores.items() if split != "train")
    per_pass = None if spent.row_seconds is None else spent.row_seconds * train.num_rows
    per_view = spent.seconds / max(spent.rows, 1) * train.num_rows  # with what was loaded besides
    epochs, students = sum(one.epochs for one in readings), sum(one.epochs > 0 for one in readings)
    # With one view stored, and with as many as are; the last one is the store as it is.
    balances = [
        _of_views(count, per_pass, count * per_view + other, epochs, students)
        for count in sorted({1, train.views})
        if per_pass is not None
    ]
    whole = balances[-1] if balances else None
    computed = train.manifests[0].computed
    return Economics(
        role=role,
        model=model,
        store=train.uri,
        rows=train.num_rows,
        views=train.views,
        students=students,
        epochs=epochs,
        shared_epochs=sum(one.shared for one in readings),
        passes_run=train.views,
        passes_saved=epochs - train.views,
        threads=computed.threads,
        device=computed.device,
        hosts=list(spent.hosts),
        timed_rows=spent.rows,
        seconds_per_pass=None if per_pass is None else round(per_pass, 4),
        other_seconds=round(other, 3),
        cache_seconds=None if whole is None else whole.cache_seconds,
        in_the_loop_seconds=None if per_pass is None else round(epochs * per_pass, 3),
        seconds_saved=None if whole is None else whole.seconds_saved,
        break_even_students=None if whole is None else whole.break_even_students,
        break_even_epochs=None if per_pass is None else round((train.views * per_view + other) / per_pass, 3),
        training_seconds=training_seconds,
        by_views=balances,
    )


def _time_spent(store: AnyStore) -> Spent:
    """What computing a store took; of an ensemble a row takes as long as all members together."""
    each = [time_spent(one.uri) for one in members_of(store)]
    rows = [one.row_seconds for one in each if one.row_seconds is not None]
    return Spent(
        seconds=sum(one.seconds for one in each),
        rows=max(one.rows for one in each),
        row_seconds=sum(rows) if len(rows) == len(each) else None,
        hosts=tuple(sorted({host for one in each for host in one.hosts})),
    )


def _of_views(count: int, per_pass: float, cost: float, epochs: int, students: int) -> EconomicsOfViews:
    return EconomicsOfViews(
        views=count,
        cache_seconds=round(cost, 3),
        seconds_saved=round(epochs * per_pass - cost, 3),
        break_even_students=round(cost * students / (epochs * per_pass), 4) if epochs else None,
    )
