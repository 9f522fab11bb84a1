"""Texts of the standard library: passages with the package that each comes from; documents, and their tokenizer."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from akd_dist.data.tokenizers import language_tokenizer
from akd_dist.jobs import stdlib_texts
from akd_dist.jobs.stdlib_texts import LEAST_CHARACTERS, PACKAGES, main
from akd_dist.recipe import HuggingFaceText


def test_it_writes_passages_of_every_package(tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    done = CliRunner().invoke(main, [str(path)])
    table = pq.read_table(path)
    assert done.exit_code == 0
    assert f"{len(table):,} passages" in done.output
    assert set(table["package"].to_pylist()) == set(PACKAGES)
    texts = table["text"].to_pylist()
    assert len(set(texts)) == len(texts) > 5_000
    assert min(map(len, texts)) >= LEAST_CHARACTERS


def test_it_writes_documents_and_a_tokenizer_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdlib_texts, "PACKAGES", ("json",))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        folder = tmp_path / name / "tokenizer"
        options = [str(tmp_path / name / "texts.parquet"), "--documents", "--tokenizer", str(folder)]
        done = CliRunner().invoke(main, [*options, "--vocabulary", "400"])
        assert done.exit_code == 0, done.output
        monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    files = [Path("texts.parquet"), Path("tokenizer/tokenizer.json"), Path("tokenizer/tokenizer_config.json")]
    assert all((tmp_path / "one" / one).read_bytes() == (tmp_path / "two" / one).read_bytes() for one in files)
    texts = pq.read_table(tmp_path / "one" / "texts.parquet")["text"].to_pylist()
    assert any(text.startswith('r"""JSON (JavaScript Object Notation)') for text in texts)
    tokenizer = language_tokenizer(HuggingFaceText(path=str(folder), length=8))
    assert tokenizer.tokens.vocabulary == 400
    (ids,) = tokenizer.encode([texts[0]])
    assert tokenizer.decode(ids) == texts[0]
    assert ids[-1] == tokenizer.tokens.end_of_text


def test_documents_may_be_the_beginnings_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib_texts, "PACKAGES", ("json",))
    whole, cut = stdlib_texts.documents(), tmp_path / "cut.parquet"
    done = CliRunner().invoke(main, [str(cut), "--documents", "--characters", "300"])
    assert done.exit_code == 0, done.output
    texts = pq.read_table(cut)["text"].to_pylist()
    assert set(texts) == {text[:300] for text in whole["text"].to_pylist()}
    done = CliRunner().invoke(main, [str(cut), "--characters", "300"])
    assert done.exit_code == 2
    assert "--documents" in done.output


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(tmp_path / "texts.parquet"), "--vocabulary", "200"])
    assert done.exit_code == 2
    assert "258" in done.output
