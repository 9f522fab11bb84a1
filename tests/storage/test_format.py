"""What is on the disk: layout arithmetic, encodings, the very bytes of a shard, and a golden store of each format."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore, MemoryStore

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.storage import arrays, repair, seal, sealed_objects
from akd_dist.storage.arrays import decode_shard, encode_shard, metadata, pinned_zarr, rows_within
from akd_dist.storage.encodings import Encoding, encoding_from_config
from akd_dist.storage.layout import Shard, StoreLayout
from akd_dist.storage.manifest import Creation, Identity, Manifest
from akd_dist.storage.reader import open_store
from akd_dist.storage.records import Probe, ShardRecord
from akd_dist.storage.writer import create_store, seal_store, write_shard
from tests import stores

# ---- layout


@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "shard_rows", "shards"),
    [
        (1, 2, "float32", 256, 1),
        (1437, 10, "float32", 256, 6),
        (50_000, 10, "float32", 3328, 16),
        (60_000, 1000, "float16", 3840, 16),
        (1_281_167, 1000, "float16", 8192, 157),  # 16 MiB a shard
        (1000, 200_000, "float32", 256, 4),  # never less than a chunk
    ],
)
def test_shard_rows_are_a_function_of_rows_classes_and_dtype(
    rows: int, classes: int, dtype: str, shard_rows: int, shards: int
) -> None:
    layout = StoreLayout(3, rows, classes, dtype)
    assert (layout.shard_rows, layout.shards_per_view) == (shard_rows, shards)
    assert layout.shards()[:shards] == StoreLayout(1, rows, classes, dtype).shards()  # whatever the number of views
    assert sum(shard.rows for shard in layout.shards()) == 3 * rows


def test_a_shard_names_itself() -> None:
    shard = StoreLayout(3, 300, 3, "float16").shard(2, 1)
    assert (shard.key, shard.receipt_key) == ("logits/c/2/1/0", "receipts/2-1.json")
    assert str(shard) == "view 2, shard 1 (rows 256 to 300)"
    with pytest.raises(IndexError, match=r"no shard \(3, 0\)"):
        StoreLayout(3, 300, 3, "float16").shard(3, 0)


# ---- encodings


@pytest.mark.parametrize(
    ("encoding", "config", "apart"),
    [
        (Encoding("float32"), {"name": "float32"}, 0),
        (Encoding("float16"), {"name": "float16"}, 2**-11),
        (Encoding("float16", 7, "blosc"), {"name": "float16", "keep_bits": 7, "compress": "blosc"}, 2**-8),
        (Encoding("float32", 7), {"name": "float32", "keep_bits": 7}, 2**-8),
        (Encoding("float32", None, "zstd"), {"name": "float32", "compress": "zstd"}, 0),
    ],
    ids=str,
)
def test_encodings_round_trip_and_rebuild_from_their_config(
    encoding: Encoding, config: dict[str, Any], apart: float
) -> None:
    logits = np.random.Generator(np.random.Philox(0)).uniform(1, 8, size=(400, 3)).astype(np.float32)
    stored = encoding.encode(logits, 0)
    assert stored["logits"].dtype == encoding.dtype
    np.testing.assert_allclose(encoding.decode(stored), logits, rtol=apart * 1.01, atol=1e-7 if apart else 0)
    assert encoding_from_config(encoding.config()) == encoding
    assert encoding.config() == config
    assert encoding.rounds == (apart > 0)


def test_rows_that_are_not_finite_after_the_cast_are_named() -> None:
    logits = np.zeros((20, 3), np.float32)
    logits[[3, 7], 1] = 70_000  # finite as float32, infinite as float16
    with pytest.raises(RefusedError) as refused:
        Encoding("float16").encode(logits, first_row=256)
    assert refused.value.what == "2 rows have logits that are not finite as float16: rows 259, 263"
    assert refused.value.next == "set cache.encoding: float32"
    assert Encoding("float32").encode(logits, first_row=256)["logits"].max() == 70_000
    logits[:12, 0] = np.nan
    with pytest.raises(RefusedError, match=r"12 rows .*: rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"):
        Encoding("float32").encode(logits, first_row=0)


def test_an_encoding_of_the_future_is_refused_with_those_known() -> None:
    configs: list[dict[str, Any]] = [
        {"name": "float16", "block": 32}, {"name": "float16", "keep_bits": 10}, {"name": "float16", "keep_bits": True},
        {"name": "float16", "keep_bits": 0}, {"name": "float8"}, {"name": "float16", "compress": "lz4"}, {"name": []},
        {"name": "float16", "compress": "none"},
    ]  # fmt: skip
    for config in configs:
        with pytest.raises(RefusedError, match="encoding is not known") as refused:
            encoding_from_config(config)
        assert refused.value.expected is not None
        assert refused.value.expected.startswith("one of float32, float16")


# ---- the bytes of a shard


@pytest.mark.parametrize(("rows", "encoding"), [(300, "float16"), (4100, "float32"), (8193, "float16")])
def test_a_shard_has_the_bytes_that_zarr_writes(tmp_path: Path, rows: int, encoding: str) -> None:
    identity = stores.identity(rows=rows, encoding={"name": encoding})
    for key, data in metadata(identity).items():
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(data)
    logits = stores.logits(identity).astype(encoding)
    with pinned_zarr():
        zarr.open_array(LocalStore(tmp_path), path="logits", mode="r+")[:] = logits
    for shard in identity.layout.shards():
        rows_of_shard = logits[shard.view, shard.start : shard.stop]
        data = encode_shard(identity, shard, {"logits": rows_of_shard})
        assert data == (tmp_path / shard.key).read_bytes()
        assert len(data) == identity.layout.stored_bytes(shard)
        np.testing.assert_array_equal(decode_shard(identity, shard, data), rows_of_shard)
        within = rows_within(identity, shard, data)
        assert within is not None
        assert within.dtype == rows_of_shard.dtype
        np.testing.assert_array_equal(within, rows_of_shard)


def test_what_is_laid_out_otherwise_is_left_to_zarr() -> None:
    """Chunks in another order, which another version may write, and compressed ones."""
    identity = stores.identity(rows=8193, classes=3)
    layout, shard = identity.layout, identity.layout.shard(0, 0)
    logits = stores.logits(identity).astype("float16")[0, shard.start : shard.stop]
    data = encode_shard(identity, shard, {"logits": logits})
    chunk, entries = layout.chunk_rows * 3 * 2 + 4, layout.shard_rows // layout.chunk_rows
    assert entries > 1
    swapped = bytearray(data[chunk : 2 * chunk] + data[:chunk] + data[2 * chunk :])
    index = np.frombuffer(swapped, "<u8", 2 * entries, len(data) - 4 - 16 * entries)
    index[:4] = [chunk, chunk, 0, chunk]
    assert rows_within(identity, shard, bytes(swapped)) is None
    assert rows_within(identity, shard, data[:-1]) is None
    compressed = stores.identity(rows=8193, classes=3, encoding={"name": "float16", "compress": "zstd"})
    assert rows_within(compressed, shard, data) is None


def test_the_metadata_is_what_zarr_makes_of_the_same_array() -> None:
    identity = stores.identity()
    layout = identity.layout
    memory: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(memory),
        name="logits",
        shape=(2, 300, 3),
        chunks=(1, layout.chunk_rows, 3),
        shards=(1, layout.shard_rows, 3),
        dtype="float16",
        fill_value=np.nan,
        filters=None,
        compressors=[Crc32cCodec()],
        dimension_names=["view", "row", "class"],
    )
    assert json.loads(metadata(identity)["logits/zarr.json"]) == json.loads(memory["logits/zarr.json"].to_bytes())


def test_a_users_zarr_configuration_changes_no_byte() -> None:
    identity, shard = stores.identity(), Shard(0, 1, 256, 300)
    zeros = {"logits": np.zeros((44, 3), np.float16)}
    before = encode_shard(identity, shard, zeros)
    with zarr.config.set(
        {"array.write_empty_chunks": False, "json_indent": 0, "codec_pipeline.path": "no.such.Pipeline"}
    ):
        assert encode_shard(identity, shard, zeros) == before


# ---- the golden stores


@pytest.fixture(params=stores.GOLDENS, ids="v{}".format)
def store_format(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def golden(tmp_path: Path, store_format: int) -> Path:
    shutil.copytree(stores.GOLDENS[store_format], tmp_path / "golden")
    return next((tmp_path / "golden").glob("[0-9a-f]*"))


def test_a_golden_store_is_written_again_byte_for_byte(tmp_path: Path, store_format: int) -> None:
    """An old one too: what repairs it must arrive at the bytes that were sealed."""
    stores.build(tmp_path, stores.creation(format=store_format))
    assert stores.sealed_files(tmp_path) == stores.sealed_files(stores.GOLDENS[store_format])


def test_what_format_2_added_is_told_from_what_was(store_format: int) -> None:
    manifest = next(stores.GOLDENS[store_format].glob("*/manifest.json")).read_text()
    assert ('"sample":[0,255]' in manifest) == ('"sample":[0.5,-1.0]' in manifest) == (store_format >= 2)
    assert ('"content"' in manifest) == ('"largest_difference"' in manifest) == (store_format >= 3)


def test_a_golden_store_reads_back(golden: Path) -> None:
    store = open_store(str(golden))
    expected = stores.logits(store.manifest.identity)
    for view in range(store.views):
        np.testing.assert_array_equal(store.rows(view, 0, store.num_rows), expected[view])
    assert store.verify() == []


def test_plain_zarr_reads_a_golden_store(golden: Path, store_format: int) -> None:
    group = zarr.open_group(golden / "arrays.zarr", mode="r")
    array = group["logits"]
    assert isinstance(array, zarr.Array)
    assert np.isnan(array.fill_value)
    np.testing.assert_array_equal(np.asarray(array[:], np.float32), stores.logits(stores.identity()))
    identity = stores.identity(format=store_format).model_dump(mode="json")
    assert group.attrs["akd_dist"] == {"format": store_format, "identity": identity}


def test_a_golden_store_reads_as_documented_without_zarr(golden: Path) -> None:
    """A reader written from the document alone: JSON, sha256, crc32c, an index, and numbers."""
    manifest = json.loads((golden / "manifest.json").read_bytes())
    sealed = {key: value for key, value in manifest.items() if key != "sha256"}
    assert sha256(canonical_json(sealed)) == manifest["sha256"]
    assert sha256(canonical_json(manifest["identity"])) == manifest["id"] == golden.name
    array = json.loads((golden / "arrays.zarr/logits/zarr.json").read_bytes())
    views, rows, classes = array["shape"]
    shard_rows = array["chunk_grid"]["configuration"]["chunk_shape"][1]
    chunk_rows = array["codecs"][0]["configuration"]["chunk_shape"][1]
    logits = np.full((views, rows, classes), np.nan, np.float16)
    sealed_shards = manifest["shards"]
    if manifest["format"] > 2:  # columns, in the order of views and rows
        per_view = -(-rows // shard_rows)
        keys = [f"logits/c/{number // per_view}/{number % per_view}/0" for number in range(views * per_view)]
        sizes, digests = sealed_shards["size"], sealed_shards["sha256"]
    else:
        keys, sizes, digests = ([entry[field] for entry in sealed_shards] for field in ("key", "size", "sha256"))
    for key, size, digest in zip(keys, sizes, digests, strict=True):
        data = (golden / "arrays.zarr" / key).read_bytes()
        assert (len(data), sha256(data)) == (size, digest)
        view, shard = (int(part) for part in key.split("/")[2:4])
        chunks = shard_rows // chunk_rows
        index = data[-(16 * chunks + 4) :]
        assert struct.unpack("<I", index[-4:])[0] == crc32c(index[:-4])
        for chunk, (offset, length) in enumerate(struct.iter_unpack("<QQ", index[:-4])):
            if offset == 2**64 - 1:
                continue
            body, crc = data[offset : offset + length - 4], data[offset + length - 4 : offset + length]
            assert struct.unpack("<I", crc)[0] == crc32c(body)
            first = shard * shard_rows + chunk * chunk_rows
            decoded = np.frombuffer(body, "<f2").reshape(chunk_rows, classes)
            logits[view, first : first + chunk_rows] = decoded[: rows - first]
    np.testing.assert_array_equal(logits.astype(np.float32), stores.logits(stores.identity()))


COMPRESSED = [next(path.glob("[0-9a-f]*")) for path in sorted(stores.GOLDEN.parent.glob("v3-*"))]


@pytest.mark.parametrize("folder", COMPRESSED, ids=lambda folder: folder.parent.name)
def test_a_compressed_golden_store_reads_back(folder: Path) -> None:
    store = open_store(str(folder))
    expected = stores.logits(store.manifest.identity)
    apart = 2.0**-8 if store.manifest.identity.codec.keep_bits else 0.0
    for view in range(store.views):
        np.testing.assert_allclose(store.rows(view, 0, store.num_rows), expected[view], rtol=apart)
    assert store.verify() == []
    assert sum(store.manifest.sizes().values()) < store.layout.nbytes


@pytest.mark.parametrize("folder", COMPRESSED, ids=lambda folder: folder.parent.name)
def test_tensorstore_reads_what_is_compressed(folder: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/arrays.zarr/logits/"}}
    read = np.asarray(tensorstore.open(spec, read=True).result()[...])
    store = open_store(str(folder))
    for view in range(store.views):
        np.testing.assert_array_equal(read[view].astype(np.float32), store.rows(view, 0, store.num_rows))


@pytest.mark.parametrize("folder", COMPRESSED, ids=lambda folder: folder.parent.name)
def test_a_compressed_store_is_repaired_under_another_version_of_its_codec(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other bytes for the same logits: the sealed digest of the decoded ones vouches for them."""
    shutil.copytree(folder, tmp_path / folder.name)
    identity = open_store(str(folder)).manifest.identity
    shard = identity.layout.shard(1, 0)
    damaged = tmp_path / folder.name / "arrays.zarr" / shard.key
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-1])
    monkeypatch.setattr(arrays, "_LEVEL", 9)  # such a version writes other bytes; the metadata says nothing of it
    sealed_metadata = {key: (folder / "arrays.zarr" / key).read_bytes() for key in metadata(identity)}
    as_sealed = arrays.metadata
    for module in (repair, sealed_objects, seal):
        monkeypatch.setattr(module, "metadata", lambda _identity: sealed_metadata)
    assert as_sealed(identity) != sealed_metadata
    mended = repair.repair_store(str(tmp_path), folder.name, lambda one, _: stores.recompute(identity, one))
    assert mended == [shard]
    assert "holds the sealed logits in other bytes" in caplog.text
    assert damaged.read_bytes() != before
    store = open_store(str(tmp_path / folder.name))
    assert store.verify() == []
    np.testing.assert_array_equal(store.rows(1, 0, store.num_rows), open_store(str(folder)).rows(1, 0, store.num_rows))


def crc32c(data: bytes) -> int:
    """Castagnoli, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# ---- documents


def test_documents_are_canonical_and_strict() -> None:
    data = stores.identity().to_bytes()
    assert Identity.from_bytes(data, "here").to_bytes() == data
    assert stores.identity().differences(stores.identity(views=3, rows=301)) == ["rows: 300 != 301", "views: 2 != 3"]
    assert stores.identity(views=3).id != stores.identity().id
    with pytest.raises(ValueError, match="does not keep"):
        stores.identity(augmentation={"kind": ("a", "tuple")})
    with pytest.raises(ValueError, match=r"dataset\.fingerprint is not identity\.dataset"):
        Creation(identity=stores.identity(), computed=stores.COMPUTED, dataset={"fingerprint": "other"}, teacher={})


def test_a_manifest_does_not_tell_when_or_where() -> None:
    fields = Manifest.model_json_schema()["$defs"]["ShardRecord"]["properties"]
    told = {"key", "size", "sha256", "rows", "finite", "label_agreement", "probes", "content", "loss"}
    assert set(fields) == told | {"objects", "dictionary"}


@pytest.mark.parametrize("sample", [None, [0, 255], [0.5, 2.0], [1.0, 2.0], [0.1, -3e-45]], ids=str)
def test_probes_keep_their_samples_as_they_are(sample: list[int] | list[float] | None) -> None:
    probe = Probe(row=7, sha256="0" * 64, sample=sample)
    data = probe.to_bytes()
    assert (b"sample" in data) == (sample is not None)
    again = Probe.from_bytes(data, "here")
    assert repr(again.sample) == repr(sample)
    with pytest.raises(ValueError, match="finite number"):
        Probe(row=7, sha256="0" * 64, sample=[float("nan")])


def test_a_store_without_labels_to_agree_with_says_so(tmp_path: Path) -> None:
    writer = create_store(str(tmp_path), stores.creation())
    for shard in writer.layout.shards():
        logits, _, probes, _ = stores.recompute(writer.creation.identity, shard)
        write_shard(writer, shard, logits, label_agreement=None, probes=probes, seconds=0.0)
    records = list(seal_store(writer).records())
    assert [record.label_agreement for record in records] == [None] * 4
    assert ShardRecord.from_bytes(records[0].to_bytes(), "here") == records[0]
    assert open_store(writer.uri).verify() == []
