"""Pictures of any size -> pictures of the size that a recipe says: resized, cropped at the center, padded.

Resizing is Pillow's bilinear filter, which widens as pictures shrink, so that nothing is skipped between pixels
(antialiasing): what torchvision's `Resize` does to images of Pillow, and so what most models of pictures were trained
and are measured with. It reckons in whole numbers, the same on every machine. Sizes and places are torchvision's too.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from akd_dist import recipe

USUAL = 224
"""The side of pictures that most models of them are made for."""
# The largest picture that is resized before it is cropped. Of a larger one the part alone is resized, whose place
# Pillow takes in float32: then a few pixels are apart by a level from those of the whole one, which is what others do.
_WHOLE_PIXELS = 1 << 24
Size = tuple[int, int]
"""Height and width."""


def framed(picture: Image.Image, image: recipe.Image) -> Image.Image:
    """A picture of mode L or RGB in the recipe's size; as it is where the recipe says none, or it has it already.

    Of a very long picture, such as one of 1 x 10,000 pixels, no more is resized than is kept.
    """
    if image.frame is None or image.frame == (picture.height, picture.width):
        return picture
    (height, width), resized = image.frame, _resized(picture.height, picture.width, image)
    inner = min(height, resized[0]), min(width, resized[1])
    part = _part(picture, resized, inner)
    if inner == image.frame:
        return part
    whole = Image.new(picture.mode, (width, height), _behind(picture.mode, image.background))
    whole.paste(part, ((width - inner[1]) // 2, (height - inner[0]) // 2))
    return whole


def _part(picture: Image.Image, resized: Size, inner: Size) -> Image.Image:
    """What lies at the center of the resized picture."""
    # Halves go to the even number, as torchvision rounds them.
    top, left = (round((whole - part) / 2) for whole, part in zip(resized, inner, strict=True))
    if resized[0] * resized[1] <= _WHOLE_PIXELS:
        whole = picture.resize(resized[::-1], Image.Resampling.BILINEAR)
        return whole.crop((left, top, left + inner[1], top + inner[0]))
    down, across = picture.height / resized[0], picture.width / resized[1]
    box = left * across, top * down, (left + inner[1]) * across, (top + inner[0]) * down
    box = (*box[:2], min(box[2], picture.width), min(box[3], picture.height))
    return picture.resize(inner[::-1], Image.Resampling.BILINEAR, box)


def enlarges(size: Size, image: recipe.Image) -> bool:
    """Whether a picture of this size is made larger, which shows nothing more of it."""
    if image.frame is None or image.resize == "none":
        return False
    return any(new > old for new, old in zip(_resized(*size, image), size, strict=True))


def advice(sides: Sequence[int]) -> str:
    """What to say in a recipe, so that pictures whose shorter sides are these come to one size that suits them."""
    return advice_for((min(USUAL, int(np.median(sides))),) * 2)


def advice_for(size: Sequence[int]) -> str:
    """The same for this height and width."""
    return f"say in the recipe to which size they are all brought, for example: put {line_for(size)}"


def line_for(size: Sequence[int]) -> str:
    """The line of a recipe that brings pictures to this height and width, and where it is put."""
    said = size[0] if len(set(size)) == 1 else list(size)
    return f"this line under `data:`\n  image: {{size: {said}, resize: shorter}}"


def _resized(height: int, width: int, image: recipe.Image) -> Size:
    """The size that a picture is resized to before it is cropped or padded."""
    assert image.frame is not None
    high, wide = image.frame
    if image.resize in ("none", "stretch"):
        return (height, width) if image.resize == "none" else image.frame
    by_height = high * width >= wide * height  # to cover the frame, its height decides
    if image.resize == "longer":
        by_height = not by_height
    # The other side as torchvision has it: cut to a whole number, which may not leave the frame uncovered.
    if by_height:
        found = high, int(high * width / height)
        return (high, max(wide, found[1])) if image.resize == "shorter" else (high, max(1, found[1]))
    found = int(wide * height / width), wide
    return (max(high, found[0]), wide) if image.resize == "shorter" else (max(1, found[0]), wide)


def _behind(mode: str, background: Sequence[int]) -> int | tuple[int, ...]:
    colour = Image.new("RGB", (1, 1), tuple(background)).convert(mode).getpixel((0, 0))
    assert colour is not None
    return tuple(map(int, colour)) if isinstance(colour, tuple) else int(colour)
