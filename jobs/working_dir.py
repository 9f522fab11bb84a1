"""The recipe's folder, as it travels to nodes that do not have it: modules of the user's own, tokenizers, small files.

Not by Ray's `working_dir`: Ray has workers look for modules there before all that is installed, so that a file of the
recipe's could stand in for a library's; and a driver that `ray job submit` starts has one already, and may not name
another. So it goes through Ray's object store, and lies in each node's cache root, by content.
"""

# ruff: noqa: PTH110, PTH112  -- those of pathlib raise for what may not be looked at, and for names that are too long

from __future__ import annotations

import dataclasses
import glob
import io
import os
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.base.files import partial_name, sha256
from akd_dist.base.formatting import size
from akd_dist.base.trusted import Trusted
from akd_dist.data.arguments import named, placed
from akd_dist.jobs.cluster import ray
from akd_dist.recipe import Factory, Recipe
from akd_dist.recipe.base import Spec
from akd_dist.recipe.paths import change_paths, expand_braces

LIMIT = 64 * 2**20
"""Bytes of a recipe's folder that travel: it goes to every node, through Ray's object store."""
MOST_FILES = 10_000
_AN_ENVIRONMENT = "pyvenv.cfg"
# As Ray names the folder of a job, after its content, on every node.
_OF_A_JOB = "_ray_pkg_"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files make the same archive

Value = TypeVar("Value")


@dataclass(frozen=True)
class Packed:
    """A recipe's folder on its way: small, since the archive lies in Ray's object store."""

    folder: str
    """Where it lies for the driver."""
    digest: str
    """The sha256 of the archive, by which nodes know it."""
    archive: Any
    """Ray's reference to the archive."""
    home: str
    """The driver's node, where the folder is as it is."""
    links: tuple[str, ...]
    """What does not travel of it, although the recipe names it: looked for under the driver's path."""
    sent: tuple[str, str] | None = None
    """After `ray job submit`: the name of the folder that Ray brought to every node, and where in it this one lies."""

    def unpacked(self, cache_root: str) -> Path | None:
        """Where this node has it, unpacked if need be; None on the driver's, which has the folder itself."""
        if ray.get_runtime_context().get_node_id() == self.home:
            return None
        if self.sent is not None:
            # Ray has workers look for modules there, so those of another copy would not be the ones that are imported.
            name, inner = self.sent
            return next((Path(one, inner) for one in sys.path if Path(one).name == name), None)
        place = Path(cache_root) / "recipes" / self.digest[:32]
        if not place.exists():
            self._unpack(place)
        return place

    def _unpack(self, place: Path) -> None:
        partial = partial_name(place)
        try:
            partial.mkdir(parents=True)
            with zipfile.ZipFile(io.BytesIO(ray.get(self.archive))) as archive:
                archive.extractall(partial)
            for name in self.links:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).symlink_to(Path(self.folder) / name)
            partial.rename(place)
        except OSError as error:
            if not place.exists():  # where it does, another worker was faster
                raise MachineError(
                    f"the recipe's folder cannot be unpacked in {place}",
                    got=error.strerror or str(error),
                    expected="a cache root with some room, which this user can write to",
                    next="free some space on that node, or choose another folder with --cache-root",
                ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@dataclass(eq=False)
class WorkingDir:
    """What of a recipe's folder travels, and which files have to be on every node because they do not."""

    folder: str | None = None
    """The recipe's folder; None where nothing travels."""
    files: Sequence[str] = ()
    """The files that travel, relative to it."""
    needed: Sequence[str] = ()
    """The paths that the recipe names and that do not travel."""
    note: str | None = None
    """What to tell of it; None for nothing."""
    sent: tuple[str, str] | None = None
    """As of `Packed`; such a folder is there as a whole."""
    sources: frozenset[str] = frozenset()
    """The paths from which rows are prepared."""
    _packed: Packed | None = field(default=None, repr=False)

    @classmethod
    def of(cls, recipe: Recipe, kept_out: Sequence[str]) -> WorkingDir:
        """What travels with a recipe: its folder, up to LIMIT; of a larger one its modules and what it names of it.

        Args:
            kept_out: folders that stay where they are, as stores and runs.

        Raises:
            RefusedError: the recipe names a file in its folder that cannot be sent.
        """
        folder, document = recipe.folder, recipe.model_dump(mode="json", exclude={"folder"})
        for spec, teacher in zip(
            recipe.teacher.each, document["teacher"]["members"] or [document["teacher"]], strict=True
        ):
            if spec.checkpoint is not None:  # the driver reads it, and nodes find a model folder beside the stores
                teacher["weights"] = None
                teacher["model"].pop("path", None)
        rows = {name: document["data"][name] for name in ("train", "validation", "test", "unlabelled")}
        paths, sources = (list(dict.fromkeys(_named(part, folder))) for part in (document, rows))
        found = cls._of(recipe, folder, paths, kept_out)
        # What is named elsewhere in the recipe as well is needed, whoever has the rows.
        for name in rows:
            del document["data"][name]
        found.sources = frozenset(sources) - set(_named(document, folder))
        return found

    def for_rows(self) -> WorkingDir:
        """The same for tasks that prepare rows: of what does not travel, they need the sources alone."""
        note, self.note = self.note, None  # told once
        needed = [one for one in self.needed if one in self.sources]
        return dataclasses.replace(self, needed=needed, note=note, _packed=None)

    def leave_out_sources(self) -> None:
        """The rows are prepared, and lie where every node has them: nobody needs their sources any more."""
        self.needed = [one for one in self.needed if one not in self.sources]

    @classmethod
    def _of(cls, recipe: Recipe, folder: str | None, paths: list[str], kept_out: Sequence[str]) -> WorkingDir:
        own = [path for path in paths if folder is not None and _below(path, folder) is not None]
        if folder is None or not (own or recipe.trusted.factories) or not os.path.isdir(folder):
            return cls(needed=paths)
        if (sent := _sent_by_a_job(Path(folder))) is not None:
            return cls(folder, needed=[path for path in paths if path not in own], sent=sent)
        kept_out = [os.path.realpath(one) for one in kept_out]
        sizes = _sizes(Path(folder), kept_out)
        note = None
        if sizes is not None:
            _check(file for path in own for file in _files_named(path, kept_out))
        else:
            sizes, left = _chosen(Path(folder), own)
            note = f"the folder {folder} is larger than {size(LIMIT)}: of it, modules and what the recipe names travel"
            note += f" to the nodes, but not {', '.join(left)}" if left else " to the nodes"
        carried = set(sizes)
        needed = [path for path in paths if path not in own or not _carries(path, folder, carried)]
        # What is looked for under the driver's path is linked to as a whole.
        linked = tuple(f"{name}{os.sep}" for path in needed if (name := _below(path, folder)))
        return cls(folder, sorted(name for name in carried if not name.startswith(linked)), needed, note)

    def packed(self) -> Packed | None:
        """The folder in Ray's object store; None where nothing travels.

        Raises:
            RefusedError: a file of it cannot be read.
        """
        if self.folder is None or not (self.files or self.sent):
            return None
        if self.sent is not None:
            home = ray.get_runtime_context().get_node_id()
            return Packed(self.folder, digest="", archive=None, home=home, links=(), sent=self.sent)
        if self._packed is None:
            data = _archive(Path(self.folder), self.files)
            links = tuple(
                name
                for path in self.needed
                if (name := _below(path, self.folder)) and not glob.has_magic(name) and _expanded(name) == [name]
            )
            digest = sha256(data + "\n".join([self.folder, *links]).encode())
            home = ray.get_runtime_context().get_node_id()
            self._packed = Packed(self.folder, digest, ray.put(data), home, links)
        return self._packed

    @property
    def places(self) -> dict[str, str]:
        """The paths that nodes have to see, by what they are."""
        return {f"the recipe's {Path(path).name}": path for path in self.needed}


def _sent_by_a_job(folder: Path) -> tuple[str, str] | None:
    """The name of the folder that `ray job submit` sent, and where in it this one lies; None for any other."""
    for one in (folder, *folder.parents):
        if one.name.startswith(_OF_A_JOB):
            return one.name, str(folder.relative_to(one))
    return None


def there(path: str) -> bool:
    """Whether there is something at a path, or at what a pattern names."""
    return bool(_matching(path))


def _matching(path: str) -> list[Path]:
    """What a path names, or a pattern; nothing where nothing is."""
    several = [path] if os.path.exists(path) else _expanded(path)
    globs = (glob.glob(one) if glob.has_magic(one) else [one] for one in several)  # noqa: PTH207  # it may be absolute
    return [Path(one) for found in globs for one in found if os.path.exists(one)]


def _expanded(path: str) -> list[str]:
    """The paths that a brace expression stands for; one that stands for none is told of when its rows are looked at."""
    try:
        return expand_braces(path)
    except ValueError:
        return [path]


def moved(value: Value, packed: Packed, place: Path) -> Value:
    """A copy of what work is given, with each path in the recipe's folder where this node has it; others stay."""

    def where(text: str) -> str:
        if text == packed.folder:
            return str(place)
        name = _below(text, packed.folder)
        return str(place / name) if name is not None and there(str(place / name)) else text

    copy: Value = _each(value, where)
    return copy


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of data, specs and the dataclasses that hold them, with each text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_each(one, change) for one in value)
    if isinstance(value, dict):
        return {key: _each(one, change) for key, one in value.items()}
    if isinstance(value, Spec | Trusted):
        copy = value.model_copy(update={name: _each(getattr(value, name), change) for name in type(value).model_fields})
        if isinstance(copy, Factory | Recipe):
            copy._trusted = _each(copy.trusted, change)
        return copy
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [one.name for one in dataclasses.fields(value) if one.init]
        return dataclasses.replace(value, **{name: _each(getattr(value, name), change) for name in fields})
    return value


def _named(document: dict[str, Any], folder: str | None) -> Iterator[str]:
    """The local paths that a recipe names, those in arguments of its functions as far as they are there.

    Args:
        document: the recipe, or a part of it, as plain data.
        folder: the recipe's.
    """
    found: list[str] = []

    def note(path: str) -> str:
        found.append(path)
        return path

    change_paths(document, note)
    yield from (path for path in found if "://" not in path)
    for arguments in _arguments(document):
        for paths in named(placed(arguments, folder)):
            yield from map(str, paths)


def _arguments(node: Any) -> Iterator[dict[str, Any]]:
    """The arguments of every function of a recipe as plain data."""
    if isinstance(node, list):
        for one in node:
            yield from _arguments(one)
    elif isinstance(node, dict):
        for key, one in node.items():
            if key == "arguments" and isinstance(one, dict):
                yield one
            else:
                yield from _arguments(one)


def _below(path: str, folder: str) -> str | None:
    """A path relative to a folder; None where it does not lie in it."""
    found = os.path.relpath(os.path.normpath(path), folder)
    return None if found == os.pardir or found.startswith(os.pardir + os.sep) else found


def _carries(path: str, folder: str, carried: set[str]) -> bool:
    """Whether all that a path names is among the files that travel."""
    inside = [_below(str(file), folder) for file in _files_named(path)]
    whole = _below(path, folder) == os.curdir or not any(map(_has_linked_folders, _matching(path)))
    return bool(inside) and set(inside) <= carried and whole


def _has_linked_folders(path: Path) -> bool:
    """Whether there are links to folders in a folder: what these hold does not travel."""
    return any(Path(place, name).is_symlink() for place, names, _ in os.walk(path) for name in names)


def _files_named(path: str, kept_out: Sequence[str] = ()) -> Iterator[Path]:
    """The files that a path or a pattern names, those in a folder that it names, too."""
    for one in _matching(path):
        yield from _files(one, kept_out) if os.path.isdir(one) else [one]


def _size(path: Path) -> int | None:
    """The size of a regular file, or of the one that a link leads to; None for all else, as what is not to be seen."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _obstacle(path: Path) -> str | None:
    """Why a file cannot be sent; None where it can."""
    try:
        str(path).encode()  # an archive has its names in UTF-8
        if _size(path) is None:
            return "no regular file"
        # Some can be opened and not be read, as those in /proc.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.read(file, 1)
        finally:
            os.close(file)
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _check(files: Iterable[Path]) -> None:
    """Refuse a file that the recipe names and that cannot be sent.

    Raises:
        RefusedError: there is one.
    """
    for file in files:
        if (obstacle := _obstacle(file)) is not None:
            raise RefusedError(
                f"{file}, which the recipe names, cannot be sent to the nodes",
                got=obstacle,
                expected="a regular file that this user can read, with a name in UTF-8",
                next="make it one, or move it out of the recipe's folder to where every node has it",
            )


def _files(folder: Path, kept_out: Sequence[str]) -> Iterator[Path]:
    """The regular files of a folder, and links to some: not hidden ones, not what Python wrote, not of an environment,
    not of folders that links lead to.
    """
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name != "__pycache__"
            and os.path.realpath(here / name) not in kept_out
            and not os.path.exists(here / name / _AN_ENVIRONMENT)
        )
        yield from (
            here / name for name in sorted(names) if not name.startswith(".") and _size(here / name) is not None
        )


def _sizes(folder: Path, kept_out: Sequence[str]) -> dict[str, int] | None:
    """The files of a folder that can be sent, and their sizes; None if they are more than may travel."""
    found: dict[str, int] = {}
    total = 0
    for file in _files(folder, kept_out):
        if _obstacle(file) is not None:
            continue
        found[str(file.relative_to(folder))] = _size(file) or 0
        total += found[str(file.relative_to(folder))]
        if total > LIMIT or len(found) > MOST_FILES:
            return None
    return found


def _chosen(folder: Path, own: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Of a folder that is too large: its modules and packages, and what is named of it, each as long as there is room.

    Returns:
        The files and their sizes, and what is named and stays.

    Raises:
        RefusedError: a file that is named, and has room, cannot be sent.
    """
    _, folders, names = next(os.walk(folder), ("", [], []))
    packages = [folder / one for one in sorted(folders) if not one.startswith(".")]
    packages = [one for one in packages if _size(one / "__init__.py") is not None]
    modules = [folder / name for name in sorted(names) if name.endswith(".py") and not name.startswith(".")]
    modules += [file for one in packages for file in _files(one, [])]
    found = {str(file.relative_to(folder)): _size(file) or 0 for file in modules if _obstacle(file) is None}
    left = []
    for path in own:
        more: dict[str, int] = {}
        room = LIMIT - sum(found.values())
        for file in _files_named(path):
            more[os.path.relpath(file, folder)] = _size(file) or 0
            room -= more[os.path.relpath(file, folder)]
            if room < 0 or len(found) + len(more) > MOST_FILES:
                left.append(os.path.relpath(path, folder))
                break
        else:
            _check(folder / name for name in more)
            found |= more
    return found, left


def _archive(folder: Path, files: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:
            try:
                data = (folder / name).read_bytes()
            except OSError as error:  # it could be read a moment ago
                raise RefusedError(
                    f"a file of the recipe's folder cannot be read, and so not be sent to the nodes: {folder / name}",
                    got=error.strerror,
                    expected="files that this user can read, and that stay while a command starts",
                    next="run the same command again, or move it out of the folder",
                ) from error
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    return buffer.getvalue()
