"""Recipes: what is read, what is filled in, what is refused, and in which words."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from akd_dist import recipe as recipes
from akd_dist.base.errors import RecipeError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data.row_cache import prepare
from akd_dist.documents.json_schema import SCHEMAS, schema_text, schemas
from akd_dist.jobs.train_teacher import teacher_of
from akd_dist.recipe import AdamW, AnnealingKD, Cnn, Custom, HardLabels, Mlp, Recipe, Sgd, StudentSpec, load_recipe
from akd_dist.recipe.grid_names import names_of_grid
from tests.fleets import ADAMW, KD, a_recipe, a_student
from tests.reference import SECTIONS, every_key

ROOT = Path(__file__).parents[2]

TEXT = """\
name: small
data:
  train: {kind: digits}
  views: 2
  augmentation: {kind: shift, pixels: 1}
teacher:
  model: {kind: cnn, width: 8}
  train:
    epochs: 3
    optimizer: {kind: sgd, lr: 1e-2}
students:
  - model: {kind: mlp}
    grid:
      model.hidden: [4, 8]
      seed: [0, 1, 2]
    objective: {kind: annealing_kd, tau_max: 2, stage1_epochs: 4, stage2_epochs: 1}
    optimizer: {kind: adamw, lr: 1e-4}
  - model: {kind: cnn, width: 2}
    objective: {kind: hard_labels, epochs: 5}
    optimizer: {kind: sgd, lr: 0.1}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(TEXT)
    return file


def refusal(path: Path, text: str | None = None, *overrides: str) -> RecipeError:
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.code == 2
    return caught.value


# ---- what is read


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").rglob("*.yaml")), ids=lambda file: file.name)
def test_every_job_is_a_recipe(file: Path) -> None:
    load_recipe(file)
    jsonschema.validate(YAML(typ="safe", pure=True).load(file), schemas()["recipe"])


def test_every_job_opens_with_its_command_hardware_and_time() -> None:
    for file in (ROOT / "jobs").rglob("*.yaml"):
        head = file.read_text().split("\nname:")[0]
        assert f"jobs/{file.relative_to(ROOT / 'jobs')}" in head, file.name
        assert "Hardware: " in head, file.name
        assert "Time: " in head, file.name


def test_the_tasks_of_glue_differ_in_nothing_but_their_data() -> None:
    recipe_of = {file.stem: load_recipe(file) for file in (ROOT / "jobs" / "glue").glob("*.yaml")}
    assert set(recipe_of) == {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"}
    for task, recipe in recipe_of.items():
        train = recipe.data.train
        assert isinstance(train, recipes.HuggingFaceData)
        assert (train.config, recipe.name) == (task, f"glue-{task}")
        told = recipes.differences(recipe_of["rte"].model_dump(mode="json"), recipe.model_dump(mode="json"))
        assert {key.split(".")[0] for key in (line.split(":")[0] for line in told)} <= {"name", "data", "folder"}
    assert {task for task, recipe in recipe_of.items() if recipe.data.task == "regression"} == {"stsb"}


def test_a_grid_expands_as_a_product_in_file_order(path: Path) -> None:
    assert [student.name for student in load_recipe(path).students] == [
        *(f"mlp-{hidden}-annealing_kd-t2-s{seed}" for hidden in (4, 8) for seed in (0, 1, 2)),
        "cnn-2-hard_labels-s0",
    ]


MLP, SEED = "mlp-4-annealing_kd-t2", "s0"


def names_of(path: Path, *grids: dict[str, list[Any]]) -> list[str]:
    """Names of the students of blocks with these grids; what a grid does not give is as usual."""
    blocks = []
    for grid in grids:
        block: dict[str, Any] = {
            "model": {"kind": "mlp", "hidden": 4},
            "objective": {"kind": "annealing_kd", "tau_max": 2, "stage1_epochs": 4, "stage2_epochs": 1},
            "optimizer": {"kind": "adamw", "lr": 1e-4},
        }
        for key in grid:
            first, _, second = key.partition(".")
            (block.get(first, {}) if second else block).pop(second or first, None)
        blocks.append(block | {"grid": grid})
    path.write_text(TEXT.split("students:")[0] + f"students: {json.dumps(blocks)}\n")
    return [student.name for student in load_recipe(path).students]


@pytest.mark.parametrize(
    ("grid", "more"),
    [
        ({"batch": [32, 64]}, ["batch32", "batch64"]),
        ({"batch": [32, 64], "threads": [1]}, ["batch32", "batch64"]),
        ({"optimizer.lr": [1, 0.01]}, ["lr1", "lr0.01"]),
        ({"objective.stage1_epochs": [10, 20]}, ["n10", "n20"]),
        ({"objective.stage2_epochs": [5, 6], "batch": [2, 3]}, ["m5-batch2", "m5-batch3", "m6-batch2", "m6-batch3"]),
        ({"precision": ["float32", "float64"]}, ["precision_float32", "precision_float64"]),
        ({"optimizer.schedule.kind": ["linear", "constant"]}, ["schedule_linear", "schedule_constant"]),
        ({"optimizer.clip": [None, 0.5]}, ["clip_none", "clip0.5"]),
        ({"sync_batchnorm": [True, False]}, ["sync_batchnorm_true", "sync_batchnorm_false"]),
        ({"optimizer.betas": [[0.9, 0.99], [0.9, 0.999]]}, ["betas0.9x0.99", "betas0.9x0.999"]),
        ({"optimizer.weight_decay": [1e-5, 100.0, 0.1234567891]}, ["wd1e-05", "wd100", "wd0.1234567891"]),
        (
            {"objective.stage2_optimizer": [None, {"kind": "sgd", "lr": 0.1}]},
            ["stage2_optimizer_none", "stage2_optimizer_sgd-lr0.1"],
        ),
    ],
)
def test_names_of_a_grid_tell_what_default_names_do_not(
    path: Path, grid: dict[str, list[Any]], more: list[str]
) -> None:
    assert names_of(path, grid) == [f"{MLP}-{one}-{SEED}" for one in more]


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        # These are as they always were: default names tell them apart.
        ({"seed": [0, 1], "model": [{"kind": "mlp", "hidden": [4]}]}, [f"{MLP}-s0", f"{MLP}-s1"]),
        ({"model.hidden": [[4], [8]], "seed": [3]}, [f"mlp-{hidden}-annealing_kd-t2-s3" for hidden in (4, 8)]),
        (
            {"model.hidden": [4], "model.dropout": [0, 0.5]},
            [f"mlp-{label}-annealing_kd-t2-s0" for label in ("4", "4d0.5")],
        ),
        # The seed stays last, and what is told is not told twice.
        (
            {"optimizer.lr": [0.01, 0.1], "model": [{"kind": "mlp", "hidden": 4}, {"kind": "cnn", "width": 2}]},
            [f"{model}-annealing_kd-t2-lr{lr}-s0" for lr in ("0.01", "0.1") for model in ("mlp-4", "cnn-2")],
        ),
        (
            {"objective.tau_max": [2, 3], "seed": [0, 7], "objective.stage1_epochs": [3, 6]},
            [f"mlp-4-annealing_kd-t{tau}-n{n}-s{seed}" for tau in (2, 3) for seed in (0, 7) for n in (3, 6)],
        ),
        # Students without a key go without it.
        (
            {
                "objective": [
                    {"kind": "kd", "epochs": 3},
                    {"kind": "kd", "epochs": 3, "alpha": 0.1},
                    {"kind": "hard_labels", "epochs": 4},
                ]
            },
            ["mlp-4-kd-s0", "mlp-4-kd-alpha0.1-s0", "mlp-4-hard_labels-s0"],
        ),
        # Keys that end alike are told apart.
        (
            {
                "optimizer": [{"kind": "sgd", "lr": lr} for lr in (0.1, 1)],
                "objective.stage2_optimizer": [{"kind": "sgd", "lr": 1e-8}, {"kind": "sgd", "lr": 0.5}],
            },
            [
                f"{MLP}-optimizer_lr{first}-stage2_optimizer_lr{second}-s0"
                for first in ("0.1", "1")
                for second in ("1e-08", "0.5")
            ],
        ),
    ],
)
def test_names_of_a_grid_hold_no_more_than_they_must(path: Path, grid: dict[str, list[Any]], names: list[str]) -> None:
    assert names_of(path, grid) == names


def test_a_name_depends_on_its_block_alone(path: Path) -> None:
    first = names_of(path, {"batch": [1, 2]})
    second = [f"{MLP}-s{seed}" for seed in (3, 4)]
    assert names_of(path, {"batch": [1, 2]}, {"threads": [3], "seed": [3, 4]}) == first + second
    with pytest.raises(RecipeError, match=r"several students are named .*-batch2-s0.*a default name holds"):
        names_of(path, {"batch": [1, 2]}, {"batch": [2, 3]})


def test_long_and_strange_values_make_names_of_folders() -> None:
    strange: list[Any] = ["x/y", "x:y", "z" * 200, "z" * 201, ["é", 1], {}, True]
    given: list[dict[tuple[str, ...], Any]] = [{("model", "arguments", "a b"): value} for value in strange]
    names = names_of_grid(["net-kd-s7"] * len(given), given)
    assert len({name.casefold() for name in names}) == len(names)
    assert all(recipes.NAME.fullmatch(name) for name in names)
    assert names[0].startswith("net-kd-a_b_x_y.")
    assert names[-2:] == ["net-kd-s7", "net-kd-a_b_true-s7"]
    many: list[dict[tuple[str, ...], Any]] = [
        {("model", f"quite_a_long_key_{key}"): value + key for key in range(9)} for value in (0, 1)
    ]
    names = names_of_grid(["net-kd-s7"] * 2, many)
    assert len(set(names)) == 2
    assert all(re.fullmatch(r"net-kd-[0-9a-f]{8}-s7", name) for name in names)


def test_numbers_are_those_of_yaml_1_2(path: Path) -> None:
    path.write_text(TEXT + "checkpoint_seconds: 0x10\ncohorts: 0o2\n")
    recipe = load_recipe(path, ["data.seed=1_000"])
    assert recipe.students[0].optimizer.lr == 1e-4
    assert type(recipe.students[0].optimizer.lr) is float
    assert (recipe.checkpoint_seconds, recipe.cohorts, recipe.data.seed) == (16.0, 2, 1000)


def test_words_that_yaml_1_1_takes_for_booleans_are_words(path: Path) -> None:
    assert load_recipe(path, ["name=on"]).name == "on"


def test_defaults_are_filled_in(path: Path) -> None:
    recipe = load_recipe(path)
    assert (recipe.data.validation, recipe.data.test, recipe.cache.encoding.kind) == (0.1, 0.2, "float32")
    assert recipe.students[0].optimizer == AdamW(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
    assert recipe.students[-1].optimizer == Sgd(lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False)


@pytest.mark.parametrize(
    ("model", "label"),
    [
        (Mlp(hidden=16), "mlp-16"),
        (Mlp(hidden=[32, 16]), "mlp-32x16"),
        (Cnn(width=8), "cnn-8"),
        (Cnn(width=8, depth=3), "cnn-8d3"),
        (
            Custom(factory="nets.small:tiny_net", arguments={"width": 3, "act": "re lu", "extra": [1]}),
            "tiny_net-width3-actre_lu",
        ),
    ],
)
def test_labels(model: recipes.Model, label: str) -> None:
    assert model.label == label
    student = StudentSpec(model=model, objective=HardLabels(epochs=1), optimizer=Sgd(lr=0.1), seed=7)
    assert student.name == f"{label}-hard_labels-s7"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.metric=pearson", ["metric pearson is not one of classification", "accuracy, f1, matthews"]),
        ("data.augmentation={kind: token_mask}", ["token_mask is for text", "data.text"]),
        ("data={train: {kind: digits}, text: {kind: bytes}, normalize: {mean: [0.0], std: [1.0]}}", ["normalize is"]),
        ("data.train={kind: huggingface}", ["give either a path or a name"]),
        ("data.train={kind: huggingface, name: mnist}", ["needs a split"]),
        ("data.augmentation={kind: random_resized_crop_flip, scale: [0.9, 0.1]}", ["both must rise"]),
        ("teacher.model={kind: resnet, depth: 9}", ["depth 9 is not 6n + 2"]),
        ("teacher.model={kind: text_transformer, width: 10, heads: 4}", ["width 10 is not a multiple of heads, 4"]),
        ("teacher.model={kind: timm, name: a, arguments: {checkpoint_path: a.pth}}", ["checkpoint_path", "pickle"]),
        ("students.1.objective={kind: takd, epochs: 2}", ["needs a teacher.assistant"]),
        ("students.1.objective={kind: continuation_kd, tau_max: 5, epochs: 4}", ["epochs is 4 and tau_max is 5"]),
        ("teacher.assistant={model: {kind: mlp, hidden: 4}, objective: {kind: kd, epochs: 1}, optimizer: {kind: sgd, "
         "lr: 0.1}}", ["nobody would use it"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, [override])
    for word in words:
        assert word in str(refused.value)


def test_a_chain_of_assistants(path: Path) -> None:
    inner = "{model: {kind: mlp, hidden: 4}, objective: {kind: kd, epochs: 1}, optimizer: {kind: sgd, lr: 0.1}}"
    link = inner.replace("hidden: 4", "hidden: 6")[:-1] + f", assistant: {inner}}}"
    recipe = load_recipe(path, [f"teacher.assistant={link}", "students.1.objective={kind: takd, epochs: 2}"])
    assert [assistant.model.label for assistant in recipe.teacher.chain] == ["mlp-6", "mlp-4"]
    assert recipe.students[-1].objective.learns_from == "assistant"


def test_every_path_of_a_recipe_becomes_absolute(path: Path) -> None:
    text = TEXT.replace("train: {kind: digits}", "train: {kind: idx, images: a.gz, labels: ../b.gz}")
    text = text.replace("  views: 2", "  text: {kind: huggingface, path: tok}\n  views: 2")
    text = text.replace("kind: cnn, width: 8", "kind: huggingface, path: model")
    path.write_text(text)
    recipe = load_recipe(path)
    here = path.resolve().parent
    train, model = recipe.data.train, recipe.teacher.model
    assert isinstance(train, recipes.Idx)
    assert isinstance(model, recipes.HuggingFaceModel)
    assert (train.images, train.labels) == (str(here / "a.gz"), str(here / "../b.gz"))
    assert recipe.data.text is not None
    assert (recipe.data.text.path, model.path) == (str(here / "tok"), str(here / "model"))  # type: ignore[union-attr]


def test_annealing_counts_the_epochs_of_both_stages() -> None:
    assert AnnealingKD(tau_max=5, stage1_epochs=5, stage2_epochs=2).epochs == 7


@pytest.mark.parametrize("written", ["s3:/bucket/rows", "gs:bucket/rows"])
def test_a_uri_that_lacks_a_slash_is_no_folder(path: Path, written: str) -> None:
    source = f"{{kind: parquet, path: '{written}'}}"
    with pytest.raises(RecipeError, match=r"is no place in object storage(.|\n)*write (s3|gs)://bucket/rows"):
        load_recipe(path, [f"data.train={source}"])


def test_recipes_are_frozen_and_typed(path: Path) -> None:
    recipe = load_recipe(path)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"
    with pytest.raises(ValidationError, match="valid integer"):
        recipes.DataSpec.model_validate({"train": {"kind": "digits"}, "views": True})


# ---- paths


def test_paths_of_the_file_are_relative_to_its_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent.parent)
    parquet = "{kind: parquet, path: rows/*.parquet, input: image, label: label}"
    path.write_text(TEXT.replace("{kind: digits}", parquet))
    recipe = load_recipe(Path(path.parent.name) / path.name)
    assert isinstance(recipe.data.train, recipes.Parquet)
    assert recipe.data.train.path == str(path.parent / "rows/*.parquet")
    assert recipe.folder == str(path.parent)


def test_paths_of_overrides_start_at_the_working_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(path, ["teacher={weights: runs/a/students/b}", "folder=code"])
    assert recipe.teacher.weights == str(elsewhere / "runs/a/students/b")
    assert recipe.folder == str(elsewhere / "code")


def test_arguments_stay_as_they_are(path: Path) -> None:
    """In a grid too, where the key of an argument is dotted."""
    own = "{kind: custom, factory: 'mine:make', arguments: {path: a, labels: [b]}}"
    text = TEXT.replace("{kind: cnn, width: 2}", own)
    text = text.replace("{kind: mlp}", "{kind: custom, factory: 'mine:make'}")
    path.write_text(text.replace("model.hidden: [4, 8]", "model.arguments.path: [c]"))
    recipe = load_recipe(path)
    found = [student.model.arguments for student in recipe.students if isinstance(student.model, Custom)]
    assert found == [{"path": "c"}] * 3 + [{"path": "a", "labels": ["b"]}]


def test_uris_stay_as_they_are(path: Path) -> None:
    assert load_recipe(path, ["teacher={weights: s3://bucket/model}"]).teacher.weights == "s3://bucket/model"


# ---- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.views=5", 5),
        ("data.augmentation={kind: shift, pixels: 3}", recipes.Shift(pixels=3)),
        ("students.1.batch=32", 32),
        ("students.1.optimizer.lr=1e-3", 1e-3),
        ("students.1.optimizer.schedule.kind=linear", recipes.Linear()),
        ("cohorts=", None),
    ],
)
def test_overrides(path: Path, override: str, value: Any) -> None:
    node: Any = load_recipe(path, [override])
    for key in override.split("=")[0].removesuffix(".kind").split("."):
        node = node[-1] if key == "1" else node if isinstance(node, list) else getattr(node, key)
    assert node == value


def test_an_override_reaches_into_a_grid(path: Path) -> None:
    recipe = load_recipe(path, ["students.0.grid.model.hidden=[3]", "students.0.grid.seed=[9]"])
    assert [student.name for student in recipe.students] == ["mlp-3-annealing_kd-t2-s9", "cnn-2-hard_labels-s0"]


def test_the_last_override_wins(path: Path) -> None:
    assert load_recipe(path, ["data.views=5", "data.views=6"]).data.views == 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.vews=3", ["--set data.vews=3", "did you mean views?"]),
        ("students.1.lr=3", ["did you mean optimizer.lr?"]),
        ("students.0.grid.model.hiden=[1]", ["key students.0.grid.model.hiden", "did you mean hidden?"]),
        ("students.0.seed=1", ["--set students.0.seed=1", "in the block and in its grid", "students.0.grid.seed"]),
        ("students.7.seed=1", ["students has no 7", "a number from 0 to 1"]),
        ("data.views.x=1", ["data.views has no x", "got: 2"]),
        ("views", ["is not key=value", "data.views=4"]),
        ("=3", ["is not key=value"]),
        ("data.views=[", ["--set data.views=[: this is not YAML"]),
        ("data.views=many", ['key data.views cannot be "many"', "a valid integer"]),
        ("data={}", ["key data.train is missing", "a mapping: the rows to train on"]),
    ],
)
def test_a_bad_override_names_itself(path: Path, override: str, words: list[str]) -> None:
    message = str(refusal(path, None, override))
    for word in words:
        assert word in message


# ---- refusals: each names file, line and key


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("views: 2", "vews: 2", ["small.yaml:4: key data.vews is not known; did you mean views?", "one of train,"]),
        ("views: 2", "views: 0", ["small.yaml:4: key data.views cannot be 0", "greater than or equal to 1"]),
        ("views: 2", "views: 2.0", ["key data.views cannot be 2.0", "a valid integer"]),
        ("views: 2", "views: yes", ['key data.views cannot be "yes"']),
        ("views: 2", "views: true", ["key data.views cannot be true"]),
        ("views: 2", "normalize: {mean: [1], std: [1, 2]}", ["small.yaml:4", "mean has 1 numbers and std has 2"]),
        ("views: 2", "validation: 0.8\n  test: 0.2", ["0.8 + 0.2", "train needs some"]),
        (
            "views: 2",
            "validation: {path: x}",
            ["small.yaml:4: key data.validation needs a kind", "digits or idx or parquet"],
        ),
        ("views: 2", "validation: 1.5", ["key data.validation cannot be 1.5", "less than 1"]),
        ("lr: 1e-2", 'lr: "0.1"', ['small.yaml:10: key teacher.train.optimizer.lr cannot be "0.1"', "a valid number"]),
        ("lr: 1e-2", "lr: .nan", ["small.yaml:10: key teacher.train.optimizer.lr", "a finite number"]),
        (
            "stage1_epochs: 4, ",
            "",
            ["stage1_epochs is missing", "expected: a whole number of at least 1: epochs of stage I, at least tau_max"],
        ),
        ("lr: 1e-2", "momentum: 0.1", ["key teacher.train.optimizer.lr is missing", "a number above 0: learning rate"]),
        ("kind: shift", "kind: shft", ["small.yaml:5", "unknown kind; did you mean shift?", "none or shift"]),
        (
            "kind: cnn, width: 8",
            "kind: rnn",
            ["key teacher.model has an unknown kind", "mlp or cnn or plain_cnn or resnet"],
        ),
        ("  model: {kind: cnn, width: 8}", "  weights: here", ["small.yaml:6", "got weights and train"]),
        ("stage1_epochs: 4", "stage1_epochs: 1", ["small.yaml:16", "stage1_epochs is 1 and tau_max is 2"]),
        ("seed: [0, 1, 2]", "seed: [0, -1]", ["small.yaml:15: key students.0.grid.seed", "cannot be -1"]),
        ("seed: [0, 1, 2]", "seed: []", ["small.yaml:15: key students.0.grid.seed does not fit", "at least one value"]),
        ("seed: [0, 1, 2]", "batch: [2, 2]", ["mlp-4-annealing_kd-t2-s0", "blocks with a `name:` of their own"]),
        ("model.hidden: [4, 8]", "model: [4, 8]", ["model in the block and in its grid"]),
        ("name: small", "name: ../x", ["small.yaml:1", "cannot be a folder's name"]),
        ("name: small", "name: small\nname: large", ["small.yaml:2: duplicate key", "each key once"]),
        ("name: small", "name: &a small", ["small.yaml:1", "cannot have an anchor"]),
        ("name: small", "name: !!python/name:os.system small", ["small.yaml:1", "cannot have the tag"]),
        ("name: small", "<<: {name: small}", ["small.yaml:1", "cannot have a merge key"]),
        ("name: small", "name: 2020-01-01", ["small.yaml:1: key name", "put it in quotes"]),
        ("name: small", "1: small", ["small.yaml:1: a key must be a word"]),
        ("name: small", "name: [small", ["small.yaml:", "this is not YAML"]),
        ("name: small", "name: small\nextra: " + "[" * 500 + "]" * 500, ["small.yaml:2", "more than 40 levels"]),
        ("name: small", "name: small\ncohorts: " + "9" * 5000, ["small.yaml"]),
        ("students:", "students: []\nother:", ["key students is too short", "at least 1"]),
    ],
)
def test_refusals_name_file_line_and_key(path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in TEXT
    error = refusal(path, TEXT.replace(old, new, 1))
    for word in words:
        assert word in str(error)
    assert error.next


def test_all_problems_of_a_file_come_in_one_message(path: Path) -> None:
    text = TEXT.replace("views: 2", "views: 0\n  sed: 1").replace("kind: shift", "kind: shift, pixel: 1")
    error = refusal(path, text, "cache.encoding=float15", "teacher.train.epochs=0", "checkpoint_seconds=-1", "name=3")
    assert "has 7 problems" in error.what
    assert "did you mean seed?" in error.what


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "kind: shift, pixels: 1",
            "kind: shft, pixel: 1",
            ["augmentation has an unknown kind; did you mean shift?", "augmentation.pixel is not known; did you mean"],
        ),
        (
            "kind: cnn, width: 8",
            "kind: cn, widht: 8",
            ["did you mean cnn?", "model.width is missing", "model.widht is not known; did you mean width?"],
        ),
        (  # not even the second is told of one only: `width` is a key of some kind
            "kind: cnn, width: 8",
            "kind: frobnicate, width: 8, hiden: 8",
            ["teacher.model has an unknown kind", "teacher.model.hiden is not known; did you mean hidden?"],
        ),
        (
            "kind: cnn, width: 8",
            "widht: 8",
            ["key teacher.model needs a kind", "widht is not known; did you mean width?"],
        ),
        (
            "kind: adamw, lr: 1e-4",
            "kind: adamw, lr: 1e-4, schedule: {kind: linaer, steps: 3}",
            ["optimizer.schedule has an unknown kind; did you mean linear?", "optimizer.schedule.steps is not known"],
        ),
    ],
)
def test_an_unknown_kind_hides_no_further_mistake(path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in TEXT
    error = refusal(path, TEXT.replace(old, new, 1))
    assert f"has {len(words)} problems" in error.what
    for word in words:
        assert word in error.what


def test_unknown_kinds_within_unknown_kinds_are_told_at_once(path: Path) -> None:
    text = TEXT.replace("kind: adamw, lr: 1e-4", "kind: adam, learn: 1e-4, schedule: {kind: linaer}")
    told = refusal(path, text).what
    for word in ("did you mean adamw?", "optimizer.learn is not known", "optimizer.lr is missing", "mean linear?"):
        assert word in told


def test_a_problem_of_a_grid_is_told_once(path: Path) -> None:
    assert str(refusal(path, TEXT.replace("tau_max: 2", "tau: 2"))).count("tau_max is missing") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is not a recipe"), (b"- 1", "is not a recipe"), (b"\xff", "UTF-8"), (b"a: \x00", "is not YAML")],
)
def test_what_is_no_recipe_at_all(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    assert words in str(refusal(path))


def test_a_missing_recipe_and_a_folder(path: Path) -> None:
    assert "no such file" in str(refusal(path.parent / "nope.yaml"))
    assert "a folder" in str(refusal(path.parent))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_text_is_read_or_refused_and_never_crashes(path: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TEXT) - 1))
    stop = data.draw(st.integers(start, min(len(TEXT), start + 12)))
    path.write_text(TEXT[:start] + data.draw(st.text("{}[]:,-&*!|>'\"%@#?\n \t0e.~a", max_size=6)) + TEXT[stop:])
    with contextlib.suppress(RecipeError):
        assert load_recipe(path).students


# ---- resolved recipes


def test_a_resolved_recipe_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["students.1.optimizer.lr=1e-20", "name=on", "data.normalize={mean: [0], std: [1e16]}"])
    saved = tmp_path / "runs" / "recipe.yaml"
    saved.parent.mkdir()
    saved.write_text(recipe.to_yaml())
    assert saved.read_text().startswith("# ")
    assert load_recipe(saved) == recipe
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def test_identity_leaves_out_placement_and_paths(path: Path) -> None:
    parquet = "data.train={kind: parquet, path: %s, input: image, label: label}"
    placed = ["cohorts=3", "checkpoint_seconds=1", "folder=there"]
    here = load_recipe(path, [parquet % "here", "teacher={weights: here}"])
    there = load_recipe(path, [parquet % "there", "teacher={weights: there}", *placed])
    assert here.identity() == there.identity()
    assert here != there


def test_differences_name_keys_and_students(path: Path) -> None:
    ours, theirs = load_recipe(path), load_recipe(path, ["data.seed=1", "students.1.batch=32", "students.1.name=x"])
    told = recipes.differences(ours.identity(), theirs.identity())
    assert "data.seed: 0 -> 1" in told
    assert "students.x.batch: nothing -> 32" in told
    assert "students.cnn-2-hard_labels-s0.batch: 64 -> nothing" in told
    assert recipes.differences(ours.identity(), ours.identity()) == []


# ---- schemas and documentation


def test_shipped_schemas_are_up_to_date() -> None:
    assert {file.name for file in SCHEMAS.iterdir()} == {f"{name}.schema.json" for name in schemas()}
    for name, schema in schemas().items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert (SCHEMAS / f"{name}.schema.json").read_text() == schema_text(name), "run python -m akd_dist.documents"


def test_the_recipe_schema_agrees_with_the_reader(path: Path) -> None:
    document = YAML(typ="safe", pure=True).load(path)
    validator = jsonschema.Draft202012Validator(schemas()["recipe"])
    assert validator.is_valid(document)
    for keys, value in (
        (("data", "vews"), 1),
        (("data", "views"), 0),
        (("data", "train"), {}),
        (("students", 0, "bacth"), 1),
        (("students", 0, "optimizer", "kind"), "sdg"),
        (("students", 1, "model"), {"kind": "cnn"}),
    ):
        wrong = copy.deepcopy(document)
        node = wrong
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        assert not validator.is_valid(wrong), keys


def test_every_key_is_documented_with_its_default() -> None:
    assert every_key() in (ROOT / "docs" / "reference" / "recipe.md").read_text(), "run python -m tests.reference"


def test_every_part_of_a_recipe_is_documented() -> None:
    listed = {spec for specs in SECTIONS.values() for spec in specs}
    found = [value for value in vars(recipes).values() if isinstance(value, type) and issubclass(value, recipes.Spec)]
    shared = (recipes.Spec, recipes.Factory, recipes.Training, recipes.Learning, recipes.Table, recipes.Distilled)
    assert {spec for spec in found if spec not in shared} == listed


def test_the_home_folder_may_be_written_as_a_tilde(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file, in overrides and as the recipe's own path; one that nobody knows is a refusal."""
    monkeypatch.setenv("HOME", str(tmp_path))
    read = load_recipe("~/small.yaml", ["teacher={weights: ~/teacher}", "data.train={kind: parquet, path: ~/rows}"])
    assert read.teacher.weights == str(tmp_path / "teacher")
    assert isinstance(read.data.train, recipes.Parquet)
    assert read.data.train.path == str(tmp_path / "rows")
    assert read.folder == str(tmp_path)
    for unknown in (["teacher={weights: ~nobody-of-this-name/teacher}"], []):
        with pytest.raises(RecipeError, match=r"the home folder in ~nobody-of-this-name/.* is not known"):
            load_recipe(path if unknown else "~nobody-of-this-name/small.yaml", unknown)


def test_a_later_key_leaves_earlier_results_as_they_are(tmp_path: Path) -> None:
    """The identity of a run and the name of a trained teacher, as they were before there was `last_batch`."""
    plain = {"model": {"kind": "mlp", "hidden": 4}, "objective": KD, "optimizer": ADAMW}
    train: dict[str, Any] = {"epochs": 1, "optimizer": ADAMW}
    teacher: dict[str, Any] = {"model": {"kind": "cnn", "width": 8}, "train": train, "assistant": plain}
    students = [a_student("one"), a_student("two", objective={"kind": "takd", "epochs": 1})]
    ours = a_recipe(students, teacher=teacher, device="cpu")
    assert sha256(canonical_json(ours.identity())) == IDENTITY
    splits = prepare(ours.data, tmp_path)

    def name_of(recipe: Recipe) -> str:
        trained = teacher_of(recipe, splits)
        assert trained is not None
        return trained.spec.name

    assert name_of(ours) == TEACHER
    other = a_recipe(students, teacher=teacher | {"train": train | {"last_batch": "merge"}}, device="cpu")
    assert name_of(other) != TEACHER
    dropped = {"last_batch": "drop"}
    for changed in (
        other,
        a_recipe([students[0], students[1] | dropped], teacher=teacher, device="cpu"),
        a_recipe(students, teacher=teacher | {"assistant": plain | dropped}, device="cpu"),
    ):
        assert changed.identity() != ours.identity()


IDENTITY = "912f106014aee16c112d96b3a47001167847f0eec0add1d73e51af1123bf1d3e"
TEACHER = "0d51d787c8d43c532c5978ec845f75dd"


# ---- rows without labels

UNLABELLED = {"train": {"kind": "digits"}, "subset": 100, "unlabelled": "rest"}
TABLES = {name: {"kind": "parquet", "path": f"{name}.parquet"} for name in ("validation", "test", "unlabelled")}
WEIGHTS = {"weights": "teacher"}


def learner(**changes: Any) -> dict[str, Any]:
    optimizer = {"kind": "adamw", "lr": 1e-3}
    return {"model": {"kind": "mlp", "hidden": 8}, "optimizer": optimizer, "name": "one"} | changes


@pytest.mark.parametrize(
    ("data", "student", "words"),
    [
        ({"train": {"kind": "digits"}, "unlabelled": "rest"}, {}, "set subset as well"),
        (TABLES | {"validation": 0.1}, {}, "no rows with labels to take validation from"),
        (TABLES | {"subset": 5}, {}, "subset and stratify are for rows with labels"),
        (UNLABELLED | {"train": {"kind": "idx", "images": "a"}}, {}, "train.labels is missing"),
        (UNLABELLED, {"labelled": 64}, "labelled is 64 and batch is 64"),
        (UNLABELLED, {"labelled": 4, "objective": {"kind": "hard_labels", "epochs": 3}}, "leave it out"),
        (
            {"train": {"kind": "digits"}},
            {"labelled": 4},
            "one has labelled: 4, and data.unlabelled names no",
        ),
        (TABLES, {}, "the student one learns from labels (kd), and no train row has one"),
        (TABLES, {"objective": {"kind": "hard_labels", "epochs": 3}}, "use kd with alpha: 1"),
    ],
)
def test_rows_without_labels_are_refused_where_they_make_no_sense(
    data: dict[str, Any], student: dict[str, Any], words: str
) -> None:
    student = learner(objective={"kind": "kd", "epochs": 3}) | student
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"name": "r", "data": data, "teacher": WEIGHTS, "students": [student]})
    assert words in str(caught.value)


def test_without_labels_a_teacher_cannot_be_trained_here() -> None:
    kd = learner(objective={"kind": "kd", "epochs": 3, "alpha": 1.0})
    train = {"model": {"kind": "mlp", "hidden": 8}, "train": {"epochs": 1, "optimizer": {"kind": "adamw", "lr": 1e-3}}}
    with pytest.raises(ValidationError, match=r"teacher\.train needs labels"):
        Recipe.model_validate({"name": "r", "data": TABLES, "teacher": train, "students": [kd]})
    valid = Recipe.model_validate({"name": "r", "data": TABLES, "teacher": WEIGHTS, "students": [kd]})
    assert list(valid.data.sources) == ["validation", "test", "unlabelled"]


def test_a_teacher_of_all_rows_needs_a_subset_that_leaves_some_out() -> None:
    kd = learner(objective={"kind": "kd", "epochs": 3})
    optimizer = {"kind": "adamw", "lr": 1e-3}
    train = {"rows": "all", "epochs": 1, "optimizer": optimizer}
    document = {"name": "r", "teacher": {"model": {"kind": "mlp", "hidden": 8}, "train": train}, "students": [kd]}
    with pytest.raises(ValidationError, match=r"teacher\.train\.rows: all is for rows that data\.subset leaves out"):
        Recipe.model_validate(document | {"data": {"train": {"kind": "digits"}}})
    recipe = Recipe.model_validate(document | {"data": UNLABELLED})
    assert recipe.data_of_teachers is not None
    assert (recipe.data_of_teachers.subset, recipe.data_of_teachers.unlabelled) == (None, None)


def test_what_is_not_asked_for_is_not_in_an_identity() -> None:
    """Runs of before are the same runs."""
    kd = learner(objective={"kind": "kd", "epochs": 3})
    plain = Recipe.model_validate(
        {"name": "r", "data": {"train": {"kind": "digits"}}, "teacher": WEIGHTS, "students": [kd]}
    ).identity()
    assert "unlabelled" not in plain["data"]
    assert "labelled" not in plain["students"]["one"]
    given = Recipe.model_validate(
        {"name": "r", "data": UNLABELLED, "teacher": WEIGHTS, "students": [kd | {"labelled": 3}]}
    ).identity()
    assert given["data"]["unlabelled"] == "rest"
    assert given["students"]["one"]["labelled"] == 3
