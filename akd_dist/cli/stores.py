"""`akd-dist stores`: see, check and mend stores of logits."""

from __future__ import annotations

from typing import Any

import click

import akd_dist
from akd_dist.cli.options import (
    Group,
    cache_root_option,
    id_argument,
    json_option,
    options,
    set_option,
    store_root_option,
)
from akd_dist.cli.recipes import load
from akd_dist.cli.show import (
    SHORT_ID,
    command_line,
    counted,
    print_facts,
    print_json,
    progress_console,
    result_console,
    size,
    stdout_for_results,
    table_of,
)
from akd_dist.storage.errors import DamagedError, RecipeError


@click.group("stores", cls=Group)
def stores() -> None:
    """See, check and mend stores of logits."""


@stores.command("list")
@options(store_root_option, json_option)
def stores_list(store_root: str, as_json: bool) -> None:
    """Every store under the root, sealed or not."""
    from dataclasses import asdict

    from akd_dist.storage.catalog import list_stores

    root = akd_dist.absolute_root(store_root)
    found = list_stores(root)
    if as_json:
        print_json({"store_root": root, "stores": [asdict(summary) for summary in found]})
        return
    if not found:
        click.echo(f"no stores under {store_root}; `akd-dist cache-teacher RECIPE` makes one")
        return
    table = table_of("id", "state", "rows", "views", "classes", "encoding", "size", "teacher", title=root)
    for summary in found:
        table.add_row(
            summary.id[:SHORT_ID],
            _state(summary),
            f"{summary.rows:,}",
            str(summary.views),
            str(summary.classes),
            summary.encoding,
            size(summary.bytes),
            summary.teacher[:SHORT_ID],
        )
    result_console().print(table)


@stores.command("show")
@options(id_argument, store_root_option, json_option)
def stores_show(store_id: str, store_root: str, as_json: bool) -> None:
    """What one store holds, how it was computed.

    ID may be shortened.
    """
    from dataclasses import asdict

    from akd_dist.storage import catalog
    from akd_dist.storage.reader import read_manifest

    root = akd_dist.absolute_root(store_root)
    whole = catalog.resolve_id(root, store_id)
    summary = next(summary for summary in catalog.list_stores(root) if summary.id == whole)
    uri = f"{root.rstrip('/')}/{whole}"
    manifest = read_manifest(uri).model_dump(mode="json") if summary.sealed else None
    if as_json:
        print_json({"store": uri, **asdict(summary), "manifest": manifest})
        return
    facts = {"store": uri, "state": _state(summary), "size": size(summary.bytes), "shards": summary.shards}
    if manifest is not None:
        facts |= manifest["identity"] | manifest["computed"] | {"teacher is": manifest["teacher"].get("spec")}
    else:
        facts |= {
            name: getattr(summary, name) for name in ("rows", "views", "classes", "encoding", "teacher", "dataset")
        }
    print_facts(facts)


@stores.command("verify")
@options(id_argument, store_root_option)
@click.option("--shallow", is_flag=True, help="Check presence and sizes only, without reading the shards.")
@json_option
def stores_verify(store_id: str, store_root: str, shallow: bool, as_json: bool) -> int:
    """Check every byte of a sealed store.

    Exit code 5 if anything is not what was sealed. ID may be shortened.
    """
    from akd_dist.storage import catalog

    root = akd_dist.absolute_root(store_root)
    whole = catalog.resolve_id(root, store_id)
    damages = catalog.verify_store(root, whole, deep=not shallow)
    if as_json:
        print_json({"id": whole, "damages": [{"key": damage.key, "problem": damage.problem} for damage in damages]})
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
@options(set_option, store_root_option, cache_root_option, json_option)
def stores_repair(
    store_id: str,
    recipe_path: str | None,
    overrides: tuple[str, ...],
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
    from akd_dist.jobs.cache_teacher import repair
    from akd_dist.storage.catalog import resolve_id
    from akd_dist.storage.node_cache import default_cache_root

    root = akd_dist.absolute_root(store_root)
    whole = resolve_id(root, store_id)
    cache = akd_dist.absolute_root(cache_root or default_cache_root())
    with stdout_for_results():
        document = repair(root, whole, recipe, cache, progress_console())
    if as_json:
        print_json(document)
        return
    for key in document["repaired"]:
        click.echo(f"repaired {key}")
    click.echo(f"the store {whole[:SHORT_ID]} is what was sealed")


@stores.command("gc")
@options(store_root_option, json_option)
def stores_gc(store_root: str, as_json: bool) -> None:
    """Remove what interrupted runs left.

    Partial files, damaged shards set aside, claims of the dead. Stores that someone holds are left alone.
    """
    from akd_dist.storage.catalog import gc

    removed = gc(akd_dist.absolute_root(store_root))
    if as_json:
        print_json({"removed": removed})
        return
    for key in removed:
        click.echo(f"removed {key}")
    click.echo(f"{counted(len(removed), 'file')} removed")


def _state(summary: Any) -> str:
    if summary.problem:
        return str(summary.problem)
    return "sealed" if summary.sealed else f"{summary.shards_done} of {summary.shards} shards"
