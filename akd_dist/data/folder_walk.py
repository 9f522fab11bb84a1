"""A folder walked through, of pictures or of tar files: links are followed as long as they stay in it.

Whoever names a folder says that what lies in it may be read, and not what a link in it leads to. The path that they
name may itself be a link.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from akd_dist.base.errors import RefusedError, unreadable

# What computers leave in folders: nobody needs to hear of it.
_LEFTOVERS = frozenset(["Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir"])
_COPY = "copy what it leads to (cp -rL), or set `path` to a folder that holds both the link and its target"


def is_leftover(name: str) -> bool:
    """Whether a file or folder is hidden, or one that computers leave beside pictures."""
    return name.startswith(".") or name in _LEFTOVERS


class Walk:
    """A walk through a folder.

    Args:
        root: the folder.
        what: what is looked for, for messages: `pictures`.
        wanted: whether a file is of these, by its name relative to the folder; a link of another name may lead
            anywhere, since it is not followed.
        advice: what else helps where a link leads out.
        each_once: whether linked folders are passed over: what they lead to is found where it lies.
    """

    def __init__(
        self, root: str, what: str, wanted: Callable[[str], bool], advice: str = "", *, each_once: bool = False
    ) -> None:
        self.root, self._what, self._wanted, self._advice, self._each_once = root, what, wanted, advice, each_once
        self._real = os.path.realpath(root)
        self.folders: list[str] = []
        """Names of the folders directly in it; known once all files are."""

    def files(self) -> Iterator[tuple[os.DirEntry[str], str]]:
        """Each file with its name relative to the folder, with slashes; in no order.

        Raises:
            RefusedError: a link leads out of the folder, in a circle or nowhere; a name is not UTF-8; a folder cannot
                be read; what is called as a file that is looked for is none.
        """
        return self._look(self.root, "", (self._real,))

    def check_file(self, path: str) -> None:
        """Refuse a file that was found in the folder by a pattern.

        Raises:
            RefusedError: a link leads out of the folder, or nowhere.
        """
        real = os.path.realpath(path)
        if not self._holds(real):
            raise self._leads_out(path, real)
        if not Path(real).exists():
            raise self._no_file(path)

    def _look(self, place: str, below: str, above: tuple[str, ...]) -> Iterator[tuple[os.DirEntry[str], str]]:
        """What lies in a folder.

        Args:
            below: the folder relative to the root, with a slash at its end.
            above: the real paths of this folder and those that it lies in.
        """
        try:
            with os.scandir(place) as opened:
                entries = [entry for entry in opened if not is_leftover(entry.name)]
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    yield self._file(entry, below + entry.name)
                else:
                    yield from self._other(entry, below + entry.name, above)
        except OSError as error:
            right, advice = (
                f"folders and {self._what} that this user can read",
                "correct its permissions, or leave it out",
            )
            raise unreadable(RefusedError, f"the folder {place}", error, expected=right, next=advice) from error

    def _file(self, entry: os.DirEntry[str], name: str) -> tuple[os.DirEntry[str], str]:
        if self._wanted(name):
            self._check_name(name)
        return entry, name

    def _other(
        self, entry: os.DirEntry[str], name: str, above: tuple[str, ...]
    ) -> Iterator[tuple[os.DirEntry[str], str]]:
        """A folder, a link, or something else."""
        real = self._target(entry, name) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
        if entry.is_dir():
            if self._each_once and entry.is_symlink():
                return
            if real in above:
                raise self._refused_link(entry.path, real, "to a folder which it lies in itself", "remove the link")
            self._check_name(name)
            if not name.count("/"):
                self.folders.append(name)
            yield from self._look(entry.path, f"{name}/", (*above, real))
        elif entry.is_file():
            yield self._file(entry, name)
        elif self._wanted(name):
            raise self._no_file(entry.path)

    def _target(self, entry: os.DirEntry[str], name: str) -> str:
        """Where a link leads.

        Raises:
            RefusedError: out of the folder.
        """
        real = os.path.realpath(entry.path)
        if not self._holds(real) and (self._wanted(name) or entry.is_dir()):
            raise self._leads_out(entry.path, real)
        return real

    def _holds(self, real: str) -> bool:
        return real == self._real or real.startswith(f"{self._real.rstrip('/')}/")

    def _leads_out(self, link: str, real: str) -> RefusedError:
        return self._refused_link(link, real, f"out of the folder {self.root}", _COPY + self._advice)

    def _no_file(self, path: str) -> RefusedError:
        place = Path(path)
        nothing = place.is_symlink() and not place.exists()
        return RefusedError(
            f"{path} is no regular file",
            got=f"a link to nothing: {place.readlink()}" if nothing else "a device, a socket or a pipe",
            expected=self._what,
            next="remove it",
        )

    @staticmethod
    def _refused_link(link: str, real: str, where: str, advice: str) -> RefusedError:
        return RefusedError(
            f"the link {link} leads {where}",
            got=f"it leads to {real}",
            expected="links within the folder, and not in a circle",
            next=advice,
        )

    def _check_name(self, name: str) -> None:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                f"a name in {self.root} is not UTF-8",
                got=ascii(name),
                expected="names in UTF-8, by whose bytes rows are ordered",
                next="rename it",
            ) from error
