"""How results are told: the names of objectives and metrics, numbers as text, and the house's table for terminals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from akd_dist.base.errors import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

ANNEALING, CONTINUATION, HARD_LABELS = "annealing_kd", "continuation_kd", "hard_labels"
CUSTOM = "custom"
OBJECTIVE_LABELS = {
    HARD_LABELS: "from scratch",
    "kd": "KD",
    "takd": "TAKD",
    ANNEALING: "Annealing-KD",
    CONTINUATION: "Continuation-KD",
    CUSTOM: "own objective",
}
"""How the papers call each objective, in the order of their tables; and one of the user's own."""


def objective_label(objective: str, stage1_loss: str | None = None) -> str:
    """How the papers call an objective; of Annealing-KD also what stage I compares by, where that is not the paper's
    squared distance.
    """
    label = OBJECTIVE_LABELS.get(objective, objective)
    return f"{label} by cross-entropy" if stage1_loss == "cross_entropy" else label


@dataclass(frozen=True)
class MetricFormat:
    """A metric as a reader meets it: shares of rows in percent, correlations between -1 and 1 and nats as they are."""

    name: str
    """As it stands in a sentence."""
    short: str
    """As it heads a narrow column."""
    percent: bool = False
    """Whether it is shown in percent."""
    lowest: bool = False
    """Whether less of it is better."""
    digits: int = 4
    """How many are shown behind the point, where it is not in percent."""
    unit: str = ""
    """What numbers are of, where that has a name."""

    @property
    def title(self) -> str:
        """Its name as a title begins with it; a function's as it is."""
        return self.name if ":" in self.name else self.name[0].upper() + self.name[1:]

    @property
    def label(self) -> str:
        """Its name with its unit, for columns and axes."""
        unit = "%" if self.percent else self.unit
        return f"{self.name}, {unit}" if unit else self.name

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be shown."""
        return 100.0 if self.percent else 1.0

    @property
    def difference(self) -> str:
        """The unit of a difference, in words."""
        return "percentage points" if self.percent else self.label

    @property
    def aside(self) -> str:
        """What a sentence about it has to add: which way is better, where that is not up."""
        return "; less is better" if self.lowest else ""

    def standing(self, value: float) -> float:
        """A value so that more is better, by which results are ranked."""
        return -value if self.lowest else value

    def text(self, value: float | None) -> str:
        """0.98333 as `98.33` in percent, else as `0.9833`; a missing number as a dash."""
        if self.percent or value is None or not math.isfinite(value):
            return percent(value)
        return f"{value:.{self.digits}f}"

    def with_unit(self, text: str) -> str:
        """A text of these numbers with its unit, where it stands alone."""
        return f"{text} %" if self.percent else text

    def gain(self, value: float | None) -> str:
        """A difference with its sign, in percentage points or as it is; a dash for none."""
        if value is None:
            return "-"
        return signed(100 * value, 2) if self.percent else signed(value, self.digits)


SHOWN = {
    "accuracy": MetricFormat("accuracy", "accuracy", percent=True),
    "f1": MetricFormat("F1", "F1", percent=True),
    "matthews": MetricFormat("Matthews' correlation", "Matthews"),
    "pearson": MetricFormat("Pearson's correlation", "Pearson"),
    "spearman": MetricFormat("Spearman's correlation", "Spearman"),
    "cross_entropy": MetricFormat("cross-entropy", "cross-entropy", lowest=True, digits=3, unit="nats"),
    "perplexity": MetricFormat("perplexity", "perplexity", lowest=True, digits=2),
    "bits_per_byte": MetricFormat("bits per byte", "bits/byte", lowest=True, digits=3),
    "divergence": MetricFormat("divergence from the teacher", "divergence", lowest=True, digits=3, unit="nats"),
    "agreement": MetricFormat("agreement", "agreement", percent=True),
    CUSTOM: MetricFormat("own metric", "own"),
}
BESIDE = ("perplexity", "bits_per_byte", "accuracy", "divergence")
"""What tables show of a language model beside its primary metric and its agreement, where it was measured."""


def metric_format(metric: str, name: str | None = None) -> MetricFormat:
    """How a metric is shown; one of the user's own under its name, where a document says it."""
    return SHOWN[metric] if name is None else MetricFormat(name, name)


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.98333 as `98.33`; a missing number as a dash."""
    return "-" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.{digits}f}"


def thousands(value: int | None) -> str:
    """1234 as `1,234`; a missing number as a dash."""
    return "-" if value is None else f"{value:,}"


def signed(value: float, digits: int) -> str:
    """`+1.50`, `-0.02`; what is shown as nothing has no sign."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def amount(value: float) -> str:
    """A number to two significant digits below a hundred, whole above: `0.65`, `2.6`, `1,234`."""
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:,.0f}"


def share(parameters: int | None, of: int | None) -> str:
    """A student's size as a percentage of its teacher's, to two significant digits below ten; a dash for none."""
    part = 100 * parameters / of if of and parameters is not None else math.nan
    if not math.isfinite(part):
        return "-"
    return f"{part:.0f} %" if part >= 10 else f"{part:.2g} %"


def seconds(value: float | None) -> str:
    """Seconds to one decimal below a hundred, whole above; short ones to two digits; a dash for none."""
    if value is None:
        return "-"
    if 0 < abs(value) < 1:
        return f"{value:.2g}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def duration(value: float | None) -> str:
    """Seconds as people say them: `0.35 s`, `48 s`, `3 min 20 s`, `2 h 5 min`; a dash for none."""
    if value is None:
        return "-"
    whole, sign = round(abs(value)), "-" if value < 0 else ""
    if whole < 60:
        return f"{value:.2g} s" if whole < 10 else f"{sign}{whole} s"
    if whole < 3600:
        return f"{sign}{whole // 60} min {whole % 60} s"
    return f"{sign}{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes, as people say them: 812 B, 34.5 kB, 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def counted(count: int, noun: str) -> str:
    """A number with its noun: `1 student`, `2 students`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def some_of(names: Sequence[str], at: int = 0, most: int = 10) -> str:
    """Names in a row, for a message; of very many a few from one of them on, and how many there are."""
    if len(names) <= most:
        return ", ".join(names)
    before, after = ("..., " if at else ""), (", ..." if at + most < len(names) else "")
    return f"{before}{', '.join(names[at : at + most])}{after} ({len(names):,} in all)"


def house_table(title: str | None = None, caption: Text | None = None) -> Table:
    """An empty table in the style of the house: no frame and little padding, so that much fits eighty columns."""
    from rich import box
    from rich.table import Table

    class HouseTable(Table):
        def add_row(self, *cells: Any, **style: Any) -> None:
            super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **style)

    return HouseTable(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


NARROWEST = 12
"""Characters to which a column of text is folded at most, before those of numbers have to give way as well."""


def uncut(table: Table, width: int) -> Table:
    """The table so that a terminal of `width` characters shows all of it: text is folded, and nothing is cut off."""
    from rich.cells import cell_len

    _, right, _, left = table.padding
    needed = (right + left + 1) * len(table.columns)
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        widest = max(cell_len(line) for cell in cells for line in cell.split("\n"))
        needed += widest if column.no_wrap else min(widest, NARROWEST)
        if not column.no_wrap:
            column.overflow = "fold"
    if needed > width:
        for column in table.columns:
            column.no_wrap, column.overflow = False, "fold"
    return table


def shortened(names: Sequence[str], room: int) -> list[str]:
    """Names cut in their middle to `room` characters, so that those that differ still do, as far as that can be.

    The beginning of a student's name tells its model, its end the temperature and the seed: by default twice as much of
    the end is kept. Where that makes different names equal, another place is cut, or what all have in common.
    """
    room = max(room, 3)
    usual = (room - 1) * 2 // 3
    ends = sorted(range(room), key=lambda end: abs(end - usual))
    cuts = [[_cut(name, room, end) for name in names] for end in ends]
    if len({name for name in names if len(name) > room}) > 1:
        start = _alike(names)
        end = min(_alike([name[::-1] for name in names]), min(map(len, names)) - start)
        inner = [f"…{name[start : len(name) - end]}…" for name in names]
        cuts.append(
            [name if len(name) <= room else _cut(part, room, usual) for name, part in zip(names, inner, strict=True)]
        )
    # The cut that leaves the most names different; of equals the first, which is the usual one.
    return max(cuts, key=lambda cut: len(set(cut)))


def _alike(names: Sequence[str]) -> int:
    """With how many letters all of them begin alike."""
    return next(
        (n for n, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), min(map(len, names))
    )


def _cut(name: str, room: int, end: int) -> str:
    return name if len(name) <= room else f"{name[: room - 1 - end]}…{name[len(name) - end :]}"
