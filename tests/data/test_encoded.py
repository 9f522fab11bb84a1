"""Pictures that stay encoded: rows of bytes, decoded when they are read, of which views are drawn from the whole."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from akd_dist import recipe
from akd_dist.base.errors import CorruptCacheError, DamagedError, RefusedError
from akd_dist.data import encoded as encodeds, pictures, row_entry, row_store, rows as rows_module
from akd_dist.data.augmenters import augmenter_of
from akd_dist.data.encoded import EncodedPictures, Given, InPieces, ahead, encoded_of
from akd_dist.data.philox import random_words
from akd_dist.data.pictures import Crop
from akd_dist.data.row_blocks import write_run
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import alike_rows, distant_rows, fetch_rows
from akd_dist.data.row_store import ensure_rows
from akd_dist.data.views import begin_views, check_augmentation, view_digests, view_of
from akd_dist.distill.metrics import EVALUATION_ROWS, evaluate
from akd_dist.distill.stream import BatchStream
from akd_dist.recipe import DataSpec, Parquet, RandomResizedCropFlip
from akd_dist.storage.content import Guard
from akd_dist.storage.rows import SealedRows
from tests.sources import dataset

CROP = RandomResizedCropFlip()
SIDE = 24
DRAW = np.random.default_rng(11)
SIZES = [tuple(map(int, DRAW.integers(20, 90, 2))) for _ in range(39)]
PIXELS = [DRAW.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
PIXELS.append(DRAW.integers(0, 256, (260, 300, 3), dtype=np.uint8))  # large enough to be decoded at a half


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


PICTURES = [encoded(one, "PNG" if number % 3 == 0 else "JPEG", quality=90) for number, one in enumerate(PIXELS)]


def spec(folder: Path, pictures: list[bytes] = PICTURES, **named: Any) -> DataSpec:
    folder.mkdir(exist_ok=True, parents=True)
    table = pa.table({"x": pictures, "y": [row % 2 for row in range(len(pictures))]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=7)
    image = {"size": SIDE} | named.pop("image", {})
    source = Parquet(path=str(folder / "rows.parquet"), input="x", label="y")
    return DataSpec(train=source, image=recipe.Image(**image), **named)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture(scope="module")
def data(home: Path) -> DataSpec:
    return spec(home / "data", augmentation=CROP, views=3)


# ---- rows


def test_decoded_they_are_the_pixels_that_others_have(home: Path, data: DataSpec) -> None:
    kept = prepare(data, home / "cache")
    pixels = prepare(spec(home / "data", augmentation=CROP, image={"keep": "pixels"}), home / "cache")
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(kept, split), getattr(pixels, split)
        assert encoded_of(ours.inputs) is not None
        assert encoded_of(theirs.inputs) is None
        assert (ours.shape, len(ours)) == (theirs.shape, len(theirs))
        np.testing.assert_array_equal(np.asarray(ours.inputs), theirs.inputs)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(np.asarray(ours.inputs[3:1:-1]), theirs.inputs[3:1:-1])
        np.testing.assert_array_equal(ours.inputs[-1], theirs.inputs[-1])
        assert ours.fingerprint != theirs.fingerprint
        assert ours.nbytes < sum(map(len, PICTURES)) + 40 * len(PICTURES)
        ours.content().verify()
    lines = [one for one in kept.findings if one not in pixels.findings]
    assert [one.partition(",")[0] for one in lines] == ["images stay encoded"]
    assert prepare(data, home / "cache").fingerprints == kept.fingerprints  # found again
    assert prepare(data, home / "other").fingerprints == kept.fingerprints


def test_when_they_stay_encoded(home: Path) -> None:
    shift = recipe.Shift()
    for augmentation, keep, expected in (
        (CROP, "auto", True), (shift, "auto", False), (shift, "encoded", True), (CROP, "pixels", False),
    ):  # fmt: skip
        asked = spec(home / "data", augmentation=augmentation, image={"keep": keep})
        found = prepare(asked, home / "cache").train.inputs
        assert (encoded_of(found) is not None) == expected
    # Of a recipe from before, which has no size, nothing changes.
    alike = spec(home / "alike", [PICTURES[0]] * 9, augmentation=CROP, image={"size": None})
    assert encoded_of(prepare(alike, home / "cache").train.inputs) is None
    alike = spec(home / "alike", [PICTURES[0]] * 9, augmentation=CROP, image={"size": None, "keep": "encoded"})
    assert prepare(alike, home / "cache").train.shape == (3, *SIZES[0])


def test_what_does_not_come_encoded(tmp_path: Path) -> None:
    images = dataset(tmp_path, [Image.fromarray(one) for one in PIXELS[:10]], [0, 1] * 5)
    auto = DataSpec(train=images, image=recipe.Image(size=SIDE), augmentation=CROP)
    assert encoded_of(prepare(auto, tmp_path / "cache").train.inputs) is None
    asked = auto.model_copy(update={"image": recipe.Image(size=SIDE, keep="encoded")})
    with pytest.raises(RefusedError, match=r"data\.image\.keep is `encoded`, and the inputs are no encoded images"):
        prepare(asked, tmp_path / "cache")
    digits = DataSpec(train=recipe.Digits(), image=recipe.Image(keep="encoded"))
    with pytest.raises(RefusedError, match=r"data\.image is given, and the inputs are not images"):
        prepare(digits, tmp_path / "cache")


def test_bad_pictures_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for bad, words in ((PICTURES[1][:400], "Truncated|truncated"), (b"GIF", "of none of these formats")):
        asked = spec(tmp_path / "data", [*PICTURES[:5], bad, *PICTURES[5:9]], augmentation=CROP)
        with pytest.raises(RefusedError, match=f"(?s)cannot decode the image in row 5.*({words})"):
            prepare(asked, tmp_path / "cache")
    mixed = spec(tmp_path / "data", PICTURES[:9], augmentation=CROP, image={"size": None, "keep": "encoded"})
    with pytest.raises(RefusedError, match="another shape in row 1"):
        prepare(mixed, tmp_path / "cache")


def test_a_fingerprint_is_over_the_bytes(tmp_path: Path) -> None:
    """The same pixels in another file are other rows; so are other pixels of the same bytes."""
    png, other = encoded(PIXELS[0], "PNG"), encoded(PIXELS[0], "PNG", compress_level=1)
    found = [
        prepare(spec(tmp_path / str(number), [picture] * 9, augmentation=CROP, image=image), tmp_path / "cache")
        for number, (picture, image) in enumerate(
            [(png, {}), (other, {}), (png, {"resize": "stretch"}), (png, {"size": 20}), (png, {})]
        )
    ]
    prints = [one.train.fingerprint for one in found]
    assert prints[0] == prints[4]
    assert len(set(prints)) == 4


def test_rows_in_two_splits_are_found(tmp_path: Path) -> None:
    twice = spec(tmp_path / "data", PICTURES[:1] * 10, augmentation=CROP)
    assert any("have the very inputs of a train row" in line for line in prepare(twice, tmp_path / "cache").findings)


def test_wrong_bytes_are_found_out(tmp_path: Path) -> None:
    data = spec(tmp_path / "data", augmentation=CROP)
    rows = prepare(data, tmp_path / "cache").train
    file = rows.files[0]
    file.chmod(0o644)
    whole = bytearray(file.read_bytes())
    whole[400:2000] = bytes(1600)
    file.write_bytes(whole)
    with pytest.raises(CorruptCacheError, match="can no longer be decoded"):
        np.asarray(rows.inputs)
    with pytest.raises(CorruptCacheError, match="no longer what was written"):
        rows.content().verify()


# ---- views


def by_hand(picture: bytes, row: int, view: int, seed: int) -> np.ndarray:
    """A random resized crop of a whole picture, by Pillow alone."""
    with Image.open(io.BytesIO(picture)) as opened:
        whole = opened.convert("RGB")
    words = random_words(seed, np.array([row]), view, 5)
    drawn: Any = augmenter_of(CROP, (3, whole.height, whole.width), None).draw(words, (3, whole.height, whole.width))
    top, left, height, width, flip = (drawn[name].item() for name in ("top", "left", "height", "width", "flip"))
    part = whole.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    shown = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part
    return np.asarray(shown).transpose(2, 0, 1)


def given(pictures: list[bytes], numbers: np.ndarray) -> EncodedPictures:
    whole = [Image.open(io.BytesIO(one)) for one in pictures]
    index = np.array([(len(data), one.height, one.width) for data, one in zip(pictures, whole, strict=True)])
    return EncodedPictures(Given(index, pictures, numbers), (3, SIDE, SIDE), recipe.Image(size=SIDE))


def test_a_crop_is_one_of_the_whole_picture() -> None:
    numbers = np.arange(39)
    seen = view_of(CROP, 5, given(PICTURES[:39], numbers).as_array(), numbers, 2)
    for row in range(39):
        np.testing.assert_array_equal(seen[row].numpy(), by_hand(PICTURES[row], row, 2, 5))


def test_a_large_jpeg_is_decoded_smaller() -> None:
    """And is much the same then as decoded whole."""
    smooth = np.asarray(Image.fromarray(PIXELS[39]).resize((9, 8)).resize((400, 360), Image.Resampling.BICUBIC))
    picture, numbers = encoded(smooth, quality=95), np.arange(20)
    seen = view_of(CROP, 5, given([picture] * 20, numbers).as_array(), numbers, 0).numpy().astype(int)
    apart = [np.abs(seen[row] - by_hand(picture, row, 0, 5)).max() for row in range(20)]
    assert 0 < max(apart) <= 6


@pytest.mark.parametrize("augmentation", [CROP, recipe.Shift(pixels=3), recipe.NoAugmentation()])
def test_views_are_a_function_of_the_row_alone(augmentation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows are beside it, in whatever order, and however many threads there are."""
    numbers = np.arange(40)
    pictures = given(PICTURES, numbers)
    together = view_of(augmentation, 3, pictures.as_array(), numbers, 1)
    shuffled = np.random.default_rng(0).permutation(40)
    other = view_of(augmentation, 3, pictures.take(shuffled).as_array(), shuffled, 1)
    assert torch.equal(other, together[shuffled])
    check_augmentation(augmentation, 3, pictures.as_array())
    for threads in (1, 7):
        pool = ThreadPoolExecutor(threads)
        monkeypatch.setattr(encodeds, "_pool", lambda pool=pool: pool)
        assert torch.equal(view_of(augmentation, 3, pictures.as_array(), numbers, 1), together)
        pool.shutdown()


def test_other_augmentations_are_of_the_pixels(home: Path) -> None:
    shift = recipe.Shift(pixels=3)
    kept = prepare(spec(home / "data", augmentation=shift, image={"keep": "encoded"}), home / "cache").train
    pixels = prepare(spec(home / "data", augmentation=shift), home / "cache").train
    numbers = np.array([4, 0, 7])
    seen = [view_of(shift, 1, rows.inputs.take(numbers, axis=0), numbers, 2) for rows in (kept, pixels)]
    assert torch.equal(*seen)


# ---- the stream


def test_batches_are_the_views_of_their_rows(home: Path, data: DataSpec) -> None:
    rows = prepare(data, home / "cache").train
    logits = np.arange(3 * len(rows) * 2, dtype=np.float32).reshape(3, len(rows), 2)
    for window in (None, 5):
        stream = BatchStream(rows, logits, CROP, seed=4, views=3, batch=6, window=window)
        for epoch in (0, 4):
            batches = list(stream.batches(epoch))
            assert [one.step for one in batches] == list(range(stream.steps_per_epoch))
            for one in batches:
                expected = view_of(CROP, 4, rows.inputs.take(one.rows, axis=0), one.rows, epoch % 3)
                assert torch.equal(one.inputs, expected)
                assert torch.equal(one.labels, torch.from_numpy(rows.labels[one.rows]))
                assert one.logits is not None
                assert torch.equal(one.logits, torch.from_numpy(logits[epoch % 3, one.rows]))
            later = list(stream.batches(epoch, 2))
            assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(batches[2:], later, strict=True))
            halves = [list(stream.batches(epoch, rank=rank, world=2)) for rank in (0, 1)]
            for whole, *parts in zip(batches, *halves, strict=True):
                assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
                assert all(part.global_rows == len(whole.rows) for part in parts)


def test_a_rank_without_rows_gets_one_to_see(home: Path, data: DataSpec) -> None:
    rows = prepare(data, home / "cache").train
    batch = len(rows) - 1
    *_, last = BatchStream(rows, None, CROP, seed=4, views=1, batch=batch).batches(0, rank=0, world=2)
    assert (len(last.rows), last.inputs.shape[0]) == (0, 0)
    assert last.spare is not None
    assert last.spare.shape == (1, 3, SIDE, SIDE)


def test_a_few_batches_are_begun_ahead_and_no_more() -> None:
    begun, wanted = list[int](), list[int]()

    def some() -> Any:
        for number in range(10):
            begun.append(number)
            yield lambda number=number: number

    for number in ahead(some(), 2):
        wanted.append(number)
        assert begun[-1] == min(number + 2, 9)
    assert wanted == list(range(10))


def test_evaluation_reads_them(home: Path, data: DataSpec) -> None:
    kept, pixels = (
        prepare(one, home / "cache").train
        for one in (data, spec(home / "data", augmentation=CROP, image={"keep": "pixels"}))
    )
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Linear(3 * SIDE * SIDE, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.last(x.flatten(1).float() / 255)
            return logits

    module = Net()
    assert len(kept) < EVALUATION_ROWS
    found = [evaluate(module, rows, torch.device("cpu")) for rows in (kept, pixels)]
    assert found[0][0] == found[1][0]


def test_probes_of_one_row_at_a_time_are_those_of_all(home: Path, data: DataSpec) -> None:
    rows = prepare(data, home / "cache").train
    some = view_digests(CROP, 2, rows.inputs, [1, 5], 1)
    alone = [view_digests(CROP, 2, rows.inputs, [row], 1)[0] for row in (1, 5)]
    assert some == alone


class Decoded(torch.utils.data.Dataset[torch.Tensor]):
    """Under a DataLoader's workers, which are forked."""

    def __init__(self, pictures: EncodedPictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.pictures.take([row]))[0])


def test_a_process_that_was_forked_has_threads_of_its_own() -> None:
    pictures = given(PICTURES[:6], np.arange(6))
    expected = np.asarray(pictures)  # by threads of this process, which the others have not
    loader = torch.utils.data.DataLoader(
        Decoded(pictures), batch_size=3, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    np.testing.assert_array_equal(np.concatenate([one.numpy() for one in loader]), expected)


def test_decoding_is_done_by_threads_of_its_own() -> None:
    seen, decode = set[str](), EncodedPictures._decoded

    def noted(self: EncodedPictures, *given: Any) -> list[np.ndarray]:
        seen.add(threading.current_thread().name.partition("_")[0])
        return decode(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodedPictures, "_decoded", noted)
        np.asarray(given(PICTURES, np.arange(40)))
    assert seen == {"decoding"}


# ---- a cluster's rows


def in_blocks(data: DataSpec, folder: Path) -> SealedRows:
    """The same rows by way of blocks under a store root."""

    def compute(plan: Any, take: Any) -> None:
        for run in plan.runs:
            take(write_run(plan.job, run, threads=2))

    return ensure_rows(data, str(folder / "stores"), compute).sealed


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows_module, row_entry, row_store):
        monkeypatch.setattr(module, "BLOCK_ROWS", 4)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_hold_the_rows_of_this_node(tmp_path: Path) -> None:
    """Held, fetched each time, and held window by window: the same pictures, labels and fingerprints."""
    data = spec(tmp_path / "data", augmentation=CROP, seed=2)
    here, sealed = prepare(data, tmp_path / "cache"), in_blocks(data, tmp_path)
    held, distant = fetch_rows(sealed, tmp_path / "other"), distant_rows(sealed)
    # Small entries: what a few windows take, with room for the splits that are held beside.
    windowed = fetch_rows(sealed, tmp_path / "small", windowed=True, budget=here.nbytes * 3 // 2)
    line = "images stay encoded, in "
    assert sum(one.startswith(line) for one in here.findings) == 1
    assert [windowed.train.held, held.train.held, distant.train.held] == [False, True, False]
    assert held.findings == here.findings
    for found in (held, distant, windowed):
        assert found.fingerprints == here.fingerprints
        for split in ("train", "validation", "test"):
            ours, theirs = getattr(found, split), getattr(here, split)
            np.testing.assert_array_equal(np.asarray(ours.inputs), np.asarray(theirs.inputs))
            np.testing.assert_array_equal(ours.all_labels(), theirs.labels)
            assert ours.nbytes == theirs.nbytes
    held.train.content().verify()
    moving = windowed.train.moving
    assert moving is not None
    numbers = np.array([9, 4, 6, 11])
    expected = view_of(CROP, 1, here.train.inputs.take(numbers, axis=0), numbers, 0)
    with Guard([]) as guard:
        moving.watch(guard)
        moving.move(0, [(4, 12)])
        encoded_rows = encoded_of(windowed.train.inputs)
        assert encoded_rows is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InPieces, "_fetched", None)  # what is held is not fetched
            assert torch.equal(view_of(CROP, 1, encoded_rows.take(numbers).as_array(), numbers, 0), expected)
        guard.vouch()
        moving.close()


@pytest.mark.usefixtures("small_blocks")
def test_grey_pictures_before_coloured_ones(tmp_path: Path) -> None:
    grey = [encoded(one[..., 0], "PNG") for one in PIXELS[:20]]
    data = spec(tmp_path / "data", [*grey, *PICTURES[20:30]], augmentation=CROP)
    here, there = prepare(data, tmp_path / "cache"), fetch_rows(in_blocks(data, tmp_path), tmp_path / "other")
    assert here.fingerprints == there.fingerprints
    assert here.train.shape == (3, SIDE, SIDE)
    only = spec(tmp_path / "grey", grey, augmentation=CROP)
    assert prepare(only, tmp_path / "cache").train.shape == (1, SIDE, SIDE)


def test_rows_alike_are_measured_with(tmp_path: Path) -> None:
    alike = alike_rows(in_blocks(spec(tmp_path / "data", augmentation=CROP), tmp_path)).train
    first, *others = np.asarray(alike.inputs.take(np.arange(3), axis=0))
    assert all((one == first).all() for one in others)
    assert alike.row_bytes > 0


def test_what_older_versions_cannot_read_has_another_format(tmp_path: Path) -> None:
    """And rows of pixels keep theirs, to the byte."""
    for keep, formats in (("auto", (2, 3)), ("pixels", (1, 2))):
        data = spec(tmp_path / "data", augmentation=CROP, image={"keep": keep})
        manifest = in_blocks(data, tmp_path).manifest()
        assert (manifest.creation.format, manifest.format) == formats
        assert (
            (b'"sizes"' in manifest.to_bytes()) == (b'"encoded":' in manifest.creation.to_bytes()) == (keep == "auto")
        )


def test_a_block_that_is_cut_is_named(tmp_path: Path) -> None:
    sealed = in_blocks(spec(tmp_path / "data", augmentation=CROP), tmp_path)
    block = max(Path(sealed.uri).glob("blocks/*"), key=lambda path: path.stat().st_size)
    block.chmod(0o644)
    block.write_bytes(block.read_bytes()[:-100])
    with pytest.raises(DamagedError, match=block.name[:16]):
        fetch_rows(sealed, tmp_path / "other")


@pytest.mark.parametrize("augmentation", [CROP, recipe.PadCropFlip(pixels=2), recipe.NoAugmentation()])
def test_several_views_are_those_of_each_alone_and_of_one_decoding(
    home: Path, data: DataSpec, augmentation: recipe.Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, numbers = prepare(data, home / "cache").train.inputs, np.arange(20)
    block = inputs.take(numbers, axis=0)
    alone = [view_of(augmentation, 7, block, numbers, view) for view in range(4)]
    decoded, whole = list[tuple[int, int]](), pictures.whole

    def counted(picture: Image.Image, image: recipe.Image) -> Image.Image:
        decoded.append(picture.size)
        return whole(picture, image)

    monkeypatch.setattr(pictures, "whole", counted)
    together = [one() for one in begin_views(augmentation, 7, block, numbers, range(4))]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert len(decoded) == len(numbers)  # none of these is large enough to be decoded at two sizes


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_a_crop_is_of_the_picture_as_it_is_shown(orientation: int) -> None:
    """Turned as its EXIF says, whether it is decoded whole or smaller."""
    smooth = np.asarray(Image.fromarray(PIXELS[39]).resize((9, 8)).resize((400, 360), Image.Resampling.BICUBIC))
    tags = Image.Exif()
    tags[0x0112] = orientation
    picture = encoded(smooth, quality=95, exif=tags)
    with Image.open(io.BytesIO(picture)) as opened:
        shown = ImageOps.exif_transpose(opened).convert("RGB")
    index = np.array([[len(picture), shown.height, shown.width]])
    pictures = EncodedPictures(Given(index, [picture], np.arange(1)), (3, SIDE, SIDE), recipe.Image(size=SIDE))
    size = shown.height, shown.width
    for crop in (Crop(60, 100, 200, 210, False, size), Crop(300, 20, 40, 50, True, size)):
        part = shown.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        expected = np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(int)
        apart = np.abs(pictures.begin([[crop]])()[0][0] - (expected[..., ::-1] if crop.flip else expected))
        assert apart.max() <= 6
