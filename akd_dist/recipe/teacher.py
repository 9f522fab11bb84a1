"""The teacher of a recipe: where its logits come from, be it one or several; and the assistants below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_serializer, model_validator
from pydantic_core import CoreSchema

from akd_dist.recipe.base import Epochs, Positive, Spec
from akd_dist.recipe.models import HuggingFaceLm, HuggingFaceModel, Model
from akd_dist.recipe.training import Learning, Objective, Takd, Training

# Of the whole: one that counts less is lost when a mean is rounded to float32.
_LEAST_SHARE = 1e-7


class TeacherTraining(Training):
    """How the teacher is trained, from hard labels, before it is cached."""

    epochs: Epochs
    """Epochs; the best validation epoch is kept."""
    rows: Literal["students", "all"] = "students"
    """Which rows it learns from: those of the students that have labels; or `all`, also those that data.subset leaves
    out, as somebody would have trained it who had more labels than the students have."""


class AssistantSpec(Learning):
    """A model between teacher and students: it learns from the teacher's store and is cached like a teacher."""

    assistant: AssistantSpec | None = None
    """A further one, which learns from this one; students of objective `takd` learn from the last of the chain."""

    @field_validator("objective")
    @classmethod
    def _not_takd(cls, objective: Objective) -> Objective:
        if isinstance(objective, Takd):
            raise ValueError("an assistant learns from the model it stands under: use kind: kd")
        return objective


class StoredTeacher(Spec):
    """Sealed stores of a teacher's logits: `store: ID` says the same as `store: {train: ID}`."""

    train: str
    """The store of the train rows: its id, the beginning of it under --store-root, or the path or URI of its folder."""
    validation: str | None = None
    """That of the validation rows; none looks for one of the same teacher beside it, and does without."""
    test: str | None = None
    """That of the test rows, for the teacher's metrics and agreement with it; none looks for one as above."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_word(cls, given: Any) -> Any:
        return {"train": given} if isinstance(given, str) else given

    @model_serializer(mode="plain")
    def _as_short_as_can_be(self) -> str | dict[str, Any]:
        given = {split: name for split, name in self if name is not None}
        return self.train if list(given) == ["train"] else given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core)]}


class TeacherSpec(Spec):
    """The teacher: a model folder, a checkpoint from elsewhere, a model that the recipe trains, or stored logits."""

    weights: str | None = None
    """A folder or URI with model.safetensors and model.json, such as a student's. Beside `model`, a checkpoint from
    elsewhere: a file of safetensors or a torch state dict, or a folder with one. Relative to the recipe's folder."""
    model: Model | None = None
    """The architecture: of a teacher that this recipe trains, or of the checkpoint in `weights`. Alone, a fine-tuned
    model of kind `huggingface`, or a `huggingface_lm`, with its weights in `path`."""
    train: TeacherTraining | None = None
    """How this recipe trains it."""
    store: StoredTeacher | None = None
    """Its logits alone, in sealed stores, such as `akd-dist stores import` makes: no model is needed then."""
    members: list[TeacherMember] | None = Field(default=None, min_length=2)
    """The teachers of an ensemble, each with a store of its own, averaged as they are read: `teacher: [a, b]` says the
    same as `teacher: {members: [a, b]}`."""
    average: Literal["logits", "probabilities"] = "logits"
    """What is averaged of an ensemble. The logarithm of mean probabilities is no raw logits: it is for objectives that
    a softmax is enough for."""
    assistant: AssistantSpec | None = None
    """A model of a size between, for students of objective `takd`."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_list(cls, given: Any) -> Any:
        return {"members": given} if isinstance(given, list) else given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        if cls is not TeacherSpec:
            return schema
        properties = handler.resolve_ref_schema(schema)["properties"]
        return {
            "anyOf": [schema, {"type": "array", "minItems": 2, "items": properties["members"]["anyOf"][0]["items"]}]
        }

    @property
    def each(self) -> Sequence[TeacherSpec]:
        """The teachers: one, or those of an ensemble."""
        return [self] if self.members is None else self.members

    @property
    def shares(self) -> tuple[float, ...]:
        """How much each of them counts; together 1."""
        given = [1.0] if self.members is None else [one.share for one in self.members]
        return tuple(share / sum(given) for share in given)

    @property
    def chain(self) -> list[AssistantSpec]:
        """The assistants, from the one under the teacher to the last."""
        found, link = [], self.assistant
        while link is not None:
            found.append(link)
            link = link.assistant
        return found

    @property
    def checkpoint(self) -> str | None:
        """Where weights from elsewhere lie for the architecture in `model`; None where there are none."""
        if self.model is None or self.train is not None:
            return None
        return self.weights or getattr(self.model, "path", None)

    @model_validator(mode="after")
    def _one_way(self) -> TeacherSpec:
        given = [name for name in ("weights", "model", "train", "store") if getattr(self, name) is not None]
        if self.members is not None:
            if given:
                raise ValueError(f"an ensemble has its members, and no {' or '.join(given)} of its own")
            if not all(_LEAST_SHARE <= share <= 1 for share in self.shares):
                raise ValueError(f"the shares {[one.share for one in self.members]} leave a member without a weight")
            return self
        if self.average != "logits":
            raise ValueError("average is for an ensemble: give its members")
        if (
            given == ["model"]
            and isinstance(self.model, HuggingFaceModel | HuggingFaceLm)
            and self.model.path
            and self.model.pretrained
        ):
            return self
        if given not in (["weights"], ["model", "train"], ["weights", "model"], ["store"]):
            raise ValueError(
                "give either weights, or model and train, or model and weights: the architecture of a checkpoint from "
                f"elsewhere; or store; got {' and '.join(given) or 'neither'}"
            )
        return self


class TeacherMember(TeacherSpec):
    """One teacher of an ensemble."""

    share: Positive = 1.0
    """How much it counts, in proportion to the others."""

    @model_validator(mode="after")
    def _stands_alone(self) -> TeacherMember:
        if self.members is not None or self.assistant is not None:
            what = "members" if self.members is not None else "assistant"
            raise ValueError(f"a member of an ensemble has no {what}: give the assistant to the ensemble")
        return self
