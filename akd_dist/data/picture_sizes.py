"""Which sizes the pictures of each source have, and one that suits all of them: for whoever has not said one."""

import contextlib
from collections.abc import Mapping, Sequence

from akd_dist.base.errors import RefusedError
from akd_dist.data import framing
from akd_dist.data.columns import Images
from akd_dist.data.noted import MixedSizesError
from akd_dist.data.sources.base import Source

# How many pictures of a source are looked at, by their headers: in so many places, as those of one class lie together.
_PLACES, _TOGETHER = 8, 32
# The most sizes of a source that a message names one by one.
_SHOWN = 3


def with_sizes(error: MixedSizesError, sources: Mapping[str, tuple[Source, Images]]) -> MixedSizesError:
    """The same, with the sizes that each source has, and with advice that suits all of them.

    Args:
        error: what was found, in whichever source.
        sources: all that hold pictures, by their names in the recipe.
    """
    sizes = {name: _some_sizes(source, inputs) for name, (source, inputs) in sources.items()}
    told = [f"data.{name} ({sources[name][0].name}): {_in_words(found)}" for name, found in sizes.items() if found]
    sides = [min(size) for found in sizes.values() for size in found]
    advice = framing.advice(sides) if sides else error.next
    got = "; ".join(filter(None, [error.got, *told]))
    return MixedSizesError(error.what, got=got, expected=error.expected, next=advice)


def _some_sizes(source: Source, inputs: Images) -> list[framing.Size]:
    """Height and width of some pictures, which are the same each time."""
    found: list[framing.Size] = []
    for start in range(0, source.rows, max(_TOGETHER, -(-source.rows // _PLACES))):
        with contextlib.suppress(RefusedError):  # of another row, which is not what this is about
            for block in source.blocks(_TOGETHER, start, min(start + _TOGETHER, source.rows)):
                found += inputs.sizes(block.inputs, block.rows)
    return found


def _in_words(sizes: Sequence[framing.Size]) -> str:
    different = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    shown = [f"{height} x {width}" for height, width in different]
    return ", ".join(shown) if len(shown) <= _SHOWN else f"{len(shown)} sizes from {shown[0]} to {shown[-1]}"
