"""Options and arguments that several commands share, and the group that lists commands in the order of their story."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from akd_dist.base import places
from akd_dist.base.errors import AkdError
from akd_dist.base.places import RUN_ROOT, STORE_ROOT
from akd_dist.options import Options, RunOptions

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

DEFAULT_ROOTS = {"store_root": STORE_ROOT.default, "run_root": RUN_ROOT.default}
STORE_ID = re.compile("[0-9a-f]{64}")

Command = TypeVar("Command", bound=Callable[..., Any])


def options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, shown by --help in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def complete_folder(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Have the shell complete a folder: a run, a student's, one of stores."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def complete_store(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The ids of the stores under a local root that begin so: of their folders' names alone, so that it is instant."""
    from click.shell_completion import CompletionItem

    try:
        root = places.absolute(context.params.get("store_root") or STORE_ROOT.chosen())
        names = [] if "://" in root else sorted(entry.name for entry in Path(root).iterdir())
    except (OSError, AkdError):  # the command itself says what is wrong with the root
        names = []
    return [CompletionItem(name) for name in names if STORE_ID.fullmatch(name) and name.startswith(incomplete)]


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
id_argument = click.argument("store_id", metavar="ID", shell_complete=complete_store)

# In which order --help shows the options that a command has.
ORDER = (
    *("seeds", "student", "prompt", "chat", "tokens", "temperature", "top_p", "seed"),
    *("to", "others", "out", "logits", "data", "split", "input", "label", "tokenizer", "recipe"),
    *("file", "key", "kind", "budget"),
    *(
        "checkpoint",
        "overrides",
        "trust",
        "device",
        "store_root",
        "run_root",
        "cache_root",
        "address",
        "wait_for_nodes",
    ),
    *("fresh", "wait", "trackers", "force", "prepare_again", "dry_run"),
)


def taking(given: type[Options], without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """The arguments and options of a verb, as one decorator."""
    found = [one for one in fields(given) if one.metadata and one.name not in without]
    return options(*(_parameter(one) for one in sorted(found, key=lambda one: ORDER.index(one.name))))


def shared(*names: str) -> Callable[[Command], Command]:
    """Some of the options of the verbs that train, for a command that is none of them."""
    return options(*(_parameter(one) for name in names for one in fields(RunOptions) if one.name == name))


def _parameter(option: Field[Any]) -> Callable[[Any], Any]:
    """A field as click has it."""
    shown = dict(option.metadata)
    if shown.pop("folder", False):
        shown["shell_complete"] = complete_folder
    if (name := shown.pop("argument", None)) is not None:
        return click.argument(option.name, metavar=name, type=click.Path(), **shown)
    if (root := shown.pop("root", None)) is not None:
        shown |= {"envvar": root.variable, "show_envvar": True, "default": root.default, "show_default": True}
    elif option.default is not MISSING and not shown.get("multiple"):
        shown["default"] = option.default
    if shown.get("default") is True:
        # Without click's `flag_value`: some of its versions (8.3.0) take a default of True to be that value.
        shown |= {"is_flag": True, "default": False, "callback": lambda _context, _option, given: not given}
    if (choices := shown.pop("choices", None)) is not None:
        shown["type"] = click.Choice(choices)
    return click.option(shown.pop("flag"), option.name, **shown)


class Group(click.Group):
    """Commands in the order of their story, not of the alphabet; alone, it prints its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they were added."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without a word, print the help and leave with 0; a shell that completes one asks for no help."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)
