"""The stream: every row once an epoch with its own logits, the same for any number of ranks and from any position."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from akd_dist.base.errors import RefusedError
from akd_dist.data.rows import Rows, fingerprint
from akd_dist.data.text import Tokens
from akd_dist.data.views import shown_digests, view_digests, view_of
from akd_dist.distill.orders import WINDOWS_AT_ONCE, EpochOrder, batch_ends, epoch_order
from akd_dist.distill.probes import SeenViews
from akd_dist.distill.stream import BYTES_AT_ONCE, STEPS_AT_ONCE, BatchStream
from akd_dist.recipe import Augmentation, CustomAugmentation, LastBatch, NoAugmentation, Shift, TokenMask
from akd_dist.storage.checked import note_of
from akd_dist.storage.decoded import drop_decoded
from akd_dist.storage.layout import FORMAT_VERSION
from akd_dist.storage.manifest import Computed, Creation, Identity, Manifest
from akd_dist.storage.records import ShardRecord
from tests import sources
from tests.fleets import own

N, CLASSES, VIEWS = 103, 3, 2
SHIFT = Shift()


def some_rows(n: int = N) -> Rows:
    """Rows that say who they are: the label of row r is r."""
    inputs = np.random.default_rng(0).integers(1, 256, (n, 1, 4, 4), dtype=np.uint8)
    labels = np.arange(n)
    return Rows(inputs, labels, n, *fingerprint(inputs, labels, n), folder=Path())


def some_logits(n: int = N) -> np.ndarray:
    """Logits that say whose they are: (view, row, 0)."""
    logits = np.zeros((VIEWS, n, CLASSES), dtype=np.float16)
    logits[:, :, 0] = np.arange(VIEWS)[:, np.newaxis]
    logits[:, :, 1] = np.arange(n)
    return logits


def a_stream(**changes: Any) -> BatchStream:
    arguments: dict[str, Any] = {"augmentation": Shift(), "seed": 5, "views": VIEWS, "batch": 16}
    return BatchStream(some_rows(), some_logits(), **arguments | changes)


# ---- order


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**6),
    st.none() | st.integers(1, 400),
)
def test_an_order_is_a_permutation_and_pure(rows: int, seed: int, epoch: int, window: int | None) -> None:
    order = epoch_order(rows, seed, epoch, window)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(rows))
    np.testing.assert_array_equal(order, epoch_order(rows, seed, epoch, window))


def test_orders_differ_by_seed_and_epoch() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order.tolist()) for order in orders}) == 16


def test_the_order_is_pinned() -> None:
    """A change here would change every student's weights."""
    assert epoch_order(12, seed=3, epoch=4).tolist() == PINNED
    assert epoch_order(12, seed=3, epoch=4, window=2).tolist() == PINNED_IN_WINDOWS


PINNED = [0, 6, 2, 1, 3, 4, 7, 10, 8, 11, 5, 9]
PINNED_IN_WINDOWS = [2, 3, 4, 10, 8, 11, 5, 9, 0, 6, 1, 7]


def at_once(rows: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """The windowed order as it was first defined: over all rows at once."""
    generator = np.random.Philox(key=[seed, epoch + 1])
    words = generator.random_raw(rows)
    order = np.argsort(generator.random_raw(-(-rows // window)), kind="stable")
    return np.lexsort((words, np.argsort(order)[np.arange(rows) // window] // WINDOWS_AT_ONCE))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 99), st.integers(1, 400), st.data())
def test_an_order_is_drawn_in_parts(rows: int, seed: int, epoch: int, window: int, data: st.DataObject) -> None:
    whole, order = at_once(rows, seed, epoch, window), EpochOrder(rows, seed, epoch, window)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    np.testing.assert_array_equal(order.rows(start, stop), whole[start:stop])
    np.testing.assert_array_equal(epoch_order(rows, seed, epoch, window), whole)
    for group, end in enumerate(order.ends.tolist()):
        begin = order.ends[group - 1] if group else 0
        shown = [row for first, after in order.spans(group) for row in range(first, after)]
        assert shown == sorted(whole[begin:end].tolist())
    assert order.spans(len(order.ends)) == []


def test_an_order_takes_the_memory_of_a_group() -> None:
    """And draws no more: of a billion rows all the words would be 8 GB."""
    tracemalloc.start()
    order = EpochOrder(10**9, 1, 2, 4096)
    assert len(set(order.rows(10**8 - 1, 10**8 + 50_000).tolist())) == 50_001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64_000_000


def test_every_row_comes_anywhere_equally_often() -> None:
    places = np.array([np.argsort(epoch_order(8, 0, epoch)) for epoch in range(4000)])
    counts = np.array([np.bincount(places[:, row], minlength=8) for row in range(8)])
    assert np.abs(counts - 500).max() < 110  # 5 standard deviations


def test_a_windowed_order_stays_within_a_few_windows() -> None:
    window = 10
    order = epoch_order(1000, 0, 0, window)
    touched = [set((part // window).tolist()) for part in np.split(order, 1000 // (window * WINDOWS_AT_ONCE))]
    assert all(len(windows) == WINDOWS_AT_ONCE for windows in touched)
    assert (np.sort(order[:40]) != order[:40]).any()


# ---- batches


def test_an_epoch_shows_every_row_once_with_its_logits() -> None:
    stream = a_stream()
    for epoch in range(3):
        batches = list(stream.batches(epoch))
        assert len(batches) == stream.steps_per_epoch == 7
        assert [len(batch.rows) for batch in batches] == [16] * 6 + [7]
        np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), epoch_order(N, 5, epoch))
        for step, batch in enumerate(batches):
            assert (batch.epoch, batch.step, batch.global_rows) == (epoch, step, len(batch.rows))
            assert batch.labels.tolist() == batch.rows.tolist()
            assert batch.logits is not None
            assert batch.logits.dtype == torch.float16
            assert set(batch.logits[:, 0].tolist()) == {epoch % VIEWS}
            assert batch.logits[:, 1].tolist() == batch.rows.tolist()
            expected = view_of(Shift(), 5, stream.rows.inputs[batch.rows], batch.rows, epoch % VIEWS)
            assert torch.equal(batch.inputs, expected)
            assert batch.inputs.dtype == torch.uint8


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60))
def test_where_batches_end(rows: int, batch: int) -> None:
    sizes = {how: np.diff(batch_ends(rows, batch, how), prepend=0).tolist() for how in get_args(LastBatch)}
    whole, rest = divmod(rows, batch)
    assert sizes["keep"] == [batch] * whole + [rest] * (rest > 0)
    assert sizes["drop"] == [batch] * whole
    assert sizes["merge"] == ([batch] * (whole - 1) + [batch + rest] if whole else [rows])


@pytest.mark.parametrize(("last_batch", "sizes"), [("drop", [16] * 6), ("merge", [16] * 5 + [23])])
def test_a_last_batch_that_is_dropped_or_merged(last_batch: LastBatch, sizes: list[int]) -> None:
    """The other batches are those of before; the same from any position, and over any number of ranks."""
    stream, kept = a_stream(last_batch=last_batch), a_stream()
    for epoch in range(2):
        batches, before = list(stream.batches(epoch)), list(kept.batches(epoch))
        assert [batch.global_rows for batch in batches] == sizes
        assert (stream.steps_per_epoch, stream.rows_per_epoch) == (len(sizes), sum(sizes))
        assert all(same(*pair) for pair in zip(batches[:5], before[:5], strict=True))
        shown = np.concatenate([batch.rows for batch in batches])
        np.testing.assert_array_equal(shown, epoch_order(N, 5, epoch)[: sum(sizes)])
        assert batches[-1].labels.tolist() == batches[-1].rows.tolist()
        assert all(same(*pair) for pair in zip(stream.batches(epoch, start_step=4), batches[4:], strict=True))
        for world in (2, 3):
            ranks = [list(stream.batches(epoch, 0, rank, world)) for rank in range(world)]
            for step, batch in enumerate(batches):
                assert np.concatenate([rank[step].rows for rank in ranks]).tolist() == batch.rows.tolist()
                assert {rank[step].global_rows for rank in ranks} == {batch.global_rows}


def same(one: Any, other: Any) -> bool:
    return (
        (one.epoch, one.step, one.global_rows) == (other.epoch, other.step, other.global_rows)
        and one.rows.tolist() == other.rows.tolist()
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("inputs", "labels", "logits"))
    )


@pytest.mark.parametrize("step", [0, 1, 6, 7])
def test_a_position_resumes_in_the_middle_of_an_epoch(step: int) -> None:
    whole = list(a_stream().batches(1))
    rest = list(a_stream().batches(1, step))
    assert len(rest) == 7 - step
    assert all(same(one, other) for one, other in zip(whole[step:], rest, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4, 5])
@pytest.mark.parametrize("batch", [16, 17, 3, 200])
def test_ranks_together_see_the_batches_of_one(world: int, batch: int) -> None:
    stream = a_stream(batch=batch)
    ranks = [list(stream.batches(1, rank=rank, world=world)) for rank in range(world)]
    for alone, *shares in zip(stream.batches(1), *ranks, strict=True):
        sizes = [len(share.rows) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert {share.global_rows for share in shares} == {len(alone.rows)}
        assert np.concatenate([share.rows for share in shares]).tolist() == alone.rows.tolist()
        for name in ("inputs", "labels", "logits"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(alone, name))


def test_a_stream_without_logits_shows_the_same_batches() -> None:
    stream = a_stream()
    for full, bare in zip(stream.batches(1), stream.without_logits().batches(1), strict=True):
        assert bare.logits is None
        assert torch.equal(full.inputs, bare.inputs)
        assert torch.equal(full.labels, bare.labels)


def test_memory_maps_are_streamed_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", some_logits())
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    stream = BatchStream(some_rows(), mapped, Shift(), seed=5, views=VIEWS, batch=16)
    assert all(same(one, other) for one, other in zip(stream.batches(0), a_stream().batches(0), strict=True))


@pytest.mark.parametrize(("rows", "views"), [(N - 1, VIEWS), (N, VIEWS + 1)], ids=["rows", "views"])
def test_logits_of_other_rows_or_too_few_views_are_refused(rows: int, views: int) -> None:
    with pytest.raises(RefusedError, match="not of these rows and views"):
        BatchStream(some_rows(), some_logits(rows), Shift(), seed=0, views=views, batch=8)


def test_batches_are_made_on_the_streams_device() -> None:
    """The `meta` device stands for an accelerator: whatever is made elsewhere and mixed in, it refuses."""
    batch = next(a_stream(device="meta").batches(0))
    assert batch.logits is not None
    assert {tensor.device.type for tensor in (batch.inputs, batch.labels, batch.logits)} == {"meta"}
    assert batch.inputs.shape == (16, 1, 4, 4)
    assert batch.logits.dtype == torch.float16


@pytest.mark.parametrize(("start", "rank", "world"), [(0, 0, 1), (5, 0, 1), (1, 0, 3), (2, 2, 3)])
def test_batches_made_in_one_go_are_those_made_one_by_one(
    start: int, rank: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = a_stream(batch=6)  # the last batch has one row: less than there are ranks
    monkeypatch.setattr(BatchStream, "steps_at_once", 1)
    one_by_one = list(stream.batches(1, start, rank, world))
    monkeypatch.setattr(BatchStream, "steps_at_once", 4)
    in_one_go = list(stream.batches(1, start, rank, world))
    assert [batch.step for batch in in_one_go] == list(range(start, 18))
    for ours, theirs in zip(in_one_go, one_by_one, strict=True):
        assert (ours.epoch, ours.step, ours.global_rows) == (theirs.epoch, theirs.step, theirs.global_rows)
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        assert ours.inputs.storage_offset() == 0
        for name in ("inputs", "labels", "logits", "spare"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_as_many_are_made_in_one_go_as_pay_and_fit() -> None:
    for device, most in BYTES_AT_ONCE.items():  # rows of 16 bytes
        assert a_stream(device=device).steps_at_once == STEPS_AT_ONCE
        assert a_stream(device=device, batch=most // 16 // 3).steps_at_once == 3
        assert a_stream(device=device, batch=most).steps_at_once == 1


def test_text_is_masked_as_its_tokens_say() -> None:
    ids = np.full((N, 6), 7, dtype=np.int32)
    ids[:, 4:] = 0
    tokens = Tokens(vocabulary=9, padding=0, mask=3)
    rows = replace(some_rows(), inputs=ids, tokens=tokens)
    stream = BatchStream(rows, None, TokenMask(share=0.5), seed=5, views=2, batch=16)
    shown = torch.cat([batch.inputs for batch in stream.batches(1)])
    assert set(shown[:, :4].flatten().tolist()) == {3, 7}
    assert set(shown[:, 4:].flatten().tolist()) == {0}
    stream.check_probes(a_manifest(rows, TokenMask(share=0.5)))


# ---- probes


def a_manifest(rows: Rows, augmentation: Augmentation = SHIFT, seed: int = 5, views: int = VIEWS) -> Manifest:
    identity = Identity(
        format=FORMAT_VERSION,
        dataset=rows.fingerprint,
        rows=len(rows),
        teacher="t",
        augmentation=augmentation.model_dump(mode="json"),
        data_seed=seed,
        views=views,
        encoding={"name": "float16"},
        classes=CLASSES,
    )
    creation = Creation(
        identity=identity,
        computed=Computed(batch_rows=8, threads=1, device="cpu", versions={}),
        dataset=rows.describe(),
        teacher={"fingerprint": "t"},
    )
    records = []
    for shard in identity.layout.shards():
        probes = view_digests(augmentation, seed, rows.inputs, [shard.start, shard.stop - 1], shard.view, rows.tokens)
        records.append(
            ShardRecord(
                key=shard.key,
                size=1,
                sha256="0" * 64,
                rows=shard.rows,
                finite=True,
                label_agreement=1.0,
                probes=probes,
                content="0" * 64,
            )
        )
    return Manifest.seal(creation, {}, records)


def test_probes_pass_where_teacher_and_student_see_the_same() -> None:
    stream = a_stream()
    stream.check_probes(a_manifest(stream.rows))
    stream.check_probes(a_manifest(stream.rows, views=VIEWS + 1))


@pytest.mark.parametrize(
    "seen", [{"seed": 6}, {"augmentation": Shift(pixels=2)}, {"augmentation": NoAugmentation()}], ids=str
)
def test_other_views_than_the_teacher_saw_are_refused(seen: dict[str, Any]) -> None:
    stream = a_stream()
    with pytest.raises(RefusedError, match=r"view \d of row \d+ does not show what the teacher saw"):
        stream.check_probes(a_manifest(stream.rows, **seen))


def test_a_refusal_says_how_far_the_pixels_have_drifted() -> None:
    """Another version of a library, say, that rounds otherwise: the rows are the same, and the views are not."""
    stream = a_stream()
    manifest = a_manifest(stream.rows)
    document = manifest.model_dump(mode="json")
    probes = document["probes"][1]
    for one in probes:
        one["sha256"] = "0" * 64
        one["sample"] = [value + 1 if place else value - 3 for place, value in enumerate(one["sample"])]
    changed = Manifest.model_validate(document)
    with pytest.raises(RefusedError, match="view 1 of row 0 does not show what the teacher saw") as refused:
        stream.check_probes(changed)
    assert refused.value.got == (
        "2 of 4 probe views differ; their sampled values are apart by 1.12 on average and 3 at most, "
        "on a scale of 0 to 255"
    )
    replace(stream, views=1).check_probes(changed)  # views that nobody will see do not matter
    for one in probes:
        del one["sample"]
    with pytest.raises(RefusedError) as refused:
        stream.check_probes(Manifest.model_validate(document))
    assert str(refused.value.got).endswith("how far is not known, as the store keeps no sample of them")


def test_another_dataset_is_refused() -> None:
    with pytest.raises(RefusedError, match="not the one the store was made from"):
        a_stream().check_probes(a_manifest(some_rows(N + 1)))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows are compared, each time that some are."""
    sizes = list[int]()

    def counted(*given: Any) -> Any:
        sizes.append(len(given[3]))
        return shown_digests(*given)

    monkeypatch.setattr("akd_dist.distill.probes.shown_digests", counted)
    return sizes


def test_probes_are_compared_in_parts(compared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    checked = a_stream()
    manifest = a_manifest(checked.rows)
    monkeypatch.setattr("akd_dist.distill.probes.PROBE_BYTES", 20)  # of one row of 16 bytes, and a little
    checked.check_probes(manifest)
    assert compared == [1] * 4
    seen = [(view, probe) for view in (0, 1) for probe in manifest.probes_of(view)]
    shown = SeenViews(checked.rows, checked.augmentation, checked.seed, checked.views, checked.device)
    assert shown._probed(seen) == [(view, probe, probe) for view, probe in seen]


def test_probes_are_compared_once_a_node(compared: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = a_stream()
    manifest = a_manifest(checked.rows)
    for _ in range(3):
        a_stream().check_probes(manifest, tmp_path)
    assert compared == [2, 2]
    a_stream(views=1).check_probes(manifest, tmp_path)
    other = a_manifest(checked.rows, views=VIEWS + 1)
    a_stream().check_probes(other, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(np, "__version__", "another")
        a_stream().check_probes(manifest, tmp_path)
    assert compared == [2] * 7
    a_stream().check_probes(manifest, tmp_path)
    assert compared == [2] * 7
    drop_decoded(manifest, tmp_path)
    a_stream().check_probes(manifest, tmp_path)
    assert compared == [2] * 9
    note = note_of(manifest, tmp_path)
    note.write_bytes(note.read_bytes().replace(b"a", b"b"))
    a_stream().check_probes(manifest, tmp_path)
    assert compared == [2] * 11


def test_what_was_refused_is_refused_again(tmp_path: Path) -> None:
    manifest = a_manifest(some_rows(), seed=6)
    for _ in range(2):
        with pytest.raises(RefusedError, match="does not show what the teacher saw"):
            a_stream().check_probes(manifest, tmp_path)


def test_views_of_the_users_own_are_compared_by_every_process(compared: list[int], tmp_path: Path) -> None:
    """What its file imports may change, and nothing but the pixels shows it."""
    code = "class Still:\n    words = 0\n    def draw(self, words, shape): return {}\n"
    name = sources.module(tmp_path, code + "    def apply(self, batch, params): return batch\n")
    augmentation = own(CustomAugmentation(factory=f"{name}:Still"), tmp_path)
    checked = a_stream(augmentation=augmentation)
    manifest = a_manifest(checked.rows, augmentation)
    for _ in range(2):
        checked.check_probes(manifest, tmp_path)
    assert compared == [2] * 4


# ---- speed


def test_the_stream_keeps_up_with_numpy() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "stream.py"
    command = [sys.executable, str(script), "--json", "--repeats", "7"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # Seen: 0.6 where caches are so large that NumPy gathers 1.7 million rows a second, and up to 0.9 elsewhere.
    assert result["ratio_of_best"] >= 0.5
    # The same of a DataLoader in this process: 0.84, 0.9 and 0.64 were seen on a machine with much else to do.
    assert min(result["loader_ratio"], result["dataset_ratio"]) >= 0.5
    assert result["shuffled_ratio"] >= 0.3
    assert (result["rows"], result["batch"]) == (60_000, 256)
