"""`akd-dist stores`: see, check and mend stores of logits."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import akd_dist
from akd_dist.base.errors import DamagedError, RecipeError, printable
from akd_dist.base.places import STORE_ROOT
from akd_dist.cli.imported import print_imported
from akd_dist.cli.options import Group, complete_store, id_argument, json_option, options, shared, taking
from akd_dist.cli.recipes import load
from akd_dist.cli.show import (
    SHORT_ID,
    command_line,
    counted,
    print_facts,
    print_json,
    print_table,
    progress_console,
    result_console,
    short_path,
    size,
    stdout_for_results,
    table_of,
)
from akd_dist.cli.store_facts import (
    COLUMNS,
    DAY,
    cells_of,
    entry_of,
    facts_of,
    in_order,
    moment,
    narrow,
    short_state_of,
    state_of,
)
from akd_dist.options import ImportLogitsOptions, Options

if TYPE_CHECKING:
    from akd_dist.storage.removal import Candidate

# Columns of text that it takes to say more of each store in a list.
WIDE = 140
UNITS = {"h": 3600.0, "d": DAY, "w": 7 * DAY}


def _seconds(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """Seconds, from `12h`, `30d` or `8w`."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([hdw])", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no duration; give hours, days or weeks, such as 12h, 30d or 8w")
    return float(found[1]) * UNITS[found[2]]


@click.group("stores", cls=Group)
def stores() -> None:
    """See, check and mend stores of logits."""


@stores.command("list")
@options(shared("store_root"), json_option)
def stores_list(store_root: str, as_json: bool) -> None:
    """Every store under the root, sealed or not.

    What was used last stands first, those of one teacher together; what nobody used yet stands last.
    """
    from akd_dist.documents.stores import StoresDocument
    from akd_dist.storage.catalog import list_stores

    root = STORE_ROOT.chosen(store_root)
    found = in_order(list_stores(root))
    if as_json:
        print_json(StoresDocument(store_root=root, stores=[entry_of(one) for one in found]).model_dump(mode="json"))
        return
    if not found:
        click.echo(f"no stores under {store_root}; `akd-dist cache-teacher RECIPE` makes one")
        return
    from rich.markup import escape

    if result_console().width >= WIDE:
        table = table_of("id", "state", *COLUMNS, "classes", "encoding", "augmentation", "sealed", title=root)
        for one in found:
            rest = (str(one.classes), one.encoding, escape(str(one.augmentation.get("kind", ""))), moment(one.modified))
            table.add_row(one.id[:SHORT_ID], "unreadable" if one.problem else state_of(one), *cells_of(one), *rest)
    else:
        table = narrow(table_of("id", *COLUMNS, title=root))
        for one in found:
            *most, last = cells_of(one)
            table.add_row(one.id[:8], *most, last if one.sealed and not one.problem else short_state_of(one))
    print_table(table)
    _tell_problems({one.id: one.problem for one in found if one.problem})


@stores.command("show")
@options(id_argument, shared("store_root", "cache_root"), json_option)
def stores_show(store_id: str, store_root: str, cache_root: str | None, as_json: bool) -> None:
    """What one store holds, how it was computed, who used it.

    ID may be shortened.
    """
    from akd_dist.documents.stores import StoreDecoded, StoreDocument, StoreReceipts
    from akd_dist.storage import catalog
    from akd_dist.storage.decoded import find_decoded
    from akd_dist.storage.reader import read_manifest

    root = STORE_ROOT.chosen(store_root)
    whole = catalog.resolve_id(root, store_id)
    summary = catalog.summary_of(root, whole)
    uri = f"{root.rstrip('/')}/{whole}"
    manifest = read_manifest(uri) if summary.sealed else None
    decoded = None if manifest is None else find_decoded(manifest, Path(Options(cache_root=cache_root).cache))
    receipts = catalog.receipts_of(root, whole)
    document = StoreDocument(
        **entry_of(summary).model_dump(),
        store=uri,
        receipts=StoreReceipts(
            seconds=round(sum(receipt.seconds for receipt in receipts), 3),
            hosts=dict(Counter(receipt.host for receipt in receipts)),
        ),
        decoded=None if decoded is None else StoreDecoded(bytes=decoded.bytes, in_use=decoded.in_use),
        manifest=None if manifest is None else manifest.model_dump(mode="json"),
    )
    if as_json:
        print_json(document.model_dump(mode="json"))
    else:
        print_facts(facts_of(document, summary, None if manifest is None else manifest.loss))
        for use in document.uses:
            who = use.host if use.user is None else f"{use.user}@{use.host}"
            when = use.time[:16].replace("T", " ")
            click.echo(printable(f"used        {when}  {short_path(use.run)}  {who}  {use.command}"))


@stores.command("import")
@taking(ImportLogitsOptions)
@json_option
def stores_import(as_json: bool, **given: Any) -> None:
    """Make stores of logits that others computed.

    LOGITS is a .npy, .npz, .safetensors or Parquet file, or a Zarr folder: floats [rows, classes], or [views, rows,
    classes], a row for each row of the train source or of the split, in their order or by --key. The same logits again
    are a hit, and mend a store that is damaged. RECIPE needs no teacher.
    """
    with stdout_for_results():
        document = akd_dist.import_logits(**given, console=progress_console())
    if as_json:
        print_json(document)
    else:
        from akd_dist.documents.imported import ImportedDocument

        print_imported(ImportedDocument.model_validate(document), **given)


@stores.command("verify")
@options(id_argument, shared("store_root"))
@click.option("--shallow", is_flag=True, help="Check presence and sizes only, without reading the shards.")
@json_option
def stores_verify(store_id: str, store_root: str, shallow: bool, as_json: bool) -> int:
    """Check every byte of a sealed store.

    Exit code 5 if anything is not what was sealed. ID may be shortened.
    """
    from akd_dist.documents.stores import StoreDamage, VerifyDocument
    from akd_dist.storage import catalog, repair

    root = STORE_ROOT.chosen(store_root)
    whole = catalog.resolve_id(root, store_id)
    damages = repair.verify_store(root, whole, deep=not shallow)
    if as_json:
        parts = [StoreDamage(key=damage.key, problem=damage.problem) for damage in damages]
        print_json(VerifyDocument(id=whole, damages=parts).model_dump(mode="json"))
        return DamagedError.code if damages else 0
    if damages:
        listed = "\n       ".join(f"{damage.key}: {damage.problem}" for damage in damages)
        raise DamagedError(
            f"the store {whole[:SHORT_ID]} is damaged in {counted(len(damages), 'place')}",
            got=listed,
            expected="what its manifest says",
            next=command_line("stores repair", whole[:SHORT_ID], store_root=store_root),
        )
    click.echo(f"the store {whole[:SHORT_ID]} is what was sealed" + (" (sizes only)" if shallow else ""))
    return 0


@stores.command("repair")
@options(
    id_argument,
    click.option("--recipe", "recipe_path", metavar="RECIPE", help="How to recompute, if paths have changed."),
)
@options(shared("overrides", "trust", "store_root", "cache_root"), json_option)
def stores_repair(
    store_id: str,
    recipe_path: str | None,
    overrides: tuple[str, ...],
    trust: tuple[str, ...],
    store_root: str,
    cache_root: str | None,
    as_json: bool,
) -> None:
    """Recompute the damaged shards of a store.

    These only, and to the very bytes that were sealed. ID may be shortened.
    """
    if overrides and recipe_path is None:
        raise RecipeError("--set changes a recipe and none is given", got="--set", next="add --recipe RECIPE")
    recipe = load(recipe_path, overrides) if recipe_path else None
    from akd_dist.jobs.repair import repair
    from akd_dist.storage.catalog import resolve_id

    root = STORE_ROOT.chosen(store_root)
    whole = resolve_id(root, store_id)
    with stdout_for_results():
        document = repair(root, whole, recipe, Options(cache_root=cache_root).cache, progress_console(), trust=trust)
    if as_json:
        print_json(document)
        return
    for key in document["repaired"]:
        click.echo(f"repaired {key}")
    click.echo(f"the store {whole[:SHORT_ID]} is what was sealed")


@stores.command("gc")
@click.argument("store_ids", metavar="[IDS]", nargs=-1, shell_complete=complete_store)
@click.option(
    "--older-than", metavar="TIME", callback=_seconds, help="Also remove stores sealed so long ago: 12h, 90d, 8w."
)
@click.option(
    "--unused-for",
    metavar="TIME",
    callback=_seconds,
    help="Also remove stores that no run has begun to use for so long.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--yes", is_flag=True, help="Remove stores without asking.")
@options(shared("store_root", "cache_root"), json_option)
def stores_gc(
    store_ids: tuple[str, ...],
    older_than: float | None,
    unused_for: float | None,
    dry_run: bool,
    yes: bool,
    store_root: str,
    cache_root: str | None,
    as_json: bool,
) -> None:
    """Remove what interrupted runs left; on request, old stores.

    Without options: partial files, damaged shards set aside, claims of the dead. With --older-than or --unused-for
    (with both, where both hold), whole stores as well, their decoded copies on this machine included; IDS keep this to
    the stores named. A store that someone holds or uses stays.
    """
    from akd_dist.documents.stores import GcDocument, StoreProblem, StoreRemoval
    from akd_dist.storage import catalog, removal

    root, cache = STORE_ROOT.chosen(store_root), Path(Options(cache_root=cache_root).cache)
    asked = older_than is not None or unused_for is not None
    _check_gc(store_ids, asked=asked, silent=dry_run or yes)
    ids = [catalog.resolve_id(root, store_id) for store_id in store_ids]
    candidates = removal.disused(root, cache, older_than=older_than, unused_for=unused_for, ids=ids) if asked else []
    going = [one.store for one in candidates if one.kept is None]
    if not as_json or not (dry_run or yes):
        _print_candidates(candidates, asked=asked, to_stderr=as_json)
    if going and not (dry_run or yes):
        freed = size(sum(one.bytes for one in going))
        if not click.confirm(f"remove {counted(len(going), 'store')}, {freed}?", err=True):
            click.echo("nothing was removed", err=as_json)
            if not as_json:
                return
            dry_run = True
    problems = dict[str, str]()
    removed = removal.gc(root, dry_run=dry_run, on_problem=lambda name, error: problems.update({name: error.line}))
    kept = {one.store.id: one.kept for one in candidates}
    for store in going if not dry_run else []:
        kept[store.id] = removal.remove_store(root, store.id, cache)
        if not as_json:
            told = f"store {_short(store.id, SHORT_ID)}"
            click.echo(f"kept {told}: {kept[store.id]}" if kept[store.id] else f"removed {told}, {size(store.bytes)}")
    if as_json:
        parts = [StoreRemoval(id=one.store.id, bytes=one.store.bytes, kept=kept[one.store.id]) for one in candidates]
        bad = [StoreProblem(id=name, problem=problem) for name, problem in problems.items()]
        print_json(GcDocument(dry_run=dry_run, removed=removed, stores=parts, problems=bad).model_dump(mode="json"))
        return
    _tell_problems(problems)
    for key in removed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {key}")
    click.echo(f"{counted(len(removed), 'file')} of interrupted runs {'to remove' if dry_run else 'removed'}")


def _short(name: str, digits: int) -> str:
    """The first digits of an id, with the folder that it may lie in: `rows/361f9e9e`."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last[:digits]}"


def _check_gc(store_ids: Sequence[str], *, asked: bool, silent: bool) -> None:
    if store_ids and not asked:
        raise RecipeError(
            "ids say which stores may go, and not when",
            got=" ".join(store_ids),
            expected="--older-than or --unused-for beside them",
            next="--older-than 0h takes them however old they are",
        )
    if asked and not silent and not sys.stdin.isatty():
        raise RecipeError(
            "stores are not removed without asking, and there is no terminal to ask on",
            expected="--yes",
            next="look with --dry-run first, then give --yes",
        )


def _print_candidates(candidates: Sequence[Candidate], *, asked: bool, to_stderr: bool) -> None:
    going = [one.store for one in candidates if one.kept is None]
    if going:
        table = narrow(table_of("id", *COLUMNS))
        for store in in_order(going):
            table.add_row(_short(store.id, 8), *cells_of(store))
        print_table(table, stderr=to_stderr)
    for one in candidates:
        if one.kept is not None:
            click.echo(f"stays: {_short(one.store.id, SHORT_ID)}, {one.kept}", err=to_stderr)
    if asked and not going:
        click.echo("no stores to remove", err=to_stderr)
    elif going:
        click.echo(f"{counted(len(going), 'store')}, {size(sum(store.bytes for store in going))}", err=to_stderr)


def _tell_problems(problems: Mapping[str, str]) -> None:
    """One line for each store that is bad; the others are shown and collected all the same."""
    for name, problem in problems.items():
        click.echo(f"{name[:SHORT_ID]}: {problem}", err=True)


# ---- stores in words
