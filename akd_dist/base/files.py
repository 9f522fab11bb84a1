"""Local files, whole or absent: create-only publishing, atomic replacing, and documents read with suspicion."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import signal
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from akd_dist.base.errors import MachineError, RecipeError, is_limit, limit_reached, unreadable

# Names of files in the making. Readers skip them, `stores gc` removes those whose writer died.
PARTIAL_SUFFIX = ".partial"
# The most bytes that a document of a run has: more than the results of ten thousand students take.
MAX_DOCUMENT = 1 << 28
# More than a tick of any file system's clock; the coarsest, FAT's, is 2 s.
_TICK_NS = 2_500_000_000
# What link(2) answers on file systems that have no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}


def expanded(path: str | Path) -> Path:
    """A path with `~` and `~user` written out.

    Raises:
        RecipeError: nobody knows the home folder that it means.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RecipeError(
            f"the home folder in {path} is not known",
            got=error,
            expected="HOME, or a user of this machine",
            next="write the path out",
        ) from error


def partial_name(path: Path) -> Path:
    """A name of its own, beside `path`, for what is made there or on its way out: a file or a folder."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}")


def canonical_json(document: Any) -> bytes:
    """The one spelling of a JSON document that is hashed: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(data: bytes | memoryview) -> str:
    """Hexadecimal sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def with_checksum(document: dict[str, Any]) -> bytes:
    """A JSON document that carries the sha256 of its canonical spelling, so that a flipped bit is noticed."""
    return canonical_json({**document, "sha256": sha256(canonical_json(document))})


def without_checksum(data: bytes) -> dict[str, Any]:
    """The document that `with_checksum` wrote.

    Raises:
        ValueError: it is not that document.
    """
    document = json.loads(data)
    if not isinstance(document, dict) or document.pop("sha256", None) != sha256(canonical_json(document)):
        raise ValueError("the document is not what was written")
    return document


def is_there(path: str | Path) -> bool:
    """Whether something lies at a path, as far as this user may see; never at what can be no path."""
    # Unlike `Path.exists`, which raises where a folder above is closed, or a name is too long.
    return os.path.exists(path)  # noqa: PTH110


def stamp_of(path: Path) -> list[int] | None:
    """Size, times of content and of inode in ns, and inode of a file: what changes with it; None where there is none.

    The time of the inode can be set by nobody, unlike that of the content.
    """
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def is_settled(stamp: list[int] | None) -> bool:
    """Whether a file was changed so long ago that another change, from now on, would show in its times.

    Two changes within a tick of the file system's clock show as one.
    """
    return stamp is None or time.time_ns() - max(stamp[1], stamp[2]) > _TICK_NS


def failpoint(site: str) -> None:
    """Die here if a test asked for it: AKD_FAILPOINT=<site>:<nth> kills this process at the nth visit of the site.

    AKD_FAILPOINT=<site>:<nth>:STOP suspends it there, until somebody sends SIGCONT.
    """
    wanted = os.environ.get("AKD_FAILPOINT")
    if wanted is None:
        return
    name, nth, how = [*wanted.split(":"), "", ""][:3]
    if name != site:
        return
    _visits[site] = _visits.get(site, 0) + 1
    if _visits[site] == int(nth or 1):
        os.kill(os.getpid(), signal.Signals[f"SIG{how or 'KILL'}"])


_visits: dict[str, int] = {}


def publish_new(path: Path, data: bytes) -> bool:
    """Create `path` with `data`, durable before it has its name; never overwrites.

    Returns:
        True if this call created the file, False if it was there already (whatever it holds).

    Raises:
        MachineError: the disk is full, the folder cannot be written, or there are neither hard links nor O_EXCL.
    """
    for attempts_left in (2, 1, 0):
        partial = _write_partial(path, data)
        try:
            # link(2) fails where the name exists, unlike rename(2): so two writers never overwrite each other.
            failpoint("publish.before_link")
            return _link_or_create(partial, path)
        except FileNotFoundError as error:
            # Somebody took this writer for dead and swept its partial file away: write it again.
            if not attempts_left:
                raise write_error(error, path, len(data)) from error
        except OSError as error:
            raise write_error(error, path, len(data)) from error
        finally:
            partial.unlink(missing_ok=True)
            fsync_folder(path.parent)
    raise AssertionError("unreachable")


def link_new(source: Path, path: Path, data: bytes) -> bool:
    """Give a file a second name, durably and never over another file; a copy where there are no hard links.

    Args:
        data: what the file holds, for the copy.

    Returns, Raises: as `publish_new`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise write_error(error, path, len(data)) from error
        return publish_new(path, data)
    fsync_folder(path.parent)
    return True


def replace(path: Path, data: bytes, *, durable: bool = True, by_way_of: Path | None = None) -> None:
    """Give `path` the content `data`, atomically: a reader sees the old bytes or the new ones.

    Args:
        durable: False skips fsync, for files whose loss costs nothing (progress).
        by_way_of: an existing folder of the same file system in which the file is made; by default that of `path`.
    """
    partial = _write_partial(path, data, durable=durable, folder=by_way_of)
    try:
        if durable:
            failpoint("replace.before_rename")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_error(error, path, len(data)) from error
    if durable:
        fsync_folder(path.parent)


@contextlib.contextmanager
def whole_file(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A path to write a file of any size at, which takes the name `path` at the end of the block: whole or absent.

    Args:
        overwrite: whether it may take the place of another file.

    Raises:
        RecipeError: there is a file of that name, and it may not be overwritten.
        MachineError: the disk is full, or the folder cannot be written.
    """
    # Asked before hours of writing may be in vain; at the end the link asks once more, for what has come meanwhile.
    if not overwrite and path.exists():
        raise _there_already(path)
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        if overwrite:
            partial.replace(path)
        elif not _link_or_create(partial, path):
            raise _there_already(path)
        fsync_folder(path.parent)
    except OSError as error:
        written_bytes = partial.stat().st_size if partial.exists() else 0
        raise write_error(error, path, written_bytes + 1) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _there_already(path: Path) -> RecipeError:
    return RecipeError(
        f"{path} is there already", got="a file", expected="a new name", next="choose another name, or add --force"
    )


def read_small(path: Path) -> bytes:
    """The content of a document: of a regular file, of no more than MAX_DOCUMENT bytes.

    Raises:
        ValueError: it is something else, or larger.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe of that name would be waited for
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no regular file")
        if status.st_size > MAX_DOCUMENT:
            raise ValueError(f"{status.st_size:,} bytes, where {MAX_DOCUMENT:,} are the most that a document has")
        return file.read()


def parse_json(data: bytes | str) -> Any:
    """A JSON document from elsewhere.

    Raises:
        ValueError: it is not JSON, is nested too deeply to be read, or has a key twice, which readers take differently.
    """
    try:
        return json.loads(data, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def mistakes(error: ValueError, most: int = 3) -> str:
    """What is wrong with a document, in a line: the first fields that pydantic names, or what JSON says."""
    from pydantic import ValidationError  # here, so that `--help` does not wait for it

    if not isinstance(error, ValidationError):
        return str(error).partition("\n")[0]
    named = error.errors(include_url=False, include_context=False, include_input=False)
    more = [f"and {len(named) - most:,} more"] if len(named) > most else []
    return "; ".join(
        [*(f"{'.'.join(map(str, one['loc'])) or 'the document'}: {one['msg']}" for one in named[:most]), *more]
    )


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands twice")
    return found


def read_json(path: Path) -> Any | None:
    """The JSON document in a file; None where there is no file, or none that is whole.

    Raises:
        MachineError: it cannot be read.
    """
    try:
        return parse_json(read_small(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        advice = "mend its permissions, or the disk"
        raise unreadable(MachineError, path, error, expected="a file that this user may read", next=advice) from error


def append(path: Path, text: str) -> None:
    """Add text to a file, made if there is none; for logs and other lines that may be lost.

    Raises:
        MachineError: the disk is full, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files that are no UTF-8 reach a message as lone surrogates, which UTF-8 cannot write.
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as lines:
            lines.write(text)
    except OSError as error:
        raise write_error(error, path, len(text)) from error


def check_folder(folder: Path | None) -> None:
    """Refuse a folder that could not be made or written, without making it; None, a place that is no folder, passes.

    Raises:
        MachineError: something else is there, or it is not this user's to write.
    """
    if folder is None:
        return
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise write_error(NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), folder, 0)
    if not os.access(there, os.W_OK | os.X_OK):
        raise write_error(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), folder, 0)


def _write_partial(path: Path, data: bytes, *, durable: bool = True, folder: Path | None = None) -> Path:
    partial = partial_name(path if folder is None else folder / path.name)
    try:
        if folder is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as handle:
            handle.write(data)
            handle.flush()
            if durable:
                # Before the file has its name: otherwise a loss of power may leave the name without the bytes.
                os.fsync(handle.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            partial.unlink()
        raise write_error(error, path, len(data)) from error
    return partial


def _link_or_create(partial: Path, path: Path) -> bool:
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # There are no hard links. O_EXCL decides who has the name; the winner then renames the whole file over the
        # empty one that it made, so that a reader sees an empty file at the worst, which no document is.
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        partial.replace(path)
    return True


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(error: OSError, path: Path, size: int) -> MachineError:
    """What to say when `size` bytes could not be written to `path`."""
    if is_limit(error):
        return limit_reached(error)
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return MachineError(
            f"no room to write {path}",
            got=reason,
            expected=f"{size:,} bytes free",
            next="free some space and run the same command again: what is done is kept",
        )
    return MachineError(
        f"cannot write {path}",
        got=reason,
        expected="a folder that this user can write to",
        next="choose another folder (--store-root, --run-root; --cache-root, AKD_DIST_CACHE or HOME for caches) or "
        "mend its permissions",
    )
