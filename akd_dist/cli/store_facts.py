"""A store as people see it: its row in a list, and the facts that `stores show` prints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from akd_dist.cli.show import counted, in_words, size

if TYPE_CHECKING:
    from rich.table import Table

    from akd_dist.documents.stores import StoreDocument, StoreEntry
    from akd_dist.recipe import LogitKind
    from akd_dist.storage.catalog import StoreSummary
    from akd_dist.storage.records import Loss

# What a list says of each store.
COLUMNS = ("teacher", "dataset", "views", "size", "runs", "last use")
DAY = 86_400.0


def in_order(found: Sequence[StoreSummary]) -> list[StoreSummary]:
    """What was used last first, and those of one teacher together; stores that nobody used stand at the end.

    Train rows stand before those of the other splits.
    """
    used: dict[str, float] = {}
    for one in found:
        used[one.teacher] = max(used.get(one.teacher, 0.0), one.last_used or 0.0)
    splits = {"train": 0, "validation": 1, "test": 2}

    def place(one: StoreSummary) -> tuple[bool, float, str, int, float, float]:
        split = splits.get(one.hint.get("split", ""), 3)
        return one.last_used is None, -used[one.teacher], one.teacher, split, -(one.last_used or 0.0), -one.modified

    return sorted(found, key=place)


def entry_of(summary: StoreSummary) -> StoreEntry:
    """A store as `--json` lists it."""
    from akd_dist.documents.stores import StoreEntry, StoreUse

    same = ("id", "sealed", "problem", "teacher", "dataset", "rows", "targets", "views", "augmentation", "classes")
    counts = ("encoding", "bytes", "shards", "shards_done", "partials", "runs")
    return StoreEntry(
        **{name: getattr(summary, name) for name in (*same, *counts)},
        model=None if summary.imported else _model(summary),
        imported=_imported(summary),
        data=_data(summary),
        split=summary.hint.get("split"),
        modified=_iso(summary.modified),
        last_used=None if summary.last_used is None else _iso(summary.last_used),
        uses=[StoreUse(**use.model_dump()) for use in summary.uses],
    )


def _imported(summary: StoreSummary) -> LogitKind | None:
    if summary.imported is None:
        return None
    return "log_probabilities" if summary.imported == "log_probabilities" else "logits"


def _whose(summary: StoreSummary) -> str | None:
    """Whose logits it holds, in words."""
    kind = _imported(summary)
    return _model(summary) if kind is None else f"imported {kind.replace('_', '-')}"


def _model(summary: StoreSummary) -> str | None:
    """The label of the teacher's architecture: its card says which."""
    from pydantic import TypeAdapter, ValidationError

    from akd_dist.recipe import Model

    spec = summary.teacher_spec.get("model", summary.teacher_spec)
    try:
        label: str = TypeAdapter(Model).validate_python(spec).label
    except ValidationError:  # of a later version, or not made by akd-dist
        kind = spec.get("kind") if isinstance(spec, dict) else None
        return kind if isinstance(kind, str) else None
    return label


def _data(summary: StoreSummary) -> str | None:
    """The source and the split: `digits test`, `fashion-mnist train`. Rows split off are of the train source."""
    split = summary.hint.get("split")
    data = summary.hint.get("recipe", {}).get("data", {})
    source = data.get(split) if isinstance(data.get(split), dict) else data.get("train") or data.get("unlabelled")
    if not isinstance(source, dict):
        return split
    name = source.get("path") or source.get("name") or source.get("factory") or source.get("images") or ""
    path = PurePosixPath(str(name).rstrip("/").rpartition(":")[2])
    # A folder or file that is named after its split, `pets/train`, is called by the folder above it.
    short = path.parent.name if source.get("kind") == "idx" or path.stem == split else path.name
    return f"{short or source.get('kind', '')} {split}"


def narrow(table: Table) -> Table:
    """The table for eighty characters: where teacher and dataset do not fit on a line, they take two."""
    table.padding = 0
    for column in table.columns:
        column.no_wrap = column.header not in ("teacher", "dataset")
    return table


def cells_of(one: StoreSummary) -> list[str]:
    """The row of a store under COLUMNS."""
    from rich.markup import escape

    if one.problem:
        return ["", "", "", size(one.bytes), str(len(one.runs)), _ago(one.last_used)]
    return [
        escape(f"{_whose(one) or ''} {one.teacher[:6]}"),
        escape(f"{_data(one) or ''} {one.rows:,} {one.dataset[:6]}".strip()),
        str(one.views),
        size(one.bytes),
        str(len(one.runs)),
        _ago(one.last_used),
    ]


def facts_of(document: StoreDocument, summary: StoreSummary, loss: Loss | None) -> dict[str, Any]:
    """What `stores show` says of a store, by heading."""
    seconds, hosts = document.receipts.seconds, document.receipts.hosts
    shards = ", ".join(f"{counted(count, 'shard')} by {host}" for host, count in hosts.items())
    passes = f"{seconds:,.1f} s of teacher passes" if document.imported is None else "no teacher pass: imported"
    decoded = "nothing on this machine"
    if document.decoded is not None:
        in_use = ", in use" if document.decoded.in_use else ""
        decoded = f"{size(document.decoded.bytes)} on this machine{in_use}"
    drawn = in_words(document.augmentation).removeprefix("kind ")
    facts: dict[str, Any] = {
        "store": document.store,
        "state": state_of(summary) + f", {moment(summary.modified)}",
        "size": f"{size(document.bytes)} in {document.shards_done} of {counted(document.shards, 'shard')}",
        "teacher": f"{_whose(summary) or 'of no known kind'}, fingerprint {document.teacher}",
        "dataset": f"{document.data or 'rows'}, {document.rows:,} rows{_unlabelled(document)}, "
        f"fingerprint {document.dataset}",
        "views": f"{document.views}, drawn by {drawn}" if drawn != "none" else "1, the rows as they are",
        "targets": None if document.targets is None else f"{document.targets:,}, several of a row",
        "logits": f"{document.classes:,} classes, {document.encoding}",
        "took": f"{passes}; {shards}" if hosts else "not known: no receipts",
        "decoded": decoded,
    }
    if document.manifest is not None:
        identity = document.manifest["identity"]
        if loss is not None:
            kl = "" if loss.kl is None else f"KL {loss.kl:.2g} nats on average, "
            facts["rounded"] = f"on {loss.rows} rows: {kl}logits by {loss.largest_difference:.2g} at most"
        facts["tokens"] = identity.get("tokens")
        facts["fidelity"] = _fidelity(document.manifest.get("fidelity"))
        facts["data seed"] = identity["data_seed"]
        facts["format"] = identity["format"]
        facts["computed"] = document.manifest["computed"]
        facts["teacher is"] = document.manifest["teacher"].get("spec", "")
        facts["inputs"] = document.manifest["dataset"].get("meaning", "")
        facts["sealed as"] = document.manifest["sha256"]
    facts["runs"] = f"{len(document.runs)}, the last {_ago(summary.last_used)}" if document.runs else "none so far"
    return {name: value for name, value in facts.items() if value not in ("", None)}


def _fidelity(card: dict[str, Any] | None) -> Any:
    """How well a store describes its teacher, temperature by temperature."""
    if card is None or "at" not in card:
        return card

    def figure(one: dict[str, Any], name: str) -> str:
        value = one.get(f"{name}_hidden_error", one[f"{name}_error"]) if name == "unigram" else one[name]
        return "inf" if value is None else f"{value:.3f}"

    each = [
        f"T = {one['temperature']:g}: KL {figure(one, 'kl')}, total variation {figure(one, 'total_variation')}, "
        f"gradient error {figure(one, 'unigram')}"
        for one in card["at"]
    ]
    return f"{'; '.join(each)}; on {card['targets']} targets"


def _unlabelled(document: StoreDocument) -> str:
    """How many of a store's rows have no label, where there are some."""
    labelled = document.manifest["dataset"].get("labelled") if document.manifest is not None else None
    return f", {document.rows - labelled:,} of them without labels" if isinstance(labelled, int) else ""


def state_of(summary: StoreSummary) -> str:
    """Whether a store is sealed, how far it is, or why it cannot be read."""
    if summary.problem:
        return summary.problem
    return "sealed" if summary.sealed else f"{summary.shards_done} of {summary.shards} shards"


def short_state_of(summary: StoreSummary) -> str:
    """The same in a few characters, for stores that are not sealed."""
    return "unreadable" if summary.problem else f"{summary.shards_done} of {summary.shards}"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def moment(seconds: float) -> str:
    """A time on this machine's clock, to the minute; nothing for one that is not known."""
    return "" if not seconds else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    past = max(0.0, time.time() - seconds)
    for unit, length in (("d", DAY), ("h", 3600.0), ("min", 60.0)):
        if past >= length:
            return f"{past / length:.0f} {unit} ago"
    return "just now"
