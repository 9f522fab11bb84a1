"""Options and arguments that several commands share, and the group that lists commands in the order of their story."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from akd_dist.base import places
from akd_dist.base.places import RUN_ROOT, STORE_ROOT

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

    root = places.absolute(context.params.get("store_root") or STORE_ROOT.chosen())
    try:
        names = [] if "://" in root else sorted(entry.name for entry in Path(root).iterdir())
    except OSError:
        names = []
    return [CompletionItem(name) for name in names if STORE_ID.fullmatch(name) and name.startswith(incomplete)]


recipe_argument = click.argument("recipe_path", metavar="RECIPE", type=click.Path())
set_option = click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable."
)
trust_option = click.option(
    "--trust",
    metavar="MODULE",
    multiple=True,
    help="Let a model folder, a store or a run name code of this module; repeatable.",
)
store_root_option = click.option(
    "--store-root",
    metavar="URI",
    envvar=STORE_ROOT.variable,
    show_envvar=True,
    default=STORE_ROOT.default,
    show_default=True,
    shell_complete=complete_folder,
    help="Where stores lie: a folder or s3://...",
)
run_root_option = click.option(
    "--run-root",
    metavar="DIR",
    envvar=RUN_ROOT.variable,
    show_envvar=True,
    default=RUN_ROOT.default,
    show_default=True,
    shell_complete=complete_folder,
    help="Where runs lie.",
)
cache_root_option = click.option(
    "--cache-root",
    metavar="DIR",
    shell_complete=complete_folder,
    help="Prepared data.  [default: AKD_DIST_CACHE, or the user's cache folder]",
)
address_option = click.option(
    "--address", metavar="ADDRESS", help="A Ray cluster.  [default: one is started here, on loopback]"
)
wait_option = click.option(
    "--wait", is_flag=True, help="Wait for whoever holds the store or the run, instead of leaving."
)
fresh_option = click.option("--fresh", is_flag=True, help="Forget an earlier run of this name and start over.")
prepare_again_option = click.option(
    "--prepare-again", is_flag=True, help="Prepare the data afresh, whatever was prepared before."
)
tracker_option = click.option(
    "--tracker",
    "trackers",
    type=click.Choice(["mlflow", "wandb"]),
    multiple=True,
    help="Forward every student's metrics there too; repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
id_argument = click.argument("store_id", metavar="ID", shell_complete=complete_store)

cache_options = options(set_option, trust_option, store_root_option, cache_root_option, address_option, wait_option)
train_options = options(
    set_option,
    trust_option,
    store_root_option,
    run_root_option,
    cache_root_option,
    address_option,
    fresh_option,
    wait_option,
    tracker_option,
    json_option,
)


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
