"""Hugging Face models: cards that need no folder again, weights that all come or are refused, no code of theirs."""

import importlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from akd_dist import recipe
from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.data.rows import Rows, Splits
from akd_dist.data.text import Tokens
from akd_dist.distill.student import Student
from akd_dist.jobs.planning.caching import check_models
from akd_dist.jobs.train_teacher import Workspace
from akd_dist.models.build import build, by_content
from akd_dist.models.card import CARD, WEIGHTS, ModelCard
from akd_dist.models.folder import load_card, load_model, read_model, save_model, state_bytes
from akd_dist.models.imported import Imported, open_checkpoint
from tests.fleets import ADAMW, a_recipe, a_student, resealed

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *(f"word{number}" for number in range(35))]
TINY = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
LENGTH = 16


def library() -> Any:
    return importlib.import_module("transformers")


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    import huggingface_hub.constants

    library().utils.logging.disable_progress_bar()  # those of save_pretrained here
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrained models: RoBERTa and a shallow one, as DistilRoBERTa is, BERT with token types, DistilBERT."""
    hf = library()
    root = tmp_path_factory.mktemp("pretrained")
    roberta = {**TINY, "pad_token_id": 0, "max_position_embeddings": LENGTH + 1, "type_vocab_size": 1}
    models = {
        "roberta": hf.RobertaForMaskedLM(hf.RobertaConfig(**roberta, num_hidden_layers=3)),
        "distilroberta": hf.RobertaForMaskedLM(hf.RobertaConfig(**roberta, num_hidden_layers=2)),
        "bert": hf.BertModel(hf.BertConfig(**TINY, num_hidden_layers=2, max_position_embeddings=LENGTH)),
        "distilbert": hf.DistilBertModel(
            hf.DistilBertConfig(
                vocab_size=40, dim=16, n_heads=2, hidden_dim=32, n_layers=2, max_position_embeddings=LENGTH
            )
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root


def rows(
    length: int = LENGTH, types: bool = False, vocabulary: int = 40, padding: int = 0, classes: int = 3, **more: Any
) -> Rows:
    """Texts of 2, 4, ... tokens."""
    inputs = np.random.default_rng(0).integers(5, 40, (8, length), dtype=np.int32)
    inputs[np.arange(length) >= 2 * np.arange(8)[:, None] + 2] = padding
    if types:
        inputs = np.stack([inputs, (np.arange(length, dtype=np.int32) > 4) * np.ones_like(inputs)], axis=1)
    tokens = Tokens(vocabulary=vocabulary, padding=padding, mask=4, special=(0, 1, 2, 3, 4))
    labels = np.zeros(8, np.float32 if more.get("task") == "regression" else np.int64)
    return Rows(inputs, labels, classes, "", (), Path(), tokens=tokens, **more)


def pretrained(folder: Path, **changes: Any) -> recipe.HuggingFaceModel:
    return recipe.HuggingFaceModel(path=str(folder), **changes)


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


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---- fine-tuned folders as teachers


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned RoBERTa with its tokenizer, as people have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    hf, root = library(), tmp_path_factory.mktemp("tuned") / "mrpc"
    config = hf.RobertaConfig(
        **TINY,
        num_hidden_layers=2,
        pad_token_id=0,
        max_position_embeddings=LENGTH + 1,
        type_vocab_size=1,
        num_labels=3,
        id2label={0: "no", 1: "yes", 2: "maybe"},
    )
    torch.manual_seed(5)
    hf.RobertaForSequenceClassification(config).save_pretrained(root)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad": "<pad>", "cls": "<s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, **{f"{name}_token": token for name, token in special.items()}
    )
    tokenizer.save_pretrained(root)
    return root


def test_a_fine_tuned_folder_is_a_teacher(tuned: Path, tmp_path: Path) -> None:
    hf = library()
    module, card = read_model(tuned)
    theirs = hf.RobertaForSequenceClassification.from_pretrained(tuned).eval()
    data = rows()
    ids = torch.from_numpy(data.inputs)
    assert torch.equal(module(ids), theirs(input_ids=ids.long(), attention_mask=(ids != 0).long()).logits)
    assert not module.training
    assert (card.input_shape, card.input_dtype, card.classes) == ((LENGTH,), "int32", 3)
    assert card.class_names == ("no", "yes", "maybe")
    assert card.tokens == Tokens(vocabulary=40, padding=0, mask=4, special=(0, 1, 2, 3, 4))
    card.check_rows(data, "the teacher")
    card.check_rows(rows(length=9), "the teacher")
    moved = copied(tuned, tmp_path / "mrpc-moved")
    assert load_card(moved).fingerprint == card.fingerprint == load_card(tuned).fingerprint
    assert str(tuned.parent) not in card.model_dump_json()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"length": LENGTH + 1}, f"[{LENGTH}]"),
        ({"types": True}, f"[2, {LENGTH}]"),
        ({"classes": 2}, "2 classes"),
        ({"vocabulary": 39}, "39 tokens"),
        ({"padding": 1}, "padding 1"),
        ({"classes": 1, "task": "regression"}, "regression"),
        ({"class_names": ("yes", "no", "maybe")}, "yes, no, maybe"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_fine_tuned_folder_is_refused_for_other_data(tuned: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(RefusedError, match="the teacher was made for other") as refused:
        load_card(tuned).check_rows(rows(**changes), "the teacher")
    assert word in f"{refused.value.got} {refused.value.expected}"


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def without_head(folder: Path) -> None:
    hf = library()
    config = hf.RobertaConfig.from_pretrained(folder)
    hf.RobertaModel(config).save_pretrained(folder)


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def of_pictures(folder: Path) -> None:
    change_config(folder, model_type="vit")


def of_no_number(folder: Path) -> None:
    change_config(folder, id2label=None, num_labels="1_0")


def quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes"})


def of_many_labels(folder: Path) -> None:
    change_config(folder, problem_type="multi_label_classification")


def of_several_values(folder: Path) -> None:
    change_config(folder, problem_type="regression")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_tokenizer, ["no tokenizer", "tokenizer.save_pretrained", "kind: huggingface"]),
        (without_weights, ["pytorch_model.bin is a pickle", "never unpickled"]),
        (cut_weights, ["weights of bad cannot be read", "safetensors"]),
        (without_head, ["missing: classifier", "its head included", "train:"]),
        (broken_config, ["config.json is not JSON"]),
        (of_pictures, ["cannot classify text", "vit"]),
        (of_many_labels, ["another task", "multi_label_classification with 3 labels"]),
        (of_several_values, ["another task", "regression with 3 labels"]),
        (of_no_number, ["how many classes", "num_labels: '1_0'"]),
        (quantised, ["keys that are not taken", "quantization_config"]),
    ],
)
def test_a_bad_fine_tuned_folder_is_refused(tuned: Path, tmp_path: Path, damage: Any, words: list[str]) -> None:
    folder = copied(tuned, tmp_path / "bad")
    damage(folder)
    with pytest.raises(RefusedError) as refused:
        load_model(folder)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_fine_tuned_regression_has_one_value(tuned: Path, tmp_path: Path) -> None:
    hf, folder = library(), copied(tuned, tmp_path / "stsb")
    config = hf.RobertaConfig.from_pretrained(folder, num_labels=1)
    hf.RobertaForSequenceClassification(config).save_pretrained(folder)
    module, card = read_model(folder)
    assert (card.task, card.classes, card.class_names) == ("regression", 1, None)
    card.check_rows(rows(classes=1, task="regression"), "the teacher")
    assert module(torch.from_numpy(rows().inputs)).shape == (8, 1)


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


# ---- nothing of theirs is executed

HOSTILE: list[dict[str, Any]] = [
    {"_attn_implementation": "someone/kernels"},
    {"attn_implementation": "someone/kernels"},
    {"auto_map": {"AutoModelForSequenceClassification": "theirs.Model"}},
    {"attribute_map": {"alias": "_attn_implementation_internal"}, "alias": "someone/kernels"},
    {"nested": {"_attn_implementation": "someone/kernels"}},
]


@pytest.mark.parametrize("keys", HOSTILE, ids=lambda keys: next(iter(keys)))
def test_code_that_a_configuration_names_is_left_out(tuned: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    """transformers takes an attention implementation of this form from the hub, and runs it."""
    folder = copied(tuned, tmp_path / "hostile")
    change_config(folder, **keys)
    (folder / "theirs.py").write_text("raise SystemExit('executed')")
    loaded = load_model(folder)
    assert state_bytes(loaded) == state_bytes(load_model(tuned))
    said = load_card(folder).model_dump_json()
    assert not [key for key in ("attn_implementation", "auto_map", "attribute_map") if f'{key}"' in said]


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


# ---- fine-tuned models as an architecture and a checkpoint


def imported_as(folder: Path, source: Path | None = None, **changes: Any) -> Imported:
    teacher = recipe.TeacherSpec(
        model=recipe.HuggingFaceModel(path=str(folder)), weights=None if source is None else str(source)
    )
    assert teacher.model is not None
    assert teacher.checkpoint is not None
    data = recipe.DataSpec(train=recipe.Digits())
    return open_checkpoint(teacher.model, teacher.checkpoint, rows(**changes), data, folder.parent / "cache")


def test_a_fine_tuned_folder_alone_is_a_teacher_by_its_model(tuned: Path, tmp_path: Path) -> None:
    """Also as a pickled state dict, in float16, in parallel: read as tensors, and one with the other."""
    ids = torch.from_numpy(rows().inputs)
    found = imported_as(tuned)
    theirs = library().RobertaForSequenceClassification.from_pretrained(tuned).eval()
    logits = theirs(input_ids=ids.long(), attention_mask=(ids != 0).long()).logits
    assert torch.equal(found.module(tmp_path)(ids), logits)
    assert found.notes == []
    bare = copied(tuned, tmp_path / "bare")
    (bare / WEIGHTS).unlink()
    torch.save(theirs.state_dict(), bare / "pytorch_model.bin")
    torch.save({"state_dict": {f"module.{name}": one for name, one in theirs.state_dict().items()}}, tmp_path / "p.pth")
    torch.save({name: one.half() for name, one in theirs.state_dict().items()}, tmp_path / "half.bin")
    assert imported_as(bare).card.fingerprint == found.card.fingerprint
    parallel = imported_as(tuned, tmp_path / "p.pth")
    assert parallel.card.fingerprint == found.card.fingerprint
    assert "`module.` was taken off the names of its weights" in parallel.notes
    half = imported_as(tuned, tmp_path / "half.bin")
    assert half.card.fingerprint != found.card.fingerprint
    assert half.notes == [f"{len(theirs.state_dict())} weights of float16 became float32"]
    assert str(tuned.parent) not in found.card.model_dump_json()
    found.publish(str(tmp_path / "published"), tmp_path)
    module, card = read_model(tmp_path / "published")
    assert torch.equal(module(ids), logits)
    assert card.fingerprint == found.card.fingerprint


def test_names_of_before_are_those_of_now(tuned: Path, tmp_path: Path) -> None:
    """As `LayerNorm.gamma`, and positions that were saved once; transformers knows them."""
    from safetensors.torch import load_file

    state = load_file(tuned / WEIGHTS)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): one for name, one in state.items()}
    torch.save(old | {"roberta.embeddings.position_ids": torch.arange(17)[None]}, tmp_path / "old.bin")
    assert imported_as(tuned, tmp_path / "old.bin").card.fingerprint == imported_as(tuned).card.fingerprint


def test_a_model_whose_head_would_be_random_is_refused(folders: Path, tuned: Path) -> None:
    with pytest.raises(RefusedError, match="do not fit its configuration") as refused:
        imported_as(folders / "roberta")
    assert "missing: classifier" in str(refused.value)
    assert "its head included" in str(refused.value)
    assert "train: {epochs:" in str(refused.value)
    with pytest.raises(RefusedError, match=r"of another shape: classifier\.out_proj"):
        imported_as(tuned, classes=2)
    with pytest.raises(RefusedError) as refused:  # its names lack what the whole model's begin with
        imported_as(folders / "distilbert")
    missing = "missing: classifier.bias, classifier.weight, pre_classifier.bias, pre_classifier.weight"
    assert refused.value.got == missing


def test_a_model_of_classes_of_other_names_is_refused(tuned: Path) -> None:
    assert imported_as(tuned, class_names=("no", "yes", "maybe")).card.class_names == ("no", "yes", "maybe")
    with pytest.raises(RefusedError, match="made for other classes, or for another order") as refused:
        imported_as(tuned, class_names=("yes", "no", "maybe"))
    assert "no, yes, maybe" in str(refused.value)


def test_weights_that_are_not_finite_are_refused(tuned: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(tuned / WEIGHTS)
    save_file(state | {"classifier.dense.bias": torch.full((16,), torch.nan)}, tmp_path / "nan")
    with pytest.raises(RefusedError, match=r"classifier\.dense\.bias") as refused:
        imported_as(tuned, tmp_path / "nan")
    assert "16 of 16 numbers are NaN" in str(refused.value)


def test_a_pickled_folder_alone_is_refused_with_the_way(tuned: Path, tmp_path: Path) -> None:
    bare = copied(tuned, tmp_path / "bare")
    torch.save({}, bare / "pytorch_model.bin")
    (bare / WEIGHTS).unlink()
    with pytest.raises(RefusedError, match="is a pickle") as refused:
        load_card(bare)
    assert "teacher: {model: {kind: ...}, weights: " in str(refused.value)
