"""Code of the user's own, named as `module:function`: models, data and augmentations; imported only if it is trusted.

The decision is made by names, and by where a module would be found, before anything is imported: importing is running.
"""

import difflib
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import sha256
from akd_dist.base.tracebacks import whole
from akd_dist.base.trusted import Trusted
from akd_dist.data.arguments import contents, placed
from akd_dist.recipe import Factory

# Where installed modules lie, also those of an environment that lies in a recipe's folder.
_INSTALLED = ("site-packages", "dist-packages")


def import_factory(spec: Factory, signature: str) -> Callable[..., object]:
    """The function that a spec names as `module:function`, if the spec's `trusted` allows it.

    Args:
        spec: a source, an augmentation or a model of kind `custom`.
        signature: what the function should look like, for messages: `(input_shape, classes, ...) -> torch.nn.Module`.

    Raises:
        RefusedError: nobody trusts it, and then nothing was imported; there is no such module or function, or the
            module fails to import; its traceback is shown.
    """
    name = spec.factory
    module_name, _, function = name.partition(":")
    _check_trusted(name, module_name, spec.trusted)
    beside = spec.trusted.folder is not None
    where = "beside the recipe, or name its place with `folder:`" if beside else "here, or on Python's path"
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "\0")
        raise RefusedError(
            f"the factory {name} cannot be imported",
            got=error if missing else whole(error),
            expected=f"a module {module_name} that imports",
            next=f"put {module_name.partition('.')[0]}.py {where}",
        ) from error
    factory = getattr(module, function, None)
    if not callable(factory):
        names = [one for one in vars(module) if not one.startswith("_")]
        raise RefusedError(
            f"the module {module_name} has no function {function}",
            got=", ".join(difflib.get_close_matches(function, names)) or "no similar name",
            expected=f"def {function}{signature}",
            next="correct `factory` in the recipe, or write that function",
        )
    return factory  # type: ignore[no-any-return]


def source_of(spec: Factory, signature: str) -> Path | None:
    """The file of the module that a spec names, which stands for its code; None where it has none.

    Raises:
        RefusedError: as `import_factory`.
    """
    import_factory(spec, signature)
    file = getattr(sys.modules[spec.factory.partition(":")[0]], "__file__", None)
    return None if file is None else Path(file)


def source_sha256(spec: Factory, signature: str) -> str | None:
    """sha256 of the file that a factory lies in; None where its module has none.

    Raises:
        RefusedError: as `import_factory`.
    """
    file = source_of(spec, signature)
    return None if file is None else sha256(file.read_bytes())


def read_beside(spec: Factory) -> dict[str, str]:
    """What the function that a spec names may read beside the file that it lies in, as far as that is known.

    Returns:
        The sha256 of the files and folders that its arguments name, by the argument; and of the modules of the recipe's
        folder that its own imports, by name. Empty for most.

    Raises:
        RefusedError: a file cannot be read.
    """
    return contents(spec.arguments, spec.trusted.place) | _imported(spec)


def _imported(spec: Factory) -> dict[str, str]:
    """The modules that lie in the folder of the recipe, found by reading `import` in the one that the spec names."""
    own, place = spec.factory.partition(":")[0], spec.trusted.place
    if place is None:
        return {}
    finder = ModuleFinder(path=[place], excludes=["akd_dist"])
    try:
        finder.import_hook(own)
    except (ImportError, SyntaxError):  # it lies elsewhere, or is no Python
        return {}
    files = {name: getattr(module, "__file__", None) for name, module in finder.modules.items() if name != own}
    return {name: sha256(Path(file).read_bytes()) for name, file in sorted(files.items()) if file is not None}


def call_factory(spec: Factory, signature: str, arguments: Mapping[str, Any]) -> object:
    """What the function that a spec names returns for these keyword arguments, their paths as `arguments.placed` says.

    Raises:
        RefusedError: as `import_factory` and `placed`; or the function fails, and its traceback is shown.
    """
    factory = import_factory(spec, signature)
    given = placed(arguments, spec.trusted.place)
    try:
        return factory(**given)
    except (Exception, SystemExit) as error:  # whose code would be taken for one of ours
        failed = f"the factory {spec.factory} failed"
        missing = isinstance(error, FileNotFoundError)
        hint = "a path beside the recipe is written ./name in arguments" if missing else None
        raise RefusedError(failed, got=whole(error), expected=f"a function{signature}", next=hint) from error


def _check_trusted(name: str, module: str, trusted: Trusted) -> None:
    """Refuse a factory that nobody trusts, without importing anything, packages above it included.

    The folder of the user's recipe comes on Python's path only once something in it is trusted, and last, so that it
    hides no installed module. A folder that somebody else names never does, nor does the working folder: libraries look
    for modules that may be there or not, and would run those that they find.
    """
    listed = trusted.lists(module)
    if not listed and name not in trusted.factories:
        raise RefusedError(
            f"the factory {name} is not run: {trusted.named_by} names it, and no recipe of yours does",
            got=f"{name}, whose code would run here",
            expected="a factory that your own recipe names, or one of a module that you trust",
            next=f"once you have read that code: --trust {module} (in Python trust=({module!r},)), where it lies in "
            f"the working folder or on Python's path; or `code: [{module}]` in your recipe; or give the recipe that "
            "names it",
        )
    if trusted.folder is not None and trusted.folder not in sys.path:
        sys.path.append(trusted.folder)
    for folder in (trusted.working, trusted.elsewhere) if listed else ():
        if folder is not None and (finder := _Listed(folder, module.partition(".")[0])) not in sys.meta_path:
            sys.meta_path.append(finder)
    # Python keeps lists of folders, in which a module that was written a moment ago does not stand yet.
    importlib.invalidate_caches()
    if not listed:
        _check_own(name, module, trusted)


@dataclass(frozen=True)
class _Listed:
    """Finds one module that the user lists in a folder that they did not name, after all others, and nothing else.

    Such a folder is that of somebody's run, and the one that the command runs in, where anything may lie.
    """

    folder: str
    top: str

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self.folder]) if name == self.top else None


def _check_own(name: str, module: str, trusted: Trusted) -> None:
    """Refuse what the recipe does not list, unless Python would find it in the recipe's folder."""
    top = module.partition(".")[0]
    shipped = _shipped(top)
    found = None if shipped else _found(top)
    if found is None and not shipped:
        raise RefusedError(
            f"the factory {name} cannot be imported",
            got=f"no module {top}",
            expected=f"{top}.py in {trusted.folder or 'the folder of the recipe'}, or a module that `code:` lists",
            next=f"put {top}.py beside the recipe, or name its place with `folder:`",
        )
    places = _places(found)
    own = bool(places) and all(_in_folder(place, trusted.folder) for place in places)
    led_out = [place for place in _on_the_way(trusted.folder, module) if own and not _in_folder(place, trusted.folder)]
    if own and not led_out:
        return
    where = [*led_out, *places, "akd-dist" if top == "akd_dist" else "Python itself"][0]
    beside = None if trusted.folder is None else PathFinder.find_spec(top, [trusted.folder])
    if not own and any(_in_folder(place, trusted.folder) for place in _places(beside)):
        raise RefusedError(
            f"the factory {name} is not the one in the recipe's folder",
            got=f"the module {top} of {where}, which Python finds before the one in {trusted.folder}",
            expected="a module whose name nothing else has",
            next="give yours another name, or start Python afresh if this process met the other before; if the other "
            f"is meant, add `code: [{module}]` to the recipe",
        )
    raise RefusedError(
        f"the factory {name} is not one of the recipe's own",
        got=f"the module {module if own else top} of {where}",
        expected=f"{top}.py in {trusted.folder or 'the folder of the recipe'}, or a module that `code:` lists",
        next=f"where you trust it, add `code: [{module}]` to the recipe",
    )


def _found(top: str) -> ModuleSpec | None:
    """Where Python would find a top-level module, or has found it. Looking for one does not run it."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: one of this process that came from nowhere, such as __main__
        return ModuleSpec(top, None)


def _places(found: ModuleSpec | None) -> list[str]:
    """The files and folders that a module would be read from; none for one that is built in."""
    if found is None:
        return []
    return [*([found.origin] if found.origin and found.has_location else []), *(found.submodule_search_locations or ())]


def _shipped(top: str) -> bool:
    """Whether a name belongs to Python or to akd-dist, wherever that is found: a checkout may be a recipe's folder."""
    return top in sys.stdlib_module_names or top in sys.builtin_module_names or top in ("akd_dist", "__main__")


def _on_the_way(folder: str | None, module: str) -> Iterator[str]:
    """The files and folders of a recipe's folder that a module may be read from: its own, and those of its packages."""
    above = Path(folder or "")
    for part in module.split("."):
        for place in above.glob(f"{part}*"):
            if place.name.partition(".")[0] == part:
                yield str(place)
        above /= part
        yield from map(str, above.glob("__init__.*"))


def _in_folder(place: str, folder: str | None) -> bool:
    """Whether a place lies in the folder, links followed, and is not of what is installed there, as in a `.venv`."""
    path = Path(os.path.realpath(place))
    if folder is None or any(part in _INSTALLED for part in path.parts):
        return False
    return path.is_relative_to(os.path.realpath(folder)) and not path.is_relative_to(sysconfig.get_path("stdlib"))
