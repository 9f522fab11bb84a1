"""The losses of a stack: of students that see one batch, those of one formula computed together."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from akd_dist.distill.losses import Number, at_least_float32
from akd_dist.distill.objectives import Stage


@dataclass(frozen=True)
class Alike:
    """Students of a stack whose losses are one formula, in an epoch."""

    members: list[int]
    """Their places in the stack."""
    stage: Stage
    """The stage of the first."""
    epoch: int
    """Its 0-based epoch in that stage."""
    numbers: dict[str, Number]
    """Those of the formula, [students, 1] each."""


def alike(standing: Sequence[tuple[Stage, int]], like: Tensor) -> list[Alike]:
    """The students of a stack, by the formulas of their losses; those with an objective of the user's own one by one.

    Args:
        standing: the stage of each student, and its 0-based epoch in that.
        like: of the dtype, and on the device, of losses.
    """
    found: dict[Hashable, list[int]] = defaultdict(list)
    for index, (stage, _) in enumerate(standing):
        found[index if stage.alike is None else stage.alike].append(index)
    parts = []
    for members in found.values():
        each = [standing[index][0].numbers(standing[index][1]) for index in members]
        numbers: dict[str, Number] = {name: like.new_tensor([[one[name]] for one in each]) for name in each[0]}
        parts.append(Alike(members, *standing[members[0]], numbers))
    return parts


def losses_together(
    parts: Sequence[Alike],
    z_students: Tensor,
    z_teacher: Tensor | None,
    labels: Tensor,
    label_weight: float = 1.0,
) -> tuple[Tensor, dict[int, BaseException]]:
    """The loss of each row of several students on one batch: those of one formula in one go.

    What a student comes to does not depend on the others: each number of it is computed from its own row of the stack,
    by operations on single elements or along one row.

    Args:
        parts: the students, as `alike` has them.
        z_students: [students, n, classes], of half precision too.
        z_teacher, labels, label_weight: as of `row_losses`.

    Returns:
        float32 or float64 [students, n]; and what the user's own objectives raised, by the student's place: its losses
        are zeros.
    """
    z_students = at_least_float32(z_students)
    z_teacher = None if z_teacher is None else z_teacher.to(z_students.dtype)
    labels = labels.to(z_students.dtype) if labels.is_floating_point() else labels
    found, errors = list[Tensor](), dict[int, BaseException]()
    for part in parts:
        first, count = part.members[0], len(part.members)
        in_a_row = part.members == list(range(first, first + count))
        mine = z_students[first : first + count] if in_a_row else z_students[part.members]
        if part.stage.alike is not None:
            found.append(part.stage.formula(mine, z_teacher, labels, label_weight, **part.numbers))
            continue
        try:
            found.append(part.stage.losses(part.epoch, mine[0], z_teacher, labels, label_weight)[None])
        except (Exception, SystemExit) as error:
            found.append(0 * mine.sum(dim=-1))
            errors[first] = error
    places = [index for part in parts for index in part.members]
    together = torch.cat(found) if len(found) > 1 else found[0]
    if places != sorted(places):
        together = together[sorted(range(len(places)), key=places.__getitem__)]
    return together, errors
