"""Students whose run lies in object storage: killed, resumed elsewhere, suspended, cut off. Without Ray.

Each worker has a cache of its own, as on a node of its own; what they share is a bucket.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from akd_dist.base import files
from akd_dist.base.errors import AkdError, HeldError, MachineError
from akd_dist.data.row_cache import prepare
from akd_dist.distill import checkpoint, publisher
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.delivery import write_note
from akd_dist.distill.job import CohortJob
from akd_dist.distill.publisher import Publisher, publishing_logs
from akd_dist.distill.ranks import joined
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.train_students import train_in_process
from akd_dist.storage.run_copy import MODEL, REPORTED, RunCopy, scratch
from akd_dist.storage.run_objects import RunObjects
from akd_dist.storage.s3 import S3Root
from tests.fleets import weights
from tests.survivors import FORKS, STEPS, Place, outcome, stands_still, steps_folder, steps_taken, train

STUDENTS = ("annealing", "hard")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("storage"))
    place.recipe = place.recipe.model_copy(
        update={"students": [spec for spec in place.recipe.students if spec.name in STUDENTS]}
    )
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> dict[str, Any]:
    run = place.root / "undisturbed"
    assert place.train(place.job(run)) == 0
    return outcome(run)


class Elsewhere:
    """A run in a bucket, and nodes that train it."""

    def __init__(self, place: Place, uri: str) -> None:
        self.place, self.uri, self.run = place, uri, RunObjects.at(uri)

    def job(self, node: str, attempt: int = 1, **changes: Any) -> CohortJob:
        """A cohort of all students, for a node."""
        cache = self.place.root / node
        if not cache.exists():  # its rows and logits are those of the first node: to prepare them is no part of this
            shutil.copytree(self.place.cache_root, cache, ignore=shutil.ignore_patterns("runs"))
        splits = prepare(self.place.recipe.data, cache)
        folder = scratch(cache, self.uri, "driver")
        job = fleet_job(self.place.recipe, splits, self.place.stores, folder, str(cache))
        changed: dict[str, Any] = {"name": f"cohort-{attempt}-0", "attempt": attempt, "patience": 0.2, **changes}
        return replace(job, run_uri=self.uri, **changed)

    def start(self, job: CohortJob, failpoint: str | None = None) -> Any:
        """Train in a process of its own that dies, or is suspended, at a failpoint; it puts each checkpoint at once."""
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        process = FORKS.Process(target=train_there, args=(job, failpoint, environment))
        process.start()
        return process

    def train(self, job: CohortJob, failpoint: str | None = None) -> int | None:
        process = self.start(job, failpoint)
        process.join(900)
        code: int | None = process.exitcode
        return code

    def outcome(self) -> dict[str, Any]:
        """As `survivors.outcome`, of what counts."""
        copy = RunCopy(self.uri, self.place.root / "read" / re.sub(r"\W", "-", self.uri))
        copy.refresh(MODEL | REPORTED)
        return outcome(copy.folder)


def train_there(job: CohortJob, failpoint: str | None, environment: dict[str, str]) -> None:
    """What a forked process runs."""
    os.environ |= environment
    with at_once():
        train(job, failpoint)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Each checkpoint is put when it has been written, by the thread that trains: in the same order every time."""
    found: list[Publisher] = []
    reach = files.failpoint

    def saved(site: str) -> None:
        reach(site)
        if site == "checkpoint.after_save":
            found[-1]._round()

    with pytest.MonkeyPatch.context() as patch:
        bring = Publisher.bring_results

        def noted(self: Publisher) -> None:
            found.append(self)
            bring(self)

        patch.setattr(Publisher, "bring_results", noted)
        patch.setattr(Publisher, "_keep_on", lambda self: None)
        patch.setattr(publisher, "PUT_SECONDS", 0.0)
        patch.setattr(checkpoint, "failpoint", saved)
        yield


@pytest.fixture
def there(place: Place, bucket: str, request: pytest.FixtureRequest) -> Elsewhere:
    return Elsewhere(place, f"{bucket}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}/digits")


def test_the_weights_are_those_of_a_local_run(place: Place, there: Elsewhere, undisturbed: dict[str, Any]) -> None:
    results = train_in_process(place.recipe, place.stores, run=there.uri, cache_root=str(place.cache_root))
    assert {name: result["state"] for name, result in results.items()} == dict.fromkeys(STUDENTS, "done")
    assert there.outcome() == undisturbed
    assert there.run.control().last == 1
    # A second command finds them done.
    taken = there.run.root.list("students")
    train_in_process(place.recipe, place.stores, run=there.uri, cache_root=str(place.cache_root))
    assert there.run.root.list("students") == taken
    told = {path for job in there.run.control().bundles() for path in there.run.bundled(job)}
    assert {f"logs/{name}.log" for name in STUDENTS} <= told


KILL_POINTS = ["run.before_put:2", "publisher.before_checkpoint:3", "publisher.before_left:4", "cohort.after_batch:14"]
MORE_KILL_POINTS = [
    *(
        "run.before_takeover:1",
        "cohort.before_first_step:1",
        "checkpoint.before_save:2",
        "publisher.after_checkpoint:1",
    ),
    *("publisher.after_checkpoint:3", "publisher.before_left:1", "publisher.before_left:9", "student.after_result:2"),
]
SLOW_KILL_POINTS = [pytest.param(point, marks=pytest.mark.slow) for point in MORE_KILL_POINTS]


@pytest.mark.parametrize("failpoint", [*KILL_POINTS, *SLOW_KILL_POINTS])
def test_killed_on_one_node_it_ends_on_another(there: Elsewhere, undisturbed: dict[str, Any], failpoint: str) -> None:
    assert there.train(there.job("one"), failpoint) == -signal.SIGKILL
    assert there.train(there.job("two", attempt=2)) == 0
    assert there.outcome() == undisturbed
    kept = [key for key in there.run.root.list("students") if key.endswith(".ckpt")]
    assert max(Counter(key.split("/")[1] for key in kept).values()) <= 2


@pytest.mark.slow
def test_killed_again_and_again_from_node_to_node(there: Elsewhere, undisturbed: dict[str, Any]) -> None:
    for attempt, batch in enumerate((12, 5, 11, 9), start=1):
        node = "one" if attempt % 2 else "two"
        there.train(there.job(node, attempt, checkpoint_seconds=0.01), f"cohort.after_batch:{batch}")
    assert there.train(there.job("three", attempt=9)) == 0
    assert there.outcome() == undisturbed


# The first is a worker that Ray has started again.
@pytest.mark.parametrize(
    ("attempt", "failpoint"), [(1, "publisher.before_left:5"), (2, "publisher.before_checkpoint:2")]
)
def test_what_a_late_worker_puts_counts_for_nobody(
    there: Elsewhere, undisturbed: dict[str, Any], attempt: int, failpoint: str
) -> None:
    early = there.start(there.job("one"), f"{failpoint}:STOP")
    worker = psutil.Process(early.pid)
    try:
        while not stands_still(worker):
            assert early.is_alive()
            time.sleep(0.02)
        assert there.train(there.job("two", attempt=attempt)) == 0
        assert there.outcome() == undisturbed
        before = there.run.root.list("students")
        worker.send_signal(signal.SIGCONT)
        early.join(900)
        assert early.exitcode == HeldError.code
    finally:
        early.kill()
        early.join()
    after = there.run.root.list("students")
    late = [key for key in after if key not in before]
    assert late, "it was about to put something, and did, before it found that it was late"
    counting = there.run.students()
    assert not [key for key in late if key.split("/")[2] == counting[key.split("/")[1]].writer]
    assert {key: after[key] for key in before} == before
    assert there.outcome() == undisturbed


def test_an_attempt_that_comes_late_is_sent_away(there: Elsewhere) -> None:
    assert there.train(there.job("one", attempt=2), "cohort.after_batch:20") == -signal.SIGKILL
    before = there.run.root.list("students")
    with pytest.raises(HeldError, match="taken over by a later worker"):
        train_cohort(there.job("two", attempt=1))
    assert there.run.root.list("students") == before


def test_a_stop_mark_stops_it(there: Elsewhere, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    job = there.job("one")
    there.run.stop(1)
    assert train_cohort(job)["stopped"]
    assert all(standing.checkpoints for standing in there.run.students().values())
    assert there.train(there.job("two", attempt=2)) == 0
    assert there.outcome() == undisturbed


class CutOff:
    """A network that is cut after so many requests; how many came through, by what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int | None = None) -> None:
        self.asked = Counter[str]()
        self.cut = False
        ask = S3Root._ask

        def asking(root: S3Root, verb: str, key: str, *given: Any, **more: Any) -> Any:
            self.cut = self.cut or (after is not None and self.asked.total() >= after)
            if self.cut:
                raise MachineError(f"cannot {verb} {key}", got="no answer", expected="an answer")
            kind = (
                "bundle" if key.endswith(".gz") else "checkpoint" if key.endswith(".ckpt") else key.rpartition("/")[2]
            )
            self.asked[f"{verb} {kind}"] += 1
            return ask(root, verb, key, *given, **more)

        monkeypatch.setattr(S3Root, "_ask", asking)


def test_a_network_that_stays_cut_ends_it_and_nothing_is_lost(
    there: Elsewhere, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = there.job("one")
    monkeypatch.setenv(STEPS, str(steps_folder(job)))
    monkeypatch.setattr(publisher, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(publisher, "LOOK_SECONDS", 0.01)
    with monkeypatch.context() as patch:
        CutOff(patch, after=16)
        with pytest.raises(MachineError, match="could not be written for") as caught:
            train_cohort(job)
    assert "the same command goes on" in str(caught.value)
    assert str(scratch(job.cache_root, there.uri, "worker")) in str(caught.value)
    taken = steps_taken(job)
    # The node has all of it: what was trained there is published, and not trained again.
    train_cohort(replace(job, attempt=2, name="cohort-2-0"))
    assert there.outcome() == undisturbed
    assert all(taken.values())
    assert steps_taken(job) == steps_taken(there.place.job(there.place.root / "undisturbed"))


def test_a_network_that_was_cut_for_a_while_is_borne_with(
    there: Elsewhere, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "LOOK_SECONDS", 0.01)
    network = CutOff(monkeypatch, after=16)
    bear, borne = Publisher._bear, list[AkdError | OSError]()

    def mended(self: Publisher, error: AkdError | OSError) -> None:
        bear(self, error)
        borne.append(error)
        if len(borne) == 3:
            monkeypatch.undo()

    monkeypatch.setattr(Publisher, "_bear", mended)
    assert not train_cohort(there.job("one"))["stopped"]
    assert network.cut
    assert len(borne) == 3
    assert there.outcome() == undisturbed


def test_how_often_the_storage_is_asked(there: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a checkpoint a student and a bundle in PUT_SECONDS; and a last bundle at the end."""
    job, network = there.job("one"), CutOff(monkeypatch)
    began = time.monotonic()
    train_cohort(job)
    rounds, students = 1 + (time.monotonic() - began) // publisher.PUT_SECONDS, len(STUDENTS)
    asked = network.asked
    assert asked["write writer.json"] == students
    assert asked["write checkpoint"] <= rounds * students
    assert 1 <= asked["write bundle"] <= rounds + 1
    assert asked["read stop-1"] <= rounds
    left = sum(asked[f"write {name}"] for name in publisher.LEFT)
    assert left == len(publisher.LEFT) * students
    assert sum(count for kind, count in asked.items() if kind.startswith("read")) <= 2 + rounds + students
    # Four before the first step: what has ended, who writes, whether somebody is later, and what to resume from. Then
    # one before something is put, in each round and as each student ends, and one at the end: is somebody later by now?
    listings = sum(count for kind, count in asked.items() if kind.startswith("list"))
    assert listings <= 1 + (4 + rounds + students + 1) * students


def test_the_folder_of_another_run_is_not_taken_for_this_one(there: Elsewhere, undisturbed: dict[str, Any]) -> None:
    """It was started over: what this node keeps of before counts no more."""
    job = there.job("one")
    assert there.train(job, "cohort.after_batch:20") == -signal.SIGKILL
    kept = scratch(job.cache_root, there.uri, "worker") / "students" / "hard"
    for path in kept.glob("checkpoints/*.ckpt"):
        path.write_bytes(b"another student's")
    (kept / "model.json").write_text("another student's")
    there.run.start_over([])
    assert there.train(there.job("one", attempt=2)) == 0
    assert there.outcome() == undisturbed


def train_rank(job: CohortJob, rank: int, meeting: Path, failpoint: str | None, environment: dict[str, str]) -> None:
    """What a forked process runs that is one of two workers of a cohort."""
    os.environ |= environment | ({"AKD_FAILPOINT": failpoint} if failpoint else {})

    def broadcast(value: Any) -> Any:
        if rank == 0:
            files.replace(meeting, json.dumps(value).encode())
        while not meeting.exists():
            time.sleep(0.02)
        return json.loads(meeting.read_bytes())

    with at_once(), joined(rank, 2, "cpu", "127.0.0.1", broadcast) as ranks:
        train_cohort(job, ranks)


@pytest.mark.slow
def test_the_workers_of_a_cohort_share_nothing_but_the_bucket(place: Place, bucket: str, tmp_path: Path) -> None:
    """One was killed in its second epoch, and the cohort goes on on other nodes: the weights are the same."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    specs = tuple(spec.model_copy(update={"workers": 2}) for spec in place.recipe.students)

    def train_two(there: Elsewhere, attempt: int, nodes: tuple[str, str], failpoint: str | None = None) -> Any:
        meeting = tmp_path / f"{there.uri.rpartition('/')[2]}-{attempt}"
        jobs = [there.job(node, attempt, students=specs) for node in nodes]
        told = [(job, rank, meeting, failpoint if rank == 0 else None) for rank, job in enumerate(jobs)]
        ranks = [FORKS.Process(target=train_rank, args=(*one, environment)) for one in told]
        for process in ranks:
            process.start()
        ranks[0].join(900)
        if ranks[0].exitcode != 0:
            ranks[1].kill()  # as Ray does with the workers that are left
        ranks[1].join(900)
        return [process.exitcode for process in ranks]

    whole, cut = (Elsewhere(place, f"{bucket}/two/{name}") for name in ("whole", "cut"))
    assert train_two(whole, 1, ("one", "two")) == [0, 0]
    assert train_two(cut, 1, ("one", "two"), "cohort.after_batch:14")[0] == -signal.SIGKILL
    assert train_two(cut, 2, ("three", "one")) == [0, 0]
    assert cut.outcome() == whole.outcome()
    assert len(cut.outcome()) == len(STUDENTS)


def test_the_logs_of_other_workers_are_put_when_they_leave(there: Elsewhere, tmp_path: Path) -> None:
    job = there.job("one")
    student = job.students[0].name
    for said in ("out of luck", "once more"):  # Ray starts the workers of a cohort again
        with contextlib.suppress(RuntimeError), publishing_logs(job, 1):
            write_note(job.log_of(student, 1), said)
            raise RuntimeError
    with publishing_logs(job, 2):  # has nothing to tell
        pass
    assert [key for key in RunObjects.at(there.uri).control().others if ".rank" in key] == [
        f"control/{job.name}.rank1.json.gz"
    ]
    copy = RunCopy(there.uri, tmp_path / "copy")
    copy.refresh_control()
    told = (copy.folder / f"logs/{student}.rank1.log").read_text()
    assert re.findall("[a-z][a-z ]+", told) == ["out of luck", "once more"]


def test_no_credential_is_left_anywhere(there: Elsewhere) -> None:
    assert there.train(there.job("one"), "cohort.after_batch:12") == -signal.SIGKILL
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    folder = scratch(there.place.root / "one", there.uri, "worker")
    assert not [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
    told = "".join(text for job in there.run.control().bundles() for text in there.run.bundled(job).values())
    assert secret.decode() not in told
    assert weights(folder) is not None
