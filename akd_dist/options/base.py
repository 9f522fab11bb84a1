"""What an option is, how the kind of its value is checked, and the options that verbs of several kinds share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from akd_dist.base import places
from akd_dist.base.errors import RecipeError
from akd_dist.base.places import STORE_ROOT

if TYPE_CHECKING:
    from rich.console import Console

    from akd_dist.recipe import Recipe

Default = TypeVar("Default")


def option(default: Default, flag: str, **shown: Any) -> Default:
    """A keyword argument that is an option of the command line: its default, its flag, and click's arguments."""
    chosen: Default = field(default=default, metadata={"flag": flag, **shown})
    return chosen


def is_path(value: object) -> bool:
    """Whether it can name a file."""
    return isinstance(value, str | os.PathLike)


def _is_list(value: object, of: Callable[[object], bool] = lambda one: isinstance(one, str)) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(of, value))


def wrong_kind(name: str, value: object, expected: str) -> RecipeError:
    """An argument of a kind that it cannot be."""
    got = f"{type(value).__name__}: {value!r}"
    return RecipeError(
        f"the argument {name} is not what it takes", got=got, expected=expected, next="pass such a value"
    )


# What a field of some annotation takes: in words, and as a check. Commands have click look at most of it.
_TAKES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "str | Path": ("a path", is_path),
    "str | Sequence[str]": ("text, or a list of texts", lambda value: isinstance(value, str) or _is_list(value)),
    "Sequence[str]": ("a list of texts", _is_list),
    "Sequence[str | Path]": ("a list of paths", functools.partial(_is_list, of=is_path)),
}
_TAKES |= dict.fromkeys(("Device", "LastBatch", "LogitKind", "Split", "Target"), _TAKES["str"])


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb takes.

    Raises:
        RecipeError: an argument is of a kind that it cannot be.
    """

    trust: Sequence[str] = option(
        (),
        "--trust",
        metavar="MODULE",
        multiple=True,
        help="Let a model folder, a store or a run name code of this module; repeatable.",
    )
    """Modules of your own, on Python's path or in the working folder, that a recipe, a model folder or a run may name;
    others do not run."""
    cache_root: str | Path | None = option(
        None,
        "--cache-root",
        metavar="DIR",
        folder=True,
        help="Prepared data.  [default: AKD_DIST_CACHE, or the user's cache folder]",
    )
    """Folder of this machine's prepared data and decoded stores; by default in the user's cache folder."""
    console: Console | None = None
    """Where progress is told; None is stderr for verbs that train, and nowhere for those that use a model."""

    def __post_init__(self) -> None:
        """A wrong kind is told at once: later it would be a mistake in the middle of the work, or not be noticed."""
        for one in fields(self):
            value, annotation = getattr(self, one.name), str(one.type)
            kind = annotation.removesuffix(" | None")
            if (value is None and kind != annotation) or kind not in _TAKES:
                continue
            expected, fits = _TAKES["str | Sequence[str]" if one.name == "trust" else kind]
            if (choices := one.metadata.get("choices")) is not None:
                expected = f"{expected}: {', '.join(choices)}"
            if not fits(value) or (choices and not set([value] if isinstance(value, str) else value) <= set(choices)):
                raise wrong_kind(one.name, value, expected)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are trusted, their names checked.

        Raises:
            RecipeError: one is no module's name.
        """
        from akd_dist.base.trusted import check_module

        names = (self.trust,) if isinstance(self.trust, str) else tuple(self.trust)
        for name in names:
            check_module(name)
        return names

    @property
    def cache(self) -> str:
        """The cache root, absolute.

        Raises:
            RecipeError: it is a URI: what lies there is mapped into memory.
        """
        from akd_dist.storage.node_cache import cache_folder, ensure_home

        root = cache_folder(self.cache_root)
        ensure_home(root)
        return str(root)


@dataclass(frozen=True, kw_only=True)
class RecipeFileOptions(Options):
    """What every verb takes that reads a recipe."""

    recipe: Recipe | str | Path = field(kw_only=False, metadata={"argument": "RECIPE"})
    """A recipe, or the path of its file."""
    overrides: Sequence[str] = option(
        (), "--set", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable."
    )
    """`key=value` for a recipe file."""

    def read(self) -> Recipe:
        """The recipe: read from its file, and trusting what the user trusts.

        Raises:
            RecipeError: there is none, or something is wrong with it; overrides are given for one that is no file.
        """
        from akd_dist.recipe import Recipe, load_recipe

        if not isinstance(self.recipe, Recipe) and not is_path(self.recipe):
            raise wrong_kind("recipe", self.recipe, "an akd_dist.recipe.Recipe, or the path of its file")
        if isinstance(self.recipe, Recipe) and self.overrides:
            raise RecipeError(
                "overrides are for the file of a recipe, and this one is an object",
                got=", ".join(self.overrides),
                expected="no overrides, or the path of the file",
                next="load_recipe(path, overrides) reads a file with them",
            )
        read = self.recipe if isinstance(self.recipe, Recipe) else self._from_file(load_recipe)
        return read.model_copy(update={"code": [*read.code, *self.modules]}) if self.trust else read

    def _from_file(self, load: Callable[..., Recipe]) -> Recipe:
        return load(self.recipe, self.overrides)


@dataclass(frozen=True, kw_only=True)
class StoredOptions(RecipeFileOptions):
    """What the verbs take that look for the stores of a recipe."""

    store_root: str | Path | None = option(
        None,
        "--store-root",
        metavar="URI",
        root=STORE_ROOT,
        folder=True,
        help="Where stores lie: a folder or s3://...",
    )
    """Folder or `s3://` URI under which stores lie; None takes $AKD_DIST_STORE_ROOT, or `stores`."""

    @property
    def stores(self) -> str:
        """The store root, absolute.

        Raises:
            RecipeError: its name is not UTF-8.
        """
        return places.nameable(STORE_ROOT.chosen(self.store_root), "--store-root")


@dataclass(frozen=True, kw_only=True)
class FillingOptions(StoredOptions):
    """What the verbs take that fill these stores."""

    wait: bool = option(
        False, "--wait", is_flag=True, help="Wait for whoever holds the store or the run, instead of leaving."
    )
    """Wait for somebody else who holds the store or the run, instead of leaving."""
    dry_run: bool = option(
        False, "--dry-run", is_flag=True, help="Say what would be done; refuse what the command would."
    )
    """Only say what would be done, and refuse what the command would; takes no lock and leaves everything as it is."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(FillingOptions):
    """What the verbs that work from a recipe take."""

    address: str | None = option(
        None, "--address", metavar="ADDRESS", help="A Ray cluster.  [default: one is started here, on loopback]"
    )
    """A Ray cluster; None starts one on this machine if there is anything to compute that is worth its start."""
    wait_for_nodes: bool = option(
        False,
        "--wait-for-nodes",
        is_flag=True,
        help="Wait where the cluster is too small: for whom nodes join by other means than Ray's autoscaler, as SLURM. "
        "Where there is an autoscaler, a command waits anyway.",
    )
    """Wait for nodes instead of refusing a cluster that is too small; needed where they join by other means than Ray's
    autoscaler, for which a command waits anyway."""

    @property
    def patient(self) -> bool:
        """Whether nodes are waited for.

        Raises:
            RecipeError: on a Ray that is started here, which no node joins.
        """
        if self.wait_for_nodes and self.address is None:
            from akd_dist.base.errors import RecipeError

            raise RecipeError(
                "--wait-for-nodes without --address would wait for ever",
                got="a Ray that is started on this machine, and that no node joins",
                expected="the address of a cluster that nodes join",
                next="add --address, or leave --wait-for-nodes out",
            )
        return self.wait_for_nodes


@dataclass(frozen=True, kw_only=True)
class WritingOptions(Options):
    """What every verb takes that writes what it finds."""

    force: bool = option(False, "--force", is_flag=True, help="Overwrite what is there.")
    """Whether `out` may take the place of something else."""
