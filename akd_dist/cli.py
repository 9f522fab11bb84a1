"""The `akd-dist` command: options in, one message or one document out, and an exit code.

    akd-dist quickstart          the whole story on real digits
    akd-dist --help              every command

Results go to stdout, everything else to stderr. Heavy imports happen inside commands, so that help is instant.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import akd_dist
from akd_dist.storage.errors import AkdError, DamagedError, InterruptedByUser, RecipeError, TerminatedError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from akd_dist.recipe import Assistant, Recipe, Source

DEFAULT_ROOTS = {"store_root": "stores", "run_root": "runs"}
# Enough of a store's id to tell stores apart, and accepted wherever an id is.
SHORT_ID = 12
STUDENTS_SHOWN = 200
# Columns whose digits stand below each other.
NUMBERS = {"rows", "views", "classes", "shards", "size", "epochs", "batch", "workers"}

Command = TypeVar("Command", bound=Callable[..., Any])
Roots = dict[str, str | None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: the one place where an error becomes a message and a code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _terminable():
            code = cli.main(args=given, prog_name="akd-dist", standalone_mode=False)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        code = refuse(_as_refusal(error, given), as_json="--json" in given)
    sys.exit(code or 0)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Leave with a message on SIGTERM as well, wherever nothing more careful is in charge of it."""

    def leave(_number: int, _frame: object) -> None:
        raise TerminatedError("terminated", next="run the same command again: what was written is kept")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stdout_for_results() -> contextlib.AbstractContextManager[object]:
    """Send whatever libraries print meanwhile to stderr: Ray reports dead workers on stdout, where documents belong."""
    return contextlib.redirect_stdout(sys.stderr)


def _as_refusal(error: BaseException, arguments: list[str]) -> AkdError:
    match error:
        case AkdError():
            return error
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "akd-dist"
            return RecipeError(
                error.format_message(), got=shlex.join(["akd-dist", *arguments]), next=f"{command} --help"
            )
        case click.ClickException():
            return RecipeError(error.format_message(), next="akd-dist --help")
        case click.Abort() | KeyboardInterrupt():
            return InterruptedByUser("interrupted", next="run the same command again: what was written is kept")
        case _:
            return _bug(error, arguments)


def _bug(error: BaseException, arguments: list[str]) -> AkdError:
    """An error that nobody foresaw: the traceback goes to a file, its path into the message."""
    log = _log_folder() / f"bug-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**6}.log"
    from importlib.metadata import version

    head = [
        shlex.join(["akd-dist", *arguments]),
        f"akd-dist {version('akd-dist')}, Python {platform.python_version()}, {platform.platform()}",
    ]
    log.write_text("\n".join([*head, "", *traceback.format_exception(error)]))
    return AkdError(
        "something went wrong that akd-dist did not foresee; this is a bug in it",
        got=f"{type(error).__name__}: {error}",
        next=f"report it with the log {log}; the same command may go on from what was written",
    )


def _log_folder() -> Path:
    import platformdirs

    try:
        folder = platformdirs.user_log_path("akd-dist")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="akd-dist-"))
    return folder


def refuse(error: AkdError, *, as_json: bool) -> int:
    """Say what is wrong on stderr, and on stdout as a document if one was asked for; the exit code."""
    # click leaves the colours out where nobody would see them.
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error.what}", err=True)
    for label, text in (("got", error.got), ("expected", error.expected), ("next", error.next)):
        if text is not None:
            click.echo(f"  {click.style(f'{label}:', bold=True)} {text}", err=True)
    if as_json:
        _print_json({"error": error.to_json()})
    return error.code


# ---- options


def _options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, shown by --help in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_recipe_argument = click.argument("recipe_path", metavar="RECIPE", type=click.Path())
_set = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable."
)
_store_root = click.option(
    "--store-root",
    metavar="URI",
    default=DEFAULT_ROOTS["store_root"],
    show_default=True,
    help="Where stores lie: a folder or s3://...",
)
_run_root = click.option(
    "--run-root", metavar="DIR", default=DEFAULT_ROOTS["run_root"], show_default=True, help="Where runs lie."
)
_cache_root = click.option("--cache-root", metavar="DIR", help="Prepared data.  [default: the user's cache folder]")
_address = click.option(
    "--address", metavar="ADDRESS", help="A Ray cluster.  [default: one is started here, on loopback]"
)
_wait = click.option("--wait", is_flag=True, help="Wait for whoever holds the store or the run, instead of leaving.")
_fresh = click.option("--fresh", is_flag=True, help="Forget an earlier run of this name and start over.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_id = click.argument("store_id", metavar="ID")

_cache_options = _options(_set, _store_root, _cache_root, _address, _wait)
_train_options = _options(_set, _store_root, _run_root, _cache_root, _address, _fresh, _wait, _json)


class _Group(click.Group):
    """Commands in the order of their story, not of the alphabet; alone, it prints its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="akd-dist", message="akd-dist %(version)s")
def cli() -> None:
    """One teacher, run once; fleets of students from its stored logits.

    \b
    Exit codes: 0 done, 1 some students did not succeed, 2 recipe or options
    wrong, 3 held by someone else, 4 data, teacher or student refused, 5 damaged,
    6 the machine, 70 a bug, 130 interrupted, 143 terminated.
    """


# ---- the two verbs


@cli.command("quickstart")
@_train_options
def quickstart(**options: Any) -> int:
    """The whole story on real digits.

    Trains a teacher, caches it, trains students from the store and shows how they do, in under two minutes.
    """
    return _train(_packaged_recipe(), closing=_after_quickstart, **options)


@cli.command("cache-teacher")
@_recipe_argument
@_cache_options
@click.option("--dry-run", is_flag=True, help="Say what would be computed, and refuse what cannot fit.")
@_json
def cache_teacher(
    recipe_path: str,
    overrides: tuple[str, ...],
    store_root: str,
    cache_root: str | None,
    address: str | None,
    wait: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run the teacher once, store its logits.

    A store that is there already is a hit; one that an interrupted run left behind is completed.
    """
    with _stdout_for_results():
        document = akd_dist.cache_teacher(
            recipe_path,
            overrides=overrides,
            store_root=store_root,
            cache_root=cache_root,
            address=address,
            wait=wait,
            dry_run=dry_run,
            console=_progress_console(),
        )
    if as_json:
        _print_json(document)
    elif dry_run:
        _print_plan(document)
    else:
        roots = {"store_root": store_root, "cache_root": cache_root, "address": address}
        _print_cached(document, _command("train-students", recipe_path, overrides, **roots))


@cli.command("train-students")
@_recipe_argument
@_train_options
def train_students(recipe_path: str, **options: Any) -> int:
    """Train students from the stored logits.

    Caches the teacher first if its store is missing. The same command again resumes, or shows the saved results.
    """
    return _train(recipe_path, closing=_after_training, **options)


def _train(
    recipe_path: str,
    *,
    closing: Callable[[dict[str, Any], str, Iterable[str], Roots], list[str]],
    overrides: tuple[str, ...],
    store_root: str,
    run_root: str,
    cache_root: str | None,
    address: str | None,
    fresh: bool,
    wait: bool,
    as_json: bool,
) -> int:
    with _stdout_for_results():
        fleet = akd_dist.train_students(
            recipe_path,
            overrides=overrides,
            store_root=store_root,
            run_root=run_root,
            cache_root=cache_root,
            address=address,
            fresh=fresh,
            wait=wait,
            console=_progress_console(),
        )
    if as_json:
        _print_json(fleet)
    else:
        roots = {"store_root": store_root, "run_root": run_root, "cache_root": cache_root, "address": address}
        _print_fleet(fleet, closing(fleet, recipe_path, overrides, roots))
    return int(any(student["state"] != "done" for student in fleet["students"]))


def _packaged_recipe() -> str:
    """The digits recipe as it ships, by the shortest path that leads there from here."""
    from importlib.resources import files

    path = Path(str(files("akd_dist.jobs") / "digits.yaml")).resolve()
    return _short_path(path)


@cli.command("compare")
@_recipe_argument
@click.option("--seeds", metavar="N", type=int, help="Seeds 0..N-1.  [default: the recipe's if several, else 0, 1, 2]")
@_train_options
def compare(recipe_path: str, as_json: bool, **options: Any) -> int:
    """Train every objective, print the papers' table.

    Each student model of the recipe, from scratch and by KD, TAKD, Annealing-KD and Continuation-KD, with several
    seeds and from one store. What the recipe does not list takes its Annealing-KD student's optimizer and epochs. The
    run is <name>-compare; the same command again resumes, or shows the saved results.
    """
    with _stdout_for_results():
        document = akd_dist.compare(recipe_path, **options, console=_progress_console())
    if as_json:
        _print_json(document)
    else:
        from akd_dist.comparison import MARKDOWN_NAME, comparison_table

        run = Path(document["run"])
        _result_console().print(comparison_table(document))
        click.echo(f"table   {_short_path(run / MARKDOWN_NAME)}")
        click.echo(f"report  {_short_path(run / 'report.html')}")
    return int(any(row["lost"] for row in document["table"]))


# ---- stores


@cli.group("stores", cls=_Group)
def stores() -> None:
    """See, check and mend stores of logits."""


@stores.command("list")
@_options(_store_root, _json)
def stores_list(store_root: str, as_json: bool) -> None:
    """Every store under the root, sealed or not."""
    from dataclasses import asdict

    from akd_dist.storage.catalog import list_stores

    root = akd_dist.absolute_root(store_root)
    found = list_stores(root)
    if as_json:
        _print_json({"store_root": root, "stores": [asdict(summary) for summary in found]})
        return
    if not found:
        click.echo(f"no stores under {store_root}; `akd-dist cache-teacher RECIPE` makes one")
        return
    table = _table("id", "state", "rows", "views", "classes", "encoding", "size", "teacher", title=root)
    for summary in found:
        table.add_row(
            summary.id[:SHORT_ID],
            _state(summary),
            f"{summary.rows:,}",
            str(summary.views),
            str(summary.classes),
            summary.encoding,
            _size(summary.bytes),
            summary.teacher[:SHORT_ID],
        )
    _result_console().print(table)


@stores.command("show")
@_options(_id, _store_root, _json)
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
        _print_json({"store": uri, **asdict(summary), "manifest": manifest})
        return
    facts = {"store": uri, "state": _state(summary), "size": _size(summary.bytes), "shards": summary.shards}
    if manifest is not None:
        facts |= manifest["identity"] | manifest["computed"] | {"teacher is": manifest["teacher"].get("spec")}
    else:
        facts |= {
            name: getattr(summary, name) for name in ("rows", "views", "classes", "encoding", "teacher", "dataset")
        }
    _print_facts(facts)


@stores.command("verify")
@_options(_id, _store_root)
@click.option("--shallow", is_flag=True, help="Check presence and sizes only, without reading the shards.")
@_json
def stores_verify(store_id: str, store_root: str, shallow: bool, as_json: bool) -> int:
    """Check every byte of a sealed store.

    Exit code 5 if anything is not what was sealed. ID may be shortened.
    """
    from akd_dist.storage import catalog

    root = akd_dist.absolute_root(store_root)
    whole = catalog.resolve_id(root, store_id)
    damages = catalog.verify_store(root, whole, deep=not shallow)
    if as_json:
        _print_json({"id": whole, "damages": [{"key": damage.key, "problem": damage.problem} for damage in damages]})
        return DamagedError.code if damages else 0
    if damages:
        listed = "\n       ".join(f"{damage.key}: {damage.problem}" for damage in damages)
        raise DamagedError(
            f"the store {whole[:SHORT_ID]} is damaged in {_counted(len(damages), 'place')}",
            got=listed,
            expected="what its manifest says",
            next=_command("stores repair", whole[:SHORT_ID], store_root=store_root),
        )
    click.echo(f"the store {whole[:SHORT_ID]} is what was sealed" + (" (sizes only)" if shallow else ""))
    return 0


@stores.command("repair")
@_options(
    _id, click.option("--recipe", "recipe_path", metavar="RECIPE", help="How to recompute, if paths have changed.")
)
@_options(_set, _store_root, _cache_root, _json)
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
    recipe = _load(recipe_path, overrides) if recipe_path else None
    from akd_dist.jobs.cache_teacher import repair
    from akd_dist.storage.catalog import resolve_id
    from akd_dist.storage.node_cache import default_cache_root

    root = akd_dist.absolute_root(store_root)
    whole = resolve_id(root, store_id)
    cache = akd_dist.absolute_root(cache_root or default_cache_root())
    with _stdout_for_results():
        document = repair(root, whole, recipe, cache, _progress_console())
    if as_json:
        _print_json(document)
        return
    for key in document["repaired"]:
        click.echo(f"repaired {key}")
    click.echo(f"the store {whole[:SHORT_ID]} is what was sealed")


@stores.command("gc")
@_options(_store_root, _json)
def stores_gc(store_root: str, as_json: bool) -> None:
    """Remove what interrupted runs left.

    Partial files, damaged shards set aside, claims of the dead. Stores that someone holds are left alone.
    """
    from akd_dist.storage.catalog import gc

    removed = gc(akd_dist.absolute_root(store_root))
    if as_json:
        _print_json({"removed": removed})
        return
    for key in removed:
        click.echo(f"removed {key}")
    click.echo(f"{_counted(len(removed), 'file')} removed")


# ---- report and recipe


@cli.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path())
@_json
def report(runs: tuple[str, ...], as_json: bool) -> None:
    """Print the tables of runs, write report.html."""
    from akd_dist.fleet_report import fleet_table, read_fleet

    written = []
    for run in runs:
        path = akd_dist.report(run)
        written.append({"run": run, "report": str(path)})
        if not as_json:
            _result_console().print(fleet_table(read_fleet(Path(run))))
            click.echo(f"report  {_short_path(path)}")
    if as_json:
        _print_json({"reports": written})


@cli.group("recipe", cls=_Group)
def recipe() -> None:
    """Check a recipe, or print its JSON Schema."""


@recipe.command("check")
@_options(_recipe_argument, _set, _json)
def recipe_check(recipe_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Read a recipe and list its students.

    Every default is filled in and every key checked; no data is opened.
    """
    checked = _load(recipe_path, overrides)
    if as_json:
        _print_json({"recipe": checked.model_dump(mode="json"), "students": [one.name for one in checked.students]})
        return
    _print_facts(_recipe_facts(checked))
    table = _table("student", "epochs", "optimizer", "batch", "workers")
    for one in checked.students[:STUDENTS_SHOWN]:
        optimizer = f"{one.optimizer.kind}, lr {one.optimizer.lr:g}, {one.optimizer.schedule.kind}"
        table.add_row(one.name, str(one.objective.epochs), optimizer, str(one.batch), str(one.workers))
    _result_console().print(table)
    if len(checked.students) > STUDENTS_SHOWN:
        click.echo(f"and {len(checked.students) - STUDENTS_SHOWN:,} more")
    click.echo(f"next: {_command('train-students', recipe_path, overrides)}")


@recipe.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes.

    For completion and checks in an editor.
    """
    from akd_dist.recipe import recipe_schema as schema

    _print_json(schema())


def _load(recipe_path: str, overrides: tuple[str, ...]) -> Recipe:
    from akd_dist.recipe import load_recipe

    return load_recipe(recipe_path, overrides)


def _recipe_facts(checked: Recipe) -> dict[str, Any]:
    data, teacher = checked.data, checked.teacher
    trained = (
        f"{teacher.model.label}, trained for {teacher.train.epochs} epochs" if teacher.model and teacher.train else ""
    )
    return {
        "recipe": checked.name,
        "train": _source(data.train),
        "validation": _source(data.validation),
        "test": _source(data.test),
        "views": f"{data.views}, augmentation {data.augmentation.kind}, seed {data.seed}",
        "teacher": teacher.weights or trained,
        **{
            "assistant" if number == 1 else f"assistant {number}": _assistant(one)
            for number, one in enumerate(teacher.chain, 1)
        },
        "cache": f"{checked.cache.encoding}, {checked.cache.batch_rows} rows at once",
        "students": len(checked.students),
        "epochs": f"{sum(one.objective.epochs for one in checked.students):,} over all students",
        "cohorts": checked.cohorts or "as planned",
    }


def _assistant(one: Assistant) -> str:
    return f"{one.model.label}, {one.objective.kind} for {one.objective.epochs} epochs"


def _source(source: float | Source) -> str:
    if isinstance(source, float):
        return f"{source:g} of the train source"
    return source.path if source.kind == "parquet" else source.kind


# ---- what people read


def _progress_console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _result_console() -> Console:
    from rich.console import Console

    console = Console()
    # A pipe has no width: a table that is cut off would help nobody.
    return console if console.is_terminal else Console(width=max(console.width, 160))


def _table(first: str, *others: str, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    # No frame and little padding: eight columns fit into eighty characters.
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in (first, *others):
        table.add_column(column, no_wrap=True, justify="right" if column in NUMBERS else "left")
    return table


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _print_facts(facts: dict[str, Any]) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        click.echo(f"{name:<{width}}{_in_words(value)}")


def _in_words(value: Any) -> str:
    """A document on one line, for reading: `kind mlp, hidden [16], ...`."""
    if not isinstance(value, dict):
        return str(value)
    shown = {key: f"({_in_words(inner)})" if isinstance(inner, dict) else inner for key, inner in value.items()}
    return ", ".join(f"{key} {inner}" for key, inner in shown.items())


def _print_plan(plan: dict[str, Any]) -> None:
    table = _table("split", "rows", "views", "shards to compute", "size", title="what caching would compute")
    models = [("", plan["splits"]), *((f"{one['model']}, ", one["splits"]) for one in plan["assistants"])]
    for split, part in [(whose + split, part) for whose, splits in models for split, part in splits.items()]:
        shards = "none: a hit" if part["hit"] else f"{part['shards']:,}"
        table.add_row(split, f"{part['rows']:,}", str(part["views"]), shards, _size(part["bytes"]))
    _result_console().print(table)
    free = "unknown" if plan["free"] is None else _size(plan["free"])
    click.echo(f"needs {_size(plan['bytes'])} under {plan['store_root']}, free {free}; nothing was computed")


def _print_cached(document: dict[str, Any], next_command: str) -> None:
    models = [document, *document["assistants"]]
    parts = [part for model in models for part in (model, *model["splits"].values())]
    shards, computed = (sum(part[key] for part in parts) for key in ("shards", "shards_computed"))
    how = (
        "a hit: it was there already" if document["hit"] else f"{computed} of {_counted(shards, 'shard')} computed now"
    )
    shape = f"{document['rows']:,} rows x {_counted(document['views'], 'view')} x {document['classes']:,} classes"
    facts = {
        "store": _short_path(document["store"]),
        **{f"assistant {one['model']}": _short_path(one["store"]) for one in document["assistants"]},
        "holds": f"{shape}, {document['encoding']}; validation and test rows beside it",
        "size": f"{_size(sum(part['bytes'] for part in parts))} in {_counted(shards, 'shard')}",
        "took": f"{document['seconds']:.1f} s; {how}",
        "next": next_command,
    }
    _print_facts(facts)


def _print_fleet(fleet: dict[str, Any], next_commands: Iterable[str]) -> None:
    from akd_dist.fleet_report import fleet_table

    _result_console().print(fleet_table(fleet))
    run = Path(fleet["run"])
    click.echo(f"store   {_short_path(fleet['store'])}")
    click.echo(f"report  {_short_path(run / 'report.html')}")
    click.echo("next")
    for command in next_commands:
        click.echo(f"  {command}")


def _after_training(fleet: dict[str, Any], recipe_path: str, overrides: Iterable[str], roots: Roots) -> list[str]:
    again = [*overrides, "data.seed=1", f"name={Path(fleet['run']).name}-seed1"]
    return [
        _command("stores show", Path(fleet["store"]).name[:SHORT_ID], store_root=roots["store_root"]),
        _command("train-students", recipe_path, again, **roots),
    ]


def _after_quickstart(fleet: dict[str, Any], recipe_path: str, overrides: Iterable[str], roots: Roots) -> list[str]:
    copy = "my-digits.yaml"
    return [
        shlex.join(["cp", recipe_path, copy]) + "     # then change what you like",
        _command("train-students", copy, [*overrides, "name=my-digits"], **roots),
    ]


def _command(verb: str, target: str, overrides: Iterable[str] = (), **roots: str | None) -> str:
    """A command to type next, with what this one was given."""
    words = ["akd-dist", *verb.split(), target]
    for override in overrides:
        words += ["--set", override]
    for name, value in roots.items():
        if value not in (None, DEFAULT_ROOTS.get(name)):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _state(summary: Any) -> str:
    if summary.problem:
        return str(summary.problem)
    return "sealed" if summary.sealed else f"{summary.shards_done} of {summary.shards} shards"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _short_path(path: str | Path) -> str:
    """A path below the working directory without it; anything else, and a URI, as it is."""
    here = f"{Path.cwd()}/"
    return str(path).removeprefix(here)


if __name__ == "__main__":
    main()
