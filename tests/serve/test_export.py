"""Exports: they run without akd-dist, give torch's logits, say what they take, and are not kept otherwise."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import akd_dist
from akd_dist import cli, recipe
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.data.rows import Rows
from akd_dist.data.text import ByteTokenizer, tokenizer_of
from akd_dist.documents.json_schema import schemas
from akd_dist.documents.use import ExportDocument
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_card, save_model
from akd_dist.serve import exports
from tests import fleets
from tests.fleets import a_recipe, a_student
from tests.sources import module
from tests.tokenizers import a_tokenizer

NORMALIZE = recipe.Normalize(mean=[0.3], std=[0.4])
TEXT = {"shape": (12,), "dtype": np.int32, "tokens": ByteTokenizer.tokens}


def a_model(folder: Path, spec: Any, double: bool = False, normalize: Any = None, **rows: Any) -> Path:
    """A model folder with random weights, and batch statistics that are not those of a new model."""
    shape, dtype = rows.pop("shape", (1, 8, 8)), rows.pop("dtype", np.uint8)
    classes, task = rows.pop("classes", 10), rows.pop("task", "classification")
    labels = np.zeros(2, np.int64 if task == "classification" else np.float32)
    like = Rows(np.zeros((2, *shape), dtype), labels, classes, "", (), Path(), task=task, **rows)
    card = ModelCard.of(spec, like, normalize)
    made = build(card, seed=3, pretrained=True)
    for part in made.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_mean, -1, 1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
    save_model(folder, made.double() if double else made, card)
    return folder


def export(folder: Path, to: Any, out: Path, **more: Any) -> dict[str, Any]:
    document = akd_dist.export(folder, to, out, trust=code_of(folder), **more)
    ExportDocument.model_validate(document)
    return document


def logits(folder: Path, inputs: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        made: np.ndarray = akd_dist.load_model(folder, trust=code_of(folder))(torch.from_numpy(inputs)).numpy()
    return made


def code_of(folder: Path) -> list[str]:
    """The modules that tests here write, as far as they are there."""
    return [path.stem for path in (folder.parent / "code").glob("*.py")]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- ONNX


@pytest.mark.parametrize(
    ("spec", "rows", "dtype"),
    [
        (recipe.Mlp(hidden=8, dropout=0.5), {"normalize": NORMALIZE}, "tensor(uint8)"),
        (recipe.Mlp(hidden=8), {"shape": (5,), "dtype": np.float32}, "tensor(float)"),
        (recipe.Mlp(hidden=8), {"shape": (5,), "dtype": np.float32, "classes": 1, "task": "regression"}, None),
        (recipe.ResNet(depth=8, width=4), {}, "tensor(uint8)"),
        (recipe.PlainCnn(layers=2), {"normalize": NORMALIZE}, "tensor(uint8)"),
        (recipe.TextTransformer(width=8, heads=2, dropout=0.1), TEXT, "tensor(int32)"),
        (recipe.Mlp(hidden=8), {"double": True, "normalize": NORMALIZE}, "tensor(uint8)"),
    ],
    ids=["dropout", "floats", "regression", "resnet", "plain_cnn", "text", "float64"],
)
def test_onnx_runs_on_raw_inputs_of_any_number(
    tmp_path: Path, spec: Any, rows: dict[str, Any], dtype: str | None
) -> None:
    folder, out = a_model(tmp_path / "model", spec, **rows), tmp_path / "model.onnx"
    document = export(folder, "onnx", out, force=True)
    assert document["data"] is None
    assert "random inputs" in document["notes"][0]
    assert left(tmp_path) == ["model", "model.onnx"]
    assert str(tmp_path).encode() not in out.read_bytes()
    session = importlib.import_module("onnxruntime").InferenceSession(out)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    card = load_card(folder)
    assert (taken.name, taken.shape, given.name) == ("inputs", ["rows", *card.input_shape], "logits")
    assert dtype in (None, taken.type)
    told = session.get_modelmeta().custom_metadata_map
    assert told["inputs"].startswith(f"{card.input_dtype} [rows, ")
    assert ("normalisation" in told["inputs"]) == (card.normalize is not None)
    assert ModelCard.model_validate_json(told["model.json"]) == card
    for number in (1, 7, 100):
        inputs = np.random.default_rng(number).integers(0, 200, (number, *card.input_shape)).astype(card.input_dtype)
        found = session.run(None, {"inputs": inputs})[0]
        assert np.abs(found - logits(folder, inputs)).max() < document["tolerance"]


def test_what_onnx_runtime_has_no_float64_for_is_told(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "model", recipe.Cnn(width=2), double=True)
    with pytest.raises(RefusedError, match=r"(?s)does not run.*Conv.*float64.*--to torch-export"):
        export(folder, "onnx", tmp_path / "model.onnx")
    assert left(tmp_path) == ["model"]


def test_names_of_classes_go_with_it(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m", recipe.Mlp(hidden=4), classes=3, class_names=("bee", "ant", "fly"))
    export(folder, "onnx", tmp_path / "m.onnx")
    told = importlib.import_module("onnxruntime").InferenceSession(tmp_path / "m.onnx").get_modelmeta()
    assert json.loads(told.custom_metadata_map["class_names"]) == ["bee", "ant", "fly"]


# ---- torch.export


CODE = """
import torch
from torch import nn


class Own(nn.Module):
    def __init__(self, shape, classes, way):
        super().__init__()
        self.way, self.layer = way, nn.Linear(shape[0], classes)

    def forward(self, inputs):
        if self.way == "values" and inputs.sum() > 1e9:
            return self.layer(inputs) + 1
        if self.way == "rows" and len(inputs) == 2:
            return self.layer(inputs) + 1
        if self.way == "chance":
            return self.layer(inputs) + torch.rand_like(inputs[:, :1])
        return self.layer(inputs)


def make(input_shape, classes, way):
    return Own(input_shape, classes, way)
"""


def own(tmp_path: Path, way: str) -> Path:
    name = module(tmp_path / "code", CODE)
    spec = fleets.own(recipe.Custom(factory=f"{name}:make", arguments={"way": way}), tmp_path / "code")
    return a_model(tmp_path / way, spec, shape=(5,), dtype=np.float32, classes=3)


def test_an_exported_program_needs_neither_us_nor_the_user(tmp_path: Path) -> None:
    folder, out = own(tmp_path, "plain"), tmp_path / "plain.pt2"
    document = export(folder, "torch-export", out)
    assert document["difference"] == 0
    inputs = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    script = f"""
        import json, sys, numpy, torch
        told = {{"metadata.json": ""}}
        program = torch.export.load({str(out)!r}, extra_files=told)
        made = program.module()(torch.from_numpy(numpy.load({str(tmp_path / "inputs.npy")!r})))
        print(json.dumps([made.tolist(), json.loads(told["metadata.json"])["inputs"], "akd_dist" in sys.modules]))
    """
    command = [sys.executable, "-I", "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    made, told, here = json.loads(done.stdout)
    assert np.allclose(made, logits(folder, inputs))
    assert (told, here) == ("float32 [rows, 5], raw", False)
    with zipfile.ZipFile(out) as archive:
        assert not [name for name in archive.namelist() if str(tmp_path).encode() in archive.read(name)]


@pytest.mark.parametrize(
    ("way", "to", "match"),
    [
        ("values", "torch-export", "cannot be exported"),
        ("rows", "onnx", r"cannot be exported.*specialized it to be a constant \(2\)"),
        ("chance", "onnx", r"not give the same logits.*differ by.*torch-export"),
    ],
)
def test_what_does_not_agree_is_not_kept(tmp_path: Path, way: str, to: str, match: str) -> None:
    folder = own(tmp_path, way)
    with pytest.raises(RefusedError, match=f"(?s){match}"):
        export(folder, to, tmp_path / "out")
    assert left(tmp_path) == sorted(["code", way])


# ---- Hugging Face


def test_a_hugging_face_folder_is_one_for_everybody(tmp_path: Path) -> None:
    library = importlib.import_module("transformers")
    library.utils.logging.disable_progress_bar()
    words = a_tokenizer(tmp_path)
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = library.BertConfig(**sizes, num_hidden_layers=1, max_position_embeddings=12)
    library.BertModel(config).save_pretrained(tmp_path / "bert")
    tokens = tokenizer_of(recipe.HuggingFaceText(path=str(words), length=12), False).tokens
    spec = recipe.HuggingFaceModel(path=str(tmp_path / "bert"))
    names = ("warm", "cold", "none")
    rows: dict[str, Any] = {
        "shape": (12,), "dtype": np.int32, "classes": 3, "class_names": names, "tokens": tokens,
    }  # fmt: skip
    folder, out = a_model(tmp_path / "model", spec, **rows), tmp_path / "out"

    bare = export(folder, "huggingface", out)
    assert "--tokenizer" in bare["notes"][-1]
    data = tmp_path / "texts.parquet"
    texts = ["red blue", "green", "blue blue red"]
    pq.write_table(pa.table({"input": texts}), data)
    document = export(folder, "huggingface", out, data=data, tokenizer=words, force=True)
    assert (document["data"], document["rows"], document["notes"]) == (str(data), 3, [])
    assert left(out) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

    model = library.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == dict(enumerate(names))
    encoded = library.AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")["input_ids"]
    ids = tokenizer_of(recipe.HuggingFaceText(path=str(words), length=12), False).encode([texts])
    with torch.inference_mode():
        found = model(input_ids=encoded, attention_mask=(encoded != tokens.padding).long()).logits.numpy()
    assert np.abs(found - logits(folder, ids)).max() < 1e-5
    assert np.abs(logits(out, ids) - logits(folder, ids)).max() < 1e-6, "and a teacher for us"
    assert load_card(out).class_names == names

    for to in ("onnx", "torch-export"):
        assert export(folder, to, tmp_path / to, data=data, tokenizer=words)["same_class"] == 3


def test_other_kinds_are_told_what_they_can_be(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "m", recipe.Mlp(hidden=4))
    with pytest.raises(RefusedError, match=r"(?s)kind mlp.*--to onnx or --to torch-export"):
        export(folder, "huggingface", tmp_path / "out")


# ---- around it


def test_an_unnamed_export_lies_under_the_students_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_model(tmp_path / "models" / "half-t2.5-s0", recipe.Mlp(hidden=4))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(folder), "--to", "torch-export"])
    assert not ended.value.code
    assert (tmp_path / "half-t2.5-s0.pt2").is_file()


def test_a_student_of_a_run_is_compared_on_its_test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = a_recipe([a_student("half", precision="bfloat16")])
    folder = a_model(tmp_path / "run" / "students" / "half", recipe.Mlp(hidden=8, dropout=0.1))
    (tmp_path / "run" / "recipe.yaml").write_text(spec.to_yaml())
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "m.onnx"), "--json"])
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, schemas()["export"])
    assert (document["data"], document["split"], document["rows"]) == (str(tmp_path / "run"), "test", 256)
    assert "bfloat16" in document["notes"][0]
    with pytest.raises(SystemExit):
        cli.main(["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "m.onnx"), "--force"])
    shown = capsys.readouterr().out
    assert "256 test rows of" in shown
    assert "the same for 256 of 256" in shown


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RecipeError, match=r"(?s)onnxruntime.*pip install 'akd-dist\[onnx\]'"):
        export(tmp_path / "nothing", "onnx", tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match=r"(?s)the argument to is not what it takes.*onnx, torch-export, huggingface"):
        export(tmp_path / "nothing", "tflite", tmp_path / "m")


def test_force_overwrites_no_foreign_folder(tmp_path: Path) -> None:
    folder, out = a_model(tmp_path / "m", recipe.Mlp(hidden=4)), tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(RecipeError, match="--force"):
        export(folder, "onnx", out)
    assert out.read_text() == "mine"
    export(folder, "onnx", out, force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("mine")
    for to in ("onnx", "huggingface"):
        with pytest.raises(RecipeError, match="is not overwritten"):
            export(folder, to, tmp_path / "home", force=True)
    assert left(tmp_path / "home") == ["letter"]


def test_random_inputs_are_of_all_kinds() -> None:
    like = Rows(np.zeros((2, 2, 12), np.int32), np.zeros(2), 3, "", (), Path(), tokens=ByteTokenizer.tokens)
    card = ModelCard.of(recipe.TextTransformer(width=8, heads=2), like, None)
    inputs = exports._random_inputs(card)
    assert inputs.shape == (64, 2, 12)
    assert inputs.dtype == card.input_dtype
    assert set(np.unique(inputs[::2, 0, 6:])) == {ByteTokenizer.tokens.padding}
    assert ByteTokenizer.tokens.padding not in inputs[1::2, 0]
