"""Stage I, trained once and found again by content: what a student has at its end lies under the store root.

    <store root>/stages/<id>.ckpt       weights and epochs, as `checkpoint` spells them; created once, never overwritten
    <store root>/stages/<id>/uses/      who has taken it: a record for each run and day, for `stores gc`

The id is a hash of all that stage I depends on, so any student whose stage I would have been the same starts with stage
II, in this run or another, with the weights that it would have had alone. What cannot be read or written is done
without: stage I is then trained.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from akd_dist.base.errors import AkdError, DamagedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.distill.checkpoint import decode, encode
from akd_dist.distill.job import CohortJob
from akd_dist.distill.student import Student
from akd_dist.models.build import by_content
from akd_dist.models.device import device_name
from akd_dist.recipe import Custom, CustomAugmentation, StudentSpec, forget_later_keys
from akd_dist.storage.layout import STAGES
from akd_dist.storage.mean import placeless
from akd_dist.storage.objects import ObjectRoot
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import note_use

FORMAT = 1
"""Raised when what a stage I comes to changes with the code."""
_SOURCES = {"train", "validation", "test", "unlabelled"}
"""Of the data's description: sources are known by their content."""
_LIBRARIES = {"huggingface": ("transformers",), "huggingface_lm": ("transformers",), "timm": ("timm",)}
"""Whose code a model of a kind runs, beside torch."""

Tell = Callable[[str], None]


def stage1_key(job: CohortJob, spec: StudentSpec) -> str | None:
    """The name of a student's stage I under the store root; None where it has none that anybody could share.

    That is so for a model, a metric or an augmentation of the user's own: what their code imports and reads is not
    known.

    Args:
        job: what it trains from; of a driver without a GPU that would be needed, the name is not known.

    Raises:
        AkdError: its model cannot be imported, or this process has not the device.
    """
    if spec.stage1 is None or "train" not in job.stores:
        return None
    own = isinstance(spec.model, Custom) or isinstance(job.data.augmentation, CustomAugmentation)
    if own or job.data.own_metric is not None:
        return None
    stage1 = json.loads(spec.stage1) | {"model": by_content(spec.model)}
    forget_later_keys(stage1)
    if spec.name in job.stacks:  # those of steps alone are called as ever
        stage1["stacked"] = True
    libraries = ("torch", *_LIBRARIES.get(spec.model.kind, ()))
    document = {
        "format": FORMAT,
        "stage1": stage1,
        "data": job.data.model_dump(mode="json", exclude=_SOURCES),
        "rows": {split: job.fingerprints[split] for split in ("train", "validation")},
        "logits": placeless(job.stores["train"]),
        "device": device_name(job.device),
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "versions": {name: version(name) for name in libraries},
    }
    return f"{STAGES}/{sha256(canonical_json(document))}.ckpt"


def stages1_there(job: CohortJob, specs: list[StudentSpec]) -> dict[str, str]:
    """Which of these students could begin with stage II -> the name of their stage I, as far as that can be seen."""
    if job.stages is None or not any(spec.stage1 for spec in specs):
        return {}
    try:
        there = set(open_root(job.stages).list(STAGES))
        keys = {spec.name: stage1_key(job, spec) for spec in specs}
    except AkdError:
        return {}
    return {name: key for name, key in keys.items() if key in there and key is not None}


def publish_stage1(student: Student, job: CohortJob, tell: Tell) -> None:
    """Leave a student's stage I for others, at the moment when it enters stage II; rank 0 does.

    Args:
        tell: told why it could not be left; training goes on.
    """
    if job.stages is None or student.ranks.rank != 0:
        return
    try:
        key, root = stage1_key(job, student.spec), open_root(job.stages)
        if key is None or root.exists(key):
            return
        tree = {
            "key": key,
            "run": job.run_name,
            "student": student.spec.name,
            "history": student.history,
            "weights": student.module.state_dict(),
        }
        root.put_new(key, encode(tree))
    except (AkdError, OSError) as error:
        tell(f"its stage I is not shared: {error}")


def take_stage1(student: Student, job: CohortJob, tell: Tell) -> bool:
    """Have a student that has not begun enter stage II with a stage I that was trained before; whether there is one.

    Every rank calls it; rank 0 looks, and gives the others what it found.

    Args:
        tell: told whose it is; or why it cannot be taken, and is trained.
    """
    if job.stages is None or not student.not_started or student.stage1 is None:
        return False
    found: dict[str, Any] | None = None
    if student.ranks.rank == 0:
        try:
            found = _found(student, job)
        except (AkdError, OSError) as error:
            tell(f"its stage I is trained: {error}")
    said = student.ranks.from_first(found and {key: found[key] for key in ("run", "student", "history")})
    if said is None:
        return False
    whose = said["student"] if said["run"] == job.run_name else f"{said['run']}/{said['student']}"
    student.enter_stage2(whose, said["history"], found["weights"] if found else student.module.state_dict())
    if found is not None:
        run = Path(job.root).parent.absolute()
        lock = run / "lock" if job.run_uri is None else None
        taken = open_root(str(job.stages)).child(str(found["key"]).removesuffix(".ckpt"))
        note_use(taken, run=job.run_uri or str(run), lock=lock)
    tell(f"goes on from the stage I of {whose}, which is the same")
    return True


def _found(student: Student, job: CohortJob) -> dict[str, Any] | None:
    """What lies there of a student's stage I; what is damaged is removed, so that it is left anew.

    Raises:
        DamagedError: it is not what was left.
        MachineError: it cannot be read.
    """
    key = stage1_key(job, student.spec)
    root: ObjectRoot = open_root(str(job.stages))
    if key is None or not root.exists(key):
        return None
    try:
        tree = decode(root.get(key), f"{root.uri}/{key}")
        _check(tree, key, student)
    except DamagedError:
        root.delete(key)
        raise
    checked: dict[str, Any] = tree
    return checked


def _check(tree: Any, key: str, student: Student) -> None:
    """Refuse what is whole, and of something else.

    Raises:
        DamagedError: so it is.
    """
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in student.module.state_dict().items()}
    try:
        fits = tree["key"] == key and len(tree["history"]) == student.stages[0].epochs
        fits &= {name: (tensor.shape, tensor.dtype) for name, tensor in tree["weights"].items()} == shapes
        fits &= all(isinstance(tree[name], str) for name in ("run", "student"))
    except (TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise DamagedError(f"what lies at {key} is no stage I of {student.spec.name}", expected="what was left there")


def stage1_leader(student: Student, students: Iterable[Student]) -> Student | None:
    """The student that trains stage I for one that has not begun: of those with the same stage I, the furthest.

    Args:
        students: those of its cohort that have not ended, itself among them.

    Returns:
        None if it trains its own stage I.
    """
    if student.stage1 is None or not student.not_started:
        return None
    alike = [other for other in students if other.stage_index == 0 and other.stage1 == student.stage1]
    first = max(alike, key=lambda other: (other.epoch, other.step))  # of equals the first one
    return None if first is student else first
