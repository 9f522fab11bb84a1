"""Language models for those without akd-dist: a folder that AutoModelForCausalLM loads, ONNX, torch.export."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import akd_dist
from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.tokenizers import ByteDocuments, fingerprint_of
from akd_dist.documents.use import ExportDocument
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.decoder import CausalDecoder
from akd_dist.models.folder import load_model, save_model
from akd_dist.models.generation import Sampling, generate
from akd_dist.models.language import Blocks, LanguageModel, plain_logits
from akd_dist.serve.runners import RUNNERS
from tests.language_models import BLOCKS, saved
from tests.tiny_transformers import library
from tests.tokenizers import a_tokenizer

OWN = recipe.CausalLm(width=32, depth=2, heads=4, key_value_heads=2)


def own(folder: Path, spec: recipe.CausalLm = OWN, blocks: Blocks = BLOCKS) -> Path:
    card = ModelCard.of_blocks(spec, blocks)
    save_model(folder, build(card, seed=0), card)
    return folder


def exported(model: Path, to: recipe.Target, out: Path, **options: str) -> ExportDocument:
    return ExportDocument.model_validate(akd_dist.export(model, to, out, **options))  # type: ignore[arg-type]


def in_this_process(path: Path, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What the runner of a Python of its own does, without its start."""
    model = library().AutoModelForCausalLM.from_pretrained(path, local_files_only=True, dtype="auto").eval()
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(part)).logits.numpy() for part in parts]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNERS, "huggingface-lm", in_this_process)


def test_the_built_in_model_is_a_llama_to_others_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = a_tokenizer(tmp_path)
    known = fingerprint_of(library().AutoTokenizer.from_pretrained(tokenizer))
    folder = own(tmp_path / "own", blocks=BLOCKS.model_copy(update={"tokenizer": known}))
    document = exported(folder, "huggingface", tmp_path / "out", tokenizer=str(tokenizer))
    assert document.difference <= document.tolerance
    assert document.same_class == document.rows
    assert "input_ids" in document.inputs
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    hf = library()
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = hf.AutoTokenizer.from_pretrained(tmp_path / "out")("red green", return_tensors="pt").input_ids
    assert ids.tolist() == [[2, 5, 6, 3]]
    made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    module = load_model(folder)
    assert isinstance(module, LanguageModel)
    assert made == [2, 5, 6, 3, *generate(module, [2, 5, 6, 3], Sampling(tokens=5), 50)]


@pytest.mark.usefixtures("at_once")
def test_an_output_layer_of_its_own_is_exported_too(tmp_path: Path) -> None:
    document = exported(own(tmp_path / "own", OWN.model_copy(update={"tied": False})), "huggingface", tmp_path / "out")
    assert document.difference <= document.tolerance
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.usefixtures("at_once")
def test_a_model_of_transformers_goes_back_and_can_be_read_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "gpt2", "gpt2")
    document = exported(folder, "huggingface", tmp_path / "out")
    assert any("without a tokenizer" in note for note in document.notes)
    ours, again = load_model(folder), load_model(tmp_path / "out")
    assert isinstance(ours, LanguageModel)
    assert isinstance(again, LanguageModel)
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(plain_logits(ours, ids), plain_logits(again, ids))


@pytest.mark.parametrize("to", ["onnx", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_a_program_takes_any_number_of_rows_and_tokens(tmp_path: Path, to: recipe.Target) -> None:
    folder = own(tmp_path / "own")
    document = exported(folder, to, tmp_path / "out")
    assert document.difference <= document.tolerance
    assert document.outputs == "float32 [rows, length, 50], logits of the next token at each position"
    if to == "onnx":
        session = importlib.import_module("onnxruntime").InferenceSession(str(tmp_path / "out"))
        (given,) = session.get_inputs()
        assert (given.name, given.shape) == ("input_ids", ["rows", "length"])
        module = load_model(folder)
        assert isinstance(module, LanguageModel)
        ids = np.arange(33, dtype=np.int64).reshape(3, 11)
        with torch.inference_mode():
            expected = plain_logits(module, torch.from_numpy(ids)).numpy()
        np.testing.assert_allclose(session.run(["logits"], {"input_ids": ids})[0], expected, atol=1e-5)


@pytest.mark.usefixtures("at_once")
def test_a_folder_whose_logits_are_others_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from akd_dist.serve import language_exports

    def another(module: CausalDecoder) -> dict[str, torch.Tensor]:
        return {f"model.{name}": tensor + 0.1 for name, tensor in module.state_dict().items()}

    monkeypatch.setattr(language_exports, "llama_state", another)
    with pytest.raises(RefusedError, match="does not give the same logits"):
        exported(own(tmp_path / "own"), "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = own(tmp_path / "own", blocks=Blocks(length=16, vocabulary=6))
    with pytest.raises(RefusedError, match="is not the one that the model was trained with") as caught:
        exported(folder, "huggingface", tmp_path / "out", tokenizer=str(a_tokenizer(tmp_path)))
    assert "ids up to 7" in str(caught.value.got)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RefusedError, match="digits are pictures"):
        exported(folder, "onnx", tmp_path / "out", data="digits")


@pytest.mark.usefixtures("at_once")
def test_it_is_compared_on_the_texts_that_somebody_names(tmp_path: Path) -> None:
    folder = own(
        tmp_path / "own", blocks=Blocks(length=16, vocabulary=260, tokenizer=ByteDocuments.tokens.tokenizer or "")
    )
    (tmp_path / "a.txt").write_text("some words that are more than a block")
    document = exported(folder, "huggingface", tmp_path / "out", data=str(tmp_path / "a.txt"))
    assert document.data == str(tmp_path / "a.txt")
    assert document.rows == 3 * 16 - 7, "of the first row half, to see another length"
    assert "compared on random tokens" not in document.notes
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(RefusedError, match="there is no token"):
        exported(folder, "huggingface", tmp_path / "no", data=str(tmp_path / "b.txt"))
