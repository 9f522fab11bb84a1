"""Causal language models of transformers: documents apart, heads found out, folders known by content, no code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.models import build as building
from akd_dist.models.build import build, by_content
from akd_dist.models.card import CARD, WEIGHTS, ModelCard
from akd_dist.models.folder import load_card, read_model, save_model
from akd_dist.models.huggingface_lm import HuggingFaceDecoder
from akd_dist.models.imported import open_for_card
from akd_dist.models.language import Blocks, LanguageModel, check_linear_head, plain_logits
from tests.language_models import BLOCKS, VOCABULARY, saved, some_blocks
from tests.tiny_transformers import HOSTILE, copied, flip_a_bit, library

pytestmark = pytest.mark.usefixtures("offline")
PLAIN = BLOCKS.model_copy(update={"attention": "block"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library().utils.logging.set_verbosity_error()
    root = tmp_path_factory.mktemp("language")
    for name in (
        "llama",
        "tied",
        "gpt2",
        "scaled",
        "biased",
        "capped",
        "window",
        "no_positions",
        "state_space",
        "padded",
    ):
        saved(root / name, name)
    saved(root / "sharded", "llama", max_shard_size="20KB")
    return root


def opened(folder: Path, blocks: Blocks | None = BLOCKS) -> HuggingFaceDecoder:
    module, _ = read_model(folder, blocks=blocks)
    assert isinstance(module, HuggingFaceDecoder)
    return module


def theirs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = library().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids.long()).logits
    return logits


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "scaled", "biased", "padded", "sharded"])
def test_logits_are_transformers_own_and_hidden_states_times_the_output_layer(tiny: Path, name: str) -> None:
    model, blocks = opened(tiny / name), some_blocks()
    assert model.head_refusal is None
    with torch.no_grad():
        logits, hidden = model(blocks), model.hidden(blocks)
        torch.testing.assert_close(hidden @ model.output_weight.T, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(plain_logits(opened(tiny / name, PLAIN), blocks[:, 0]), theirs(tiny / name, blocks[:, 0]))
        assert hidden.shape[2] == (33 if name == "biased" else 32)
        # Each document as transformers computes it alone, and no other for its neighbour.
        for part in (slice(0, 6), slice(6, 16)):
            torch.testing.assert_close(logits[:, part], theirs(tiny / name, blocks[:, 0, part]), rtol=1e-4, atol=1e-5)
        blocks[:, 0, :6] = (blocks[:, 0, :6] + 1) % VOCABULARY
        assert torch.equal(model(blocks)[:, 6:], logits[:, 6:])
        assert not torch.equal(model(blocks)[:, :6], logits[:, :6])


def test_bits_of_a_row_depend_on_no_other(tiny: Path) -> None:
    model, blocks, others = opened(tiny / "llama"), some_blocks(8), some_blocks(8, seed=1)
    others[:, 1] = 0  # rows of one document beside a row of two
    with torch.no_grad():
        logits = model(blocks)
        for row in range(8):
            among = others.clone()
            among[7 - row] = blocks[row]
            assert torch.equal(model(among)[7 - row], logits[row])


def test_softcapping_is_found_and_told_to_who_needs_a_linear_head(tiny: Path) -> None:
    model = opened(tiny / "capped")
    assert not model.linear_head
    assert model.head_refusal == "softcapping (final_logit_softcapping in its configuration) behind the output layer"
    with pytest.raises(RefusedError, match=r"stage1_loss: squared needs logits.*") as caught:
        check_linear_head(model, "stage1_loss: squared")
    assert "softcapping" in str(caught.value.got)
    ids = some_blocks()[:, 0]
    torch.testing.assert_close(model(some_blocks())[:, 6:], theirs(tiny / "capped", ids[:, 6:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["no_positions", "state_space"])
def test_who_cannot_keep_documents_apart_is_refused_and_taken_for_whole_blocks(tiny: Path, name: str) -> None:
    with pytest.raises(RefusedError, match="cannot keep the documents of a block apart") as caught:
        opened(tiny / name)
    assert "attention: block" in str(caught.value.next)
    ids = some_blocks()[:, 0]
    with torch.no_grad():
        assert torch.equal(plain_logits(opened(tiny / name, PLAIN), ids), theirs(tiny / name, ids))


def test_documents_that_see_each_other_are_noticed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from akd_dist.models import huggingface_lm

    seen_by_all = staticmethod(lambda starts: torch.ones(len(starts), 1, *[starts.shape[1]] * 2).tril().bool())
    monkeypatch.setattr(huggingface_lm, "document_mask", seen_by_all.__func__)
    with pytest.raises(RefusedError, match="apart") as caught:
        opened(tiny / "llama")
    assert "with the document before" in str(caught.value.got)


@pytest.mark.parametrize(
    ("name", "blocks", "said", "got"),
    [
        ("llama", {"vocabulary": 51}, "fewer tokens than the data", "vocab_size 50"),
        ("llama", {"length": 33}, "does not take blocks of this length", "33 tokens"),
        ("window", {}, "sees a window of tokens only", "a window of 8"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(tiny: Path, name: str, blocks: Any, said: str, got: str) -> None:
    with pytest.raises(RefusedError, match=said) as caught:
        load_card(tiny / name, blocks=BLOCKS.model_copy(update=blocks))
    assert got in str(caught.value.got)


def test_a_padded_head_keeps_its_rows_and_the_data_its_vocabulary(tiny: Path) -> None:
    model, card = read_model(tiny / "padded", blocks=BLOCKS)
    assert isinstance(model, LanguageModel)
    assert model.output_weight.shape == (64, 32)
    assert (card.classes, card.blocks) == (VOCABULARY, BLOCKS)


# ---- training


def test_training_starts_from_its_weights_or_from_random_ones(tiny: Path) -> None:
    spec = recipe.HuggingFaceLm(path=str(tiny / "gpt2"))
    card = ModelCard.of_blocks(spec, BLOCKS)
    tuned, fresh = (build(card, seed=0, pretrained=wanted) for wanted in (True, False))
    assert tuned.training
    assert torch.equal(tuned.eval()(some_blocks()), opened(tiny / "gpt2")(some_blocks()))
    assert not torch.equal(fresh.eval()(some_blocks()), tuned(some_blocks()))
    shallow = spec.model_copy(update={"pretrained": False, "config": {"num_hidden_layers": 1, "vocab_size": 60}})
    module = build(ModelCard.of_blocks(shallow, BLOCKS), seed=0)
    assert isinstance(module, LanguageModel)
    assert module.output_weight.shape == (60, 32)
    with pytest.raises(RefusedError, match="cannot be set"):
        ModelCard.of_blocks(spec.model_copy(update={"config": {"auto_map": {}}}), BLOCKS)
    deeper = spec.model_copy(update={"config": {"n_layer": 3}})
    with pytest.raises(RefusedError, match="do not fit its configuration") as caught:
        build(ModelCard.of_blocks(deeper, BLOCKS), seed=0, pretrained=True)
    assert "missing" in str(caught.value.got)


def test_fewer_layers_than_a_folder_has_are_its_first_ones(tiny: Path) -> None:
    spec = recipe.HuggingFaceLm(path=str(tiny / "tied"), config={"num_hidden_layers": 1})
    cut = build(ModelCard.of_blocks(spec, BLOCKS), pretrained=True).state_dict()
    whole = opened(tiny / "tied").state_dict()
    assert len(cut) == 9 + 2
    assert all(torch.equal(weight, whole[name]) for name, weight in cut.items())


def test_gradients_flow_through_states_and_head_and_checkpointing_changes_none(tiny: Path) -> None:
    def gradients(on: bool, precision: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        model = opened(tiny / "tied").train()
        model.gradient_checkpointing_enable(on)
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss: torch.Tensor = (model.hidden(some_blocks()).float() @ model.output_weight.T).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    plain, kept = gradients(False), gradients(True)
    assert len(plain) == 2 * 9 + 2
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    half = gradients(True, torch.bfloat16)
    assert all(half[name].dtype == torch.float32 for name in plain)
    assert not torch.equal(half["model.model.norm.weight"], plain["model.model.norm.weight"])


def test_what_ends_documents_is_learnt_where_it_is_padding_too(tiny: Path) -> None:
    model = opened(tiny / "llama").train()
    assert model.model.config.pad_token_id == 0
    blocks = some_blocks()
    blocks[:, 0, 5] = 0
    model(blocks).square().mean().backward()
    gradient = model.model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert float(gradient[0].abs().max()) > 0


# ---- folders


@pytest.mark.parametrize("name", ["llama", "tied", "biased", "capped"])
def test_a_folder_of_ours_needs_theirs_no_more(tiny: Path, tmp_path: Path, name: str) -> None:
    model, card = read_model(tiny / name, blocks=BLOCKS)
    save_model(tmp_path, model, card)
    again, ours = read_model(tmp_path)
    assert torch.equal(again(some_blocks()), model(some_blocks()))
    assert isinstance(again, HuggingFaceDecoder)
    assert isinstance(model, HuggingFaceDecoder)
    assert again.head_refusal == model.head_refusal
    assert ours.blocks == BLOCKS
    assert isinstance(ours.model, recipe.HuggingFaceLm)
    assert ours.model.path == name
    if name == "tied":  # once
        assert "model.lm_head.weight" not in model.state_dict()
        assert (tmp_path / WEIGHTS).stat().st_size < (tiny / "llama" / WEIGHTS).stat().st_size


def test_a_folder_is_known_by_content_and_by_what_it_is_run_on(tiny: Path, tmp_path: Path) -> None:
    prints = {name: load_card(tiny / name, blocks=BLOCKS).fingerprint for name in ("llama", "tied", "gpt2")}
    assert len(set(prints.values())) == 3
    moved = tmp_path / "elsewhere"
    copied(tiny / "llama", moved)
    assert load_card(moved, blocks=BLOCKS).fingerprint == prints["llama"]
    assert load_card(moved, blocks=PLAIN).fingerprint != prints["llama"]
    alone = load_card(moved).blocks
    assert alone == Blocks(length=32, vocabulary=VOCABULARY, end_of_text=0)
    flip_a_bit(moved / WEIGHTS)
    assert load_card(moved, blocks=BLOCKS).fingerprint != prints["llama"]
    spec = recipe.HuggingFaceLm(path=str(tiny / "llama"))
    assert by_content(spec) != by_content(spec.model_copy(update={"path": str(moved)}))


def test_sharded_weights_are_the_same_model(tiny: Path, tmp_path: Path) -> None:
    assert not (tiny / "sharded" / WEIGHTS).exists()
    assert torch.equal(opened(tiny / "sharded")(some_blocks()), opened(tiny / "llama")(some_blocks()))
    card = ModelCard.of_blocks(recipe.HuggingFaceLm(path=str(tiny / "llama")), BLOCKS)
    whole, parts = (open_for_card(card, str(tiny / name), tmp_path) for name in ("llama", "sharded"))
    assert whole.card.fingerprint == parts.card.fingerprint
    assert torch.equal(parts.module(tmp_path)(some_blocks()), opened(tiny / "llama")(some_blocks()))
    again = open_for_card(card, str(tiny / "sharded"), tmp_path)
    assert again.card == parts.card  # by what is remembered: nothing is loaded
    assert again.notes == []
    whole.publish(str(tmp_path / "folder"), tmp_path)
    assert load_card(tmp_path / "folder").fingerprint == whole.card.fingerprint


def test_a_missing_shard_and_a_pickle_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny / "sharded", tmp_path / "cut")
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    with pytest.raises(RefusedError, match="is not whole"):
        read_model(folder)
    pickled = copied(tiny / "llama", tmp_path / "pickled")
    (pickled / WEIGHTS).rename(pickled / "pytorch_model.bin")
    with pytest.raises(RefusedError, match="pickles are never unpickled"):
        read_model(pickled)
    (pickled / WEIGHTS).write_bytes((pickled / "pytorch_model.bin").read_bytes()[:2000])
    with pytest.raises(RefusedError, match="cannot be read"):
        read_model(pickled)


@pytest.mark.parametrize("hostile", HOSTILE, ids=str)
def test_a_configuration_that_names_code_runs_none(tiny: Path, tmp_path: Path, hostile: dict[str, Any]) -> None:
    folder = copied(tiny / "llama", tmp_path / "hostile")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | hostile))
    try:
        model = opened(folder)
    except RefusedError:
        return
    assert model.model.config._attn_implementation == "sdpa"
    assert type(model.model).__module__.startswith("transformers.")


def test_memory_is_looked_at_before_it_is_built(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "free_memory", lambda device: 1000)
    with pytest.raises(RefusedError, match="does not fit the memory"):
        read_model(tiny / "llama")


def test_another_tokenizer_and_longer_blocks_are_refused_by_the_card(tiny: Path) -> None:
    card = load_card(tiny / "llama", blocks=BLOCKS)
    assert card.on_blocks(BLOCKS, "it") == card
    run = card.on_blocks(BLOCKS.model_copy(update={"vocabulary": 40, "length": 8, "attention": "block"}), "it")
    assert (run.classes, run.input_shape) == (VOCABULARY, (3, 8))
    assert run.blocks is not None
    assert run.blocks.attention == "block"
    for change, said in (
        ({"tokenizer": "0" * 64}, "another tokenizer"),
        ({"vocabulary": 60}, "another tokenizer"),
        ({"length": 17}, "shorter blocks"),
    ):
        with pytest.raises(RefusedError, match=said):
            card.on_blocks(BLOCKS.model_copy(update=change), "it")
    other = BLOCKS.model_copy(update={"tokenizer": "0" * 64})
    assert card.on_blocks(other, "it", compared=True).blocks == BLOCKS


def test_a_classifier_is_no_language_model(folders: Path, tiny: Path) -> None:
    with pytest.raises(RefusedError, match="is no causal language model"):
        ModelCard.of_blocks(recipe.HuggingFaceLm(path=str(folders / "distilbert")), BLOCKS)
    with pytest.raises(RefusedError, match="there is no config"):
        ModelCard.of_blocks(recipe.HuggingFaceLm(path=str(tiny)), BLOCKS)


def test_cards_of_before_keep_their_bytes() -> None:
    from tests.tiny_transformers import rows

    card = ModelCard.of(recipe.TextTransformer(width=8), rows(), None)
    assert "blocks" not in card.model_dump(mode="json")
    assert CARD == "model.json"
