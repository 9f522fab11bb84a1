"""Whose word it takes to run code of the user's own: nothing runs because a document says so.

Sources, augmentations and models may be functions `module:function`. The recipe that a user gives to a command may name
those that lie in its folder, and those of modules that it lists under `code:`. A model folder, a store or a run, which
may come from anywhere, runs only what that recipe names as well, or what the user trusts by name (`--trust module`).
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from akd_dist.base.errors import RecipeError

MODULE = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
"""The name of a module, as `code:` and `--trust` take it."""


def _working_folder() -> str | None:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed meanwhile
        return None


class Trusted(BaseModel):
    """Which factories may be imported. Nothing by default; `factories.import_factory` goes by it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factories: tuple[str, ...] = ()
    """What the user's recipe names, as `module:function`: allowed where the module lies in `folder`."""
    folder: str | None = None
    """The folder of the user's recipe: modules are looked for there after all that is installed."""
    elsewhere: str | None = None
    """The folder that a run or a store names: of its modules, only those that the user lists may be imported."""
    modules: tuple[str, ...] = ()
    """Modules that the user lists: they and all that lies below them, wherever Python finds them."""
    working: str | None = Field(default_factory=_working_folder)
    """The folder that the command runs in: of its modules, too, only those that the user lists may be imported."""
    named_by: str = "a document"
    """Who names the factory, for messages."""

    def seen_from(self, named_by: str, folder: str | None = None) -> Trusted:
        """The same trust for what something else names.

        Args:
            named_by: who names it, for messages.
            folder: where listed modules may lie as well, if the user's recipe has no folder of its own.
        """
        return self.model_copy(update={"named_by": named_by, "elsewhere": folder})

    @property
    def place(self) -> str | None:
        """The folder that relative paths in arguments start from."""
        return self.folder or self.elsewhere

    def lists(self, module: str) -> bool:
        """Whether the user lists a module, or a package above it."""
        return any(module == one or module.startswith(f"{one}.") for one in self.modules)


def check_module(name: str) -> None:
    """Refuse what is no module's name, as a path or a factory.

    Raises:
        RecipeError: so it is.
    """
    if re.fullmatch(MODULE, name) is None:
        raise RecipeError(
            "--trust takes the name of a module",
            got=name,
            expected="a name as for `import`, such as nets or mine.nets",
            next="write the part of the factory before the colon",
        )
