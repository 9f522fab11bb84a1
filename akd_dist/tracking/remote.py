"""How far a run in object storage is: its small documents are copied here, and read as those of a folder."""

import time
from pathlib import Path

from akd_dist.base.places import check_uri, named_in_errors
from akd_dist.documents.status import StatusDocument
from akd_dist.storage.run_copy import RunCopy, scratch
from akd_dist.tracking.status import RunReader

LOOK_SECONDS, LOOK_AT_ALL_SECONDS = 3.0, 20.0
"""How often what the cohorts tell is asked for; and everything, results and checkpoints among it."""


def reader_of(run: Path | str) -> RunReader:
    """A reader of a run, in a folder or at an `s3://` URI.

    Raises:
        RecipeError: a URI of another kind, or one that names no place.
    """
    check_uri(str(run))
    return RemoteReader(str(run)) if "://" in str(run) else RunReader(Path(run))


def copy_to_read(uri: str, cache_root: Path | None = None) -> RunCopy:
    """The copy of a run that those share who only read it; it is brought up to date by `refresh`."""
    if cache_root is None:
        from akd_dist.storage.node_cache import cache_folder  # here, so that `status` of a folder needs no zarr

        cache_root = cache_folder()
    return RunCopy(uri, scratch(cache_root, uri, "reader"))


class RemoteReader(RunReader):
    """A `RunReader` of a run in object storage."""

    def __init__(self, uri: str) -> None:
        self.copy = copy_to_read(uri)
        self.uri = self.copy.uri
        self._looked_at = self._looked_at_all = float("-inf")
        super().__init__(self.copy.folder)

    def read(self) -> StatusDocument:
        """How far it is, as of a few seconds ago at most.

        Raises:
            RefusedError: there is no run.
            MachineError: the storage cannot be read.
        """
        now = time.monotonic()
        with named_in_errors({str(self.run): self.uri}):
            if now - self._looked_at_all >= LOOK_AT_ALL_SECONDS:
                self.copy.refresh()
                self._looked_at = self._looked_at_all = now
            elif now - self._looked_at >= LOOK_SECONDS:
                self.copy.refresh_control()
                self._looked_at = now
            found = super().read()
        if found.state not in ("training", "preparing") and now != self._looked_at_all:
            # It has ended since everything was looked at: what it came to is not here yet.
            self._looked_at_all = float("-inf")
            return self.read()
        return found.model_copy(update={"run": self.uri})
