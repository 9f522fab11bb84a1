"""The `stores` commands: what they show, remove and verify."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import akd_dist
from akd_dist.base.errors import RefusedError
from akd_dist.base.locks import file_lock
from akd_dist.cli.show import in_words
from akd_dist.cli.store_facts import in_order
from akd_dist.documents.stores import GcDocument, StoreDocument, StoresDocument, VerifyDocument
from akd_dist.storage.decoded import open_decoded
from akd_dist.storage.node_cache import cache_folder
from akd_dist.storage.reader import open_store
from akd_dist.storage.uses import using
from tests.told import in_a_terminal

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_what_a_document_is_of_comes_first() -> None:
    model = {"depth": 3, "kind": "cnn"}
    assert in_words({"flip": True, "kind": "x", "model": model}) == "kind x, flip True, model (kind cnn, depth 3)"


def test_an_empty_root_has_no_stores(run: Any) -> None:
    assert "no stores under stores" in run("stores", "list").out
    assert run("stores", "list", "--json").document == {"store_root": str(Path.cwd() / "stores"), "stores": []}
    assert run("stores", "gc", "--json").document == {"dry_run": False, "removed": [], "stores": [], "problems": []}


@pytest.mark.parametrize("command", ["show", "verify", "repair"])
def test_a_store_that_is_not_there_is_refused(command: str, run: Any) -> None:
    outcome = run("stores", command, "abc", "--json")
    assert outcome.code == 4
    assert "no store begins with 'abc'" in outcome.error["what"]


def test_a_sealed_store_is_listed_and_shown_by_a_short_id(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    listed = run("stores", "list")
    assert re.search(
        rf"^{store.name[:12]} +sealed +mlp-16 1057a9 +train 300 b277fd +2 ", listed.out, flags=re.MULTILINE
    )
    assert max(map(len, listed.out.splitlines())) <= 160
    shown = run("stores", "show", store.name[:6])
    assert store.name in shown.out
    assert "batch_rows" in shown.out
    document = run("stores", "show", store.name[:6], "--json").document
    assert document["manifest"]["id"] == document["id"] == store.name
    assert document["store"] == str(store)


def test_a_hint_of_another_shape_stops_nothing(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    for hint in ('{"split": [1]}', '{"recipe": 4}', "[]", "{"):
        (store / "source.json").write_text(hint)
        assert run("stores", "list").code == 0, hint
        refused = run("stores", "repair", store.name[:6], "--json")
        assert (refused.code, refused.error["next"]) == (4, "add --recipe RECIPE"), hint


def test_an_unsealed_store_says_how_far_it_is(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    (store / "manifest.json").unlink()
    assert "shards" in run("stores", "list").out
    shown = run("stores", "show", store.name[:12])
    assert shown.code == 0
    assert re.search(r"state +\d+ of \d+ shards", shown.out)
    assert run("stores", "verify", store.name[:12]).code == 4


def test_a_list_fits_a_narrow_terminal_and_a_pipe_has_more(
    root: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store,) = root.iterdir()
    hint = {"split": "validation", "recipe": {"data": {"train": {"kind": "parquet", "path": "/data/birds-of-europe"}}}}
    (store / "source.json").write_text(json.dumps(hint))
    with using([str(store)], run=str(Path.cwd() / "runs" / "one")):
        pass
    assert "birds-of-europe validation 300 b277fd" in run("stores", "list").out
    narrow = re.sub("\x1b\\[[0-9;]*m", "", in_a_terminal("stores", "list"))
    assert max(len(line.rstrip()) for line in narrow.splitlines()[1:]) <= 80
    for told in (store.name[:8], "mlp-16", "1057a9", "birds-of-europe", "b277fd", "6.2 kB", "just now"):
        assert told in narrow, told
    assert "…" not in narrow


def test_documents_of_stores_say_who_used_them(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    one = Path.cwd() / "runs" / "one"
    with using([str(store)], run=str(one), lock=one / "lock"):
        pass
    listed = StoresDocument.model_validate(run("stores", "list", "--json").document)
    shown = StoreDocument.model_validate(run("stores", "show", store.name[:6], "--json").document)
    assert listed.stores[0].runs == shown.runs == [str(one)]
    assert shown.uses[0].lock == str(one / "lock")
    assert shown.model == "mlp-16"
    assert shown.receipts.hosts
    assert shown.decoded is None
    in_words = run("stores", "show", store.name[:6]).out
    assert re.search(r"^used +20\d\d-\S+ \S+ +runs/one +\S+@\S+ ", in_words, re.MULTILINE)
    open_decoded(open_store(str(store)), cache_folder())
    assert re.search(r"decoded +\S+ k?B on this machine", run("stores", "show", store.name[:6]).out)


def test_gc_removes_stores_only_when_it_may(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    assert run("stores", "gc").out == "0 files of interrupted runs removed\n"
    for words in ((store.name[:6],), ("--older-than", "0h"), ("--older-than", "3x", "--yes"), ("--unused-for", "2d")):
        assert run("stores", "gc", *words).code == 2, words
    assert "no stores to remove" in run("stores", "gc", "--older-than", "20000w", "--yes").out
    dry = run("stores", "gc", "--older-than", "0h", "--dry-run")
    assert (dry.code, "1 store, 6.2 kB" in dry.out) == (0, True)
    run_folder = Path.cwd() / "runs" / "one"
    with file_lock(run_folder / "lock", what="x"), using([str(store)], run="runs/one", lock=run_folder / "lock"):
        held = run("stores", "gc", store.name[:6], "--older-than", "0h", "--yes", "--json").document
    GcDocument.model_validate(held)
    assert f"in use by the run {run_folder} on " in held["stores"][0]["kept"]
    assert open_store(str(store)).verify() == []
    done = run("stores", "gc", "--older-than", "0h", "--yes")
    assert f"removed store {store.name[:12]}, 6.2 kB" in done.out
    assert list(root.iterdir()) == []


def test_a_bad_store_is_a_line_beside_the_others(root: Path, run: Any) -> None:
    """One whose folder cannot be listed, one of deep JSON, one whose words are markup to the table that shows them."""
    (store,) = root.iterdir()
    (store / "arrays.zarr/logits/c/0/0/0.0123456789ab.partial").touch()
    closed, deep = root / ("c" * 64), root / ("d" * 64)
    closed.mkdir()
    (closed / "creation.json").symlink_to("creation.json")  # which no user can follow
    deep.mkdir()
    (deep / "creation.json").write_bytes(b"[" * 200_000)
    source = {"kind": "parquet", "path": "/data/[/birds]"}
    (store / "source.json").write_text(json.dumps({"split": "train", "recipe": {"data": {"train": source}}}))
    listed = run("stores", "list")
    assert listed.code == 0
    assert "birds] train 300" in listed.out
    assert f"{'c' * 12}: cannot read {closed}/creation.json: Too many levels of symbolic links" in listed.err
    assert f"{'d' * 12}: {deep}/creation.json is damaged: " in listed.err
    problems = {one["id"]: one["problem"] for one in run("stores", "list", "--json").document["stores"]}
    assert problems[store.name] is None
    assert "symbolic links" in problems[closed.name]
    assert "is damaged" in problems[deep.name]
    assert run("stores", "verify", store.name[:6]).code == 0
    partial = str(next(root.rglob("*.partial")).relative_to(root))
    collected = run("stores", "gc", "--json", "--dry-run").document
    GcDocument.model_validate(collected)
    assert (collected["removed"], [one["id"] for one in collected["problems"]]) == (
        [partial, f"{'d' * 64}/"],
        ["c" * 64],
    )
    outcome = run("stores", "gc", "--older-than", "0h", "--yes")
    assert outcome.code == 0
    assert f"{'c' * 12}: cannot read" in outcome.err
    assert f"stays: {'c' * 12}, cannot read" in outcome.out
    assert [path.name for path in root.iterdir()] == ["c" * 64]


def test_gc_asks_on_a_terminal(root: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    refused = run("stores", "gc", "--older-than", "0h", "--json")
    assert (refused.code, refused.document["dry_run"], len(refused.document["stores"])) == (0, True, 1)
    for answer, left in (("n", 1), ("y", 0)):
        monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
        outcome = run("stores", "gc", "--older-than", "0h")
        assert outcome.code == 0
        assert "remove 1 store, 6.2 kB? [y/N]" in outcome.err
        assert len(list(root.iterdir())) == left


def test_verify_finds_damage_and_exits_5(root: Path, run: Any) -> None:
    (store,) = root.iterdir()
    assert "is what was sealed" in run("stores", "verify", store.name[:12]).out
    shard = next((store / "arrays.zarr" / "logits" / "c").rglob("0"))
    while shard.is_dir():
        shard = next(shard.iterdir())
    damaged = bytearray(shard.read_bytes())
    damaged[10] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(damaged)
    key = str(shard.relative_to(store))
    outcome = run("stores", "verify", store.name[:12])
    assert (outcome.code, outcome.out) == (5, "")
    assert key in outcome.err
    assert f"next: akd-dist stores repair {store.name[:12]}" in outcome.err
    as_json = run("stores", "verify", store.name[:12], "--json")
    assert as_json.code == 5
    assert [damage.key for damage in VerifyDocument.model_validate(as_json.document).damages] == [key]
    assert run("stores", "verify", store.name[:12], "--shallow").code == 0


def test_open_store_reads_rows(root: Path) -> None:
    (store,) = root.iterdir()
    opened = akd_dist.open_store(store)
    assert opened.rows(0, 0, 2).shape == (2, opened.classes)
    assert repr(opened).startswith(f"LogitStore('{store}': 2 views of ")


def test_open_store_takes_ids_as_the_commands_do(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (store,) = root.iterdir()
    for named in (f"{root}/{store.name[:6]}", root / store.name[:6], f"{root}/{store.name}/"):
        assert akd_dist.open_store(named).uri == str(store)
    assert akd_dist.open_store(store.name[:4], store_root=root).id == store.name
    monkeypatch.setenv("AKD_DIST_STORE_ROOT", str(root))
    assert akd_dist.open_store(store.name[:4]).id == akd_dist.open_store(store.name).id == store.name
    (tmp_path / "cafe").symlink_to(store)  # a folder that is there is what is meant
    monkeypatch.chdir(tmp_path)
    assert akd_dist.open_store("cafe").uri == akd_dist.open_store(tmp_path / "cafe").uri == str(tmp_path / "cafe")
    for named in ("fff0", f"{root}/fff0"):
        with pytest.raises(RefusedError, match=f"no store begins with 'fff0' under {root}"):
            akd_dist.open_store(named)
    with pytest.raises(RefusedError, match="no store"):
        akd_dist.open_store(root / "no-store")


def test_stores_stand_in_the_order_of_their_last_use() -> None:
    def store(teacher: str, used: float | None, split: str = "train", modified: float = 9.0) -> Any:
        return SimpleNamespace(teacher=teacher, last_used=used, modified=modified, hint={"split": split})

    old, never = store("a", 1.0), store("b", None, modified=99.0)
    test, train = store("b", 5.0, "test"), store("b", 4.0)
    assert in_order([never, old, test, train]) == [train, test, old, never]
