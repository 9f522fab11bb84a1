"""Pictures are what every viewer shows: a case for each row of the table in docs/reference/data.md."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from rich.console import Console

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data import prepare as preparing
from akd_dist.data.columns import Place, inputs_of
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Splits
from akd_dist.jobs.prepare_rows import prepare_shown
from akd_dist.recipe import DataSpec, Parquet

T = TypeVar("T")
RED, WHITE = [200, 10, 20], [255, 255, 255]
COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
GREYS = COLOURS[..., 0].copy()
ALPHA = np.random.default_rng(1).integers(0, 256, (4, 6), dtype=np.uint8)
ALPHA[0] = 255
PLACE = Place(lambda row: f"row {row}")


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def png(pixels: bytes, width: int, depth: int, colour: int, *chunks: tuple[bytes, bytes], after: bytes = b"") -> bytes:
    """A PNG of one line, chunk by chunk."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + pixels))]
    parts += [(b"eXIf", after)] * bool(after) + [(b"IEND", b"")]
    framed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def tiff(values: np.ndarray, photometric: int, *extra: int) -> bytes:
    """A TIFF of an array [height, width, channels], tag by tag; `extra` says what channels beyond the colours are."""
    height, width, channels = values.shape
    bits = values.dtype.itemsize * 8
    after = struct.pack(f"<{channels}H", *[bits] * channels) + values.tobytes()
    tags = [
        (256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels), (259, 3, [1]), (262, 3, [photometric]),
        (273, 4, [0]), (277, 3, [channels]), (278, 4, [height]), (279, 4, [values.nbytes]), (338, 3, list(extra)),
    ]  # fmt: skip
    tags = [tag for tag in tags if tag[2]]
    at = 8 + 2 + 12 * len(tags) + 4
    body = b""
    for number, kind, said in tags:
        said = [at + 2 * channels] if number == 273 else said
        short = struct.pack(f"<{len(said)}{'H' if kind == 3 else 'I'}", *said).ljust(4, b"\0")
        body += struct.pack("<HHI", number, kind, len(said)) + (struct.pack("<I", at) if len(short) > 4 else short)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + struct.pack("<I", 0) + after


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def decoded(picture: Any, background: Sequence[int] = WHITE, shape: Sequence[int] | None = None) -> np.ndarray:
    """What becomes of one picture: uint8 [channels, height, width]."""
    column = pa.array([picture]) if isinstance(picture, bytes) else [picture]
    inputs = inputs_of([column], 0, PLACE, shape, None, recipe.Image(background=list(background)))
    found: np.ndarray = inputs([column], np.arange(1))[0]
    assert found.shape == inputs.shape
    return found


def chw(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1)


def over(colours: np.ndarray, alpha: np.ndarray, background: Sequence[int]) -> np.ndarray:
    """Colours [..., channels] over a background, to the nearest of 255 steps."""
    share = alpha[..., None] / 255
    return np.rint(colours * share + np.array(background)[: colours.shape[-1]] * (1 - share)).astype(np.uint8)


def parquet(folder: Path, pictures: Any, **options: Any) -> DataSpec:
    return DataSpec(train=source(folder, pictures), **options)


def source(folder: Path, pictures: Any) -> Parquet:
    """Encoded pictures in the column x, and two classes in the column y."""
    folder.mkdir(exist_ok=True)
    table = pa.table({"x": pa.array(pictures), "y": [row % 2 for row in range(len(pictures))]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=4)
    return Parquet(path=str(folder / "rows.parquet"), input="x", label="y")


def prints(splits: Splits) -> list[str]:
    return [one.fingerprint for one in (splits.train, splits.validation, splits.test)]


# ---- the table in docs/reference/data.md, row by row

# By its definition in EXIF: where row 0 and column 0 of what is stored are seen.
TURNED = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: seen.swapaxes(0, 1)[:, ::-1],
    7: lambda seen: seen.swapaxes(0, 1)[::-1, ::-1],
    8: lambda seen: seen.swapaxes(0, 1)[::-1],
}
TABLE: dict[str, Any] = {}


def row(says: str) -> Callable[[T], T]:
    """Marks the test of a row of the table by what its first cell says."""

    def marked(test: T) -> T:
        TABLE[says] = test
        return test

    return marked


def test_each_row_of_the_table_has_its_test() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "data.md").read_text()
    table = text.partition("### Images")[2].partition("\n#")[0]
    said = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert said[2:] == list(TABLE)


@row("an orientation from 1 to 8: in the EXIF of JPEG, PNG and WebP, or a tag of TIFF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, compressed", "PNG, at its end"])
@pytest.mark.parametrize("orientation", TURNED)
def test_orientation(kind: str, orientation: int) -> None:
    options: dict[str, Any] = {"exif": exif(orientation)}
    options |= {"lossless": True} if kind == "WEBP" else {}
    options |= {"compression": "tiff_lzw"} if kind == "TIFF, compressed" else {}
    picture, expected = encoded(COLOURS, kind.partition(",")[0], **options), COLOURS
    if kind == "PNG, at its end":
        picture = png(COLOURS[0].tobytes(), 6, 8, 2, after=exif(orientation).tobytes()[6:])
        expected = COLOURS[:1]
    if kind == "JPEG":
        expected = np.asarray(Image.open(io.BytesIO(picture)))
    np.testing.assert_array_equal(decoded(picture), chw(TURNED[orientation](expected)))


def test_orientation_of_xmp() -> None:
    said = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    picture = encoded(COLOURS, "WEBP", lossless=True, xmp=said)
    np.testing.assert_array_equal(decoded(picture), chw(COLOURS[::-1, ::-1]))


@row("EXIF that cannot be read, or an orientation beyond these")
@pytest.mark.parametrize("spoilt", [exif(9), exif(0), b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing"])
def test_spoilt_orientation(spoilt: Any) -> None:
    np.testing.assert_array_equal(decoded(encoded(COLOURS, exif=spoilt)), chw(COLOURS))


@row("alpha: with colours or grey levels, with a palette, multiplied in (TIFF)")
@pytest.mark.parametrize("background", [WHITE, RED])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha(kind: str, background: list[int]) -> None:
    lossless = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    expected = chw(over(COLOURS, ALPHA, background))
    colours = encoded(np.dstack([COLOURS, ALPHA]), kind, **lossless)
    np.testing.assert_array_equal(decoded(colours, background), expected)
    greys = encoded(Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(ALPHA)]), kind, **lossless)
    grey = chw(over(np.dstack([GREYS] * 3), ALPHA, background))
    np.testing.assert_array_equal(decoded(greys, background), grey)
    solid = encoded(np.dstack([COLOURS, np.full_like(ALPHA, 255)]), kind, **lossless)
    np.testing.assert_array_equal(decoded(solid, background), chw(COLOURS))
    if kind != "TIFF":
        return
    palette = Image.fromarray(COLOURS).convert("P")
    layered = Image.merge("RGBA", [*palette.convert("RGB").split(), Image.fromarray(ALPHA)]).convert("PA")
    seen = over(np.asarray(layered.convert("RGB")), ALPHA, background)
    np.testing.assert_array_equal(decoded(encoded(layered, kind), background), chw(seen))
    multiplied = np.rint(COLOURS * (ALPHA[..., None] / 255)).astype(np.uint8)
    found = decoded(tiff(np.dstack([multiplied, ALPHA]), 2, 1), background).astype(int)
    assert np.abs(found - expected).max() <= 2  # what was rounded when it was multiplied
    one = np.rint(GREYS * (ALPHA / 255)).astype(np.uint8)
    found = decoded(tiff(np.dstack([one, ALPHA]), 1, 1), background).astype(int)
    assert np.abs(found - grey).max() <= 2


PALETTE = (b"PLTE", bytes([1, 2, 3, 10, 11, 12]))
SEEN_THROUGH: dict[str, tuple[bytes, list[Any]]] = {
    "1 bit": (png(b"\x40", 2, 1, 0, (b"tRNS", b"\0\1")), [0, None]),
    "2 bits": (png(b"\x1b", 4, 2, 0, (b"tRNS", b"\0\2")), [0, 85, None, 255]),
    "4 bits": (png(b"\x1f", 2, 4, 0, (b"tRNS", b"\0\x0f")), [17, None]),
    "8 bits": (png(b"\x01\xff", 2, 8, 0, (b"tRNS", b"\0\xff")), [1, None]),
    "RGB": (png(b"\1\2\3\7\x08\x09", 2, 8, 2, (b"tRNS", b"\0\7\0\x08\0\x09")), [[1, 2, 3], None]),
    "palette": (png(b"\0\1", 2, 8, 3, PALETTE, (b"tRNS", b"\xff\0")), [[1, 2, 3], None]),
    "GIF": (encoded(Image.fromarray(GREYS[:1, :2]), "GIF", transparency=int(GREYS[0, 1])), [int(GREYS[0, 0]), None]),
}


@row("one transparent colour: PNG's tRNS with grey of 1 to 8 bits, RGB or a palette; GIF")
@pytest.mark.parametrize("background", [WHITE, RED])
@pytest.mark.parametrize("kind", SEEN_THROUGH)
def test_one_transparent_colour(kind: str, background: list[int]) -> None:
    picture, pixels = SEEN_THROUGH[kind]
    found = decoded(picture, background)
    assert len(found) == (1 if "bit" in kind and background == WHITE else len(found))
    seen = [background if one is None else one if isinstance(one, list) else [one] * 3 for one in pixels]
    np.testing.assert_array_equal(np.broadcast_to(found, (3, *found.shape[1:]))[:, 0], np.array(seen).T)
    half = png(b"\0\1", 2, 8, 3, PALETTE, (b"tRNS", b"\x80"))
    mixed = over(np.array([[[1, 2, 3], [10, 11, 12]]]), np.array([[128, 255]]), background)
    np.testing.assert_array_equal(decoded(half, background), chw(mixed))


@row("grey of 1, 2, 4 or 8 bits, and nothing else in all sources")
def test_grey_has_one_channel() -> None:
    np.testing.assert_array_equal(decoded(encoded(GREYS)), GREYS[None])
    assert decoded(png(b"\x1b", 4, 2, 0)).tolist() == [[[0, 85, 170, 255]]]
    assert decoded(png(b"\x1f", 2, 4, 0)).tolist() == [[[17, 255]]]
    assert decoded(png(b"\x40", 2, 1, 0)).tolist() == [[[0, 255]]]
    assert decoded(tiff(GREYS[..., None], 0)).tolist() == [(255 - GREYS).tolist()]  # white is zero


@row("colour anywhere among grey")
@pytest.mark.parametrize("at", [0, 7, 19])
def test_colour_anywhere_among_grey(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_READ_ROWS", 3)
    greys = np.random.default_rng(2).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    pictures = [encoded(one) for one in greys]
    colours = [encoded(np.dstack([one] * 3)) for one in greys]
    told: list[str] = []
    mixed = prepare(
        parquet(tmp_path / "mixed", [*pictures[:at], colours[at], *pictures[at + 1 :]]),
        tmp_path / "cache",
        on_progress=lambda what, *_: told.append(what),
    )
    assert mixed.train.shape == (3, 4, 4)
    assert prints(mixed) == prints(prepare(parquet(tmp_path / "colour", colours), tmp_path / "cache"))
    assert ("the rows of data.train, in colour" in told) == (at > 0)
    assert prepare(parquet(tmp_path / "grey", pictures), tmp_path / "cache").train.shape == (1, 4, 4)


@row("a palette, or grey with alpha")
def test_palettes_are_colours() -> None:
    palette = Image.fromarray(GREYS).convert("P")
    np.testing.assert_array_equal(decoded(encoded(palette)), np.stack([GREYS] * 3))
    solid = Image.merge("LA", [Image.fromarray(GREYS), Image.new("L", (6, 4), 255)])
    np.testing.assert_array_equal(decoded(encoded(solid)), np.stack([GREYS] * 3))


@row("CMYK and YCCK (JPEG, also inverted as Adobe writes them), CMYK, YCbCr and LAB (TIFF)")
def test_other_colours() -> None:
    flat = np.full((8, 8, 3), [210, 120, 30], np.uint8)
    cmyk = Image.fromarray(flat).convert("CMYK")
    for picture in (
        encoded(cmyk, "JPEG", quality=100),
        encoded(cmyk, "TIFF"),
        encoded(Image.fromarray(flat).convert("YCbCr"), "TIFF"),
        encoded(Image.fromarray(flat).convert("LAB"), "TIFF"),
        encoded(flat, "TIFF", compression="jpeg", quality=100),
    ):
        assert np.abs(decoded(picture).astype(int) - chw(flat)).max() <= 3
    # What is stored is inverted, and read as YCCK: an inverted luma of 200, no chroma and no black.
    stored = Image.fromarray(np.full((8, 8, 4), [55, 127, 127, 0], np.uint8), "CMYK")
    ycck = re.sub(
        rb"(Adobe\0d.{4})\0", lambda found: found[1] + b"\2", encoded(stored, "JPEG", quality=100), flags=re.S
    )
    assert np.abs(decoded(ycck).astype(int) - (255 - 200)).max() <= 3


DEEP = {
    "grey PNG": png(struct.pack(">2H", 300, 65535), 2, 16, 0),
    "RGB PNG": png(struct.pack(">3H", 300, 65535, 2), 1, 16, 2),
    "grey PNG with alpha": png(struct.pack(">2H", 300, 65535), 1, 16, 4),
    "RGB PNG with alpha": png(struct.pack(">4H", 300, 65535, 2, 9), 1, 16, 6),
    "grey TIFF": tiff(GREYS[..., None].astype("<u2"), 1),
    "inverted TIFF": tiff(GREYS[..., None].astype("<u2"), 0),
    "TIFF of 12 bits": tiff(GREYS[..., None].astype("<u2"), 1).replace(
        struct.pack("<HHIH", 258, 3, 1, 16), struct.pack("<HHIH", 258, 3, 1, 12)
    ),
    "big-endian TIFF": encoded(Image.fromarray(GREYS).convert("I;16B"), "TIFF"),
    "RGB TIFF": tiff(COLOURS.astype("<u2"), 2),
    "RGB TIFF with alpha": tiff(np.dstack([COLOURS, ALPHA]).astype("<u2"), 2, 2),
    "CMYK TIFF": tiff(np.dstack([COLOURS, ALPHA]).astype("<u2"), 5),
    "TIFF of 32 bits": encoded(Image.fromarray(GREYS.astype(np.int32)), "TIFF"),
    "TIFF of floats": encoded(Image.fromarray(GREYS.astype(np.float32)), "TIFF"),
    "PGM": b"P5 2 1 65535\n" + struct.pack(">2H", 300, 65535),
    "PPM": b"P6 1 1 65535\n" + struct.pack(">3H", 300, 65535, 2),
    "PPM of 10 bits": b"P6 1 1 1023\n" + struct.pack(">3H", 300, 1023, 2),
    "PGM as text": b"P2 2 1 1000\n999 3\n",
    "PPM as text": b"P3 1 1 1000\n999 3 4\n",
    "PFM": b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5),
}


@row("more than 8 bits a channel, in any mode: PNG, TIFF and PGM/PPM of 10, 12, 16 or 32 bits, floats")
@pytest.mark.parametrize("shape", [None, [1, 1, 2], [3, 1, 1]], ids=str)
@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits(kind: str, shape: Any) -> None:
    with pytest.raises(RefusedError, match=r"(?s)the image in row 0.*more than 8 bits"):
        decoded(DEEP[kind], shape=shape)


def test_fewer_grey_levels_are_spread() -> None:
    assert decoded(b"P5 2 1 15\n" + bytes([5, 15])).tolist() == [[[85, 255]]]


FRAMES = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
SEVERAL = {
    "GIF": encoded(FRAMES[0].convert("P"), "GIF", save_all=True, append_images=[FRAMES[1].convert("P")]),
    "APNG": encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "WEBP": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
    "TIFF": encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
    "TIFF, compressed": encoded(
        FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:], compression="tiff_lzw"
    ),
}  # fmt: skip


@row("several frames or pages: GIF, APNG, WebP, TIFF")
@pytest.mark.parametrize("kind", SEVERAL)
def test_the_first_frame_is_taken_and_said(kind: str, tmp_path: Path) -> None:
    first = np.asarray(Image.open(io.BytesIO(SEVERAL[kind])).convert("RGB"))
    assert kind == "GIF" or (first == COLOURS).all()
    np.testing.assert_array_equal(decoded(SEVERAL[kind]), chw(first))
    data = parquet(tmp_path / "data", [SEVERAL[kind]] * 3 + [encoded(COLOURS)] * 7)
    for _ in range(2):  # also where they are prepared already
        console = Console(file=io.StringIO(), width=200)
        prepare_shown(data, str(tmp_path / "cache"), console)
        line = "data.train: 3 images have several frames or pages, of which the first one is taken"
        assert console.file.getvalue().splitlines().count(line) == 1  # type: ignore[attr-defined]


@row("a preview or a second picture within a JPEG (EXIF, MPO)")
def test_previews_are_no_frames(tmp_path: Path) -> None:
    picture = encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:])
    assert Image.open(io.BytesIO(picture)).format == "MPO"
    first = np.asarray(Image.open(io.BytesIO(encoded(FRAMES[0], "JPEG"))))
    np.testing.assert_array_equal(decoded(picture), chw(first))
    told = prepare(parquet(tmp_path / "data", [picture] * 10), tmp_path / "cache").findings
    assert not [line for line in told if "frames" in line]


@row("colour profiles (ICC), gamma, resolution, comments")
def test_profiles_are_not_applied() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    comments = PngImagePlugin.PngInfo()
    comments.add_text("Comment", "a bird")
    comments.add(b"gAMA", struct.pack(">I", 100_000))
    for options in ({"icc_profile": profile}, {"dpi": (300, 72)}, {"pnginfo": comments}):
        np.testing.assert_array_equal(decoded(encoded(COLOURS, **options)), chw(COLOURS))


@row("a file that is cut off or damaged")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_cut_files(kind: str) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(noise, kind)
    assert decoded(whole).shape == (3, 64, 64)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(RefusedError, match="cannot decode the image in row 0"):
            decoded(whole[: int(len(whole) * share)])


@row("more than 67,108,864 pixels")
def test_bombs_are_refused_without_a_warning() -> None:
    """By the header, below and above what Pillow warns of or refuses itself."""
    bombs = []
    for side in (9_000, 10_000, 40_000):
        bomb = png(b"", 1, 8, 2).replace(struct.pack(">II", 1, 1), struct.pack(">II", side, side))
        bombs.append(bomb[:29] + struct.pack(">I", zlib.crc32(bomb[12:29])) + bomb[33:])
        with pytest.raises(RefusedError, match=r"(?s)cannot decode the image in row 0.*pixels"):
            decoded(bombs[-1])
    code = f"""
from akd_dist.data import pictures
for bomb in {bombs}:
    try:
        pictures.open_picture(bomb)
    except Exception as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert [" pixels" in line and "warning" not in line for line in ran.stdout.lower().splitlines()] == [True] * 3
    assert ran.stderr == ""


@row("other sizes, as they are shown")
def test_sizes_are_those_that_are_shown(tmp_path: Path) -> None:
    upright, lying = (encoded(COLOURS, "JPEG", exif=exif(orientation)) for orientation in (1, 6))
    stored_upright = encoded(COLOURS.swapaxes(0, 1).copy(), "JPEG")
    data = parquet(tmp_path / "data", [lying] * 5 + [stored_upright] * 5)
    assert prepare(data, tmp_path / "cache").train.shape == (3, 6, 4)
    at_its_end = png(COLOURS[0].tobytes(), 6, 8, 2, after=exif(6).tobytes()[6:])
    for first, other, sizes in (
        (upright, lying, (r"\[3, 6, 4\]", r"\[3, 4, 6\]")),
        (encoded(COLOURS[:1]), at_its_end, (r"\[3, 6, 1\]", r"\[3, 1, 6\]")),
        (encoded(GREYS), encoded(COLOURS[:2]), (r"\[3, 2, 6\]", r"\[1, 4, 6\]")),
    ):
        data = parquet(tmp_path / "data", [*[first] * 6, other, *[first] * 3])
        with pytest.raises(RefusedError, match=rf"(?s)another shape in row 6.*{sizes[0]}.*{sizes[1]}, as the first"):
            prepare(data, tmp_path / "cache")


@row("other formats: AVIF, JPEG 2000, HEIC, SVG, EPS, PDF")
@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "EPS", "PDF", "ICO"])
def test_other_formats(kind: str) -> None:
    with pytest.raises(RefusedError, match=r"(?s)cannot decode the image.*none of these formats"):
        decoded(encoded(Image.new("RGB", (16, 16)), kind))
