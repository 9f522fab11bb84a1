"""Recipes: what is read, what is filled in, what is refused, and in which words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from akd_dist import recipe as recipes
from akd_dist.base.errors import RecipeError
from akd_dist.documents.json_schema import SCHEMAS, schema_text, schemas
from akd_dist.recipe import AdamW, AnnealingKD, Cnn, Custom, HardLabels, Mlp, Sgd, StudentSpec, load_recipe
from tests.recipe_texts import TEXT, refusal
from tests.reference import SECTIONS, every_key

ROOT = Path(__file__).parents[2]


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


def test_smollm2_is_taught_in_the_same_ways_at_both_sizes() -> None:
    large, small = (load_recipe(ROOT / "jobs" / f"smollm2{size}.yaml") for size in ("", "_small"))

    def ways(recipe: recipes.Recipe) -> set[tuple[str, str]]:
        later = {"epochs", "stage1_epochs", "stage2_epochs"}
        return {(one.model.kind, one.objective.model_dump_json(exclude=later)) for one in recipe.students}

    assert ways(large) == ways(small)
    assert len(ways(small)) == 5


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
        ("students.1.objective={kind: takd, epochs: 2}", ["takd learns from an assistant"]),
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
        ("name.k=500", ["name has no k", "give the whole of it"]),
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
