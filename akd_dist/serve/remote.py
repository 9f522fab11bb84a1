"""Students and runs in object storage, brought to this machine to be used: what is asked for of them, and no more."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from akd_dist.base.errors import RefusedError
from akd_dist.base.places import named_in_errors, renamed
from akd_dist.storage.roots import open_root
from akd_dist.storage.run_copy import DOCUMENTS, MODEL, RunCopy
from akd_dist.storage.run_objects import STUDENTS
from akd_dist.tracking.remote import copy_to_read


@dataclass
class Brought:
    """What was brought for a verb."""

    cache_root: Path
    names: dict[str, str] = field(default_factory=dict)
    """The URI of each folder that is a copy."""

    def model(self, place: str) -> str:
        """A model folder: of a student of a run in object storage a copy, any other as it is.

        Raises:
            RefusedError: the run has no such student, or none that has a model.
        """
        run, _, student = place.rstrip("/").rpartition(f"/{STUDENTS}/")
        if "://" not in place or not run or "/" in student or (copy := self._copy(run)) is None:
            return place
        copy.refresh(MODEL, only=[student])
        folder = copy.folder / STUDENTS / student
        if not (folder / "model.json").exists():
            known = student in copy.students
            raise RefusedError(
                f"{place} is not a model folder",
                got="a student without a model: it trains, or did not come to its end" if known else "no such student",
                expected="a student that is done",
                next=f"akd-dist status {run} shows the students of the run",
            )
        return str(folder)

    def data(self, place: str) -> str:
        """Data that a user names: of a run in object storage a copy of its documents, any other as they are."""
        if "://" not in place or place.rstrip("/").endswith((".parquet", ".yaml", ".yml")):
            return place
        if (copy := self._copy(place)) is None:
            return place
        copy.refresh((), documents=DOCUMENTS)
        return str(copy.folder)

    def named(self, document: dict[str, Any]) -> dict[str, Any]:
        """A document with places called as they were named."""
        found: dict[str, Any] = renamed(document, self.names)
        return found

    def _copy(self, run: str) -> RunCopy | None:
        if not run.startswith("s3://") or not open_root(run).exists("identity.json"):
            return None
        copy = copy_to_read(run, self.cache_root)
        self.names[str(copy.folder)] = copy.uri
        return copy


@contextlib.contextmanager
def brought(cache_root: str | Path) -> Iterator[Brought]:
    """For the time of a verb: it works on copies, and refusals call them by their URIs."""
    found = Brought(Path(cache_root))
    with named_in_errors(found.names):
        yield found
