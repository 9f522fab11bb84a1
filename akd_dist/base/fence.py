"""A folder with one writer at a time, although an earlier one may be alive: stopped, cut off, or on another host.

A lock would not do: a worker that is suspended while it holds one can neither be waited for nor be trusted once it goes
on. So a writer owns a folder inside the folder, and whatever it publishes is renamed out of it. Who takes over renames
that away. From then on each rename and each open of the earlier writer names a path that is not there, and fails: at
whatever instruction it was suspended, nothing of its can appear any more. A rename is atomic on NFS as well.
"""

import contextlib
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from akd_dist.base.errors import HeldError, MachineError
from akd_dist.base.files import failpoint, replace, write_error

_NAME = re.compile(r"writer-(\d{6})-(\d{6})-\w+")


@dataclass(frozen=True)
class FencedWriter:
    """The one who may write into a folder, until somebody takes it over."""

    own: Path | None = None
    """Its folder inside that folder; None where nobody else can be there, and nothing is guarded."""
    what: str = "the folder"
    """What the folder is, for the message ("the student mlp-8")."""

    def replace(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        """As `files.replace`, unless somebody has taken over.

        Raises:
            HeldError: somebody has; nothing was written.
            MachineError: the file cannot be written.
        """
        try:
            replace(path, data, durable=durable, by_way_of=self.own)
        except MachineError:
            self.check()
            raise

    def remove(self, path: Path) -> None:
        """Remove a file, unless somebody has taken over (HeldError); it need not be there."""
        if self.own is None:
            path.unlink(missing_ok=True)
            return
        # By way of the writer's own folder: once somebody has taken over, it is gone, and this fails.
        aside = self.own / path.name
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
        self.check()
        aside.unlink(missing_ok=True)

    def rename(self, path: Path, name: str) -> None:
        """Give a file another name in its folder, unless somebody has taken over (HeldError)."""
        if self.own is None:
            path.rename(path.with_name(name))
            return
        aside = self.own / name
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
            aside.rename(path.with_name(name))
        self.check()

    def leave(self) -> None:
        """Be the writer no more, as if somebody had taken over here: whoever has done so elsewhere is not seen here."""
        if self.own is not None:
            with contextlib.suppress(FileNotFoundError):  # shut out already
                self.own.rename(self.own.with_name(self.own.name.replace("writer", "shut-out")))

    def check(self) -> None:
        """Leave if somebody has taken over.

        Raises:
            HeldError: somebody has.
        """
        if self.own is not None and not self.own.exists():
            raise _lost(self.what)


def take_over(folder: Path, attempt: int, what: str) -> FencedWriter:
    """Become the writer of everything beside and under `folder`, and shut out all who were it before.

    Args:
        folder: where writers have their folders; made if it is not there.
        attempt: an earlier attempt never takes over from a later one; among equals the last comer wins.
        what: what is written to, for messages.

    Raises:
        HeldError: a later attempt has it.
        MachineError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        count = 1 + max((number for _, number, _ in _writers(folder)), default=0)
        # Numbers of fixed width, so that names sort by attempt and then by count.
        own = folder / f"writer-{attempt:06d}-{count:06d}-{secrets.token_hex(6)}"
        own.mkdir()
        failpoint("fence.before_takeover")
        # Ours is there before we look: of two who come at once at least one sees the other, and the later name stays.
        for number, _, path in _writers(folder):
            if path.name > own.name:
                with contextlib.suppress(FileNotFoundError):  # shut out meanwhile
                    own.rmdir()
                raise _lost(what, number)
            if path != own:
                with contextlib.suppress(FileNotFoundError):  # shut out by somebody else
                    path.rename(path.with_name(path.name.replace("writer", "shut-out")))
        # What an earlier writer had in the making goes with its folder; none of it was published.
        for path in folder.glob("shut-out-*"):
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise write_error(error, folder, 0) from error
    return FencedWriter(own, what)


def _writers(folder: Path) -> list[tuple[int, int, Path]]:
    """(attempt, count, folder) of each writer that is not shut out."""
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [(int(match[1]), int(match[2]), path) for match, path in found]


def _lost(what: str, attempt: int | None = None) -> HeldError:
    return HeldError(
        f"{what} was taken over by a later worker",
        got="this worker was taken for dead" if attempt is None else f"attempt {attempt}",
        expected="one worker for each student",
        next="let the later one go on: this one has written nothing since",
    )
