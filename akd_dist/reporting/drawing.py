"""A figure as inline SVG: text stays text and takes the page's font, ink is the page's own colour."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from akd_dist.base.formatting import ANNEALING, CONTINUATION, CUSTOM, HARD_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVE_COLOURS = {
    HARD_LABELS: "#e07a2f",
    "kd": "#1fa187",
    "takd": "#9a62d3",
    ANNEALING: "#3b82d6",
    CONTINUATION: "#d14f7c",
    CUSTOM: "#8aa52b",
}
# One hue per student size, smallest first; mid-tones that read on white and on near-black.
SIZE_COLOURS = ("#d14f7c", "#9a62d3", "#3f8fd0", "#1fa187", "#8aa52b", "#d9902f")
OTHER_COLOUR = "#7d8794"
TEMPERATURE_COLOUR = "#b0602a"
# Stands for "the colour of the page's text" in what matplotlib draws; the page's style sheet decides what that is.
INK = "#010203"
LEGEND_ENTRIES, LEGEND_LETTERS = 12, 22  # letters of a label that still fit three beside each other
DASHED, DOTTED = (0, (5, 4)), (0, (1, 1.5))
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 11.5,
    "grid.alpha": 0.14,
    "grid.color": INK,
    "grid.linewidth": 0.8,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "svg.fonttype": "none",
    # Ids are otherwise drawn at random; the same results should give the same page.
    "svg.hashsalt": "akd-dist",
    "text.color": INK,
    # A `$` in a model's name is a dollar sign.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Picture:
    """One figure of the page, and the numbers that it shows."""

    title: str
    caption: str
    svg: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def picture(
    title: str,
    caption: str,
    fill: Callable[[Axes], None],
    columns: Sequence[str] = (),
    rows: Sequence[tuple[str, ...]] = (),
) -> Picture:
    """Draw a figure on one pair of axes; its title and caption are also what is read where it is not seen."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        fill(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = inline_svg(buffer.getvalue(), f"{title}. {caption}")
    return Picture(title, caption, svg, tuple(columns), tuple(rows))


def inline_svg(document: str, label: str) -> str:
    """The `<svg>` element of a matplotlib document, fit for a page.

    It loses its prologue, metadata, fixed size, repeated ids and fonts: text takes the page's font and ink its colour.

    Args:
        label: what is read out in its place.
    """
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Every figure of matplotlib has the same ids, and a page holds many figures.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    told = f'<svg role="img" aria-label="{html.escape(label)}"'
    return svg.replace("<svg", told, 1).replace(INK, "currentColor").strip()


def finish(axes: Axes, xlabel: str, ylabel: str, *others: Axes) -> None:
    """Name the axes, and put one legend over the figure, where it hides nothing.

    There is none at all when it would be larger than the figure.

    Args:
        others: further axes whose lines the legend names.
    """
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    handles = [handle for each in (axes, *others) for handle in each.get_legend_handles_labels()[0]]
    if handles and len(handles) <= LEGEND_ENTRIES:
        long = max(len(str(handle.get_label())) for handle in handles) > LEGEND_LETTERS
        axes.figure.legend(handles=handles, loc="outside upper left", ncols=2 if long else 3)


def legible(name: str) -> str:
    """A name as a legend takes it: what begins with an underscore would be left out of it."""
    return f"\u200b{name}" if name.startswith("_") else name


def logarithmic(axes: Axes) -> None:
    """A log scale whose ticks are plain numbers: 0.2, 0.5, 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
