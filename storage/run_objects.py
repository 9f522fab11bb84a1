"""A run in object storage: its keys, who may write what, and which of what lies there counts.

    control/attempt-<n>               a driver has begun attempt n; created once
    control/stop-<n>                  the workers of attempt n are to checkpoint and leave
    control/fresh-<n>                 the run was started over: nothing of attempts before n counts
    control/<job>.json.gz             how far a cohort is, its metrics and its logs: replaced every few seconds
    control/<job>.rank<n>.json.gz     logs of its other workers: put when these leave
    students/<student>/<writer>/...   what one worker wrote of a student; a writer is <attempt>-<count>-<token>
    identity.json, fleet.json, ...    the driver's, as in a folder

**One writer a student.** There is no rename here by which a later worker could shut an earlier one out at whatever
instruction that is suspended. So the earlier one is not kept from putting objects, but from being believed:

- A worker becomes a student's writer by creating `writer.json` under a name that sorts after all that it lists, and
  lists again: where a still later name has come meanwhile, it leaves. Of two that come at once at least one sees the
  other, and the later name stays. Listings have to show what was put before, as those of S3 do.
- A writer puts objects under its own name alone, each of them once and whole. Nothing is ever put over what another
  one wrote. Before it puts anything it lists, and leaves if there is a later name.
- Whoever reads takes result, metrics and model of the latest writer alone. So what a late worker puts, although a later
  one came between its look and its put, counts for nobody.
- Whoever resumes takes the checkpoints of the latest writer that has any. A late worker's can be found only before the
  later one has put its first, and does no harm: it is whole, has its checksum, says which cached files it rests on, and
  is a state of this very student, no other than if that worker had been a little faster. After `fresh-<n>`, when a
  student of that name may be another one, nothing of earlier attempts counts.
- A writer removes its own older checkpoints, and those of writers before it once it has put its own; never a later
  one's. So whoever is about to read one that is gone lists again, and finds a newer one.
"""

from __future__ import annotations

import gzip
import json
import re
import secrets
import zlib
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from akd_dist.base.errors import DamagedError, HeldError
from akd_dist.base.files import failpoint, parse_json
from akd_dist.storage.objects import MOST_DOCUMENT, ObjectMissing, ObjectRoot, Stat
from akd_dist.storage.roots import open_root

STUDENTS, CONTROL, CHECKPOINTS, MARKER, BUNDLE = "students", "control", "checkpoints", "writer.json", ".json.gz"
MOST_ATTEMPTS = 10_000
"""The latest attempt that a run may have: each new one puts a stop mark for every earlier one that has none."""
AT_ONCE = 16
"""How many small requests are on their way at the same time."""
_LISTED_ALONE = 2
_MOST_WRITERS = 999_999
# More takes several requests, which cannot be create-only.
_MOST_CREATED = 4 * 2**30
_WRITER = re.compile(r"(\d{6})-(\d{6})-[0-9a-f]{12}")
_STUDENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MARK = re.compile(r"(attempt|stop|fresh)-([0-9]{1,6})")
# Epoch, step and attempt. Bounded, since a copy of the run has a file of this name.
_CHECKPOINT = re.compile(r"[0-9]{1,20}(?:-[0-9]{1,20}){0,5}\.ckpt")
_JOB = re.compile(r"cohort-([0-9]{1,6})-([0-9]{1,9})(?:\.rank[0-9]{1,6})?")
# What `distill/publisher.py` packs, and nothing else that a run's folder has.
_MEMBER = re.compile(
    r"control/progress-cohort-[0-9]{1,6}-[0-9]{1,9}\.json|control/renewed\.txt"
    rf"|students/{_STUDENT.pattern}/metrics\.jsonl|logs/[A-Za-z0-9][A-Za-z0-9._-]{{0,155}}\.log"
)

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass
class Control:
    """What lies in the folder `control` of a run."""

    attempts: set[int] = field(default_factory=set)
    """Those that have begun."""
    stopped: set[int] = field(default_factory=set)
    """Those whose workers are to leave."""
    since: int = 0
    """Nothing of earlier attempts counts."""
    others: dict[str, Stat] = field(default_factory=dict)
    """Everything else, by key."""
    impossible: list[str] = field(default_factory=list)
    """Keys of marks of attempts that no run comes to; they mark nothing."""

    @property
    def last(self) -> int:
        """The number of the latest attempt, 0 before the first."""
        return max(self.attempts, default=0)

    @classmethod
    def of(cls, listed: dict[str, Stat]) -> Self:
        """What a listing of the folder says."""
        found = cls()
        for key, stat in listed.items():
            if (mark := _MARK.fullmatch(key.removeprefix(f"{CONTROL}/"))) is None:
                found.others[key] = stat
            elif int(mark[2]) > MOST_ATTEMPTS:
                found.impossible.append(key)
            elif mark[1] == "fresh":
                found.since = max(found.since, int(mark[2]))
            else:
                (found.attempts if mark[1] == "attempt" else found.stopped).add(int(mark[2]))
        return found

    def check(self, root: ObjectRoot) -> None:
        """Refuse marks that no run of ours has: after these, what a new attempt puts would count for nobody.

        Args:
            root: the run's.

        Raises:
            DamagedError: there is one.
        """
        impossible = list(self.impossible)
        # Starting over marks the attempt that comes next.
        if self.since > self.last + 1:
            impossible.append(f"{CONTROL}/fresh-{self.since}")
        if impossible:
            latest = f"the latest attempt is {self.last}" if self.last else "no attempt has begun"
            raise impossible_mark(root.path_of(impossible[0]), f"a mark for an attempt that never was: {latest}")

    def bundles(self) -> dict[str, Stat]:
        """The bundles that count, by job, in the order in which these began."""
        named = {
            key.removeprefix(f"{CONTROL}/").removesuffix(BUNDLE): stat
            for key, stat in self.others.items()
            if key.endswith(BUNDLE)
        }
        return {job: named[job] for job in sorted(named, key=order_of) if order_of(job)[0] >= self.since}


def order_of(job: str) -> tuple[int, int, str]:
    """By what jobs of cohorts sort: attempt and number. Others come first."""
    found = _JOB.fullmatch(job)
    return (int(found[1]), int(found[2]), job) if found else (0, 0, job)


@dataclass
class Standing:
    """What counts of one student."""

    writer: str | None = None
    """The latest writer."""
    files: dict[str, Stat] = field(default_factory=dict)
    """The latest writer's, by name, without checkpoints."""
    checkpoints: list[tuple[str, Stat]] = field(default_factory=list)
    """Keys, the one to resume from first; behind those of the latest writer that has any come those of earlier ones."""

    def key_of(self, student: str, name: str) -> str:
        """The key of one of its files."""
        return f"{STUDENTS}/{student}/{self.writer}/{name}"


def standings(listed: dict[str, Stat], since: int = 0) -> dict[str, Standing]:
    """What counts of each student, by a listing of the folder `students`.

    Pages of a listing come one after the other, in the order of keys: a writer's objects are listed before the name of
    any later one is.

    Args:
        since: nothing of earlier attempts counts.
    """
    files: dict[str, dict[str, dict[str, Stat]]] = {}
    for key, stat in listed.items():
        parts = key.split("/", 3)
        # Fewer parts have what consoles of object storage put as folders: empty objects, `students/` or `students/a/`.
        if len(parts) < 4:
            continue
        _, student, writer, name = parts
        if _STUDENT.fullmatch(student) and (named := _WRITER.fullmatch(writer)) and int(named[1]) >= since:
            files.setdefault(student, {}).setdefault(writer, {})[name] = stat
    found = {}
    for student, of_writers in files.items():
        # Only who has left its name has taken over; objects without it are of one whose name was removed.
        writers = sorted(writer for writer, names in of_writers.items() if MARKER in names)
        if not writers:
            continue
        standing = found[student] = Standing(writers[-1])
        kept = of_writers[writers[-1]].items()
        standing.files = {name: stat for name, stat in kept if "/" not in name and name != MARKER}
        for writer in reversed(writers):
            names = [name.removeprefix(f"{CHECKPOINTS}/") for name in of_writers[writer] if "/" in name]
            for name in sorted(filter(_CHECKPOINT.fullmatch, names), key=_numbers, reverse=True):
                key = f"{STUDENTS}/{student}/{writer}/{CHECKPOINTS}/{name}"
                standing.checkpoints.append((key, listed[key]))
    return found


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.partition(".")[0].split("-")))


@dataclass(frozen=True)
class RunObjects:
    """A run's objects; a small value. Every method raises MachineError where the storage does not do what it should."""

    root: ObjectRoot

    @classmethod
    def at(cls, uri: str) -> Self:
        """The run at a URI; nothing is looked at yet."""
        return cls(open_root(uri))

    # ---- drivers

    def control(self) -> Control:
        """What the folder `control` holds now."""
        return Control.of(self.root.list(CONTROL))

    def begin_attempt(self, number: int) -> None:
        """Begin an attempt, and have the workers of all earlier ones leave; before the first worker of it starts.

        Raises:
            HeldError: somebody else has begun it.
            DamagedError: no run comes to so many attempts.
        """
        if number > MOST_ATTEMPTS:
            mark = self.root.path_of(f"{CONTROL}/attempt-{number - 1}")
            raise impossible_mark(mark, f"attempt {number:,} would be the next one")
        mine = secrets.token_hex(12).encode()
        key = f"{CONTROL}/attempt-{number}"
        # Where the answer to a put was lost, its repetition finds the object of its own.
        if not self.root.put_new(key, mine) and self.root.get(key, 1024) != mine:
            raise HeldError(
                f"the run {self.root.name} was taken on by another command",
                got=f"attempt {number} has begun",
                expected="one command at a time",
                next="let that one go on: this one has trained nothing",
            )
        stopped = self.control().stopped
        in_parallel(self.stop, [attempt for attempt in range(1, number) if attempt not in stopped])

    def stop(self, attempt: int) -> None:
        """Tell the workers of an attempt to checkpoint and leave."""
        self.root.put_new(f"{CONTROL}/stop-{attempt}", b"")

    def is_stopped(self, attempt: int) -> bool:
        """Whether the workers of an attempt are to leave."""
        return self.root.exists(f"{CONTROL}/stop-{attempt}")

    def start_over(self, documents: Iterable[str]) -> None:
        """Have nothing count any more that lies here, then remove it. Attempts stay, so that late workers still leave.

        Args:
            documents: keys of the driver's documents, removed in this order, after the students.
        """
        control = self.control()
        in_parallel(self.stop, [attempt for attempt in range(1, control.last + 1) if attempt not in control.stopped])
        self.root.put_new(f"{CONTROL}/fresh-{control.last + 1}", b"")
        self.root.delete_folder(STUDENTS)
        self.root.delete_keys(control.others)
        for key in documents:
            self.root.delete(key)

    # ---- students

    def students(self, since: int = 0, only: Collection[str] = ()) -> dict[str, Standing]:
        """What counts of each student now.

        Args:
            since: nothing of earlier attempts counts.
            only: the students that are asked for, at least; none means all.
        """
        # A thousand keys come with one request, and a student has about eight.
        folders = [f"{STUDENTS}/{name}" for name in only] if 0 < len(only) <= _LISTED_ALONE else [STUDENTS]
        listed: dict[str, Stat] = {}
        for found in in_parallel(self.root.list, folders):
            listed |= found
        return standings(listed, since)

    def take_over(self, students: Iterable[str], attempt: int, since: int = 0) -> dict[str, str]:
        """Become the writer of students: nothing that an earlier writer puts from now on counts.

        Args:
            attempt: an earlier attempt never takes over from a later one; among equals the last comer wins.
            since: nothing of earlier attempts counts.

        Returns:
            The writer's name for each student.

        Raises:
            HeldError: a later attempt, or a later worker, has one of them.
            DamagedError: a writer has the last number that there is; a later one would count for nobody.
        """
        students = list(students)
        before = self.students(since, students)
        names = {}
        for student in students:
            last = before[student].writer if student in before else None
            if last is not None and int(last[:6]) > attempt:
                raise _lost(student, int(last[:6]))
            if last is not None and int(last[:6]) == attempt and int(last[7:13]) >= _MOST_WRITERS:
                where = self.root.path_of(f"{STUDENTS}/{student}/{last}/{MARKER}")
                raise impossible_mark(where, f"writer {_MOST_WRITERS:,} of one student in one attempt")
            count = int(last[7:13]) + 1 if last is not None and int(last[:6]) == attempt else 1
            names[student] = f"{attempt:06d}-{count:06d}-{secrets.token_hex(6)}"
        failpoint("run.before_takeover")
        in_parallel(lambda student: self.put(student, names[student], MARKER, b"{}"), students)
        self.check_latest(names, since)
        return names

    def check_latest(self, names: dict[str, str], since: int = 0) -> None:
        """Leave if one of these students has a later writer.

        Args: as `later`.

        Raises:
            HeldError: so it is.
        """
        for student, last in self.later(names, since).items():
            raise _lost(student, int(last[:6]))

    def later(self, names: dict[str, str], since: int = 0) -> dict[str, str]:
        """The later writer of each of these students that has one.

        Args:
            names: who is the writer of each, as `take_over` said.
            since: nothing of earlier attempts counts.
        """
        now = self.students(since, names)
        found = {student: standing.writer for student, standing in now.items() if student in names}
        return {student: last for student, last in found.items() if last is not None and last > names[student]}

    def put(self, student: str, writer: str, name: str, data: bytes) -> None:
        """Put a file of a student, whole, under the name of its writer; one of these names only once."""
        key = f"{STUDENTS}/{student}/{writer}/{name}"
        failpoint("run.before_put")
        # Nobody else has this name, so what is there already is a put of our own whose answer was lost.
        if len(data) <= _MOST_CREATED:
            self.root.put_new(key, data)
        else:
            self.root.put(key, data)

    # ---- what one object holds

    def bundle(self, job: str, files: dict[str, str]) -> None:
        """Replace what lies of a cohort for whoever watches.

        Args:
            files: their text, by their paths in a run's folder.
        """
        self.root.put(f"{CONTROL}/{job}{BUNDLE}", packed(files))

    def bundled(self, job: str) -> dict[str, str]:
        """What `bundle` was given last; nothing where there is none.

        Raises:
            DamagedError: it is something else.
        """
        key = f"{CONTROL}/{job}{BUNDLE}"
        try:
            return unpacked(self.root.document(key), self.root.path_of(key))
        except ObjectMissing:
            return {}


def in_parallel(act: Callable[[Given], Made], given: Iterable[Given], at_once: int = AT_ONCE) -> list[Made]:
    """What a function makes of each, many at a time; the first error ends it."""
    given = list(given)
    if len(given) < 2:
        return [act(one) for one in given]
    with ThreadPoolExecutor(min(at_once, len(given))) as pool:
        return list(pool.map(act, given))


def packed(files: dict[str, str]) -> bytes:
    """Texts by path as one object; the same ones give the same bytes."""
    # In ASCII: names of files that are no UTF-8 reach a log as lone surrogates.
    return gzip.compress(json.dumps({"files": files}, sort_keys=True).encode(), compresslevel=3, mtime=0)


def unpacked(data: bytes, where: str) -> dict[str, str]:
    """What `packed` was given.

    Raises:
        DamagedError: it is something else, unpacks to more than a document has, or names a path that no bundle has.
    """
    try:
        unpacker = zlib.decompressobj(wbits=31)
        text = unpacker.decompress(data, MOST_DOCUMENT)
        if not unpacker.eof:
            raise ValueError("more than a document has, or cut short")
        files: Any = parse_json(text)["files"]
        wrong = [path for path, text in files.items() if not _MEMBER.fullmatch(path) or not isinstance(text, str)]
        if wrong:
            raise ValueError(f"{wrong[0]!r}, which no cohort writes")
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{where} is damaged",
            got=error,
            expected="the progress, metrics and logs of a cohort",
            next="remove that object: it is only looked at, and a cohort that runs puts it again",
        ) from error
    return dict(files)


def impossible_mark(where: str, got: str) -> DamagedError:
    """A mark in a run's folder `control` that no command of ours puts there."""
    return DamagedError(
        f"{where} is damaged",
        got=got,
        expected=f"marks that akd-dist puts, one attempt after the other, {MOST_ATTEMPTS:,} at most",
        next="remove that object, then run the same command again",
    )


def _lost(student: str, attempt: int) -> HeldError:
    return HeldError(
        f"the student {student} was taken over by a later worker",
        got=f"attempt {attempt}",
        expected="one worker for each student",
        next="let the later one go on: what this one puts from now on does not count",
    )
