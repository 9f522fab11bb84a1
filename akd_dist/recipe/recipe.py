"""The recipe: one YAML file that says everything a run depends on, as typed, frozen objects.

    akd-dist recipe check jobs/digits.yaml      read it, fill in every default, list the students
    akd-dist recipe schema                      its JSON Schema, for completion in an editor

Unknown keys are refused, numbers must be numbers, and the resolved recipe is saved beside every result. The docstring
under a field is its documentation, here and in the JSON Schema. How a file is read lies in `load`.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, Field, JsonValue, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from akd_dist.base import places
from akd_dist.base.trusted import MODULE, Trusted
from akd_dist.recipe.base import FACTORY, Count, Device, Factory, NotRightError, Positive, Spec
from akd_dist.recipe.cache import CacheSpec
from akd_dist.recipe.data import DataSpec
from akd_dist.recipe.models import CausalLm
from akd_dist.recipe.paths import change_paths
from akd_dist.recipe.teacher import TeacherSpec
from akd_dist.recipe.training import AnnealingKD, ContinuationKD, CustomObjective, Learning, Stacked

# Names become folders, on any file system.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Where a run is placed, not what it computes: left out of its identity.
PLACEMENT = ("cohorts", "checkpoint_seconds", "folder", "code")

Misfit = tuple[tuple[str | int, ...], object, NotRightError]
"""What fits no other part of a recipe: its key, its value, and why not."""


def _student_name(student: dict[str, Any]) -> str:
    objective = student["objective"]
    tau = f"-t{objective.tau_max}" if isinstance(objective, AnnealingKD | ContinuationKD) else ""
    return f"{student['model'].label}-{objective.label}{tau}-s{student['seed']}"


def _folder_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be a folder's name: use letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return name


class Callback(Factory):
    """A function of your own that is told of each epoch's end, as docs/howto/models.md shows. It changes no result."""

    factory: str = Field(pattern=FACTORY)
    """`module:function`, called as function(epoch_end, **arguments)."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of the function; `./x` in them is a path relative to the recipe's folder."""


class StudentSpec(Learning):
    """One student. In the file, a block may have a `grid:` and then stands for several."""

    workers: Count = 1
    """Data-parallel workers that share each batch."""
    sync_batchnorm: bool = False
    """Whether the workers take batch statistics over the global batch; otherwise each over its own share."""
    gpus: Positive = 1.0
    """GPUs of each worker, where the recipe's device is cuda; cohorts share one by fractions. Changes no result."""
    on_epoch_end: Callback | None = None
    """Who is told of the end of each of its epochs. Changes no result; if it fails, the student does."""
    name: str = Field(default_factory=_student_name, validate_default=True)
    """Its folder in the run; by default `<model>-<objective>-t<tau_max>-s<seed>`, with what else its grid varies before
    the seed. Unique in the recipe."""

    _valid_name = field_validator("name")(_folder_name)

    @property
    def stage1(self) -> str | None:
        """What students that train the same stage I have in common; None where no further stage follows."""
        if not isinstance(self.objective, AnnealingKD) or not self.objective.stage2_epochs:
            return None
        # Neither what a student is called, how much of a GPU it has, nor who is told of it changes a weight.
        document = self.model_dump(mode="json", exclude={"name", "gpus", "on_epoch_end"})
        del document["objective"]["stage2_epochs"], document["objective"]["stage2_optimizer"]
        return json.dumps(document)


class Recipe(Spec):
    """Everything a run depends on."""

    name: str
    """The run's folder under --run-root."""
    data: DataSpec
    """The rows that everyone sees."""
    teacher: TeacherSpec
    """Whose logits are cached."""
    cache: CacheSpec = CacheSpec()
    """How its logits are stored."""
    students: list[StudentSpec] = Field(min_length=1)
    """Who is trained, in this order."""
    device: Device = "cpu"
    """Where teacher and students compute. Part of the result: the last bits of the weights differ."""
    cohorts: Count | None = None
    """How many groups of students train at the same time; none leaves it to the planner. Changes no result."""
    stacked: Stacked = "auto"
    """Whether students of one architecture step together, in one pass over all of them: `auto` where a short trial
    gives each the same bits in a stack of any size and takes less time, `always` wherever the bits are the same (else
    the recipe is refused), or `never`. Part of the result: the last bits of the weights differ from those of steps
    alone. A run keeps what the trial said."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 20.0
    """Time between checkpoints; 0 writes one at the end of every epoch. Changes no result."""
    folder: str | None = None
    """Where modules of your own lie, which `factory` may name; by default the recipe's own folder."""
    code: list[Annotated[str, Field(pattern=MODULE)]] = []
    """Modules elsewhere that `factory` may name as well, such as an installed package of your own, with all that lies
    below them. A teacher in `weights` may name them, too."""

    _trusted: Trusted = PrivateAttr(default_factory=Trusted)

    _valid_name = field_validator("name")(_folder_name)

    @property
    def trusted(self) -> Trusted:
        """Which factories may be imported for it, as `trust` was told; nothing until then."""
        return self._trusted

    def own(self) -> Self:
        """This recipe, given by the user to a command: what it names may be imported from its folder and from `code`.

        A recipe that a store or a run holds is not the user's word; see `trust`.
        """
        factories = tuple(sorted({part.factory for part in _factories(self)}))
        own = Trusted(factories=factories, folder=self.folder, modules=tuple(self.code), named_by="the recipe")
        return trust(self, own)

    @field_validator("students")
    @classmethod
    def _unique_names(cls, students: list[StudentSpec]) -> list[StudentSpec]:
        # Two names that differ only in case are one folder on some file systems.
        twice = [name for name, count in Counter(student.name.casefold() for student in students).items() if count > 1]
        if twice:
            raise ValueError(
                f"several students are named {', '.join(twice[:3])}; a default name holds model, objective, tau_max "
                "and seed, and whatever else its block's grid varies, so students of different blocks that differ in "
                "anything else need blocks with a `name:` of their own"
            )
        return students

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        """Refuse at once, each at its key, what is wrong only where several parts of the recipe meet."""
        checks = (
            *(self._takd_without_assistant(), self._nothing_to_mix(), self._no_labels(), self._no_rows_left_out()),
            *(self._not_of_language_models(), self._not_described(), self._too_many_coefficients()),
        )
        found = [
            InitErrorDetails(type="value_error", loc=key, input=value, ctx={"error": error})
            for key, value, error in itertools.chain(*checks)
        ]
        if found:
            raise ValidationError.from_exception_data("Recipe", found)
        return self

    def _takd_without_assistant(self) -> Iterator[Misfit]:
        """Students of `takd` and the assistant need each other; and an ensemble's numbers have no probabilities."""
        taught = [at for at, student in enumerate(self.students) if student.objective.learns_from == "assistant"]
        if self.teacher.assistant is None:
            for at in taught:
                why = NotRightError("takd learns from an assistant, and the teacher has none", "teacher.assistant")
                yield ("students", at, "objective"), self.students[at].objective, why
        elif not taught:
            why = NotRightError(
                "nobody would use it, as no student has the objective takd", "it left out, or a student that has it"
            )
            yield ("teacher", "assistant"), self.teacher.assistant, why
        if self.cache.encoding.kind == "top_k" and self.data.task == "regression":
            why = NotRightError(
                "a regression has one number a row, and no classes to choose from", "float32 or float16"
            )
            yield ("cache", "encoding"), self.cache.encoding, why
        if self.teacher.average == "probabilities" and self.data.task == "regression":
            why = NotRightError("a regression has no probabilities", "average: logits")
            yield ("teacher", "average"), self.teacher.average, why

    def _nothing_to_mix(self) -> Iterator[Misfit]:
        """Batches are mixed of rows with labels and rows without: there have to be both."""
        for key, one in self._learners():
            if one.labelled is not None and self.data.unlabelled is None:
                why = NotRightError(
                    "data.unlabelled names no rows without labels",
                    "labelled left out; or such rows in data.unlabelled: a source of their own, or `missing` for rows "
                    "of data.train whose label is missing",
                )
                yield (*key, "labelled"), one.labelled, why

    def _no_labels(self) -> Iterator[Misfit]:
        """Where data.train is left out, no train row has a label, and nobody can learn from one."""
        if self.data.train is not None:
            return
        none = "labels, and no train row has one, as data.train is left out"
        for key, one in self._learners():
            if one.objective.reads_labels:
                why = NotRightError(
                    f"{one.objective.kind} learns from {none}",
                    "kd with alpha: 1, or annealing_kd with stage2_epochs: 0",
                )
                yield (*key, "objective"), one.objective, why
        for number, teacher in enumerate(self.teacher.each):
            if teacher.train is not None:
                why = NotRightError(
                    f"training a teacher needs {none}",
                    "a teacher that is trained: its weights in `weights`, or its logits in `store`",
                )
                key = ("teacher", "train") if self.teacher.members is None else ("teacher", "members", number, "train")
                yield key, teacher.train, why

    def _no_rows_left_out(self) -> Iterator[Misfit]:
        """A teacher may learn from rows that `subset` leaves out only where it leaves out some."""
        for number, teacher in enumerate(self.teacher.each):
            if teacher.train is not None and teacher.train.rows == "all" and self.data.subset is None:
                why = NotRightError("it is for rows that data.subset leaves out, and that is not set", "rows left out")
                key = ("teacher",) if self.teacher.members is None else ("teacher", "members", number)
                yield (*key, "train", "rows"), "all", why

    def _not_of_language_models(self) -> Iterator[Misfit]:
        """Keys of training that a teacher cannot have, and losses that a regression, or a language model, has not."""
        for key, teacher in self._trained_teachers():
            if (why := teacher.train.why_not_for(teacher.model)) is not None:
                yield (
                    (*key, "train", *why.key),
                    getattr(teacher.train, str(why.key[0])),
                    NotRightError(why.why, why.expected),
                )
        for key, one in self._learners():
            objective, task = one.objective, self.data.task
            if task == "regression" and getattr(objective, "stage1_loss", None) == "cross_entropy":
                why = NotRightError("a regression has one number a row, and no softmax to compare by", "squared")
                yield (*key, "objective", "stage1_loss"), "cross_entropy", why
            if task == "regression" and getattr(objective, "center", None):
                why = NotRightError("the mean of the one number of a regression is that number", "it left out")
                yield (*key, "objective", "center"), True, why
            if task == "language_model" and isinstance(objective, CustomObjective):
                why = NotRightError(
                    "an objective of your own is given all logits, which language models never hold at once",
                    "hard_labels, kd, annealing_kd or continuation_kd",
                )
                yield (*key, "objective", "kind"), objective.kind, why

    def _trained_teachers(self) -> Iterator[tuple[tuple[str | int, ...], Any]]:
        for number, teacher in enumerate(self.teacher.each):
            if teacher.train is not None and teacher.model is not None:
                yield ("teacher",) if self.teacher.members is None else ("teacher", "members", number), teacher

    def _not_described(self) -> Iterator[Misfit]:
        """What a store that describes logits, instead of holding them, does not say."""
        if self.cache.encoding.kind != "top_k":
            return
        least = min(self.cache.encoding.tail_temperatures)
        for key, one in self._learners():
            objective = one.objective
            if isinstance(objective, CustomObjective) and objective.learns_from == "teacher":
                why = NotRightError(
                    "an objective of your own is given all logits, and cache.encoding: top_k keeps some of them",
                    "an encoding of float16 or float32, or learns_from: labels",
                )
                yield (*key, "objective", "kind"), objective.kind, why
            if (asked := objective.lowest_temperature(language=one.is_language_model)) is not None and asked < least:
                why = NotRightError(
                    f"the teacher is asked for at T = {asked:g}, and cache.encoding says nothing of the other classes "
                    f"below T = {least:g}",
                    f"a temperature of at least {least:g}"
                    + (f", or tail_temperatures that begin at {asked:g}" if asked >= 1 else ""),
                )
                yield (*key, "objective"), objective, why

    def _too_many_coefficients(self) -> Iterator[Misfit]:
        """A rank that the hidden state of a teacher does not have, found before it is trained."""
        rank = self.cache.encoding.rank
        narrow = [one.model.width for one in self.teacher.each if isinstance(one.model, CausalLm)]
        if self.cache.encoding.kind == "top_k" and narrow and rank > min(narrow):
            why = NotRightError(
                f"rank {rank} is larger than the width of the teacher, {min(narrow)}", f"at most {min(narrow)}"
            )
            yield ("cache", "encoding", "rank"), rank, why

    def _learners(self) -> Iterator[tuple[tuple[str | int, ...], Learning]]:
        """Students and assistants, each with its key."""
        for at, student in enumerate(self.students):
            yield ("students", at), student
        for number, link in enumerate(self.teacher.chain, 1):
            yield ("teacher", *number * ("assistant",)), link

    @property
    def data_of_teachers(self) -> DataSpec | None:
        """The rows of teachers that learn also from those that `subset` leaves out; None where none does."""
        if not any(one.train is not None and one.train.rows == "all" for one in self.teacher.each):
            return None
        unlabelled = None if self.data.unlabelled == "rest" else self.data.unlabelled
        return self.data.model_copy(update={"subset": None, "unlabelled": unlabelled})

    def identity(self) -> dict[str, Any]:
        """What the run computes, as JSON: the resolved recipe without placement and without paths.

        Paths are left out because data and teacher are known by their content, wherever they lie.
        """
        document = self.model_dump(mode="json", exclude=set(PLACEMENT))
        for source in (document["data"][split] for split in ("train", "validation", "test", "unlabelled")):
            if isinstance(source, dict):
                for key in ("path", "images", "labels"):
                    source.pop(key, None)
        if document["data"]["text"] is not None:
            document["data"]["text"].pop("path", None)
        if self.stacked == "auto":  # as recipes of before say nothing of it
            del document["stacked"]
        if not self.data.stratify:  # as recipes of before say nothing of it
            del document["data"]["stratify"]
        # Runs of before knew no such key: what is as by default is left out, each key for itself.
        document["data"]["image"] = self.data.image.said()
        if not document["data"]["image"]:
            del document["data"]["image"]
        if self.data.task != "language_model":
            del document["data"]["packing"], document["data"]["scored"]
        if document["data"]["unlabelled"] is None:
            del document["data"]["unlabelled"]
        for key in {"channels_last", "compile"} - self.cache.inference.keys():
            del document["cache"][key]
        for teacher in (document["teacher"], *(document["teacher"]["members"] or ())):
            del teacher["weights"], teacher["store"]
            if teacher["members"] is None:
                del teacher["members"], teacher["average"]
        for training in _trainings(document):
            forget_later_keys(training)
        for student in document["students"]:
            del student["gpus"], student["on_epoch_end"]
        document["students"] = {student["name"]: student for student in document["students"]}
        return document

    def document(self, folder: str | Path) -> dict[str, Any]:
        """The resolved recipe as JSON for a document in `folder`, its places as `storage.places.written` names them."""
        document = self.model_dump(mode="json")
        # Verbatim: prepared rows are known by the path that they were asked for.
        change_paths(document, functools.partial(places.written, folder=folder, verbatim=True))
        return document

    @classmethod
    def of_document(cls, document: dict[str, Any], folder: str | Path) -> Recipe:
        """What `document` gave, read back in the same folder, wherever that has been moved to.

        Raises:
            ValidationError: it is none.
        """
        document = copy.deepcopy(document)
        change_paths(document, functools.partial(places.found, folder=folder))
        return cls.model_validate(document)

    def to_yaml(self, folder: Path | None = None) -> str:
        """The resolved recipe as a file that `load_recipe` reads back, every default written out.

        Args:
            folder: where the file will lie, so that its places can be named relative to it; None names them absolutely.
        """
        from ruamel.yaml import YAML

        document = self.model_dump(mode="json") if folder is None else self.document(folder)
        document["students"] = [{"name": student.pop("name"), **student} for student in document["students"]]
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
        yaml.width = 120
        text = io.StringIO()
        text.write("# The resolved recipe: every default and every derived value written out.\n")
        yaml.dump(document, text)
        return text.getvalue()


def forget_later_keys(training: dict[str, Any]) -> None:
    """Take out of a dumped `Training` what recipes had not from the start, where it holds its default.

    Runs and trained models are found by what their recipe says: they stay the same when recipes learn a new key.
    """
    for key, default in (("last_batch", "keep"), ("labelled", None), ("rows", "students")):
        if key in training and training[key] == default:
            del training[key]


def _trainings(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every `Training` of a dumped recipe."""
    yield from document["students"]
    for teacher in (document["teacher"], *(document["teacher"].get("members") or ())):
        if (train := teacher["train"]) is not None:
            yield train
    link = document["teacher"]["assistant"]
    while link is not None:
        yield link
        link = link["assistant"]


Part = TypeVar("Part", bound=BaseModel)


def trust(part: Part, trusted: Trusted) -> Part:
    """The same object, all of whose factories may run as far as `trusted` says: a recipe, or a part of one."""
    if isinstance(part, Recipe):
        part._trusted = trusted
    for one in _factories(part):
        one._trusted = trusted
    return part


def _factories(part: object) -> Iterator[Factory]:
    """Every factory in a recipe, or in a part of one."""
    if isinstance(part, Factory):
        yield part
    elif isinstance(part, BaseModel):
        for name in type(part).model_fields:
            yield from _factories(getattr(part, name))
    elif isinstance(part, list):
        for one in part:
            yield from _factories(one)


def differences(ours: Any, theirs: Any) -> list[str]:
    """Where two documents differ, as `data.seed: 0 -> 1`; named entries of a list are compared by name."""
    left, right = dict(_leaves(ours)), dict(_leaves(theirs))
    return [
        f"{key}: {left.get(key, 'nothing')} -> {right.get(key, 'nothing')}"
        for key in left | right
        if key not in left or key not in right or left[key] != right[key]
    ]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        items = list(node.items())
    elif isinstance(node, list) and all(isinstance(entry, Mapping) and "name" in entry for entry in node):
        items = [(entry["name"], entry) for entry in node]
    else:
        yield prefix, node
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
