"""What prepared rows were made from: the files of their sources by content, and what a custom source shows of itself.

It is noted when rows are prepared. When they are used again, a file whose size, times and inode are those noted is
believed at first, and read in the background while the command goes on (`SourceCheck`); one of which they are not is
read before anything begins. What a function of the user's own returns is known by its length and a sample.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import is_settled, stamp_of
from akd_dist.data.blocks import default_threads
from akd_dist.data.file_sets import FileSet, sha256_of_file
from akd_dist.data.sources.base import Kind, Source

Origins = dict[str, Any]
"""JSON: `files`, of each its sha256, and size, times and inode unless these may lie; `shown` of custom sources."""
Origin = Path | FileSet
"""What rows are made from: a file, or many that are looked at as one."""
Stamps = dict[Origin, list[int] | None]
"""As `files.stamp_of`."""
Believed = dict[Origin, str]
"""The sha256 that files had."""
_CHEAP_SECONDS = 2.0
"""A factory that takes longer than this is not called again by every command."""


class SourceCheck:
    """Files of sources that were believed by their size, times and inode, to be read while a command goes on.

    Args:
        believed: sha256 of each when the rows were prepared.
        forget: called before that is told of one, so that the prepared rows are not believed again.
    """

    def __init__(self, believed: Mapping[Origin, str], forget: Callable[[], None]) -> None:
        self._believed, self._forget = dict(believed), forget
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Read them in the background; once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="sources", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Refuse to go on if it is known by now that a file differs; see `finish`."""
        if self._error is not None:
            self._forget()
            raise self._error

    def finish(self) -> None:
        """Return once every file is known to hold what the rows were prepared from: before results are delivered.

        Raises:
            RefusedError: a file holds something else, or cannot be read; names it.
        """
        self.begin()
        assert self._thread is not None
        self._thread.join()
        self.look()

    def _read(self) -> None:
        try:
            for path, expected in self._believed.items():
                if (found := sha256_of(path, threads=1)) != expected:
                    raise RefusedError(
                        f"{path} has changed since its rows were prepared, though neither its size nor its times have",
                        got=f"sha256 {found[:16]}",
                        expected=f"sha256 {expected[:16]}, as when it was read",
                        next="bring the file back; or give the same command again, which prepares the rows anew: if "
                        "they are other data then, a run of this name needs --fresh or another name",
                    )
        except Exception as error:
            self._error = error


def look_at(files: Sequence[Origin]) -> tuple[Origins, Stamps]:
    """What the files of sources hold just before they are read, and their stamps.

    Raises:
        RefusedError: one cannot be read.
    """
    stamps, trusted = _stamps(files)
    noted = {str(path): {"stamp": trusted[path], "sha256": digest} for path, digest in _sha256_of(files).items()}
    return {"files": noted}, stamps


def check_unchanged(origins: Origins, stamps: Stamps) -> None:
    """Once sources have been read: they must hold what they held before.

    Raises:
        RefusedError: one was written meanwhile; names it.
    """
    noted = origins["files"]
    # A file without a stamp was written too recently for another write to show in its times, so it is read again.
    doubtful = [path for path in stamps if noted[str(path)]["stamp"] is None or _stamp(path) != stamps[path]]
    for path, found in _sha256_of(doubtful).items():
        if found != noted[str(path)]["sha256"]:
            raise RefusedError(
                f"{path} was written while it was read",
                got="other content after reading than before",
                expected="a file that nobody writes to",
                next="run the same command again once it is whole",
            )


def show(sources: Mapping[str, Source]) -> dict[str, Any]:
    """What sources of the user's own show of themselves: how many rows, and a sample of them.

    Items that are not the same when asked twice are random, and say nothing.
    """
    shown = {}
    for name, source in sources.items():
        # Asked twice: an augmenting data set gives another item each time, and its sample says nothing about a change.
        if source.sample is not None:
            first, again = source.sample(), source.sample()
            shown[name] = {"rows": source.rows, "sample": first if first == again else None, "seconds": None}
    return shown


def compare(origins: Origins, files: Sequence[Origin], kinds: Mapping[str, Kind]) -> tuple[Origins | None, Believed]:
    """Whether rows can still be used, as far as that is known without reading all of their sources.

    Args:
        origins: what was noted of them.
        files: of the sources.
        kinds: the sources by split.

    Returns:
        What is to be noted from now on, None where the sources have changed; and the sha256 of the files that were only
        believed.

    Raises:
        RefusedError: a file cannot be read, or a factory fails.
    """
    noted = origins["files"]
    if {str(path) for path in files} != noted.keys():
        return None, {}
    stamps, trusted = _stamps(files)
    doubtful = [path for path in files if noted[str(path)]["stamp"] != stamps[path]]
    digests = _sha256_of(doubtful)
    if any(noted[str(path)]["sha256"] != found for path, found in digests.items()):
        return None, {}
    seen = {str(path): {"stamp": trusted[path], "sha256": found} for path, found in digests.items()}
    shown = {name: _shown_again(kinds[name], before) for name, before in origins["shown"].items()}
    if None in shown.values():
        return None, {}
    believed = {path: str(noted[str(path)]["sha256"]) for path in files if path not in digests}
    return {"files": {**noted, **seen}, "shown": shown}, believed


def _shown_again(kind: Kind, before: dict[str, Any]) -> dict[str, Any] | None:
    """What a source of the user's own shows now, None where that has changed; not asked where it takes long."""
    if (before["seconds"] or 0.0) > _CHEAP_SECONDS:
        return before
    started = time.monotonic()
    source = kind.open()
    same = source.rows == before["rows"] and source.sample is not None
    if same and source.sample is not None and before["sample"] is not None:
        same = source.sample() == before["sample"]
    seconds = before["seconds"] if before["seconds"] is not None else round(time.monotonic() - started, 3)
    return {**before, "seconds": seconds} if same else None


def size_and_time(file: Origin) -> tuple[int, int] | None:
    """Bytes of a file, and the time of its content in ns; of many, a hash of theirs. None where there is none."""
    if isinstance(file, FileSet):
        return file.size_and_time()
    stamp = stamp_of(file)
    return None if stamp is None else (stamp[0], stamp[1])


def _stamps(files: Sequence[Origin]) -> tuple[Stamps, Stamps]:
    """The stamp of each file; and the same, without those that would not change if the file did now."""
    stamps = {path: _stamp(path) for path in files}
    return stamps, {path: stamp if is_settled(stamp) else None for path, stamp in stamps.items()}


def _stamp(file: Origin) -> list[int] | None:
    return file.stamp() if isinstance(file, FileSet) else stamp_of(file)


def _sha256_of(files: Sequence[Origin]) -> dict[Origin, str]:
    with ThreadPoolExecutor(default_threads()) as pool:
        return dict(zip(files, pool.map(sha256_of, files), strict=True))


def sha256_of(file: Origin, threads: int | None = None) -> str:
    """The sha256 of a file, or of many.

    Args:
        threads: how many read, where there are many; by default as many as this process may run on.

    Raises:
        RefusedError: it cannot be read.
    """
    if isinstance(file, FileSet):
        return file.sha256(threads or default_threads())
    return sha256_of_file(file)
