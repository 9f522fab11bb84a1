"""Stores of format 4: several targets a row, and what describes logits; written, killed, mended and gathered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from akd_dist.base.errors import RefusedError
from akd_dist.storage import catalog, removal
from akd_dist.storage.decoded import StoredLogits, find_decoded
from akd_dist.storage.decoder import probabilities
from akd_dist.storage.encodings import Encoding
from akd_dist.storage.identity import format_of
from akd_dist.storage.layout import StoredArray, StoreLayout
from akd_dist.storage.manifest import Identity
from akd_dist.storage.mean import Mixture, open_logits
from akd_dist.storage.pieces import Span
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.tables import find_dictionary, put_dictionary, put_offsets
from akd_dist.storage.targets import StoredTargets
from akd_dist.storage.top_k import TopK
from akd_dist.storage.writer import create_store, missing_shards, receipt_there, seal_store, take_shards, write_shard
from tests import stores, target_stores
from tests.storage import numpy_reader
from tests.target_stores import KINDS, expected, golden_of, sealed_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache_root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- layout and identity


@pytest.mark.parametrize(
    ("rows", "several", "arrays", "chunk", "shard"),
    [
        (1_000_000, True, [("ids", "uint16", (16,))], 4096, 65_536),  # a sixteenth of the targets
        (100_000_000, True, [("ids", "uint16", (16,)), ("mean", "float16", ())], 4096, 491_520),  # 16 MiB
        (100_000, True, [("logits", "float16", (49_152,))], 128, 128),  # less than a chunk of 4,096 fits 16 MiB
        (1_281_167, False, [("ids", "uint16", (16,))], 256, 80_128),
        (10, False, [("logits", "float32", (5_000_000,))], 1, 1),  # a single item is beyond 16 MiB
    ],
)
def test_shards_are_at_most_16_mib_over_all_arrays(
    rows: int, several: bool, arrays: list[tuple[str, str, tuple[int, ...]]], chunk: int, shard: int
) -> None:
    layout = StoreLayout(2, rows, 7, "", tuple(StoredArray(*one) for one in arrays), several)
    assert (layout.chunk, layout.shard_rows) == (chunk, shard)
    assert layout.shards()[: layout.shards_per_view] == StoreLayout(1, rows, 7, "", layout.arrays, several).shards()
    assert sum(one.rows for one in layout.shards()) == 2 * rows


def test_what_needs_nothing_new_stays_in_the_format_of_before() -> None:
    assert format_of({"name": "float16"}) == 3
    assert format_of({"name": "float16"}, items=5) == format_of(TopK().config()) == 4
    wrong: list[dict[str, Any]] = [{"format": 4}, {"items": 7}, {"encoding": TopK().config()}, {"tokens": {}}]
    for changes in wrong:
        with pytest.raises(ValueError, match=r"is not that of|items is missing"):
            stores.identity(**changes)
    assert set(stores.identity().model_dump()) == {*Identity.model_fields} - {"items", "tokens"}
    assert target_stores.identity("top_k", items=7).id != target_stores.identity("top_k").id
    assert target_stores.identity("dense", tokens={"vocabulary": 5}).id != target_stores.identity("dense").id


# ---- the golden stores


def test_a_golden_store_is_written_again_byte_for_byte(tmp_path: Path, kind: str) -> None:
    store = target_stores.build(tmp_path, target_stores.creation(kind))
    assert sealed_files(tmp_path / store.id) == sealed_files(golden_of(kind))
    assert stores.litter(tmp_path) == []


def test_a_golden_store_reads_back(kind: str) -> None:
    store = open_store(str(golden_of(kind)))
    identity = store.manifest.identity
    assert store.verify() == []
    for view in range(store.views):
        found = store.targets(view, 0, store.layout.rows)
        for name, array in expected(identity, view).items():
            np.testing.assert_array_equal(found[name], array)
    if identity.items is not None:
        np.testing.assert_array_equal(store.offsets, target_stores.offsets())
    if identity.is_top_k:
        said = target_stores.dictionary(identity).arrays()
        for name, array in store.dictionary().arrays().items():
            np.testing.assert_array_equal(array, said[name])
    assert store.manifest.fidelity == (target_stores.FIDELITY if identity.is_top_k else None)
    assert store.manifest.targets == store.views * store.layout.rows


def test_plain_zarr_reads_a_golden_store(kind: str) -> None:
    group = zarr.open_group(golden_of(kind) / "arrays.zarr", mode="r")
    identity = target_stores.identity(kind)
    for view in range(identity.views):
        for name, array in expected(identity, view).items():
            np.testing.assert_array_equal(np.asarray(group[name][view]), array)  # type: ignore[index]
    assert group.attrs["akd_dist"] == {"format": 4, "identity": identity.model_dump(mode="json")}
    if identity.items is not None:
        np.testing.assert_array_equal(np.asarray(group["offsets"][:]), target_stores.offsets())  # type: ignore[index]
    for name, array in target_stores.dictionary(identity).arrays().items() if identity.is_top_k else ():
        np.testing.assert_array_equal(np.asarray(group[f"dictionary/{name}"][:]), array)  # type: ignore[index]


def test_a_reader_of_a_hundred_lines_agrees_bit_for_bit() -> None:
    source = Path(numpy_reader.__file__).read_text().splitlines()
    assert len(source) <= 100
    used = {line.split()[1].split(".")[0] for line in source if line.startswith(("import ", "from "))}
    assert used == {"hashlib", "json", "numpy", "pathlib", "typing"}
    store = open_store(str(golden_of("top_k")))
    identity, kept, tables = numpy_reader.read(golden_of("top_k"))
    np.testing.assert_array_equal(tables["offsets"]["offsets"], store.offsets)
    of_view = {name: array[0] for name, array in kept.items()}
    ours = store.targets(0, 0, store.layout.rows)
    assert {name: array.tobytes() for name, array in of_view.items()} == {n: a.tobytes() for n, a in ours.items()}
    top_k, classes = store.manifest.identity.top_k, store.classes
    described = top_k.unpack(ours, classes)
    for name, array in numpy_reader.unpacked(identity, of_view).items():
        np.testing.assert_array_equal(array, getattr(described, name))
    for temperature in (1.0, 2.0):
        found = numpy_reader.probabilities(identity, of_view, tables["dictionary"], temperature)
        np.testing.assert_array_equal(found, probabilities(top_k, described, store.dictionary(), temperature))
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def test_the_reader_agrees_on_classes_beyond_16_bits(tmp_path: Path) -> None:
    encoding = TopK(3, 0, 16, (1.0,), 1).config()
    store = target_stores.build(
        tmp_path, target_stores.creation("classifier", classes=131_073, encoding=encoding, rows=3, views=1)
    )
    identity, kept, _ = numpy_reader.read(tmp_path / store.id)
    described = store.manifest.identity.top_k.unpack(store.targets(0, 0, 3), 131_073)
    for name, array in numpy_reader.unpacked(identity, {name: one[0] for name, one in kept.items()}).items():
        np.testing.assert_array_equal(array, getattr(described, name))
    z = target_stores.logits(store.manifest.identity, 0, 0, 3)
    np.testing.assert_array_equal(described.ids, target_stores.describe(store.manifest.identity.top_k, z).ids)
    assert described.ids.max() > 65_535


# ---- killed and resumed


@pytest.mark.parametrize(
    "failpoint",
    [
        "table.before_object:3",
        "table.before_receipt:2",
        "shard.before_object:3",
        "shard.before_object:9",
        "shard.before_receipt:1",
        "seal.before_manifest:1",
    ],
)
def test_killed_at_a_failpoint_then_resumed_is_the_same_store(tmp_path: Path, failpoint: str) -> None:
    environment = {**os.environ, "AKD_FAILPOINT": failpoint}
    command = [sys.executable, "-m", "tests.target_stores", str(tmp_path), "top_k"]
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == -signal.SIGKILL
    folder = tmp_path / golden_of("top_k").name
    assert not (folder / "manifest.json").exists()
    left = {path: path.stat().st_mtime_ns for path in folder.glob("arrays.zarr/*/c/**/*") if path.is_file()}
    target_stores.build(tmp_path, target_stores.creation("top_k"))
    assert sealed_files(folder) == sealed_files(golden_of("top_k"))
    assert stores.litter(tmp_path) == []
    # What the killed one left is adopted, and not written again.
    assert {path: path.stat().st_mtime_ns for path in left if path.suffix != ".partial" and path.exists()} == left


def test_another_prefix_is_set_aside(tmp_path: Path) -> None:
    writer, said = target_stores.begin(tmp_path, target_stores.creation("top_k"))
    shard = writer.layout.shard(0, 0)
    target_stores.write(writer, shard, said)
    assert receipt_there(writer, shard) is not None
    writer.store.delete(shard.receipt_key)
    torn = Path(writer.uri, "arrays.zarr", shard.keys[2])
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-5])
    assert receipt_there(writer, shard) is None
    assert shard in missing_shards(writer)
    target_stores.write(writer, shard, said)
    assert torn.read_bytes() == whole
    (aside,) = (path.name for path in tmp_path.glob("*.damaged/*"))
    assert aside.startswith(f"arrays.zarr-{shard.keys[2].replace('/', '-')}.")


@pytest.mark.parametrize("deep", [True, False])
def test_a_receipted_shard_that_lacks_an_object_is_missing(tmp_path: Path, deep: bool) -> None:
    writer, said = target_stores.begin(tmp_path, target_stores.creation("top_k"))
    for shard in writer.layout.shards():
        target_stores.write(writer, shard, said)
    Path(writer.uri, "arrays.zarr", writer.layout.shard(0, 1).keys[3]).unlink()
    with pytest.raises(RefusedError, match="cannot be sealed: view 0, shard 1"):
        seal_store(writer)
    assert missing_shards(writer, deep=deep) == [writer.layout.shard(0, 1)]


def test_the_dictionary_is_found_made_again_or_refused(tmp_path: Path) -> None:
    created = target_stores.creation("top_k")
    writer = create_store(str(tmp_path), created)
    assert find_dictionary(writer) is None
    with pytest.raises(RefusedError, match="cannot be sealed: its offsets is missing"):
        seal_store(writer)
    put_offsets(writer, target_stores.offsets())
    ours = target_stores.dictionary(created.identity)
    said = put_dictionary(writer, ours)
    assert put_dictionary(writer, ours) == said
    found = find_dictionary(writer)
    assert found is not None
    assert found[1] == said
    for shard in writer.layout.shards():
        target_stores.write(writer, shard, said)
    # A damaged one is none, and the same bytes take its place.
    basis = Path(writer.uri, "arrays.zarr/dictionary/basis/c/0/0")
    whole = basis.read_bytes()
    basis.write_bytes(whole[:-1] + b"?")
    assert find_dictionary(writer) is None
    assert put_dictionary(writer, ours) == said
    assert (basis.read_bytes(), missing_shards(writer)) == (whole, [])
    # Another one makes shards of the first no part of the store.
    assert ours.basis is not None
    other = type(ours).from_arrays({**ours.arrays(), "basis": ours.basis * np.float16(2)})
    assert put_dictionary(writer, other) != said
    assert missing_shards(writer) == writer.layout.shards()


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    created = target_stores.creation("top_k")
    writer, said = target_stores.begin(tmp_path, created)
    shard = writer.layout.shard(0, 1)
    kept = dict(target_stores.arrays_of(created.identity, shard))
    given: dict[str, Any] = {"label_agreement": None, "probes": [], "seconds": 0.0}
    with pytest.raises(RefusedError, match=r"shard 1 .* needs a dictionary"):
        write_shard(writer, shard, kept, **given)
    for wrong in ({**kept, "mean": kept["mean"][:-1]}, {**kept, "more": kept["mean"]}, {"ids": kept["ids"]}):
        with pytest.raises(RefusedError, match="are not those of its store"):
            write_shard(writer, shard, wrong, **given, dictionary=said)
    with pytest.raises(RefusedError, match="holds no logits, but what describes those of 300 classes"):
        write_shard(writer, shard, np.zeros((shard.rows, 300), np.float32), **given, dictionary=said)
    right = target_stores.offsets()
    others: list[Any] = [right[:-1], right + 1, right.astype(np.int32), right[::-1]]
    for offsets in others:
        with pytest.raises(RefusedError, match="the offsets are not those of 4245 targets in 90 rows"):
            put_offsets(writer, offsets)
    dense = create_store(str(tmp_path), stores.creation())
    with pytest.raises(RefusedError, match="has no offsets"):
        put_offsets(dense, target_stores.offsets())


def test_nan_in_dense_targets_is_refused_by_row_and_position() -> None:
    logits = np.zeros((20, 3), np.float32)
    logits[7, 1] = np.nan
    with pytest.raises(RefusedError, match="1 target has logits that are not finite as float16: row 2, position 3"):
        Encoding("float16").encode(logits, 0, lambda target: f"row 2, position {target - 4}")


# ---- gathered


def test_a_batch_of_rows_has_the_targets_of_these_rows(cache_root: Path, kind: str) -> None:
    store = open_store(str(golden_of(kind)))
    rows = np.random.Generator(np.random.Philox(3)).permutation(store.num_rows)[:32]
    targets = StoredTargets(store, cache_root, store.views)
    for view in range(store.views):
        targets.move(view, [(0, store.num_rows)])
        arrays, counts = targets.gather(rows)
        numbers = np.concatenate([np.arange(store.offsets[row], store.offsets[row + 1]) for row in rows])
        assert counts.tolist() == np.diff(store.offsets)[rows].tolist()
        for name, array in expected(store.manifest.identity, view).items():
            np.testing.assert_array_equal(arrays[name], array[numbers])
            assert arrays[name].flags.writeable
    nothing, none = targets.gather(np.zeros(0, np.int64))
    assert (len(none), {len(array) for array in nothing.values()}) == (0, {0})
    decoded = find_decoded(store.manifest, cache_root)
    assert decoded is not None
    assert decoded.in_use
    assert decoded.bytes >= store.layout.nbytes
    targets.close()


def test_windows_hold_what_their_rows_need(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 targets: pieces of 320, which a row may lie across."""
    monkeypatch.setattr("akd_dist.storage.layout._CHUNK_TARGETS", 64)
    store = target_stores.build(cache_root / "stores", target_stores.creation("top_k"))
    assert store.layout.shards_per_view == 14
    targets = StoredTargets(store, cache_root, windowed=True, beside_windows=True)
    whole = expected(store.manifest.identity)
    spans: list[list[Span]] = [[(3, 9)], [(0, 5), (60, 70)], [(5, 6)], [(80, 90)]]
    for window in spans:
        targets.move(0, window)
        rows = np.concatenate([np.arange(start, stop) for start, stop in window])[::-1]
        arrays, _ = targets.gather(rows)
        numbers = np.concatenate([np.arange(store.offsets[row], store.offsets[row + 1]) for row in rows])
        for name, array in whole.items():
            np.testing.assert_array_equal(arrays[name], array[numbers])
    with pytest.raises(IndexError, match="not held"):
        targets.gather(np.array([2]))
    targets.move(0, [(0, 6)])
    beyond = next(row for row in range(90) if store.offsets[row] < 640 < store.offsets[row + 1])
    with pytest.raises(IndexError, match="not held"):
        targets.gather(np.array([beyond]))
    targets.close()


# ---- who reads logits is told


def test_readers_of_logits_are_refused(cache_root: Path) -> None:
    several, described = (open_store(str(golden_of(kind))) for kind in ("dense", "classifier"))
    of_rows: list[Callable[[LogitStore], Any]] = [
        lambda it: it.rows(0, 0, 1),
        lambda it: it[0],
        lambda it: it.to_arrow(),
    ]
    for read in of_rows:
        with pytest.raises(RefusedError, match="a row of this store has several targets"):
            read(several)
    of_rows.append(lambda it: it.shards([]))
    for read in of_rows:
        with pytest.raises(RefusedError, match="holds no logits, but what describes those of 1,000 classes"):
            read(described)
    with pytest.raises(RefusedError, match="holds no logits"):
        StoredLogits(described, cache_root, 1)
    with pytest.raises(RefusedError, match="the store holds logits"):
        several.dictionary()
    for store in (several, described):
        with pytest.raises(RefusedError, match="cannot be one of several stores that are averaged"):
            open_logits(Mixture((store.uri, store.uri), (0.5, 0.5), "logits"))


def test_dense_targets_are_pieces_of_the_cache_like_logits(cache_root: Path) -> None:
    store = open_store(str(golden_of("dense")))
    (logits,) = (arrays["logits"] for arrays in [store.targets(0, 4090, 4100)])
    np.testing.assert_array_equal(logits, target_stores.logits(store.manifest.identity, 0, 4090, 4100).astype("f2"))
    with pytest.raises(IndexError):
        store.targets(0, 0, 4246)


# ---- under a root


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_store_is_listed_found_extended_and_removed(
    tmp_path: Path, bucket: str, cache_root: Path, place: str
) -> None:
    root = str(tmp_path / "stores") if place == "local" else f"{bucket}/targets"
    store = target_stores.build(root, target_stores.creation("classifier"))
    assert store.verify() == []
    found = catalog.find_store(root, store.manifest.identity.model_copy(update={"views": 1}))
    assert found is not None
    assert found.id == store.id
    (summary,) = catalog.list_stores(root)
    assert (summary.encoding, summary.targets) == ("top 3 logits of 8 bits, rank 0", None)
    assert (summary.shards, summary.shards_done, summary.views) == (4, 4, 2)
    assert (summary.problem, summary.sealed) == (None, True)
    wider = target_stores.creation("classifier", views=3)
    writer, said = target_stores.begin(root, wider)
    assert len(take_shards(writer, store.manifest, missing_shards(writer))) == 4
    for shard in missing_shards(writer):
        target_stores.write(writer, shard, said)
    seal_store(writer)
    assert open_store(writer.uri).verify() == []
    assert removal.gc(root) == []
    assert removal.remove_store(root, store.id, cache_root) is None
    assert [one.id for one in catalog.list_stores(root)] == [writer.id]


def test_a_store_that_was_begun_with_offsets_alone_is_nothing(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), target_stores.creation("top_k"))
    put_offsets(writer, target_stores.offsets())
    removal.discard_if_empty(str(tmp_path), writer.id)
    assert list(tmp_path.iterdir()) == []
    writer, _ = target_stores.begin(tmp_path, target_stores.creation("top_k"))
    removal.discard_if_empty(str(tmp_path), writer.id)  # a dictionary took a teacher
    assert find_dictionary(writer) is not None
