"""Finished language models on texts: metrics against dense logits, per-token predictions, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F  # noqa: N812  # its usual name

import akd_dist
from akd_dist import recipe
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.cli import main
from akd_dist.data.packing import IDS, TARGETS
from akd_dist.data.row_cache import prepare
from akd_dist.data.tokenizers import ByteDocuments, language_tokenizer
from akd_dist.documents.use import EvaluationDocument, PredictionDocument
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_model, save_model
from akd_dist.models.language import Blocks, LanguageModel, plain_logits
from akd_dist.serve import language, language_data
from akd_dist.serve.served import open_model
from tests.language_models import saved
from tests.tokenizers import TELLING, a_byte_pair_tokenizer

BYTES = ByteDocuments.tokens
TEXTS = ["hello world " * 12, "", "x", "hé", "the last one " * 30]
RECIPE = """\
name: bytes
data:
  train: {kind: text, path: docs.parquet}
  validation: {kind: text, path: docs.parquet}
  test: {kind: text, path: docs.parquet}
  task: language_model
  text: {kind: bytes, length: 32}
teacher: {weights: teacher}
students:
  - name: small
    model: {kind: causal_lm, width: 32, depth: 1, heads: 2}
    objective: {kind: hard_labels, epochs: 1}
    optimizer: {kind: adamw, lr: 1e-3}
"""


def a_model(folder: Path, seed: int = 0, length: int = 32, **changes: object) -> Path:
    about = {"length": length, "vocabulary": 260, "tokenizer": BYTES.tokenizer, "end_of_text": BYTES.end_of_text}
    card = ModelCard.of_blocks(recipe.CausalLm(width=32, depth=1, heads=2), Blocks.model_validate(about | changes))
    module = build(card, seed)
    for weight in module.parameters():  # so that it does not find all bytes alike
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(seed + weight.numel()))
    save_model(folder, module, card)
    return folder


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "docs.parquet")
    return tmp_path / "docs.parquet"


def loaded(folder: Path) -> LanguageModel:
    module = load_model(folder)
    assert isinstance(module, LanguageModel)
    return module


def of_each_token(folder: Path, text: str, length: int = 32) -> list[float]:
    """Log-probabilities of all tokens of a document but the first, by all logits, window by window."""
    (ids,), module, found = ByteDocuments().encode([text]), loaded(folder), list[float]()
    for start in range(0, max(len(ids) - 1, 0), length - 1):
        part = torch.from_numpy(ids[start : start + length]).long()
        with torch.inference_mode():
            logs = plain_logits(module, part[None])[0].log_softmax(-1)
        found += logs[:-1].gather(1, part[1:, None])[:, 0].tolist()
    return found


def evaluated(*words: object, **options: object) -> EvaluationDocument:
    return EvaluationDocument.model_validate(akd_dist.evaluate(*words, **options))  # type: ignore[arg-type]


def test_files_are_evaluated_document_by_document(tmp_path: Path, docs: Path) -> None:
    folder = a_model(tmp_path / "small")
    document = evaluated(folder, docs)
    expected = [one for text in TEXTS for one in of_each_token(folder, text)]
    metrics = document.student.metrics
    assert (document.rows, document.targets, document.split) == (len(TEXTS), len(expected), None)
    assert metrics["cross_entropy"] == pytest.approx(-np.mean(expected), rel=1e-5)
    assert metrics["loss"] == metrics["cross_entropy"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["cross_entropy"]))
    # Ends of text are targets and no text; the first byte of a document is text that nothing predicts.
    text = sum(max(len(one.encode()) - 1, 0) for one in TEXTS)
    assert metrics["bits_per_byte"] == pytest.approx(-np.sum(expected) / math.log(2) / text, rel=1e-5)


def test_a_split_is_evaluated_in_the_blocks_of_its_recipe(tmp_path: Path, docs: Path) -> None:
    run = tmp_path / "runs" / "bytes"
    folder = a_model(run / "students" / "small")
    (run / "recipe.yaml").write_text(RECIPE.replace("docs.parquet", str(docs)))
    document = evaluated(folder, run, cache_root=tmp_path / "cache")
    rows = prepare(recipe.load_recipe(run / "recipe.yaml").data, tmp_path / "cache").test
    blocks = torch.from_numpy(np.array(rows.inputs))
    at = blocks[:, TARGETS].bool()
    labels = blocks[:, IDS].roll(-1, 1)[at].long()
    with torch.inference_mode():
        logits = loaded(folder)(blocks)[at]
    assert (document.rows, document.split, document.targets) == (len(rows), "test", len(labels))
    metrics = document.student.metrics
    assert metrics["cross_entropy"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    alone = language.metrics_of_rows(open_model(str(folder)), rows)
    assert alone == metrics.model_copy(update={"bits_per_byte": None})
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    out = tmp_path / "said.parquet"
    akd_dist.predict(folder, run, out, cache_root=tmp_path / "cache")
    table = pq.read_table(out)
    assert table.column("segments").to_pylist() == blocks[:, 1].tolist()
    assert sum(table.column("targets").to_pylist()) == len(labels)
    assert -sum(table.column("log_probability").to_pylist()) / len(labels) == pytest.approx(metrics["cross_entropy"])


def test_others_are_compared_without_all_logits(
    tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = a_model(tmp_path / "one"), a_model(tmp_path / "two", seed=1)
    whole = evaluated(one, docs, others=[two, one])
    monkeypatch.setattr(language, "chunk_targets", lambda vocabulary: 7)
    monkeypatch.setattr(language_data, "BATCH_TOKENS", 64)
    parts = evaluated(one, docs, others=[two, one])
    other, same = parts.others
    assert same.agreement == 1
    assert same.divergence == pytest.approx(0.0, abs=1e-6)
    assert other.divergence == pytest.approx(whole.others[0].divergence, rel=1e-5)
    assert other.agreement == whole.others[0].agreement
    counts = [other.both_right, other.student_right, other.other_right, other.both_wrong]
    assert counts == [
        getattr(whole.others[0], name) for name in ("both_right", "student_right", "other_right", "both_wrong")
    ]
    assert sum(one or 0 for one in counts) == parts.targets
    ids = [torch.from_numpy(part).long() for part in ByteDocuments().encode(["hé"])]
    with torch.inference_mode():
        q, p = (plain_logits(loaded(folder), ids[0][None])[0, :-1].log_softmax(-1) for folder in (one, two))
    pq.write_table(pa.table({"text": ["hé"]}), tmp_path / "short.parquet")
    short = evaluated(one, tmp_path / "short.parquet", others=[two]).others[0]
    assert short.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", str(one), str(docs), "--with", str(two)])
    assert "KL to it" in capsys.readouterr().out


def test_every_token_of_every_document_is_predicted(
    tmp_path: Path, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_model(tmp_path / "small")
    monkeypatch.setattr(language_data, "BATCH_TOKENS", 64)
    written = PredictionDocument.model_validate(akd_dist.predict(folder, docs, tmp_path / "said.parquet"))
    table = pq.read_table(tmp_path / "said.parquet")
    assert written.columns == ["row", "tokens", "log_probabilities", "targets", "log_probability"] == table.column_names
    assert json.loads(table.schema.metadata[b"akd_dist"])["tokenizer"] == BYTES.tokenizer
    for row, (text, said) in enumerate(zip(TEXTS, table.to_pylist(), strict=True)):
        expected = of_each_token(folder, text)
        assert (said["row"], said["targets"]) == (row, len(expected))
        assert said["tokens"] == ByteDocuments().encode([text])[0].tolist()
        assert said["log_probabilities"][:1] == [None] * bool(said["tokens"])
        assert said["log_probabilities"][1:] == pytest.approx(expected, abs=1e-4)
        assert said["log_probability"] == pytest.approx(sum(expected), abs=1e-2)


def test_files_of_each_kind_are_read(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "small")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    (tmp_path / "plain").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "plain" / f"{number}.txt").write_text(text)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "docs.parquet")
    said = [
        evaluated(folder, tmp_path / "lines.jsonl", input="body"),
        evaluated(folder, tmp_path / "plain"),
        evaluated(folder, tmp_path / "docs.parquet"),
    ]
    assert len({one.student.metrics["cross_entropy"] for one in said}) == 1
    akd_dist.predict(folder, tmp_path / "plain", tmp_path / "said.parquet")
    files = pq.read_table(tmp_path / "said.parquet").column("file").to_pylist()
    assert [Path(one).name for one in files] == [f"{number}.txt" for number in range(len(TEXTS))]


def test_chats_are_read_as_in_the_recipe_of_the_run(tmp_path: Path) -> None:
    words = a_byte_pair_tokenizer(tmp_path / "tokenizer", template=TELLING)
    tokens = language_tokenizer(recipe.HuggingFaceText(path=str(words))).tokens
    run = tmp_path / "runs" / "chats"
    folder = a_model(run / "students" / "small", vocabulary=tokens.vocabulary, tokenizer=tokens.tokenizer)
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
    pq.write_table(pa.table({"turns": [said] * 3}), tmp_path / "chats.parquet")
    text = RECIPE.replace("{kind: text, path: docs.parquet}", "{kind: chat, path: chats.parquet, input: turns}")
    text = text.replace("{kind: bytes, length: 32}", f"{{kind: huggingface, path: {words}, length: 32}}")
    (run / "recipe.yaml").write_text(text.replace("  task:", "  scored: completions\n  task:"))
    document = evaluated(folder, tmp_path / "chats.parquet")
    akd_dist.predict(folder, tmp_path / "chats.parquet", tmp_path / "said.parquet")
    first = pq.read_table(tmp_path / "said.parquet").to_pylist()[0]
    learnt = [one for one, log in zip(first["tokens"], first["log_probabilities"], strict=True) if log is not None]
    assert language_tokenizer(recipe.HuggingFaceText(path=str(words))).decode(learnt) == "sat on the mat"
    assert document.targets == 3 * len(learnt)


def test_a_folder_of_transformers_is_measured_by_the_tokenizer_beside_it(tmp_path: Path) -> None:
    words = a_byte_pair_tokenizer(tmp_path / "tokenizer", vocabulary=300)
    folder = saved(tmp_path / "model", "llama")
    (tmp_path / "a.txt").write_text("the cat sat")
    with pytest.raises(RefusedError, match="nobody knows the tokenizer"):
        evaluated(folder, tmp_path / "a.txt")
    with pytest.raises(RefusedError, match="made for another tokenizer"):
        evaluated(folder, tmp_path / "a.txt", tokenizer=words)


def test_who_is_not_for_texts_is_refused(tmp_path: Path, docs: Path) -> None:
    folder = a_model(tmp_path / "small")
    other = a_model(tmp_path / "other", tokenizer="f" * 64)
    with pytest.raises(RefusedError, match="made for another tokenizer"):
        evaluated(folder, docs, others=[other])
    with pytest.raises(RecipeError, match="have no labels but their own tokens"):
        evaluated(folder, docs, label="label")
    with pytest.raises(RefusedError, match="digits are pictures"):
        evaluated(folder, "digits")
    with pytest.raises(RecipeError, match="--split is not for data other than a recipe"):
        evaluated(folder, docs, split="test")
    (tmp_path / "longer.yaml").write_text(RECIPE.replace("docs.parquet", str(docs)).replace("length: 32", "length: 64"))
    with pytest.raises(RefusedError, match="made for shorter blocks"):
        evaluated(folder, tmp_path / "longer.yaml", cache_root=tmp_path / "cache")
    with pytest.raises(RefusedError, match="no column"):
        evaluated(folder, docs, input="body")
    with pytest.raises(RecipeError, match="is there already"):
        akd_dist.predict(folder, docs, docs)
