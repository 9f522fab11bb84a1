"""Fine-tuned Hugging Face models as teachers: folders and checkpoints, and what is refused of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.text import Tokens
from akd_dist.models.card import WEIGHTS
from akd_dist.models.folder import load_card, load_model, read_model, state_bytes
from akd_dist.models.imported import Imported, open_checkpoint
from tests.tiny_transformers import HOSTILE, LENGTH, TINY, WORDS, copied, library, rows, without_weights

pytestmark = pytest.mark.usefixtures("offline")

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
