"""The corpus of jobs/text.yaml: real passages, each with the package it comes from."""

from pathlib import Path

import pyarrow.parquet as pq
from click.testing import CliRunner

from akd_dist.jobs.stdlib_texts import LEAST_CHARACTERS, PACKAGES, main


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
