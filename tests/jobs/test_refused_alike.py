"""What a command refuses, its dry run refuses: the same words and exit code, and before anything is computed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from akd_dist import recipe as recipes
from akd_dist.base.locks import file_lock
from akd_dist.cli import main
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.jobs import cluster
from akd_dist.jobs.run_folder import begin_run, run_identity
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import load_recipe
from akd_dist.storage.objects import LocalRoot
from tests.fleets import ADAMW, HARD, a_recipe, a_student, a_teacher, own

MODELS = """
from collections import OrderedDict
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, inputs, classes, how):
        super().__init__()
        self.layer, self.how = nn.Linear(inputs, classes), how

    def forward(self, x):
        z = self.layer(x.flatten(1))
        if self.how == "frozen":
            self.requires_grad_(False)
        if self.how == "moody" and not self.training:
            return z
        return {"dict": {"scores": z}, "moody": [], "none": None, "pair": (3, z), "ids": z.argmax(1),
                "cube": z[:, None], "nan": z / 0 * 0, "large": z * 0 + 1e5, "one": z[:, 0], "fine": z, "frozen": z,
                "detached": z.detach(), "fewer": z if len(x) == 2 else z[:-1]}[self.how]

def net(input_shape, classes, how="fine"):
    return Net(64, classes, how)

class OwnNorm(nn.BatchNorm1d):
    pass

def normed(input_shape, classes, own=False):
    return nn.Sequential(nn.Flatten(), (OwnNorm if own else nn.BatchNorm1d)(64), nn.Linear(64, classes))
"""


class Place:
    """A folder with a recipe file of one student on digits, and commands to run there."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        (root / "alike_nets.py").write_text(MODELS)
        self.recipe = a_recipe(
            [a_student("one", objective=HARD)],
            teacher={"weights": a_teacher(a_recipe([a_student("any")]), root / "teacher", root / "cache")},
            folder=str(root),
            code=["alike_nets"],
        )
        self.rows = prepare(self.recipe.data, root / "cache").train
        (root / "recipe.yaml").write_text(self.recipe.to_yaml())

    def run(self, command: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, what was refused as a document, and what was told."""
        places = [f"--{name}-root={self.root / name}" for name in ("store", "cache")]
        places += [f"--run-root={self.root / 'runs'}"] if command == "train-students" else []
        with pytest.raises(SystemExit) as left:
            main([command, str(self.root / "recipe.yaml"), *places, "--json", *arguments])
        out, err = self.capsys.readouterr()
        return int(left.value.code or 0), json.loads(out).get("error", {}), err

    def teacher(self, card: ModelCard | None = None, **changes: Any) -> list[str]:
        """Settings by which the teacher is another one, with these weights."""
        if card is None:
            card = ModelCard.of(recipes.Cnn(width=4), self.rows, None).model_copy(update=changes)
        save_model(self.root / "other", build(card, seed=0), card)
        return ["--set", f"teacher.weights={self.root / 'other'}"]

    def weights_of(self, how: str) -> list[str]:
        spec = own(recipes.Custom(factory="alike_nets:net", arguments={"how": how}), self.root)
        return self.teacher(ModelCard.of(spec, self.rows, None))

    def batch(self, last: int) -> int:
        """A batch size that leaves so many rows for the last batch of an epoch."""
        return next(size for size in range(9, len(self.rows)) if len(self.rows) % size == last)

    def text(self, length: int) -> Rows:
        """Rows of text, in text.parquet."""
        pq.write_table(pa.table({"text": ["abc", "de"] * 30, "label": [0, 1] * 30}), self.root / "text.parquet")
        data = {
            "train": {"kind": "parquet", "path": str(self.root / "text.parquet"), "input": "text"},
            "text": {"kind": "bytes", "length": length},
        }
        return prepare(recipes.DataSpec.model_validate(data), self.root / "cache").train


def custom(where: str, how: str = "fine", function: str = "net") -> list[str]:
    arguments = f"{{how: {how}}}" if function == "net" else "{}"
    return ["--set", f"{where}.model={{kind: custom, factory: alike_nets:{function}, arguments: {arguments}}}"]


def trained(how: str = "fine", function: str = "net", **training: Any) -> list[str]:
    """Settings by which the recipe trains a custom teacher."""
    train = json.dumps({"epochs": 1, "optimizer": ADAMW} | training)
    arguments = json.dumps({"how": how} if function == "net" else {})
    model = f"{{kind: custom, factory: alike_nets:{function}, arguments: {arguments}}}"
    return ["--set", f"teacher={{model: {model}, train: {train}}}"]


def an_assistant(place: Place) -> list[str]:
    """Settings by which an assistant's last batch is of one row, under batch statistics."""
    model = {"kind": "custom", "factory": "alike_nets:normed"}
    assistant = {"model": model, "objective": HARD, "optimizer": ADAMW, "batch": place.batch(1)}
    teacher = {"weights": str(place.root / "teacher"), "assistant": assistant}
    objective = {"kind": "takd", "epochs": 1}
    return ["--set", f"teacher={json.dumps(teacher)}", "--set", f"students.0.objective={json.dumps(objective)}"]


def a_pickle(place: Place) -> list[str]:
    (place.root / "pickled").mkdir()
    torch.save({}, place.root / "pickled" / "model.pt")
    return ["--set", f"teacher.weights={place.root / 'pickled'}"]


def a_checkpoint(place: Place, width: int = 4, **changes: Any) -> list[str]:
    """A file of weights from elsewhere, and the architecture that it is said to be of."""
    module = build(ModelCard.of(recipes.Cnn(width=4), place.rows, None), seed=0)
    state = {name.removeprefix("body."): tensor for name, tensor in module.state_dict().items()}
    torch.save({"state_dict": state} | changes, place.root / "given.pth")
    teacher = {"model": {"kind": "cnn", "width": width}, "weights": str(place.root / "given.pth")}
    return ["--set", f"teacher={json.dumps(teacher)}"]


def damaged(place: Place) -> list[str]:
    path = place.root / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    return []


def without_its_code(place: Place) -> list[str]:
    settings = place.weights_of("fine")
    (place.root / "alike_nets.py").write_text(MODELS.replace("def net(", "def renamed("))
    sys.modules.pop("alike_nets")
    return settings


def of_other_text(place: Place, length: int) -> list[str]:
    """Settings by which data are text of 16 tokens, and the teacher is for another length of it."""
    card = ModelCard.of(recipes.TextTransformer(width=8), place.text(length), None)
    source = f"{{kind: parquet, path: {place.root / 'text.parquet'}, input: text}}"
    data = f"data={{train: {source}, text: {{kind: bytes, length: 16}}}}"
    return [*place.teacher(card), "--set", data, "--set", "students.0.model={kind: text_transformer, width: 8}"]


def of_other_tokens(place: Place) -> list[str]:
    settings = of_other_text(place, 16)
    card = ModelCard.of(recipes.TextTransformer(width=8), place.text(16), None)
    assert card.tokens is not None
    tokens = card.tokens.model_copy(update={"vocabulary": card.tokens.vocabulary + 1})
    return [*place.teacher(card.model_copy(update={"tokens": tokens})), *settings[2:]]


def taken_by(place: Place, *settings: str, teacher: str | None = None) -> list[str]:
    """A run of the recipe's name that was begun by another recipe, or with another teacher."""
    recipe = load_recipe(place.root / "recipe.yaml", settings)
    identity = run_identity(recipe, prepare(recipe.data, place.root / "cache"))
    if teacher is not None:
        identity["teacher"] |= {"fingerprint": teacher, "assistant_fingerprints": []}
    begin_run(place.root / "runs" / "fleet", recipe, identity)
    return []


def a_file(place: Place, name: str) -> list[str]:
    (place.root / name).write_text("no folder")
    return []


def bad_labels(place: Place) -> list[str]:
    pixels = pa.array(np.zeros((20, 4), dtype=np.uint8).tolist(), type=pa.list_(pa.uint8()))
    pq.write_table(pa.table({"pixels": pixels, "label": [0, -3] * 10}), place.root / "labels.parquet")
    source = f"{{kind: parquet, path: {place.root / 'labels.parquet'}, input: pixels, label: label}}"
    return ["--set", f"data.train={source}"]


def one_row_left(place: Place, *settings: str, **training: Any) -> list[str]:
    return [*custom("students.0", function="normed"), "--set", f"students.0.batch={place.batch(1)}", *settings]


BOTH, STUDENTS = ("cache-teacher", "train-students"), ("train-students",)
CASES: dict[str, tuple[tuple[str, ...], int, str, Callable[[Place], list[str]]]] = {
    "weights: missing": (BOTH, 4, "not a model folder", lambda at: ["--set", f"teacher.weights={at.root / 'gone'}"]),
    "weights: a pickle": (BOTH, 4, "is a pickle", a_pickle),
    "weights: damaged": (BOTH, 5, "are not those that were saved", damaged),
    "weights: other classes": (BOTH, 4, "7 classes", lambda at: at.teacher(classes=7)),
    "weights: other inputs": (BOTH, 4, "[1, 12, 12]", lambda at: at.teacher(input_shape=(1, 12, 12))),
    "weights: regression": (BOTH, 4, "(regression)", lambda at: at.teacher(task="regression", classes=1)),
    "weights: without code": (BOTH, 4, "no function net", without_its_code),
    "weights: shorter texts": (BOTH, 4, "made for other data", lambda at: of_other_text(at, 8)),
    "weights: other tokens": (BOTH, 4, "made for other data", of_other_tokens),
    "weights: NaN": (BOTH, 4, "not finite", lambda at: at.weights_of("nan")),
    "weights: beyond float16": (
        BOTH,
        4,
        "not finite as float16",
        lambda at: [*at.weights_of("large"), "--set", "cache.encoding=float16"],
    ),
    "checkpoint: missing": (
        BOTH,
        4,
        "there is no checkpoint",
        lambda at: [*a_checkpoint(at), "--set", f"teacher.weights={at.root / 'gone.pth'}"],
    ),
    "checkpoint: another architecture": (BOTH, 4, "do not fit the model cnn-5", lambda at: a_checkpoint(at, width=5)),
    "checkpoint: code": (BOTH, 4, "nothing is unpickled", lambda at: a_checkpoint(at, root=at.root)),
    "teacher: a dict": (BOTH, 4, "a dict of scores: Tensor", lambda _: trained("dict")),
    "teacher: a pair": (BOTH, 4, "a tuple of int, a tensor", lambda _: trained("pair")),
    "teacher: other when it trains": (BOTH, 4, "a list of nothing", lambda _: trained("moody")),
    "teacher: one row left": (
        BOTH,
        4,
        "in teacher.train",
        lambda at: trained(function="normed", batch=at.batch(1)),
    ),
    "assistant: one row left": (BOTH, 4, "in teacher.assistant", an_assistant),
    "student: nothing": (STUDENTS, 4, "a NoneType", lambda _: custom("students.0", "none")),
    "student: class ids": (STUDENTS, 4, "a tensor of int64", lambda _: custom("students.0", "ids")),
    "student: three dimensions": (STUDENTS, 4, "[2, 1, 10]", lambda _: custom("students.0", "cube")),
    "student: one dimension": (STUDENTS, 4, "one row of logits for each", lambda _: custom("students.0", "one")),
    "student: other when it trains": (STUDENTS, 4, "a list of nothing", lambda _: custom("students.0", "moody")),
    "student: frozen": (STUDENTS, 4, "no parameter that requires", lambda _: custom("students.0", "frozen")),
    "student: detached": (STUDENTS, 4, "cut off from the weights", lambda _: custom("students.0", "detached")),
    "student: not finite": (STUDENTS, 4, "not finite, of two", lambda _: custom("students.0", "nan")),
    "student: fewer rows": (STUDENTS, 4, "[7, 10] for 8 rows", lambda _: custom("students.0", "fewer")),
    "student: one row left": (STUDENTS, 4, "last_batch: merge", one_row_left),
    "student: one row of a worker": (
        STUDENTS,
        4,
        "sync_batchnorm: true",
        lambda at: [
            *custom("students.0", function="normed"),
            *("--set", f"students.0.batch={at.batch(2)}", "--set", "students.0.workers=2"),
        ],
    ),
    "student: a norm that cannot be shared": (
        STUDENTS,
        4,
        "cannot take batch statistics over several workers",
        lambda _: [
            "--set",
            "students.0.model={kind: custom, factory: alike_nets:normed, arguments: {own: true}}",
            *("--set", "students.0.workers=2", "--set", "students.0.sync_batchnorm=true"),
        ],
    ),
    "student: no batch": (
        STUDENTS,
        4,
        "there is no batch",
        lambda _: ["--set", "students.0.batch=5000", "--set", "students.0.last_batch=drop"],
    ),
    "cache: too many threads": (BOTH, 6, "999 CPUs", lambda _: ["--set", "cache.threads=999"]),
    "a row with a bad label": (BOTH, 4, "-3", bad_labels),
    "a package that is missing": (
        STUDENTS,
        4,
        "timm",
        lambda _: ["--set", "students.0.model={kind: timm, name: resnet18}"],
    ),
    "the store root is a file": (BOTH, 6, "cannot write", lambda at: a_file(at, "store")),
    "the run root is a file": (STUDENTS, 6, "cannot write", lambda at: a_file(at, "runs")),
    "a run of another recipe": (STUDENTS, 2, "was made from another recipe", lambda at: taken_by(at, "data.views=1")),
    "a run of another teacher": (STUDENTS, 2, "fingerprint", lambda at: taken_by(at, teacher="0" * 64)),
    "a cluster that is not there": (BOTH, 6, "no Ray cluster", lambda _: ["--address", "127.0.0.1:1"]),
}


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "alike_nets", raising=False)
    return Place(tmp_path, capsys)


@pytest.mark.parametrize(
    ("command", "case"), [(command, case) for case, (commands, *_) in CASES.items() for command in commands]
)
def test_a_dry_run_refuses_what_the_command_refuses(
    place: Place, command: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, code, told, prepared = CASES[case]
    settings = prepared(place)
    if "--address" not in settings:

        def started(*_: Any, **__: Any) -> None:
            raise AssertionError("Ray was started before this was refused")

        monkeypatch.setattr(cluster, "connect", started)
    else:  # other tests of this process may be connected to a Ray of theirs
        monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    before = sorted(place.root.glob("store/**/*")) + sorted(place.root.glob("runs/**/*"))
    foreseen = place.run(command, *settings, "--dry-run")
    assert (foreseen[0], "Traceback" in foreseen[2]) == (code, False), foreseen[2]
    assert told in "\n".join(str(foreseen[1][part]) for part in ("what", "got", "expected", "next"))
    assert sorted(place.root.glob("store/**/*")) + sorted(place.root.glob("runs/**/*")) == before
    assert place.run(command, *settings)[:2] == foreseen[:2]
    assert not list(place.root.glob("store/**/*"))


def test_what_the_disk_cannot_hold_is_refused_alike(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalRoot, "free_bytes", lambda _: 1000)
    for command in BOTH:
        foreseen = place.run(command, "--dry-run")
        assert (foreseen[0], "1,000 bytes free" in foreseen[1]["got"]) == (6, True)
        assert place.run(command)[:2] == foreseen[:2]


def test_a_missing_gpu_is_refused_alike(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in BOTH:
        foreseen = place.run(command, "--dry-run", "--set", "device=cuda")
        assert (foreseen[0], "GPU" in foreseen[1]["what"]) == (6, True)
        assert place.run(command, "--set", "device=cuda")[:2] == foreseen[:2]


def test_a_run_that_is_held_is_refused_alike(place: Place) -> None:
    with file_lock(place.root / "runs" / "fleet" / "lock", what="the run", note="process 7 on another machine"):
        foreseen = place.run("train-students", "--dry-run")
        assert (foreseen[0], foreseen[1]["got"]) == (3, "process 7 on another machine")
        assert place.run("train-students")[:2] == foreseen[:2]
