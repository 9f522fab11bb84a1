"""Options and arguments that several commands share, and the group that lists commands in the order of their story."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

DEFAULT_ROOTS = {"store_root": "stores", "run_root": "runs"}

Command = TypeVar("Command", bound=Callable[..., Any])


def options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, shown by --help in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


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
    default=DEFAULT_ROOTS["store_root"],
    show_default=True,
    help="Where stores lie: a folder or s3://...",
)
run_root_option = click.option(
    "--run-root", metavar="DIR", default=DEFAULT_ROOTS["run_root"], show_default=True, help="Where runs lie."
)
cache_root_option = click.option(
    "--cache-root", metavar="DIR", help="Prepared data.  [default: the user's cache folder]"
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
id_argument = click.argument("store_id", metavar="ID")

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
        """Without a word, print the help and leave with 0."""
        if not args:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)
