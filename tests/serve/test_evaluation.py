"""Finished models at work: the figures of their run to the last bit, other data, other models, predictions."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import akd_dist
from akd_dist import cli, recipe
from akd_dist.base.errors import MachineError, RecipeError, RefusedError
from akd_dist.data import predictions
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.data.text import ByteTokenizer, tokenizer_of
from akd_dist.distill.metrics import measure
from akd_dist.documents.json_schema import schemas
from akd_dist.documents.use import EvaluationDocument, PredictionDocument
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.serve.examples import DataRequest, open_examples
from akd_dist.serve.served import open_model
from akd_dist.storage.roots import open_root
from tests.fleets import DEVICE, KD, a_recipe, a_student, a_teacher, stores_of
from tests.tokenizers import a_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as train-students leaves it, with its results, a teacher and a cache."""
    root = tmp_path_factory.mktemp("evaluation")
    spec = a_recipe(
        [
            a_student("plain", objective=KD),
            a_student("half", precision="bfloat16"),
            a_student("double", precision="float64", threads=2),
        ]
    )
    teacher = a_teacher(spec, root / "teacher", root / "cache")
    run = root / "runs" / "fleet"
    results = train_in_process(spec, stores_of(spec, teacher, root), run=run, cache_root=str(root / "cache"))
    (run / "recipe.yaml").write_text(spec.to_yaml())
    (root / "results.json").write_text(json.dumps(results))
    return root


def student(root: Path, name: str = "plain") -> Path:
    return root / "runs" / "fleet" / "students" / name


def test_rows(root: Path) -> Rows:
    return prepare(a_recipe([a_student("plain")]).data, root / "cache").test


test_rows.__test__ = False  # type: ignore[attr-defined]  # rows of the split test


def evaluate(root: Path, data: str | Path, name: str = "plain", **more: Any) -> dict[str, Any]:
    return akd_dist.evaluate(student(root, name), data, cache_root=root / "cache", **more)


def a_model(folder: Path, spec: Any, rows: Rows, normalize: recipe.Normalize | None = None) -> Path:
    card = ModelCard.of(spec, rows, normalize)
    save_model(folder, build(card, seed=3), card)
    return folder


def some_rows(shape: tuple[int, ...], dtype: Any = np.uint8, classes: int = 10, **more: Any) -> Rows:
    return Rows(np.zeros((2, *shape), dtype), np.zeros(2, np.int64), classes, "", (), Path(), **more)


def write(path: Path, inputs: Any, group: int = 64, **columns: Any) -> Path:
    pq.write_table(pa.table({"input": inputs, **columns}), path, row_group_size=group)
    return path


def flat(inputs: np.ndarray) -> Any:
    return pa.array(inputs.reshape(len(inputs), -1).tolist(), pa.list_(pa.uint8()))


# ---- evaluate


@pytest.mark.parametrize("name", ["plain", "half", "double"])
def test_a_student_has_the_figures_of_its_run(root: Path, name: str) -> None:
    results = json.loads((root / "results.json").read_text())[name]
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    document = evaluate(root, root / "runs" / "fleet", name, others=[root / "teacher"], device=DEVICE)
    assert document["student"]["metrics"] == results["test"]
    assert document["others"][0]["agreement"] == results["agreement"]
    assert (document["split"], document["rows"]) == ("test", len(test_rows(root)))
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    validation = evaluate(root, root / "runs" / "fleet" / "recipe.yaml", name, split="validation", device=DEVICE)
    # While it trained it was evaluated together with others of its architecture, whose rounding is another.
    rounding = {"plain": 1e-6, "half": 1e-3, "double": 1e-12}[name]
    assert validation["student"]["metrics"] == pytest.approx(results["validation"], rel=rounding)


def test_who_is_right_is_counted(root: Path) -> None:
    rows = test_rows(root)
    inputs = torch.from_numpy(np.array(rows.inputs))
    ours, theirs = (
        akd_dist.load_model(folder)(inputs).argmax(1).numpy() for folder in (student(root), root / "teacher")
    )
    other = evaluate(root, root / "runs" / "fleet", others=[root / "teacher"])["others"][0]
    right, others_right = ours == rows.labels, theirs == rows.labels
    assert other["both_right"] == np.sum(right & others_right)
    assert other["student_right"] == np.sum(right & ~others_right) > 0
    assert other["other_right"] == np.sum(~right & others_right) > 0
    assert other["both_wrong"] == np.sum(~right & ~others_right)
    assert other["agreement"] == np.mean(ours == theirs)


def test_parquet_gives_what_the_same_rows_of_a_recipe_give(root: Path, tmp_path: Path) -> None:
    rows = test_rows(root)
    images = []
    for pixels in rows.inputs[:, 0]:
        Image.fromarray(np.array(pixels)).save(image := io.BytesIO(), "PNG")
        images.append(image.getvalue())
    write(tmp_path / "flat.parquet", flat(rows.inputs), label=rows.labels)
    write(tmp_path / "images.parquet", images, label=rows.labels)
    nested = pa.array(rows.inputs.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))
    pq.write_table(pa.table({"x": nested, "y": rows.labels}), tmp_path / "nested.parquet")
    expected = evaluate(root, root / "runs" / "fleet")["student"]["metrics"]
    for name, columns in (("flat", {}), ("images", {}), ("nested", {"input": "x", "label": "y"})):
        document = evaluate(root, tmp_path / f"{name}.parquet", **columns)
        assert document["student"]["metrics"] == expected, name
        assert document["split"] is None


def test_batches_do_not_depend_on_how_files_are_cut(root: Path, tmp_path: Path) -> None:
    """The train rows are several batches, and kernels sum in an order that depends on a batch's shape."""
    rows = prepare(a_recipe([a_student("plain")]).data, root / "cache").train
    for start, stop in ((0, 700), (700, len(rows))):
        write(tmp_path / f"{start:04}.parquet", flat(rows.inputs[start:stop]), 111, label=rows.labels[start:stop])
    expected = evaluate(root, root / "runs" / "fleet", split="train")
    assert evaluate(root, tmp_path)["student"] == expected["student"]
    model = open_model(str(student(root)))
    with open_examples(DataRequest(str(tmp_path)), model.card, model.home, root / "cache") as examples:
        batches = list(examples.batches())
    assert [len(inputs) for inputs, _ in batches] == [512, 512, len(rows) - 1024]
    assert np.array_equal(np.concatenate([inputs for inputs, _ in batches]), rows.inputs)


def test_names_of_classes_lead_to_the_models_numbers(tmp_path: Path) -> None:
    names = ("bee", "ant", "fly")
    folder = a_model(tmp_path / "m", recipe.Mlp(hidden=4), some_rows((3,), np.float32, 3, class_names=names))
    inputs = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    said = akd_dist.load_model(folder)(torch.from_numpy(inputs)).argmax(1).tolist()
    told = write(tmp_path / "named.parquet", list(inputs), label=[names[one] for one in said])
    assert akd_dist.evaluate(folder, told)["student"]["metrics"]["accuracy"] == 1
    wrong = write(tmp_path / "other.parquet", list(inputs), label=["wasp"] * 30)
    with pytest.raises(RefusedError, match=r"(?s)row 0.*wasp.*what the model knows: bee, ant, fly"):
        akd_dist.evaluate(folder, wrong)
    unnamed = a_model(tmp_path / "u", recipe.Mlp(hidden=4), some_rows((3,), np.float32, 3))
    with pytest.raises(RefusedError, match=r"(?s)by number.*bee|ant|fly.*class ids 0 to 2"):
        akd_dist.evaluate(unnamed, told)


def test_regression_has_no_agreement(tmp_path: Path) -> None:
    rows = some_rows((3,), np.float32, 1, task="regression")
    first, second = (a_model(tmp_path / name, recipe.Mlp(hidden=4), rows) for name in ("a", "b"))
    inputs = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    data = write(tmp_path / "d.parquet", list(inputs), label=inputs.sum(axis=1))
    document = akd_dist.evaluate(first, data, others=[second])
    EvaluationDocument.model_validate(document)
    said = akd_dist.load_model(first)(torch.from_numpy(inputs))[:, 0].detach()
    expected = measure("regression", said, torch.from_numpy(inputs.sum(axis=1)))
    assert document["student"]["metrics"].items() > expected.items()
    assert document["others"][0]["agreement"] is None


def test_text_goes_through_the_tokenizer(tmp_path: Path) -> None:
    spec = recipe.TextTransformer(width=8, heads=2)
    texts = ["red", "green blue", "blue"] * 5
    data = write(tmp_path / "t.parquet", texts, label=[0, 1, 2] * 5)
    built_in = a_model(tmp_path / "bytes", spec, some_rows((12,), np.int32, 3, tokens=ByteTokenizer.tokens))
    folder = a_tokenizer(tmp_path)
    theirs = tokenizer_of(recipe.HuggingFaceText(path=str(folder), length=8), False)
    foreign = a_model(tmp_path / "words", spec, some_rows((8,), np.int32, 3, tokens=theirs.tokens))
    with pytest.raises(RefusedError, match=r"(?s)which tokenizer.*--tokenizer"):
        akd_dist.evaluate(foreign, data)
    for model, tokenizer, ids in (
        (built_in, None, ByteTokenizer(12, False).encode([texts])),
        (foreign, folder, theirs.encode([texts])),
    ):
        akd_dist.predict(model, data, tmp_path / "p.parquet", tokenizer=tokenizer, force=True)
        said = pq.read_table(tmp_path / "p.parquet")["logits"].to_pylist()
        expected = akd_dist.load_model(model)(torch.from_numpy(ids)).detach()
        assert torch.allclose(torch.tensor(said), expected, atol=1e-6)
    with pytest.raises(RefusedError, match=r"(?s)made for other data.*260 tokens.*8 tokens"):
        akd_dist.evaluate(built_in, data, tokenizer=folder)


def test_a_run_tells_which_columns_and_which_tokenizer(tmp_path: Path) -> None:
    """So a student of pairs of texts needs no options for new data."""
    words = a_tokenizer(tmp_path)
    first, second = ["red", "green blue", "blue", "red red"] * 3, ["blue", "red", "green", "red"] * 3
    data = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"one": first, "two": second, "same": [0, 1] * 6}), data)
    source = {"kind": "parquet", "path": str(data), "input": ["one", "two"], "label": "same"}
    text = {"kind": "huggingface", "path": str(words), "length": 8}
    model = {"kind": "text_transformer", "width": 8, "heads": 2}
    spec = a_recipe([a_student("s", model=model)], data={"train": source, "text": text})
    rows = prepare(spec.data, tmp_path / "cache").test
    folder = a_model(tmp_path / "run" / "students" / "s", spec.students[0].model, rows)
    (tmp_path / "run" / "recipe.yaml").write_text(spec.to_yaml())
    out = tmp_path / "p.parquet"
    akd_dist.predict(folder, data, out)
    ids = tokenizer_of(spec.data.text, True).encode([first, second])  # type: ignore[arg-type]
    expected = akd_dist.load_model(folder)(torch.from_numpy(ids)).argmax(1)
    assert pq.read_table(out)["predicted"].to_pylist() == expected.tolist()
    assert pq.read_table(out)["label"].to_pylist() == [0, 1] * 6
    swapped = akd_dist.evaluate(folder, data, input=["two", "one"], label="same", tokenizer=words)
    assert swapped["rows"] == 12
    with pytest.raises(RefusedError, match="no column answer"):
        akd_dist.evaluate(folder, data, label="answer")


def test_other_data_are_refused_with_both_sides(root: Path, tmp_path: Path) -> None:
    numbers = np.zeros((4, 64), np.uint8)
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "shape": ({"inputs": flat(numbers[:, :9])}, r"uint8 \[1, 8, 8\].*uint8 \[9\]"),
        "dtype": ({"inputs": pa.array(numbers.astype(float).tolist())}, r"uint8 \[1, 8, 8\].*float32 \[1, 8, 8\]"),
        "text": ({"inputs": ["a", "b", "c", "d"]}, r"a model of uint8 \[1, 8, 8\].*a model of text"),
        "range": ({"inputs": flat(numbers), "label": [0, 1, 2, 10]}, r"row 3.*got: 10.*classes 0 to 9"),
        "ragged": ({"inputs": pa.array([[0] * 64] * 3 + [[0]], pa.list_(pa.uint8()))}, r"another shape.*row 3"),
    }
    for name, (columns, match) in refused.items():
        data = write(tmp_path / f"{name}.parquet", columns["inputs"], label=columns.get("label", [0] * 4))
        with pytest.raises(RefusedError, match=f"(?s){match}"):
            evaluate(root, data)
    other = a_model(tmp_path / "m", recipe.Mlp(hidden=4), some_rows((1, 8, 8), classes=11))
    with pytest.raises(RefusedError, match=r"(?s)made for other data.*11 classes.*10 classes"):
        evaluate(root, "digits", others=[other])
    with pytest.raises(RefusedError, match=r"(?s)no column label.*--label"):
        evaluate(root, write(tmp_path / "bare.parquet", flat(numbers)))
    with pytest.raises(RefusedError, match=r"(?s)no Parquet file.*check the path"):
        evaluate(root, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("digits", {"split": "test"}),
        ("digits", {"input": "pixels"}),
        ("d.parquet", {"split": "train"}),
        ("d.parquet", {"tokenizer": "words"}),
        ("recipe.yaml", {"label": "y"}),
        ("d.parquet", {"input": ["a", "b", "c"]}),
        ("d.parquet", {"label": ""}),
        ("digits", {"label": ""}),
    ],
)
def test_options_that_do_not_go_together(root: Path, tmp_path: Path, data: str, options: dict[str, Any]) -> None:
    write(tmp_path / "d.parquet", flat(np.zeros((4, 64), np.uint8)), label=[0] * 4)
    with pytest.raises(RecipeError):
        evaluate(root, data if data == "digits" else tmp_path / data, **options)


def test_models_and_rows_come_from_object_storage(root: Path, bucket: str) -> None:
    rows = test_rows(root)
    for file in ("model.json", "model.safetensors"):
        open_root(f"{bucket}/model").put(file, (student(root) / file).read_bytes())
    for name, part in (("a", slice(100)), ("b", slice(100, None))):
        pq.write_table(pa.table({"input": flat(rows.inputs[part]), "label": rows.labels[part]}), made := io.BytesIO())
        open_root(f"{bucket}/rows").put(f"{name}.parquet", made.getvalue())
    expected = evaluate(root, root / "runs" / "fleet")["student"]
    there = akd_dist.evaluate(f"{bucket}/model", f"{bucket}/rows", cache_root=root / "cache")
    assert there["student"] == expected | {"path": f"{bucket}/model"}
    assert akd_dist.evaluate(f"{bucket}/model", f"{bucket}/rows/a.parquet", cache_root=root / "cache")["rows"] == 100
    assert not list((root / "cache").glob("examples-*"))
    with pytest.raises(RefusedError, match="no Parquet file"):
        akd_dist.evaluate(student(root), f"{bucket}/nothing", cache_root=root / "cache")


def test_a_label_may_stand_in_a_path_or_a_key(root: Path, bucket: str, tmp_path: Path) -> None:
    """Files are found as those of a recipe; what a system leaves beside them is not read."""
    rows = test_rows(root)
    expected = evaluate(root, root / "runs" / "fleet")["student"]["metrics"]
    there = open_root(f"{bucket}/parts")
    for label in range(10):
        place = tmp_path / "parts" / f"label={label}" / "part-0"
        place.parent.mkdir(parents=True)
        write(place, flat(rows.inputs[rows.labels == label]))
        there.put(f"label={label}/part-0", place.read_bytes())
    for name in ("_SUCCESS", "README.md", ".part-0.parquet.crc", "_temporary/0/part-1.parquet"):
        (tmp_path / "parts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "parts" / name).write_bytes(b"no rows")
        there.put(name, b"no rows")
    for data in (tmp_path / "parts", f"{bucket}/parts"):
        found = evaluate(root, data)
        assert (found["rows"], found["student"]["metrics"]) == (len(rows), expected)
    (tmp_path / "parts" / "b.parquet.part").write_bytes(b"PAR1")
    with pytest.raises(RefusedError, match=r"(?s)looks like a copy.*wait for the copy"):
        evaluate(root, tmp_path / "parts")


# ---- predict


def test_predictions_hold_what_the_model_says(root: Path, tmp_path: Path) -> None:
    rows, out = test_rows(root), tmp_path / "new" / "p.parquet"
    document = akd_dist.predict(student(root), root / "runs" / "fleet", out, cache_root=root / "cache")
    PredictionDocument.model_validate(document)
    table = pq.read_table(out)
    logits = akd_dist.load_model(student(root))(torch.from_numpy(np.array(rows.inputs))).detach()
    assert [str(one.type) for one in table.schema] == ["int64", "int64", "float", "list<element: float>", "int64"]
    assert table["row"].to_pylist() == list(range(len(rows)))
    assert table["predicted"].to_pylist() == logits.argmax(1).tolist()
    assert table["label"].to_pylist() == rows.labels.tolist()
    assert np.allclose(table["logits"].to_pylist(), logits, atol=1e-6)
    assert np.allclose(table["probability"].to_numpy(), logits.softmax(1).max(1).values, atol=1e-6)
    told = json.loads(table.schema.metadata[b"akd_dist"])
    assert (told["fingerprint"], told["task"]) == (document["fingerprint"], "classification")


def test_rows_without_labels_are_predicted(root: Path, tmp_path: Path) -> None:
    inputs = flat(test_rows(root).inputs)
    bare = write(tmp_path / "bare.parquet", inputs)
    odd = write(tmp_path / "odd.parquet", inputs, label=["?"] * len(inputs))
    for data, label in ((bare, None), (odd, "")):
        akd_dist.predict(student(root), data, tmp_path / "p.parquet", label=label, logits=False, force=True)
        assert pq.read_schema(tmp_path / "p.parquet").names == ["row", "predicted", "probability"]
    with pytest.raises(RefusedError, match="no column truth"):
        akd_dist.predict(student(root), bare, tmp_path / "q.parquet", label="truth")


def test_a_file_of_predictions_is_whole_or_absent(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "GROUP_ROWS", 500)  # so that some of it is written before the bad row
    out, kind = tmp_path / "p.parquet", pa.list_(pa.uint8())
    spoilt = write(tmp_path / "d.parquet", pa.array([*[[1] * 64] * 1999, [1] * 63], kind))
    with pytest.raises(RefusedError, match="row 1999"):
        akd_dist.predict(student(root), spoilt, out)
    assert [path.name for path in tmp_path.iterdir()] == ["d.parquet"]
    whole = write(tmp_path / "d.parquet", pa.array([[1] * 64] * 2000, kind))
    akd_dist.predict(student(root), whole, out)
    assert pq.ParquetFile(out).num_row_groups > 1
    assert pq.read_table(out)["row"].to_pylist() == list(range(2000))
    before = out.read_bytes()
    with pytest.raises(RecipeError, match=r"(?s)there already.*--force"):
        akd_dist.predict(student(root), whole, out)
    assert out.read_bytes() == before
    with pytest.raises(RecipeError, match="a folder"):
        akd_dist.predict(student(root), whole, tmp_path, force=True)
    with pytest.raises(MachineError, match="cannot write"):
        akd_dist.predict(student(root), whole, whole / "p.parquet")  # below a file


PEAK = """
import resource, sys
import akd_dist
akd_dist.predict(*sys.argv[1:4], label="")
akd_dist.evaluate(*sys.argv[1:3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Five times the rows, 245 MB more of them decoded and 980 MB as floats, in as much memory."""
    folder = a_model(tmp_path / "m", recipe.Mlp(hidden=4), some_rows((3, 32, 32)))
    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(20_000 * 3072, np.uint8)), 3072)
    peaks = []
    for parts in (1, 5):
        table = pa.concat_tables([pa.table({"input": rows, "label": pa.array([0] * 20_000)})] * parts)
        pq.write_table(table, tmp_path / f"{parts}.parquet", row_group_size=5_000, use_dictionary=False)
        words = [str(folder), str(tmp_path / f"{parts}.parquet"), str(tmp_path / f"{parts}.out")]
        done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 200, peaks


# ---- the commands


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_commands_print_one_document_or_a_table(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = root / "runs" / "fleet"
    cache: list[str | Path] = ["--cache-root", root / "cache"]
    code, out = run(capsys, "evaluate", student(root), fleet, "--with", root / "teacher", "--json", *cache)
    assert code == 0
    jsonschema.validate(json.loads(out), schemas()["evaluate"])
    code, table = run(capsys, "evaluate", student(root), fleet, "--with", root / "teacher", *cache)
    assert (code, max(map(len, table.splitlines())) <= 80) == (0, True)
    document = json.loads(out)
    assert f"{document['student']['metrics']['accuracy']:.4f}" in table
    assert f"{document['others'][0]['both_wrong']:,}" in table

    words: list[str | Path] = [
        "predict",
        student(root),
        fleet,
        "--split",
        "validation",
        "--out",
        tmp_path / "p.parquet",
        *cache,
    ]
    code, out = run(capsys, *words, "--no-logits", "--no-label", "--json")
    assert code == 0
    jsonschema.validate(json.loads(out), schemas()["predict"])
    assert json.loads(out)["columns"] == ["row", "predicted", "probability"]
    code, out = run(capsys, *words, "--json")
    assert (code, json.loads(out)["error"]["code"]) == (2, 2)
    assert run(capsys, *words, "--force")[0] == 0
    assert run(capsys, "evaluate", tmp_path, "digits")[0] == 4
