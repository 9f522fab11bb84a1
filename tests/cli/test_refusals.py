"""What a user may get wrong, one case each: the exit code, and a message with what, got, expected and the next step."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import akd_dist
from akd_dist.base.errors import RecipeError
from akd_dist.cli import main
from akd_dist.data.row_cache import prepare
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import Custom
from tests import stores
from tests.fleets import a_recipe, a_student, a_teacher, own

NUMBERS = itertools.count()
MODELS = """
import torch

class Blank(torch.nn.Module):
    def __init__(self, inputs, classes, logit):
        super().__init__()
        self.layer, self.logit = torch.nn.Linear(inputs, classes), logit

    def forward(self, x):
        return self.layer(x.flatten(1)) * 0 + self.logit

def blank(input_shape, classes, logit=0.0, more_classes=0):
    return Blank(input_shape[0] * input_shape[1] * input_shape[2], classes + more_classes, float(logit))

def broken(input_shape, classes):
    raise ZeroDivisionError("a mistake of the user's own")
"""


class Place:
    """A folder with a recipe file, and the command line to run there."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        self.stores, self.cache = root / "stores", root / "cache"
        self.models = f"user_models_{next(NUMBERS)}"  # a process imports a name from one folder only
        (root / f"{self.models}.py").write_text(MODELS)
        self.recipe = a_recipe(
            [a_student("one")],
            teacher={"weights": a_teacher(a_recipe([a_student("any")]), root / "teacher", self.cache)},
        )
        self.write(self.recipe.to_yaml())

    def write(self, text: str) -> None:
        (self.root / "recipe.yaml").write_text(text)

    def parquet(self, **columns: Any) -> str:
        """A Parquet file, and the recipe changed to read it."""
        pq.write_table(pa.table(columns), self.root / "data.parquet")
        return f"data.train={{kind: parquet, path: {self.root / 'data.parquet'}, input: pixels, label: label}}"

    def run(self, *arguments: str, command: str = "train-students") -> tuple[int, dict[str, Any], str]:
        """Exit code, the error document and what was written to stderr."""
        places = ["--store-root", str(self.stores), "--cache-root", str(self.cache)]
        if command == "train-students":
            places += ["--run-root", str(self.root / "runs")]
        with pytest.raises(SystemExit) as left:
            main([command, str(self.root / "recipe.yaml"), *places, "--json", *arguments])
        out, err = self.capsys.readouterr()
        document = json.loads(out).get("error", {})
        return int(left.value.code or 0), document, err

    def refuse(self, code: int, *arguments: str, command: str = "train-students") -> str:
        """The message of a refusal with this exit code; checked to be whole, and no traceback."""
        got, error, err = self.run(*arguments, command=command)
        assert (got, error["code"]) == (code, code), err
        assert "Traceback" not in err
        for part in ("what", "got", "expected", "next"):
            assert error[part], f"{part} is missing: {error}"
            assert error[part].splitlines()[0] in err
        assert not list(self.root.rglob("*.ckpt")), "a student took a step"
        return f"{error['what']}\n{error['got']}\n{error['expected']}\n{error['next']}"


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, capsys)


def pixels(rows: int) -> pa.Array:
    return pa.array(np.zeros((rows, 4), dtype=np.uint8).tolist(), type=pa.list_(pa.uint8()))


def test_a_missing_recipe(place: Place) -> None:
    (place.root / "recipe.yaml").rename(place.root / "recipes.yaml")
    assert "recipe.yaml" in place.refuse(2)


def test_a_missing_data_file(place: Place) -> None:
    setting = place.parquet(pixels=pixels(20), label=[0, 1] * 10)
    (place.root / "data.parquet").rename(place.root / "date.parquet")
    assert "date.parquet" in place.refuse(4, "--set", setting)


def test_a_missing_column_names_those_there_are(place: Place) -> None:
    message = place.refuse(4, "--set", place.parquet(pixels=pixels(20), labels=[0, 1] * 10))
    assert "no column label" in message
    assert "labels" in message


def test_a_label_out_of_range_names_its_row(place: Place) -> None:
    setting = place.parquet(pixels=pixels(20), label=[0, 1] * 8 + [0, -3, 1, 0])
    message = place.refuse(4, "--set", setting)
    assert "row 17" in message
    assert "-3" in message


def test_a_teacher_for_other_data(place: Place) -> None:
    message = place.refuse(
        4,
        *("--set", place.parquet(pixels=pixels(20), label=[0, 1] * 10)),
        *("--set", "data.augmentation={kind: none}", "--set", "data.views=1"),
    )
    assert "[1, 8, 8]" in message
    assert "10 classes" in message


def test_a_student_with_another_class_count(place: Place) -> None:
    custom = f"students.0.model={{kind: custom, factory: {place.models}:blank, arguments: {{more_classes: 3}}}}"
    message = place.refuse(4, "--set", custom)
    assert "13" in message
    assert "[2, 10]" in message
    assert not place.stores.exists(), "the teacher ran before the student was refused"


def test_an_unknown_model_suggests_the_nearest(place: Place) -> None:
    message = place.refuse(2, "--set", "students.0.model={kind: mpl, hidden: 3}")
    assert "mpl" in message
    assert "mlp" in message


def test_an_unknown_factory(place: Place) -> None:
    message = place.refuse(4, "--set", f"students.0.model={{kind: custom, factory: {place.models}:blanck}}")
    assert "blank" in message


def test_a_mistake_in_a_users_own_code_is_shown_whole(place: Place) -> None:
    code, error, _ = place.run("--set", f"students.0.model={{kind: custom, factory: {place.models}:broken}}")
    assert code == 4
    assert "a mistake of the user's own" in error["got"]
    assert f"{place.models}.py" in error["got"]


@pytest.mark.parametrize(
    ("override", "told"), [("data.seeds=1", "data.seed"), ("students.0.batch=none", "batch"), ("nonsense", "nonsense")]
)
def test_a_bad_override(place: Place, override: str, told: str) -> None:
    assert told in place.refuse(2, "--set", override)


def test_too_few_epochs_for_the_temperatures(place: Place) -> None:
    message = place.refuse(
        2, "--set", "students.0.objective={kind: annealing_kd, tau_max: 9, stage1_epochs: 4, stage2_epochs: 1}"
    )
    assert "9" in message
    assert "4" in message


def test_a_store_root_that_cannot_be_written(place: Place) -> None:
    place.stores.write_text("a file where the folder should be")
    assert "stores" in place.refuse(6, command="cache-teacher")


def test_a_run_root_that_cannot_be_written(place: Place) -> None:
    (place.root / "runs").write_text("a file where the folder should be")
    assert "runs" in place.refuse(6)


@pytest.mark.parametrize(
    ("option", "holds", "variable"),
    [("--run-root", "runs", "AKD_DIST_RUN_ROOT"), ("--cache-root", "a cache", "AKD_DIST_CACHE")],
)
def test_a_root_in_object_storage_that_needs_a_folder(
    option: str, holds: str, variable: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)

    def nothing_expensive(*_: Any, **__: Any) -> Any:
        pytest.fail("rows were looked at")

    monkeypatch.setattr("akd_dist.jobs.train_students.open_rows", nothing_expensive)
    before = sorted(place.root.rglob("*"))
    message = place.refuse(2, option, "s3://bucket/there")
    for word in ("'s3://bucket/there'", f"no place for {holds}", option, "--store-root"):
        assert word in message
    # The same by the environment, where the option is not given; the path of a local `s3:` folder is never made.
    monkeypatch.setenv(variable, "s3://bucket/there")
    with pytest.raises(SystemExit) as left:
        main(["train-students", "recipe.yaml", "--store-root", "stores", *other_root(option)])
    assert left.value.code == 2
    assert f"no place for {holds}" in place.capsys.readouterr().err
    assert sorted(place.root.rglob("*")) == before


@pytest.mark.parametrize("option", ["--run-root", "--store-root", "--cache-root"])
@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_root_that_documents_could_not_name(option: str, words: tuple[str, ...], place: Place) -> None:
    before = sorted(place.root.rglob("*"))
    assert option in place.refuse(2, *words, option, str(place.root / "\udcff"))
    assert sorted(place.root.rglob("*")) == before


def test_a_recipe_in_a_folder_that_documents_could_not_name(place: Place) -> None:
    odd = place.root / "\udcff"
    odd.mkdir()
    (place.root / "recipe.yaml").rename(odd / "recipe.yaml")
    (place.root / "recipe.yaml").symlink_to(odd / "recipe.yaml")
    assert "UTF-8" in place.refuse(2, "--dry-run")


@pytest.mark.parametrize("words", ["report a-run", "predict a-student digits", "export a-student --to onnx"])
def test_what_is_written_goes_to_this_machine(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is looked at: there is neither such a run nor such a student."""
    monkeypatch.chdir(tmp_path)
    for place in ("s3://bucket/there", "\udcff"):
        with pytest.raises(SystemExit) as left:
            main([*words.split(), "--out", place])
        assert left.value.code == 2
        assert "--out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        *(
            (verb, {"recipe": wrong})
            for verb in ("cache_teacher", "train_students")
            for wrong in (dict[str, Any](), None, 3, b"x")
        ),
        ("cache_teacher", {"recipe": "r.yaml", "overrides": None}),
        ("train_students", {"recipe": "r.yaml", "overrides": "name=x"}),
        ("train_students", {"recipe": "r.yaml", "trackers": "mlflow"}),
        ("train_students", {"recipe": "r.yaml", "trackers": ["tensorflow"]}),
        ("train_students", {"recipe": "r.yaml", "fresh": 1}),
        ("train_students", {"recipe": "r.yaml", "run_root": 3}),
        ("train_students", {"recipe": "r.yaml", "trust": [3]}),
        ("compare", {"recipe": "r.yaml", "seeds": "3"}),
        ("compare", {"recipe": "r.yaml", "seeds": True}),
        ("evaluate", {"student": "s", "data": "digits", "others": "another"}),
        ("evaluate", {"student": "s", "data": "digits", "device": "tpu"}),
        ("evaluate", {"student": "s", "data": None}),
        ("evaluate", {"student": None, "data": "digits"}),
        ("predict", {"student": "s", "data": "digits", "split": "dev"}),
        ("predict", {"student": "s", "data": "digits", "input": 3}),
        ("predict", {"student": "s", "data": "digits", "logits": None}),
        ("export", {"student": "s", "to": "tflite"}),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_by_name(verb: str, given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refused:
        getattr(akd_dist, verb)(**given)
    wrong: str = "student" if given.get("student", "") is None else list(given)[-1]
    assert f"the argument {wrong} is not what it takes" in str(refused.value)


@pytest.mark.parametrize("verb", ["cache_teacher", "train_students", "compare"])
def test_overrides_of_a_recipe_that_is_no_file_are_refused(verb: str) -> None:
    """They changed nothing, and nobody was told."""
    with pytest.raises(RecipeError, match="overrides are for the file"):
        getattr(akd_dist, verb)(a_recipe([a_student("one")]), overrides=["name=other"])


def other_root(option: str) -> list[str]:
    return ["--cache-root", "cache"] if option == "--run-root" else ["--run-root", "runs"]


def test_a_store_that_cannot_fit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from akd_dist.storage.objects import LocalRoot

    monkeypatch.setattr(LocalRoot, "free_bytes", lambda self: 100_000)
    message = place.refuse(6, "--dry-run", command="cache-teacher")
    assert "100,000 bytes free" in message


def deleted(shard: Path, _other: Path) -> None:
    shard.unlink()


def truncated(shard: Path, _other: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def swapped(shard: Path, other: Path) -> None:
    kept = shard.read_bytes()
    shard.write_bytes(other.read_bytes())
    other.write_bytes(kept)


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("damage", [deleted, truncated, swapped])
def test_a_damaged_store_is_refused_found_and_repaired(
    place: Place, damage: Callable[[Path, Path], None], decoded: bool
) -> None:
    document = cache_in_process(
        place.recipe, str(place.root / "teacher"), store_root=str(place.stores), cache_root=str(place.cache)
    )
    store = Path(document["store"])
    if decoded:
        from akd_dist.storage.reader import open_store

        stores.decoded(open_store(str(store)), place.cache)
    shard, other = (store / "arrays.zarr" / "logits" / "c" / "1" / str(n) / "0" for n in (0, 1))
    sealed = shard.read_bytes()
    damage(shard, other)
    message = place.refuse(5)
    assert "logits/c/1/0/0" in message
    repair = f"akd-dist stores repair {document['id']}"
    assert repair in message
    with pytest.raises(SystemExit) as left:
        main(["stores", "verify", document["id"][:12], "--store-root", str(place.stores)])
    assert left.value.code == 5
    assert "logits/c/1/0/0" in place.capsys.readouterr().err
    roots = ["--store-root", str(place.stores), "--cache-root", str(place.cache)]
    with pytest.raises(SystemExit) as left:
        main(["stores", "repair", document["id"][:12], *roots])
    assert left.value.code == 0
    assert shard.read_bytes() == sealed
    assert not (place.stores / f"{document['id']}.damaged").exists()


@pytest.mark.ray
@pytest.mark.parametrize(("logit", "encoding"), [("NaN", "float32"), (70000.0, "float16")])
def test_a_teacher_that_is_not_finite(place: Place, ray_cluster: None, logit: Any, encoding: str) -> None:
    model = own(Custom(factory=f"{place.models}:blank", arguments={"logit": logit}), place.root)
    card = ModelCard.of(model, prepare(place.recipe.data, place.cache).train, None)
    save_model(place.root / "nan", build(card), card)
    overrides = ["--set", f"teacher={{weights: {place.root / 'nan'}}}", "--set", f"cache.encoding={encoding}"]
    overrides += ["--set", f"folder={place.root}"]
    assert f"--trust {place.models}" in place.refuse(4, *overrides)  # the recipe does not name its code
    message = place.refuse(4, *overrides, "--trust", place.models)
    assert "not finite" in message
    assert "row" in message


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_pickle_offered_as_weights_is_never_loaded(place: Place, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = place.root / "pickled"
    folder.mkdir()
    (folder / "model.json").write_bytes((place.root / "teacher" / "model.json").read_bytes())
    torch.save({"canary": Canary(place.root / "canary")}, folder / name)
    assert "pickle" in place.refuse(4, "--set", f"teacher.weights={folder}")
    assert not (place.root / "canary").exists()


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))
