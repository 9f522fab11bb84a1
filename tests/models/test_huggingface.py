"""Hugging Face models: cards that need no folder again, weights that all come or are refused, no code of theirs."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from akd_dist import recipe
from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.data.rows import Rows, Splits
from akd_dist.distill.student import Student
from akd_dist.jobs.planning.caching import check_models
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.models.build import build, by_content
from akd_dist.models.card import CARD, WEIGHTS, ModelCard
from akd_dist.models.folder import load_card, load_model, save_model, state_bytes
from tests.fleets import ADAMW, a_recipe, a_student, resealed
from tests.tiny_transformers import HOSTILE, LENGTH, copied, flip_a_bit, library, pretrained, rows, without_weights

pytestmark = pytest.mark.usefixtures("offline")

KINDS = [("roberta", False), ("distilroberta", False), ("bert", False), ("bert", True), ("distilbert", False)]
kinds = pytest.mark.parametrize(("name", "types"), KINDS, ids=lambda value: value if isinstance(value, str) else None)


# ---- pretrained weights


@kinds
def test_pretrained_weights_get_a_new_head_by_the_seed(folders: Path, name: str, types: bool) -> None:
    from safetensors.torch import load_file

    card = ModelCard.of(pretrained(folders / name), rows(types=types), None)
    first, again, other, without = (
        build(card, seed=seed, pretrained=wanted).state_dict()
        for seed, wanted in ((0, True), (0, True), (1, True), (0, False))
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    there = load_file(folders / name / WEIGHTS)
    heads = {key for key in first if not torch.equal(first[key], other[key])}
    assert heads
    for key, value in first.items():
        part = key.removeprefix("body.model.")
        same = there.get(part, there.get(part.partition(".")[2]))
        assert (same is None) == ("classifier" in key)
        assert same is None or (torch.equal(same, value) and key not in heads)
    assert not torch.equal(next(iter(without.values())), next(iter(first.values())))
    assert any(key.endswith("weight") and len(first[key]) == 3 for key in heads)


@kinds
def test_padding_changes_nothing(folders: Path, name: str, types: bool) -> None:
    data = rows(types=types)
    module = build(ModelCard.of(pretrained(folders / name), data, None), seed=0, pretrained=True).eval()
    inputs = torch.from_numpy(data.inputs)
    padded = module(inputs)
    assert padded.dtype == torch.float32
    for row in range(8):
        alone = module(inputs[row : row + 1, ..., : 2 * row + 2])
        torch.testing.assert_close(alone, padded[row : row + 1], rtol=0, atol=1e-6)


def test_a_step_of_fine_tuning_is_the_same_each_time(folders: Path) -> None:
    card = ModelCard.of(pretrained(folders / "roberta"), rows(), None)
    inputs, labels = torch.from_numpy(rows().inputs), torch.arange(8) % 3

    def tuned() -> tuple[bytes, list[float]]:
        module = build(card, seed=0, pretrained=True)
        torch.manual_seed(1)
        optimizer, losses = torch.optim.AdamW(module.parameters(), 3e-3), []
        for _ in range(10):
            loss: Any = torch.nn.functional.cross_entropy(module(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return state_bytes(module), losses

    torch.use_deterministic_algorithms(True)
    try:
        first, again = tuned(), tuned()
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == again
    assert first[1][-1] < first[1][0]


def test_a_student_starts_from_pretrained_weights(folders: Path, tmp_path: Path) -> None:
    spec = recipe.StudentSpec(
        model=pretrained(folders / "roberta"),
        objective=recipe.HardLabels(epochs=1),
        optimizer=recipe.AdamW(lr=1e-3),
        seed=3,
    )
    card = ModelCard.of(spec.model, rows(), None)
    student = Student(spec, card, tmp_path)
    started, loaded = student.module.state_dict(), build(card, seed=0, pretrained=True).state_dict()
    assert all(torch.equal(started[key], loaded[key]) for key in started if "classifier" not in key)


def test_missing_pretrained_assistant_weights_are_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "roberta", tmp_path / "bare", ignore=lambda *_: [WEIGHTS])
    model = {"kind": "huggingface", "path": str(tmp_path / "bare")}
    assistant = {"model": model, "objective": {"kind": "kd", "epochs": 1}, "optimizer": ADAMW}
    students = [a_student("one", objective={"kind": "takd", "epochs": 1})]
    trained = {"model": {"kind": "text_transformer", "width": 8}, "train": {"epochs": 1, "optimizer": ADAMW}}
    checked = a_recipe(students, teacher=trained | {"assistant": assistant})
    with pytest.raises(RefusedError, match="the weights of bare cannot be read"):
        check_models(checked, Splits(*[rows()] * 3), [], Workspace(str(tmp_path), str(tmp_path)))


def test_a_head_of_another_size_is_replaced(folders: Path, tmp_path: Path) -> None:
    hf = library()
    config = hf.RobertaConfig.from_pretrained(folders / "roberta", num_labels=5)
    hf.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "five")
    module = build(ModelCard.of(pretrained(tmp_path / "five"), rows(), None), seed=0, pretrained=True)
    assert module(torch.from_numpy(rows().inputs)).shape == (8, 3)


def test_regression_has_one_value(folders: Path) -> None:
    data = rows(classes=1, task="regression")
    card = ModelCard.of(pretrained(folders / "bert"), data, None)
    assert isinstance(card.model, recipe.HuggingFaceModel)
    assert (card.model.config["num_labels"], card.model.config["problem_type"]) == (1, "regression")
    assert build(card, seed=0)(torch.from_numpy(data.inputs)).shape == (8, 1)


def test_the_configuration_can_be_changed_for_random_weights(folders: Path) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 50, "hidden_dropout_prob": 0.0}
    data = rows(vocabulary=50)
    spec = pretrained(folders / "distilbert", pretrained=False, config=changes | {"dropout": 0.0})
    with pytest.raises(RefusedError, match="hidden_dropout_prob"):
        ModelCard.of(spec, data, None)
    del changes["hidden_dropout_prob"]
    card = ModelCard.of(pretrained(folders / "distilbert", pretrained=False, config=changes), data, None)
    assert isinstance(card.model, recipe.HuggingFaceModel)
    assert card.model.config["n_layers"] == 1  # DistilBERT's own name for it
    assert "num_hidden_layers" not in card.model.config
    layers = {key.split(".")[5] for key in build(card, seed=0, pretrained=True).state_dict() if ".layer." in key}
    assert layers == {"0"}


# ---- cards and folders of ours


@kinds
def test_a_saved_model_needs_neither_hub_nor_folder(folders: Path, name: str, types: bool, tmp_path: Path) -> None:
    data = rows(types=types, class_names=("a", "b", "c"))
    shutil.copytree(folders / name, tmp_path / "source" / name)
    card = ModelCard.of(pretrained(tmp_path / "source" / name), data, None)
    module = build(card, seed=0, pretrained=True).eval()
    save_model(tmp_path / "ours", module, card)
    shutil.rmtree(tmp_path / "source")
    loaded = load_model(tmp_path / "ours")
    inputs = torch.from_numpy(data.inputs)
    assert torch.equal(loaded(inputs), module(inputs))
    read = load_card(tmp_path / "ours")
    assert str(tmp_path) not in (tmp_path / "ours" / CARD).read_text()
    assert read.model.label == name
    assert read.class_names == ("a", "b", "c")
    read.check_rows(data, "the teacher")


def test_the_fingerprint_knows_the_architecture_alone(folders: Path, tmp_path: Path) -> None:
    def of(folder: Path, **changes: Any) -> str:
        return ModelCard.of(pretrained(folder, **changes), rows(), None).fingerprint

    shutil.copytree(folders / "bert", tmp_path / "elsewhere")
    first = of(folders / "bert")
    assert first == of(tmp_path / "elsewhere") == of(folders / "bert", pretrained=False)
    assert first != of(folders / "bert", config={"hidden_act": "relu"})
    assert first != of(folders / "distilroberta")


def test_a_spec_by_content_knows_the_weights_and_not_the_place(folders: Path, tmp_path: Path) -> None:
    moved = copied(folders / "bert", tmp_path / "moved")
    first = by_content(pretrained(folders / "bert"))
    assert first == by_content(pretrained(moved))
    random = by_content(pretrained(moved, pretrained=False))
    flip_a_bit(moved / WEIGHTS)
    assert by_content(pretrained(moved)) != first
    assert by_content(pretrained(moved, pretrained=False)) == random
    assert by_content(recipe.HuggingFaceModel(name="a/b"))["name"] == "a/b"


# ---- refusals of what a recipe asks for


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 5}, ["missing: roberta.encoder.layer.3", "28 more", "but its head"]),
        ({"intermediate_size": 30}, ["of another shape: roberta", "[32, 16] instead of [30, 16]"]),
        ({"num_hidden_layer": 2}, ["num_hidden_layer\n", "num_hidden_layers"]),
        ({"num_labels": 4}, ["cannot be set", "taken from the data"]),
        ({"_attn_implementation": "someone/kernels"}, ["cannot be set"]),
        ({"hidden_size": 15}, ["makes no model", "15"]),
        ({"num_hidden_layers": "two"}, ["makes no model", "two"]),
        ({"hidden_act": "no_such"}, ["makes no model", "no_such"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_configuration_that_does_not_fit_is_refused(folders: Path, config: Any, words: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        build(ModelCard.of(pretrained(folders / "roberta", config=config), rows(), None), seed=0, pretrained=True)
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocabulary": 41}, ["another tokenizer", "40 tokens", "41 tokens", "vocab_size: 41"]),
        ({"padding": 1}, ["another tokenizer", "padding 0", "padding 1"]),
        ({"length": LENGTH + 1}, ["texts of this length", f"at most {LENGTH}"]),
        ({"types": True}, ["takes no token types"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_tokens_that_do_not_fit_are_refused(folders: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        build(ModelCard.of(pretrained(folders / "roberta"), rows(**changes), None), seed=0)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    for use in (lambda: ModelCard.of(pretrained(tmp_path), rows(), None), lambda: by_content(pretrained(tmp_path))):
        with pytest.raises(RefusedError, match=r"no config\.json"):
            use()
    with pytest.raises(MachineError, match="cannot be had from the hub"):
        ModelCard.of(recipe.HuggingFaceModel(name="nobody/nothing"), rows(), None)


def test_pretrained_pickles_are_refused(folders: Path, tmp_path: Path) -> None:
    folder = copied(folders / "bert", tmp_path / "bert")
    without_weights(folder)
    card = ModelCard.of(pretrained(folder), rows(), None)
    with pytest.raises(RefusedError, match="never unpickled"):
        build(card, seed=0, pretrained=True)


def test_images_are_refused(folders: Path) -> None:
    data = Rows(np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, np.int64), 3, "", (), Path())
    with pytest.raises(RefusedError, match="roberta does not fit the inputs"):
        ModelCard.of(pretrained(folders / "roberta"), data, None)


def test_the_extra_is_named_where_it_is_missing(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = ModelCard.of(pretrained(folders / "bert"), rows(), None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for use in (lambda: ModelCard.of(pretrained(folders / "bert"), rows(), None), lambda: build(card, seed=0)):
        with pytest.raises(RefusedError, match=r"pip install 'akd-dist\[huggingface\]'"):
            use()


@pytest.mark.parametrize("keys", HOSTILE, ids=lambda keys: next(iter(keys)))
def test_a_card_that_names_code_is_refused(folders: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    card = ModelCard.of(pretrained(folders / "bert"), rows(), None)
    save_model(tmp_path, build(card, seed=0), card)
    document = json.loads((tmp_path / CARD).read_text())
    document["model"]["config"] |= keys
    (tmp_path / CARD).write_text(json.dumps(resealed(document)))
    with pytest.raises(RefusedError, match="keys that are not taken"):
        load_model(tmp_path)


def test_nothing_is_printed_and_the_library_keeps_its_settings(
    folders: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = library().utils.logging
    logger.enable_progress_bar()
    logger.set_verbosity_warning()
    logger.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            build(ModelCard.of(pretrained(folders / "roberta"), rows(), None), seed=0, pretrained=True)
        assert logger.is_progress_bar_enabled()
        assert logger.get_verbosity() == logging.WARNING
    finally:
        logger.disable_propagation()
        logger.disable_progress_bar()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
