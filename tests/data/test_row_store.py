"""Rows prepared block by block are those that one process prepares, whoever wrote which block, and whatever broke."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from akd_dist.base.errors import DamagedError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.data import row_blocks, row_runs, row_store, rows
from akd_dist.data.row_blocks import BlockRun, write_run
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import fetch_rows
from akd_dist.data.row_store import Prepared, RowsPlan, Take, ensure_rows, find_prepared
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.recipe import ByteText, DataSpec, Digits
from akd_dist.storage import removal, rows as stored
from akd_dist.storage.catalog import list_stores
from akd_dist.storage.layout import BLOCKS, CREATION_KEY, MANIFEST_KEY
from akd_dist.storage.uses import using
from tests import sources
from tests.sources import KINDS, source

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, row_store):
        monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr("akd_dist.data.row_entry.BLOCK_ROWS", 16)
    monkeypatch.setattr(row_runs, "_QUICK_BLOCKS", 2)


def loop(plan: RowsPlan, take: Take) -> None:
    """As tasks do it: what they are given, and what they return, comes and goes as bytes."""
    for run in plan.runs:
        there = pickle.loads(pickle.dumps((plan.job, run)))
        take(pickle.loads(pickle.dumps(write_run(*there))))


def noting(seen: list[BlockRun]) -> row_store.Compute:
    def compute(plan: RowsPlan, take: Take) -> None:
        seen.extend(plan.runs)
        loop(plan, take)

    return compute


def at_root(data: DataSpec, root: Path, compute: row_store.Compute = loop, **options: Any) -> Prepared:
    return ensure_rows(data, str(root / "stores"), compute, **options)


def check_same(one: Splits, other: Splits) -> None:
    assert one.fingerprints == other.fingerprints
    assert one.findings == other.findings
    for name in SPLITS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.describe() == theirs.describe()
        np.testing.assert_array_equal(mine.inputs, theirs.inputs)
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        mine.content().verify()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count: int, coloured: int) -> list[bytes]:
    """Grey ones, but for that row."""
    grey = [png(RNG.integers(0, 256, (4, 5), dtype=np.uint8)) for _ in range(count)]
    grey[coloured] = png(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return grey


def table(folder: Path, inputs: Any, labels: Any, **options: Any) -> Any:
    return sources.parquet(folder, pa.table({"input": inputs, "label": labels}), **options)


VECTORS = RNG.normal(size=(200, 3)).astype(np.float32).tolist()
NAMES = [["cat", "dog", "eel"][number % 3] for number in range(200)]
TEXTS = [f"the text of row {number % 50}" for number in range(200)]
IMAGES = RNG.integers(0, 256, (150, 4, 4), dtype=np.uint8)


def own_sources(folder: Path) -> DataSpec:
    """Each split from a file of its own; names that are numbered as those of train, and rows in two of them."""
    later = {name: table(folder / name, VECTORS[30:90], NAMES[30:90]) for name in ("validation", "test")}
    return DataSpec(train=table(folder / "train", VECTORS, NAMES), **later)


def of_kind(kind: str, folder: Path) -> DataSpec:
    return DataSpec(train=source(kind, folder, IMAGES, [0, 1, 2] * 50))


DATA: dict[str, Callable[[Path], DataSpec]] = {
    "digits": lambda _: DataSpec(train=Digits()),
    "stratified": lambda _: DataSpec(train=Digits(), stratify=True, subset=300, seed=3),
    "sources": own_sources,
    "half": lambda folder: DataSpec(
        train=table(folder / "one", VECTORS, NAMES), test=table(folder / "two", VECTORS[:40], NAMES[:40])
    ),
    "text": lambda folder: DataSpec(train=table(folder, TEXTS, NAMES), text=ByteText(length=12)),
    "regression": lambda folder: DataSpec(
        train=table(folder, VECTORS, RNG.normal(size=200).tolist()), task="regression", subset=70
    ),
    "pictures": lambda folder: DataSpec(train=table(folder, pictures(200, 150), NAMES)),
    **{kind: functools.partial(of_kind, kind) for kind in KINDS},
}


@pytest.mark.parametrize("which", DATA)
def test_blocks_make_the_rows_that_one_process_prepares(which: str, tmp_path: Path) -> None:
    data = DATA[which](tmp_path / "data")
    prepared = at_root(data, tmp_path)
    fetched = fetch_rows(prepared.sealed, tmp_path / "node")
    for name, split in prepared.manifest.splits.items():
        rows_of = getattr(fetched, name)
        counted = np.bincount(rows_of.labels, minlength=rows_of.classes).tolist() if data.task != "regression" else []
        assert split.classes == counted
    check_same(fetched, prepare(data, tmp_path / "cache"))
    assert at_root(data, tmp_path, lambda *_: pytest.fail("they are there")).sealed == prepared.sealed
    assert fetch_rows(prepared.sealed, tmp_path / "node").train.folder == fetched.train.folder


def test_rows_are_the_same_from_object_storage(bucket: str, tmp_path: Path) -> None:
    data = DATA["stratified"](tmp_path)
    prepared = ensure_rows(data, f"{bucket}/stores", loop)
    check_same(fetch_rows(prepared.sealed, tmp_path / "node"), prepare(data, tmp_path / "cache"))
    assert ensure_rows(data, f"{bucket}/stores", lambda *_: pytest.fail("they are there")).sealed == prepared.sealed


def test_rows_that_are_read_together_are_read_by_one_task(tmp_path: Path) -> None:
    """Row groups of 40 rows, all of train: blocks of 16 begin in groups 0, 0, 0, 1, 1, 2, 2, 2, ..."""
    data = own_sources(tmp_path)
    pq.write_table(pa.table({"input": VECTORS, "label": NAMES}), tmp_path / "train" / "data.parquet", row_group_size=40)
    seen: list[BlockRun] = []
    at_root(data, tmp_path, noting(seen))
    of_train = [run for run in seen if run.split == "train"]
    assert [run.numbers for run in of_train] == [(0, 1, 2), (3, 4), (5, 6, 7), (8, 9), (10, 11, 12)]
    assert all(stretch.chosen is None for run in of_train for stretch in run.stretches)


class KilledError(Exception):
    """Where a process would have been killed."""


def killed_at(visit: int, site: str) -> Callable[[str], None]:
    visits = 0

    def failpoint(here: str) -> None:
        nonlocal visits
        visits += here == site
        if here == site and visits == visit:
            raise KilledError

    return failpoint


@pytest.mark.parametrize("site", ["block.before_publish", "block.before_receipt", "seal.before_manifest"])
def test_what_is_done_is_not_done_again(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DATA["stratified"](tmp_path)
    undisturbed = at_root(data, tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(stored, "failpoint", killed_at(1 if site.startswith("seal") else 7, site))
        with pytest.raises(KilledError):
            at_root(data, tmp_path)
    again: list[BlockRun] = []
    prepared = at_root(data, tmp_path, noting(again))
    blocks = sum(-(-of.rows // 16) for of in prepared.manifest.splits.values())
    assert sum(len(run.numbers) for run in again) == (0 if site.startswith("seal") else blocks - 6)
    assert prepared.manifest.splits == undisturbed.manifest.splits
    check_same(fetch_rows(prepared.sealed, tmp_path / "node"), prepare(data, tmp_path / "cache"))


def a_block(prepared: Prepared, number: int = 2) -> Path:
    return Path(prepared.sealed.uri) / BLOCKS / prepared.manifest.splits["train"].blocks[number]


def test_a_block_that_is_not_what_was_sealed_is_named_and_written_again(tmp_path: Path) -> None:
    data = DATA["digits"](tmp_path)
    prepared = at_root(data, tmp_path)
    block = a_block(prepared)
    flipped = bytearray(block.read_bytes())
    flipped[100] ^= 1
    block.write_bytes(flipped)
    with pytest.raises(DamagedError, match=block.name) as damaged:
        fetch_rows(prepared.sealed, tmp_path / "node")
    assert "--prepare-again" in str(damaged.value.next)
    assert not list((tmp_path / "node" / "rows").glob("*/index.json"))
    again = at_root(data, tmp_path, again=True)
    assert again.manifest.splits == prepared.manifest.splits
    check_same(fetch_rows(again.sealed, tmp_path / "node"), prepare(data, tmp_path / "cache"))


@pytest.mark.parametrize("cut", [None, 10])
def test_a_block_that_is_gone_or_cut_is_seen_at_once(cut: int | None, tmp_path: Path) -> None:
    data = DATA["digits"](tmp_path)
    block = a_block(at_root(data, tmp_path))
    block.unlink() if cut is None else block.write_bytes(block.read_bytes()[:cut])
    with pytest.raises(DamagedError, match=block.name):
        at_root(data, tmp_path)
    at_root(data, tmp_path, again=True)
    assert at_root(data, tmp_path).manifest.splits["train"].rows == 1258


def test_a_block_that_is_gone_before_the_seal_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DATA["digits"](tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "failpoint", killed_at(1, "seal.before_manifest"))
        with pytest.raises(KilledError):
            at_root(data, tmp_path)
    blocks = sorted((tmp_path / "stores" / "rows").glob("*/blocks/*"))
    blocks[0].unlink()
    blocks[1].write_bytes(b"torn")
    again: list[BlockRun] = []
    at_root(data, tmp_path, noting(again))
    assert sum(len(run.numbers) for run in again) == 2


def manifest_of(prepared: Prepared) -> Path:
    return Path(prepared.sealed.uri) / MANIFEST_KEY


def before_checksums(manifest: Path) -> dict[str, Any]:
    """The manifest's document as format 1 had it, which is written in its place."""
    document: dict[str, Any] = json.loads(manifest.read_bytes())
    del document["checksum"]
    document["format"] = 1
    manifest.write_bytes(canonical_json(document))
    return document


def refused_manifest(data: DataSpec, root: Path, manifest: Path) -> DamagedError:
    """What the command and its dry run say of it, in the same words."""
    with pytest.raises(DamagedError, match=re.escape(str(manifest))) as damaged:
        at_root(data, root)
    with pytest.raises(DamagedError) as foreseen:
        find_prepared(data, str(root / "stores"))
    assert str(foreseen.value) == str(damaged.value)
    assert "--prepare-again" in str(damaged.value.next)
    return damaged.value


def test_rows_that_are_written_twice_have_one_manifest(tmp_path: Path) -> None:
    one, other = (at_root(DATA["digits"](tmp_path), tmp_path / name) for name in ("one", "other"))
    assert manifest_of(one).read_bytes() == manifest_of(other).read_bytes()


def test_any_changed_byte_of_a_manifest_is_refused(tmp_path: Path) -> None:
    data = own_sources(tmp_path / "data")
    manifest = manifest_of(at_root(data, tmp_path))
    whole = manifest.read_bytes()
    draw = np.random.default_rng(7)
    for place in draw.choice(len(whole), 250, replace=False):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(draw.integers(0, 8))
        manifest.write_bytes(changed)
        # A format that is higher by a flipped bit looks like that of a newer version.
        with pytest.raises((DamagedError, RefusedError), match=re.escape(str(manifest))):
            find_prepared(data, str(tmp_path / "stores"))
    changed = bytearray(whole.replace(b'"fingerprint":"', b'"fingerprint":"0', 1))
    del changed[whole.index(b'"fingerprint":"') + len('"fingerprint":"') + 64]
    manifest.write_bytes(changed)
    refused_manifest(data, tmp_path, manifest)
    check_same(fetch_rows(at_root(data, tmp_path, again=True).sealed, tmp_path / "node"), prepare(data, tmp_path / "c"))


def test_a_manifest_without_its_checksum_is_refused_but_one_of_before_is_read(tmp_path: Path) -> None:
    data = DATA["digits"](tmp_path)
    prepared = at_root(data, tmp_path)
    manifest = manifest_of(prepared)
    document = before_checksums(manifest)
    found = at_root(data, tmp_path, lambda *_: pytest.fail("they are there"))
    assert found.manifest.checksum is None
    check_same(fetch_rows(found.sealed, tmp_path / "node"), prepare(data, tmp_path / "cache"))
    manifest.write_bytes(canonical_json(document | {"format": 2}))
    assert "checksum" in str(refused_manifest(data, tmp_path, manifest).got)


def swap_blocks(document: dict[str, Any]) -> None:
    blocks = document["splits"]["train"]["blocks"]
    blocks[0], blocks[1] = blocks[1], blocks[0]


def rename_split(document: dict[str, Any]) -> None:
    for splits in (document["splits"], document["creation"]["rows"]):
        splits["tesu"] = splits.pop("test")


def forget_split(document: dict[str, Any]) -> None:
    del document["splits"]["test"]


def rename_classes(document: dict[str, Any]) -> None:
    document["creation"]["meaning"]["classet"] = document["creation"]["meaning"].pop("classes")


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *folders, field = path.split(".")
        for folder in folders:
            document = document[folder]
        document[field] = value

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "swapped blocks": (swap_blocks, "splits.train.fingerprint"),
    "another split": (rename_split, "creation.rows"),
    "no test split": (forget_split, "splits"),
    "no classes": (rename_classes, "creation.meaning.classes"),
    "other classes": (set_in("creation.meaning.classes", 11), "splits.test.classes"),
    "a task": (set_in("creation.meaning.task", "regression"), "creation.meaning.task"),
    "other labels": (set_in("creation.labels", "<f4"), "creation.meaning.task"),
    "another shape": (set_in("creation.shape", [1, 64]), "fingerprint"),
    "another source": (set_in("creation.source.seed", 5), "creation.source"),
    "other rows": (set_in("splits.train.rows", 1259), "splits.train.rows"),
    "other rows of the creation": (set_in("creation.rows.train", 1259), "splits.train.rows"),
    "fewer rows in blocks": (set_in("creation.block_rows", 8), "blocks"),
    "other counts": (set_in("splits.train.classes", [1258] + [1] * 9), "splits.train.classes"),
    "another fingerprint": (set_in("splits.validation.fingerprint", "0" * 64), "splits.validation.fingerprint"),
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("which", DAMAGES)
def test_a_manifest_that_contradicts_itself_is_refused(which: str, signed: bool, tmp_path: Path) -> None:
    """One of before checksums as well, and one whose checksum somebody has made anew."""
    data = DATA["digits"](tmp_path)
    manifest = manifest_of(at_root(data, tmp_path))
    document = before_checksums(manifest)
    damage, named = DAMAGES[which]
    damage(document)
    if signed:
        document["format"] = 2
        document["checksum"] = sha256(canonical_json(document))
    manifest.write_bytes(canonical_json(document))
    assert named in str(refused_manifest(data, tmp_path, manifest).got)


@pytest.mark.parametrize("key", [CREATION_KEY, MANIFEST_KEY])
def test_a_folder_in_place_of_a_document_is_one_message(key: str, tmp_path: Path) -> None:
    data = DATA["digits"](tmp_path)
    folder = Path(at_root(data, tmp_path).sealed.uri)
    (folder / MANIFEST_KEY).unlink()
    (folder / key).unlink(missing_ok=True)
    (folder / key).mkdir()
    with pytest.raises(DamagedError, match=re.escape(str(folder / key))) as damaged:
        at_root(data, tmp_path)
    assert f"remove the folder {folder}" in str(damaged.value.next)
    shutil.rmtree(folder)
    at_root(data, tmp_path)


def test_other_content_in_the_same_files_is_other_rows(tmp_path: Path) -> None:
    data = DATA["idx"](tmp_path)
    file = tmp_path / "idx" / "images"
    before, prepared = file.stat(), at_root(data, tmp_path)
    content = file.read_bytes()
    file.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = at_root(data, tmp_path)
    assert again.manifest.splits != prepared.manifest.splits
    check_same(fetch_rows(again.sealed, tmp_path / "node"), prepare(data, tmp_path / "cache"))
    with pytest.raises(DamagedError, match="not those that this command began with"):
        fetch_rows(prepared.sealed, tmp_path / "late")


def test_blocks_of_other_content_are_not_gone_on_with(tmp_path: Path) -> None:
    data = DATA["idx"](tmp_path)
    file = tmp_path / "idx" / "images"

    def killed(plan: RowsPlan, take: Take) -> None:
        take(write_run(plan.job, plan.runs[0]))
        raise KilledError

    with pytest.raises(KilledError):
        at_root(data, tmp_path, killed)
    before, content = file.stat(), file.read_bytes()
    file.write_bytes(bytes([*content[:100], content[100] ^ 1, *content[101:]]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = at_root(data, tmp_path)
    check_same(fetch_rows(again.sealed, tmp_path / "node"), prepare(data, tmp_path / "cache"))


def test_a_node_with_other_files_writes_nothing(tmp_path: Path) -> None:
    data = own_sources(tmp_path)
    file = tmp_path / "test" / "data.parquet"

    def elsewhere(plan: RowsPlan, take: Take) -> None:
        content, stat = file.read_bytes(), file.stat()
        file.write_bytes(content)  # a copy of another time, but the same content
        os.utime(file, ns=(0, 0))
        take(write_run(plan.job, plan.runs[0]))
        row_blocks._readings.clear()
        file.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
        os.utime(file, ns=(0, 0))
        with pytest.raises(RefusedError, match="not those of the driver"):
            write_run(plan.job, plan.runs[1])
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        raise KilledError

    with pytest.raises(KilledError):
        at_root(data, tmp_path, elsewhere)


def test_rows_that_are_wrong_are_named(tmp_path: Path) -> None:
    wrong = [*VECTORS[:120], [1.0, float("nan"), 2.0], *VECTORS[121:]]
    data = DataSpec(train=table(tmp_path, wrong, NAMES))
    with pytest.raises(RefusedError, match="row 120"):
        at_root(data, tmp_path)
    data = DataSpec(train=table(tmp_path, VECTORS, [0] * 150 + [-1] + [0] * 49))
    with pytest.raises(RefusedError, match="row 150"):
        at_root(data, tmp_path, lambda *_: pytest.fail("labels are looked at first"))


def test_there_has_to_be_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("akd_dist.storage.objects.LocalRoot.free_bytes", lambda _: 1000)
    with pytest.raises(MachineError, match="do not fit"):
        at_root(DATA["digits"](tmp_path), tmp_path)


def test_what_interrupted_commands_left_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, root = DATA["digits"](tmp_path), tmp_path / "stores"
    with pytest.raises(KilledError):
        at_root(data, tmp_path, lambda *_: (_ for _ in ()).throw(KilledError))
    (begun,) = (root / "rows").iterdir()
    (root / "rows" / f"{begun.name}.claim").touch()
    removed = removal.gc(str(root))
    assert sorted(removed) == [f"rows/{begun.name}.claim", f"rows/{begun.name}/"]
    prepared = at_root(data, tmp_path)
    (Path(prepared.sealed.uri) / BLOCKS / "x.partial").touch()
    assert removal.gc(str(root)) == [f"rows/{begun.name}/{BLOCKS}/x.partial"]
    assert at_root(data, tmp_path, lambda *_: pytest.fail("they are there")).sealed == prepared.sealed
    assert list_stores(str(root)) == []
    (candidate,) = removal.disused(str(root), tmp_path, older_than=0.0)
    assert (candidate.store.id, candidate.store.sealed, candidate.kept) == (f"rows/{begun.name}", True, None)
    assert candidate.store.bytes == sum(path.stat().st_size for path in Path(prepared.sealed.uri).glob("blocks/*"))
    with using([prepared.sealed.uri], run=str(tmp_path)):
        assert "in use by the run" in str(removal.remove_store(str(root), candidate.store.id, tmp_path))
    assert at_root(data, tmp_path, lambda *_: pytest.fail("they are there")).sealed == prepared.sealed
    for key in (root / "rows" / begun.name / "uses").iterdir():
        key.unlink()
    assert removal.remove_store(str(root), candidate.store.id, tmp_path) is None
    assert list((root / "rows").iterdir()) == []
