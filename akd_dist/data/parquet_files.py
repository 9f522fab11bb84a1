"""Which Parquet files a path names, and the columns that stand in their paths: what `pyarrow.dataset` finds there."""

import difflib
import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from akd_dist.base.errors import RefusedError
from akd_dist.recipe.paths import START
from akd_dist.storage.remote import RemoteFile, files_below, find_file, is_remote

NEXT_PATH = f"correct the path; {START}"
SKIPPED_PREFIXES = (".", "_")
"""Files and folders of such names are none of the data: _SUCCESS, _metadata, .part-0.crc, .ipynb_checkpoints."""
_SUFFIXES = (".parquet", ".parq", ".pq")
# The first four bytes of a Parquet file; PARE where its footer is encrypted.
_MAGIC = (b"PAR1", b"PARE")
# Endings of files that hold rows twice, or half: downloads under way, and backups that editors and people keep.
_COPIES = ("~", ".bak", ".orig", ".old", ".swp", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".filepart")
_NUMBERS = re.compile(r"([0-9]+)")
# What may lie beside a Parquet file under its name, as rows.parquet.md5: no rows, and no mistake.
_COMPANIONS = (".crc", ".md5", ".sha1", ".sha256", ".json", ".txt")


@dataclass(frozen=True)
class Found:
    """The Parquet files that a path names."""

    files: list[Path | RemoteFile]
    """In the order of their rows: by name, folder by folder."""
    columns: Any = field(default_factory=lambda: pa.schema([]))
    """Those that stand in paths, as `y` in `y=cat/part-0.parquet`: an Arrow schema, of types that pyarrow infers."""
    values: dict[Path | RemoteFile, dict[str, Any]] = field(default_factory=dict)
    """A file's values of these columns; null where it is not named."""
    whole: bool = True
    """Whether the path names a dataset, so that what stands in it must agree with columns in the files; else it is the
    path of a single file, which may lie anywhere."""
    left_out: tuple[str, ...] = ()
    """Names of other files there, which hold no Parquet."""


def find_parquet(path: str) -> Found:
    """The Parquet files that a path, a folder or a glob names.

    Raises:
        RefusedError: there is none; a file looks like a copy that is under way; links lead in a circle.
    """
    place = Path(path)
    check_scheme(path)
    try:
        if is_remote(path):
            found = _remote(path)
        elif place.is_dir():
            found = _in_folder(place)
        # A file whose very name holds a bracket or an asterisk is that file, and no glob.
        elif any(character in path for character in "*?[") and not place.exists():
            found = _of_glob(place)
        else:
            found = _discovered([str(place)] if place.is_file() else [], "", whole=False)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise RefusedError(
            f"the files of {path} cannot be listed",
            got=str(error).partition("\n")[0],
            expected="files that pyarrow.dataset can list, with columns as name=value in their paths",
            next="correct the name or the permissions of what is named there",
        ) from error
    if not found.files:
        raise nothing_at(
            path if is_remote(path) else place,
            "Parquet file",
            "a file, a folder with Parquet files, or a glob",
            found.left_out,
        )
    return found


def check_scheme(path: str) -> None:
    """Refuse a URI that rows are not read from.

    Raises:
        RefusedError: its scheme is another than s3 or gs, or it names no bucket.
    """
    if "://" in path and not is_remote(path):
        raise RefusedError(
            f"rows are not read from {path}",
            got="a URI",
            expected="files in a folder of each node, or s3://bucket/... or gs://bucket/...",
            next="copy the files to a folder, or read them in a function of your own (kind: custom)",
        )


def nothing_at(place: Path | str, what: str, expected: str, left_out: Iterable[str] = ()) -> RefusedError:
    """The refusal for a path where nothing is, or not what should be."""
    if isinstance(place, str):
        others = ", ".join(itertools.islice(left_out, 5))
        got = f"a folder with other objects: {others}" if others else "no such object, and none below"
        return RefusedError(f"no {what} at {place}", got=got, expected=expected, next="correct the URI in the recipe")
    beside = [one.name for one in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, beside, n=3)
    got = f"near it: {', '.join(near)}" if near else "nothing there"
    if place.is_dir():
        others = ", ".join(itertools.islice(left_out, 5))
        got = f"a folder with other files: {others}" if others else "a folder"
        if any(one.name.startswith(SKIPPED_PREFIXES) for one in place.iterdir()):
            got += "; names that begin with . or _ are skipped"
    return RefusedError(f"no {what} at {place}", got=got, expected=expected, next=NEXT_PATH)


def is_skipped(relative: str) -> bool:
    """Whether a file at this path below the folder that is read is none of the data, as pyarrow.dataset has it."""
    return any(part.startswith(SKIPPED_PREFIXES) for part in Path(relative).parts)


def may_be_parquet(name: str) -> bool:
    """Whether a file of this name may hold Parquet, whatever it holds: what is copied from where looking is dear."""
    name = name.rpartition("/")[2].lower()
    return any(suffix in name for suffix in _SUFFIXES) or not Path(name).suffix


def _in_folder(place: Path) -> Found:
    _refuse_circles(place)
    return _discovered(fs.FileSelector(str(place), recursive=True), str(place), whole=True)


def _of_glob(place: Path) -> Found:
    """Files that match. Wildcards match no names that pyarrow.dataset would skip, but these may be spelt out."""
    parts = place.parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    if any("**" in part and part != "**" for part in parts):
        raise RefusedError(
            f"{place} cannot be read as a glob",
            got=next(part for part in parts if "**" in part and part != "**"),
            expected="*, ?, [...], or ** for any folders",
            next=NEXT_PATH,
        )
    base = Path(*parts[:first])
    if "**" in parts:
        _refuse_circles(base)
    spelt_out = any(part.startswith(SKIPPED_PREFIXES) for part in parts[first:])
    # Path.glob would not follow links through **.
    matches = [Path(one) for one in glob.glob(str(place), recursive=True)]  # noqa: PTH207
    files = [one for one in matches if one.is_file() and (spelt_out or not is_skipped(str(one.relative_to(base))))]
    return _discovered([str(file) for file in files], str(base), whole=True)


def _remote(uri: str) -> Found:
    """The objects that a URI names: one, those below it, or those that match a pattern."""
    uri = uri.rstrip("/")
    scheme, _, rest = uri.partition("://")
    parts = rest.split("/")
    first = next((number for number, part in enumerate(parts) if number and glob.has_magic(part)), None)
    # An object whose very name holds a bracket or an asterisk is that object, and no glob.
    if (one := find_file(uri)) is not None:
        return _discovered([one], "", whole=False)
    base, pattern = "/".join(parts[:first]), [] if first is None else parts[first:]
    spelt_out = any(part.startswith(SKIPPED_PREFIXES) for part in pattern)
    below = {file.uri.removeprefix(f"{scheme}://{base}/"): file for file in files_below(f"{scheme}://{base}")}
    files = [
        file
        for name, file in below.items()
        if (not pattern or matches(name.split("/"), pattern)) and (spelt_out or not is_skipped(name))
    ]
    return _discovered(files, f"/{base}", whole=True)


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a key match a glob: ** stands for any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def _discovered(selected: Any, base: str, *, whole: bool) -> Found:
    """What pyarrow.dataset makes of files, or of a selector; no file is opened for it but those of other names."""
    if not selected:
        return Found([])
    import pyarrow.dataset as ds  # brings pandas, which no worker needs: that takes a third of a second

    options = ds.FileSystemFactoryOptions(base, partitioning=ds.HivePartitioning.discover())
    # Objects go by their keys: of files that are listed here, pyarrow looks at nothing but their paths.
    remote: dict[str, RemoteFile] = {}
    if isinstance(selected, list) and isinstance(selected[0], RemoteFile):
        remote = {f"/{file.uri.partition('://')[2]}": file for file in selected}
        selected = list(remote)
    factory = ds.FileSystemDatasetFactory(fs.LocalFileSystem(), selected, ds.ParquetFileFormat(), options)
    columns = factory.inspect(fragments=0)
    values: dict[Path | RemoteFile, dict[str, Any]] = {
        remote.get(one.path) or Path(one.path): ds.get_partition_keys(one.partition_expression)
        for one in factory.finish(columns).get_fragments()
    }
    files = sorted((file for file in values if not whole or _is_parquet(file)), key=_place)
    left_out = sorted(_below(file, base) for file in values.keys() - set(files))
    return Found(files, columns, values, whole, tuple(left_out))


def _place(file: Path | RemoteFile) -> tuple[str, ...]:
    """By which files are sorted: folder by folder."""
    return file.parts if isinstance(file, Path) else tuple(file.uri.split("/"))


def _below(file: Path | RemoteFile, base: str) -> str:
    return (
        str(file.relative_to(base)) if isinstance(file, Path) else f"/{file.uri.partition('://')[2]}"[len(base) + 1 :]
    )


def _is_parquet(file: Path | RemoteFile) -> bool:
    """Whether a file is read as Parquet; what is damaged is, too, and is refused when it is opened.

    Raises:
        RefusedError: it may be rows that are on their way, or that are there already under another name.
    """
    name = file.name.lower()
    if name.endswith(_SUFFIXES):
        return True
    with open(file, "rb") if isinstance(file, Path) else file.open() as opened:
        holds_parquet = opened.read(4) in _MAGIC
    called_parquet = any(suffix in name for suffix in _SUFFIXES)
    if name.endswith(_COPIES) and (holds_parquet or called_parquet):
        raise RefusedError(
            f"{file} looks like a copy of rows, or one that is under way",
            got=f"a name that ends in {next(suffix for suffix in _COPIES if name.endswith(suffix))}",
            expected="Parquet files that are whole, each once",
            next="wait for the copy, remove the file, or name the files with a glob such as *.parquet",
        )
    if called_parquet and not holds_parquet and not name.endswith(_COMPANIONS):
        raise RefusedError(
            f"{file} is not Parquet, although its name says so",
            got=f"{file.stat().st_size if isinstance(file, Path) else file.size:,} bytes of another format",
            expected="a Parquet file",
            next="unpack it or remove it, or name the files with a glob such as *.parquet",
        )
    return holds_parquet


def out_of_order(names: Sequence[str]) -> tuple[str, str] | None:
    """Two names that follow one another in the wrong order of the numbers in them; None if there are none."""
    return next(((one, other) for one, other in itertools.pairwise(names) if _has_greater_number(one, other)), None)


def _has_greater_number(name: str, other: str) -> bool:
    """Whether two names differ first in a number, and the first one has the greater."""
    parts = zip(_NUMBERS.split(name), _NUMBERS.split(other), strict=False)
    first, then = next(((one, two) for one, two in parts if one != two), ("", ""))
    return first.isdecimal() and then.isdecimal() and int(first) > int(then)


def _refuse_circles(folder: Path) -> None:
    """Refuse links to a folder that they lie in: following them, the same files would be found again and again."""
    above = {str(folder): {os.path.realpath(folder)}}
    for place, names, _ in os.walk(folder, followlinks=True):
        seen = above.pop(place)
        names[:] = [name for name in names if not name.startswith(SKIPPED_PREFIXES)]
        for inside in (Path(place, name) for name in names):
            real = os.path.realpath(inside)  # unlike `resolve`, of a link to itself as well
            if real in seen:
                raise RefusedError(
                    f"links lead in a circle in {folder}",
                    got=f"{inside}, which is {real}",
                    expected="links that do not lead to a folder that they lie in",
                    next="remove the link",
                )
            above[str(inside)] = seen | {real}
