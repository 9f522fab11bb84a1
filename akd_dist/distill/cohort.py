"""A cohort: students that share a stream, set up in one process and trained in lockstep.

`train_cohort` is what a Ray Train worker runs, and what a plain loop calls without Ray.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from akd_dist import recipe
from akd_dist.base.errors import CorruptCacheError, HeldError, MachineError, RefusedError
from akd_dist.base.fence import FencedWriter, take_over
from akd_dist.base.files import failpoint
from akd_dist.base.locks import file_lock
from akd_dist.base.memory import keep_freed_memory
from akd_dist.base.tracebacks import in_full
from akd_dist.data.row_fetch import rows_for
from akd_dist.data.rows import Rows, Splits
from akd_dist.distill.batch_targets import Decoder, TeacherTargets
from akd_dist.distill.checkpoint import checkpoints, drop_doubtful, rests_on
from akd_dist.distill.delivery import fail_from_outside, write_metrics, write_note
from akd_dist.distill.job import CohortJob, ended, read_result
from akd_dist.distill.language_metrics import Known, bytes_of_tokens
from akd_dist.distill.lockstep import Lockstep
from akd_dist.distill.metrics import predictions
from akd_dist.distill.publisher import Publisher
from akd_dist.distill.ranks import Ranks, reason_of
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import Student
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic
from akd_dist.storage.content import Guard, renewing
from akd_dist.storage.decoded import StoredLogits
from akd_dist.storage.holder import Moving
from akd_dist.storage.layout import TARGETS_FORMAT
from akd_dist.storage.mean import AnyStore, open_logits
from akd_dist.storage.reader import LogitStore, open_store

VOUCHED = "vouched"
"""In the cache root: what was read, let go and found right."""


def train_cohort(job: CohortJob, ranks: Ranks | None = None) -> dict[str, Any]:
    """Train the students of a cohort from wherever each of them stands.

    Returns:
        {"stopped": bool, "students": [a fleet.json entry of each student that has ended]}.

    Raises:
        RefusedError: the data of this node is not that of the driver, or a probe view's pixels differ.
        DamagedError: a store is damaged; no student has taken a step. Or what is prepared and decoded on this node was
            found corrupt again and again.
        HeldError: a later worker has taken a student over; nothing was written since.
        MachineError: a run in object storage could not be written for a while; this node keeps what it trained.
    """
    keep_freed_memory()
    device, workers = set_deterministic(job.device, job.students[0].threads), ranks or Ranks()
    job = job.on_node()

    def train() -> dict[str, Any]:
        splits = rows_for(job.data, Path(job.cache_root), job.fingerprints, job.rows)
        check_fingerprints(job.fingerprints, splits)
        return train_on(job, splits, device, workers)

    return renewing(train, job.tell_renewed)


def train_on(job: CohortJob, splits: Splits, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """`train_cohort` on rows that are at hand, in a process in which `set_deterministic` was called.

    Raises:
        CorruptCacheError: they, or the decoded logits, are not what was written; they are to be prepared anew.
    """
    stream, teacher_said = open_stream(job, splits)
    known = known_of_language(job, splits)
    vouched = Path(job.cache_root) / VOUCHED
    with Guard(splits.contents(), vouched) as guard, contextlib.ExitStack() as locks:
        for one in (*stream.moving, *known.stored.values()):
            one.watch(guard)
            locks.callback(one.close)
        publisher = Publisher(job) if job.run_uri is not None else None
        if publisher is not None and ranks.rank == 0:
            publisher.bring_results()
        writers = claim_students(job, locks) if ranks.rank == 0 else {}
        if publisher is not None and ranks.rank == 0:
            publisher.claim(writers)
            locks.enter_context(publisher)
        ranks.any(False)  # nobody reads a checkpoint before rank 0 is the only one to write
        if publisher is not None and ranks.rank > 0:
            publisher.join()
        marks = known_of(job, writers, (*stream.moving, *known.stored.values()), guard, ranks)
        for name, writer in writers.items():
            drop_doubtful(Path(job.root) / name / "checkpoints", writer, marks)
        opening = ranks, device
        opened = [
            open_student(job, spec, splits.train, *opening, writers.get(spec.name), known) for spec in job.students
        ]
        students = [student for student in opened if student is not None]
        lockstep = Lockstep(job, ranks, students, stream, splits, teacher_said, guard)
        failpoint("cohort.before_first_step")
        try:
            stopped = lockstep.run()
        except CorruptCacheError:
            for name, writer in writers.items():
                drop_doubtful(Path(job.root) / name / "checkpoints", writer)
            raise
    return {"stopped": stopped, "students": [result for spec in job.students if (result := read_result(job, spec))]}


def known_of(
    job: CohortJob, writers: Collection[str], moving: Collection[Moving], guard: Guard, ranks: Ranks
) -> Collection[str]:
    """The marks of files that checkpoints may rest on: those that this process and its peers have mapped, and those of
    views and windows behind, which are hashed once more as far as they are there.

    Args:
        writers: the students that have not ended, on rank 0.
    """
    # Of all ranks, since each node trains on files of its own, and each shares in every weight.
    folders = [Path(job.root) / name / "checkpoints" for name in writers]
    marks = {mark for folder in folders for path in checkpoints(folder) for mark in rests_on(path)}
    wanted = set(ranks.from_first(" ".join(sorted(marks))).split()) - set(guard.marks)
    known = guard.remembers(wanted)
    for held in [held for one in moving for held in one.resting(wanted - known)]:
        guard.add(held.content)
        guard.leave(held.content)
    return " ".join(ranks.from_all(" ".join([*guard.marks, *known]))).split()


def claim_students(job: CohortJob, locks: contextlib.ExitStack) -> dict[str, FencedWriter]:
    """Become the writer of each student that has not ended: once its earlier worker has left, or by shutting it out.

    Raises:
        HeldError: a later attempt has one of them.
    """
    writers, until = {}, time.monotonic() + job.patience
    for spec in job.students:
        if not ended(job, spec):
            folder, what = Path(job.root) / spec.name / "checkpoints", f"the student {spec.name}"
            wait_for_lock(folder / "lock", what, until, locks)
            writers[spec.name] = take_over(folder, job.attempt, what)
    return writers


def wait_for_lock(lock: Path, what: str, until: float, locks: contextlib.ExitStack) -> None:
    """Give whoever holds a student's lock until then, by the monotonic clock, to checkpoint and leave."""
    with contextlib.suppress(HeldError):  # it does not answer: stopped, or cut off
        locks.enter_context(file_lock(lock, what=what, wait=max(0.0, until - time.monotonic())))


def check_fingerprints(fingerprints: Mapping[str, str], splits: Splits) -> None:
    """Refuse to train on rows other than those the driver planned with, by the fingerprint of each split."""
    for split, expected in fingerprints.items():
        rows: Rows = getattr(splits, split)
        if rows.fingerprint != expected:
            raise RefusedError(
                f"the {split} rows on this node are not those of the driver",
                got=f"fingerprint {rows.fingerprint[:16]}",
                expected=f"fingerprint {expected[:16]}",
                next="make the same files visible on every node",
            )


def open_stream(
    job: CohortJob, splits: Splits, store_of: Callable[[str], LogitStore] = open_store
) -> tuple[BatchStream, np.ndarray | None]:
    """The cohort's stream, and what the teacher says of each test row, as `stored_predictions`: both from stores. None
    for what has no store.

    Args:
        store_of: gives the store at a URI; whoever has it open already gives that.
    """
    logits: StoredLogits | TeacherTargets | None = None
    teacher_said, data, first = None, job.data, job.students[0]
    if job.stores:
        train = open_logits(job.stores["train"], store_of)
        test = job.stores.get("test") if job.teacher_test is None else job.teacher_test
        if test and data.task != "language_model":  # each language model is compared with it target by target
            teacher_said = stored_predictions(open_logits(test, store_of), splits.test).numpy()
        # No more views than there are epochs that could read them.
        views = min(data.views, max(spec.objective.epochs for spec in job.students)) or 1
        reading: dict[str, Any] = {
            "beside": splits.held_bytes,
            "windowed": data.window is not None,
            "beside_windows": splits.train.moving is not None,
        }
        if isinstance(train, LogitStore) and train.manifest.identity.format >= TARGETS_FORMAT:
            check_targets(train, splits.train)
            logits = TeacherTargets(train, Path(job.cache_root), views, device=job.device, **reading)
        else:
            logits = StoredLogits(train, Path(job.cache_root), views, **reading)
    stream = BatchStream(
        splits.train,
        logits,
        data.augmentation,
        seed=data.seed,
        views=data.views,
        batch=first.batch,
        last_batch=first.last_batch,
        window=data.window,
        device=job.device,
        epoch_steps=first.epoch_steps,
    )
    if job.stores:
        # Another version of a library may change pixels, and nothing that is recorded shows it but the pixels
        # themselves.
        for manifest in train.manifests:
            stream.check_probes(manifest, Path(job.cache_root))
    return stream, teacher_said


def check_targets(store: LogitStore, rows: Rows) -> None:
    """Refuse a store whose rows have other numbers of targets than these rows have.

    Raises:
        RefusedError: it is so; tells both.
    """
    if store.layout.rows != rows.targets or store.classes != rows.classes:
        raise RefusedError(
            f"the store {store.uri} has other targets than these rows",
            got=f"{store.layout.rows:,} targets of {store.classes:,} logits",
            expected=f"{rows.targets:,} targets of {rows.classes:,} logits",
            next="cache the teacher for this recipe: akd-dist cache-teacher",
        )


def known_of_language(job: CohortJob, splits: Splits, store_of: Callable[[str], LogitStore] = open_store) -> Known:
    """What the cohort's language models are measured by; nothing for others.

    The teacher is that of `teacher_test` on the test rows, and whom they learn from on the validation rows.
    """
    if job.data.task != "language_model":
        return Known()
    refs = {split: job.stores.get(split) for split in ("validation", "test")}
    refs["test"] = refs["test"] if job.teacher_test is None else job.teacher_test
    stored = {}
    for split, ref in refs.items():
        store = open_logits(ref, store_of) if ref else None
        if isinstance(store, LogitStore):
            rows: Rows = getattr(splits, split)
            rows.check_same(store.manifest.dataset)
            check_targets(store, rows)
            stored[rows.fingerprint] = TeacherTargets(store, Path(job.cache_root), device=job.device)
    return Known(stored, bytes_of_tokens(job.data.text, splits.train))


def stored_predictions(store: AnyStore, rows: Rows) -> torch.Tensor:
    """What the teacher says of each row of a store without augmentation, as `metrics.predictions`; shard by shard."""
    if isinstance(store, LogitStore) and store.manifest.identity.is_top_k:
        decoder, found = Decoder.of(store, "cpu"), []
        for shard in (shard for shard in store.layout.shards() if shard.view == 0):
            arrays = store.targets(0, shard.start, shard.stop)
            found.append(decoder.targets({name: torch.from_numpy(array) for name, array in arrays.items()}).choice)
        return torch.cat(found)
    shards = (shard for shard in store.layout.shards() if shard.view == 0)
    blocks = (torch.from_numpy(store.rows(0, shard.start, shard.stop)) for shard in shards)
    return torch.cat([predictions(rows.task, block) for block in blocks])


def open_student(
    job: CohortJob,
    spec: recipe.StudentSpec,
    rows: Rows,
    ranks: Ranks,
    device: torch.device,
    writer: FencedWriter | None = None,
    known: Known | None = None,
) -> Student | None:
    """The student at its newest checkpoint; None if it has ended before, or ends here because it cannot be set up."""
    if ended(job, spec):
        return None
    folder, log = Path(job.root) / spec.name, job.log_of(spec.name, ranks.rank)
    try:
        with ranks.agree():
            card = ModelCard.of(spec.model, rows, job.data.normalize, job.data.image)
        student = Student(
            spec,
            card,
            folder,
            attempt=job.attempt,
            ranks=ranks,
            writer=writer,
            metric=job.data.primary_metric,
            own_metric=job.data.own_metric,
            device=device,
            together=spec.name in job.stacks,
            known=known,
        )
        resumed = student.resume(lambda text: write_note(log, text))
        write_metrics(student)  # without the epochs after the checkpoint: they are trained again
        if resumed:
            write_note(log, f"resumed at epoch {student.epoch}, step {student.step}")
    # A full disk or a later worker is no fault of the student, which must not be told to have failed by it.
    except (MachineError, HeldError):
        raise
    except (Exception, SystemExit) as error:
        ranks.check_agreed(error, spec.name)
        write_note(log, in_full(error))
        if ranks.rank == 0:
            fail_from_outside(spec, folder, reason_of(error), job.attempt, writer or FencedWriter())
        return None
    return student
