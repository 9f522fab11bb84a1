"""One encoded picture -> the pixels that a viewer shows: turned as it says, laid over a background, 8 bits a channel.

The table in docs/reference/data.md says what becomes of which kind of picture; tests/data/test_pictures.py has a case
for each.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import ExifTags, Image

from akd_dist import recipe
from akd_dist.data.framing import Size, framed

RULES = 2
"""Number of these rules, part of the key of prepared rows: raise it with every change of the pixels that come out."""
# Decoders that run no program: Pillow would hand an EPS to Ghostscript, which executes it.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 1 << 26
"""Of one picture, before it is decoded."""

# ImageOps.exif_transpose writes the other EXIF tags anew as well, and fails where one of them is spoilt.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
# PNG with 2 and 4 bits a pixel: what one grey level becomes when Pillow spreads them over 0 to 255.
_GREY_STEPS = {"L;2": 255 // 3, "L;4": 255 // 15}
# The number of the TIFF tag BitsPerSample.
_BITS_PER_SAMPLE = 258

# Pillow warns of pictures that are larger than those that are refused here, and of EXIF that is read as if it were not
# there.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


def open_picture(encoded: bytes) -> Image.Image:
    """Read the header of a picture; to be closed.

    Raises:
        ValueError: it has more than MAX_PIXELS, or more than 8 bits a channel.
        Exception: of many kinds, whatever a spoilt picture makes a decoder raise.
    """
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    check(image)
    return image


def check(image: Image.Image) -> None:
    """Refuse what is too large, and what has more than 8 bits a channel: by the header, before it is decoded.

    Raises:
        ValueError: says what it has.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width:,} x {image.height:,} pixels are too many")
    bits = _bits(image)
    if bits > 8:
        raise ValueError(f"mode {image.mode} with {bits} bits a channel, and more than 8 bits are not taken")


def is_grey(picture: Image.Image, image: recipe.Image) -> bool:
    """Whether `shown` makes one channel of a picture, by its header: it is grey without alpha, unless `channels` says.

    Where one grey level is transparent, or the background is seen beside it, and that has a colour, the picture has
    that colour as well.
    """
    if image.channels is not None:
        return image.channels == 1
    behind = "transparency" in picture.info or image.pads
    return picture.mode in ("1", "L") and (not behind or len(set(image.background)) == 1)


def size(image: Image.Image) -> tuple[int, int]:
    """Height and width as `shown` gives them, as far as the header tells: a PNG may tell at its end that it lies."""
    turned = "exif" in image.info and _orientation(image) in _SIDEWAYS
    return (image.width, image.height) if turned else (image.height, image.width)


def has_frames(image: Image.Image) -> bool:
    """Whether a picture that is not yet decoded has several frames or pages. Previews within a JPEG are none."""
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def shown(picture: Image.Image, image: recipe.Image) -> Image.Image:
    """What a viewer shows of a picture, in the size that the recipe says: mode L if it `is_grey`, else RGB.

    Of several frames, the first one.

    Args:
        picture: as `open_picture` gives it, or any other that `check` lets pass; it is left as it is, but decoded.
        image: what is behind it, and how it comes to its size.

    Raises:
        Exception: of many kinds, as `open_picture`.
    """
    return framed(whole(picture, image), image)


def whole(picture: Image.Image, image: recipe.Image) -> Image.Image:
    """The same, in the size that it has."""
    decode(picture)
    mode = "L" if is_grey(picture, image) else "RGB"
    turn = _TURNS.get(_orientation(picture))
    if picture.has_transparency_data:
        picture = _laid_over(picture, image.background, mode)
    if picture.mode != mode:
        picture = picture.convert(mode)
    return picture if turn is None else picture.transpose(turn)


@dataclass(frozen=True)
class Crop:
    """A part of a whole picture, in pixels as it is shown."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    """Whether it is mirrored, left to right."""
    whole: Size
    """Height and width of the whole picture."""


def cropped(encoded: bytes, image: recipe.Image, crops: Sequence[Crop], size: Size) -> Iterator[Image.Image]:
    """Parts of what `whole` shows, resized to a height and width: as torchvision's `resized_crop`.

    A JPEG of which at least four pixels each way make one is decoded at a half, a quarter or an eighth of its size,
    which its decoder does in less time, and resized from that. Parts that need the same size are of one decoding.
    """
    decoded = dict[int, Image.Image]()
    for crop in crops:
        factor = _reduction(crop, size)
        if factor not in decoded:
            with open_picture(encoded) as picture:
                reduced = factor if picture.format == "JPEG" else 1
                if reduced > 1:
                    picture.draft(None, (picture.width // reduced, picture.height // reduced))
                if reduced not in decoded:
                    decoded[reduced] = whole(picture, image)
                decoded[factor] = decoded[reduced]
        yield _part(decoded[factor], crop, size)


def _part(shown: Image.Image, crop: Crop, size: Size) -> Image.Image:
    """A part of a whole picture, which is shown as large as it was decoded."""
    box = crop.left, crop.top, crop.left + crop.width, crop.top + crop.height
    if shown.size == crop.whole[::-1]:
        part = shown.crop(box).resize(size[::-1], Image.Resampling.BILINEAR)
    else:
        across, down = shown.width / crop.whole[1], shown.height / crop.whole[0]
        left, top, right, below = box[0] * across, box[1] * down, box[2] * across, box[3] * down
        inner = left, top, min(right, shown.width), min(below, shown.height)
        part = shown.resize(size[::-1], Image.Resampling.BILINEAR, inner)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else part


def _reduction(crop: Crop, size: Size) -> int:
    """By how much a picture may be reduced so that a part of it still has twice the pixels each way that it needs."""
    most = min(crop.height // size[0], crop.width // size[1]) // 2
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(most, 1))


def decode(image: Image.Image) -> None:
    """Load pixels and EXIF, so that threads may share the picture: from then on it is only read."""
    stored = _stored(image) if image.format == "PNG" else None
    if isinstance(stored, str) and stored in _GREY_STEPS and "transparency" in image.info:
        # Pillow spreads the grey levels of the pixels, but not the one that is transparent: without this, no pixel is.
        image.info["transparency"] *= _GREY_STEPS[stored]
    image.load()
    _orientation(image)


def _laid_over(picture: Image.Image, background: list[int], mode: str) -> Image.Image:
    """A picture with alpha, or with a transparent colour, over a background; what is opaque stays to the bit."""
    straight = {"La": "LA", "RGBa": "RGBA"}.get(picture.mode)  # their colours are multiplied by alpha
    # What has colours, before it or behind it, becomes grey only once one is laid over the other.
    mode = mode if picture.mode in ("1", "L", "LA", "La") and len(set(background)) == 1 else "RGB"
    layer = (picture.convert(straight) if straight else picture).convert("LA" if mode == "L" else "RGBA")
    below = Image.new(mode, picture.size, background[0] if mode == "L" else tuple(background))
    below.paste(layer.convert(mode), mask=layer.getchannel("A"))
    return below


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # spoilt EXIF makes it raise all kinds, and viewers show such a picture as it is stored
        return 1
    return orientation if isinstance(orientation, int) else 1


def _bits(image: Image.Image) -> int:
    """Bits a channel as they are stored: of colours with 16 bits Pillow keeps 8 without a word."""
    if image.mode[0] in "IF":
        return 16 if image.mode.startswith("I;16") else 32
    if image.format == "TIFF":
        return max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (1,)), default=1)
    stored = _stored(image)
    if image.format == "PNG":
        return 16 if "16" in str(stored) else 8
    if image.format == "PPM" and isinstance(stored, tuple):
        return int(stored[-1]).bit_length()  # the header says the largest value, as 255 or 65535
    return 8


def _stored(image: Image.Image) -> object:
    """What Pillow is about to tell the decoder of PNG and PPM: how a pixel is stored. None once it is decoded."""
    tiles = getattr(image, "tile", None)
    return tiles[0].args if tiles else None
