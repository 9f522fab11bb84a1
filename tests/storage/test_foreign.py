"""Stores of somebody else: documents that lie or cannot be read are refused by field, and spoil nothing beside them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from akd_dist.base import places
from akd_dist.base.errors import AkdError, DamagedError, MachineError, RefusedError
from akd_dist.base.files import canonical_json, parse_json, sha256
from akd_dist.storage import catalog, removal, repair
from akd_dist.storage.claim import claim_store, holder_of
from akd_dist.storage.manifest import Creation
from akd_dist.storage.reader import open_store
from akd_dist.storage.roots import open_root
from akd_dist.storage.uses import Use, uses_of
from akd_dist.storage.writer import create_store
from tests import stores

GOLDEN = stores.identity().id
DEEP = b"[" * 200_000
AT_ONCE = 5.0
"""CPU seconds that a refusal may take; to enumerate what these documents speak of takes hours."""

# ---- manifests whose parts contradict each other, each with the sha256 that it should have

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"identity.views": 10**9}, "shards: 4 of them"),
    ({"identity.rows": 10**13, "dataset.rows": 10**13}, "shards: 4 of them"),
    ({"identity.rows": 10**13}, "dataset.rows: 300"),
    ({"identity.rows": 299, "dataset.rows": 299}, "shards.1.rows: 44"),
    ({"identity.classes": 10**19}, "shards.0.size: 1560"),
    ({"identity.encoding": {"name": "float32"}}, "shards.0.size: 1560"),
    ({"identity.encoding": {"name": "zstd"}}, "{'name': 'zstd'}"),
    ({"identity.encoding": {"name": ["float16"]}}, "{'name': ['float16']}"),
    ({"identity.format": 1}, "format: 2"),
    ({"identity.dataset": "0" * 64}, "dataset.fingerprint: "),
    ({"teacher.fingerprint": "0" * 64}, "teacher.fingerprint: 0000"),
    ({"teacher.spec": {"classes": 4}}, "teacher.spec.classes: 4"),
    ({"teacher.spec": 5}, "teacher.spec: 5"),
    ({"dataset.rows": 301}, "dataset.rows: 301"),
    ({"dataset.meaning": {"classes": 2}}, "dataset.meaning.classes: 2"),
    ({"dataset.meaning": "pictures"}, "dataset.meaning: pictures"),
    ({"dataset.blocks": 7}, "dataset.blocks: 7"),
    ({"zarr_json.other": "0" * 64}, "zarr_json: "),
    ({"zarr_json.zarr\\json": "0" * 64}, "zarr_json.zarr.json: 0000"),
    ({"shards.1.key": "logits/c/0/0/0"}, "shards.1.key: logits/c/0/0/0"),
    ({"shards.1.rows": 45}, "shards.1.rows: 45"),
    ({"shards.2.size": 10**15}, "shards.2.size: 1000000000000000"),
    ({"shards.3.finite": False}, "shards.3.finite: False"),
    ({"shards.0.probes.0.row": 256}, "shards.0.probes: [256]"),
    ({"shards": []}, "shards: 0 of them"),
    ({"computed.threads": 0}, "computed.threads: "),
]
"""Of format 2, whose manifest has a record for each shard."""
CONTRADICTORY_COLUMNS: list[tuple[dict[str, Any], str]] = [
    ({"identity.views": 10**9}, "shards: 4 of them"),
    ({"identity.rows": 10**13, "dataset.rows": 10**13}, "shards: 4 of them"),
    ({"identity.rows": 256, "dataset.rows": 256}, "shards: 4 of them"),
    ({"identity.classes": 10**19}, "shards.size: "),
    ({"identity.encoding": {"name": "float32"}}, "shards.size: "),
    ({"identity.format": 2}, "format: 3"),
    ({"shards": []}, "shards: "),
    ({"shards.size": [1560]}, "shards: columns of [1, 4]"),
    ({"shards.size.2": 10**15}, "shards.size: [1560, 1560, 1000000000000000, 1560]"),
    ({"shards.sha256": []}, "shards: 0 of them"),
    ({"shards.content.0": "zz"}, "shards."),
    ({"probes": []}, "probes: 0"),
    ({"probes.0.0.row": 300}, "probes.0: [300, 256]"),
    ({"probes.1.1.row": 0}, "probes.1: [0, 0]"),
]


def forged(root: Path, changes: dict[str, Any], store_format: int) -> Path:
    """The golden store with fields of its manifest changed, under the id and with the sha256 that follow from them."""
    shutil.copytree(stores.GOLDENS[store_format], root)
    (folder,) = root.iterdir()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for path, value in changes.items():
        *parents, last = [part.replace("\\", ".") for part in path.split(".")]
        inner = manifest
        for name in parents:
            inner = inner[int(name)] if isinstance(inner, list) else inner[name]
        inner[int(last) if isinstance(inner, list) else last] = value
    manifest["id"] = sha256(canonical_json(manifest["identity"]))
    del manifest["sha256"]
    manifest["sha256"] = sha256(canonical_json(manifest))
    (folder / "manifest.json").write_bytes(canonical_json(manifest))
    return folder.rename(root / manifest["id"])


@pytest.mark.parametrize(
    ("changes", "named", "store_format"),
    [*((*one, 2) for one in CONTRADICTIONS), *((*one, 3) for one in CONTRADICTORY_COLUMNS)],
    ids=lambda value: str(value)[:60],
)
def test_a_manifest_that_contradicts_itself_is_refused_by_field(
    tmp_path: Path, changes: dict[str, Any], named: str, store_format: int
) -> None:
    folder = forged(tmp_path / "stores", changes, store_format)
    began = time.process_time()
    with pytest.raises((DamagedError, RefusedError)) as refused:
        open_store(str(folder))
    assert str(refused.value.got).startswith(named)
    assert [one.id for one in catalog.list_stores(str(tmp_path / "stores"))] == [folder.name]
    assert time.process_time() - began < AT_ONCE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"views": 10**9}, None),
        ({"rows": 10**13}, None),
        ({"views": 10**9, "rows": 10**13, "classes": 10**12}, None),
        ({"encoding": {"name": "zstd"}}, "encoding is not known"),
    ],
    ids=str,
)
def test_a_store_of_any_numbers_is_listed_at_once(tmp_path: Path, changes: dict[str, Any], named: str | None) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    document = json.loads(writer.store.get("creation.json"))
    document["identity"] |= changes
    document["dataset"]["rows"] = document["identity"]["rows"]
    folder = tmp_path / sha256(canonical_json(document["identity"]))
    folder.mkdir()
    (folder / "creation.json").write_bytes(canonical_json(document))
    began = time.process_time()
    (found,) = [one for one in catalog.list_stores(str(tmp_path)) if one.id == folder.name]
    assert (found.problem is None) == (named is None)
    assert named is None or named in str(found.problem)
    assert found.shards >= (named is None)
    assert time.process_time() - began < AT_ONCE


# ---- one bad store beside good ones


def no_document(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def looped(path: Path) -> None:
    path.symlink_to(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def far_in_the_future(path: Path) -> None:
    path.write_bytes(b"{}")
    os.utime(path, (2**40, 2**40))


BAD: dict[str, Callable[[Path], None]] = {
    "deep": no_document(DEEP),
    "deep within": no_document(b'{"identity":' + DEEP),
    "empty": no_document(b""),
    "no text": no_document(b"\xff\xfe"),
    "null": no_document(b"null"),
    "a number": no_document(b"1" * 5000),
    "half a character": no_document(b'{"split":"\\ud800","recipe":{}}'),
    "other types": no_document(b'{"split":"train","recipe":{"data":5},"identity":[],"run":{}}'),
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a loop": looped,
    "endless": endless,
    "of another age": far_in_the_future,
}
DOCUMENTS = [
    "creation.json",
    "manifest.json",
    "source.json",
    "receipts/0-0.json",
    "uses/2026-01-01-x.json",
    "zarr.json",
]


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_store_spoils_nothing_beside_it(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each document of a store, and what lies beside it, in turn: the others are found, listed, verified, collected."""
    root = tmp_path / "stores"
    good = stores.build(root, stores.creation(data_seed=5))
    spoilt = dict[str, str]()
    for number, key in enumerate(DOCUMENTS):
        spoilt[key] = stores.build(root, stores.creation(data_seed=100 + number)).id
        path = root / spoilt[key] / ("arrays.zarr/zarr.json" if key == "zarr.json" else key)
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        BAD[kind](path)
    beside = "b" * 64
    for name in (f"{beside}.claim", f"{'c' * 64}.removing", f"{'d' * 64}.damaged", "e" * 64, "notes", "teachers"):
        BAD[kind](root / name)
    began = time.process_time()

    listed = {one.id: one for one in catalog.list_stores(str(root))}
    assert listed[good.id].problem is None
    assert listed[spoilt["creation.json"]].problem is not None or kind == "a loop"
    assert {"creation.json", "manifest.json"} <= {key for key in DOCUMENTS if spoilt[key] in listed}
    found = catalog.find_store(str(root), good.manifest.identity)
    assert found is not None
    assert repair.verify_store(str(root), good.id) == []
    for views in (1, 3):
        wanted = good.manifest.identity.model_copy(update={"views": views})
        assert (catalog.find_store(str(root), wanted) is None) == (views == 3)
        assert len(catalog.narrower_stores(str(root), wanted)) == (views == 3)
    assert catalog.stores_of_other_rows(str(root), stores.identity(dataset="other", data_seed=5), "train")
    problems = dict[str, AkdError]()
    for dry_run in (True, False):
        removal.gc(str(root), dry_run=dry_run, on_problem=lambda name, error: problems.update({name: error}))
    assert good.id not in problems
    assert all(isinstance(error, AkdError) and "\n" not in error.line for error in problems.values())
    kept = {one.store.id: one.kept for one in removal.disused(str(root), tmp_path / "cache", older_than=0)}
    assert kept[good.id] is None
    for key in ("manifest.json", "zarr.json"):
        with contextlib.suppress(MachineError, RefusedError):  # it cannot be read, or is no file and so not sealed
            assert repair.verify_store(str(root), spoilt[key]) != []
    assert open_store(good.uri).verify() == []
    assert time.process_time() - began < 4 * AT_ONCE


def test_a_wider_store_that_is_bad_is_passed_over_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody else's store of more views answers a request only if it is good; it does not stand in its way."""
    wider = stores.build(tmp_path, stores.creation(views=3))
    (Path(wider.uri) / "arrays.zarr/logits/c/0/0/0").unlink()
    assert catalog.find_store(str(tmp_path), stores.identity()) is None
    (line,) = caplog.messages
    assert line.startswith(f"{wider.id[:12]} is passed over: ")
    assert f"akd-dist stores repair {wider.id}" in line
    whole = stores.build(tmp_path, stores.creation(views=4))
    found = catalog.find_store(str(tmp_path), stores.identity())
    assert found is not None
    assert found.id == whole.id


@pytest.mark.parametrize("name", ["manifest.json", "creation.json", "source.json"])
def test_a_document_that_fills_the_memory_is_not_read(name: str, tmp_path: Path) -> None:
    root, good = tmp_path / "stores", tmp_path / "good"
    bad, fine = stores.build(root), stores.build(good)
    shutil.copytree(good / fine.id, root / ("0" * 64))
    with open(root / bad.id / name, "r+b" if (root / bad.id / name).exists() else "wb") as file:
        file.truncate(1 << 40)  # sparse
    found = {one.id: one for one in catalog.list_stores(str(root))}
    assert found[bad.id].problem or name != "creation.json"
    if name == "manifest.json":
        assert "bytes" in repair.verify_store(str(root), bad.id)[0].problem


def test_a_record_that_leads_far_up_is_read_at_once(tmp_path: Path) -> None:
    assert places.found("../" * 10**6 + "x", tmp_path) == "/x"
    assert places.found("../" * 2 + "x", "/a/b/c") == "/a/x"


def test_deep_json_is_no_json() -> None:
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    for data in (DEEP, DEEP.decode(), b'{"a":' * 200_000, b"", b"\xff", b"9" * 5000):
        with pytest.raises(ValueError, match=r".+"):
            parse_json(data)


def test_a_strange_record_holds_no_store(tmp_path: Path) -> None:
    store = stores.build(tmp_path / "stores")
    os.mkfifo(tmp_path / "pipe")
    plain = Use(run="/runs/x", host=socket.gethostname(), user=None, time="2026-01-01", command="", lock=None)
    for number, change in enumerate(
        [
            {"time": "9999-12-31T23:59:59-14:00", "host": "elsewhere"},
            {"time": "0001-01-01T00:00:00+14:00", "host": "elsewhere"},
            {"lock": str(tmp_path / "pipe")},
            {"lock": "a\0b"},
            {"lock": "/dev/zero"},
        ]
    ):
        use = plain.model_copy(update=change)
        open_root(store.uri).put(f"uses/{number}.json", use.to_bytes())
    assert len(uses_of(open_root(store.uri))) == 5
    (candidate,) = removal.disused(str(tmp_path / "stores"), tmp_path / "cache", older_than=0)
    assert candidate.kept is None


@pytest.mark.parametrize(
    "claim", [DEEP, b'{"host":[],"pid":1,"since":"","token":"","counter":0}', b'{"host":"x"}', b"5"], ids=repr
)
def test_a_claim_that_says_nothing_is_nobodys(tmp_path: Path, claim: bytes) -> None:
    (tmp_path / "store.claim").write_bytes(claim[:100_000])
    assert holder_of(str(tmp_path), "store") is None
    with claim_store(str(tmp_path), "store"):
        pass
    os.mkfifo(tmp_path / "store.claim")
    with pytest.raises(MachineError, match=r"cannot write .*store\.claim"), claim_store(str(tmp_path), "store"):
        pass


# ---- a store that is not ours to read


@pytest.fixture
def shared() -> Iterator[Path]:
    """A root that everybody may read, entered as a user who is not its owner."""
    root = Path(tempfile.mkdtemp(prefix="akd-dist-shared-"))
    root.chmod(0o777)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def stranger() -> Iterator[Callable[[], None]]:
    """Become a user whom permissions bind, until the end of the test."""

    def become() -> None:
        if os.geteuid() == 0:
            os.seteuid(12345)

    yield become
    if os.getuid() == 0:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["", "receipts", "uses", "arrays.zarr", "creation.json", "manifest.json"])
def test_a_store_that_cannot_be_read_is_one_line(
    shared: Path, stranger: Callable[[], None], closed: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, private = (stores.build(shared, stores.creation(data_seed=seed)) for seed in (1, 2))
    wider = stores.build(shared, stores.creation(data_seed=1, views=3))
    for store in (private, wider):
        (Path(store.uri) / "uses").mkdir()
        (Path(store.uri) / closed).chmod(0)
    stranger()
    try:
        listed = {one.id: one.problem for one in catalog.list_stores(str(shared))}
        assert listed[good.id] is None
        if closed != "manifest.json":  # which is not looked into
            assert f"{private.id}" in str(listed[private.id])
            assert "Permission denied" in str(listed[private.id])
        assert repair.verify_store(str(shared), good.id) == []
        assert catalog.find_store(str(shared), good.manifest.identity) is not None
        assert catalog.find_store(str(shared), stores.identity(data_seed=1, views=3, rows=301)) is None
        narrow = catalog.find_store(str(shared), stores.identity(data_seed=1, views=1))
        assert narrow is not None
        problems = dict[str, str]()
        removed = removal.gc(str(shared), dry_run=True, on_problem=lambda name, e: problems.update({name: e.line}))
        assert removed == []
        assert good.id not in problems
        if closed not in ("creation.json", "manifest.json"):
            assert "Permission denied" in problems[private.id]
        kept = {one.store.id: one.kept for one in removal.disused(str(shared), shared / "cache", older_than=0)}
        assert kept[good.id] is None
        if closed not in ("creation.json", "manifest.json"):
            assert "Permission denied" in str(kept[private.id])
        if closed in ("", "arrays.zarr", "manifest.json"):
            with pytest.raises(MachineError, match="Permission denied"):
                repair.verify_store(str(shared), private.id)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for store in (private, wider):
            (Path(store.uri) / closed).chmod(0o700)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dataset": {"rows": 301}}, "dataset.rows: 301"),
        ({"dataset": {"meaning": {"classes": 2}}}, "dataset.meaning.classes: 2"),
        ({"dataset": {"blocks": [1]}}, "dataset.blocks: [1]"),
        ({"teacher": {"spec": {"classes": 2}}}, "teacher.spec.classes: 2"),
        ({"teacher": {"fingerprint": "0" * 64}}, "the document: Value error, teacher.fingerprint"),
    ],
    ids=str,
)
def test_a_contradictory_creation_is_refused_by_field(changes: dict[str, Any], named: str) -> None:
    document = stores.creation().model_dump(mode="json") | changes
    with pytest.raises(DamagedError) as refused:
        Creation.from_bytes(canonical_json(document), "creation.json")
    assert str(refused.value.got).startswith(named)
