"""A run in object storage, copied into a folder of this node: there all that reads run folders finds its files.

What was fetched is not fetched again until it changes. Small documents only, unless a student's model is asked for; of
checkpoints, which only workers read, their names and sizes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from akd_dist.base.files import canonical_json, read_json, replace, sha256, write_error
from akd_dist.base.locks import file_lock
from akd_dist.storage.objects import ObjectMissing, Stat
from akd_dist.storage.run_objects import (
    BUNDLE,
    CHECKPOINTS,
    CONTROL,
    STUDENTS,
    Control,
    RunObjects,
    Standing,
    in_parallel,
    order_of,
    standings,
)

DOCUMENTS = (
    *("fleet.json", "report.html", "comparison.json", "comparison.md", "tune.json", "trackers.json", "recipe.yaml"),
    "identity.json",
)
"""What the driver keeps beside the folders of a run. The last one says which run it is."""
RESULTS = frozenset({"result.json", "metrics.jsonl"})
"""A student's files that say how far it is."""
REPORTED = RESULTS | {"test.parquet"}
"""A student's files that a report is made of."""
MODEL = frozenset({"model.json", "model.safetensors"})
"""A student's files that make it a model folder."""
_TOLD = (f"{CONTROL}/driver.json", f"{CONTROL}/plan.json")
_INDEX = ".fetched.json"
_BUNDLED = "of a bundle"
_LOGS = ("logs/", f"{CONTROL}/renewed")
# Where the header of a checkpoint ends, in all but the largest ones.
_HEAD_BYTES = 1 << 18


def scratch(cache_root: str | Path, uri: str, role: str) -> Path:
    """Where a run in object storage lies on this node.

    Args:
        role: `driver`, `worker` or `reader`: each has a copy of its own, and puts its own files only.
    """
    uri = uri.rstrip("/")
    return Path(cache_root) / "runs" / sha256(uri.encode())[:16] / role / uri.rpartition("/")[2]


def put_documents(uri: str, folder: Path) -> None:
    """Put the driver's documents that lie in a folder.

    Raises:
        MachineError: the storage cannot be written.
    """
    root = RunObjects.at(uri.rstrip("/")).root
    for name in DOCUMENTS:
        if (folder / name).is_file():
            root.put(name, (folder / name).read_bytes())


def is_copy(folder: Path) -> bool:
    """Whether a run's folder is a copy of one in object storage: what lies beside it here does not lie beside that."""
    return (folder / _INDEX).is_file()


class RunCopy:
    """A run's documents in a folder, and what is known of the objects behind them.

    Args:
        uri: the run, `s3://bucket/prefix/name`.
        folder: where the copy lies; made when something is fetched.
    """

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder = uri.rstrip("/"), folder
        self.run = RunObjects.at(self.uri)
        self.control, self.students = Control(), dict[str, Standing]()
        self._lock = threading.Lock()
        self._jobs: dict[str, dict[str, str]] = {}
        self._tokens: dict[str, str] = {}  # of bundles, by job
        self._index: dict[str, str] | None = None  # tokens of what was fetched, by path in the folder

    def refresh(
        self,
        files: Collection[str] = RESULTS,
        *,
        documents: Collection[str] = DOCUMENTS,
        driver: bool = True,
        only: Collection[str] = (),
        heads: bool = False,
    ) -> None:
        """Bring down what has changed, and remove what is gone.

        Args:
            files: of each student.
            documents: of the driver.
            driver: whether to fetch what the driver says of itself and of its plan.
            only: students whose files are fetched; none means all.
            heads: whether to fetch the header of each newest checkpoint, too.

        Raises:
            MachineError: the storage cannot be read, or the folder not be written.
            DamagedError: a bundle is not what a cohort writes.
        """
        with self._locked():
            listed = self.run.root.list()
            self._take_control({key: stat for key, stat in listed.items() if key.startswith(f"{CONTROL}/")})
            found = {key: stat for key, stat in listed.items() if key.startswith(f"{STUDENTS}/")}
            self.students = standings(found, self.control.since)
            wanted = {name: (name, listed[name]) for name in documents if name in listed}
            for student, standing in self.students.items():
                if not only or student in only:
                    for name in standing.files.keys() & set(files):
                        wanted[f"{STUDENTS}/{student}/{name}"] = (standing.key_of(student, name), standing.files[name])
            if driver:
                wanted |= self._of_driver()
            self._fetch(wanted)
            self._mark_checkpoints(heads)
            self._remove_stale(listed, bool(documents), driver)
            self._write_bundles(self._jobs)
            self._save_index()

    def refresh_control(self, *, driver: bool = True) -> None:
        """Bring down how far the cohorts are: one listing, and what has changed.

        Args, Raises: as `refresh`.
        """
        with self._locked():
            changed = self._take_control(self.run.root.list(CONTROL))
            if driver:
                self._fetch(self._of_driver())
            self._write_bundles(changed)
            self._save_index()

    def forget(self) -> None:
        """Remove the copy."""
        with self._lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._jobs, self._tokens, self._index = {}, {}, None

    # ---- what is there

    def _take_control(self, listed: dict[str, Stat]) -> list[str]:
        """Fetch the bundles that have changed, and say which jobs they are of; attempts and stops become files."""
        self.control = Control.of(listed)
        for kind, numbers in (("attempt", self.control.attempts), ("stop", self.control.stopped)):
            for number in numbers:
                self._touch(self.folder / CONTROL / f"{kind}-{number}")
        bundles = self.control.bundles()
        for job in self._jobs.keys() - bundles.keys():
            del self._jobs[job], self._tokens[job]
        changed = [job for job, stat in bundles.items() if self._tokens.get(job) != stat.token]
        for job, texts in zip(changed, in_parallel(self.run.bundled, changed), strict=True):
            self._jobs[job], self._tokens[job] = texts, bundles[job].token
        return changed

    def _of_driver(self) -> dict[str, tuple[str, Stat]]:
        return {key: (key, stat) for key, stat in self.control.others.items() if key in _TOLD}

    # ---- files

    def _fetch(self, wanted: dict[str, tuple[str, Stat]]) -> None:
        index = self._known()
        new = [
            (path, key, stat)
            for path, (key, stat) in wanted.items()
            if index.get(path) != stat.token or not (self.folder / path).exists()
        ]
        for path, token in in_parallel(lambda one: self._bring(*one), new):
            index[path] = token

    def _bring(self, path: str, key: str, stat: Stat) -> tuple[str, str]:
        with contextlib.suppress(ObjectMissing):  # gone since it was listed: the next look will say so
            self._write(self.folder / path, self.run.root.get(key), stat.modified)
            return path, stat.token
        return path, ""

    def _mark_checkpoints(self, heads: bool) -> None:
        """A file of the size of each checkpoint that counts, empty but for its header, where that is asked for."""
        index = self._known()
        for student, standing in self.students.items():
            folder = f"{STUDENTS}/{student}/{CHECKPOINTS}"
            marks = {f"{folder}/{key.rpartition('/')[2]}": (key, stat) for key, stat in standing.checkpoints}
            newest = standing.checkpoints[0][0] if standing.checkpoints and "result.json" not in standing.files else ""
            for path, (key, stat) in marks.items():
                token = f"{stat.token}{' and its head' if heads and key == newest else ''}"
                if index.get(path) != token:
                    head = b""
                    with contextlib.suppress(ObjectMissing):
                        head = self.run.root.get_start(key, _HEAD_BYTES) if heads and key == newest else b""
                    self._write(self.folder / path, head, stat.modified)
                    os.truncate(self.folder / path, stat.size)
                    index[path] = token
            for path in [path for path in index if path.startswith(f"{folder}/") and path not in marks]:
                self._remove(path)

    def _remove_stale(self, listed: Collection[str], documents: bool, driver: bool) -> None:
        """Remove what was fetched once and counts no more; of the driver's files only where these are fetched.

        The driver's documents are removed whoever wrote them here: they may be of a run of this name that is no more.
        """
        for name in DOCUMENTS if documents else ():
            if name not in listed:
                self._remove(name)
        for path, token in list(self._known().items()):
            top, _, rest = path.partition("/")
            if token == _BUNDLED:
                gone = all(path not in files for files in self._jobs.values())
            elif top == STUDENTS:
                standing = self.students.get(rest.partition("/")[0])
                name = path.rpartition("/")[2]
                # Checkpoints were looked at where they were marked.
                gone = standing is None or (f"/{CHECKPOINTS}/" not in path and name not in standing.files)
            else:
                gone = driver and path not in listed
            if gone:
                self._remove(path)

    def _write_bundles(self, changed: Iterable[str]) -> None:
        """Write the files that the bundles of jobs hold: logs of several jobs one after the other, of all else the
        latest. What a student's latest writer put itself is no bundle's to say.
        """
        jobs = sorted(self._jobs, key=order_of)
        touched = {path for job in changed for path in self._jobs.get(job, ())}
        for path in touched:
            of_jobs = [(job, self._jobs[job][path]) for job in jobs if path in self._jobs[job]]
            _, student, name = [*path.split("/"), "", ""][:3]
            if path.startswith(f"{STUDENTS}/") and student in self.students and name in self.students[student].files:
                continue
            text = "".join(text for _, text in of_jobs) if path.startswith(_LOGS) else of_jobs[-1][1]
            data, place = text.encode(errors="backslashreplace"), self.folder / path
            if not place.exists() or place.read_bytes() != data:
                stat = self.control.others.get(f"{CONTROL}/{of_jobs[-1][0]}{BUNDLE}")
                self._write(place, data, stat.modified if stat else 0.0)
            self._known()[path] = _BUNDLED

    # ---- the folder

    @contextlib.contextmanager
    def _locked(self) -> Any:
        """One at a time, among processes as well: so nobody writes an older listing over a newer one."""
        with self._lock, file_lock(self.folder.parent / f"{self.folder.name}.lock", what=f"a copy of {self.uri}"):
            self._index = None  # another process may have fetched meanwhile
            yield

    def _known(self) -> dict[str, str]:
        if self._index is None:
            noted = read_json(self.folder / _INDEX)
            sound = isinstance(noted, dict) and all(isinstance(token, str) for token in noted.values())
            self._index = noted if sound else {}
        assert self._index is not None
        return self._index

    def _save_index(self) -> None:
        data = canonical_json(self._known())
        path = self.folder / _INDEX
        if not path.exists() or path.read_bytes() != data:
            replace(path, data, durable=False)

    def _write(self, path: Path, data: bytes, modified: float) -> None:
        replace(path, data, durable=False)
        os.utime(path, (modified, modified))  # as if it lay here: what came later is told by its time

    def _touch(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise write_error(error, path, 0) from error

    def _remove(self, path: str) -> None:
        (self.folder / path).unlink(missing_ok=True)
        self._known().pop(path, None)
