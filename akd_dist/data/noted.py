"""What users should know of pictures that were read, a line each; and that their sizes are mixed."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from akd_dist import recipe
from akd_dist.base.errors import RefusedError


class MixedSizesError(RefusedError):
    """Pictures are of several sizes, and nothing says to which one they are brought."""


@dataclass(frozen=True)
class Noted:
    """What was done to pictures that users should know of: how many there were."""

    frames: int = 0
    """Those of which only the first of several frames was taken."""
    enlarged: int = 0
    """Those that were smaller than the size that they were brought to."""

    def __add__(self, other: Noted) -> Noted:
        return Noted(self.frames + other.frames, self.enlarged + other.enlarged)


def read_from(lines: Sequence[str], sources: Collection[str]) -> list[str]:
    """Of lines on rows those that are not on the pictures of other sources than these, by their names in the recipe."""
    found = ((line, re.match(r"data\.(\w+): ", line)) for line in lines)
    return [line for line, source in found if source is None or source[1] in sources]


def lines_of(noted: Noted, image: recipe.Image, source: str) -> list[str]:
    """A line on each that there were some of."""
    several = "1 image has" if noted.frames == 1 else f"{noted.frames:,} images have"
    lines = [f"{source}: {several} several frames or pages, of which the first one is taken"] if noted.frames else []
    if noted.enlarged and image.frame is not None:
        small = "1 image is" if noted.enlarged == 1 else f"{noted.enlarged:,} images are"
        size = " x ".join(map(str, image.frame))
        lines.append(f"{source}: {small} smaller than {size}, and enlarged")
    return lines
